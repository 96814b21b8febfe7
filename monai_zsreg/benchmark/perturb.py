# SPDX-License-Identifier: Apache-2.0
"""Known transforms and known damage: what is done to the moving image before a method sees it.

A perturbation P maps fixed world to moving world. The moving image's voxel at world point y shows what the
co-registered image has at ``P^-1(y)``, by one cubic resampling, and its header says nothing of P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.utils import optional_import

from monai_zsreg.benchmark.data import background_value
from monai_zsreg.geometry import AffineParameters, Grid, compose_parameters

ndimage, _ = optional_import("scipy.ndimage")
Rotation, _ = optional_import("scipy.spatial.transform", name="Rotation")

__all__ = [
    "Limits",
    "PROTOCOLS",
    "Perturbation",
    "average_slices",
    "blacken_cavity",
    "cut_slices",
    "draw",
    "pad_to_fit",
    "resample",
    "stress_limits",
    "thick_grid",
]


@dataclass(frozen=True)
class Limits:
    """How far a protocol goes.

    Args:
        angle_deg: largest rotation; 180 means uniform over all rotations.
        shift: largest shift, mm (pixels in 2D).
        shift_of_side: largest shift as a fraction of each side, instead of ``shift``.
        per_axis: draw the shift independently along each axis; otherwise a random direction and a uniform length.
        scale: largest deviation of the scale of each axis from 1.
        shear: largest shear.
        fixed_scale: scale all axes by ``1 - fixed_scale`` or ``1 + fixed_scale`` on top.
    """

    angle_deg: float
    shift: float = 0.0
    shift_of_side: float = 0.0
    per_axis: bool = False
    scale: float = 0.0
    shear: float = 0.0
    fixed_scale: float = 0.0


# section 2.8 of the paper gives radians; it names no scale
_PAPER = Limits(angle_deg=math.degrees(0.3), shift=50.0, per_axis=True, shear=0.03)
_MILD = Limits(angle_deg=15.0, shift=15.0, scale=0.08, shear=0.05)

PROTOCOLS: dict[tuple[str, int], Limits] = {
    ("paper", 2): _PAPER,
    ("so3", 2): Limits(angle_deg=180.0, shift_of_side=1 / 3, per_axis=True),
    ("so3", 3): Limits(angle_deg=180.0, shift=50.0),
    ("mild", 2): _MILD,
    ("mild", 3): _MILD,
}


def stress_limits(name: str, dims: int) -> Limits:
    """Limits of a stress row: the paper's in 2D, the mild one in 3D, scaled by 20 % where that is the stress."""
    base = _PAPER if dims == 2 else _MILD
    return replace(base, scale=0.0, fixed_scale=0.2) if name == "scale" else base


@dataclass(frozen=True)
class Perturbation:
    """A drawn transform.

    Args:
        matrix: ``(D+1, D+1)`` float64, fixed world to moving world.
        rotation_deg: whole angle of its rotation, 0 to 180.
        shift: displacement of the image center, mm.
    """

    matrix: torch.Tensor
    rotation_deg: float
    shift: float


def draw(limits: Limits, grid: Grid, rng: np.random.Generator) -> Perturbation:
    """Draw a transform about the center of ``grid``.

    Args:
        limits: how far to go.
        grid: the image before padding; its sides count for ``shift_of_side``.
        rng: source of all random numbers.
    """
    dims = grid.dims
    if dims == 2:
        angle = rng.uniform(-limits.angle_deg, limits.angle_deg)
        rotation_deg = abs(angle)
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        rotation = np.array([[cos, -sin], [sin, cos]])
    elif limits.angle_deg >= 180:
        turn = Rotation.from_quat(_unit(rng, 4))
        rotation, rotation_deg = turn.as_matrix(), math.degrees(turn.magnitude())
    else:
        rotation_deg = rng.uniform(0, limits.angle_deg)
        rotation = Rotation.from_rotvec(math.radians(rotation_deg) * _unit(rng, 3)).as_matrix()
    scale = 1 + rng.uniform(-limits.scale, limits.scale, dims)
    if limits.fixed_scale:
        scale = scale * (1 + limits.fixed_scale * rng.choice([-1.0, 1.0]))
    shear = rng.uniform(-limits.shear, limits.shear, dims * (dims - 1) // 2)
    if limits.per_axis:
        shift = rng.uniform(-1, 1, dims) * _reach(limits, grid)
    else:
        shift = _unit(rng, dims) * rng.uniform(0, 1) * _reach(limits, grid)
    center = grid.center.numpy()
    # the rotation goes in as a matrix of its own: Euler angles are not unique where the second one is a right angle
    stretch = compose_parameters(
        AffineParameters((0.0,) * dims, (0.0,) * (1 if dims == 2 else 3), tuple(scale), tuple(shear), (0.0,) * dims)
    )
    linear = rotation @ stretch[:dims, :dims]
    matrix = np.eye(dims + 1)
    matrix[:dims, :dims] = linear
    matrix[:dims, dims] = center + shift - linear @ center
    return Perturbation(torch.from_numpy(matrix), float(rotation_deg), float(np.linalg.norm(shift)))


def _unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vector = rng.normal(size=count)
    return vector / np.linalg.norm(vector)


def _reach(limits: Limits, grid: Grid) -> np.ndarray:
    """Largest shift along each world axis (a voxel axis in 2D, where both are the same), mm."""
    if limits.shift_of_side:
        return limits.shift_of_side * grid.extent.numpy()
    return np.full(grid.dims, limits.shift)


def pad_to_fit(grid: Grid, mask: np.ndarray, limits: Limits) -> tuple[Grid, list[tuple[int, int]]]:
    """Enlarge a grid on both sides of each axis, so that no transform within ``limits`` moves foreground out of it.

    The amount depends on the protocol and the foreground, not on the transform drawn, and so gives nothing away.

    Args:
        grid: the image's lattice.
        mask: its foreground.
        limits: the protocol.

    Returns:
        The larger lattice, same world position of every voxel, and the padding per axis as ``numpy.pad`` takes it.
    """
    dims = grid.dims
    spacing = np.array(grid.spacing)
    middle = (np.array(grid.shape) - 1) / 2
    box = [np.flatnonzero(mask.any(axis=tuple(a for a in range(dims) if a != axis))) for axis in range(dims)]
    half = np.array([max(middle[a] - b[0], b[-1] - middle[a]) for a, b in enumerate(box)]) * spacing
    offsets = (np.argwhere(mask)[:: max(1, int(mask.sum()) // 200_000)] - middle) * spacing
    radius = float(np.sqrt((offsets**2).sum(axis=1).max())) + float(spacing.max())
    reach = np.minimum(radius, half + 2 * radius * math.sin(math.radians(limits.angle_deg) / 2))
    reach = reach * (1 + limits.scale) * (1 + limits.fixed_scale) * (1 + limits.shear * (dims - 1))
    # a shift of a given length may lie along any voxel axis; drawn per world axis its length can add up
    shift = _reach(limits, grid)
    along = np.abs(np.linalg.inv(grid.affine[:dims, :dims].numpy() / spacing)) @ shift if limits.per_axis else shift
    need = np.ceil((reach + along) / spacing - (middle + 0.5)) + 2
    pad = [(int(n), int(n)) for n in np.maximum(need, 0)]
    shape = tuple(n + a + b for n, (a, b) in zip(grid.shape, pad, strict=True))
    return _shifted(grid, [-a for a, _ in pad], shape), pad


def _shifted(grid: Grid, start: list[int], shape: tuple[int, ...]) -> Grid:
    affine = grid.affine.clone()
    affine[:-1, -1] += grid.affine[:-1, :-1] @ torch.tensor(start, dtype=torch.float64)
    return Grid(shape, affine)


def resample(image: np.ndarray, grid: Grid, target: Grid, matrix: torch.Tensor, order: int = 3) -> np.ndarray:
    """Show an image through a transform: the target's voxel at world y gets the image's value at ``matrix^-1(y)``.

    Args:
        image: values on ``grid``.
        grid: the image's lattice.
        target: the lattice of the result.
        matrix: ``(D+1, D+1)``, from the image's world to the target's.
        order: spline order (0 for labels).

    Returns:
        float32 of the target's shape; the background value where the image has nothing. Cubic overshoot is cut off at
        the image's own range.
    """
    dims = grid.dims
    back = background_value(image) if order else 0.0
    pull = (torch.linalg.inv(grid.affine) @ torch.linalg.inv(matrix) @ target.affine).numpy()
    # only where something other than background can land
    used = [
        np.flatnonzero((image != back).any(axis=tuple(a for a in range(dims) if a != axis))) for axis in range(dims)
    ]
    if any(len(u) == 0 for u in used):
        return np.full(target.shape, back, dtype=np.float32)
    low = [max(0, int(u[0]) - 6) for u in used]
    high = [min(n, int(u[-1]) + 7) for u, n in zip(used, image.shape, strict=True)]
    part = image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].astype(np.float32) - back
    corners = np.stack(np.meshgrid(*[(a - 1, b) for a, b in zip(low, high, strict=True)], indexing="ij"), -1).reshape(
        -1, dims
    )
    push = np.linalg.inv(pull)
    landed = corners @ push[:dims, :dims].T + push[:dims, dims]
    first = np.clip(np.floor(landed.min(axis=0)).astype(int), 0, target.shape)
    last = np.clip(np.ceil(landed.max(axis=0)).astype(int) + 1, 0, target.shape)
    out = np.full(target.shape, back, dtype=np.float32)
    if (last <= first).any():
        return out
    offset = pull[:dims, :dims] @ first + pull[:dims, dims] - np.array(low)
    window = ndimage.affine_transform(
        part, pull[:dims, :dims], offset, tuple(last - first), np.float32, order, "constant", 0.0
    )
    window = np.clip(window, part.min(), part.max())
    out[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] = window + back
    return out


def thick_grid(grid: Grid, axis: int, thickness: float) -> tuple[Grid, int]:
    """A finer lattice along ``axis`` whose voxels, averaged in groups, give slices of ``thickness`` mm.

    Returns:
        The fine lattice and the number of its slices in one thick slice.
    """
    spacing = grid.spacing[axis]
    parts = max(1, math.ceil(thickness / spacing - 1e-6))
    fine = thickness / parts
    slices = max(1, int(grid.shape[axis] * spacing / thickness + 1e-6))
    affine = grid.affine.clone()
    affine[:-1, axis] *= fine / spacing
    shape = list(grid.shape)
    shape[axis] = slices * parts
    return Grid(tuple(shape), affine), parts


def average_slices(image: np.ndarray, grid: Grid, axis: int, parts: int) -> tuple[np.ndarray, Grid]:
    """Average groups of ``parts`` slices along ``axis``: a box profile, with the header that belongs to it."""
    shape = list(image.shape)
    shape[axis : axis + 1] = [shape[axis] // parts, parts]
    affine = grid.affine.clone()
    affine[:-1, -1] += affine[:-1, axis] * (parts - 1) / 2
    affine[:-1, axis] *= parts
    thick = image.reshape(shape).mean(axis=axis + 1).astype(np.float32)
    return thick, Grid(tuple(int(n) for n in thick.shape), affine)


def cut_slices(image: np.ndarray, grid: Grid, axis: int, fraction: float, top: bool) -> tuple[np.ndarray, Grid]:
    """Cut off ``fraction`` of the slices that hold foreground, from one end of ``axis``; the header follows."""
    seen = np.flatnonzero((image != background_value(image)).any(axis=tuple(a for a in range(image.ndim) if a != axis)))
    low, high = 0, image.shape[axis]
    lost = round(fraction * (seen[-1] + 1 - seen[0]))
    if top:
        high = int(seen[-1]) + 1 - lost
    else:
        low = int(seen[0]) + lost
    kept = np.ascontiguousarray(np.take(image, range(low, high), axis=axis))
    start = [low if a == axis else 0 for a in range(image.ndim)]
    return kept, _shifted(grid, start, tuple(int(n) for n in kept.shape))


def blacken_cavity(image: np.ndarray, grid: Grid, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Set an ellipsoid inside the foreground to the background value, as a resection cavity.

    Its semi-axes are 20 to 30 % of the radius of a ball (disk) with the foreground's size; its center lies in the
    foreground.
    """
    dims = grid.dims
    size = float(mask.sum()) * float(np.prod(grid.spacing))
    radius = math.sqrt(size / math.pi) if dims == 2 else (3 * size / (4 * math.pi)) ** (1 / 3)
    where = np.argwhere(ndimage.binary_erosion(mask, iterations=3) if mask.sum() > 1000 else mask)
    where = where if len(where) else np.argwhere(mask)
    center = where[rng.integers(len(where))]
    axes = radius * rng.uniform(0.2, 0.3, dims)
    out = np.array(image, dtype=np.float32)
    grids = np.ogrid[tuple(slice(n) for n in image.shape)]
    inside = sum(((g - c) * s / a) ** 2 for g, c, s, a in zip(grids, center, grid.spacing, axes, strict=True)) <= 1
    out[inside] = background_value(image)
    return out
