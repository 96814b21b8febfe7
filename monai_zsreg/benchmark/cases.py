# SPDX-License-Identifier: Apache-2.0
"""The cases of the benchmark: which pair, which slice, which known transform, which damage.

A case is drawn from its name and the seed alone. So the first N cases of a row are the same however many are asked
for, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from monai_zsreg.benchmark import perturb, simulate
from monai_zsreg.benchmark.data import (
    Pair,
    background_value,
    foreground,
    load_volume,
    residual_shift,
    slices_of,
    superior_axis,
)
from monai_zsreg.geometry import Grid

__all__ = ["ROWS", "STRESS", "Case", "Row", "Sample", "build", "draw_cases", "natural_pairs", "select_rows"]

STRESS = {
    "noise": "5 % noise in both images",
    "bias": "40 % bias field in both images",
    "scale": "moving image 20 % larger or smaller",
    "cut": "a third of the moving image's slices cut off",
    "thick": "moving image in 5 mm slices",
    "cavity": "a cavity blackened in the moving image",
    "skull": "skull in one image only",
}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        protocol: key of ``perturb.PROTOCOLS``, a key of `STRESS`, ``natural`` or ``between``.
        dims: 2 or 3.
        kind: ``exact`` (simulated contrast: the truth is exact), ``real`` (two scans: the truth is off by the pair's
            residual), ``natural`` (channels of a photograph: exact), ``between`` (two people: no truth, label Dice).
        cases: default number of cases.
        quick: number of cases in a quick run.
    """

    protocol: str
    dims: int
    kind: str
    cases: int
    quick: int

    @property
    def name(self) -> str:
        return f"{self.protocol}-{self.dims}d-{self.kind}"


ROWS = (
    Row("paper", 2, "real", 120, 10),
    Row("paper", 2, "exact", 60, 4),
    Row("so3", 2, "real", 200, 8),
    Row("mild", 3, "exact", 40, 2),
    Row("mild", 3, "real", 40, 2),
    Row("so3", 3, "real", 100, 2),
    Row("natural", 2, "natural", 24, 2),
    *[Row(name, 2, "real", 30, 1) for name in STRESS if name not in ("thick", "skull")],
    *[Row(name, 3, "real", 10, 0) for name in STRESS],
    Row("between", 3, "between", 8, 0),
)


def select_rows(protocols: Sequence[str] | None, dims: Sequence[int]) -> list[Row]:
    """Rows of these protocols (all if None; ``stress`` stands for all keys of `STRESS`) and dimensions."""
    if protocols is None:
        return [row for row in ROWS if row.dims in dims]
    names = {name for p in protocols for name in (STRESS if p == "stress" else (p,))}
    return [row for row in ROWS if row.protocol in names and row.dims in dims]


@dataclass(frozen=True)
class Case:
    """A case before it is made.

    Args:
        row: the row that it counts in.
        index: its number in the row.
        pair: the two images.
        axis: the array axis that the slice cuts across; None for volumes.
        slice_index: which slice.
        seed: seed of the run.
    """

    row: Row
    index: int
    pair: Pair
    axis: int | None
    slice_index: int | None
    seed: int

    @property
    def name(self) -> str:
        where = "" if self.axis is None else f":{'ijk'[self.axis]}{self.slice_index}"
        return f"{self.row.name}:{self.index:04d}:{self.pair.name}{where}"

    def rng(self, purpose: str) -> np.random.Generator:
        """A stream of random numbers that belongs to this case and purpose."""
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.name}|{purpose}".encode())])


@dataclass
class Sample:
    """A case ready to be registered.

    Args:
        fixed: ``[1, *spatial]``.
        moving: likewise, on its own grid; its header does not know the perturbation.
        mask: foreground of the fixed image, ``[1, *spatial]`` bool.
        truth: ``(D+1, D+1)``, fixed world to moving world, the perturbation alone; None between subjects.
        corrected: the same composed with the pair's residual; equal to ``truth`` for exact pairs, None if unknown.
        info: rotation, shift and shapes, for the results file.
        labels: anatomical labels of both images on their grids, or None.
    """

    fixed: MetaTensor
    moving: MetaTensor
    mask: torch.Tensor
    truth: torch.Tensor | None
    corrected: torch.Tensor | None
    info: dict[str, Any] = field(default_factory=dict)
    labels: tuple[MetaTensor, MetaTensor] | None = None


# --------------------------------------------------------------------------------------------------------------------
# which cases
# --------------------------------------------------------------------------------------------------------------------


def draw_cases(
    row: Row,
    pairs: Iterable[Pair],
    count: int,
    seed: int,
    slices: int = 5,
    planes: Sequence[str] = ("axial",),
    min_side: int = 128,
) -> list[Case]:
    """The first ``count`` cases of a row, subjects taking turns.

    Args:
        row: the row.
        pairs: pairs in one direction; both directions are used.
        count: number of cases. Pairs repeat with fresh transforms when there are fewer.
        seed: seed of the run.
        slices: slices per volume and plane (2D).
        planes: ``axial``, ``coronal``, ``sagittal`` (2D).
        min_side: leave out slices whose shorter side has fewer voxels (2D); no perturbation in pixels suits them.

    Returns:
        At most ``count`` cases; none where no pair suits the row.
    """
    by_subject: dict[str, list[tuple[Pair, int | None, int | None]]] = {}
    for pair in pairs:
        if not _suits(pair, row):
            continue
        spots = _spots(pair, row, slices, planes, min_side)
        directions = (pair,) if row.kind == "between" else (pair, pair.reversed())
        by_subject.setdefault(pair.subject, []).extend((p, *spot) for p in directions for spot in spots)
    queues = {}
    for subject, units in sorted(by_subject.items()):
        if units:
            order = np.random.default_rng([seed, zlib.crc32(f"{row.name}|{subject}".encode())]).permutation(len(units))
            queues[subject] = [units[i] for i in order]
    names = list(queues)
    if row.kind == "between":
        # every ordered pair of people once: there is nothing to draw
        count = min(count, len(names))
    cases = []
    for index in range(count if names else 0):
        queue = queues[names[index % len(names)]]
        pair, axis, where = queue[index // len(names) % len(queue)]
        cases.append(Case(row, index, pair, axis, where, seed))
    return cases


def _suits(pair: Pair, row: Row) -> bool:
    kind = "between" if pair.labels else "exact" if pair.simulated else "real"
    if row.kind == "natural":
        return pair.subject.startswith("skimage/")
    if kind != row.kind or pair.subject.startswith("skimage/"):
        return False
    if len(load_volume(pair.fixed)[0].shape) < row.dims:
        return False
    if row.protocol == "skull":
        return pair.mask is not None and all(_has_skull(pair, path) for path in (pair.fixed, pair.moving))
    return True


def _has_skull(pair: Pair, path: Path) -> bool:
    image = load_volume(path)[0]
    assert pair.mask is not None
    outside = foreground(image) & (load_volume(pair.mask)[0] == 0)
    return bool(outside.sum() > 0.1 * (load_volume(pair.mask)[0] > 0).sum())


def _spots(
    pair: Pair, row: Row, slices: int, planes: Sequence[str], min_side: int
) -> list[tuple[int | None, int | None]]:
    image, grid = (None, None) if row.kind == "natural" else load_volume(pair.fixed)
    if image is None or grid is None or row.dims == image.ndim:
        return [(None, None)]
    head_foot = superior_axis(grid)
    others = [a for a in range(3) if a != head_foot]
    # coronal slices cut across the axis that lies closest to front-back
    front_back = max(others, key=lambda a: abs(float(grid.affine[1, a])) / grid.spacing[a])
    axes = {"axial": head_foot, "coronal": front_back, "sagittal": next(a for a in others if a != front_back)}
    seen = foreground(image)
    spots: list[tuple[int | None, int | None]] = []
    for plane in planes:
        axis = axes[plane]
        inside = [a for a in range(3) if a != axis]
        ratio = grid.spacing[inside[0]] / grid.spacing[inside[1]]
        # pixels are the unit in 2D, so they must be square
        if min(image.shape[a] for a in inside) >= min_side and 0.95 < ratio < 1.05:
            spots += [(axis, index) for index in slices_of(seen, axis, slices)]
    return spots


def natural_pairs() -> list[Pair]:
    """Color channels of the photographs that scikit-image installs: red against blue and green against blue."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [Pair(f"skimage/{name}", one, "blue", Path(name), Path(name)) for name in names for one in ("red", "green")]


# --------------------------------------------------------------------------------------------------------------------
# making a case
# --------------------------------------------------------------------------------------------------------------------


def build(case: Case) -> Sample:
    """Make the images of a case.

    Everything is drawn from `Case.rng`, so that the same case comes out in every run.
    """
    if case.row.kind == "between":
        return _between(case)
    fixed, moving, mask, grid, residual = _source(case)
    protocol, dims = case.row.protocol, case.row.dims
    stress = protocol if protocol in STRESS else None
    rng = case.rng("damage")
    limits = (
        perturb.stress_limits(protocol, dims) if stress or protocol == "natural" else perturb.PROTOCOLS[protocol, dims]
    )
    reach = mask | foreground(moving)
    target, pad = perturb.pad_to_fit(grid, reach, limits)
    if stress == "skull":
        brain = _mask_of(case)
        fixed, moving = (_strip(fixed, brain), moving) if case.index % 2 else (fixed, _strip(moving, brain))
    if stress == "cavity":
        moving = perturb.blacken_cavity(moving, grid, mask, rng)
    drawn = perturb.draw(limits, grid, case.rng("transform"))

    moving_grid = target
    axis = (superior_axis(target) if dims == 3 else 0) if stress in ("thick", "cut") else 0
    parts = 1
    if stress == "thick":
        moving_grid, parts = perturb.thick_grid(target, axis, 5.0)
    moved = perturb.resample(moving, grid, moving_grid, drawn.matrix)
    if stress == "thick":
        moved, moving_grid = perturb.average_slices(moved, moving_grid, axis, parts)
    if stress == "cut":
        moved, moving_grid = perturb.cut_slices(moved, moving_grid, axis, 1 / 3, bool(rng.integers(2)))
    still = np.pad(fixed, pad, constant_values=background_value(fixed))
    seen = np.pad(mask, pad)
    still, moved = _degrade(case, still, moved, seen)

    known = residual is not None or case.row.kind != "real"
    shift = torch.eye(dims + 1, dtype=torch.float64) if residual is None else residual_shift(residual, grid)
    return Sample(
        fixed=_tensor(still, target),
        moving=_tensor(moved, moving_grid),
        mask=torch.from_numpy(seen)[None],
        truth=drawn.matrix,
        corrected=drawn.matrix @ shift if known else None,
        info={
            "rotation_deg": round(drawn.rotation_deg, 4),
            "shift": round(drawn.shift, 4),
            "fixed_shape": list(target.shape),
            "moving_shape": list(moving_grid.shape),
            "fixed_spacing": [round(s, 4) for s in target.spacing],
            "moving_spacing": [round(s, 4) for s in moving_grid.spacing],
        },
    )


def _source(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, Grid, tuple[float, ...] | None]:
    """Fixed and moving image before the perturbation, foreground, lattice, residual in mm along the voxel axes."""
    pair = case.pair
    if case.row.kind == "natural":
        return _photograph(pair)
    fixed, volume_grid = load_volume(pair.fixed)
    moving = load_volume(pair.moving)[0]
    brain = None if pair.mask is None else load_volume(pair.mask)[0] > 0
    tissue = None if pair.tissue is None else np.rint(load_volume(pair.tissue)[0])
    grid, residual = volume_grid, pair.residual
    if case.axis is not None:
        fixed, moving = _cut(case, fixed), _cut(case, moving)
        brain = None if brain is None else _cut(case, brain)
        tissue = None if tissue is None else _cut(case, tissue)
        # a slice is measured in pixels, as the paper does
        grid = Grid(tuple(int(n) for n in fixed.shape), torch.eye(3, dtype=torch.float64))
        if residual is not None:
            residual = tuple(
                r / s for a, (r, s) in enumerate(zip(residual, volume_grid.spacing, strict=True)) if a != case.axis
            )
    if pair.simulated is not None:
        # the brain is where the T1 has signal, also where a mask file is a little larger
        inside = foreground(fixed) if brain is None else brain & (fixed > background_value(fixed))
        t2 = simulate.simulated_t2(fixed, inside, tissue)
        fixed, moving = (t2, fixed) if pair.simulated == "fixed" else (fixed, t2)
    mask = foreground(fixed) if brain is None or not brain.any() else brain
    return fixed, moving, mask, grid, residual


def _photograph(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray, Grid, tuple[float, ...] | None]:
    from skimage import data
    from skimage.transform import downscale_local_mean

    image = getattr(data, pair.subject.removeprefix("skimage/"))().astype(np.float32)
    if max(image.shape[:2]) > 400:
        image = downscale_local_mean(image, (2, 2, 1)).astype(np.float32)
    fixed, moving = (image[..., ("red", "green", "blue").index(m)] for m in (pair.fixed_modality, pair.moving_modality))
    grid = Grid(tuple(int(n) for n in fixed.shape), torch.eye(3, dtype=torch.float64))
    return fixed, moving, np.ones(fixed.shape, dtype=bool), grid, None


def _cut(case: Case, volume: np.ndarray) -> np.ndarray:
    """The case's slice of a volume; the volume itself for a 3D case."""
    if case.axis is None or case.slice_index is None:
        return volume
    return np.take(volume, case.slice_index, axis=case.axis)


def _mask_of(case: Case) -> np.ndarray:
    assert case.pair.mask is not None
    brain = load_volume(case.pair.mask)[0] > 0
    return _cut(case, brain)


def _strip(image: np.ndarray, brain: np.ndarray) -> np.ndarray:
    return np.where(brain, image, 0.0).astype(np.float32)


def _degrade(case: Case, still: np.ndarray, moved: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noise and bias fields, drawn for each image on its own grid so that no interpolation smooths them."""
    images = {"fixed": still, "moving": moved}
    for role, image in images.items():
        rng = case.rng(f"noise {role}")
        seen = mask if role == "fixed" else foreground(image)
        if case.row.protocol == "bias":
            image = simulate.add_bias(image, 0.4, rng)
        elif case.row.protocol == "noise":
            image = simulate.add_noise(image, seen, 0.05, rng)
        elif case.pair.simulated == role:
            support = image != background_value(image)
            biased = simulate.add_bias(image, 0.2, rng)
            # a stripped image is masked after the scan, so its outside stays clean
            image = np.where(support, simulate.add_noise(biased, support, 0.03, rng), image).astype(np.float32)
        images[role] = image
    return images["fixed"], images["moving"]


def _between(case: Case) -> Sample:
    fixed, fixed_grid = load_volume(case.pair.fixed)
    moving, moving_grid = load_volume(case.pair.moving)
    assert case.pair.labels is not None
    labels = [load_volume(path) for path in case.pair.labels]
    return Sample(
        fixed=_tensor(fixed, fixed_grid),
        moving=_tensor(moving, moving_grid),
        mask=torch.from_numpy(foreground(fixed))[None],
        truth=None,
        corrected=None,
        info={"fixed_shape": list(fixed.shape), "moving_shape": list(moving.shape)},
        labels=(_tensor(*labels[0]), _tensor(*labels[1])),
    )


def _tensor(image: np.ndarray, grid: Grid) -> MetaTensor:
    """Channel first, with a 4x4 affine in 2D too, as MONAI's readers give it."""
    affine = torch.eye(4, dtype=torch.float64)
    affine[: grid.dims, : grid.dims] = grid.affine[: grid.dims, : grid.dims]
    affine[: grid.dims, 3] = grid.affine[: grid.dims, grid.dims]
    return MetaTensor(torch.from_numpy(np.array(image, dtype=np.float32))[None], affine=affine)
