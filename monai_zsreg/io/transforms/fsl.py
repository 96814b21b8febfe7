# SPDX-License-Identifier: Apache-2.0
"""FLIRT's matrices: four rows, from the moving image (``-in``) to the fixed one (``-ref``), in scaled voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_zsreg.geometry import fsl_from_world, world_from_fsl
from monai_zsreg.io.transforms.images import Images
from monai_zsreg.io.transforms.text import matrix_rows, numbers

__all__ = ["read", "sniff", "write"]


def sniff(content: bytes) -> bool:
    return [len(row) for row in numbers(content) or ()] == [4] * 4


def read(path: Path, images: Images) -> np.ndarray:
    rows = matrix_rows(path.read_text(encoding="utf-8-sig"))
    if [len(row) for row in rows] != [4] * 4:
        raise ValueError("it does not hold four rows of four numbers")
    one, two = images.need("fixed"), images.need("moving")
    return world_from_fsl(np.array(rows), one.grid, two.grid, one.spacing, two.spacing)


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    one, two = images.need("fixed"), images.need("moving")
    rows = fsl_from_world(matrix, one.grid, two.grid, one.spacing, two.spacing)
    lines = ["".join(f"{float(value)!r}  " for value in row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
