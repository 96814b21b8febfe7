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
from nibabel.spatialimages import SpatialImage
from torch import Tensor

from monai_zsreg.errors import RegistrationError, require
from monai_zsreg.foreground import all_finite, background_value
from monai_zsreg.geometry import Grid, checked_affine, plane_of_slice, widened
from monai_zsreg.io.dicom import is_dicom, read_dicom_file, read_dicom_folder
from monai_zsreg.io.files import atomic_path, exists, require_nifti_name
from monai_zsreg.io.readers import Stored, from_nibabel, read_itk, read_picture

if TYPE_CHECKING:
    from monai.data import MetaTensor

_SMALLEST_AXIS = 4
_LARGEST_IN_FLOAT32 = 2**24
# characters; what a library says may fill pages
_LONGEST_REASON = 400
# as ITU-R BT.601 weighs red, green and blue, and with it Pillow and most cameras
_LUMINANCE = (0.299, 0.587, 0.114)
# what torch computes with in place of types that it has only by name, or not at all
_WIDER: dict[str, Any] = {
    "uint16": np.int32,
    "uint32": np.int64,
    "uint64": np.int64,
    "bool": np.uint8,
    "float128": float,
}


@dataclass(frozen=True, eq=False)
class Image:
    """An image and where it lies.

    Args:
        values: ``[C, *spatial]``, 2 or 3 spatial dimensions, in the file's own type where torch computes with it.
            Values that are not finite were not seen.
        affine: ``(D+1, D+1)`` float64 on the CPU, index to world (RAS mm).
        meta: plain values, where they are known:

            - ``path``: of the file
            - ``notes``: sentences that a result should repeat, such as an orientation that is not known
            - ``dtype``, ``slope``, ``intercept``: how the file stores the values
            - ``unit``: ``"mm"``, or ``"pixel"`` where nothing states a size
            - ``place``: of a slice in space, index ``(i, j, 0)`` to world, ``(4, 4)`` nested lists
            - ``color``: True where the channels are red, green and blue
            - ``channels``: what tells the channels of a DICOM series apart
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

    @property
    def length_unit(self) -> str:
        """What lengths in the image's world are in, ``"mm"`` or ``"pixels"``."""
        return "pixels" if self.meta.get("unit") == "pixel" else "mm"

    @cached_property
    def seen(self) -> Tensor | None:
        """``[1, *spatial]``, True where a channel is finite; None where that is everywhere."""
        if all_finite(self.values):
            return None
        finite = torch.isfinite(self.values).any(dim=0, keepdim=True)
        return None if bool(finite.all()) else finite

    def channel(self, index: int, name: str = "image") -> Tensor:
        """One channel as float32 ``[1, *spatial]``; what was not seen there gets the background's value.

        Channel 0 of a color image is its luminance.

        Raises:
            RegistrationError: no such channel, or it is constant or nowhere finite.
        """
        count = len(self.values)
        known = isinstance(index, Integral) and not isinstance(index, bool) and -count <= index < count
        require(known, f"{name}_channel", index, f"a channel of {name}, which has {count}")
        if self.meta.get("color") and index == 0 and count == 3:
            weights = torch.tensor(_LUMINANCE, device=self.values.device)
            values = torch.tensordot(weights, self.values.float(), dims=1)[None]
        else:
            values = self.values[int(index)][None].float()
        if not all_finite(values):
            finite = torch.isfinite(values)
            require(bool(finite.any()), name, "nothing but NaN or infinite intensities", "finite intensities")
            values = torch.where(finite, values, background_value(values[0]))
        low, high = map(float, values.aminmax())
        require(low != high, name, f"the constant {low:g}", "an image that is not constant")
        return values

    def to(self, device: torch.device | str) -> Image:
        """The same image with its values on a device."""
        return replace(self, values=self.values.to(device))

    def to_metatensor(self) -> MetaTensor:
        """As MONAI has it: the affine is 4x4 in 2D too, and ``meta`` names the file."""
        from monai.data import MetaTensor

        meta = {"filename_or_obj" if key == "path" else key: value for key, value in self.meta.items()}
        return MetaTensor(self.values, affine=widened(self.affine), meta=meta | {"space": "RAS"})


ImageLike = str | os.PathLike | np.ndarray | Tensor | SpatialImage | Image


def load_image(source: ImageLike, name: str = "image", affine: Any = None) -> Image:
    """Read or wrap an image, and check that it can be registered or moved.

    Args:
        source: a path (a folder is a DICOM series, ``folder#3`` series 3 of several), a channel-first tensor or
            ``MetaTensor`` ``[C, *spatial]``, a numpy array ``[*spatial]``, an image of nibabel, or an `Image`, which is
            given back. A volume with a single slice is an image in 2D.
        name: of the argument, for messages.
        affine: ``(D+1, D+1)`` or ``(4, 4)``, index to world (RAS mm), of an array or a tensor without metadata; the
            identity if None.

    Raises:
        RegistrationError: missing, unreadable, empty, of a type or shape that cannot be registered, or with an affine
            that is singular, not finite, or in LPS.
    """
    plain = isinstance(source, np.ndarray) or type(source) is Tensor
    require(plain or affine is None, "affine", affine, f"none, because {name} has its own")
    if isinstance(source, Image):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _from_file(Path(source), name)
    if isinstance(source, Tensor):
        return _from_tensor(source, affine, name)
    if isinstance(source, SpatialImage):
        return _from_stored(from_nibabel(source), name)
    if not isinstance(source, np.ndarray):
        raise RegistrationError(name, type(source).__name__, "a path, a numpy array, a tensor or an Image")
    allowed = "an array [*spatial] in 2D or 3D; use a tensor [C, *spatial] for channels"
    require(source.ndim in (2, 3), name, source.shape, allowed)
    return _from_stored(Stored(source[None], affine, {"unit": "pixel" if affine is None else "mm"}), name)


def read_image(source: ImageLike, name: str = "image", affine: Any = None) -> MetaTensor:
    """`load_image` as a ``MetaTensor``: see what the package reads.

    Whole numbers come as float32, as MONAI's ``LoadImage`` gives them, unless some are too large for it to hold.
    """
    image = load_image(source, name, affine)
    values = image.values
    if not values.is_floating_point() and max(abs(int(values.min())), abs(int(values.max()))) <= _LARGEST_IN_FLOAT32:
        image = replace(image, values=values.float())
    return image.to_metatensor()


def write_image(path: str | os.PathLike, image: Image, like: Image | None = None, labels: bool = False) -> None:
    """Write a NIfTI file. The file gets its name when it is complete.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``.
        image: what to write.
        like: the image whose type and slope the file gets, rounded and clipped to what these hold; None for
            ``image`` itself. What did not come from a file gets the type of its values.
        labels: the values are whole numbers, for which the file gets an integer type in any case, the smallest that
            holds them unless ``like`` has one.

    Raises:
        RegistrationError: another suffix, or a path that cannot be written to.
    """
    require_nifti_name(path)
    nifti = as_nifti(image, like, labels)
    with atomic_path(path) as partial:
        nib.save(nifti, partial)


def as_nifti(image: Image, like: Image | None = None, labels: bool = False) -> nib.Nifti1Image:
    """What `write_image` writes."""
    meta = (image if like is None else like).meta
    slope, intercept = meta.get("slope", 1.0), meta.get("intercept", 0.0)
    array: Any = image.values.detach().cpu().numpy()
    dtype = _stored_type(image.values, meta, labels)
    if dtype.kind in "iu":
        array = _rounded(array, dtype, slope, intercept)
    array = array.astype(dtype)
    if meta.get("color") and len(array) == 3 and dtype == np.uint8:
        colors = np.empty(array.shape[1:], dtype=[(name, np.uint8) for name in "RGB"])
        colors["R"], colors["G"], colors["B"] = array
        array = colors
    else:
        # channels last, and in 2D behind a third axis, as NIfTI has it
        deep = array if array.ndim == 4 or len(array) == 1 and "place" not in image.meta else array[..., None]
        array = deep[0] if len(array) == 1 else np.moveaxis(deep, 0, -1)
    place = np.array(image.meta.get("place", widened(image.affine).numpy()))
    nifti: Any = nib.Nifti1Image(array, place, dtype=array.dtype)
    nifti.set_sform(place, code="scanner")
    # a quaternion states no shear, and its spacing is kept
    nifti.set_qform(place, code="scanner", strip_shears=True)
    if not np.allclose(nifti.get_qform(), place, atol=1e-3):
        nifti.header["qform_code"] = 0
    nifti.header.set_xyzt_units("mm")
    if dtype.kind in "iu":
        nifti.header.set_slope_inter(slope, intercept)
    return nifti


def _stored_type(values: Tensor, meta: dict[str, Any], labels: bool) -> np.dtype:
    dtype = np.dtype(meta.get("dtype", str(values.dtype).removeprefix("torch.")))
    if labels and dtype.kind not in "iu":
        whole = not values.is_floating_point() or bool((values == values.round()).all())
        low, high = (int(values.min()), int(values.max())) if whole else (0, 0)
        fitting = (t for t in (np.uint8, np.int16, np.int32) if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
        return np.dtype(next(fitting, np.int64) if whole else np.float32)
    if dtype == np.bool_:
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if dtype == np.float16 else dtype  # NIfTI has neither


def _rounded(array: np.ndarray, dtype: np.dtype, slope: float, intercept: float) -> np.ndarray:
    """Values as the whole numbers that a file stores for them; the nearest for those out of range."""
    limits = np.iinfo(dtype)
    if array.dtype.kind in "iu" and (slope, intercept) == (1.0, 0.0):
        return np.clip(array, max(limits.min, np.iinfo(array.dtype).min), min(limits.max, np.iinfo(array.dtype).max))
    stored = np.nan_to_num((array.astype(np.float64) - intercept) / slope, nan=0.0)
    # the largest double that an int64 holds is 1024 below its largest number
    highest = min(limits.max, np.nextafter(float(limits.max), 0) if limits.bits == 64 else limits.max)
    return np.clip(np.rint(stored), limits.min, highest)


# ------------------------------------------------------------------------------------------------- files and arrays


def _from_file(path: Path, name: str) -> Image:
    folder, _, choice = str(path).rpartition("#")
    try:
        if exists(path):
            stored = read_dicom_folder(path, None) if path.is_dir() else _read_file(path)
        elif folder and exists(folder):
            stored = read_dicom_folder(Path(folder), choice)
        else:
            raise RegistrationError(name, str(path), "an existing file")
    except (RegistrationError, MemoryError, ImportError):
        raise
    except Exception as error:  # the libraries raise whatever they raise
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        allowed = f"an image that can be read ({type(error).__name__}: {reason})"
        raise RegistrationError(name, str(path), allowed) from error
    stored.meta["path"] = str(path)
    return _from_stored(stored, name)


def _read_file(path: Path) -> Stored:
    try:
        return from_nibabel(nib.load(path))
    except ImageFileError:
        pass  # not one of nibabel's formats
    if is_dicom(path):
        return read_dicom_file(path)
    stored = read_picture(path) if path.suffix.lower() in (".png", ".jpg", ".jpeg") else None
    return stored or read_itk(path)


def _from_tensor(tensor: Tensor, affine: Any, name: str) -> Image:
    meta: dict[str, Any] = {"unit": "pixel" if affine is None else "mm", "notes": []}
    if hasattr(tensor, "as_tensor"):  # a MetaTensor, and MONAI is imported
        known: Any = tensor.meta  # type: ignore[attr-defined]
        ras = str(known.get("space", "RAS")) != "LPS"
        require(ras, name, "an affine in LPS", "an affine in RAS, as LoadImage gives it")
        # not the type: the values may have been scaled since they were read
        meta |= {"unit": "mm"} | {key: known[key] for key in ("notes", "place", "unit", "color") if key in known}
        if isinstance(known.get("filename_or_obj"), (str, os.PathLike)):
            meta["path"] = str(known["filename_or_obj"])
        tensor, affine = tensor.as_tensor(), tensor.affine  # type: ignore[attr-defined]
    return _checked(tensor, affine, meta, name)


def _from_stored(stored: Stored, name: str) -> Image:
    """An image of what a file holds, in a type that torch computes with."""
    array = stored.channels
    require(array.dtype.kind in "biuf", f"{name}.dtype", str(array.dtype), "real numbers")
    wider = _WIDER.get(array.dtype.name, array.dtype.newbyteorder("="))
    if array.dtype.name == "uint64" and array.size and array.max() > np.iinfo(np.int64).max:
        wider = np.float64
    # in this machine's byte order, and in memory of its own
    values = torch.from_numpy(np.array(array, dtype=wider, order="C"))
    return _checked(values, stored.affine, {"dtype": array.dtype.name, "notes": []} | stored.meta, name)


def _checked(values: Tensor, affine: Any, meta: dict[str, Any], name: str) -> Image:
    """The image, in 2D where it is a single slice."""
    while values.ndim > 4 and values.shape[-1] == 1:  # time and what comes after it, as NIfTI has them
        values = values.squeeze(-1)
    shape = tuple(values.shape)
    require(values.ndim in (3, 4), name, shape, "a channel-first image with 2 or 3 spatial dimensions")
    require(min(shape) > 0, name, shape, "an image with at least one voxel")
    require(not values.is_complex(), f"{name}.dtype", str(values.dtype), "real numbers")
    matrix = checked_affine(affine, values.ndim - 1, name)
    if shape[1:].count(1) == 1 and len(shape) == 4:
        axis = shape[1:].index(1)
        place = matrix[:, [*(a for a in range(3) if a != axis), axis, 3]].numpy()
        values, matrix = values.squeeze(axis + 1), torch.as_tensor(plane_of_slice(place))
        meta = meta | {"place": place.tolist()}
    thick = min(values.shape[1:]) >= _SMALLEST_AXIS
    require(thick, name, shape, f"at least {_SMALLEST_AXIS} voxels along every axis")
    return Image(values, matrix, meta)
