# SPDX-License-Identifier: Apache-2.0
"""Array transforms: register a moving image, apply a known transform, save a transform."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from monai.config import DtypeLike
from monai.data import FolderLayout, MetaTensor
from monai.transforms import Transform
from monai.utils import GridSampleMode, GridSamplePadMode
from monai.utils.misc import ImageMetaKey

from monai_zsreg.errors import RegistrationError, RegistrationFailure
from monai_zsreg.io.itk_transform import ITK_SUFFIXES, write_itk_transform
from monai_zsreg.registration import RegistrationResult, register
from monai_zsreg.resample import (
    AFFINE_KEY,
    SUCCESS_KEY,
    WARNINGS_KEY,
    ApplyAffineRegistration,
    check_pair,
    evaluate_pending,
)

__all__ = ["ApplyAffineRegistration", "RegisterAffine", "SaveAffine"]


class RegisterAffine(ApplyAffineRegistration):
    """Register a moving image to a fixed one and put it on the fixed grid. Lazy execution and inversion work.

    The transform is estimated from the images as they are after pending operations, which are carried out on a copy
    for that; the moving image itself is still interpolated once.

    Besides the matrix (see `ApplyAffineRegistration`) the result's ``meta`` has ``registration_success`` (bool) and
    ``registration_warnings`` (one string, empty if there were none), so that all of it collates.

    Args:
        preset: name of the method, see `monai_zsreg.register`.
        transform: ``"rigid"``, ``"similarity"`` or ``"affine"``.
        mode: see `ApplyAffineRegistration`.
        padding_mode: see `ApplyAffineRegistration`.
        fill_value: see `ApplyAffineRegistration`.
        device: where to compute the registration, None: chosen by `monai_zsreg.register`.
        vgg19_weights: file with the weights of VGG-19 for the presets that use it.
        seed: of all random draws; the same images, arguments and seed give the same matrix.
        on_failure: ``"raise"`` a `RegistrationFailure` where nothing was found, or ``"warn"``, go on with the
            matrix that there is (the identity) and leave ``meta["registration_success"]`` False.
        dtype: see `ApplyAffineRegistration`.
        lazy: whether to execute lazily by default.
        preset_options: further arguments of `monai_zsreg.register`.
    """

    def __init__(
        self,
        preset: str = "robust",
        transform: str = "affine",
        mode: str | int = GridSampleMode.BILINEAR,
        padding_mode: str = GridSamplePadMode.ZEROS,
        fill_value: float = 0.0,
        device: str | torch.device | None = None,
        vgg19_weights: str | os.PathLike | None = None,
        seed: int = 0,
        on_failure: str = "raise",
        dtype: DtypeLike = np.float64,
        lazy: bool = False,
        **preset_options: Any,
    ) -> None:
        super().__init__(mode=mode, padding_mode=padding_mode, fill_value=fill_value, dtype=dtype, lazy=lazy)
        if on_failure not in ("raise", "warn"):
            raise RegistrationError("on_failure", on_failure, "'raise' or 'warn'")
        self.on_failure = on_failure
        # plain strings, so that a cache that hashes the transform by pickling it gets the same hash in every process
        self.register_options: dict[str, Any] = {
            "preset": preset,
            "transform": transform,
            "device": None if device is None else str(device),
            "vgg19_weights": None if vgg19_weights is None else os.fspath(vgg19_weights),
            "seed": seed,
        } | preset_options

    def __call__(  # type: ignore[override]
        self,
        moving: MetaTensor,
        fixed: MetaTensor,
        mode: str | int | None = None,
        padding_mode: str | None = None,
        fill_value: float | None = None,
        lazy: bool | None = None,
    ) -> MetaTensor:
        """
        Args:
            moving: image to register, ``[C, *spatial]``.
            fixed: image to register it to, ``[C, *spatial]``.
            mode: overrides the constructor's.
            padding_mode: overrides the constructor's.
            fill_value: overrides the constructor's.
            lazy: overrides the constructor's.

        Returns:
            The moving image on the fixed grid, see `ApplyAffineRegistration`.

        Raises:
            RegistrationError: an image that cannot be used.
            RegistrationFailure: no transform that can be trusted was found, and ``on_failure`` is ``"raise"``.
        """
        check_pair(moving, fixed, "moving")
        fixed = evaluate_pending(fixed)
        result = self.estimate(moving, fixed)
        moved = super().__call__(
            moving, result.affine, fixed, mode=mode, padding_mode=padding_mode, fill_value=fill_value, lazy=lazy
        )
        moved.meta[SUCCESS_KEY] = bool(result.success)
        moved.meta[WARNINGS_KEY] = "; ".join(result.warnings)
        return moved

    def estimate(self, moving: MetaTensor, fixed: MetaTensor) -> RegistrationResult:
        """The registration alone: moves nothing. `monai_zsreg.register` has warned of a failure; this may raise too."""
        result = register(evaluate_pending(fixed), evaluate_pending(moving), **self.register_options)
        if not result.success and self.on_failure == "raise":
            name = moving.meta.get(ImageMetaKey.FILENAME_OR_OBJ, "the moving image")
            reasons = "; ".join(result.warnings) or "no reason given"
            raise RegistrationFailure(
                f"registration of {name} failed: {reasons} (on_failure='warn' goes on with the matrix that there is)"
            )
        return result


class SaveAffine(Transform):
    """Write the matrix that an image was registered with as an ITK transform, named after the image's file.

    The name is ``output_dir/[name/]name_postfix.ext``, as MONAI's ``SaveImage`` makes it.

    Args:
        output_dir: folder, made if missing.
        output_postfix: appended to the name.
        output_ext: one of ``.tfm``, ``.txt``, ``.h5``, ``.hdf5``, ``.mat``.
        separate_folder: whether each image gets a folder of its own.
        data_root_dir: the part of the image's path that is left out where the folder structure is kept, see
            ``monai.data.utils.create_file_basename``.

    Raises:
        RegistrationError: an extension that is not ITK's.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike = "./",
        output_postfix: str = "affine",
        output_ext: str = ".tfm",
        separate_folder: bool = True,
        data_root_dir: str | os.PathLike = "",
    ) -> None:
        if output_ext not in ITK_SUFFIXES:
            raise RegistrationError("output_ext", output_ext, "one of " + ", ".join(ITK_SUFFIXES))
        self.folder_layout = FolderLayout(
            output_dir=os.fspath(output_dir),
            postfix=output_postfix,
            extension=output_ext,
            parent=separate_folder,
            makedirs=False,
            data_root_dir=os.fspath(data_root_dir),
        )

    def __call__(self, img: MetaTensor) -> MetaTensor:
        """
        Args:
            img: an image that `RegisterAffine` or `ApplyAffineRegistration` returned, also after further transforms.

        Returns:
            ``img``.

        Raises:
            RegistrationError: ``img`` carries no matrix, or the file cannot be written.
        """
        if not isinstance(img, MetaTensor) or AFFINE_KEY not in img.meta:
            raise RegistrationError(
                "img", type(img).__name__, f"a registered image: a MetaTensor with meta['{AFFINE_KEY}']"
            )
        if img.is_batch:
            raise RegistrationError("img", tuple(img.shape), "one image; use decollate_batch first")
        subject = img.meta.get(ImageMetaKey.FILENAME_OR_OBJ, "subject")
        write_itk_transform(self.folder_layout.filename(subject), img.meta[AFFINE_KEY])
        return img
