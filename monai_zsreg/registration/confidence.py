# SPDX-License-Identifier: Apache-2.0
"""How far off a registration may be, and whether to trust it at all. All limits and constants stand here.

``python -m monai_zsreg.benchmark calibrate`` measures them: it fits the constants on one half of the subjects and
scores them on the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from monai_zsreg.errors import RegistrationError

__all__ = [
    "CALIBRATION",
    "FAIL",
    "LIMITS",
    "PASS",
    "WARN",
    "Calibration",
    "Limits",
    "Quality",
    "error_quantile",
    "honest_covariance",
    "judge",
    "spread_at",
]

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"


@dataclass(frozen=True)
class Calibration:
    """From the blocks' own covariance to the error that was measured.

    Attributes:
        inflation: factor of the standard deviation: blocks do not err independently, and contrasts differ.
        floor: standard deviation that remains where everything agrees, in steps of the finest level.
        shape: of the Weibull distribution of the error's length over its root mean square; 2 for a normal error in
            two directions, less for more outliers.
    """

    inflation: float
    floor: float
    shape: float


#: by number of dimensions
CALIBRATION = {2: Calibration(2.2, 0.01, 1.7), 3: Calibration(1.6, 0.01, 1.9)}


@dataclass(frozen=True)
class Limits:
    """Of the verdict; ``warn`` is passed before ``fail``.

    Attributes:
        agreement: least agreement of the descriptors' slopes.
        cost: largest difference of the descriptors at the finest level.
        overlap: least part of the foregrounds in the other's field of view.
        scale: largest factor between the sizes of the two, or its inverse.
        stretch: largest ratio of the scales along different directions.
        error: largest expected error in the foreground, steps of the finest level.
    """

    agreement: tuple[float, float]
    cost: tuple[float, float]
    overlap: tuple[float, float] = (0.5, 0.2)
    scale: tuple[float, float] = (1.4, 2.0)
    stretch: tuple[float, float] = (1.35, 1.8)
    error: tuple[float, float] = (1.0, 3.0)


#: by number of dimensions; warn, fail
LIMITS = {
    2: Limits(agreement=(0.25, 0.15), cost=(0.088, 0.099)),
    3: Limits(agreement=(0.25, 0.15), cost=(0.085, 0.1)),
}


@dataclass(frozen=True)
class Quality:
    """The verdict on a registration.

    Attributes:
        verdict: ``"PASS"``, ``"WARN"`` or ``"FAIL"``.
        reasons: what stands behind it, in words.
        measures: the numbers that it rests on.
        score: one number for all of them: 0 at the limit between PASS and WARN, larger is better.
    """

    verdict: str
    reasons: list[str]
    measures: dict[str, float] = field(default_factory=dict)
    score: float = 0.0

    def as_dict(self) -> dict:
        """For a report."""
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "score": self.score,
            "measures": dict(self.measures),
        }


def honest_covariance(covariance: np.ndarray, step: float) -> np.ndarray:
    """Covariance of a matrix's rows that predicts the error.

    Args:
        covariance: ``(D(D+1), D(D+1))``, as `RobustEstimate` has it.
        step: lattice step of the finest level, mm.
    """
    dims = _dims(covariance)
    constants = CALIBRATION[dims]
    result = constants.inflation**2 * covariance
    ends = [row * (dims + 1) + dims for row in range(dims)]
    result[ends, ends] += (constants.floor * step) ** 2 / dims
    return np.asarray(result)


def spread_at(covariance: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Root mean square of the displacement's error, mm, at points ``[N, D]`` of the fixed world: ``[N]``."""
    dims = _dims(covariance)
    blocks = covariance.reshape(dims, dims + 1, dims, dims + 1)
    trace = np.einsum("iaib->ab", blocks)
    places = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    return np.asarray(np.sqrt(np.clip(np.einsum("na,ab,nb->n", places, trace, places), 0.0, None)))


def error_quantile(spread: np.ndarray, level: float, constants: Calibration) -> np.ndarray:
    """Length that the error stays below with a probability.

    Args:
        spread: root mean square of the error.
        level: probability, 0 to 1.
        constants: of `CALIBRATION`.

    Raises:
        RegistrationError: ``level`` is none.
    """
    if not 0.0 < level < 1.0:
        raise RegistrationError("level", level, "0 < level < 1")
    shape = constants.shape
    # a Weibull distribution whose mean square is one
    return np.asarray(spread) * (-math.log1p(-level)) ** (1 / shape) / math.sqrt(math.gamma(1 + 2 / shape))


def judge(measures: dict[str, float], dims: int) -> Quality:
    """The verdict.

    Args:
        measures: ``agreement``, ``cost``, ``overlap``, ``scale`` (1 or more), ``stretch`` (1 or more) and ``error``
            (lattice steps); what is missing does not count.
        dims: 2 or 3.
    """
    limits = LIMITS[dims]
    verdict, reasons, score = PASS, [], math.inf
    for name, text in _TEXTS.items():
        if name not in measures:
            continue
        value, (warn, fail) = measures[name], getattr(limits, name)
        # distance to the first limit, in widths between the two
        distance = (warn - value) / (fail - warn)
        if not math.isfinite(distance):
            distance = -math.inf
        score = min(score, distance)
        if distance < 0:
            verdict = FAIL if distance < -1 or verdict == FAIL else WARN
            reasons.append(text.format(value=value, percent=100 * value, extent=100 * (value - 1), limit=warn))
    return Quality(verdict, reasons, dict(measures), score)


_TEXTS = {
    "agreement": "the local structures of the two images agree by {percent:.0f} % only",
    "cost": "the descriptors of the two images differ by {value:.3f}, as those of unrelated images do",
    "overlap": "overlap of the foregrounds {percent:.0f} %",
    "scale": "sizes differ by {extent:.0f} %: more than two scans of one person show",
    "stretch": "scales along different directions differ by {extent:.0f} %: more than two scans of one person show",
    "error": "expected error {value:.1f} voxels of the finest level",
}


def _dims(covariance: np.ndarray) -> int:
    return 2 if len(covariance) == 6 else 3
