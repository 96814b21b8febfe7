# SPDX-License-Identifier: Apache-2.0
"""Running a method on images that lie on grids of their own: one interface for networks and the engine.

An estimator is made for a fixed image. Called with versions of the moving image ``[n, 1, *spatial]`` it gives their
world matrices and an estimate with ``status``; ``repeat`` gives the matrices and which of them succeeded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_zsreg.geometry import Grid, unit_points_to_world, world_from_unit
from monai_zsreg.networks import AffineEstimate, Status, ZeroShotAffineNet
from monai_zsreg.registration.images import on_isotropic_grid, working_spacing
from monai_zsreg.registration.robust import RobustEngine, RobustEstimate

__all__ = ["KeypointEstimator", "RobustEstimator"]


class KeypointEstimator:
    """Runs `ZeroShotAffineNet` on images that lie on grids of their own.

    Both images are put on cubes of one isotropic voxel size along the world axes, each around the middle of its own
    field of view; the network sees the two cubes as a pair on one grid.

    Args:
        network: on the device of ``fixed_values``.
        fixed_values: ``[1, *spatial]``.
        fixed: grid of the fixed image.
        moving: grid of the moving image.
        spacing: voxel size of the cubes, mm, or None; see `working_spacing`.
    """

    def __init__(
        self, network: ZeroShotAffineNet, fixed_values: Tensor, fixed: Grid, moving: Grid, spacing: float | None = None
    ) -> None:
        self.network = network
        self.moving = moving
        self.spacing = working_spacing(fixed, moving, spacing)
        extent = float(torch.maximum(fixed.extent, moving.extent).max())
        self.side = int(np.ceil(extent / self.spacing - 1e-3))
        self.fixed_cube, self.fixed_grid = on_isotropic_grid(fixed_values, fixed, self.spacing, self.side)
        self.moving_grid = self.fixed_grid

    def __call__(self, moving_values: Tensor) -> tuple[Tensor, AffineEstimate]:
        """Estimate for n versions of the moving image.

        Args:
            moving_values: ``[n, 1, *spatial]``.

        Returns:
            World matrices ``[n, D+1, D+1]`` float64 on the CPU, and the network's own estimate.
        """
        cubes = [on_isotropic_grid(values, self.moving, self.spacing, self.side) for values in moving_values]
        self.moving_grid = cubes[0][1]
        pairs = torch.stack([torch.cat([cube, self.fixed_cube]) for cube, _ in cubes])
        with torch.inference_mode():
            estimate = self.network.estimate(pairs)
        matrices = [world_from_unit(matrix, self.fixed_grid, self.moving_grid) for matrix in estimate.matrix]
        return torch.stack(matrices), estimate

    def repeat(self, moving_values: Tensor) -> tuple[Tensor, Tensor]:
        """As a call, with a mask ``[n]`` of the estimates that succeeded in place of the details."""
        matrices, estimate = self(moving_values)
        return matrices, estimate.status.cpu() == Status.OK

    def world_keypoints(self, estimate: AffineEstimate) -> dict[str, np.ndarray]:
        """Keypoints of the first pair that both images have, ``[K, D]`` each, world mm."""
        valid = estimate.valid[0]
        return {
            "fixed": unit_points_to_world(estimate.fixed_points[0][valid], self.fixed_grid).numpy(),
            "moving": unit_points_to_world(estimate.moving_points[0][valid], self.moving_grid).numpy(),
        }


class RobustEstimator:
    """Runs `RobustEngine`.

    Args:
        engine: on the device of ``fixed_values``.
        fixed_values: ``[1, *spatial]``.
        fixed: grid of the fixed image.
        moving: grid of the moving image.
        coarse: a network whose keypoints take the place of the search; the engine refines what it finds.
        options: further arguments of `RobustEngine.estimate` for one pair.
    """

    def __init__(
        self,
        engine: RobustEngine,
        fixed_values: Tensor,
        fixed: Grid,
        moving: Grid,
        coarse: ZeroShotAffineNet | None = None,
        **options: Any,
    ) -> None:
        self.engine = engine
        self.fixed_values = fixed_values
        self.fixed = fixed
        self.moving = moving
        self.coarse = None if coarse is None else KeypointEstimator(coarse, fixed_values, fixed, moving)
        self.options = options
        self._keypoints: dict[str, np.ndarray] = {}

    def __call__(self, moving_values: Tensor) -> tuple[Tensor, RobustEstimate]:
        """Estimate for n versions of the moving image.

        Args:
            moving_values: ``[n, 1, *spatial]``.

        Returns:
            World matrices ``[n, D+1, D+1]`` float64 on the CPU, and the engine's own estimate.
        """
        n = len(moving_values)
        options: dict[str, Any] = {
            name: value.expand(n, *value.shape[1:]) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        if self.coarse is not None:
            start, estimate = self.coarse(moving_values)
            found = estimate.status.cpu() == Status.OK
            self._keypoints = self.coarse.world_keypoints(estimate)
            identity = torch.eye(start.shape[-1], dtype=torch.float64)
            options |= {"initial": torch.where(found[:, None, None], start, identity), "search": "none"}
        fixed = self.fixed_values.expand(n, *self.fixed_values.shape)
        with torch.inference_mode():
            result = self.engine.estimate(fixed, moving_values, self.fixed, self.moving, **options)
        return result.matrix.clone(), result

    def repeat(self, moving_values: Tensor) -> tuple[Tensor, Tensor]:
        """As a call, with a mask ``[n]`` of the estimates that succeeded in place of the details."""
        matrices, estimate = self(moving_values)
        return matrices, estimate.status == Status.OK

    def world_keypoints(self, estimate: RobustEstimate) -> dict[str, np.ndarray]:
        """Keypoints of the coarse network if there is one, ``[K, D]`` each, world mm."""
        return self._keypoints
