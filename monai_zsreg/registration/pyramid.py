# SPDX-License-Identifier: Apache-2.0
"""Coarser copies of images, and the frames that the robust engine computes in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_zsreg.geometry import Grid, apply_affine, pooled_grid

__all__ = ["Frame", "Level", "index_points", "normalize", "pool"]


@dataclass(frozen=True)
class Level:
    """Images of a batch that share one grid.

    Args:
        values: ``[N, 1, *spatial]``.
        grid: their lattice.
        window: ``[N, 2]`` intensity that counts as 0 and length of the range up to 1; None to take values as they are.
    """

    values: Tensor
    grid: Grid
    window: Tensor | None = None

    def clipped(self) -> Level:
        """Itself, or, where single voxels are thousands of times as bright as tissue, a copy that cuts them off."""
        if self.window is None:
            return self
        start, length = self.window.T[..., None, None]
        flat = self.values.flatten(1)[:, None]
        if float(((flat - start).abs().amax(-1) / length[..., 0]).max()) < _BRIGHTEST:
            return self
        most = _BRIGHTEST * length
        return replace(self, values=flat.clamp(start - most, start + most).view(self.values.shape))

    def scaled(self, samples: Tensor) -> Tensor:
        """Samples ``[N, S]`` of the values, in the window."""
        if self.window is None:
            return samples
        return (samples - self.window[:, :1]) / self.window[:, 1:]


# how far intensities may lie from the background, in ranges of tissue; their fourth powers must fit float32
_BRIGHTEST = 1000.0


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
    return Level(average(level.values, factors), pooled_grid(level.grid, factors), level.window)


def normalize(coarse: Level, faint: bool = False) -> tuple[Tensor, Level]:
    """Which intensities are background, and how bright tissue is.

    The background is the median of the outermost voxels, unless these vary so much that they are no background: then
    the darkest half per cent takes its place and every voxel is foreground, as in a photograph.

    Args:
        coarse: images, pooled, so that noise does not count.
        faint: whether all that differs at all from a background without noise is foreground; otherwise it must stand
            out by 8 % of the range, for air may be cut to zero in one place and noisy in another.

    Returns:
        The window ``[N, 2]`` from background to bright tissue, and a level with the foreground, 1 or 0.
    """
    values, windows, masks = coarse.values, [], []
    rim = torch.zeros(coarse.grid.shape, dtype=torch.bool, device=values.device)
    for axis in range(coarse.grid.dims):
        rim.select(axis, 0).fill_(True)
        rim.select(axis, coarse.grid.shape[axis] - 1).fill_(True)
    ends = torch.tensor([0.005, 0.995], dtype=values.dtype, device=values.device)
    for image in values[:, 0]:
        low, high = torch.quantile(image.flatten()[:: 1 + image.numel() // 4_000_000], ends)
        if bool(low == high):  # less than half a per cent of the voxels show anything
            low, high = image.min(), image.max()
        border = image[rim]
        middle = border.median()
        noise = 1.4826 * (border - middle).abs().median()
        if bool(noise > 0.12 * (high - low)):
            windows.append(torch.stack([low, (high - low).clamp(min=1e-20)]))
            masks.append(torch.ones_like(image))
            continue
        least = 0.005 if faint and bool(noise == 0) else 0.08
        # tissue may also be darker than the background
        scale = torch.maximum(high - middle, middle - low).clamp(min=1e-20)
        windows.append(torch.stack([middle, scale]))
        masks.append(((image - middle).abs() > torch.maximum(least * scale, 4 * noise)).to(image.dtype))
    return torch.stack(windows), Level(torch.stack(masks)[:, None], coarse.grid)


def index_points(grid: Grid, like: Tensor) -> Tensor:
    """World coordinates of all voxels, ``[V, D]`` in the type and on the device of ``like``, in memory order."""
    axes = [torch.arange(n, dtype=torch.float64) for n in grid.shape]
    return apply_affine(grid.affine, torch.cartesian_prod(*axes)).to(like)


@dataclass(frozen=True)
class Frame:
    """Coordinates to compute in: the image's own axes, in units of the object's radius, origin in its middle.

    Both images of a pair share the unit. Numbers are of order one, and nothing depends on how the image lies in the
    world or in memory.

    Args:
        to_world: ``[N, D+1, D+1]`` float64, frame to world.
    """

    to_world: Tensor

    @classmethod
    def of(cls, grid: Grid, centers: Tensor, unit: float) -> Frame:
        """
        Args:
            grid: of the images.
            centers: world coordinates of the objects, ``[N, D]``.
            unit: length of one unit, mm.
        """
        dims = grid.dims
        # the nearest orthonormal axes: the header may be sheared
        u, _, vt = torch.linalg.svd(grid.affine[:dims, :dims] / torch.tensor(grid.spacing, dtype=torch.float64))
        to_world = torch.eye(dims + 1, dtype=torch.float64).repeat(len(centers), 1, 1)
        to_world[:, :dims, :dims] = unit * (u @ vt)
        to_world[:, :dims, dims] = centers.cpu().double()
        return cls(to_world)

    def to_grid(self, grid: Grid) -> Tensor:
        """Frame to the coordinates of ``grid_sample`` on ``grid``, ``[N, D+1, D+1]`` float64."""
        return grid.from_world @ self.to_world
