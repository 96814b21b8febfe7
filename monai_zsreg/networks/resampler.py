# SPDX-License-Identifier: Apache-2.0
"""Resampling by an affine matrix."""

import torch.nn.functional as F
from torch import Tensor, nn

from monai_zsreg.errors import RegistrationError

__all__ = ["AffineResampler"]


class AffineResampler(nn.Module):
    """Sample images through a pull matrix with ``affine_grid`` and ``grid_sample``, ``align_corners=False``.

    MONAI's ``AffineTransform`` does the same but does not compile with TorchScript.

    Args:
        mode: ``"bilinear"`` (trilinear in 3D) or ``"nearest"``.
        padding_mode: ``"zeros"``, ``"border"`` or ``"reflection"``.

    Raises:
        RegistrationError: another mode or padding mode.
    """

    def __init__(self, mode: str = "bilinear", padding_mode: str = "zeros") -> None:
        super().__init__()
        if mode not in ("bilinear", "nearest"):
            raise RegistrationError("mode", mode, '"bilinear" or "nearest"')
        if padding_mode not in ("zeros", "border", "reflection"):
            raise RegistrationError("padding_mode", padding_mode, '"zeros", "border" or "reflection"')
        self.mode = mode
        self.padding_mode = padding_mode

    def forward(self, image: Tensor, theta: Tensor, size: list[int]) -> Tensor:
        """Resample.

        Args:
            image: ``[B, C, *spatial]``.
            theta: ``[B, D, D+1]``, output to input coordinates, as ``affine_grid`` takes them; see `theta_from_unit`.
            size: spatial shape of the output.

        Returns:
            ``[B, C, *size]``.
        """
        grid = F.affine_grid(theta.to(image.dtype), [image.shape[0], image.shape[1]] + size, align_corners=False)
        return F.grid_sample(image, grid, mode=self.mode, padding_mode=self.padding_mode, align_corners=False)
