# SPDX-License-Identifier: Apache-2.0
"""FLIRT's matrices: four rows, from the moving image (``-in``) to the fixed one (``-ref``), in scaled voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_zsreg.geometry import fsl_from_world
from monai_zsreg.io.transforms.images import Images
from monai_zsreg.io.transforms.text import matrix_rows, numbers

__all__ = ["read", "sniff", "write"]


def sniff(content: bytes) -> bool:
    return [len(row) for row in numbers(content) or ()] == [4] * 4


def read(path: Path, images: Images) -> np.ndarray:
    rows = matrix_rows(path.read_text(encoding="utf-8-sig"))
    if [len(row) for row in rows] != [4] * 4:
        raise ValueError("it does not hold four rows of four numbers")
    to_fixed, to_moving = _from_worlds(images)
    return np.linalg.inv(to_moving) @ np.linalg.inv(rows) @ to_fixed


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    to_fixed, to_moving = _from_worlds(images)
    rows = to_fixed @ np.linalg.inv(matrix) @ np.linalg.inv(to_moving)
    lines = ["".join(f"{float(value)!r}  " for value in row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _from_worlds(images: Images) -> tuple[np.ndarray, np.ndarray]:
    fixed, moving = images.need("fixed"), images.need("moving")
    return fsl_from_world(fixed.grid, fixed.spacing), fsl_from_world(moving.grid, moving.spacing)
