# SPDX-License-Identifier: Apache-2.0
"""Tests of applying transforms that exist, judged by ITK."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from phantoms import sitk_moved
from scipy import ndimage

from monai_zsreg.app.apply import compose_transforms, move_points
from monai_zsreg.app.cli import main
from monai_zsreg.errors import RegistrationError
from monai_zsreg.io import Landmarks, read_transform, write_transform

# orthogonal to the last digit, or ITK and the quaternion disagree about the header
_U, _, _V = np.linalg.svd(np.array([[0.98, -0.17, 0.05], [0.18, 0.97, -0.1], [-0.03, 0.1, 0.99]]))
ROTATION = _U @ _V


@pytest.fixture
def pair(tmp_path: Path) -> SimpleNamespace:
    """An oblique fixed and an anisotropic LAS moving image, labels, and two transforms that follow each other."""
    rng = np.random.default_rng(0)
    first, second = np.eye(4), np.eye(4)
    first[:3, :3], first[:3, 3] = ROTATION, (3.0, -2.0, 1.0)
    second[:3, :3], second[:3, 3] = np.diag([1.05, 0.97, 1.0]), (-1.0, 4.0, 0.5)
    fixed_affine, moving_affine = np.eye(4), np.diag([-1.5, 1.0, 2.0, 1.0])
    fixed_affine[:3, :3] = ROTATION @ np.diag([1.2, 1.4, 1.6])
    fixed_affine[:3, 3] = -20.0, -25.0, -15.0
    moving_affine[:3, 3] = 25.0, -22.0, -20.0
    values = ndimage.gaussian_filter(rng.random((34, 40, 22)), 2).astype(np.float32)
    labels = (values > np.median(values)).astype(np.int16) * 7
    for name, data, affine in (
        ("fixed", np.zeros((30, 28, 24), np.float32), fixed_affine),
        ("moving", values, moving_affine),
        ("labels", labels, moving_affine),
    ):
        image = nib.Nifti1Image(data, affine)
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        nib.save(image, tmp_path / f"{name}.nii.gz")
    write_transform(tmp_path / "first.tfm", first)
    write_transform(tmp_path / "second.txt", second, format="text")
    paths = {name: str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving", "labels")}
    return SimpleNamespace(first=first, second=second, folder=tmp_path, **paths)


def itk_moved(pair: SimpleNamespace, source: str, transform: Path, nearest: bool = False) -> np.ndarray:
    """What ITK makes of the moving image with ``transform``, array axes as nibabel has them."""
    moving, fixed = (sitk.ReadImage(str(path), sitk.sitkFloat32) for path in (source, pair.fixed))
    return sitk_moved(moving, fixed, sitk.ReadTransform(str(transform)), nearest)


def test_composition_moves_an_image_as_itk_does(pair: SimpleNamespace) -> None:
    out, both = pair.folder / "moved.nii.gz", pair.folder / "both.tfm"
    options = ["apply", str(pair.folder / "first.tfm"), str(pair.folder / "second.txt")]
    images = ["--fixed", pair.fixed, "--moving", pair.moving]
    main([*options, *images, "--output", str(out), "--save-transform", str(both)])
    np.testing.assert_allclose(read_transform(both), pair.second @ pair.first, atol=1e-9)
    ours, theirs = nib.load(out).get_fdata(), itk_moved(pair, pair.moving, both)
    inside = ndimage.binary_erosion(theirs > 0, iterations=2)
    assert inside.sum() > 2000
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-3)
    np.testing.assert_allclose(nib.load(out).affine, nib.load(pair.fixed).affine, atol=1e-5)


def test_labels_stay_whole_numbers_and_are_itks(pair: SimpleNamespace) -> None:
    out = pair.folder / "moved.nii.gz"
    first = str(pair.folder / "first.tfm")
    images = ["--fixed", pair.fixed, "--moving", pair.labels]
    main(["apply", first, *images, "--labels", "--output", str(out)])
    ours, theirs = np.asarray(nib.load(out).dataobj), itk_moved(pair, pair.labels, Path(first), nearest=True)
    assert ours.dtype.kind in "iu" and set(np.unique(ours)) == {0, 7}
    # ties between two voxels may fall either way
    assert (ours == theirs).mean() > 0.999


def test_outside_is_the_background_or_what_is_asked_for(pair: SimpleNamespace) -> None:
    """An image as CT stores it, that covers a part of the fixed one."""
    values = np.full((20, 20, 12), -1024, np.int16)
    values[4:-4, 4:-4, 3:-3] = 40
    ct, out = pair.folder / "ct.nii.gz", pair.folder / "moved.nii.gz"
    nib.save(nib.Nifti1Image(values, nib.load(pair.fixed).affine), ct)
    command = ["apply", str(pair.folder / "first.tfm"), "--fixed", pair.fixed, "--moving", str(ct), "-o", str(out)]
    for words, outside in (([], -1024), (["--fill-value=-2000"], -2000)):
        main([*command, *words])
        moved = np.asarray(nib.load(out).dataobj)
        assert moved.dtype == np.int16 and moved[-1, -1, -1] == outside
        assert moved.max() == 40 and (moved == outside).mean() > 0.5
    main([*command, "--labels", "--fill-value=9"])
    assert nib.load(out).dataobj[-1, -1, -1] == 9
    assert main([*command, "--fill-value=0.5"]) == 2


def test_points_go_where_the_matrix_takes_them_and_back(pair: SimpleNamespace, capsys) -> None:
    points = np.array([[1.0, 2.0, 3.0], [-10.0, 5.0, 0.0]])
    (pair.folder / "p.csv").write_text("x,y,z\n" + "\n".join(",".join(map(str, p)) for p in points))
    first = str(pair.folder / "first.tfm")
    saved = pair.folder / "q.csv"
    main(["apply", first, "--points", str(pair.folder / "p.csv"), "--save-points", str(saved)])
    moved = np.loadtxt(saved, delimiter=",", skiprows=1)
    np.testing.assert_allclose(moved, points @ pair.first[:3, :3].T + pair.first[:3, 3], atol=1e-9)
    main(["apply", first, "--invert", "--points", str(saved)])
    lines = capsys.readouterr().out.splitlines()
    np.testing.assert_allclose(np.loadtxt(lines[1:], delimiter=","), points, atol=1e-9)


def test_conversion_to_fsl_and_back(pair: SimpleNamespace) -> None:
    images = ["--fixed", pair.fixed, "--moving", pair.moving]
    fsl = str(pair.folder / "t.mat")
    main(["apply", str(pair.folder / "first.tfm"), *images, "--save-transform", fsl, "--save-format", "fsl"])
    # four rows of text, moving to fixed
    assert np.loadtxt(fsl).shape == (4, 4)
    np.testing.assert_allclose(compose_transforms([fsl], pair.fixed, pair.moving), pair.first, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ([], "output"),
        (["--output", "x.nii.gz"], "fixed"),
        (["--output", "x.png", "--fixed", "FIXED", "--moving", "MOVING"], "output"),
        (["--output", "MOVING", "--fixed", "FIXED", "--moving", "MOVING"], "output"),
        (["--points", "nowhere.csv"], "path"),
        (["--fixed", "FIXED", "--save-transform", "FIXED"], "save-transform"),
        (["--labels", "--save-transform", "x.tfm"], "output"),
        (["--fill-value=0", "--save-transform", "x.tfm"], "output"),
        (["nowhere.tfm", "--save-transform", "x.tfm"], "transform"),
    ],
)
def test_wrong_input_ends_with_the_reason(pair: SimpleNamespace, options: list[str], argument: str, capsys) -> None:
    before = set(pair.folder.iterdir())
    named = {"FIXED": pair.fixed, "MOVING": pair.moving}
    words = ["apply", str(pair.folder / "first.tfm"), *(named.get(option, option) for option in options)]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"zsreg apply: error: {argument}: ") and told.count("\n") == 1
    assert set(pair.folder.iterdir()) == before and not Path("x.tfm").exists()


def test_transforms_and_points_of_unequal_dimension(tmp_path: Path) -> None:
    write_transform(tmp_path / "two.tfm", np.eye(3))
    write_transform(tmp_path / "three.tfm", np.eye(4))
    with pytest.raises(RegistrationError, match="^transform"):
        compose_transforms([tmp_path / "two.tfm", tmp_path / "three.tfm"])
    with pytest.raises(RegistrationError, match="^points"):
        move_points(Landmarks(np.zeros((2, 3)), ["", ""]), np.eye(3))
