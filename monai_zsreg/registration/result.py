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
from monai_zsreg.registration.confidence import CALIBRATION, WARN, Quality, error_quantile, spread_at
from monai_zsreg.registration.images import ImageLike, read_image
from monai_zsreg.registration.uncertainty import BlackeningUncertainty, quadratic_map
from monai_zsreg.resample import ApplyAffineRegistration

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
        quality: the verdict, with reasons.
        keypoints: for the presets that have them: ``fixed`` and ``moving`` ``[K, D]`` in world mm, paired by position.
        covariance: ``(D(D+1), D(D+1))`` of the first D rows of ``affine``, row after row; None for presets that do
            not know it.
    """

    affine: np.ndarray
    success: bool
    warnings: list[str]
    seconds: float
    preset: str
    transform: str
    fixed: MetaTensor = field(repr=False)
    moving: MetaTensor = field(repr=False)
    quality: Quality = field(default_factory=lambda: Quality(WARN, ["nothing is known about it"]))
    keypoints: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    covariance: np.ndarray | None = field(default=None, repr=False)
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

    def uncertainty_at(self, points: Any, level: float | None = None) -> np.ndarray:
        """How far off the displacement may be at points of the fixed world.

        Args:
            points: ``[N, D]``, RAS mm.
            level: a probability, such as 0.95; None for the root mean square of the error.

        Returns:
            ``[N]``, mm: the length that the error stays below with that probability, or its root mean square. For
            presets without a covariance the standard deviation by blackening, which is not calibrated. Infinite where
            the registration failed.

        Raises:
            RegistrationError: points of another shape, or a level that is no probability.
        """
        places = np.asarray(points, dtype=np.float64)
        dims = len(self.affine) - 1
        if places.ndim != 2 or places.shape[1] != dims:
            raise RegistrationError("points", places.shape, f"[N, {dims}]")
        if not self.success:
            return np.full(len(places), np.inf)
        if self.covariance is None:
            return np.asarray(self.uncertainty.at(places))
        spread = spread_at(self.covariance, places)
        return spread if level is None else error_quantile(spread, level, CALIBRATION[dims])

    def uncertainty_map(self) -> MetaTensor:
        """`uncertainty_at` every voxel of the fixed image, mm: ``[1, *spatial]`` float32."""
        grid = Grid.of(self.fixed)
        if not self.success:
            return MetaTensor(torch.full((1, *grid.shape), float("inf")), affine=self.fixed.affine.cpu())
        if self.covariance is None:
            return self.uncertainty.displacement_map()
        dims = grid.dims
        trace = np.einsum("iaib->ab", self.covariance.reshape(dims, dims + 1, dims, dims + 1))
        values = quadratic_map(grid.affine.mT @ torch.as_tensor(trace) @ grid.affine, grid.shape)
        return MetaTensor(values.clamp(min=0).sqrt().float()[None], affine=self.fixed.affine.cpu())

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
