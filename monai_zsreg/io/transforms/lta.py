# SPDX-License-Identifier: Apache-2.0
"""FreeSurfer's LTA: source to destination, in RAS or in voxels, with the geometry of both volumes.

The source is the moving image and the destination the fixed one. Where the images are given and the file's geometry
says that it is the other way about, the file is read that way. Written are files of type 1 (RAS to RAS).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from monai_zsreg.geometry import Grid, freesurfer_grid, freesurfer_volume
from monai_zsreg.io.transforms.images import Images, Volume

_VOXELS, _RAS = 0, 1
_TYPES = "type 0 (LINEAR_VOX_TO_VOX) or 1 (LINEAR_RAS_TO_RAS)"
# geometry in an LTA has four decimals in older files, which leaves hundredths of a millimeter at a far corner
_SAME_VOLUME = 0.1

Fields = dict[str, list[str]]


def sniff(content: bytes) -> bool:
    return b"nxforms" in content


def read(path: Path, images: Images) -> np.ndarray:
    content = path.read_text(encoding="utf-8-sig")
    matrix, kind, source, destination = _parse(content)
    if kind == _VOXELS:
        source = source or images.need("moving").grid
        destination = destination or images.need("fixed").grid
        matrix = destination.affine.numpy() @ matrix @ np.linalg.inv(source.affine.numpy())

    def same(stated: Grid | None, given: Volume | None) -> bool:
        return stated is not None and given is not None and stated.same_as(given.grid, _SAME_VOLUME)

    fixed, moving = images.known("fixed"), images.known("moving")
    swapped = (same(source, fixed) or same(destination, moving)) and not (
        same(source, moving) or same(destination, fixed)
    )
    # NiTransforms (25.1) states the two volumes in exchanged order; its matrix maps moving to fixed like any other
    nitransforms = re.search(r"^#.*NiTransforms", content, re.MULTILINE) is not None
    return np.linalg.inv(matrix) if swapped and not nitransforms else matrix


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    lines = ["type      = 1 # LINEAR_RAS_TO_RAS", "nxforms   = 1", "mean      = 0.0000 0.0000 0.0000"]
    lines += ["sigma     = 1.0000", "1 4 4", *map(_numbers, matrix)]
    for section, volume in (("src", images.need("moving")), ("dst", images.need("fixed"))):
        sizes, directions, center = freesurfer_volume(volume.grid)
        # readers take the name up to the first blank
        name = volume.name if re.fullmatch(r"[^\s#=]+", volume.name) else "unknown"
        lines += [f"{section} volume info", "valid = 1  # volume info valid", f"filename = {name}"]
        lines += ["volume = " + " ".join(str(n) for n in volume.grid.shape), "voxelsize = " + _numbers(sizes)]
        lines += [f"{axis}ras   = {_numbers(column)}" for axis, column in zip("xyz", directions.T, strict=True)]
        lines += [f"cras   = {_numbers(center)}"]
    path.write_text("\n".join([*lines, "subject ", "fscale 0.100000", ""]), encoding="utf-8")


def _parse(content: str) -> tuple[np.ndarray, int, Grid | None, Grid | None]:
    """The matrix, its type, and the grids of source and destination where the file states valid ones."""
    fields: dict[str, Fields] = {"": {}, "src": {}, "dst": {}}
    rows: list[list[float]] = []
    section = ""
    for line in (line.strip() for line in content.splitlines()):
        key, separator, value = line.partition("=")
        if not line or line.startswith("#") or line.split()[0] in ("subject", "fscale", "filename"):
            continue
        if line.startswith(("src volume info", "dst volume info")):
            section = line[:3]
        elif separator:
            fields[section][key.strip()] = value.partition("#")[0].split()
        else:
            rows.append([float(word) for word in line.split()])
    kind, count = int(fields[""]["type"][0]), int(fields[""].get("nxforms", ["1"])[0])
    if kind not in (_VOXELS, _RAS):
        raise ValueError(f"type {kind} instead of {_TYPES}")
    if count != 1:
        raise ValueError(f"{count} transforms instead of one")
    if rows[:1] != [[1.0, 4.0, 4.0]] or [len(row) for row in rows[1:]] != [4] * 4:
        raise ValueError('it does not hold the line "1 4 4" and four rows of four numbers')
    return np.array(rows[1:]), kind, _stated_grid(fields["src"]), _stated_grid(fields["dst"])


def _stated_grid(fields: Fields) -> Grid | None:
    if fields.get("valid", ["0"])[0] != "1":
        return None
    stated = [[float(x) for x in fields[key]] for key in ("volume", "voxelsize", "xras", "yras", "zras", "cras")]
    if any(len(numbers) != 3 for numbers in stated):
        raise ValueError("a field of the volume geometry does not have three numbers")
    shape, sizes, *axes, center = stated
    grid = freesurfer_grid([int(n) for n in shape], sizes, np.array(axes).T, center)
    affine = grid.affine.numpy()
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError("the volume geometry is not finite or singular")
    return grid


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{float(value):.15e}" for value in values)
