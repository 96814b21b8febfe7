# SPDX-License-Identifier: Apache-2.0
"""A folder of small made-up subjects, as a user would have it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

# oblique, left-handed, 2 x 2 x 2.5 mm
AFFINE = np.eye(4)
AFFINE[:3, :3] = np.array([[-0.98, -0.17, 0.0], [-0.17, 0.98, 0.1], [0.02, -0.1, 0.99]])
AFFINE[:3, :3] = np.linalg.svd(AFFINE[:3, :3])[0] @ np.linalg.svd(AFFINE[:3, :3])[2] @ np.diag([2.0, 2.0, 2.5])
AFFINE[:3, 3] = [40.0, -35.0, -20.0]
SHAPE = (44, 48, 36)
RESIDUAL = (1.0, -0.6, 0.75)  # mm along the voxel axes: t1(x) ~ t2(x + r)


def head(shift: tuple[float, ...] = (0.0, 0.0, 0.0), seed: int = 0) -> np.ndarray:
    """A layered ball with texture; the value at voxel x is that of the pattern at ``x + shift`` (in voxels)."""
    rng = np.random.default_rng(seed)
    waves = ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.8)
    waves = ndimage.shift(waves / waves.std(), [-s for s in shift], order=3, mode="nearest")
    axes = np.meshgrid(*[np.arange(n) + s - (n - 1) / 2 for n, s in zip(SHAPE, shift, strict=True)], indexing="ij")
    radius = np.sqrt(sum((a / r) ** 2 for a, r in zip(axes, (13, 15, 11), strict=True)))
    inside = 1 / (1 + np.exp((radius - 1) * 12))
    image = 100 * inside * np.clip(1.1 - 0.5 * radius + 0.15 * waves, 0.1, None)
    return np.where(radius < 1.4, image, 0.0).astype(np.float32)


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Subjects ``a``, ``b``, ``c`` with ``t1`` and ``t2`` (the same contrast, shifted by `RESIDUAL`)."""
    root = tmp_path_factory.mktemp("subjects")
    steps = tuple(r / s for r, s in zip(RESIDUAL, (2.0, 2.0, 2.5), strict=True))
    for number, name in enumerate("abc"):
        folder = root / name
        folder.mkdir()
        prefix = "study1_" if name == "c" else ""
        nib.save(nib.Nifti1Image(head(steps, number), AFFINE), folder / f"{prefix}t1.nii.gz")
        nib.save(nib.Nifti1Image(head(seed=number), AFFINE), folder / f"{prefix}t2.nii.gz")
    rows = ["subject,a,b,ngf_dx,ngf_dy,ngf_dz", *[f"{n},t1,t2,{RESIDUAL[0]},{RESIDUAL[1]},{RESIDUAL[2]}" for n in "ab"]]
    (root / "residuals.csv").write_text("\n".join(rows) + "\n")
    return root
