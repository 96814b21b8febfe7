# SPDX-License-Identifier: Apache-2.0
"""Affine transforms in the files of other tools, read and written as our pull matrices.

A matrix here is always ours: it maps points of the fixed image to points of the moving image, RAS, mm. What files hold:

=========  ========================  ==================================================================================
format     names                     content
=========  ========================  ==================================================================================
itk        .tfm .txt .h5 .hdf5 .mat  ITK, ANTs (``0GenericAffine.mat``), 3D Slicer: fixed to moving, LPS; 2D and 3D
fsl        .mat                      FLIRT: four rows, **moving** (``-in``) to **fixed** (``-ref``), in scaled voxels
lta        .lta                      FreeSurfer: source to destination, RAS or voxels, with the geometry of both
text       .txt                      the rows of our matrix; 2D and 3D
json       .json                     ``{"matrix", "maps", "unit", "space"}``, and our ``report.json``; 2D and 3D
greedy     .mat                      greedy and Convert3D: the rows of our matrix; 2D and 3D
niftyreg   by ``format=`` only       NiftyReg (``reg_aladin -aff``): the rows of our matrix
mrtrix     by ``format=`` only       MRtrix3 (``mrregister``): the rows of our matrix, the last of them optional
afni       .aff12.1D .1D             ``3dAllineate -1Dmatrix_save``: twelve numbers, base to source, LPS, as if no
                                     image were oblique
minc       .xfm                      MINC, and FreeSurfer's ``talairach.xfm``: **moving to fixed**, RAS
elastix    .txt                      ``TransformParameters.0.txt``, with the transforms it starts from; 2D and 3D
x5         .x5 .h5                   NiTransforms: the rows of our matrix
=========  ========================  ==================================================================================

A name that several formats share is decided by the content, and where that may be either by ``format=``. Formats that
depend on where images lie ask for these. To add a format, write a file with its functions and enter it in `FORMATS`;
which way a file maps, and between which coordinates, stands there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import checked_matrix
from monai_zsreg.io.files import atomic_path, exists
from monai_zsreg.io.transforms import afni, elastix, fsl, itk, json_file, lta, minc, text, x5
from monai_zsreg.io.transforms.images import GridLike, Images


class Format(NamedTuple):
    """How the files of one tool are known, read and written.

    Args:
        suffixes: what its names end in, lower case; the first format in the table with a suffix writes it.
        sniff: whether a file with this content can be of the format.
        read: path and images to the matrix ``(D+1, D+1)`` that the file states.
        write: path, that matrix and images; the path has the suffix of the final name.
        dims: numbers of dimensions that it can state.
        world: images, ``"fixed"`` or ``"moving"``, and D to the matrix from RAS mm to the coordinates of that image in
            the file; None where these are RAS mm.
        to_fixed: whether the file maps points of the moving image to points of the fixed one.
    """

    suffixes: tuple[str, ...]
    sniff: Callable[[bytes], bool]
    read: Callable[[Path, Images], np.ndarray]
    write: Callable[[Path, np.ndarray, Images], None]
    dims: tuple[int, ...] = (2, 3)
    world: Callable[[Images, str, int], np.ndarray] | None = None
    to_fixed: bool = False

    def from_file(self, path: Path, images: Images) -> np.ndarray:
        """Our matrix, whatever the file states."""
        matrix = self.read(path, images)
        matrix = np.linalg.inv(matrix) if self.to_fixed else matrix
        if self.world is None:
            return matrix
        fixed, moving = (self.world(images, name, len(matrix) - 1) for name in ("fixed", "moving"))
        with np.errstate(invalid="ignore"):  # what is not finite is refused later
            return np.linalg.inv(moving) @ matrix @ fixed

    def to_file(self, path: Path, matrix: np.ndarray, images: Images) -> None:
        """The inverse of `from_file`."""
        if self.world is not None:
            fixed, moving = (self.world(images, name, len(matrix) - 1) for name in ("fixed", "moving"))
            matrix = moving @ matrix @ np.linalg.inv(fixed)
        self.write(path, np.linalg.inv(matrix) if self.to_fixed else matrix, images)


FORMATS = {
    "itk": Format((".tfm", ".txt", ".h5", ".hdf5", ".mat"), itk.sniff, itk.read, itk.write, world=itk.world),
    "fsl": Format((".mat",), fsl.sniff, fsl.read, fsl.write, (3,), fsl.world, to_fixed=True),
    "lta": Format((".lta",), lta.sniff, lta.read, lta.write, (3,), to_fixed=True),
    "text": Format((".txt",), text.sniff, text.read, text.write),
    "json": Format((".json",), json_file.sniff, json_file.read, json_file.write),
    "greedy": Format((".mat",), text.sniff_greedy, text.read, text.write),
    "niftyreg": Format((), text.sniff, text.read, text.write, (3,)),
    "mrtrix": Format((), text.sniff, text.read_mrtrix, text.write, (3,)),
    "afni": Format((".aff12.1d", ".1d"), text.sniff, afni.read, afni.write, (3,), afni.world),
    "minc": Format((".xfm",), minc.sniff, minc.read, minc.write, (3,), to_fixed=True),
    "elastix": Format((".txt",), elastix.sniff, elastix.read, elastix.write, world=itk.world),
    "x5": Format((".x5", ".h5"), x5.sniff, x5.read, x5.write, (3,)),
}
TRANSFORM_FORMATS = tuple(FORMATS)


def read_transform(
    path: str | os.PathLike,
    fixed: GridLike | None = None,
    moving: GridLike | None = None,
    format: str | None = None,
) -> np.ndarray:
    """Read an affine transform from a file of another tool.

    Args:
        path: the file.
        fixed: the fixed image; needed for FSL, for an LTA in voxels without valid geometry, and for AFNI where it is
            oblique. An image without a file is taken to have the voxel sizes of its affine; FSL goes by those in a
            file's header.
        moving: the moving image, likewise.
        format: one of `TRANSFORM_FORMATS`. None: by name and content.

    Returns:
        ``(D+1, D+1)`` float64, fixed world to moving world, RAS mm.

    Raises:
        RegistrationError: the file is missing, unreadable, of an unknown format, of one of several formats, or holds
            no invertible affine transform, or an image that its format needs is missing or cannot be used.
    """
    file = _path(path, format)
    if not exists(file) or not file.is_file():
        raise RegistrationError("path", str(path), "a file that exists")
    try:
        chosen = format or _format_by_content(file, file.read_bytes())
        matrix = FORMATS[chosen].from_file(file, Images({"fixed": fixed, "moving": moving}, chosen))
    except (RegistrationError, ImportError):
        raise
    except OSError as error:
        raise RegistrationError("path", str(path), f"a file that can be read ({error})") from error
    except (ValueError, TypeError, KeyError, IndexError, struct.error, np.linalg.LinAlgError) as error:
        allowed = f"a transform file of format {chosen!r} ({error})"
        raise RegistrationError("path", str(path), allowed) from error
    try:
        return checked_matrix(matrix, 2 if len(matrix) == 3 else 3, "path").numpy()
    except RegistrationError as error:
        raise RegistrationError("path", str(path), f"{error.allowed} in it") from error


def write_transform(
    path: str | os.PathLike,
    matrix: np.ndarray | Tensor | Sequence[Sequence[float]],
    fixed: GridLike | None = None,
    moving: GridLike | None = None,
    format: str | None = None,
) -> None:
    """Write a pull matrix for another tool. The file gets its name when it is complete.

    Args:
        path: the file.
        matrix: ``(D+1, D+1)``, fixed world to moving world, RAS mm, D = 2 or 3.
        fixed: the fixed image; needed for FSL, LTA and elastix, and for AFNI where it is oblique. ITK's files state
            its center as the center of rotation, which changes where no point goes.
        moving: the moving image, needed for FSL and LTA, and for AFNI where it is oblique.
        format: one of `FORMATS`; None: by the name, which makes ``.mat`` and ``.txt`` ITK's.

    Raises:
        RegistrationError: a matrix, image, name or format that cannot be used, or a folder that cannot be written to.
    """
    file = _path(path, format)
    dims = 2 if hasattr(matrix, "__len__") and len(matrix) == 3 else 3
    checked = checked_matrix(matrix, dims, "matrix").numpy()
    chosen = format or _formats_by_name(file)[0]
    if dims not in FORMATS[chosen].dims:
        raise RegistrationError("matrix", checked.shape, f"a 4x4 matrix: format {chosen!r} is 3D only")
    with atomic_path(file) as partial:
        FORMATS[chosen].to_file(partial, checked, Images({"fixed": fixed, "moving": moving}, chosen))


def _path(path: Any, format: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise RegistrationError("path", path, "the path of a file")
    if format is not None and format not in FORMATS:
        raise RegistrationError("format", format, "one of " + ", ".join(FORMATS))
    return Path(path)


def _formats_by_name(path: Path) -> list[str]:
    found = [name for name, known in FORMATS.items() if path.name.lower().endswith(known.suffixes or ("\0",))]
    if not found:
        suffixes = dict.fromkeys(suffix for known in FORMATS.values() for suffix in known.suffixes)
        allowed = f"a name that ends in one of {', '.join(suffixes)}, or format= one of {', '.join(FORMATS)}"
        raise RegistrationError("path", str(path), allowed)
    return found


def _format_by_content(path: Path, content: bytes) -> str:
    named = _formats_by_name(path)
    found = [name for name in named if FORMATS[name].sniff(content)]
    if len(found) == 1 or len(named) == 1:
        return (found or named)[0]
    if not found:
        raise RegistrationError("path", str(path), f"the content of a file of format {' or '.join(named)}")
    raise RegistrationError("path", str(path), f"format= one of {', '.join(found)}: the content can be of either")
