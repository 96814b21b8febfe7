# SPDX-License-Identifier: Apache-2.0
"""Affine transforms in the files of other tools, read and written as our pull matrices.

A matrix here is always ours: it maps points of the fixed image to points of the moving image, RAS, mm. What files hold:

=======  ==========================  ===================================================================================
format   names                       content
=======  ==========================  ===================================================================================
itk      .tfm .txt .h5 .hdf5 .mat    ITK, ANTs (``0GenericAffine.mat``), 3D Slicer: fixed to moving, LPS; 2D and 3D
fsl      .mat and any other          FLIRT: four rows of text, **moving** (``-in``) to **fixed** (``-ref``), in scaled
                                     voxels, so both images are needed
lta      .lta                        FreeSurfer: source to destination, RAS or voxels, with the geometry of both volumes
text     .txt and any other          the rows of our matrix as text, as MRtrix has them too; 2D and 3D
json     .json                       ``{"matrix", "maps", "unit", "space"}``, and the ``report.json`` of the bundle;
                                     2D and 3D
=======  ==========================  ===================================================================================

FSL and FreeSurfer need the direction of three axes, which an image in 2D does not have, so these formats are 3D only.

A source volume in an LTA is the moving image and the destination the fixed one. Where ``fixed`` and ``moving`` are
given and the file's geometry says that it is the other way about, the file is read that way.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import MetaKeys, SpaceKeys
from monai.utils.misc import ImageMetaKey
from nibabel.spatialimages import SpatialImage
from torch import Tensor

from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import (
    Grid,
    freesurfer_grid,
    freesurfer_volume,
    fsl_from_world,
    world_from_fsl,
    world_from_index,
)
from monai_zsreg.io.files import atomic_path, exists, write_json
from monai_zsreg.io.images import Image, load_image
from monai_zsreg.io.itk_transform import ITK_SUFFIXES, read_itk_transform, write_itk_transform

__all__ = ["TRANSFORM_FORMATS", "read_transform", "write_transform"]

TRANSFORM_FORMATS = ("itk", "fsl", "lta", "text", "json")

#: what tells where an image lies: a file, an image of nibabel or MONAI, or its grid
GridLike = str | os.PathLike | SpatialImage | MetaTensor | Grid

_MAPS = "points of the fixed image to points of the moving image"
_INSIGHT = b"#Insight Transform File"
_VOXELS, _RAS = 0, 1
_LTA_TYPES = "type 0 (LINEAR_VOX_TO_VOX) or 1 (LINEAR_RAS_TO_RAS)"
# geometry in an LTA has four decimals in older files, which leaves hundredths of a millimeter at a far corner
_SAME_VOLUME = 0.1


class _Volume(NamedTuple):
    grid: Grid
    spacing: tuple[float, ...]
    name: str


def read_transform(
    path: str | os.PathLike,
    fixed: GridLike | None = None,
    moving: GridLike | None = None,
    format: str | None = None,
) -> np.ndarray:
    """Read an affine transform from a file of another tool.

    Args:
        path: the file.
        fixed: the fixed image; needed for FSL, and for an LTA in voxels without valid geometry. An image without a
            file is taken to have the voxel sizes of its affine; FSL goes by those in a file's header.
        moving: the moving image, likewise.
        format: one of `TRANSFORM_FORMATS`. None: by the name, and where that leaves it open by the content: ``.txt``
            is ITK's or plain, ``.mat`` is ITK's if binary and FSL's if text. Convert3D's ``.mat`` is plain:
            ``format="text"``.

    Returns:
        ``(D+1, D+1)`` float64, fixed world to moving world, RAS mm.

    Raises:
        RegistrationError: the file is missing, unreadable, of an unknown format or holds no invertible affine
            transform, or an image that its format needs is missing or cannot be used.
    """
    file = _path(path)
    if format is not None:
        _check_format(format)
    if not exists(file) or not file.is_file():
        raise RegistrationError("path", str(path), "a file that exists")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RegistrationError("path", str(path), f"a file that can be read ({error})") from error
    chosen = format or _format_by_content(file, content)
    if chosen == "itk":
        return _checked(read_itk_transform(file), "path", str(path))
    readers: dict[str, Callable[..., np.ndarray]] = {
        "fsl": _read_fsl,
        "lta": _read_lta,
        "text": lambda text, fixed, moving: _rows(text),
        "json": lambda text, fixed, moving: _read_json(text, str(path)),
    }
    try:
        matrix = readers[chosen](content.decode("utf-8-sig"), fixed, moving)
    except RegistrationError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, np.linalg.LinAlgError) as error:
        allowed = f"a transform file of format {chosen!r} ({error})"
        raise RegistrationError("path", str(path), allowed) from error
    return _checked(matrix, "path", str(path))


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
        fixed: the fixed image; needed for FSL and LTA.
        moving: the moving image, likewise.
        format: one of `TRANSFORM_FORMATS`; None: by the name, which makes ``.mat`` and ``.txt`` ITK's. An LTA is of
            type 1 (RAS to RAS).

    Raises:
        RegistrationError: a matrix, image, name or format that cannot be used, or a folder that cannot be written to.
    """
    file = _path(path)
    try:
        array = np.array(matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else matrix, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RegistrationError("matrix", matrix, "a 3x3 or 4x4 matrix of numbers") from error
    checked = _checked(array, "matrix", array.tolist())
    if format is None:
        chosen = _format_by_name(file)
    else:
        chosen = format
        _check_format(chosen)
    if chosen in ("fsl", "lta") and len(checked) != 4:
        raise RegistrationError("matrix", array.shape, f"a 4x4 matrix: format {chosen!r} is 3D only")
    if chosen == "itk":
        write_itk_transform(path, checked)
    elif chosen == "json":
        write_json(path, {"matrix": checked.tolist(), "maps": _MAPS, "unit": "mm", "space": "RAS"})
    else:
        if chosen == "fsl":
            one, two = _volume(fixed, "fixed", chosen), _volume(moving, "moving", chosen)
            text = _text(fsl_from_world(checked, one.grid, two.grid, one.spacing, two.spacing))
        elif chosen == "lta":
            text = _lta(checked, _volume(fixed, "fixed", chosen), _volume(moving, "moving", chosen))
        else:
            text = _text(checked)
        with atomic_path(path) as partial:
            partial.write_text(text, encoding="utf-8")


def _path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise RegistrationError("path", path, "the path of a file")
    return Path(path)


def _check_format(format: Any) -> None:
    if format not in TRANSFORM_FORMATS:
        raise RegistrationError("format", format, "one of " + ", ".join(TRANSFORM_FORMATS))


def _format_by_name(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in ITK_SUFFIXES:
        return "itk"
    if suffix in (".lta", ".json"):
        return suffix[1:]
    allowed = ", ".join((*ITK_SUFFIXES, ".lta", ".json"))
    raise RegistrationError(
        "path", str(path), f"a name that ends in one of {allowed}, or format= one of {', '.join(TRANSFORM_FORMATS)}"
    )


def _format_by_content(path: Path, content: bytes) -> str:
    suffix = path.suffix.lower()
    if suffix == ".txt" and not content.lstrip().startswith(_INSIGHT):
        return "text"
    # ITK's begin with whole numbers of four bytes, small ones, so there are zeros among them
    if suffix == ".mat" and b"\0" not in content:
        return "fsl"
    return _format_by_name(path)


def _checked(matrix: np.ndarray, argument: str, value: Any) -> np.ndarray:
    if matrix.shape not in ((3, 3), (4, 4)):
        raise RegistrationError(argument, value, f"a 3x3 or 4x4 matrix (its shape is {matrix.shape})")
    dims = len(matrix) - 1
    last_row = np.eye(dims + 1)[dims]
    usable = bool(np.isfinite(matrix).all()) and np.allclose(matrix[dims], last_row)
    if not usable or np.linalg.matrix_rank(matrix[:dims, :dims]) < dims:
        allowed = f"a finite, invertible matrix with last row {last_row.tolist()}"
        raise RegistrationError(argument, value, allowed if argument == "matrix" else f"{allowed} in it")
    matrix[dims] = last_row
    return matrix


# ---------------------------------------------------------------------------------------------------- images and grids


def _volume(image: Any, name: str, format: str) -> _Volume:
    """Where a 3D image lies."""
    if image is None:
        raise RegistrationError(name, None, f"the {name} image: transforms of format {format!r} depend on both images")
    volume = _lattice(image, name)
    if volume.grid.dims != 3:
        raise RegistrationError(name, f"{volume.grid.dims}D image", f"a 3D image: format {format!r} is 3D only")
    return volume


def _lattice(image: Any, name: str) -> _Volume:
    if isinstance(image, Grid):
        return _Volume(image, image.spacing, "unknown")
    if isinstance(image, Image):
        return _Volume(image.grid, image.grid.spacing, str(image.meta.get("path", "unknown")))
    if isinstance(image, MetaTensor):
        if image.meta.get(MetaKeys.SPACE, SpaceKeys.RAS) == SpaceKeys.LPS:
            raise RegistrationError(name, "an affine in LPS", "an affine in RAS, as LoadImage gives it")
        grid = Grid.of(image, name)
        return _Volume(grid, grid.spacing, str(image.meta.get(ImageMetaKey.FILENAME_OR_OBJ, "unknown")))
    if isinstance(image, SpatialImage):
        return _of_nibabel(image, name)
    if not isinstance(image, (str, os.PathLike)):
        raise RegistrationError(name, type(image).__name__, "a path, an image of nibabel, a MetaTensor or a Grid")
    if not exists(image):
        raise RegistrationError(name, str(image), "an existing file")
    try:
        header: Any = nib.load(image)
    except Exception:  # not one of nibabel's formats, or broken: the general reader knows or says why
        grid = load_image(image, name).grid
        return _Volume(grid, grid.spacing, os.fspath(image))
    return _of_nibabel(header, name)


def _of_nibabel(image: Any, name: str) -> _Volume:
    shape, affine = (*image.shape, 1, 1)[:3], getattr(image, "affine", None)
    if affine is None or len(image.shape) < 2:
        raise RegistrationError(name, f"an image of shape {image.shape}", "a volume with an affine")
    # the voxels do not matter: one zero, seen everywhere
    grid = Grid.of(MetaTensor(torch.zeros(1).expand(1, *shape), affine=torch.as_tensor(affine)), name)
    spacing = (*(float(zoom) for zoom in image.header.get_zooms()[:3]), *grid.spacing[len(image.shape) :])
    if not all(np.isfinite(zoom) and zoom > 0 for zoom in spacing):
        raise RegistrationError(name, f"voxel sizes {spacing}", "positive voxel sizes in the header")
    return _Volume(grid, spacing, str(image.get_filename() or "unknown"))


# --------------------------------------------------------------------------------------------------- plain text and FSL


def _rows(text: str) -> np.ndarray:
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    rows = [[float(word) for word in line] for line in lines if line]
    if len(rows) not in (3, 4) or any(len(row) != len(rows) for row in rows):
        raise ValueError("it does not hold four rows of four numbers, or in 2D three of three")
    return np.array(rows)


def _text(matrix: np.ndarray) -> str:
    # repr: the shortest text that reads back as the same number
    return "".join(" ".join(repr(float(value)) for value in row) + "\n" for row in matrix)


def _read_fsl(text: str, fixed: Any, moving: Any) -> np.ndarray:
    matrix = _rows(text)
    if len(matrix) != 4:
        raise ValueError("it does not hold four rows of four numbers")
    one, two = _volume(fixed, "fixed", "fsl"), _volume(moving, "moving", "fsl")
    return world_from_fsl(matrix, one.grid, two.grid, one.spacing, two.spacing)


# ---------------------------------------------------------------------------------------------------------------- JSON


def _read_json(text: str, path: str) -> np.ndarray:
    content = json.loads(text)
    if not isinstance(content, dict) or "matrix" not in content:
        raise ValueError('it has no "matrix"')
    for key, known in (("unit", "mm"), ("space", "RAS")):
        if content.get(key, known) != known:
            raise ValueError(f"{key} {content[key]!r} instead of {known!r}")
    for key in ("maps", "matrix_maps"):
        if not str(content.get(key, _MAPS)).startswith(_MAPS):
            raise ValueError(f"{key} {content[key]!r} instead of {_MAPS!r}")
    if content.get("success") is False:
        warnings.warn(
            f"{path} reports a registration that failed: do not trust its matrix", RegistrationWarning, stacklevel=4
        )
    return np.array(content["matrix"], dtype=np.float64)


# ----------------------------------------------------------------------------------------------------------------- LTA


def _read_lta(text: str, fixed: Any, moving: Any) -> np.ndarray:
    matrix, kind, source, destination = _parse_lta(text)
    if kind == _VOXELS:
        source = source or _volume(moving, "moving", "lta").grid
        destination = destination or _volume(fixed, "fixed", "lta").grid
        # an index matrix from source to destination is a pull matrix with the source as its fixed image
        matrix = world_from_index(matrix, source, destination)
    # NiTransforms (25.1) states the two volumes in exchanged order; its matrix maps moving to fixed like any other
    exchanged = re.search(r"^#.*NiTransforms", text, re.MULTILINE) is not None
    if not exchanged and _says_fixed_to_moving(source, destination, fixed, moving):
        return matrix
    return np.linalg.inv(matrix)


def _says_fixed_to_moving(source: Grid | None, destination: Grid | None, fixed: Any, moving: Any) -> bool:
    """True where the geometry tells that the source is the fixed image or the destination the moving one."""
    one = None if fixed is None else _volume(fixed, "fixed", "lta").grid
    two = None if moving is None else _volume(moving, "moving", "lta").grid

    def same(a: Grid | None, b: Grid | None) -> bool:
        return a is not None and b is not None and a.same_as(b, _SAME_VOLUME)

    return (same(source, one) or same(destination, two)) and not (same(source, two) or same(destination, one))


def _parse_lta(text: str) -> tuple[np.ndarray, int, Grid | None, Grid | None]:
    """The matrix, its type, and the grids of source and destination where the file states valid ones."""
    fields: dict[str, dict[str, list[str]]] = {"": {}, "src": {}, "dst": {}}
    rows: list[list[float]] = []
    section = ""
    for line in (line.strip() for line in text.splitlines()):
        key, separator, value = line.partition("=")
        key = key.strip()
        if not line or line.startswith("#") or line.split()[0] in ("subject", "fscale", "filename"):
            continue
        if line.startswith(("src volume info", "dst volume info")):
            section = line[:3]
        elif separator:
            fields[section][key] = value.partition("#")[0].split()
        else:
            rows.append([float(word) for word in line.split()])
    kind, count = int(fields[""]["type"][0]), int(fields[""].get("nxforms", ["1"])[0])
    if kind not in (_VOXELS, _RAS):
        raise ValueError(f"type {kind} instead of {_LTA_TYPES}")
    if count != 1:
        raise ValueError(f"{count} transforms instead of one")
    if rows[:1] != [[1.0, 4.0, 4.0]] or [len(row) for row in rows[1:]] != [4] * 4:
        raise ValueError('it does not hold the line "1 4 4" and four rows of four numbers')
    return np.array(rows[1:]), kind, _stated_grid(fields["src"]), _stated_grid(fields["dst"])


def _stated_grid(fields: dict[str, list[str]]) -> Grid | None:
    if fields.get("valid", ["0"])[0] != "1":
        return None
    keys = ("volume", "voxelsize", "xras", "yras", "zras", "cras")
    if any(len(fields[key]) != 3 for key in keys):
        raise ValueError("a field of the volume geometry does not have three numbers")
    shape, sizes, *axes, center = ([float(x) for x in fields[key]] for key in keys)
    grid = freesurfer_grid([int(n) for n in shape], sizes, np.array(axes).T, center)
    affine = grid.affine.numpy()
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError("the volume geometry is not finite or singular")
    return grid


def _lta(matrix: np.ndarray, fixed: _Volume, moving: _Volume) -> str:
    lines = ["type      = 1 # LINEAR_RAS_TO_RAS", "nxforms   = 1", "mean      = 0.0000 0.0000 0.0000"]
    lines += ["sigma     = 1.0000", "1 4 4", *(_numbers(row) for row in np.linalg.inv(matrix))]
    for section, volume in (("src", moving), ("dst", fixed)):
        sizes, directions, center = freesurfer_volume(volume.grid)
        # readers take the name up to the first blank
        name = volume.name if re.fullmatch(r"[^\s#=]+", volume.name) else "unknown"
        lines += [f"{section} volume info", "valid = 1  # volume info valid", f"filename = {name}"]
        lines += ["volume = " + " ".join(str(n) for n in volume.grid.shape), "voxelsize = " + _numbers(sizes)]
        lines += [f"{axis}ras   = {_numbers(column)}" for axis, column in zip("xyz", directions.T, strict=True)]
        lines += [f"cras   = {_numbers(center)}"]
    return "\n".join([*lines, "subject ", "fscale 0.100000", ""])


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{float(value):.15e}" for value in values)
