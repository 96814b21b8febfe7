# SPDX-License-Identifier: Apache-2.0
"""Tests of reading images and of putting them on an isotropic grid."""

from __future__ import annotations

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, apply_affine
from monai_zsreg.networks.zero_shot import scale_to_unit_range
from monai_zsreg.registration.images import channel, on_isotropic_grid, read_image, working_spacing

OBLIQUE = np.array([[-0.8, 0.2, 0.1, 30.0], [0.15, 1.4, -0.2, -12.0], [0.1, 0.25, 2.5, 7.0], [0.0, 0.0, 0.0, 1.0]])


def array_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape).astype(np.float32)


def test_nifti_keeps_values_and_header(tmp_path):
    values = array_of(6, 7, 8)
    nib.save(nib.Nifti1Image(values, OBLIQUE), tmp_path / "a.nii.gz")
    for path in (tmp_path / "a.nii.gz", str(tmp_path / "a.nii.gz")):
        image = read_image(path)
        assert image.shape == (1, 6, 7, 8)
        np.testing.assert_array_equal(image[0].numpy(), values)
        np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-5)


def test_4d_nifti_has_channels(tmp_path):
    values = array_of(6, 7, 8, 3)
    nib.save(nib.Nifti1Image(values, OBLIQUE), tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    assert image.shape == (3, 6, 7, 8)
    np.testing.assert_array_equal(image[2].numpy(), values[..., 2])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float64])
def test_types_of_files(tmp_path, dtype):
    values = (100 * array_of(6, 7, 8)).astype(dtype)
    nib.save(nib.Nifti1Image(values, OBLIQUE), tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz")
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image[0].numpy(), values, rtol=1e-6)


def test_single_slice_is_an_image_in_2d(tmp_path):
    nib.save(nib.Nifti1Image(array_of(6, 7, 1), np.diag([-2.0, 3.0, 4.0, 1.0])), tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz")
    assert image.shape == (1, 6, 7)
    assert Grid.of(image).spacing == (2.0, 3.0)


def test_itk_formats_are_ras(tmp_path):
    values = (array_of(6, 7, 8) * 1000).astype(np.int16)
    picture = itk.image_from_array(np.ascontiguousarray(values.T))
    picture.SetSpacing([0.5, 1.5, 2.0])
    picture.SetOrigin([10.0, 20.0, 30.0])
    itk.imwrite(picture, str(tmp_path / "a.mha"))
    image = read_image(tmp_path / "a.mha")
    np.testing.assert_array_equal(image[0].numpy(), values)
    expected = np.diag([-0.5, -1.5, 2.0, 1.0])
    expected[:3, 3] = [-10.0, -20.0, 30.0]
    np.testing.assert_allclose(image.affine, expected)


def test_real_png(realdata):
    path = realdata / "2d_itk_brain" / "slice" / "BrainT1Slice.png"
    if not path.exists():
        pytest.skip("the real images hold no BrainT1Slice.png")
    image = read_image(path)
    assert image.ndim == 3 and image.dtype == torch.float32
    assert Grid.of(image).dims == 2


def test_arrays_and_tensors():
    array = (1000 * array_of(5, 6)).astype(">u2")  # neither unsigned nor big-endian exists in torch
    image = read_image(array)
    np.testing.assert_array_equal(image[0].numpy(), array.astype(np.float32))
    assert torch.equal(Grid.of(image).affine, torch.eye(3, dtype=torch.float64))
    assert read_image(array_of(5, 6, 7)).shape == (1, 5, 6, 7)
    np.testing.assert_array_equal(read_image(array[::-1])[0].numpy(), array[::-1].astype(np.float32))
    assert read_image(torch.rand(2, 5, 6)).shape == (2, 5, 6)
    mine = MetaTensor(torch.rand(1, 5, 6, 7), affine=torch.as_tensor(OBLIQUE))
    assert read_image(mine) is mine


BAD = {
    "empty": np.zeros((0, 8)),
    "1d": np.zeros(8),
    "4d": np.zeros((4, 4, 4, 4)),
    "thin": np.zeros((3, 50)),
    "complex": np.zeros((8, 8), dtype=np.complex64),
    "text": np.full((8, 8), "a"),
    "objects": np.full((8, 8), None),
    "list": [[1.0, 2.0]] * 8,
    "none": None,
    "number": 3,
    "no channel": torch.rand(8, 8),
    "batch": torch.rand(1, 1, 8, 8, 8),
    "complex tensor": torch.zeros(1, 8, 8, dtype=torch.complex64),
    "empty tensor": torch.zeros(1, 0, 8),
    "no channels": torch.zeros(0, 8, 8),
    "singular": MetaTensor(torch.rand(1, 8, 8, 8), affine=torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0]))),
    "nan header": MetaTensor(torch.rand(1, 8, 8, 8), affine=torch.full((4, 4), float("nan"))),
    "lps": MetaTensor(torch.rand(1, 8, 8, 8), meta={"space": "LPS"}),
}


@pytest.mark.parametrize("case", list(BAD))
def test_refuses_what_is_no_image(case):
    with pytest.raises(RegistrationError) as caught:
        read_image(BAD[case], "moving")
    assert caught.value.argument.split(".")[0] == "moving"


@pytest.mark.parametrize("case", ["missing", "empty", "text", "truncated", "folder", "unknown"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".png"])
def test_refuses_files(tmp_path, case, suffix):
    path = tmp_path / f"image{suffix}"
    if case == "empty":
        path.touch()
    elif case == "text":
        path.write_text("this is no image" * 100)
    elif case == "folder":
        path.mkdir()
    elif case == "unknown":
        path = tmp_path / "image.unknown"
        path.write_bytes(bytes(500))
    elif case == "truncated":
        if suffix == ".nii":
            whole = tmp_path / "whole.nii"
            nib.save(nib.Nifti1Image(array_of(8, 8, 8), np.eye(4)), whole)
        else:
            whole = tmp_path / f"whole{suffix}"
            values = (255 * array_of(64, 64)).astype(np.uint8)
            itk.imwrite(itk.image_from_array(values), str(whole))
        content = whole.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RegistrationError) as caught:
        read_image(path, "fixed")
    assert caught.value.argument == "fixed"
    assert str(path) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_channel():
    image = MetaTensor(torch.arange(2 * 5 * 6).reshape(2, 5, 6).to(torch.int16))
    for index in (1, -1):
        values = channel(image, index, "fixed")
        assert values.dtype == torch.float32 and not isinstance(values, MetaTensor)
        assert torch.equal(values, image.as_tensor()[1:].float())
    for index in (2, -3, 0.0, True, None, "0"):
        with pytest.raises(RegistrationError) as caught:
            channel(image, index, "moving")
        assert caught.value.argument == "moving_channel"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_channel_that_is_not_finite(value):
    image = MetaTensor(torch.rand(2, 5, 6))
    image[1, 2, 3] = value
    with pytest.raises(RegistrationError, match="fixed: .*finite"):
        channel(image, 1, "fixed")
    assert channel(image, 0, "fixed").shape == (1, 5, 6)


def test_channel_that_is_constant():
    with pytest.raises(RegistrationError, match="moving: .*constant"):
        channel(MetaTensor(torch.full((1, 5, 6), 3)), 0, "moving")


# --------------------------------------------------------------------------------------------------------------------
# isotropic grid
# --------------------------------------------------------------------------------------------------------------------


def grid_of(shape: tuple[int, ...], *spacing: float) -> Grid:
    return Grid(shape, torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))


def test_default_spacing():
    assert working_spacing(grid_of((100, 120), 1.0, 1.0), grid_of((90, 90), 0.8, 3.0), None) == 0.8
    assert working_spacing(grid_of((2048, 2048), 1.0, 1.0), grid_of((90, 90), 1.0, 1.0), None) == 4.0
    fine = grid_of((180, 220, 180), 1.0, 1.0, 1.0)
    assert working_spacing(fine, fine, None) == 2.0
    coarse = grid_of((60, 60, 40), 3.0, 3.0, 4.0)
    assert working_spacing(coarse, coarse, None) == 3.0
    micro = grid_of((100, 100, 100), 0.01, 0.01, 0.01)
    assert 48 <= 1.0 / working_spacing(micro, micro, None) <= 192
    assert working_spacing(fine, fine, 4.5) == 4.5


@pytest.mark.parametrize("wanted", [0, 0.0, -1.0, float("nan"), float("inf"), 1e-3, 1e6, "2", True, (2, 2, 2)])
def test_spacing_that_makes_no_grid(wanted):
    grid = grid_of((180, 220, 180), 1.0, 1.0, 1.0)
    with pytest.raises(RegistrationError) as caught:
        working_spacing(grid, grid, wanted)
    assert caught.value.argument == "spacing"


@pytest.mark.parametrize("shape", [(20, 20), (20, 13), (9, 12, 10)])
def test_an_image_that_fits_is_copied(shape):
    values = torch.as_tensor(array_of(1, *shape))
    grid = grid_of(shape, *[1.5] * len(shape))
    side = max(shape)
    cube, where = on_isotropic_grid(values, grid, 1.5, side)
    assert cube.shape == (1, *[side] * len(shape)) and where.shape == cube.shape[1:]
    start = apply_affine(torch.linalg.inv(where.affine), grid.affine[:-1, -1][None])[0].round().int().tolist()
    inside = cube[(0, *[slice(a, a + n) for a, n in zip(start, shape, strict=True)])]
    torch.testing.assert_close(inside, scale_to_unit_range(values[None])[0, 0], atol=1e-5, rtol=0)
    # nothing but background beyond it
    assert float(cube.sum()) == pytest.approx(float(inside.sum()), rel=1e-4)


def test_world_place_is_kept_on_an_oblique_grid():
    shape = (30, 24, 20)
    grid = Grid(shape, torch.as_tensor(OBLIQUE))
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij"), dim=-1).double()
    place = torch.tensor([17.0, 9.0, 11.0], dtype=torch.float64)
    world = apply_affine(grid.affine, place[None])[0]
    distance = (apply_affine(grid.affine, index.reshape(-1, 3)) - world).norm(dim=1).reshape(shape)
    blob = torch.exp(-0.5 * (distance / 4.0) ** 2).float()[None]
    side = int(float(grid.extent.max()) / 1.5)
    cube, where = on_isotropic_grid(blob, grid, 1.5, side)
    weight = cube[0].double()
    steps = torch.stack(torch.meshgrid(*[torch.arange(side)] * 3, indexing="ij"), dim=-1).double()
    center = (weight[..., None] * steps).sum(dim=(0, 1, 2)) / weight.sum()
    assert (apply_affine(where.affine, center[None])[0] - world).norm() < 0.3


def test_fine_noise_does_not_alias():
    noise = torch.as_tensor(array_of(1, 160, 160))
    grid = grid_of((160, 160), 1.0, 1.0)
    cube, _ = on_isotropic_grid(noise, grid, 8.0, 20)
    fine, _ = on_isotropic_grid(noise, grid, 1.0, 160)
    assert cube[0, 2:-2, 2:-2].std() < 0.3 * fine.std()
