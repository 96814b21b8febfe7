# SPDX-License-Identifier: Apache-2.0
"""From what a user names to an image that can be registered."""

from __future__ import annotations

import os
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.layers import GaussianFilter
from monai.transforms import LoadImage
from monai.utils import MetaKeys, SpaceKeys
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, isotropic_grid, theta_from_index
from monai_zsreg.io.files import exists
from monai_zsreg.networks import AffineResampler
from monai_zsreg.networks.zero_shot import scale_to_unit_range

__all__ = ["ImageLike", "channel", "on_isotropic_grid", "read_image", "working_spacing"]

ImageLike = str | os.PathLike | np.ndarray | Tensor

_SMALLEST_AXIS = 4
# voxels a side below which nothing is left to find
_SMALLEST_CUBE = 8
_NIFTI = (".nii", ".nii.gz")


def read_image(source: ImageLike, name: str = "image") -> MetaTensor:
    """Read or wrap an image, and check that it can be registered or moved.

    Args:
        source: a path (NIfTI, or any format ITK reads; a folder is a DICOM series), a channel-first tensor or
            ``MetaTensor`` ``[C, *spatial]``, or a numpy array without channels ``[*spatial]``. Arrays and plain
            tensors have spacing 1 and no direction. A file with a single slice is an image in 2D.
        name: of the argument, for messages.

    Returns:
        ``[C, *spatial]`` with 2 or 3 spatial dimensions, its affine in RAS mm.

    Raises:
        RegistrationError: missing, unreadable, empty, of a type or shape that cannot be registered, not finite, or
            with an affine that is singular or in LPS.
    """
    if isinstance(source, (str, os.PathLike)):
        image = _read_file(Path(source), name)
    elif isinstance(source, MetaTensor):
        image = source
    elif isinstance(source, Tensor):
        image = MetaTensor(source)
    elif isinstance(source, np.ndarray):
        if source.ndim not in (2, 3):
            raise RegistrationError(
                name, source.shape, "an array [*spatial] in 2D or 3D; use a MetaTensor for channels"
            )
        if source.dtype.kind not in "biuf":
            raise RegistrationError(f"{name}.dtype", str(source.dtype), "real numbers")
        # tensors know neither unsigned 16-bit arithmetic nor foreign byte order
        image = MetaTensor(torch.from_numpy(np.ascontiguousarray(source, dtype=np.float32))[None])
    else:
        raise RegistrationError(name, type(source).__name__, "a path, a numpy array, a tensor or a MetaTensor")
    if image.meta.get(MetaKeys.SPACE, SpaceKeys.RAS) == SpaceKeys.LPS:
        raise RegistrationError(name, "an affine in LPS", "an affine in RAS, as LoadImage gives it")
    if image.is_complex():
        raise RegistrationError(f"{name}.dtype", str(image.dtype), "real numbers")
    if image.ndim in (3, 4) and min(image.shape) == 0:
        raise RegistrationError(name, tuple(image.shape), "an image with at least one voxel")
    grid = Grid.of(image, name)
    if min(grid.shape) < _SMALLEST_AXIS:
        raise RegistrationError(name, tuple(image.shape), f"at least {_SMALLEST_AXIS} voxels along every axis")
    return image


def channel(image: MetaTensor, index: int, name: str) -> Tensor:
    """One channel ``[1, *spatial]`` as float32, checked for what an estimate needs.

    Raises:
        RegistrationError: no such channel, or it is not finite or constant.
    """
    if isinstance(index, bool) or not isinstance(index, int) or not -image.shape[0] <= index < image.shape[0]:
        raise RegistrationError(f"{name}_channel", index, f"a channel of {name}, which has {image.shape[0]}")
    values = image.as_tensor()[index][None].float()
    if not bool(torch.isfinite(values).all()):
        raise RegistrationError(name, "NaN or infinite intensities", "finite intensities")
    if float(values.min()) == float(values.max()):
        raise RegistrationError(name, f"the constant {float(values.min()):g}", "an image that is not constant")
    return values


def working_spacing(fixed: Grid, moving: Grid, wanted: float | None) -> float:
    """Voxel size at which keypoints are looked for, mm.

    In 2D the finer spacing of the two images, but no more than 512 pixels a side; in 3D 2 mm, but no finer than the
    images, and from 48 to 192 voxels a side, so that volumes in other units than mm work too.

    Args:
        fixed: grid of the fixed image.
        moving: grid of the moving image.
        wanted: what the user asked for, or None.

    Raises:
        RegistrationError: ``wanted`` is not a number, or makes a grid of less than 8 or more than 2048 (3D: 512) voxels
            a side.
    """
    extent = float(torch.maximum(fixed.extent, moving.extent).max())
    if wanted is not None:
        most = 2048 if fixed.dims == 2 else 512
        number = isinstance(wanted, Real) and not isinstance(wanted, bool)
        if not number or not extent / most <= wanted <= extent / _SMALLEST_CUBE:
            allowed = f"a voxel size from {extent / most:.3g} to {extent / _SMALLEST_CUBE:.3g} mm for these images"
            raise RegistrationError("spacing", wanted, allowed)
        return float(wanted)
    finest = min(min(fixed.spacing), min(moving.spacing))
    if fixed.dims == 2:
        return max(finest, extent / 512)
    return max(finest, min(max(2.0, extent / 192), extent / 48))


def on_isotropic_grid(values: Tensor, grid: Grid, spacing: float, side: int) -> tuple[Tensor, Grid]:
    """Image on a cube of isotropic voxels along the world axes, around the middle of its own field of view.

    Args:
        values: ``[1, *spatial]``.
        grid: of ``values``.
        spacing: of the cube, mm.
        side: of the cube, voxels.

    Returns:
        ``[1, side, ...]`` scaled to [0, 1] with 0 as background and outside, and the cube's grid.
    """
    scaled = scale_to_unit_range(values[None])[0]
    cube = isotropic_grid(grid, spacing, side)
    # smooth where voxels become larger, or fine structure turns into noise
    sigma = [0.5 * max((spacing / s) ** 2 - 1.0, 0.0) ** 0.5 for s in grid.spacing]
    if max(sigma) > 0.1:
        scaled = GaussianFilter(grid.dims, [max(s, 1e-3) for s in sigma]).to(scaled.device)(scaled[None])[0]
    pull = cube.index_pull(torch.eye(grid.dims + 1, dtype=torch.float64), grid)
    theta = theta_from_index(pull, cube.shape, grid.shape).to(values.device)
    return AffineResampler()(scaled[None], theta[None], list(cube.shape))[0], cube


def _read_file(path: Path, name: str) -> MetaTensor:
    if not exists(path):
        raise RegistrationError(name, str(path), "an existing file")
    nifti = path.name.lower().endswith(_NIFTI)
    reader = "NibabelReader" if nifti else "ITKReader"
    try:
        image: Any = LoadImage(reader=reader, image_only=True, ensure_channel_first=True, dtype=None)(path)
    except Exception as error:  # the readers raise whatever their libraries raise
        raise RegistrationError(
            name, str(path), f"an image that can be read ({type(error).__name__}: {error})"
        ) from error
    if image.dtype == torch.float64 or not image.is_floating_point() and not image.is_complex():
        image = image.float()
    # a volume of one slice is an image; NIfTI has no other way to say 2D with a direction
    if image.ndim == 4 and image.shape[-1] == 1:
        image = image[..., 0]
    return image
