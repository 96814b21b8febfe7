# SPDX-License-Identifier: Apache-2.0
"""How far off a registration may be, and whether to trust it at all: the limits and constants of the verdict.

The command ``zsreg benchmark calibrate`` measures them: it fits the constants on some of the subjects and scores them
on the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, fraction_inside
from monai_zsreg.registration.estimate import Estimate

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"

# fraction of one field of view that must lie in the other; below it there is nothing to compare
_LEAST_OVERLAP = 0.05


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
CALIBRATION = {2: Calibration(2.2, 0.04, 1.7), 3: Calibration(1.6, 0.01, 1.9)}


@dataclass(frozen=True)
class Limits:
    """Of the verdict; ``warn`` is passed before ``fail``. How far they are passed adds up, the mirror image aside.

    Attributes:
        agreement: least agreement of the descriptors' slopes. Where the correlation of the coarse stage has one place
            that stands out from all others, less of it and of the lead will do, and cost and a second position do not
            count.
        cost: largest difference of the descriptors at the finest level. Neither this nor the agreement makes a FAIL.
        lead: least lead over places at random, standard errors, of an answer at which the images do not look alike.
            Noise within the same outline leads too.
        overlap: least fraction of the foregrounds in the other's field of view.
        scale: largest factor between the sizes of the two, or its inverse.
        stretch: largest ratio of the scales along different directions.
        error: largest expected error in the foreground, voxels of the coarser image (sides of a cube of their volume).
        second: least lead over another transform that is no reflection, standard errors of the difference.
        mirror: likewise over the best reflection: where that fits clearly better, left and right were exchanged. Where
            it fits as well, as of a symmetric object, the answer may be right all the same.
    """

    agreement: tuple[float, float] = (0.25, -3.0)
    cost: tuple[float, float] = (0.09, 0.5)
    lead: tuple[float, float] = (6.0, 0.0)
    overlap: tuple[float, float] = (0.5, 0.2)
    scale: tuple[float, float] = (1.4, 2.0)
    stretch: tuple[float, float] = (1.35, 1.8)
    error: tuple[float, float] = (1.0, 32.0)
    second: tuple[float, float] = (3.0, -3.0)
    mirror: tuple[float, float] = (3.0, -3.0)


#: by descriptor; warn, fail. Those of a descriptor that is not here are unknown.
LIMITS = {"mind": Limits()}

# margin of the correlation that speaks for an answer at which the images do not look alike, and the limits there: none
# of what it speaks for alone, others of the rest, because noise within the same outline stands out too
_MARGIN = 0.1
_VOUCHED = {"agreement": (0.1, -3.0), "lead": (3.0, -6.0), "cost": None, "second": None}

_TEXTS = {
    "agreement": "the local structures of the two images agree by {percent:.0f} % only",
    "cost": "the descriptors of the two images differ by {value:.3f}, as those of unrelated images do",
    "lead": "fits better than places at random by {value:.1f} standard errors only",
    "overlap": "overlap of the foregrounds {percent:.0f} %",
    "scale": "sizes differ by {extent:.0f} %: more than two scans of one person show",
    "stretch": "scales along different directions differ by {extent:.0f} %: more than two scans of one person show",
    "error": "expected error {value:.1f} voxels, most of it {weakest}",
    "second": "a second position, {second_distance:.0f} {unit} away, fits as well (lead {value:.1f} standard errors)",
    "mirror": "the mirror image fits as well or better; left and right may be exchanged (lead {value:.1f})",
}


@dataclass(frozen=True)
class Judgement:
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


def judge(
    estimate: Estimate, fixed: Grid, moving: Grid, notes: list[str], features: str | None, unit: str = "mm"
) -> Judgement:
    """The verdict.

    Args:
        estimate: what the method found; its covariance is the honest one.
        fixed: grid of the fixed image.
        moving: grid of the moving image.
        notes: what is doubtful about the images themselves.
        features: descriptor that the measures were made with; None for methods that do not measure agreement.
        unit: of lengths, for the sentences.
    """
    measures = _measured(estimate, fixed, moving)
    share = max(
        fraction_inside(fixed, moving, estimate.affine), fraction_inside(moving, fixed, estimate.affine.inverse())
    )
    if share < _LEAST_OVERLAP:
        estimate.reasons.insert(0, f"after registration the fields of view overlap by {100 * share:.0f} % only")
    if estimate.failed or share < _LEAST_OVERLAP:
        return Judgement(FAIL, estimate.reasons + notes, measures, -math.inf)
    doubts = estimate.reasons + notes
    limits = LIMITS.get(features or "")
    if limits is None:
        told = "how well the images agree" if features is None else f"what its figures mean with features={features!r}"
        doubts = [*doubts, f"this method does not know {told}"]
    words: dict[str, Any] = {"unit": unit, **measures}
    if estimate.covariance is not None:
        words["weakest"] = weakest_direction(estimate.covariance, estimate.affine.numpy(), fixed, unit)
    reasons, score, doubt, reflected = doubts, -0.5 if doubts else math.inf, 0.0, 0.0
    # a place that stands out from all others is right however little the two contrasts have in common
    vouched = measures.get("margin", 0.0) >= _MARGIN
    for name, text in _TEXTS.items():
        limit = getattr(limits or Limits(), name)
        limit = _VOUCHED.get(name, limit) if vouched else limit
        if name not in measures or limit is None:
            continue
        value, (warn, fail) = measures[name], limit
        # distance to the first limit, in widths between the two
        distance = (warn - value) / (fail - warn)
        if math.isnan(distance):
            distance = -math.inf
        score = min(score, distance)
        if distance < 0:
            reflected, doubt = (-distance, doubt) if name == "mirror" else (reflected, doubt - distance)
            reasons = [*reasons, text.format(**words, value=value, percent=100 * value, extent=100 * (value - 1))]
    doubt = max(doubt, reflected)
    verdict = FAIL if doubt > 1 else WARN if doubt > 0 or doubts else PASS
    score = min(score, -doubt) if doubt > 0 else score
    if measures.get("beyond", 0.0) > measures.get("step", math.inf):
        reasons = [*reasons, "the images differ by more than such a transform: {beyond:.2g} {unit}".format(**words)]
    return Judgement(verdict, reasons, measures, score)


def _measured(estimate: Estimate, fixed: Grid, moving: Grid) -> dict[str, float]:
    """The measures, also how the transform deforms, and how far off it may be, in voxels of the coarser."""
    dims = fixed.dims
    stretches = np.linalg.svd(estimate.affine[:dims, :dims].numpy(), compute_uv=False)
    size = math.exp(float(np.log(stretches).mean()))
    measures = estimate.measures | {"scale": max(size, 1 / size), "stretch": float(stretches[0] / stretches[-1])}
    if estimate.covariance is not None:
        spread = common_spread(estimate.covariance, fixed, moving, estimate.affine.numpy())
        # what no matrix can follow is no fault of this one
        square = max(spread**2 - measures.get("beyond", 0.0) ** 2, 0.0)
        measures["error"] = math.sqrt(square) / measures["step"]
    return measures


def common_spread(covariance: np.ndarray, fixed: Grid, moving: Grid, affine: np.ndarray) -> float:
    """Root mean square of `spread_at` the center of the smaller field of view and half way to its ends, mm.

    Beyond what both images show nothing is known of a transform between them.
    """
    dims = fixed.dims
    smaller, back = fixed, np.eye(dims + 1)
    if math.prod(moving.shape + moving.spacing) < math.prod(fixed.shape + fixed.spacing):
        smaller, back = moving, np.linalg.inv(affine)
    ends = 0.25 * np.eye(dims) * np.asarray(smaller.shape)
    places = np.vstack([np.zeros(dims), ends, -ends]) @ smaller.affine[:dims, :dims].numpy().T
    places = (places + smaller.center.numpy()) @ back[:dims, :dims].T + back[:dims, dims]
    return float(np.sqrt(np.square(spread_at(covariance, places)).mean()))


def honest_covariance(covariance: np.ndarray, step: float, beyond: float = 0.0) -> np.ndarray:
    """Covariance of a matrix's rows that predicts the error.

    Args:
        covariance: ``(D(D+1), D(D+1))``, as the blocks themselves show it.
        step: lattice step of the finest level, mm.
        beyond: root mean square of what no such matrix can follow, mm.
    """
    dims = _dims(covariance)
    constants = CALIBRATION[dims]
    result = constants.inflation**2 * np.asarray(covariance)
    ends = [row * (dims + 1) + dims for row in range(dims)]
    result[ends, ends] += ((constants.floor * step) ** 2 + beyond**2) / dims
    return result


def spread_at(covariance: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Root mean square of the displacement's error, mm, at points ``[N, D]`` of the fixed world: ``[N]``."""
    trace = row_trace(covariance)
    places = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    return np.asarray(np.sqrt(np.clip(np.einsum("na,ab,nb->n", places, trace, places), 0.0, None)))


def row_trace(covariance: np.ndarray) -> np.ndarray:
    """The matrix ``M (D+1, D+1)`` of the expected squared error ``h M h`` at a point ``h = (x, 1)``."""
    dims = _dims(covariance)
    return np.asarray(np.einsum("iaib->ab", covariance.reshape(dims, dims + 1, dims, dims + 1)))


def weakest_direction(covariance: np.ndarray, affine: np.ndarray, fixed: Grid, unit: str = "mm") -> str:
    """The rigid motion that the images determine least, in words, with its standard deviation.

    Rotations are weighed by how far they move a point half way to the ends of the field of view.

    Args:
        covariance: ``(D(D+1), D(D+1))`` of the first D rows of ``affine``, row after row.
        affine: ``(D+1, D+1)``, fixed world to moving world.
        fixed: grid of the fixed image.
        unit: of lengths.
    """
    if not np.isfinite(covariance).all():
        return "unknown in every direction"
    dims = fixed.dims
    reach = 0.25 * float(np.mean([n * s for n, s in zip(fixed.shape, fixed.spacing, strict=True)]))
    about = np.eye(dims + 1)
    about[:dims, dims] = fixed.center.numpy()
    # of a motion of the fixed world, its center as origin: I + motion = affine^-1 (affine + change)
    change = np.kron(np.linalg.inv(affine[:dims, :dims]), about.T)
    moved = (change @ covariance @ change.T).reshape(dims, dims + 1, dims, dims + 1)
    planes = [(1, 0)] if dims == 2 else [(2, 1), (0, 2), (1, 0)]
    rows = np.zeros((len(planes) + dims, dims, dims + 1))
    for row, (i, j) in zip(rows, planes, strict=False):
        row[i, j], row[j, i] = 0.5 * reach, -0.5 * reach
    for axis in range(dims):
        rows[len(planes) + axis, axis, dims] = 1.0
    values, vectors = np.linalg.eigh(np.einsum("pab,abcd,qcd->pq", rows, moved, rows))
    spread, vector = math.sqrt(max(float(values[-1]), 0.0)), vectors[:, -1]
    turn, shift = vector[: len(planes)], vector[len(planes) :]
    if np.linalg.norm(turn) > np.linalg.norm(shift):
        degrees = math.degrees(spread * float(np.linalg.norm(turn)) / reach)
        return f"rotation{'' if dims == 2 else f' about {_axis(turn)}'}: {degrees:.2g} degrees"
    return f"shift along {_axis(shift)}: {spread * float(np.linalg.norm(shift)):.2g} {unit}"


def _axis(direction: np.ndarray) -> str:
    """Name of a direction of the world, or its components."""
    unit = direction / np.linalg.norm(direction)
    main = int(np.abs(unit).argmax())
    if abs(unit[main]) < 0.9:
        return f"({', '.join(f'{v:.2f}' for v in unit)})"
    return "the " + (("x", "y") if len(unit) == 2 else ("left-right", "front-back", "head-foot"))[main] + " axis"


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


def _dims(covariance: np.ndarray) -> int:
    return 2 if len(covariance) == 6 else 3
