# SPDX-License-Identifier: Apache-2.0
"""Success rates against published intervals."""

from __future__ import annotations

import numpy as np
import pytest

from monai_zsreg.errors import RegistrationError
from monai_zsreg.metrics import success_rate


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        # Newcombe, Statistics in Medicine 1998;17:857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(successes: int, n: int, low: float, high: float) -> None:
    got = success_rate([0.0] * successes + [9.0] * (n - successes), threshold=1.0)
    assert (got.low, got.high) == pytest.approx((low, high), abs=5e-5)


def test_success_is_strictly_below_and_failed_runs_count() -> None:
    got = success_rate([0.5, 1.9, 2.0, np.nan, np.inf], threshold=2.0)
    assert (got.rate, got.successes, got.n) == (0.4, 2, 5)
    assert got.low < 0.4 < got.high


def test_user_errors() -> None:
    for name, call in (
        ("errors", lambda: success_rate([], 2.0)),
        ("confidence", lambda: success_rate([1.0], 2.0, 1.0)),
    ):
        with pytest.raises(RegistrationError) as caught:
            call()
        assert caught.value.argument == name
