# SPDX-License-Identifier: Apache-2.0
"""The same data by path, by MONAI's LoadImaged, as nibabel's array with its affine, and by SimpleITK: one image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.transforms import LoadImaged
from phantoms import pooled
from scipy import ndimage

from monai_zsreg import Prepared, register
from monai_zsreg.geometry import lps_to_ras
from monai_zsreg.io import load_image

# a turn by 12 degrees with a shift, under which the moving image lies
_C, _S = np.cos(np.deg2rad(12)), np.sin(np.deg2rad(12))
MOVED = np.array([[_C, -_S, 0, 6.0], [_S, _C, 0, -5.0], [0, 0, 1, 4.0], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def heads(load_volume: Callable) -> tuple[Prepared, np.ndarray, np.ndarray]:
    """The fixed image, ready; values and affine of the moving one, which its header has moved."""
    t1, t2 = (pooled(load_volume(modality=modality), 4) for modality in ("t1", "t2"))
    values = np.rint(t2[0].numpy() / float(t2.max()) * 2000)
    return Prepared(load_image(t1)), values, MOVED @ t2.affine.numpy()


def write(kind: str, folder: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    """One kind of file with the moving image."""
    path = folder / "a.nii.gz"
    whole = values.astype(np.int16)
    if kind == "little-endian":
        file = nib.Nifti1Image(whole, affine)
    elif kind == "big-endian":
        file = nib.Nifti1Image(whole.astype(">i2"), affine, nib.Nifti1Header(endianness=">"))
    elif kind == "NIfTI 2, scaled":
        file = nib.Nifti2Image(whole, affine)
        file.header.set_slope_inter(0.5, -100.0)
    elif kind == "qform only":
        file = nib.Nifti1Image(whole, affine)
        file.set_qform(affine, 1)
        file.set_sform(None, 0)
    elif kind == "flipped, two axes of one":
        file = nib.Nifti1Image(whole[::-1, :, :, None, None], affine @ flip(0, len(whole)))
    elif kind == "axes exchanged":
        file = nib.Nifti1Image(whole.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]])
    elif kind == "doubles":
        file = nib.Nifti1Image(values / 7, affine)
    elif kind.startswith("mgz"):
        file, path = nib.MGHImage(values.astype(kind[4:]), affine), folder / "a.mgz"
    else:
        nib.save(nib.Nifti1Image(whole, affine), path)
        image = sitk.ReadImage(str(path))
        path = folder / f"a.{kind}"
        sitk.WriteImage(image, str(path))
        return path
    nib.save(file, path)
    return path


def flip(axis: int, n: int) -> np.ndarray:
    matrix = np.eye(4)
    matrix[axis, axis], matrix[axis, 3] = -1, n - 1
    return matrix


def ways(path: Path) -> Iterator[tuple[str, Any]]:
    # MONAI gives .mgz to ITK, which does not read it
    reader = "NibabelReader" if path.suffix == ".mgz" else None
    loaded = LoadImaged(keys="i", reader=reader, image_only=True, ensure_channel_first=True)({"i": path})
    yield "LoadImaged", loaded["i"]
    if path.suffix in (".gz", ".mgz"):
        file: Any = nib.load(path)
        values = np.asanyarray(file.dataobj)
        yield "nibabel", load_image(values.reshape(values.shape[:3]), affine=file.affine)
    if sitk.ImageFileReader.GetImageIOFromFileName(str(path)):  # none for .mgz, in some of its releases NIfTI 2
        image = sitk.ReadImage(str(path))
        while image.GetDimension() > 3:
            image = image[..., 0]
        matrix = np.eye(4)
        matrix[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        matrix[:3, 3] = image.GetOrigin()
        ras = np.diag([-1.0, -1, 1, 1]) @ matrix
        assert np.allclose(ras, lps_to_ras(matrix) @ np.diag([-1.0, -1, 1, 1]))
        yield "SimpleITK", load_image(sitk.GetArrayFromImage(image).T.copy(), affine=ras)


KINDS = (
    "little-endian", "big-endian", "NIfTI 2, scaled", "qform only", "flipped, two axes of one", "axes exchanged",
    "doubles", "mgz int16", "mgz int32", "mgz float32", "nrrd", "mha",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_in_gives_the_same_image_and_the_right_matrix(tmp_path: Path, heads: Any, kind: str) -> None:
    fixed, values, affine = heads
    path = write(kind, tmp_path, values, affine)
    corners = np.array(np.meshgrid(*[[-90.0, 90.0]] * 3)).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    matrix = register(fixed, path, search="local", transform="rigid").affine
    # the right one
    assert np.linalg.norm(((matrix - MOVED) @ corners)[:3], axis=0).max() < 4.0
    image, compared = load_image(path), 0
    for name, source in ways(path):
        other = load_image(source)
        np.testing.assert_allclose(other.values, image.values, rtol=1e-6, err_msg=name)
        # headers hold single precision
        assert other.grid.same_as(image.grid, 0.02), name
        compared += 1
    assert compared >= 2


def test_a_slice_is_the_same_by_every_way(tmp_path: Path, heads: Any, load_slice: Callable) -> None:
    """Sagittal, so that its first axis is the one of one voxel."""
    fixed, values, affine = heads
    middle = len(values) // 2
    place = affine.copy()
    place[:3, 3] += middle * affine[:3, 0]
    nib.save(nib.Nifti1Image(values[middle][None].astype(np.int16), place), tmp_path / "a.nii.gz")
    turned = ndimage.rotate(values[middle], 9.0, reshape=False, order=1)
    still = load_image(turned[None].astype(np.float32), affine=place)
    matrix = register(still, tmp_path / "a.nii.gz", transform="rigid").affine
    image = load_image(tmp_path / "a.nii.gz")
    for name, source in ways(tmp_path / "a.nii.gz"):
        other = load_image(source)
        np.testing.assert_allclose(other.values, image.values, rtol=1e-6, err_msg=name)
        assert other.grid.same_as(image.grid, 5e-3), name
    assert matrix.shape == (3, 3) and abs(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0]))) == pytest.approx(
        9, abs=0.5
    )
    assert torch.isfinite(still.affine).all()
