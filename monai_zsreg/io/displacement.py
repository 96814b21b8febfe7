# SPDX-License-Identifier: Apache-2.0
"""Displacement fields in NIfTI files as ITK and ANTs have them: vectors in a fifth axis, mm, LPS.

ITK interpolates between the points of the lattice linearly, and does nothing beyond its edge.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, checked_affine, flip_points
from monai_zsreg.io.files import atomic_path, exists

__all__ = ["read_displacement", "write_displacement"]

_VECTOR = 1007
# how far from orthogonal the axes of a lattice may be, cosine; NIfTI readers round more
_SQUARE = 1e-4


def write_displacement(path: str | os.PathLike, displacement: Tensor, grid: Grid) -> None:
    """Write a displacement field.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``.
        displacement: ``[D, *lattice]``, mm, RAS.
        grid: the lattice.

    Raises:
        RegistrationError: another suffix, or axes that are not orthogonal, which these files cannot hold.
    """
    dims = grid.dims
    if not str(path).lower().endswith((".nii", ".nii.gz")):
        raise RegistrationError("path", str(path), "a name that ends in .nii or .nii.gz")
    axes = grid.affine[:dims, :dims] / torch.tensor(grid.spacing, dtype=torch.float64)
    if float((axes.mT @ axes - torch.eye(dims)).abs().max()) > _SQUARE:
        raise RegistrationError("grid", grid.affine.tolist(), "a lattice with orthogonal axes")
    vectors = flip_points(np.moveaxis(displacement.detach().cpu().numpy(), 0, -1)).astype(np.float32)
    # the fourth axis is time; in 2D the third is missing
    values = vectors.reshape(*grid.shape, *[1] * (4 - dims), dims)
    affine = np.eye(4)
    affine[:dims, :dims], affine[:dims, 3] = grid.affine[:dims, :dims], grid.affine[:dims, dims]
    nifti = nib.Nifti1Image(values, affine)
    nifti.header.set_intent(_VECTOR)
    nifti.header.set_xyzt_units("mm")
    nifti.set_qform(affine, code="scanner")
    nifti.set_sform(affine, code="scanner")
    with atomic_path(path) as partial:
        nib.save(nifti, partial)


def read_displacement(path: str | os.PathLike) -> tuple[Tensor, Grid]:
    """Read a displacement field that ITK, ANTs (``1Warp.nii.gz``), SimpleITK, greedy or this package wrote.

    Args:
        path: a NIfTI file.

    Returns:
        ``[D, *lattice]`` float32, mm, RAS, and the lattice.

    Raises:
        RegistrationError: the file is missing, cannot be read, or holds no displacement field.
    """
    if not exists(path):
        raise RegistrationError("path", str(path), "an existing file")
    try:
        file: Any = nib.load(Path(path))
        values = np.asarray(file.dataobj, dtype=np.float32)
    except Exception as error:  # nibabel raises whatever its readers raise
        raise RegistrationError("path", str(path), f"a NIfTI file ({type(error).__name__}: {error})") from error
    dims = values.shape[-1]
    shape = values.shape[:dims]
    if values.ndim != 5 or dims not in (2, 3) or values.shape[dims:-1] != (1,) * (4 - dims):
        allowed = "a displacement field [I, J, K, 1, 3], or [I, J, 1, 1, 2] in 2D"
        raise RegistrationError("path", f"{path} of shape {values.shape}", allowed)
    if not np.isfinite(values).all():
        raise RegistrationError("path", str(path), "a displacement field without NaN or infinity")
    vectors = torch.from_numpy(flip_points(values.reshape(*shape, dims))).movedim(-1, 0).float().contiguous()
    return vectors, Grid(shape, checked_affine(file.affine, dims, "path"))
