# SPDX-License-Identifier: Apache-2.0
"""Tests of reading and writing images."""

from __future__ import annotations

from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged
from PIL import Image as Picture

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
    assert image.dtype == (torch.float64 if dtype == np.float64 else torch.float32)
    np.testing.assert_array_equal(image[0].numpy(), values)
    assert load_image(tmp_path / "a.nii.gz").values.dtype == torch.from_numpy(values).dtype


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


# --------------------------------------------------------------------------------------------------------------------
# as the file states it
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["i2", "i4", "f4", "f8", "u2"])
def test_foreign_byte_order(tmp_path, dtype):
    values = (1000 * array_of(6, 7, 8)).astype(f"<{dtype}")
    nib.save(nib.Nifti1Image(values, OBLIQUE), tmp_path / "le.nii.gz")
    big = nib.Nifti1Image(values, OBLIQUE, nib.Nifti1Header(endianness=">"), dtype=values.dtype)
    nib.save(big, tmp_path / "be.nii.gz")
    one, two = load_image(tmp_path / "le.nii.gz"), load_image(tmp_path / "be.nii.gz")
    assert one.values.dtype == two.values.dtype and torch.equal(one.values, two.values)
    assert torch.equal(one.affine, two.affine)
    np.testing.assert_array_equal(one.values[0].numpy(), values)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_freesurfer(tmp_path, dtype):
    values = (100 * array_of(6, 7, 8)).astype(dtype)
    nib.save(nib.MGHImage(values, OBLIQUE), tmp_path / "a.mgz")
    image = load_image(tmp_path / "a.mgz")
    np.testing.assert_array_equal(image.values[0].numpy(), values)
    np.testing.assert_array_equal(image.affine, nib.load(tmp_path / "a.mgz").affine)


def turned(degrees: float, scale: float = 1.0) -> np.ndarray:
    matrix, angle = OBLIQUE.copy(), np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    matrix[:3, :3] = turn @ np.diag([-2.0, 3.0, 4.0]) * scale
    return matrix


def test_the_sform_counts_where_headers_disagree(tmp_path):
    """As in nibabel, whatever pixdim and the qform say."""
    image = nib.Nifti1Image(array_of(6, 7, 8), np.eye(4))
    image.set_sform(turned(25), 1)
    image.header["qform_code"], image.header["pixdim"][:4] = 0, (1, 3, 3, 3)
    nib.save(image, tmp_path / "a.nii.gz")
    image = nib.Nifti1Image(array_of(6, 7, 8), turned(25))
    image.set_qform(turned(25), 1)
    image.set_sform(turned(-10, 1.08), 2)
    nib.save(image, tmp_path / "b.nii.gz")
    image.header["sform_code"] = 0
    image.set_qform(turned(25), 1)
    nib.save(nib.Nifti1Image(array_of(6, 7, 8), None, image.header), tmp_path / "c.nii.gz")
    for name in "abc":
        read = load_image(tmp_path / f"{name}.nii.gz")
        np.testing.assert_array_equal(read.affine, nib.load(tmp_path / f"{name}.nii.gz").affine)
        assert read.meta["notes"] == []


def test_what_a_header_leaves_open_is_noted(tmp_path):
    image = nib.Nifti1Image(array_of(6, 7, 8), None)
    image.header["qform_code"] = image.header["sform_code"] = 0
    nib.save(image, tmp_path / "n.nii.gz")
    read = load_image(tmp_path / "n.nii.gz")
    np.testing.assert_array_equal(read.affine, nib.load(tmp_path / "n.nii.gz").affine)
    assert read.meta["notes"] == ["n.nii.gz does not state its orientation (its qform and sform codes are 0)"]
    image = nib.Nifti1Image(array_of(6, 7, 8), OBLIQUE)
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "m.nii.gz")
    assert "microns, read as mm" in load_image(tmp_path / "m.nii.gz").meta["notes"][0]
    nib.save(nib.AnalyzeImage(array_of(6, 7, 8), None), tmp_path / "a.img")
    assert "orientation" in load_image(tmp_path / "a.img").meta["notes"][0]


@pytest.mark.parametrize("dtype", ["i4", "u4", "i8", "u8", "f8"])
def test_large_labels_stay_as_they_are(tmp_path, dtype):
    """Such as the identifiers of the Allen atlas; single precision would change them."""
    ids = np.array([0, 614454277, 312782546, 576073732], dtype=dtype)
    if dtype in ("i8", "u8"):
        ids[3] = 2**53 + 1
    values = np.random.default_rng(0).choice(ids, (6, 7, 8))
    nib.save(nib.Nifti1Image(values, OBLIQUE, dtype=values.dtype), tmp_path / "a.nii.gz")
    image = load_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(image.values[0].numpy().astype(dtype), values)
    assert torch.equal(read_image(tmp_path / "a.nii.gz").as_tensor(), image.values)
    write_image(tmp_path / "b.nii.gz", image, labels=True)
    back = nib.load(tmp_path / "b.nii.gz")
    assert back.get_data_dtype() == (values.dtype if dtype != "f8" else np.int32)
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), values)


def test_axes_of_one(tmp_path):
    values = array_of(6, 7, 8)
    for shape in ((6, 7, 8, 1), (6, 7, 8, 1, 1)):
        nib.save(nib.Nifti1Image(values.reshape(shape), OBLIQUE), tmp_path / "a.nii.gz")
        np.testing.assert_array_equal(load_image(tmp_path / "a.nii.gz").values[0].numpy(), values)
    # the components of a vector stand on a fifth axis
    nib.save(nib.Nifti1Image(array_of(6, 7, 8, 1, 3), OBLIQUE), tmp_path / "v.nii.gz")
    assert load_image(tmp_path / "v.nii.gz").values.shape == (3, 6, 7, 8)
    nib.save(nib.Nifti1Image(array_of(6, 7, 8, 2, 3), OBLIQUE), tmp_path / "w.nii.gz")
    with pytest.raises(RegistrationError, match="more than one axis beyond the third"):
        load_image(tmp_path / "w.nii.gz")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_of_every_direction(tmp_path, axis):
    affine = np.array([[-2.0, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])
    values = array_of(6, 7, 8).take([2], axis)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    image, kept = load_image(tmp_path / "a.nii.gz"), [a for a in range(3) if a != axis]
    np.testing.assert_array_equal(image.values[0].numpy(), values.squeeze(axis))
    # the plane's world are the two axes that it lies along
    np.testing.assert_array_equal(image.affine, affine[np.ix_([*kept, 3], [*kept, 3])])
    np.testing.assert_array_equal(np.array(image.meta["place"]), affine[:, [*kept, axis, 3]])
    through_monai = load_image(image.to_metatensor())
    assert torch.equal(through_monai.affine, image.affine) and through_monai.meta["place"] == image.meta["place"]
    write_image(tmp_path / "b.nii.gz", through_monai)
    back = nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(back.affine, affine[:, [*kept, axis, 3]])
    assert torch.equal(load_image(tmp_path / "b.nii.gz").values, image.values)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_oblique_slice_keeps_its_distances(tmp_path, axis):
    values = array_of(6, 7, 8).take([2], axis)
    nib.save(nib.Nifti1Image(values, OBLIQUE), tmp_path / "a.nii.gz")
    image, columns = load_image(tmp_path / "a.nii.gz"), np.delete(
        nib.load(tmp_path / "a.nii.gz").affine[:3, :3], axis, 1
    )
    plane = image.affine[:2, :2].numpy()
    np.testing.assert_allclose(plane.T @ plane, columns.T @ columns, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------------
# pictures
# --------------------------------------------------------------------------------------------------------------------


def picture(kind: str) -> np.ndarray:
    values = array_of(9, 12, 3)
    whole = (values * (65535 if "16" in kind else 255)).astype(np.uint16 if "16" in kind else np.uint8)
    return whole if "color" in kind else whole[..., 0]


@pytest.mark.parametrize("kind", ["gray", "gray16", "color", "color16"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pictures_as_itk_reads_them(tmp_path, kind, suffix):
    values, path = picture(kind), tmp_path / f"a{suffix}"
    vector = itk.image_from_array(values.astype(np.uint16 if "16" in kind else np.uint8), is_vector="color" in kind)
    itk.imwrite(vector, str(path))
    image = load_image(path)
    expected = values.T if "color" in kind else values.T[None]
    np.testing.assert_array_equal(image.values.numpy(), expected)
    np.testing.assert_allclose(image.affine, np.diag([-1.0, -1.0, 1.0]), atol=1e-7)
    assert image.meta["unit"] == "pixel" and bool(image.meta.get("color")) == ("color" in kind)
    assert image.meta["dtype"] == values.dtype.name


def test_color_is_registered_by_its_luminance(tmp_path):
    Picture.fromarray(picture("color")).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    gray = np.asarray(Picture.open(tmp_path / "a.png").convert("L")).T
    np.testing.assert_allclose(image.channel(0)[0], gray, atol=1)
    np.testing.assert_array_equal(image.channel(1)[0], picture("color")[..., 1].T)
    # the colors are kept, also in NIfTI
    write_image(tmp_path / "b.nii.gz", image)
    back = load_image(tmp_path / "b.nii.gz")
    assert back.meta["color"] and torch.equal(back.values, image.values)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "CMYK"])
def test_modes_of_pictures(tmp_path, mode):
    colors = Picture.fromarray(picture("color")).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    colors.save(path)
    plain = Picture.open(path).convert("L" if mode in ("LA", "1") else "RGB")
    values = load_image(path).values.numpy() * (255 if mode == "1" else 1)
    np.testing.assert_array_equal(values, np.asarray(plain).T if plain.mode == "RGB" else np.asarray(plain).T[None])


def test_a_photograph_keeps_the_resolution_that_itk_reads(tmp_path):
    Picture.fromarray(picture("gray")).save(tmp_path / "a.jpg", dpi=(100, 50))
    judge = itk.imread(str(tmp_path / "a.jpg"))
    np.testing.assert_allclose(Grid.of(read_image(tmp_path / "a.jpg")).spacing, list(judge.GetSpacing()))
    assert load_image(tmp_path / "a.jpg").meta["unit"] == "mm"


# --------------------------------------------------------------------------------------------------------------------
# other ways in
# --------------------------------------------------------------------------------------------------------------------


def test_every_way_in_gives_the_same_image(tmp_path):
    values = (100 * array_of(6, 7, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, turned(20)), tmp_path / "a.nii.gz")
    itk.imwrite(itk.imread(str(tmp_path / "a.nii.gz")), str(tmp_path / "a.mha"))
    itk.imwrite(itk.imread(str(tmp_path / "a.nii.gz")), str(tmp_path / "a.nrrd"))
    file = nib.load(tmp_path / "a.nii.gz")
    one = load_image(tmp_path / "a.nii.gz")
    loaded = LoadImaged(keys="image", image_only=True, ensure_channel_first=True)({"image": tmp_path / "a.nii.gz"})
    for two in (
        load_image(file),
        load_image(np.asanyarray(file.dataobj), affine=file.affine),
        load_image(torch.as_tensor(values)[None], affine=file.affine),
        load_image(loaded["image"]),
        load_image(read_image(tmp_path / "a.nii.gz")),
        load_image(tmp_path / "a.mha"),
        load_image(tmp_path / "a.nrrd"),
    ):
        np.testing.assert_array_equal(two.values.numpy(), one.values.numpy())
        np.testing.assert_allclose(two.affine, one.affine, atol=1e-5)
        assert two.meta["unit"] == "mm"
    with pytest.raises(RegistrationError, match="(?s)affine: .*has its own"):
        load_image(tmp_path / "a.nii.gz", "moving", affine=np.eye(4))
    with pytest.raises(RegistrationError, match="moving.affine"):
        load_image(values, "moving", affine=np.zeros((4, 4)))


def test_minc_has_the_geometry_that_nibabel_states():
    """Every MINC, PAR and BRIK file that nibabel brings for its own tests and that is large enough."""
    folder = Path(nib.__file__).parent / "tests" / "data"
    compared = 0
    for path in sorted(folder.glob("*.mnc")) + sorted(folder.glob("*.HEAD")) + sorted(folder.glob("Phantom*.PAR")):
        try:
            judge = nib.load(path)
            expected = judge.get_fdata()
        except Exception:  # one of its tests wants just that, or the format needs another package
            continue
        if min(expected.shape[:3]) < 4 or expected.ndim > 4:
            continue
        image = load_image(path)
        expected = np.moveaxis(expected, -1, 0) if expected.ndim == 4 else expected[None]
        np.testing.assert_allclose(image.values.numpy(), expected, rtol=1e-5)
        np.testing.assert_array_equal(image.affine, judge.affine)
        compared += 1
    if compared == 0:
        pytest.skip("this nibabel comes without its test data")


# --------------------------------------------------------------------------------------------------------------------
# back to a file
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope, intercept", [(1.0, 0.0), (1.0, -1024.0), (0.5, 10.0)])
def test_written_with_the_slope_of_the_file_and_never_wrapped(tmp_path, slope, intercept):
    stored = np.random.default_rng(0).integers(0, 4000, (6, 7, 8)).astype(np.int16)
    file = nib.Nifti1Image(stored, OBLIQUE)
    file.header.set_slope_inter(slope, intercept)
    nib.save(file, tmp_path / "a.nii.gz")
    image = load_image(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(image.values[0], stored * slope + intercept)
    moved = image.values.double() + 0.3 * slope
    moved[0, 0, 0, :3] = torch.tensor([1e6, -1e6, float("nan")])
    write_image(tmp_path / "b.nii.gz", Image(moved, image.affine, {}), like=image)
    back = nib.load(tmp_path / "b.nii.gz")
    raw = np.asanyarray(back.dataobj.get_unscaled())
    assert back.get_data_dtype() == np.int16
    assert (back.dataobj.slope, back.dataobj.inter) == (slope, intercept)
    np.testing.assert_array_equal(raw[0, 0, :2], [32767, -32768])
    raw[0, 0, :3] = stored[0, 0, :3]
    np.testing.assert_array_equal(raw, stored)


def test_a_sheared_image_has_no_quaternion(tmp_path):
    for affine, code in ((OBLIQUE, 0), (turned(20), 1)):
        write_image(tmp_path / "a.nii.gz", load_image(array_of(6, 7, 8), affine=affine))
        back = nib.load(tmp_path / "a.nii.gz")
        assert int(back.header["qform_code"]) == code and int(back.header["sform_code"]) == 1
        np.testing.assert_allclose(back.affine, affine, atol=1e-5)


def test_write_refuses_other_names(tmp_path):
    with pytest.raises(RegistrationError, match="path: .*ends in .nii or .nii.gz"):
        write_image(tmp_path / "a.mha", load_image(array_of(6, 7, 8)))
    assert not list(tmp_path.iterdir())
