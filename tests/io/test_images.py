# SPDX-License-Identifier: Apache-2.0
"""Tests of reading and writing images."""

from __future__ import annotations

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid
from monai_zsreg.io import Image, load_image, read_image, write_image

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
    assert image.dtype == torch.from_numpy(values).dtype
    np.testing.assert_array_equal(image[0].numpy(), values)


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
    assert image.ndim == 3
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
    assert torch.equal(read_image(mine), mine) and torch.equal(read_image(mine).affine, mine.affine)
    wrapped = load_image(mine)
    assert load_image(wrapped) is wrapped


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
    image = load_image(torch.arange(2 * 5 * 6).reshape(2, 5, 6).to(torch.int16))
    for index in (1, -1, np.int64(1)):
        values = image.channel(index, "fixed")
        assert values.dtype == torch.float32 and torch.equal(values, image.values[1:].float())
    for index in (2, -3, 0.0, True, None, "0"):
        with pytest.raises(RegistrationError) as caught:
            image.channel(index, "moving")
        assert caught.value.argument == "moving_channel"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_seen(value):
    values = torch.rand(1, 5, 6) + 1
    assert load_image(values).seen is None
    values[0, 2, 3] = value
    image = load_image(values)
    assert image.seen.shape == (1, 5, 6) and int((~image.seen).sum()) == 1 and not image.seen[0, 2, 3]
    assert torch.isfinite(image.channel(0)).all()
    with pytest.raises(RegistrationError, match="moving: .*finite"):
        load_image(torch.full((1, 5, 6), value)).channel(0, "moving")


def test_channel_that_is_constant():
    with pytest.raises(RegistrationError, match="moving: .*constant"):
        load_image(torch.full((1, 5, 6), 3)).channel(0, "moving")


def test_written_in_its_own_type(tmp_path):
    values = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8) - 100
    nib.save(nib.Nifti1Image(values, OBLIQUE), tmp_path / "a.nii.gz")
    image = load_image(tmp_path / "a.nii.gz")
    halves = Image(image.values + 0.4, image.affine, image.meta)
    write_image(tmp_path / "b.nii.gz", halves)
    back = nib.load(tmp_path / "b.nii.gz")
    assert back.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), values)
    np.testing.assert_allclose(back.affine, OBLIQUE, atol=1e-5)
