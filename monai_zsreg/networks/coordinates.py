# SPDX-License-Identifier: Apache-2.0
"""The networks' coordinates and resampling by them, as far as TorchScript compiles.

Unit coordinates are ``(index + 0.5) / longest side``, in array axis order: isotropic, with the origin at the corner of
the first voxel. Points and matrices of the regressor are in them. ``torch.nn.functional.affine_grid`` wants each axis
normalized to [-1, 1] (``align_corners=False``) and the axes in reversed order instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def map_points(matrix: Tensor, points: Tensor) -> Tensor:
    """Points ``[..., N, D]`` through matrices ``[..., D, D+1]``."""
    dims = points.shape[-1]
    return points @ matrix[..., :dims].transpose(-1, -2) + matrix[..., dims].unsqueeze(-2)


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The matrix ``[..., D, D+1]`` that maps by ``inner`` and then by ``outer``."""
    dims = inner.shape[-2]
    matrix = outer[..., :dims] @ inner
    return torch.cat([matrix[..., :dims], matrix[..., dims:] + outer[..., dims:]], dim=-1)


def index_to_unit(points: Tensor, longest: float) -> Tensor:
    """Indices ``[..., D]`` to unit coordinates of a grid whose longest side has ``longest`` voxels."""
    return (points + 0.5) / longest


def shrunk_to_index(points: Tensor, factor: float) -> Tensor:
    """Indices ``[..., D]`` in an image of averaged blocks of ``factor`` voxels a side, to those in the image itself."""
    return (points + 0.5) * factor - 0.5


def without_padding(points: Tensor, matrix: Tensor, margin: float, longest: float) -> tuple[Tensor, Tensor]:
    """Points ``[..., N, D]`` and a matrix ``[..., D, D+1]`` in the units of a grid that was padded by ``margin`` voxels
    on every side, to the units of the grid before, whose longest side has ``longest`` voxels."""
    dims = matrix.shape[-2]
    scale, offset = (longest + 2.0 * margin) / longest, margin / longest
    linear, shift = matrix[..., :dims], matrix[..., dims]
    shift = shift * scale + offset * linear.sum(dim=-1) - offset
    return points * scale - offset, torch.cat([linear, shift.unsqueeze(-1)], dim=-1)


def theta_from_unit(matrix: Tensor, size: list[int]) -> Tensor:
    """A pull matrix ``[..., D, D+1]`` between two images of shape ``size``, from unit coordinates to what
    ``affine_grid`` takes."""
    dims = len(size)
    # unit = (grid + 1) * half, axis by axis
    half = torch.tensor([0.5 * float(n) / float(max(size)) for n in size], dtype=matrix.dtype, device=matrix.device)
    linear = matrix[..., :dims] * (half.unsqueeze(0) / half.unsqueeze(1))
    shift = (torch.sum(matrix[..., :dims] * half, dim=-1) + matrix[..., dims]) / half - 1.0
    return torch.cat([linear.flip([-2, -1]), shift.flip([-1]).unsqueeze(-1)], dim=-1)


class AffineResampler(nn.Module):
    """Linear interpolation by ``affine_grid`` and ``grid_sample``, ``align_corners=False``, 0 outside.

    MONAI's ``AffineTransform`` does the same but does not compile with TorchScript.
    """

    def forward(self, image: Tensor, theta: Tensor, size: list[int]) -> Tensor:
        """Images ``[B, C, *spatial]`` to ``[B, C, *size]`` by ``theta`` ``[B, D, D+1]``, output to input coordinates as
        ``affine_grid`` takes them; see `theta_from_unit`."""
        grid = F.affine_grid(theta.to(image.dtype), [image.shape[0], image.shape[1]] + size, align_corners=False)
        return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
