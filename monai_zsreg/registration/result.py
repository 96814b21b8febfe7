# SPDX-License-Identifier: Apache-2.0
"""What a registration gives back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import AffineParameters, Grid, decompose_affine
from monai_zsreg.io import write_transform
from monai_zsreg.io.images import Image, ImageLike, load_image
from monai_zsreg.registration.confidence import (
    CALIBRATION,
    FAIL,
    error_quantile,
    row_trace,
    spread_at,
    weakest_direction,
)
from monai_zsreg.registration.displacement import Deformation, Transform, map_points, move

if TYPE_CHECKING:
    from monai.data import MetaTensor


@dataclass(eq=False)
class RegistrationResult:
    """The outcome of `monai_zsreg.register`.

    Attributes:
        affine: ``(D+1, D+1)`` float64, fixed world to moving world, RAS mm (pixels where there is no spacing): the best
            matrix that was found, whatever the verdict. Only where nothing could be computed is it the identity, which
            is what the headers say; then ``reasons`` says so.
        verdict: ``"PASS"``, ``"WARN"`` or ``"FAIL"``.
        reasons: what stands behind the verdict, in words.
        measures: the numbers that it rests on.
        score: one number for all of them: 0 at the limit between PASS and WARN, larger is better.
        seconds: time of the estimate, without reading files.
        preset: name of the method.
        transform: ``"rigid"``, ``"similarity"``, ``"affine"`` or ``"deformable"``.
        fixed_image: the fixed image, whose grid results live on.
        moving_image: the moving image as it was.
        covariance: ``(D(D+1), D(D+1))`` of the first D rows of ``affine``, row after row; None for presets that do
            not know it.
        keypoints: for the presets that have them: ``fixed`` and ``moving`` ``[K, D]`` in world mm, paired by position.
        options: further arguments that `register` was called with.
        device: where it computed.
        masks: of the fixed and of the moving image, ``[1, *spatial]`` bool on their grids; None where none was given.
        deformation: the whole map of transform ``"deformable"``, of which ``affine`` is the second half; None for the
            others. How far off it may be is not known.
        repeat: from a result to its ``uncertainty``; None where the pair cannot be registered again.
    """

    affine: np.ndarray
    verdict: str
    reasons: list[str]
    measures: dict[str, float]
    score: float
    seconds: float
    preset: str
    transform: str
    fixed_image: Image = field(repr=False)
    moving_image: Image = field(repr=False)
    covariance: np.ndarray | None = field(default=None, repr=False)
    keypoints: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    device: str = "cpu"
    masks: tuple[Tensor | None, Tensor | None] = field(default=(None, None), repr=False)
    deformation: Deformation | None = field(default=None, repr=False)
    repeat: Callable[[RegistrationResult], Any] | None = field(default=None, repr=False)

    @property
    def success(self) -> bool:
        """Whether the verdict is not FAIL."""
        return self.verdict != FAIL

    @property
    def pull(self) -> Transform:
        """Fixed world to moving world: ``deformation`` if there is one, else ``affine``."""
        return torch.as_tensor(self.affine) if self.deformation is None else self.deformation

    @cached_property
    def fixed(self) -> MetaTensor:
        """The fixed image as a ``MetaTensor [C, *spatial]``."""
        return self.fixed_image.to_metatensor()

    @cached_property
    def moving(self) -> MetaTensor:
        """The moving image as a ``MetaTensor [C, *spatial]``, as it was."""
        return self.moving_image.to_metatensor()

    @cached_property
    def moved(self) -> MetaTensor:
        """The moving image, all channels, on the fixed grid, its background outside; made when first asked for."""
        return self.resampled().to_metatensor()

    def resampled(self, image: Image | None = None, mode: str = "bilinear", fill_value: float | None = None) -> Image:
        """`apply` for an `Image` in the moving image's world (None: the moving image itself), without MONAI."""
        image = self.moving_image if image is None else image
        fixed = self.fixed_image
        values = move(self.pull, image.values.to(self.device), image.grid, fixed.grid, mode=mode, fill=fill_value)
        where = {key: fixed.meta[key] for key in ("place", "unit") if key in fixed.meta}
        kept = {key: value for key, value in image.meta.items() if key not in ("place", "unit")}
        return Image(values, fixed.affine, kept | where)

    @cached_property
    def uncertainty(self) -> Any:
        """The paper's uncertainty (section 2.7), see `monai_zsreg.paper.blackening`; None where the verdict is FAIL.

        It repeats the estimate ten times, and does so when first asked for.
        """
        if not self.success or self.deformation is not None or self.repeat is None:
            return None
        return self.repeat(self)

    def uncertainty_at(self, points: Any, level: float | None = None) -> np.ndarray:
        """How far off the displacement may be at points of the fixed world.

        Args:
            points: ``[N, D]``, RAS mm.
            level: a probability, such as 0.95; None for the root mean square of the error.

        Returns:
            ``[N]``, mm: the length that the error stays below with that probability, or its root mean square. For
            presets without a covariance the standard deviation by blackening, which is not calibrated. Infinite where
            the verdict is FAIL and nothing is known.

        Raises:
            RegistrationError: points of another shape, or a level that is no probability.
        """
        places = np.asarray(points, dtype=np.float64)
        dims = len(self.affine) - 1
        if places.ndim != 2 or places.shape[1] != dims:
            raise RegistrationError("points", places.shape, f"[N, {dims}]")
        if self.covariance is None:
            return np.full(len(places), np.inf) if self.uncertainty is None else np.asarray(self.uncertainty.at(places))
        spread = spread_at(self.covariance, places)
        return spread if level is None else error_quantile(spread, level, CALIBRATION[dims])

    @property
    def weakest_direction(self) -> str:
        """The motion that the images determine least, with its standard deviation: "shift along the head-foot axis:
        0.3 mm"; empty for presets without a covariance."""
        if self.covariance is None:
            return ""
        fixed = self.fixed_image
        return weakest_direction(self.covariance, self.affine, fixed.grid, fixed.length_unit)

    def expected_error(self, grid: Grid | None = None) -> Tensor:
        """`uncertainty_at` the voxels of a grid, mm, ``[1, *spatial]`` float32.

        Args:
            grid: in the fixed world; None for the fixed image's own.
        """
        own = grid is None
        grid = self.fixed_image.grid if grid is None else grid
        if self.covariance is None:
            if own and self.uncertainty is not None:
                return torch.as_tensor(self.uncertainty.displacement_map()).cpu()
            return torch.full((1, *grid.shape), float("inf"))
        return spread_map(self.covariance, grid)

    def uncertainty_map(self) -> MetaTensor:
        """`uncertainty_at` every voxel of the fixed image, mm: ``[1, *spatial]`` float32."""
        return replace(self.fixed_image, values=self.expected_error()).to_metatensor()

    @cached_property
    def displacement(self) -> MetaTensor:
        """What transform ``"deformable"`` adds to ``affine``: ``[D, *lattice]``, mm along the axes of the fixed world.

        A point x of the fixed world goes to ``affine (x + displacement(x))``.

        Raises:
            RegistrationError: of another kind of transform.
        """
        found = self._deformed()
        return Image(found.displacement, found.grid.affine, {"unit": "mm"}).to_metatensor()

    def jacobian(self) -> MetaTensor:
        """Jacobian determinant of what transform ``"deformable"`` adds, ``[1, *lattice]``; see `displacement`."""
        found = self._deformed()
        return Image(found.jacobian(), found.grid.affine).to_metatensor()

    def inverse(self) -> Deformation:
        """The map of transform ``"deformable"`` from the moving to the fixed world; see `displacement`."""
        return self._deformed().inverse()

    def _deformed(self) -> Deformation:
        if self.deformation is None:
            raise RegistrationError("transform", self.transform, "'deformable', which has a displacement")
        return self.deformation

    @property
    def parameters(self) -> AffineParameters:
        """Translation, rotation, scale and shear about the center of the fixed field of view."""
        return decompose_affine(self.affine, center=self.fixed_image.grid.center.tolist())

    def apply(self, data: ImageLike, mode: str = "bilinear", fill_value: float | None = None) -> Any:
        """Carry something along.

        Args:
            data: an image or labels on any grid in the moving image's world (path, ``[C, *spatial]`` tensor, or numpy
                array ``[*spatial]``; array and plain tensor are taken to lie on the moving image's own grid), or points
                ``[N, D]`` in the *fixed* world, mm.
            mode: ``"bilinear"`` for images, ``"nearest"`` for labels.
            fill_value: what stands outside of the image; None for its own background.

        Returns:
            Images: ``MetaTensor [C, *fixed spatial]``. Points: where they are in the *moving* world, ``[N, D]``
            float64; ``np.linalg.inv(result.affine)``, or `inverse`, goes the other way.

        Raises:
            RegistrationError: data that is none of these.
        """
        dims = len(self.affine) - 1
        if isinstance(data, (np.ndarray, Tensor)) and data.ndim == 2 and data.shape[1] == dims:
            mapped = map_points(self.pull, torch.as_tensor(data, dtype=torch.float64))
            return mapped.numpy() if isinstance(data, np.ndarray) else mapped
        image = load_image(data, "data")
        if isinstance(data, np.ndarray) or type(data) is Tensor:
            if image.values.shape[1:] != self.moving_image.values.shape[1:]:
                allowed = f"a MetaTensor, or the moving image's shape {tuple(self.moving_image.values.shape[1:])}"
                raise RegistrationError("data", tuple(image.values.shape), allowed)
            image = replace(image, affine=self.moving_image.affine)
        if image.dims != dims:
            raise RegistrationError("data", f"{image.dims}D image", f"a {dims}D image")
        return self.resampled(image, mode, fill_value).to_metatensor()

    def save_transform(self, path: str | os.PathLike, format: str | None = None) -> None:
        """Write the transform for ITK, ANTs or 3D Slicer (``.tfm``, ``.h5``, ``.mat``), or in another format.

        Args:
            path: the file to write.
            format: see `monai_zsreg.io.write_transform`; None to go by the suffix. Transform ``"deformable"`` has
                ITK's displacement field (``.nii.gz``) and composite (``.h5``); see `Deformation.save`.
        """
        if self.deformation is not None:
            if format not in (None, "itk"):
                raise RegistrationError("format", format, "None: deformations are written as fields of ITK")
            self.deformation.save(path)
            return
        write_transform(path, self.affine, self.fixed_image, self.moving_image, format)


def spread_map(covariance: np.ndarray, grid: Grid) -> Tensor:
    """`spread_at` every voxel of a grid in the fixed world, without a table of them: ``[1, *spatial]`` float32."""
    affine = grid.affine.numpy()
    quadratic = affine.T @ row_trace(covariance) @ affine
    axes = [*np.ogrid[tuple(slice(0.0, float(n)) for n in grid.shape)], np.ones([1] * grid.dims)]
    total = np.zeros(grid.shape)
    for (i, one), (j, two) in product(enumerate(axes), repeat=2):
        total += quadratic[i, j] * one * two
    return torch.from_numpy(total).clamp_(min=0).sqrt_().float()[None]
