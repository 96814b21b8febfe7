# SPDX-License-Identifier: Apache-2.0
"""Image files to arrays: nibabel for its formats, Pillow for PNG and JPEG, ITK for all others.

Every reader gives a `Stored` image. ITK takes seconds to import, so it is the last resort of `monai_zsreg.io.images`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.analyze import AnalyzeImage
from nibabel.nifti1 import Nifti1Pair
from nibabel.spatialimages import SpatialImage

from monai_zsreg.geometry import world_from_itk


@dataclass
class Stored:
    """What a file holds.

    Args:
        channels: ``[C, *spatial]`` as in the file, slope and intercept applied.
        affine: index to world, RAS mm, ``(D+1, D+1)`` or ``(4, 4)``.
        meta: see `monai_zsreg.io.images.Image`.
    """

    channels: np.ndarray
    affine: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)


def from_nibabel(file: Any) -> Stored:
    """An image of nibabel, from whatever file."""
    if not isinstance(file, SpatialImage) or file.affine is None:
        raise ValueError(f"{type(file).__name__} holds no image on a grid")
    stored_type = file.get_data_dtype().newbyteorder("=")
    meta: dict[str, Any] = {"dtype": stored_type.name, "unit": "mm", "notes": _doubts(file)}
    array = np.asanyarray(file.dataobj)
    array = array.reshape(*array.shape, *(1,) * (3 - array.ndim))
    if stored_type.names:  # NIfTI's RGB and RGBA
        array = np.stack([array[name] for name in "RGB"], axis=-1)
        meta |= {"dtype": array.dtype.name, "color": True}
    elif array.dtype.newbyteorder("=") != stored_type:
        slope, intercept = (getattr(file.dataobj, name, None) for name in ("slope", "inter"))
        if isinstance(slope, Real) and isinstance(intercept, Real):
            meta |= {"slope": float(slope), "intercept": float(intercept)}
        # nibabel scales in double precision, of which 16 stored bits need no more than single
        array = array.astype(np.float32) if stored_type.itemsize <= 2 else array
    further = [n for n in array.shape[3:] if n > 1]
    if len(further) > 1:
        raise ValueError(f"an image of shape {array.shape}: more than one axis beyond the third")
    array = array.reshape(*array.shape[:3], -1)
    return Stored(np.moveaxis(array, -1, 0), file.affine, meta)


def _doubts(file: Any) -> list[str]:
    """What the header leaves open or contradicts."""
    name, header = Path(str(file.get_filename() or "the image")).name, file.header
    if isinstance(file, Nifti1Pair):
        codes = int(header["qform_code"]), int(header["sform_code"])
        unit = header.get_xyzt_units()[0]
        notes = [f"{name} does not state its orientation (its qform and sform codes are 0)"] if codes == (0, 0) else []
        return notes + ([f"{name} states its sizes in {unit}s, read as mm"] if unit in ("meter", "micron") else [])
    unknown = isinstance(file, AnalyzeImage) or isinstance(file, nib.MGHImage) and not header["goodRASFlag"]
    return [f"{name} does not state its orientation"] if unknown else []


def read_picture(path: Path) -> Stored | None:
    """PNG or JPEG; None for what Pillow reads with fewer bits than it has."""
    from PIL import Image

    head = path.read_bytes()[:26]
    if head[:4] == b"\x89PNG" and head[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):
        return None  # 16 bits a channel and several channels
    with Image.open(path) as picture:
        density, unit = picture.info.get("jfif_density", (1, 1)), picture.info.get("jfif_unit", 0)
        plain = {"P": "RGB", "PA": "RGB", "RGBA": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LA": "L"}
        array = np.asarray(picture.convert(plain[picture.mode]) if picture.mode in plain else picture)
    # dots an inch or a centimeter
    spacing = [{1: 25.4, 2: 10.0}[unit] / dots for dots in density] if unit and all(density) else [1.0, 1.0]
    # ITK's pixel world, as its own reader has it
    affine = world_from_itk(np.array(spacing), np.zeros(2), np.eye(2))
    return _colored(array.T if array.ndim == 3 else array.T[None], affine)


def read_itk(path: Path) -> Stored:
    """Whatever ITK reads.

    Raises:
        ValueError: ITK does not read it.
    """
    import itk

    try:
        try:
            image, stored_type = itk.imread(str(path)), None
        except (TypeError, KeyError):  # ITK's Python knows not every type of pixel
            image, stored_type = _read_as_doubles(itk, str(path))
    except RuntimeError as error:
        if "Could not create IO object" in str(error):
            raise ValueError("its format is not known, or the file is damaged") from error
        # without the places in ITK's sources
        reason = re.sub(r"\S*/(ITK|GDCM)\S*|\S*\.(cxx|h|hxx):\d+\S*|\w+\(0x\w+\):|ITK ERROR:?|\(\):", "", str(error))
        raise ValueError(f"ITK does not read it: {reason.strip()}") from error
    dims = int(image.GetImageDimension())
    # from [z, y, x, components] to [components, x, y, z]
    array = itk.array_from_image(image).T
    array = (array[None] if array.ndim == dims else array).astype(stored_type or array.dtype)
    if dims == 4:
        array = np.moveaxis(array, -1, 1).reshape(-1, *array.shape[1:4])
    solid = min(dims, 3)
    direction = itk.array_from_matrix(image.GetDirection())[:solid, :solid]
    affine = world_from_itk(np.array(image.GetSpacing())[:solid], np.array(image.GetOrigin())[:solid], direction)
    return _colored(array, affine)


def _read_as_doubles(itk: Any, path: str) -> tuple[Any, np.dtype]:
    """An image of any type in double precision, and the type that its file has."""
    io = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
    io.SetFileName(path)
    io.ReadImageInformation()
    kind = itk.Image if int(io.GetNumberOfComponents()) == 1 else itk.VectorImage
    reader = itk.ImageFileReader[kind[itk.D, int(io.GetNumberOfDimensions())]].New(FileName=path)
    reader.Update()
    name = io.GetComponentTypeAsString(io.GetComponentType())
    codes = {"char": "b", "short": "h", "int": "i", "long": "l", "long_long": "q", "float": "f", "double": "d"}
    code = codes[name.removeprefix("unsigned_")]
    return reader.GetOutput(), np.dtype(code.upper() if name.startswith("unsigned_") else code)


def _colored(channels: np.ndarray, affine: np.ndarray) -> Stored:
    # a picture without a resolution is the identity, but for the sign of the axes
    unit = "pixel" if len(affine) == 3 and np.allclose(np.abs(affine), np.eye(3)) else "mm"
    meta = {"dtype": channels.dtype.name, "unit": unit}
    if len(channels) in (3, 4) and channels.dtype.kind == "u":
        return Stored(channels[:3], affine, meta | {"color": True})
    return Stored(channels, affine, meta)
