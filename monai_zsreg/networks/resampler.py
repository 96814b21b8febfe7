# SPDX-License-Identifier: Apache-2.0
"""Resampling by an affine matrix."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AffineResampler"]


class AffineResampler(nn.Module):
    """Linear interpolation by ``affine_grid`` and ``grid_sample``, ``align_corners=False``, 0 outside.

    MONAI's ``AffineTransform`` does the same but does not compile with TorchScript.
    """

    def forward(self, image: Tensor, theta: Tensor, size: list[int]) -> Tensor:
        """Images ``[B, C, *spatial]`` to ``[B, C, *size]`` by ``theta`` ``[B, D, D+1]``, output to input coordinates as
        ``affine_grid`` takes them; see `theta_from_unit`."""
        grid = F.affine_grid(theta.to(image.dtype), [image.shape[0], image.shape[1]] + size, align_corners=False)
        return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
