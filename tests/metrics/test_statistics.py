# SPDX-License-Identifier: Apache-2.0
"""Intervals against published values, scipy and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from monai_zsreg.errors import RegistrationError
from monai_zsreg.metrics import bootstrap_interval, success_rate, wilson_interval


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
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("successes, n", [(0, 1), (1, 1), (7, 8), (80, 80), (3, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_wilson_against_scipy(successes: int, n: int, confidence: float) -> None:
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_success_is_strictly_below_and_failed_runs_count() -> None:
    got = success_rate([0.5, 1.9, 2.0, np.nan, np.inf], threshold=2.0)
    assert (got.rate, got.successes, got.n) == (0.4, 2, 5)
    assert (got.low, got.high) == wilson_interval(2, 5)


def test_bootstrap_resamples_subjects_and_not_values() -> None:
    # 5 subjects with 40 equal values each: every resampled median is one of the subjects' values
    values = np.repeat([1.0, 2.0, 3.0, 4.0, 5.0], 40)
    subjects = np.repeat(list("abcde"), 40)
    by_subject = bootstrap_interval(values, subjects)
    by_value = bootstrap_interval(values, np.arange(200))
    assert by_subject.estimate == by_value.estimate == 3
    assert (by_subject.low, by_subject.high) == (1, 5)
    assert by_value.high - by_value.low <= 2


def test_bootstrap_of_the_mean_has_the_known_width() -> None:
    values = np.random.default_rng(0).normal(10, 2, 400)
    got = bootstrap_interval(values, np.arange(400), statistic=np.mean)
    half = 1.96 * values.std() / 20
    assert got.estimate == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04)


def test_bootstrap_repeats_with_its_seed() -> None:
    values, subjects = np.random.default_rng(1).random(30), np.arange(30) // 3
    first, again, other = (bootstrap_interval(values, subjects, np.mean, seed=seed) for seed in (4, 4, 5))
    assert first == again != other


def test_bootstrap_with_failed_runs_and_with_one_subject() -> None:
    got = bootstrap_interval([1.0, 2.0, np.inf, 3.0, np.inf], ["a", "b", "c", "d", "e"])
    assert got.estimate == 3 and got.high == np.inf and np.isfinite(got.low)
    alone = bootstrap_interval([1.0, 2.0], ["a", "a"])
    assert alone.estimate == 1.5 and np.isnan(alone.low) and np.isnan(alone.high)


def test_user_errors() -> None:
    cases = [
        ("errors", lambda: success_rate([], 2.0)),
        ("successes", lambda: wilson_interval(5, 4)),
        ("confidence", lambda: wilson_interval(1, 4, 1.0)),
        ("values", lambda: bootstrap_interval([1.0, np.nan], ["a", "b"])),
        ("subjects", lambda: bootstrap_interval([1.0, 2.0], ["a"])),
        ("resamples", lambda: bootstrap_interval([1.0, 2.0], ["a", "b"], resamples=0)),
    ]
    for name, call in cases:
        with pytest.raises(RegistrationError) as caught:
            call()
        assert caught.value.argument == name
