# SPDX-License-Identifier: Apache-2.0
"""Images: from a file or an array to what the package computes with, and back to a file.

The world is RAS mm. A file whose format knows no world (PNG, TIFF) has its pixels as ITK lays them: one unit a pixel,
the axes pointing left and to the back.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid
from monai_zsreg.io.files import atomic_path, exists

if TYPE_CHECKING:
    from monai.data import MetaTensor

__all__ = ["Image", "ImageLike", "load_image", "read_image", "write_image"]

_SMALLEST_AXIS = 4
# mm; squares and cubes of lengths must fit single precision
_FARTHEST = 1e12
# what torch computes with in place of types that it has only by name, or not at all
_WIDER = {"uint16": np.int32, "uint32": np.int64, "bool": np.uint8, "float128": np.float64}


@dataclass(frozen=True, eq=False)
class Image:
    """An image and where it lies.

    Args:
        values: ``[C, *spatial]``, 2 or 3 spatial dimensions, in the file's own type where torch has it. Values that
            are not finite were not seen.
        affine: ``(D+1, D+1)`` float64 on the CPU, index to world (RAS mm).
        meta: plain values. ``path`` of the file; ``notes``, sentences that a result should repeat; ``dtype``, and
            ``slope`` and ``intercept`` where there are such, of the file; ``unit``, ``"mm"`` or ``"pixel"``;
            ``place`` of a slice that was read from a volume, index ``(i, j, 0)`` to world, ``(4, 4)`` nested lists.
    """

    values: Tensor
    affine: Tensor
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def grid(self) -> Grid:
        """The lattice of the voxels."""
        return Grid(tuple(int(n) for n in self.values.shape[1:]), self.affine)

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return self.values.ndim - 1

    @cached_property
    def seen(self) -> Tensor | None:
        """``[1, *spatial]``, True where all channels are finite; None where that is everywhere."""
        if not self.values.is_floating_point():
            return None
        finite = torch.isfinite(self.values).all(dim=0, keepdim=True)
        return None if bool(finite.all()) else finite

    def channel(self, index: int, name: str = "image") -> Tensor:
        """One channel as float32 ``[1, *spatial]``; what was not seen has the smallest value that was.

        Raises:
            RegistrationError: no such channel, or it is constant or nowhere finite.
        """
        count = len(self.values)
        if isinstance(index, bool) or not isinstance(index, Integral) or not -count <= index < count:
            raise RegistrationError(f"{name}_channel", index, f"a channel of {name}, which has {count}")
        values = self.values[int(index)][None].float()
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            if not bool(finite.any()):
                raise RegistrationError(name, "nothing but NaN or infinite intensities", "finite intensities")
            values = torch.where(finite, values, values[finite].min())
        if float(values.min()) == float(values.max()):
            raise RegistrationError(name, f"the constant {float(values.min()):g}", "an image that is not constant")
        return values

    def to(self, device: torch.device | str) -> Image:
        """The same image with its values on a device."""
        return replace(self, values=self.values.to(device))

    def to_metatensor(self) -> MetaTensor:
        """As MONAI has it: the affine is 4x4 in 2D too, and ``meta`` names the file."""
        from monai.data import MetaTensor

        affine = torch.eye(4, dtype=torch.float64)
        affine[: self.dims, : self.dims] = self.affine[: self.dims, : self.dims]
        affine[: self.dims, 3] = self.affine[: self.dims, self.dims]
        meta = {key: value for key, value in self.meta.items() if key != "path"}
        if "path" in self.meta:
            meta["filename_or_obj"] = self.meta["path"]
        return MetaTensor(self.values, affine=affine, meta=meta | {"space": "RAS"})


ImageLike = str | os.PathLike | np.ndarray | Tensor | Image


def load_image(source: ImageLike, name: str = "image", affine: Any = None) -> Image:
    """Read or wrap an image, and check that it can be registered or moved.

    Args:
        source: a path (a folder is a DICOM series), a channel-first tensor or ``MetaTensor`` ``[C, *spatial]``, a
            numpy array ``[*spatial]``, or an `Image`, which is given back. A file with a single slice is an image in
            2D.
        name: of the argument, for messages.
        affine: ``(D+1, D+1)`` or ``(4, 4)``, index to world (RAS mm), of an array or a tensor without metadata; the
            identity if None.

    Raises:
        RegistrationError: missing, unreadable, empty, of a type or shape that cannot be registered, or with an affine
            that is singular, not finite, or in LPS.
    """
    if affine is not None and not isinstance(source, np.ndarray) and type(source) is not Tensor:
        raise RegistrationError("affine", affine, f"none, because {name} has its own")
    if isinstance(source, Image):
        return source
    if isinstance(source, (str, os.PathLike)):
        image = _from_file(Path(source), name)
    elif isinstance(source, Tensor):
        image = _from_tensor(source, name, affine)
    elif isinstance(source, np.ndarray):
        if source.ndim not in (2, 3):
            allowed = "an array [*spatial] in 2D or 3D; use a tensor [C, *spatial] for channels"
            raise RegistrationError(name, source.shape, allowed)
        image = _image(source[None], affine, {"unit": "pixel" if affine is None else "mm"}, name)
    else:
        raise RegistrationError(name, type(source).__name__, "a path, a numpy array, a tensor or an Image")
    if min(image.grid.shape) < _SMALLEST_AXIS:
        raise RegistrationError(name, tuple(image.values.shape), f"at least {_SMALLEST_AXIS} voxels along every axis")
    return image


def read_image(source: ImageLike, name: str = "image", affine: Any = None) -> MetaTensor:
    """`load_image` as a ``MetaTensor``: see what the package reads."""
    return load_image(source, name, affine).to_metatensor()


def write_image(path: str | os.PathLike, image: Image, like: Image | None = None, labels: bool = False) -> None:
    """Write a NIfTI file. The file gets its name when it is complete.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``.
        image: what to write.
        like: the image whose type and slope the file gets, rounded and clipped to what the type holds; ``image``
            itself if None. What has no such file behind it is written as it is.
        labels: the values are whole numbers; written in the smallest integer type that holds them where ``like`` is
            not of an integer type.

    Raises:
        RegistrationError: another suffix, or a folder that cannot be written to.
    """
    if not str(path).lower().endswith((".nii", ".nii.gz")):
        raise RegistrationError("path", str(path), "a name that ends in .nii or .nii.gz")
    array = image.values.detach().cpu().numpy()
    meta = (image if like is None else like).meta
    dtype = np.dtype(meta.get("dtype", array.dtype)).newbyteorder("=")
    if labels and dtype.kind not in "iu":
        dtype = _smallest(array)
    slope, intercept = meta.get("slope", 1.0), meta.get("intercept", 0.0)
    if dtype.kind in "iu" and array.dtype.kind == "f":
        limits = np.iinfo(dtype)
        stored = np.nan_to_num((array.astype(np.float64) - intercept) / slope, nan=0.0)
        array = np.clip(np.rint(stored), limits.min, limits.max)
    # channels last, and in 2D behind a third axis, as NIfTI has it
    array = array[0] if len(array) == 1 else np.moveaxis(array if array.ndim == 4 else array[..., None], 0, -1)
    placed = image.to_metatensor().affine.numpy() if "place" not in image.meta else np.array(image.meta["place"])
    nifti = nib.Nifti1Image(array.astype(dtype), placed, dtype=dtype)
    nifti.set_qform(placed, code="scanner")
    nifti.set_sform(placed, code="scanner")
    nifti.header.set_xyzt_units("mm")
    if dtype.kind in "iu":
        nifti.header.set_slope_inter(slope, intercept)
    with atomic_path(path) as partial:
        nib.save(nifti, partial)


def _smallest(array: np.ndarray) -> np.dtype:
    low, high = array.min(), array.max()
    fits = (d for d in (np.uint8, np.int16, np.int32) if np.iinfo(d).min <= low and high <= np.iinfo(d).max)
    return np.dtype(next(fits, np.int64)) if (array == np.rint(array)).all() else np.dtype(np.float32)


# ----------------------------------------------------------------------------------------------------------- arrays


def _image(array: np.ndarray, affine: Any, meta: dict[str, Any], name: str) -> Image:
    """An image of an array ``[C, *spatial]`` with an affine of any size."""
    if array.dtype.kind not in "biuf":
        raise RegistrationError(f"{name}.dtype", str(array.dtype), "real numbers")
    wider = _WIDER.get(array.dtype.name)
    if array.dtype.name == "uint64":
        wider = np.int64 if array.size and array.max() <= np.iinfo(np.int64).max else np.float64
    # in this machine's byte order, and in memory of its own
    native = np.array(array, dtype=wider or array.dtype.newbyteorder("="), order="C")
    return _checked(torch.from_numpy(native), affine, {"dtype": array.dtype.name, "notes": []} | meta, name)


def _from_tensor(tensor: Tensor, name: str, affine: Any) -> Image:
    meta: dict[str, Any] = {"unit": "pixel" if affine is None else "mm"}
    if hasattr(tensor, "as_tensor"):  # a MetaTensor, and MONAI is imported
        known: Any = tensor.meta  # type: ignore[attr-defined]
        if str(known.get("space", "RAS")) == "LPS":
            raise RegistrationError(name, "an affine in LPS", "an affine in RAS, as LoadImage gives it")
        meta = {key: known[key] for key in ("notes", "dtype", "slope", "intercept", "place") if key in known}
        meta |= {"unit": str(known.get("unit", "mm"))}
        if isinstance(known.get("filename_or_obj"), (str, os.PathLike)):
            meta["path"] = str(known["filename_or_obj"])
        tensor, affine = tensor.as_tensor(), tensor.affine  # type: ignore[attr-defined]
    if tensor.is_complex():
        raise RegistrationError(f"{name}.dtype", str(tensor.dtype), "real numbers")
    return _checked(tensor, affine, {"notes": []} | meta, name)


def _checked(values: Tensor, affine: Any, meta: dict[str, Any], name: str) -> Image:
    dims = values.ndim - 1
    if dims not in (2, 3):
        raise RegistrationError(name, tuple(values.shape), "a channel-first image with 2 or 3 spatial dimensions")
    if min(values.shape) == 0:
        raise RegistrationError(name, tuple(values.shape), "an image with at least one voxel")
    try:
        given = torch.as_tensor(np.eye(dims + 1) if affine is None else affine).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RegistrationError(f"{name}.affine", affine, f"a {dims + 1}x{dims + 1} matrix") from error
    if given.shape not in ((dims + 1, dims + 1), (4, 4)):
        raise RegistrationError(f"{name}.affine", tuple(given.shape), f"a {dims + 1}x{dims + 1} matrix")
    matrix = torch.eye(dims + 1, dtype=torch.float64)
    matrix[:dims, :dims], matrix[:dims, dims] = given[:dims, :dims], given[:dims, -1]
    columns = matrix[:dims, :dims] / matrix[:dims, :dims].norm(dim=0).clamp_min(1e-300)
    if not bool(torch.isfinite(matrix).all()) or abs(float(torch.linalg.det(columns))) < 1e-9:
        raise RegistrationError(f"{name}.affine", matrix.tolist(), "a finite, invertible matrix")
    if float(matrix.abs().max()) > _FARTHEST:
        raise RegistrationError(f"{name}.affine", matrix.tolist(), f"a matrix in mm, no entry beyond {_FARTHEST:g}")
    return Image(values, matrix, meta)


# ------------------------------------------------------------------------------------------------------------ files


def _from_file(path: Path, name: str) -> Image:
    if not exists(path):
        raise RegistrationError(name, str(path), "an existing file")
    try:
        array, affine, meta = _read_itk(path) if path.is_dir() else _read_nibabel(path)
    except ImageFileError:
        try:
            array, affine, meta = _read_itk(path)
        except Exception as error:  # ITK raises whatever its readers raise
            raise _unreadable(path, name, error) from error
    except MemoryError:
        raise
    except Exception as error:  # likewise
        raise _unreadable(path, name, error) from error
    return _image(array, affine, {"path": str(path), "unit": "mm"} | meta, name)


def _unreadable(path: Path, name: str, error: Exception) -> RegistrationError:
    return RegistrationError(name, str(path), f"an image that can be read ({type(error).__name__}: {error})")


def _read_nibabel(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    file: Any = nib.load(path)
    array = np.asanyarray(file.dataobj)
    meta: dict[str, Any] = {"dtype": file.get_data_dtype().name}
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    channels = np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]
    header = file.header
    if "qform_code" in header and int(header["qform_code"]) == 0 and int(header["sform_code"]) == 0:
        meta["notes"] = [f"{path.name} does not state its orientation (qform and sform codes are 0)"]
    return channels, file.affine, meta


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    from monai.transforms import LoadImage

    image: Any = LoadImage(reader="ITKReader", image_only=True, ensure_channel_first=True, dtype=None)(path)
    array = image.as_tensor().numpy()
    return (array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array), image.affine.numpy(), {}
