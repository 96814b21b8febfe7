# SPDX-License-Identifier: Apache-2.0
"""What is known of each image of a pair before the two are compared: its levels, its foreground, where that lies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_zsreg.foreground import appearance
from monai_zsreg.geometry import Grid, apply_affine, nearest_axes, pooled_grid

# voxels along the longest side: beyond it images are averaged first, so the cost stops growing
_FINEST = {2: 512, 3: 256}
_COARSEST = {2: 80, 3: 40}
# how far intensities may lie from the background, in ranges of tissue; their fourth powers must fit float32
_BRIGHTEST = 1000.0


@dataclass(frozen=True)
class Level:
    """An image at one resolution.

    Args:
        values: ``[*spatial]``.
        grid: its lattice.
        window: intensity that counts as 0 and length of the range up to 1; None to take values as they are.
    """

    values: Tensor
    grid: Grid
    window: tuple[Tensor, Tensor] | None = None

    def clipped(self) -> Level:
        """Itself, or, where single voxels are thousands of times as bright as tissue, a copy that cuts them off."""
        if self.window is None:
            return self
        start, length = self.window
        low, high = self.values.aminmax()
        if float(torch.maximum(high - start, start - low) / length) < _BRIGHTEST:
            return self
        most = _BRIGHTEST * length
        return replace(self, values=self.values.clamp(start - most, start + most))

    def sample(self, where: Tensor) -> Tensor:
        """Linear interpolation, in the window.

        Args:
            where: ``[S, D]``, coordinates of ``grid_sample`` on ``grid``. Outside, the border goes on.

        Returns:
            ``[S]``.
        """
        dims = where.shape[-1]
        found = F.grid_sample(
            self.values[None, None],
            where.view(1, *[1] * (dims - 1), -1, dims),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        ).view(-1)
        return found if self.window is None else (found - self.window[0]) / self.window[1]


def pool(level: Level, spacing: float) -> Level:
    """Average blocks of voxels so that the spacing of each axis comes as near to ``spacing`` as whole blocks allow.

    Axes that are coarser already stay as they are.
    """
    factors = [
        max(1, min(round(spacing / s), n // 2)) for s, n in zip(level.grid.spacing, level.grid.shape, strict=True)
    ]
    if max(factors) == 1:
        return level
    average = F.avg_pool2d if level.grid.dims == 2 else F.avg_pool3d
    return Level(average(level.values[None, None], factors)[0, 0], pooled_grid(level.grid, factors), level.window)


@dataclass(frozen=True)
class Frame:
    """Coordinates to compute in: the image's own axes, in units of the object's radius, origin in its center.

    Both images of a pair share the unit. Numbers are of order one, and nothing depends on how the image lies in the
    world or in memory.

    Args:
        to_world: ``(D+1, D+1)`` float64, frame to world.
        unit: length of one unit, mm.
    """

    to_world: Tensor
    unit: float

    @classmethod
    def of(cls, grid: Grid, center: Tensor, unit: float) -> Frame:
        """
        Args:
            grid: of the image.
            center: world coordinates of the object, ``(D,)``.
            unit: length of one unit, mm.
        """
        dims = grid.dims
        to_world = torch.eye(dims + 1, dtype=torch.float64)
        to_world[:dims, :dims] = unit * nearest_axes(grid)
        to_world[:dims, dims] = center.cpu().double()
        return cls(to_world, unit)

    def to_grid(self, grid: Grid) -> Tensor:
        """Frame to the coordinates of ``grid_sample`` on ``grid``, ``(D+1, D+1)`` float64."""
        return grid.from_world @ self.to_world

    def to_index(self, grid: Grid) -> Tensor:
        """Frame to the indices of ``grid``, ``(D+1, D+1)`` float64."""
        return torch.linalg.inv(grid.affine) @ self.to_world

    def columns(self, grid: Grid) -> Tensor:
        """Unit vectors along the columns of ``grid``, whose header may be sheared, ``(D, D)`` float64, one a column."""
        spacing = torch.tensor(grid.spacing, dtype=torch.float64)
        along = torch.linalg.inv(self.to_index(grid))[: grid.dims, : grid.dims]
        return along * self.unit / spacing


class Side:
    """One image of a pair.

    Args:
        values: ``[*spatial]`` float32; float64 is computed with in that type, for comparison.
        grid: its lattice.
        mask: ``[*spatial]`` bool, where to look, in place of the foreground; None for the foreground.
        seen: ``[*spatial]`` bool, what the image shows at all; None for all of it.
        base: finest lattice step, mm.
        coarse: lattice step of the coarse stage, mm.
        faint: see `monai_zsreg.foreground.appearance`.

    Attributes:
        weight: how much each place counts, 0 to 1, at the coarse step.
        center: world coordinates of the middle of what counts, ``(D,)``.
        radius: its root mean square distance from there, mm.
        size: its area or volume, mm^D.
    """

    def __init__(
        self,
        values: Tensor,
        grid: Grid,
        base: float,
        coarse: float,
        mask: Tensor | None = None,
        seen: Tensor | None = None,
        faint: bool = False,
    ) -> None:
        self.grid = grid
        self.base, self.step = base, coarse
        self._levels = {base: pool(Level(values, grid), base)}
        half = 2 * base
        coarsest = pool(self.at(half) if half <= coarse else self.at(base), coarse)
        found = appearance(coarsest.values, faint)
        window = (found.background, found.scale)
        self._levels = {step: replace(level, window=window).clipped() for step, level in self._levels.items()}
        self.coarse = self.at(coarse)
        weight = found.foreground.to(values.dtype)
        if mask is not None:
            # taken at its word
            weight = (self._pooled(mask, values.dtype) > 0).to(values.dtype)
        if seen is not None:
            weight = weight * (self._pooled(seen, values.dtype) > 0.999)
        self.weight = Level(weight, coarsest.grid)
        self.center, self.radius, self.size = _moments(self.weight)

    def at(self, step: float) -> Level:
        """The image at about this spacing, each level made from the next finer one."""
        if step not in self._levels:
            finer = max(known for known in list(self._levels) if known < step)  # another thread may add one
            self._levels[step] = pool(self._levels[finer], step)
        return self._levels[step]

    def _pooled(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        # by the same steps as the image, or the two would end on different grids
        level = Level(mask.to(dtype), self.grid)
        for step in sorted({self.base, *self._levels, self.step}):
            level = pool(level, step)
        return level.values


class Pair:
    """Two sides in frames of one unit.

    Args:
        fixed: the fixed image.
        moving: the moving image, with the same steps.
        initial: ``(D+1, D+1)``, fixed world to moving world, where to start; None for what the headers say.

    Attributes:
        detail: resolution of the coarser image, the side of a cube of one voxel's volume, mm.
        start: ``initial``, fixed frame to moving frame.
        centered: likewise, the center of one foreground laid on that of the other, without a rotation of the world.
    """

    def __init__(self, fixed: Side, moving: Side, initial: Tensor | None = None) -> None:
        self.fixed, self.moving = fixed, moving
        self.dims = fixed.grid.dims
        self.base = fixed.base
        self.extent = longest_extent(fixed.grid, moving.grid)
        self.detail = max(float(torch.linalg.det(s.grid.affine).abs()) ** (1 / self.dims) for s in (fixed, moving))
        unit = max((fixed.radius * moving.radius) ** 0.5, self.base)
        self.unit = unit
        self.fixed_frame = Frame.of(fixed.grid, fixed.center, unit)
        self.moving_frame = Frame.of(moving.grid, moving.center, unit)
        given = torch.eye(self.dims + 1, dtype=torch.float64)
        self.start = self.to_frames(given if initial is None else initial.cpu().double())
        given[: self.dims, self.dims] = (moving.center - fixed.center).cpu().double()
        self.centered = self.to_frames(given)

    def to_frames(self, affine: Tensor) -> Tensor:
        """World matrices ``[..., D+1, D+1]`` to fixed frame to moving frame."""
        return torch.linalg.inv(self.moving_frame.to_world) @ affine @ self.fixed_frame.to_world

    def overlap(self, transform: Tensor) -> float:
        """Fraction of both foregrounds that a transform ``(D+1, D+1)`` takes into the other's field of view."""
        ways = (
            (self.fixed, self.moving, self.fixed_frame, self.moving_frame, transform),
            (self.moving, self.fixed, self.moving_frame, self.fixed_frame, torch.linalg.inv(transform)),
        )
        shares = []
        for own, other, frame, other_frame, pull in ways:
            to_other = other_frame.to_grid(other.grid) @ pull @ torch.linalg.inv(frame.to_index(own.weight.grid))
            index = own.weight.values.nonzero().cpu().double()
            inside = (apply_affine(to_other, index).abs() <= 1).all(-1)
            shares.append(float(inside.float().mean()) if len(index) else 0.0)
        return sum(shares) / 2

    def to_world(self, transform: Tensor) -> Tensor:
        """Inverse of `to_frames`."""
        return self.moving_frame.to_world @ transform @ torch.linalg.inv(self.fixed_frame.to_world)


def longest_extent(fixed: Grid, moving: Grid) -> float:
    """Longest side of the world boxes of two grids, mm."""
    return float(torch.maximum(fixed.extent, moving.extent).max())


def finest_step(fixed: Grid, moving: Grid, spacing: float | None = None) -> tuple[float, float]:
    """Lattice steps of the finest level and of the coarse stage for a pair, mm.

    Args:
        fixed: grid of the fixed image.
        moving: grid of the moving image.
        spacing: the finest step that the user wants; None for the finest spacing of the images, but no more than 512
            (3D: 256) steps along the longest side.
    """
    extent = longest_extent(fixed, moving)
    base = spacing or max(min(*fixed.spacing, *moving.spacing), extent / _FINEST[fixed.dims])
    return base, max(base, extent / _COARSEST[fixed.dims])


def _moments(weight: Level) -> tuple[Tensor, float, float]:
    """Center ``(D,)`` (world), root mean square radius and size of what counts."""
    grid = weight.grid
    axes = [torch.arange(n, dtype=torch.float64) for n in grid.shape]
    points = apply_affine(grid.affine, torch.cartesian_prod(*axes)).to(weight.values)
    origin = points.mean(0)
    flat = weight.values.flatten()
    flat = flat if bool(flat.sum() > 0) else torch.ones_like(flat)
    share = flat / flat.sum()
    middle = share @ (points - origin)
    spread = (share @ (points - origin).square().sum(1) - middle.square().sum()).clamp(min=0)
    volume = abs(float(torch.linalg.det(grid.affine)))
    return middle + origin, float(spread.sqrt()), float(flat.sum()) * volume
