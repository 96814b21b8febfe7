# SPDX-License-Identifier: Apache-2.0
"""Displacement fields against ITK, which reads ours and whose own are read."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, apply_affine
from monai_zsreg.io.displacement import read_displacement, write_displacement


def field(dims: int, mirrored: bool = False) -> tuple[torch.Tensor, Grid]:
    """A smooth displacement on an oblique, anisotropic lattice."""
    shape = (14, 11, 9)[:dims]
    rng = np.random.default_rng(dims)
    values = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), 1.5) for _ in shape]) * 30
    c, s = np.cos(0.4), np.sin(0.4)
    affine = np.eye(dims + 1)
    affine[:2, :2] = [[c, -s], [s, c]]
    affine[:dims, :dims] *= np.array([2.0, 3.0, 1.5][:dims])
    affine[:dims, dims] = (-7.0, 11.0, 5.0)[:dims]
    if mirrored:
        affine[:dims, 0] *= -1
    return torch.from_numpy(values).float(), Grid(shape, torch.from_numpy(affine))


def points(grid: Grid) -> np.ndarray:
    index = np.random.default_rng(0).uniform(0.5, np.array(grid.shape) - 1.5, (50, grid.dims))
    return apply_affine(grid.affine, torch.from_numpy(index)).numpy()


def interpolated(values: torch.Tensor, grid: Grid, where: np.ndarray) -> np.ndarray:
    index = apply_affine(torch.linalg.inv(grid.affine), torch.from_numpy(where)).numpy().T
    return np.stack([ndimage.map_coordinates(v.double().numpy(), index, order=1) for v in values], 1)


def by_itk(image: sitk.Image, where: np.ndarray) -> np.ndarray:
    """Where ITK's transform takes points, RAS."""
    dims = where.shape[1]
    transform = sitk.DisplacementFieldTransform(image)
    flip = np.array([-1.0, -1.0, 1.0][:dims])
    return np.array([list(transform.TransformPoint((p * flip).tolist())) for p in where]) * flip


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_itk_understands_the_file(tmp_path: Path, dims: int, mirrored: bool) -> None:
    values, grid = field(dims, mirrored)
    path = tmp_path / "warp.nii.gz"
    write_displacement(path, values, grid)
    image = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    assert image.GetDimension() == dims
    where = points(grid)
    np.testing.assert_allclose(by_itk(image, where), where + interpolated(values, grid, where), atol=1e-3)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_file_of_itk_is_understood(tmp_path: Path, dims: int) -> None:
    values, grid = field(dims)
    ours, theirs = tmp_path / "ours.nii.gz", tmp_path / "theirs.nii.gz"
    write_displacement(ours, values, grid)
    sitk.WriteImage(sitk.ReadImage(str(ours)), str(theirs))
    again, lattice = read_displacement(theirs)
    assert lattice.same_as(grid)
    torch.testing.assert_close(again, values, atol=1e-4, rtol=0)


def test_wrong_files_and_lattices_are_refused(tmp_path: Path) -> None:
    values, grid = field(3)
    with pytest.raises(RegistrationError, match="nii"):
        write_displacement(tmp_path / "warp.h5", values, grid)
    sheared = grid.affine.clone()
    sheared[0, 1] += 1.0
    with pytest.raises(RegistrationError, match="orthogonal"):
        write_displacement(tmp_path / "warp.nii", values, Grid(grid.shape, sheared))
    with pytest.raises(RegistrationError, match="existing"):
        read_displacement(tmp_path / "none.nii.gz")
    scalar = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((5, 5, 5), np.float32), np.eye(4)), scalar)
    with pytest.raises(RegistrationError, match="displacement field"):
        read_displacement(scalar)
    (tmp_path / "text.nii").write_text("no image")
    with pytest.raises(RegistrationError, match="NIfTI"):
        read_displacement(tmp_path / "text.nii")
    broken = values.clone()
    broken[0, 0, 0, 0] = float("nan")
    write_displacement(tmp_path / "nan.nii", broken, grid)
    with pytest.raises(RegistrationError, match="NaN"):
        read_displacement(tmp_path / "nan.nii")
