# SPDX-License-Identifier: Apache-2.0
"""The paper's uncertainty (section 2.7): blacken random pixels of the moving image and see how the estimate changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, apply_affine
from monai_zsreg.metrics.intensity import foreground_mask
from monai_zsreg.resample import ApplyAffineRegistration

__all__ = ["BlackeningUncertainty", "Uncertainty", "blacken", "quadratic_map"]


@dataclass
class Uncertainty:
    """Spread of repeated estimates.

    Attributes:
        matrices: ``[n, D+1, D+1]``, the repeated estimates that succeeded, fixed world to moving world.
        repeats: how many were tried.
        variance: ``(D, D+1)``, variance of each matrix entry over ``matrices`` (mm^2 in the last column, with the
            middle of the fixed field of view as origin, so that it does not depend on where the scanner's origin is).
            Infinite, as the displacement, where fewer than two estimates succeeded.
        fixed: image whose grid the maps live on.
        moving: image that the intensity map warps.
    """

    matrices: np.ndarray
    repeats: int
    variance: np.ndarray
    fixed: MetaTensor = field(repr=False)
    moving: MetaTensor = field(repr=False)

    def at(self, points: np.ndarray | Tensor) -> np.ndarray:
        """Standard deviation of the displacement, mm, at points ``[N, D]`` of the fixed world."""
        mapped = apply_affine(torch.as_tensor(self.matrices), torch.as_tensor(points, dtype=torch.float64)[None])
        if len(mapped) < 2:
            return np.full(mapped.shape[1], np.inf)
        return mapped.var(dim=0, unbiased=True).sum(dim=-1).sqrt().numpy()

    def displacement_map(self) -> MetaTensor:
        """Standard deviation of the displacement, mm, at every voxel of the fixed image: ``[1, *spatial]`` float32."""
        grid = Grid.of(self.fixed)
        dims = grid.dims
        rows = torch.as_tensor(self.matrices)[:, :dims] @ grid.affine
        spread = rows - rows.mean(dim=0)
        # var(x) = h C h with h = (index, 1) and C the covariance of the matrix rows, summed over world axes
        if len(rows) < 2:
            return MetaTensor(torch.full((1, *grid.shape), float("inf")), affine=self.fixed.affine.cpu())
        covariance = torch.einsum("nai,naj->ij", spread, spread) / (len(rows) - 1)
        total = quadratic_map(covariance, grid.shape)
        return MetaTensor(total.clamp(min=0).sqrt().float()[None], affine=self.fixed.affine.cpu())

    def intensity_map(self, channel: int = 0) -> MetaTensor:
        """Variance of the moved image's intensity over the estimates (what the paper's figure 3 seems to show).

        Returns:
            ``[1, *fixed spatial]`` float32, in squared intensity units of the moving image.
        """
        apply = ApplyAffineRegistration(padding_mode="zeros")
        apply.tracing = False
        moving = MetaTensor(self.moving.as_tensor()[channel][None], affine=self.moving.affine)
        mean = torch.zeros(1, *self.fixed.shape[1:], dtype=torch.float64)
        squares = torch.zeros_like(mean)
        # Welford's update: one image at a time, without cancellation
        for count, matrix in enumerate(self.matrices, start=1):
            moved = apply(moving, matrix, self.fixed).as_tensor().cpu().double()
            delta = moved - mean
            mean += delta / count
            squares += delta * (moved - mean)
        return MetaTensor((squares / max(1, len(self.matrices) - 1)).float(), affine=self.fixed.affine.cpu())

    def as_dict(self) -> dict:
        """Numbers for a report: repeats, successes, variance per entry, spread in the middle of the field of view."""
        grid = Grid.of(self.fixed)
        return {
            "method": "blackening (section 2.7)",
            "repeats": self.repeats,
            "succeeded": len(self.matrices),
            "variance": self.variance.tolist(),
            "std_mm_at_center": float(self.at(grid.center[None].numpy())[0]),
        }


def quadratic_map(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """``h M h`` with h = (index, 1) at every voxel, without a table of all indices.

    Args:
        matrix: ``(D+1, D+1)`` float64.
        shape: of the image.
    """
    dims = len(shape)
    axes = [
        torch.arange(n, dtype=torch.float64).view([-1 if a == b else 1 for b in range(dims)])
        for a, n in enumerate(shape)
    ]
    axes.append(torch.ones([1] * dims, dtype=torch.float64))
    total = torch.zeros(tuple(shape), dtype=torch.float64)
    for i, first in enumerate(axes):
        for j, second in enumerate(axes):
            total += matrix[i, j] * first * second
    return total


class BlackeningUncertainty:
    """Repeats an estimate on copies of the moving image with random foreground pixels set to the background.

    Args:
        estimate: moving intensities ``[n, 1, *spatial]`` to world matrices ``[n, D+1, D+1]`` and a mask ``[n]`` of
            those that succeeded.
        values: ``[1, *spatial]``, moving intensities as they were before any normalization.
        fixed: fixed image.
        moving: moving image.
        fraction: part of the foreground pixels to blacken, 0 to 1.
        repeats: number of repetitions, n.
        seed: of the random pixels.
        batch: copies in memory at once.

    Raises:
        RegistrationError: an argument out of its range.
    """

    def __init__(
        self,
        estimate: Callable[[Tensor], tuple[Tensor, Tensor]],
        values: Tensor,
        fixed: MetaTensor,
        moving: MetaTensor,
        fraction: float = 0.05,
        repeats: int = 10,
        seed: int = 0,
        batch: int = 2,
    ) -> None:
        if not 0.0 < fraction < 1.0:
            raise RegistrationError("fraction", fraction, "0 < fraction < 1")
        if repeats < 2:
            raise RegistrationError("repeats", repeats, "at least 2")
        self.estimate = estimate
        self.values = values
        self.fixed = fixed
        self.moving = moving
        self.fraction = fraction
        self.repeats = repeats
        self.seed = seed
        self.batch = batch

    def run(self, affine: np.ndarray) -> Uncertainty:
        """Repeat.

        Args:
            affine: ``(D+1, D+1)``, the estimate from the whole image; stands alone where all repetitions fail.
        """
        generator = torch.Generator().manual_seed(self.seed)
        found: list[Tensor] = []
        for start in range(0, self.repeats, self.batch):
            count = min(self.batch, self.repeats - start)
            copies = torch.stack([blacken(self.values, self.fraction, generator) for _ in range(count)])
            estimates, succeeded = self.estimate(copies)
            found.append(estimates[succeeded])
        matrices = np.asarray(torch.cat(found))
        if len(matrices) == 0:
            matrices = np.asarray(affine)[None]
        center = Grid.of(self.fixed).center.numpy()
        dims = len(center)
        rows = matrices[:, :dims].copy()
        rows[:, :, dims] += rows[:, :, :dims] @ center - center
        spread = rows.var(axis=0, ddof=1) if len(rows) > 1 else np.full(rows.shape[1:], np.inf)
        return Uncertainty(matrices, self.repeats, spread, self.fixed, self.moving)


def blacken(values: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Set random foreground pixels to the background.

    Args:
        values: ``[1, *spatial]``.
        fraction: part of the foreground (by Otsu) to set.
        generator: on the CPU.

    Returns:
        A copy, ``[1, *spatial]``.
    """
    inside = foreground_mask(values).flatten().nonzero()[:, 0]
    count = max(1, round(fraction * len(inside)))
    chosen = inside[torch.randperm(len(inside), generator=generator)[:count].to(inside.device)]
    copy = values.clone()
    copy.view(-1)[chosen] = values.min()
    return copy
