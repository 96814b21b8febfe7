# SPDX-License-Identifier: Apache-2.0
"""Putting a moving image on the fixed image's grid with a known transform: the only place where images are moved.

An image is put on the fixed grid in two steps: its header moves by the inverse of the pull matrix T
(``affine = inv(T) @ affine``), then MONAI's `ResampleToMatch` resamples it. The header edit acts on the world side of
the affine and pending (lazy) operations act on its index side, so the two commute: the edit is made at once, the
resampling joins whatever is pending. Both are one entry in the trace, which holds the native header; ``inverse``
resamples back and puts that header back as it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.config import DtypeLike
from monai.data import MetaTensor, get_track_meta
from monai.transforms import ResampleToMatch, SpatialResample
from monai.transforms.lazy.functional import apply_pending
from monai.utils import (
    GridSampleMode,
    GridSamplePadMode,
    LazyAttr,
    MetaKeys,
    SpaceKeys,
    SplineMode,
    TraceKeys,
    get_torch_dtype_from_string,
)
from monai.utils.misc import ImageMetaKey
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, moved_header
from monai_zsreg.io.transform_files import read_transform

__all__ = [
    "AFFINE_KEY",
    "SUCCESS_KEY",
    "WARNINGS_KEY",
    "ApplyAffineRegistration",
    "by_header",
    "check_pair",
    "evaluate_pending",
    "read_matrix",
]

#: what a registered image carries in its ``meta``
AFFINE_KEY = "registration_affine"
SUCCESS_KEY = "registration_success"
WARNINGS_KEY = "registration_warnings"

_NATIVE_META = "native_meta"

# MONAI's resampling returns float32, which holds every whole number up to here
_LARGEST_LABEL = 2**24


class ApplyAffineRegistration(ResampleToMatch):
    """Put a moving image on the fixed image's grid with a known transform. Lazy execution and inversion work.

    The result has the fixed image's affine and other metadata, the moving image's file name, and the matrix as
    ``meta["registration_affine"]`` (float64 tensor, ``(D+1, D+1)``).

    ``inverse`` puts voxels that live on the fixed grid (the image, or through ``Invertd`` a segmentation predicted
    there) back on the native grid of the moving image, with its metadata as it was; voxels from outside the fixed
    grid become 0.

    Lazy execution: MONAI carries out all pending operations with the interpolation and padding that the last of them
    states. This transform does, MONAI's own (1.6.1) do not and then get bilinear and border. So where a lazy transform
    follows, such as ``RandAffined``, tell ``Compose``:
    ``overrides={"label": {"mode": "nearest", "padding_mode": "zeros"}, "image": {"padding_mode": "zeros"}}``.

    Args:
        mode: ``"bilinear"``, ``"nearest"`` (labels), ``"bicubic"`` (2D only) or a spline order 0 to 5 (needs SciPy).
        padding_mode: ``"zeros"``, ``"border"`` or ``"reflection"``: what lies outside the moving image.
        fill_value: value outside the moving image with padding mode ``"zeros"``, such as -1024 for CT. Other values
            than 0 are applied eagerly, after pending operations, even when execution is lazy: MONAI's lazy
            resampling knows no fill value.
        dtype: floating point type to resample in.
        lazy: whether to execute lazily by default.

    Raises:
        RegistrationError: a wrong argument.
    """

    def __init__(
        self,
        mode: str | int = GridSampleMode.BILINEAR,
        padding_mode: str = GridSamplePadMode.ZEROS,
        fill_value: float = 0.0,
        dtype: DtypeLike = np.float64,
        lazy: bool = False,
    ) -> None:
        super().__init__(
            mode=_check_mode(mode),
            padding_mode=_check_padding_mode(padding_mode),
            align_corners=False,
            dtype=dtype,
            lazy=lazy,
        )
        self.fill_value = float(fill_value)

    def __call__(  # type: ignore[override]
        self,
        img: MetaTensor,
        affine: Tensor | np.ndarray | Sequence[Sequence[float]] | str | os.PathLike,
        fixed: MetaTensor,
        mode: str | int | None = None,
        padding_mode: str | None = None,
        fill_value: float | None = None,
        lazy: bool | None = None,
    ) -> MetaTensor:
        """
        Args:
            img: moving image or labels, ``[C, *spatial]``, all channels are moved.
            affine: ``(D+1, D+1)``, fixed world to moving world, RAS mm, or the path of a transform file of any format
                of `monai_zsreg.io.read_transform`.
            fixed: image on the grid to move to, ``[C, *spatial]``; its voxels do not matter.
            mode: overrides the constructor's.
            padding_mode: overrides the constructor's.
            fill_value: overrides the constructor's.
            lazy: overrides the constructor's.

        Returns:
            ``[C, *fixed spatial]``, float32. Mode ``"nearest"`` gives whole-number types back as they came, unless
            execution is lazy: then the last resampling decides, and MONAI makes it float32.

        Raises:
            RegistrationError: an image without metadata, of the wrong shape or not in RAS; images of unequal
                dimension; a matrix of the wrong shape or that cannot be inverted.
        """
        dims = check_pair(img, fixed, "img")
        matrix = read_matrix(affine, dims, fixed=fixed, moving=img)
        mode = self.mode if mode is None else _check_mode(mode)
        padding_mode = self.padding_mode if padding_mode is None else _check_padding_mode(padding_mode)
        fill = (self.fill_value if fill_value is None else float(fill_value)) if padding_mode == "zeros" else 0.0
        nearest = mode in (GridSampleMode.NEAREST, 0)
        if nearest:
            _check_labels(img)
        # with tracing off MONAI drops pending operations, so only the eager way is right
        lazy_ = bool(self.lazy if lazy is None else lazy) and fill == 0.0 and self.tracing

        source = img if lazy_ else evaluate_pending(img)
        # deep, here and in _copy: MONAI writes pixdim in place, which goes through shallow copies
        native = deepcopy(source.meta)
        native[MetaKeys.AFFINE] = source.peek_pending_affine()
        edited = _copy(source)
        edited.affine = moved_header(source.affine, matrix)
        if fill:
            edited = _shifted(edited, -fill)
        moved: Any = super().__call__(edited, fixed, mode=mode, padding_mode=padding_mode, lazy=lazy_)
        if fill:
            moved = _shifted(moved, fill)
        if nearest and not lazy_ and not img.is_floating_point():
            moved = moved.to(img.dtype)

        if self.tracing:
            trace = moved.pending_operations if lazy_ else moved.applied_operations
            # as pairs: MONAI rewrites keys such as "id" in every dictionary that it finds in the trace
            trace[-1][TraceKeys.EXTRA_INFO][_NATIVE_META] = list(native.items())
            if lazy_:
                # MONAI's own transforms do not state these, and what nobody states becomes bilinear and border
                trace[-1][LazyAttr.INTERP_MODE], trace[-1][LazyAttr.PADDING_MODE] = mode, padding_mode
        moved.meta = _moved_meta(moved, native, fixed, matrix)
        return moved

    def check_transforms_match(self, transform: Mapping) -> None:
        # a worker that was spawned has a copy with another id; MONAI knows that only where all processes spawn
        if transform.get(TraceKeys.CLASS_NAME) != type(self).__name__:
            super().check_transforms_match(transform)

    def inverse(self, data: Tensor) -> MetaTensor:
        """Voxels on the fixed grid back to the moving image's native grid and header.

        Args:
            data: ``[C, *fixed spatial]`` with the trace of this transform as the last entry of its kind.

        Returns:
            ``[C, *native spatial]``; the type of ``data`` where mode is ``"nearest"`` and it is a whole-number type,
            else float32.

        Raises:
            RegistrationError: ``data`` has lost its metadata.
        """
        if not isinstance(data, MetaTensor):
            raise RegistrationError("data", type(data).__name__, "a MetaTensor with its trace: keep track_meta=True")
        transform = self.pop_transform(data)
        extra = transform[TraceKeys.EXTRA_INFO]
        with self.trace_transform(False):
            # not self.__call__, which moves the header; not super().inverse, which is lazy where this object is
            native: Any = SpatialResample.__call__(
                self,
                data,
                dst_affine=extra["src_affine"],
                spatial_size=transform[TraceKeys.ORIG_SIZE],
                mode=extra["mode"],
                padding_mode=extra["padding_mode"],
                align_corners=False,
                dtype=get_torch_dtype_from_string(extra["dtype"]),  # type: ignore[arg-type]
                lazy=False,
            )
        if extra["mode"] in (GridSampleMode.NEAREST, 0) and not data.is_floating_point():
            native = native.to(data.dtype)
        native.meta = deepcopy(dict(extra[_NATIVE_META]))
        return native


def evaluate_pending(image: MetaTensor) -> MetaTensor:
    """``image`` with its pending (lazy) operations carried out; ``image`` itself stays as it is."""
    if not image.has_pending_operations:
        return image
    copy = _copy(image)
    copy.clear_pending_operations()
    return apply_pending(copy, pending=list(image.pending_operations))[0]


def by_header(image: MetaTensor, fixed: MetaTensor, mode: str = "bilinear") -> MetaTensor:
    """An image ``[C, *spatial]`` on the grid of ``fixed`` where the two headers put it, 0 outside, without a trace."""
    transform = ApplyAffineRegistration(mode=mode, padding_mode="zeros")
    transform.tracing = False
    return transform(image, np.eye(fixed.ndim), fixed)


def read_matrix(
    affine: Any, dims: int, name: str = "affine", fixed: MetaTensor | None = None, moving: MetaTensor | None = None
) -> Tensor:
    """A pull matrix from what a user gave.

    Args:
        affine: matrix ``(D+1, D+1)`` in any array type, or the path of a file that `read_transform` knows.
        dims: D.
        name: of the argument, for the message.
        fixed: the fixed image, for files that need it.
        moving: the moving image, likewise.

    Returns:
        ``(D+1, D+1)`` float64 on the CPU.

    Raises:
        RegistrationError: it is not a finite, invertible affine matrix of this size.
    """
    if isinstance(affine, (str, os.PathLike)):
        affine = read_transform(affine, fixed, moving)
    try:
        matrix = torch.as_tensor(affine).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RegistrationError(name, affine, f"a {dims + 1}x{dims + 1} matrix or a transform file") from error
    matrix = matrix.as_tensor() if isinstance(matrix, MetaTensor) else matrix
    if matrix.shape != (dims + 1, dims + 1):
        raise RegistrationError(name, tuple(matrix.shape), f"a {dims + 1}x{dims + 1} matrix for {dims}D images")
    last_row = torch.eye(dims + 1, dtype=torch.float64)[dims]
    usable = bool(torch.isfinite(matrix).all()) and torch.allclose(matrix[dims], last_row)
    if not usable or float(torch.linalg.det(matrix)) == 0.0:
        raise RegistrationError(name, matrix.tolist(), f"a finite, invertible matrix with last row {last_row.tolist()}")
    return matrix


def _copy(image: MetaTensor) -> MetaTensor:
    """The same voxels with a header and lists of operations of their own."""
    copy = MetaTensor(image.as_tensor(), meta=deepcopy(image.meta), applied_operations=list(image.applied_operations))
    for operation in image.pending_operations:
        copy.push_pending_operation(operation)
    return copy


def _shifted(image: MetaTensor, by: float) -> Any:
    return image.to(torch.promote_types(image.dtype, torch.float32)) + by


def _moved_meta(moved: MetaTensor, native: dict, fixed: MetaTensor, matrix: Tensor) -> dict:
    # eager and lazy alike: everything that describes the grid comes from the fixed image, the name from the moving
    meta = {k: v for k, v in deepcopy(fixed.meta).items() if k not in (AFFINE_KEY, SUCCESS_KEY, WARNINGS_KEY)}
    meta.pop(ImageMetaKey.FILENAME_OR_OBJ, None)
    if ImageMetaKey.FILENAME_OR_OBJ in native:
        meta[ImageMetaKey.FILENAME_OR_OBJ] = native[ImageMetaKey.FILENAME_OR_OBJ]
    meta[MetaKeys.AFFINE] = moved.affine.clone()  # MONAI hands out the fixed image's own tensor
    meta[AFFINE_KEY] = matrix.clone()
    return meta


def check_pair(moving: Any, fixed: Any, moving_name: str) -> int:
    """Number of spatial dimensions of a moving and a fixed image, if they can be a pair.

    Args:
        moving: what should be a ``MetaTensor [C, *spatial]`` in RAS.
        fixed: likewise.
        moving_name: of the moving image's argument, for the message.

    Raises:
        RegistrationError: they cannot.
    """
    dims = []
    for name, image in ((moving_name, moving), ("fixed", fixed)):
        if not isinstance(image, MetaTensor) or not get_track_meta():
            raise RegistrationError(
                name,
                type(image).__name__,
                "a MetaTensor, because registration needs the affine: keep metadata on "
                "(monai.data.set_track_meta(True), EnsureType and caching data sets with track_meta=True)",
            )
        if image.is_batch or image.affine.ndim != 2:
            raise RegistrationError(name, tuple(image.shape), "one image [C, *spatial]; use decollate_batch first")
        if image.meta.get(MetaKeys.SPACE, SpaceKeys.RAS) == SpaceKeys.LPS:
            raise RegistrationError(
                name,
                "an affine in LPS",
                "an affine in RAS, as LoadImage gives unless ITKReader has affine_lps_to_ras=False",
            )
        dims.append(Grid.of(image, name).dims)
    if dims[0] != dims[1]:
        raise RegistrationError(
            moving_name,
            f"{dims[0]}D image of shape {tuple(moving.shape)}",
            f"{dims[1]} spatial dimensions, as fixed has",
        )
    return dims[0]


def _check_labels(img: Tensor) -> None:
    if img.dtype in (torch.int32, torch.int64) and img.numel() > 0:
        largest = max(abs(int(img.min())), abs(int(img.max())))
        if largest > _LARGEST_LABEL:
            raise RegistrationError("img", largest, f"label values up to {_LARGEST_LABEL}, which float32 holds exactly")


def _check_mode(mode: str | int) -> str | int:
    allowed = [m.value for m in GridSampleMode] + [int(m.value) for m in SplineMode]
    if isinstance(mode, bool) or mode not in allowed:
        raise RegistrationError("mode", mode, "one of " + ", ".join(repr(m) for m in allowed))
    return mode if isinstance(mode, int) else str(GridSampleMode(mode).value)


def _check_padding_mode(padding_mode: str) -> str:
    allowed = [m.value for m in GridSamplePadMode]
    if padding_mode not in allowed:
        raise RegistrationError("padding_mode", padding_mode, "one of " + ", ".join(repr(m) for m in allowed))
    return str(GridSamplePadMode(padding_mode).value)
