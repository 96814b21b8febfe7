# SPDX-License-Identifier: Apache-2.0
"""FLIRT's matrices: four rows, from the moving image (``-in``) to the fixed one (``-ref``), in scaled voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_zsreg.geometry import fsl_from_world, world_from_fsl
from monai_zsreg.io.transforms.images import Images

__all__ = ["looks_like_flirt", "read", "sniff", "write"]


def looks_like_flirt(content: bytes) -> bool:
    """Whether the text is laid out as FLIRT writes it: two blanks behind every number, also the last of a line."""
    lines = [line for line in content.rstrip(b"\r\n").splitlines() if line.strip()]
    return len(lines) == 4 and all(line.endswith(b"  ") and line.count(b"  ") == 4 for line in lines)


def sniff(content: bytes) -> bool:
    try:
        return np.array([line.split() for line in content.decode().splitlines() if line.strip()], float).shape == (4, 4)
    except ValueError:
        return False


def read(path: Path, images: Images) -> np.ndarray:
    rows = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if len(rows) != 4 or any(len(row) != 4 for row in rows):
        raise ValueError("it does not hold four rows of four numbers")
    one, two = images.need("fixed"), images.need("moving")
    return world_from_fsl(np.array(rows, dtype=np.float64), one.grid, two.grid, one.spacing, two.spacing)


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    one, two = images.need("fixed"), images.need("moving")
    rows = fsl_from_world(matrix, one.grid, two.grid, one.spacing, two.spacing)
    lines = ["".join(f"{float(value)!r}  " for value in row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
