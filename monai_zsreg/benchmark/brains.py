# SPDX-License-Identifier: Apache-2.0
"""Rows of co-registered brains and photographs: known transforms of the moving image, and damage on top."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import nibabel as nib
import numpy as np

from monai_zsreg.benchmark import damage
from monai_zsreg.benchmark.cases import Case, Row, Sample
from monai_zsreg.benchmark.pairs import Pair
from monai_zsreg.benchmark.perturb import draw, limits_of, padding
from monai_zsreg.benchmark.volumes import Volume, background_value, foreground, moved, read_volume, transformed

STRESS = {
    "noise": "5 % noise in both images",
    "bias": "40 % bias field in both images",
    "scale": "moving image 20 % larger or smaller",
    "cut": "a third of the moving image's slices cut off",
    "thick": "moving image in 5 mm slices",
    "cavity": "a cavity blackened in the moving image",
    "skull": "skull in one image only",
    "stack": "4 to 12 slices of 4 mm of the moving image; error over what they show",
}

ROWS = (
    Row("paper", 2, "real", 120, 10),
    Row("paper", 2, "exact", 60, 4),
    Row("so3", 2, "real", 200, 8),
    Row("mild", 3, "exact", 40, 2),
    Row("mild", 3, "real", 40, 2),
    Row("so3", 3, "real", 100, 2),
    Row("natural", 2, "natural", 24, 2),
    *[Row(name, 2, "real", 30, 1) for name in STRESS if name not in ("thick", "skull", "stack")],
    *[Row(name, 3, "real", 32 if name == "stack" else 10, 0) for name in STRESS],
    Row("between", 3, "between", 8, 0),
)


def head_foot(affine: np.ndarray) -> int:
    """The array axis nearest to the one from head to foot, of a 3D image."""
    return int(np.flatnonzero(nib.orientations.io_orientation(affine)[:, 0] == 2)[0])


def _axial_slices(image: Volume, count: int, min_side: int) -> list[tuple[int, int]]:
    """Axis and index of the slices that 2D rows use."""
    axis = head_foot(image.affine)
    one, two = np.delete(image.spacing, axis)
    # pixels are the unit in 2D, so they must be square
    if min(np.delete(image.shape, axis)) < min_side or not 0.95 < one / two < 1.05:
        return []
    return [(axis, index) for index in full_slices(foreground(image.values), axis, count)]


def full_slices(mask: np.ndarray, axis: int, count: int) -> list[int]:
    """Indices of slices with a large foreground, spread over those with at least 60 % of the largest area."""
    area = mask.sum(axis=tuple(a for a in range(mask.ndim) if a != axis))
    good = np.flatnonzero(area >= 0.6 * area.max()) if area.max() else np.empty(0, int)
    return sorted({int(good[round(q)]) for q in np.linspace(0, len(good) - 1, count + 2)[1:-1]}) if len(good) else []


def brain_cases(
    row: Row, pairs: Iterable[Pair], count: int, seed: int, slices: int = 5, min_side: int = 128
) -> list[Case]:
    """The first ``count`` cases of a row of `ROWS`, subjects taking turns; none where no pair suits the row.

    Args:
        pairs: in one direction; both are used. They repeat with fresh transforms where there are fewer than ``count``.
        slices: of a volume (2D).
        min_side: of a slice, pixels: no perturbation in pixels suits smaller ones.
    """
    by_subject: dict[str, list[Pair]] = {}
    for pair in [pair for pair in pairs if pair.kind == row.kind]:
        units = [pair]
        if row.kind != "natural":
            image = read_volume(pair.fixed)
            if image.dims < row.dims or (row.protocol == "skull" and not _has_skull(pair)):
                continue
            if image.dims > row.dims:
                units = [replace(pair, slice=spot) for spot in _axial_slices(image, slices, min_side)]
        back = [] if row.kind == "between" else [unit.reversed() for unit in units]
        by_subject.setdefault(pair.subject, []).extend([*units, *back])
    queues = []
    for subject, units in sorted(by_subject.items()):
        order = np.random.default_rng([seed, zlib.crc32(f"{row.name}|{subject}".encode())]).permutation(len(units))
        queues += [[units[i] for i in order]] if units else []
    if row.kind == "between":
        # every ordered pair of people once: there is nothing to draw
        count = min(count, len(queues))
    group = {"natural": "photographs", "stack": "slabs of heads"}.get(row.protocol, f"brains {row.dims}D")
    cases = []
    for index in range(count if queues else 0):
        queue = queues[index % len(queues)]
        pair = queue[index // len(queues) % len(queue)]
        notes = {"group": group, "fixed_modality": pair.fixed_modality, "moving_modality": pair.moving_modality}
        make = partial(_between if row.kind == "between" else _make, pair=pair)
        cases.append(Case(row, index, pair.subject, pair.name, seed, make, notes))
    return cases


def _has_skull(pair: Pair) -> bool:
    if pair.mask is None:
        return False
    brain = read_volume(pair.mask).values > 0
    images = [read_volume(path).values for path in (pair.fixed, pair.moving)]
    return all(bool((foreground(image) & ~brain).sum() > 0.1 * brain.sum()) for image in images)


def _make(case: Case, pair: Pair) -> Sample:
    protocol, dims = case.row.protocol, case.row.dims
    fixed, moving, mask, brain = pair.images()
    limits = limits_of(protocol, dims)
    pad, affine = padding(fixed, mask | foreground(moving.values), limits)
    truth, info = draw(limits, fixed, case.rng("transform"))
    rng = case.rng("damage")
    if protocol == "skull":
        assert brain is not None
        stripped = fixed if case.index % 2 else moving
        bare = Volume(np.where(brain, stripped.values, 0.0).astype(np.float32), stripped.affine)
        fixed, moving = (bare, moving) if case.index % 2 else (fixed, bare)
    if protocol == "cavity":
        moving = damage.blacken_cavity(moving, mask, rng)
    shape = tuple(int(n) for n in fixed.shape + 2 * pad)
    along = head_foot(affine) if dims == 3 else 0
    pull = np.linalg.inv(truth)
    if protocol in ("thick", "stack"):
        shown = damage.thick_slices(moving, shape, affine, pull, along, 4.0 if protocol == "stack" else 5.0)
    else:
        shown = moved(moving, shape, affine, pull)
    if protocol == "cut":
        shown = damage.cut_end(shown, along, 1 / 3, bool(rng.integers(2)))
    if protocol == "stack":
        first, last = damage.seen_slices(shown, along)
        count = min(int(rng.integers(4, 13)), last - first)
        start = int(rng.integers(first, last - count + 1))
        shown = damage.crop(shown, along, start, start + count)
    around = [(int(p), int(p)) for p in pad]
    still = np.pad(fixed.values, around, constant_values=background_value(fixed.values))
    seen = np.pad(mask, around)
    still = _degrade(case, "fixed", pair.fixed_modality, still, seen)
    degraded = _degrade(case, "moving", pair.moving_modality, shown.values, foreground(shown.values))
    one, two = Volume(still, affine), Volume(degraded, shown.affine)

    points = one.points(seen)
    if protocol == "stack":
        # beyond the slices the images tell nothing
        points = points[two.shows(transformed(truth, points))]
    shift = np.eye(dims + 1)
    if pair.residual is not None:
        steps = np.array(pair.residual) / read_volume(pair.fixed).spacing
        shift[:-1, -1] = fixed.affine[:-1, :-1] @ (steps if pair.slice is None else np.delete(steps, pair.slice[0]))
    known = pair.residual is not None or case.row.kind != "real"
    corrected = truth @ shift if known else None
    return Sample(one, two, points, truth, corrected, info=info)


def _degrade(case: Case, role: str, modality: str, image: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Noise and bias fields, drawn for each image on its own grid so that no interpolation smooths them."""
    rng = case.rng(f"noise {role}")
    if case.row.protocol == "bias":
        return damage.add_bias(image, 0.4, rng)
    if case.row.protocol == "noise":
        return damage.add_noise(image, seen, 0.05, rng)
    if modality != "t2-sim":
        return image
    support = image != background_value(image)
    biased = damage.add_bias(image, 0.2, rng)
    # a stripped image is masked after the scan, so its outside stays clean
    return np.where(support, damage.add_noise(biased, support, 0.03, rng), image).astype(np.float32)


def _between(case: Case, pair: Pair) -> Sample:
    fixed, moving = read_volume(pair.fixed), read_volume(pair.moving)
    assert pair.labels is not None
    labels = read_volume(pair.labels[0]), read_volume(pair.labels[1])
    points = fixed.points(foreground(fixed.values))
    return Sample(fixed, moving, points, None, labels=labels)
