# SPDX-License-Identifier: Apache-2.0
"""The default method as a module of torch, for pipelines that hand a stacked pair to a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monai_zsreg.errors import RegistrationError
from monai_zsreg.io.images import Image
from monai_zsreg.registration.pair import check_options, register


class AffineRegistration(nn.Module):
    """Registers pairs that lie on one grid. It has no parameters; every pair gets what it would get alone.

    Args:
        spatial_dims: 2 or 3.
        options: arguments of `monai_zsreg.register`, such as ``transform``.

    Raises:
        RegistrationError: an argument out of its range.

    Example::

        moved = AffineRegistration(2)(image)    # [B, 2, H, W], channel 0 moving, channel 1 fixed, to [B, 1, H, W]
    """

    def __init__(self, spatial_dims: int, **options: Any) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise RegistrationError("spatial_dims", spatial_dims, "2 or 3")
        check_options(**({"preset": "robust"} | options))
        self.spatial_dims = spatial_dims
        self.options = options

    def forward(self, image: Tensor, spacing: float | Sequence[float] = 1.0) -> Tensor:
        """
        Args:
            image: ``[B, 2, *spatial]``, channel 0 moving, channel 1 fixed.
            spacing: voxel size of both, mm, one number or one an axis.

        Returns:
            ``[B, 1, *spatial]``, the moved images. Pairs with the verdict FAIL warn.

        Raises:
            RegistrationError: another shape, or a spacing that is not positive.
        """
        dims = self.spatial_dims
        if image.ndim != dims + 2 or image.shape[1] != 2:
            raise RegistrationError("image", tuple(image.shape), f"[B, 2, {', '.join('HWD'[:dims])}]")
        sizes = [float(s) for s in (spacing if isinstance(spacing, Sequence) else [spacing] * dims)]
        if len(sizes) != dims or not all(math.isfinite(s) and s > 0 for s in sizes):
            raise RegistrationError("spacing", spacing, f"one positive number, or {dims}")
        affine = torch.diag(torch.tensor([*sizes, 1.0], dtype=torch.float64))
        moved = []
        for moving, fixed in image.float():
            result = register(Image(fixed[None], affine), Image(moving[None], affine), **self.options)
            moved.append(result.resampled().values)
        return torch.stack(moved).to(image)
