# SPDX-License-Identifier: Apache-2.0
"""AFNI's ``.aff12.1D``: the first three rows of a matrix in one line, base (fixed) to source (moving), LPS.

AFNI's programs take an oblique image for one that is not: its axes snapped to the nearest axes of the world, its first
voxel left where it is. So a matrix between oblique images can only be read with these.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_zsreg.geometry import lps_from_ras, without_obliquity
from monai_zsreg.io.transforms.images import Images
from monai_zsreg.io.transforms.text import matrix_rows, spelled


def read(path: Path, images: Images) -> np.ndarray:
    rows = matrix_rows(path)
    count = sum(len(row) for row in rows)
    if count != 12 or len(rows) not in (1, 3):
        many = f"{len(rows)} transforms" if {len(row) for row in rows} == {12} else f"{count} numbers"
        raise ValueError(f"{many} instead of the twelve numbers of one")
    return np.vstack([np.reshape(np.concatenate(rows), (3, 4)), [0.0, 0.0, 0.0, 1.0]])


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    path.write_text(
        f"# 3dvolreg matrices (DICOM-to-DICOM, row-by-row):\n{spelled(matrix[:3].ravel())}\n", encoding="utf-8"
    )


def world(images: Images, name: str, dims: int) -> np.ndarray:
    volume = images.known(name)
    if volume is None:
        return lps_from_ras(dims)
    affine = volume.grid.affine.numpy()
    return lps_from_ras(dims) @ without_obliquity(affine) @ np.linalg.inv(affine)
