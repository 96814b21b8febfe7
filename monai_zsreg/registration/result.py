# SPDX-License-Identifier: Apache-2.0
"""What a registration gives back."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import AffineParameters, Grid, apply_affine, decompose_affine
from monai_zsreg.io.itk_transform import write_itk_transform
from monai_zsreg.registration.images import ImageLike, read_image
from monai_zsreg.registration.uncertainty import BlackeningUncertainty
from monai_zsreg.transforms.array import ApplyAffineRegistration

__all__ = ["RegistrationResult"]


@dataclass
class RegistrationResult:
    """The outcome of `monai_zsreg.register`.

    Attributes:
        affine: ``(D+1, D+1)`` float64, fixed world to moving world, RAS mm (pixels where there is no spacing). The
            identity where ``success`` is False.
        success: False where no transform could be estimated; ``warnings`` says why.
        warnings: what a user should know, in words.
        seconds: time of the estimate, without reading files and without loading weights.
        preset: name of the method.
        transform: ``"rigid"``, ``"similarity"`` or ``"affine"``.
        fixed: the fixed image ``[C, *spatial]``, whose grid results live on.
        moving: the moving image ``[C, *spatial]`` as it was.
        keypoints: for the presets that have them: ``fixed`` and ``moving`` ``[K, D]`` in world mm, paired by position.
    """

    affine: np.ndarray
    success: bool
    warnings: list[str]
    seconds: float
    preset: str
    transform: str
    fixed: MetaTensor = field(repr=False)
    moving: MetaTensor = field(repr=False)
    keypoints: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _uncertainty: BlackeningUncertainty | None = field(default=None, repr=False)

    @cached_property
    def moved(self) -> MetaTensor:
        """The moving image, all channels, on the fixed grid, zeros outside; made when first asked for."""
        return self.apply(self.moving)

    @cached_property
    def uncertainty(self) -> Any:
        """The paper's uncertainty (section 2.7), see `BlackeningUncertainty`; None where the registration failed.

        It repeats the estimate ten times, and does so when first asked for.
        """
        if not self.success or self._uncertainty is None:
            return None
        return self._uncertainty.run(self.affine)

    @property
    def parameters(self) -> AffineParameters:
        """Translation, rotation, scale and shear about the middle of the fixed field of view."""
        return decompose_affine(self.affine, center=Grid.of(self.fixed).center.tolist())

    def apply(self, data: ImageLike, mode: str = "bilinear") -> Any:
        """Carry something along.

        Args:
            data: an image or labels on any grid in the moving image's world (path, ``[C, *spatial]`` tensor, or numpy
                array ``[*spatial]``; array and plain tensor are taken to lie on the moving image's own grid), or points
                ``[N, D]`` in the *fixed* world, mm.
            mode: ``"bilinear"`` for images, ``"nearest"`` for labels.

        Returns:
            Images: ``MetaTensor [C, *fixed spatial]``. Points: where they are in the *moving* world, ``[N, D]``
            float64; ``np.linalg.inv(result.affine)`` goes the other way.

        Raises:
            RegistrationError: data that is none of these.
        """
        dims = len(self.affine) - 1
        if isinstance(data, (np.ndarray, Tensor)) and data.ndim == 2 and data.shape[1] == dims:
            points = torch.as_tensor(data, dtype=torch.float64)
            mapped = apply_affine(torch.as_tensor(self.affine), points)
            return mapped.numpy() if isinstance(data, np.ndarray) else mapped
        image = read_image(data, "data")
        if not isinstance(data, (str, os.PathLike, MetaTensor)):
            if image.shape[1:] != self.moving.shape[1:]:
                raise RegistrationError(
                    "data",
                    tuple(image.shape),
                    f"a MetaTensor, or the moving image's shape {tuple(self.moving.shape[1:])}",
                )
            image = MetaTensor(image.as_tensor(), affine=self.moving.affine)
        fixed = MetaTensor(self.fixed.as_tensor().to(image.device), meta=self.fixed.meta)
        # the trace would hold on to the native image; a result is final
        transform = ApplyAffineRegistration(mode=mode, padding_mode="zeros")
        transform.tracing = False
        return transform(image, self.affine, fixed)

    def save_transform(self, path: str | os.PathLike) -> None:
        """Write the transform for ITK, ANTs or 3D Slicer (``.tfm``, ``.h5``, ``.mat``), LPS as they expect."""
        write_itk_transform(path, self.affine)
