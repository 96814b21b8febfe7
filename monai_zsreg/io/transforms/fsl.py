# SPDX-License-Identifier: Apache-2.0
"""FLIRT's matrices: four rows, from the moving image (``-in``) to the fixed one (``-ref``), in scaled voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_zsreg.geometry import fsl_from_world
from monai_zsreg.io.transforms.images import Images
from monai_zsreg.io.transforms.text import matrix_rows, rows_of


def sniff(content: bytes) -> bool:
    return [len(row) for row in rows_of(content)] == [4] * 4


def read(path: Path, images: Images) -> np.ndarray:
    rows = matrix_rows(path)
    if [len(row) for row in rows] != [4] * 4:
        raise ValueError("it does not hold four rows of four numbers")
    return np.array(rows)


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    # two blanks behind every number, as FLIRT leaves them
    path.write_text("".join("".join(f"{float(value)!r}  " for value in row) + "\n" for row in matrix), encoding="utf-8")


def world(images: Images, name: str, dims: int) -> np.ndarray:
    volume = images.need(name)
    return fsl_from_world(volume.grid, volume.spacing)
