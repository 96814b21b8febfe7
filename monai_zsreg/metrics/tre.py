# SPDX-License-Identifier: Apache-2.0
"""Target registration error: how far a transform puts a point from where it belongs, in mm.

Transforms are matrices ``(D+1, D+1)``, or a `Deformation`, and map fixed world to moving world (pull), RAS mm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_zsreg.errors import require
from monai_zsreg.foreground import foreground_mask
from monai_zsreg.geometry import Grid, apply_affine, lattice_index
from monai_zsreg.metrics.similarity import plain_mask
from monai_zsreg.registration.displacement import Deformation, Transform, map_points

TRE_STATISTICS = ("mean", "median", "p95", "max", "rms")
_MOST_POINTS = 20_000


def _transform(value: Any, dims: int, name: str) -> Transform:
    if isinstance(value, Deformation) and value.dims == dims:
        return value
    matrix = torch.as_tensor(value).as_subclass(Tensor)
    size = (dims + 1, dims + 1)
    require(matrix.shape == size, name, tuple(matrix.shape), f"a {size} matrix for {dims}D points")
    return matrix.detach().cpu().double()


def _points(value: Any, name: str) -> Tensor:
    points = torch.as_tensor(value).detach().cpu().double()
    usable = points.ndim == 2 and points.shape[1] in (2, 3) and len(points) > 0 and bool(points.isfinite().all())
    require(usable, name, tuple(points.shape), "finite points of shape (N, 2) or (N, 3), N > 0")
    return points


def _distance(gap: Tensor) -> np.ndarray:
    # a transform that is not finite is wrong by any measure; NaN would drop out of averages unseen
    return torch.nan_to_num(gap.norm(dim=-1), nan=float("inf"), posinf=float("inf")).numpy()


def target_registration_error(
    affine: np.ndarray | Transform, truth: np.ndarray | Transform, points: np.ndarray | Tensor
) -> np.ndarray:
    """Distance between where two transforms put the same points of the fixed image.

    Args:
        affine, truth: the transforms.
        points: ``[N, D]``, fixed world.

    Returns:
        ``[N]`` float64, mm, measured in the moving world; infinity where ``affine`` is not finite.

    Raises:
        RegistrationError: shapes that do not fit, or a truth that is not finite.
    """
    where = _points(points, "points")
    estimate, true = _transform(affine, where.shape[1], "affine"), _transform(truth, where.shape[1], "truth")
    if isinstance(true, Tensor):
        require(bool(torch.isfinite(true).all()), "truth", true.tolist(), "a finite matrix")
    return _distance(map_points(estimate, where) - map_points(true, where))


def landmark_tre(
    affine: np.ndarray | Transform, fixed_points: np.ndarray | Tensor, moving_points: np.ndarray | Tensor
) -> np.ndarray:
    """Distance between transformed landmarks of the fixed image and their partners in the moving image.

    Args:
        affine: the transform.
        fixed_points: ``[N, D]``, fixed world (``monai_zsreg.io.read_landmarks`` reads files).
        moving_points: ``[N, D]``, moving world; row i is the partner of row i.

    Returns:
        ``[N]`` float64, mm; infinity where ``affine`` is not finite. A RegistrationError for shapes that do not fit.
    """
    fixed, moving = _points(fixed_points, "fixed_points"), _points(moving_points, "moving_points")
    shape = f"the shape of fixed_points, {tuple(fixed.shape)}"
    require(fixed.shape == moving.shape, "moving_points", tuple(moving.shape), shape)
    return _distance(map_points(_transform(affine, fixed.shape[1], "affine"), fixed) - moving)


def foreground_tre(
    affine: np.ndarray | Transform,
    truth: np.ndarray | Transform,
    fixed: Tensor,
    mask: Tensor | np.ndarray | None = None,
) -> dict[str, float]:
    """Target registration error over the foreground voxels of the fixed image.

    Mean, median, 95th percentile and root mean square come from at most 20,000 voxels, drawn one from each of as many
    equal stretches of the foreground with a fixed seed. The maximum of two matrices is exact: the error is a convex
    function of position, so along each row of voxels it is largest at the first or last foreground voxel.

    Args:
        affine, truth: the transforms.
        fixed: ``[C, *spatial]``, normally a ``MetaTensor``; a plain tensor counts as 1 mm voxels.
        mask: ``[C, *spatial]`` on the grid of ``fixed``, anything but 0 counts. None: `foreground_mask` of
            ``fixed``, or all of it where that is empty.

    Returns:
        The `TRE_STATISTICS`: ``mean``, ``median``, ``p95``, ``max``, ``rms``, mm; infinity if ``affine`` is not finite.

    Raises:
        RegistrationError: shapes that do not fit, a truth that is not finite, an empty mask.
    """
    grid = Grid.of(fixed, "fixed")
    if mask is None:
        inside = foreground_mask(fixed)[0]
        inside = inside if bool(inside.any()) else torch.ones_like(inside)
    else:
        inside = plain_mask(mask, grid.shape, "mask")
        require(bool(inside.any()), "mask", "only zeros", "at least one foreground voxel")
    inside = inside.cpu()
    flat = inside.flatten().nonzero()[:, 0]
    if len(flat) > _MOST_POINTS:
        # one at random from each stretch: a fixed stride could keep step with the rows of the image
        draw = torch.rand(_MOST_POINTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rank = ((torch.arange(_MOST_POINTS) + draw) * (len(flat) / _MOST_POINTS)).long().clamp_(max=len(flat) - 1)
        flat = flat[rank]
    sample = lattice_index(flat, grid.shape)
    errors, ends = (
        target_registration_error(affine, truth, apply_affine(grid.affine, index.double()))
        for index in (sample, _row_ends(inside))
    )
    if not np.isfinite(ends).all():
        return dict.fromkeys(TRE_STATISTICS, float("inf"))
    median, p95 = np.percentile(errors, [50, 95])
    values = (errors.mean(), median, p95, max(errors.max(), ends.max()), np.sqrt((errors**2).mean()))
    return {name: float(value) for name, value in zip(TRE_STATISTICS, values, strict=True)}


def _row_ends(inside: Tensor) -> Tensor:
    """Indices ``[N, D]`` of the first and last True of each row along the last axis."""
    rows = inside.any(dim=-1).nonzero()
    kept = inside[inside.any(dim=-1)].to(torch.uint8)
    first = kept.argmax(dim=-1)
    last = inside.shape[-1] - 1 - kept.flip(-1).argmax(dim=-1)
    return torch.cat([torch.cat([rows, end[:, None]], dim=-1) for end in (first, last)])
