# SPDX-License-Identifier: Apache-2.0
"""Displacement fields as ITK and ANTs have them, mm, LPS: in NIfTI files, vectors in a fifth axis, or in composite
transforms (``.h5``) with whatever matrices come before and behind.

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

from monai_zsreg.errors import RegistrationError, require
from monai_zsreg.geometry import (
    Grid,
    checked_affine,
    flip_points,
    itk_lattice,
    lps_to_ras,
    ras_to_lps,
    widened,
    world_from_itk,
)
from monai_zsreg.io.files import atomic_path, exists, require_nifti_name
from monai_zsreg.io.transforms.itk import centered_matrix, parts, write_hdf5

_VECTOR = 1007
# how far from orthogonal the axes of a lattice may be, cosine; NIfTI readers round more
_SQUARE = 1e-4


def write_displacement(path: str | os.PathLike, displacement: Tensor, grid: Grid) -> None:
    """Write a displacement field ``[D, *lattice]``, mm, RAS, as a NIfTI file.

    Raises:
        RegistrationError: another suffix, or a lattice whose axes are not orthogonal, which these files cannot hold.
    """
    dims = grid.dims
    require_nifti_name(path)
    _check_square(grid)
    vectors = flip_points(np.moveaxis(displacement.detach().cpu().numpy(), 0, -1)).astype(np.float32)
    # the fourth axis is time; in 2D the third is missing
    values = vectors.reshape(*grid.shape, *[1] * (4 - dims), dims)
    affine = widened(grid.affine).numpy()
    nifti = nib.Nifti1Image(values, affine)
    nifti.header.set_intent(_VECTOR)
    nifti.header.set_xyzt_units("mm")
    nifti.set_qform(affine, code="scanner")
    nifti.set_sform(affine, code="scanner")
    with atomic_path(path) as partial:
        nib.save(nifti, partial)


def read_displacement(path: str | os.PathLike) -> tuple[Tensor, Grid]:
    """Read the NIfTI file of a displacement field from ITK, ANTs (``1Warp.nii.gz``), SimpleITK, greedy or this package.

    Returns:
        ``[D, *lattice]`` float32, mm, RAS, and the lattice.

    Raises:
        RegistrationError: the file is missing, cannot be read, or holds no displacement field.
    """
    require(exists(path), "path", str(path), "an existing file")
    try:
        file: Any = nib.load(Path(path))
        values = np.asarray(file.dataobj, dtype=np.float32)
    except Exception as error:  # nibabel raises whatever its readers raise
        raise RegistrationError("path", str(path), f"a NIfTI file ({type(error).__name__}: {error})") from error
    dims = values.shape[-1]
    shape = values.shape[:dims]
    fits = values.ndim == 5 and dims in (2, 3) and values.shape[dims:-1] == (1,) * (4 - dims)
    allowed = "a displacement field [I, J, K, 1, 3], or [I, J, 1, 1, 2] in 2D"
    require(fits, "path", f"{path} of shape {values.shape}", allowed)
    require(bool(np.isfinite(values).all()), "path", str(path), "a displacement field without NaN or infinity")
    return _from_lps(values.reshape(*shape, dims)), Grid(shape, checked_affine(file.affine, dims, "path"))


def bends(path: str | os.PathLike) -> bool:
    """True for the name of a field, and for an HDF5 file of ITK that holds one."""
    name = os.fspath(path).lower()
    if name.endswith((".h5", ".hdf5")):
        return exists(path) and b"DisplacementFieldTransform" in Path(path).read_bytes()
    return name.endswith((".nii", ".nii.gz"))


def write_composite(path: str | os.PathLike, displacement: Tensor, grid: Grid, affine: Tensor) -> None:
    """Write a displacement field as of `write_displacement`, and the matrix ``(D+1, D+1)``, RAS, that follows it, as a
    composite transform of ITK; ``path`` ends in ``.h5``."""
    _check_square(grid)
    dims = grid.dims
    vectors = flip_points(displacement.detach().cpu().numpy().transpose(*range(dims, 0, -1), 0)).astype(np.float32)
    spacing, origin, direction = itk_lattice(grid)
    lattice = np.concatenate([grid.shape, origin, spacing, direction.ravel()])
    matrix = ras_to_lps(affine.numpy())
    parameters = np.concatenate([matrix[:dims, :dims].ravel(), matrix[:dims, dims]])
    transforms = {
        "CompositeTransform": (np.zeros(0), np.zeros(0)),
        "AffineTransform": (parameters, np.zeros(dims)),
        "DisplacementFieldTransform": (vectors.ravel(), lattice),
    }
    with atomic_path(path) as partial:
        write_hdf5(partial, [(f"{kind}_double_{dims}_{dims}", *numbers) for kind, numbers in transforms.items()])


def read_composite(path: str | os.PathLike) -> list[Tensor | tuple[Tensor, Grid]]:
    """Read what a composite transform of ITK or ANTs (``Composite.h5``) holds.

    Returns:
        Matrices ``(D+1, D+1)`` and fields as of `read_displacement`, RAS; the first acts first on points of the fixed
        image.

    Raises:
        RegistrationError: it holds something else.
    """
    found: list[Tensor | tuple[Tensor, Grid]] = []
    try:
        for kind, parameters, fixed in reversed(parts(Path(path))):
            if "DisplacementField" not in kind:
                found.append(torch.from_numpy(lps_to_ras(centered_matrix(kind, parameters, fixed))))
                continue
            dims = int(kind[-1])
            shape, origin, spacing, direction = np.split(fixed, [dims, 2 * dims, 3 * dims])
            affine = world_from_itk(spacing, origin, direction.reshape(dims, dims))
            values = parameters.reshape(dims, *shape.astype(int), order="F")
            grid = Grid(tuple(map(int, shape)), torch.tensor(affine))
            found.append((_from_lps(np.moveaxis(values, 0, -1)), grid))
    except (OSError, ValueError) as error:
        raise RegistrationError("path", str(path), f"matrices and displacement fields of ITK ({error})") from error
    return found


def _from_lps(vectors: np.ndarray) -> Tensor:
    """``[*lattice, D]`` LPS to ``[D, *lattice]`` RAS, float32."""
    return torch.from_numpy(flip_points(vectors)).movedim(-1, 0).float().contiguous()


def _check_square(grid: Grid) -> None:
    dims = grid.dims
    axes = grid.affine[:dims, :dims] / torch.tensor(grid.spacing, dtype=torch.float64)
    square = float((axes.mT @ axes - torch.eye(dims)).abs().max()) <= _SQUARE
    require(square, "grid", grid.affine.tolist(), "a lattice with orthogonal axes")
