# SPDX-License-Identifier: Apache-2.0
"""Intervals for the figures of a comparison: success rates, and medians resampled by subject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from monai_zsreg.errors import RegistrationError

__all__ = ["Interval", "SuccessRate", "bootstrap_interval", "success_rate", "wilson_interval"]


class Interval(NamedTuple):
    """An estimate with its confidence limits."""

    estimate: float
    low: float
    high: float


class SuccessRate(NamedTuple):
    """A proportion with its Wilson limits."""

    rate: float
    low: float
    high: float
    successes: int
    n: int


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise RegistrationError("confidence", confidence, "a number between 0 and 1")


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion, without continuity correction (Wilson 1927).

    Args:
        successes: from 0 to ``n``.
        n: number of trials, 1 or more.
        confidence: two-sided.

    Raises:
        RegistrationError: a number out of range.
    """
    _check_confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise RegistrationError("successes", (successes, n), "0 <= successes <= n, n > 0")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # exactly 0 and 1 at the ends, which rounding would miss by 1e-17
    return (0.0 if successes == 0 else float(center - half)), (1.0 if successes == n else float(center + half))


def success_rate(errors: Sequence[float] | np.ndarray, threshold: float, confidence: float = 0.95) -> SuccessRate:
    """Share of errors below a threshold, with Wilson's interval.

    The interval takes the errors as independent; several pairs of one subject are not.

    Args:
        errors: one number a pair; NaN and infinity (a failed run) count as no success.
        threshold: strict upper limit, in the unit of ``errors``.
        confidence: two-sided.

    Raises:
        RegistrationError: no errors, or a number out of range.
    """
    values = np.asarray(errors, dtype=np.float64).ravel()
    if len(values) == 0:
        raise RegistrationError("errors", [], "at least one number")
    successes = int((values < threshold).sum())
    return SuccessRate(
        successes / len(values), *wilson_interval(successes, len(values), confidence), successes, len(values)
    )


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    subjects: Sequence[object] | np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.median,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap with the subject as the resampling unit.

    Each resample draws as many subjects as there are, with replacement, and takes all values of each.

    Args:
        values: one number a pair; a failed run counts as infinity.
        subjects: the subject of each value.
        statistic: of a 1D array; the median unless told otherwise.
        confidence: two-sided.
        resamples: number of resamples.
        seed: of the random generator.

    Returns:
        The statistic of all values with its limits. With one subject the limits are NaN: nothing is known about
        the spread between subjects.

    Raises:
        RegistrationError: lengths differ, no values, a NaN, or a number out of range.
    """
    _check_confidence(confidence)
    data = np.asarray(values, dtype=np.float64).ravel()
    if len(data) == 0 or np.isnan(data).any():
        raise RegistrationError("values", data.tolist(), "at least one number and no NaN (infinity for a failed run)")
    if len(subjects) != len(data):
        raise RegistrationError("subjects", len(subjects), f"one for each of {len(data)} values")
    if resamples < 1:
        raise RegistrationError("resamples", resamples, "1 or more")
    estimate = float(statistic(data))
    owners = np.unique([str(s) for s in subjects], return_inverse=True)[1]
    groups = [data[owners == owner] for owner in range(owners.max() + 1)]
    if len(groups) == 1:
        return Interval(estimate, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(groups), size=(resamples, len(groups)))
    results = [float(statistic(np.concatenate([groups[i] for i in row]))) for row in draws]
    tail = 50 * (1 - confidence)
    # no interpolation, which would turn infinities into NaN; outward, so the interval is never too short
    low = np.percentile(results, tail, method="lower")
    return Interval(estimate, float(low), float(np.percentile(results, 100 - tail, method="higher")))
