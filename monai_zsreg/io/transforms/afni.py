# SPDX-License-Identifier: Apache-2.0
"""AFNI's ``.aff12.1D``: the first three rows of a matrix in one line, base (fixed) to source (moving), LPS.

AFNI's programs take an oblique image for one that is not: its axes snapped to the nearest axes of the world, its first
voxel left where it is. So a matrix between oblique images can only be read with these.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_zsreg.geometry import lps_to_ras, ras_to_lps, without_obliquity
from monai_zsreg.io.transforms.images import Images, Volume
from monai_zsreg.io.transforms.text import matrix_rows

__all__ = ["read", "write"]


def read(path: Path, images: Images) -> np.ndarray:
    rows = matrix_rows(path.read_text(encoding="utf-8-sig"))
    count = sum(len(row) for row in rows)
    if count != 12 or len(rows) not in (1, 3):
        many = f"{len(rows)} transforms" if {len(row) for row in rows} == {12} else f"{count} numbers"
        raise ValueError(f"{many} instead of the twelve numbers of one")
    stated = lps_to_ras(np.vstack([np.reshape(np.concatenate(rows), (3, 4)), [0.0, 0.0, 0.0, 1.0]]))
    return np.linalg.inv(_real_to_afni(images.known_moving)) @ stated @ _real_to_afni(images.known_fixed)


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    stated = _real_to_afni(images.known_moving) @ matrix @ np.linalg.inv(_real_to_afni(images.known_fixed))
    line = " ".join(repr(float(value)) for value in ras_to_lps(stated)[:3].ravel())
    path.write_text(f"# 3dvolreg matrices (DICOM-to-DICOM, row-by-row):\n{line}\n", encoding="utf-8")


def _real_to_afni(volume: Volume | None) -> np.ndarray:
    """The world of an image to the one that AFNI sees it in."""
    if volume is None:
        return np.eye(4)
    affine = volume.grid.affine.numpy()
    return without_obliquity(affine) @ np.linalg.inv(affine)
