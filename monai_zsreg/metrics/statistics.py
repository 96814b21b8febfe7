# SPDX-License-Identifier: Apache-2.0
"""How often a method succeeds, and how well that is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from monai_zsreg.errors import require


class SuccessRate(NamedTuple):
    """A proportion with its Wilson limits."""

    rate: float
    low: float
    high: float
    successes: int
    n: int


def success_rate(errors: Sequence[float] | np.ndarray, threshold: float, confidence: float = 0.95) -> SuccessRate:
    """Fraction of pairs with an error below a threshold, with Wilson's score interval.

    The interval takes pairs as independent; several pairs of one subject are not.

    Args:
        errors: one number a pair; NaN and infinity (a failed run) count as no success.
        threshold: strict upper limit, in the unit of ``errors``.
        confidence: two-sided.

    Raises:
        RegistrationError: no errors, or a number out of range.
    """
    # scipy.stats takes 0.6 s to import
    from scipy.stats import binomtest

    require(0.0 < confidence < 1.0, "confidence", confidence, "a number between 0 and 1")
    values = np.asarray(errors, dtype=np.float64).ravel()
    require(len(values) > 0, "errors", [], "at least one number")
    successes, n = int((values < threshold).sum()), len(values)
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return SuccessRate(successes / n, float(interval.low), float(interval.high), successes, n)
