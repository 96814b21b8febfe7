# SPDX-License-Identifier: Apache-2.0
"""The deformable kind at the command: what it writes, what it says, and what ITK and the same command make of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage

from monai_zsreg.app.apply import compose_transforms
from monai_zsreg.app.cli import main
from monai_zsreg.app.report.pictures import grid_lines, planes_of
from monai_zsreg.geometry import Grid, apply_affine
from monai_zsreg.io import Image, write_transform
from monai_zsreg.registration.displacement import Deformation, map_points


@pytest.fixture(scope="module")
def bent(images: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The T1 slice bent, the T2 slice registered to it with its labels, and the results."""
    folder = tmp_path_factory.mktemp("bent")
    values = np.asarray(nib.load(images.t1).dataobj)
    rng = np.random.default_rng(0)
    field = np.stack([ndimage.gaussian_filter(rng.standard_normal(values.shape), 12) for _ in "xy"])
    field *= 3 / np.linalg.norm(field, axis=0).max()
    where = np.indices(values.shape) + field
    labels = np.asarray(nib.load(images.folder / "t2_labels.nii.gz").dataobj)
    for name, array, order in (("fixed", values, 1), ("fixed_labels", labels, 0)):
        moved = ndimage.map_coordinates(array, where, order=order)
        nib.save(nib.Nifti1Image(moved, nib.load(images.t1).affine), folder / f"{name}.nii.gz")
    fixed, moving = folder / "fixed.nii.gz", folder / "moving.nii.gz"
    shutil.copy(images.t2, moving)
    words = ["register", str(fixed), str(moving), "-o", str(folder), "-q", "--transform", "deformable"]
    assert main([*words, "--labels", str(images.folder / "t2_labels.nii.gz"), "--set", "stiffness=4"]) == 0
    out = folder / "moving"
    report = json.loads((out / "report.json").read_text())
    return SimpleNamespace(folder=folder, fixed=fixed, moving=moving, out=out, report=report, field=field)


def values(path: Path) -> np.ndarray:
    return np.squeeze(nib.load(path).get_fdata())


def test_the_results_are_written_and_described(bent: SimpleNamespace, images: SimpleNamespace) -> None:
    assert {path.name for path in bent.out.iterdir()} == {
        "moved.nii.gz", "moved_labels.nii.gz", "displacement.nii.gz", "transform.tfm", "overview.png", "report.html",
        "report.json",
    }  # fmt: skip
    report = bent.report
    assert report["transform"] == "deformable" and report["verdict"] == "PASS"
    assert report["covariance"] is None and "expected_error" not in report
    found = report["deformation"]
    assert 0.5 < found["displacement"]["median"] < found["displacement"]["max"] < 12
    assert 0 < found["determinant"]["min"] < 1 < found["determinant"]["max"] and found["folds"] == 0
    assert "no error bars" in found["not_known"]
    dice = [
        np.mean([2 * ((a == n) & (b == n)).sum() / ((a == n).sum() + (b == n).sum()) for n in (1, 2)])
        for a, b in ((values(bent.folder / "fixed_labels.nii.gz"), values(p)) for p in (
            bent.out / "moved_labels.nii.gz", images.folder / "t2_labels.nii.gz"))
    ]  # fmt: skip
    assert dice[0] > dice[1] + 0.1


def test_itk_reads_in_the_field_where_the_image_came_from(bent: SimpleNamespace) -> None:
    field = sitk.ReadImage(str(bent.out / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    index = np.random.default_rng(0).integers(5, np.array(bent.field.shape[1:]) - 5, (300, 2))
    # 2 mm pixels; LPS
    places = -np.array([list(transform.TransformPoint((-2.0 * point).tolist())) for point in index])
    source = (places - np.array(nib.load(bent.moving).affine[:2, 3])) / 2.0
    expected = ndimage.map_coordinates(values(bent.moving), source.T, order=1)
    np.testing.assert_allclose(values(bent.out / "moved.nii.gz")[tuple(index.T)], expected, atol=2.0)


def test_the_page_shows_grid_and_determinant_and_is_drawn_anew(bent: SimpleNamespace) -> None:
    page = bent.out / "report.html"
    text = page.read_text()
    for words in ("Grid that the map bends", "Jacobian determinant, minimum", "there are no error bars"):
        assert words in text
    assert "Expected error" not in text
    page.unlink()
    assert main(["report", str(bent.out)]) == 0
    numbers = re.compile(r"<td.*")
    assert numbers.findall(page.read_text()) == numbers.findall(text)
    assert page.read_text().count("<img") == text.count("<img")


def test_a_bent_grid_is_straight_where_nothing_moves() -> None:
    grid = Grid((48, 48), torch.eye(3, dtype=torch.float64))
    (plane,) = planes_of(Image(torch.zeros(1, 48, 48), grid.affine))
    shift = torch.zeros(2, 48, 48)
    turn = torch.tensor([[0.0, -1.0, 5.0], [1.0, 0.0, 2.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    black = np.zeros((48, 48))
    straight = grid_lines(Deformation(turn, shift, grid), plane, black)[..., 0] > 0
    assert (straight == (straight.all(0)[None] | straight.all(1)[:, None])).all() and 0.4 < straight.mean() < 0.9
    shift[0, 20:28, 20:28] = 1.0
    away = (grid_lines(Deformation(turn, shift, grid), plane, black)[..., 0] > 0) != straight
    assert away.any() and set(np.argwhere(away).flatten()) <= set(range(18, 31))


def test_apply_moves_labels_images_and_points_by_a_field(bent: SimpleNamespace, images: SimpleNamespace) -> None:
    field, out = str(bent.out / "displacement.nii.gz"), bent.folder / "again.nii.gz"
    pair = ["--fixed", str(bent.fixed), "-o", str(out), "--moving"]
    assert main(["apply", field, *pair, str(images.folder / "t2_labels.nii.gz"), "--labels"]) == 0
    assert (values(out) == values(bent.out / "moved_labels.nii.gz")).mean() > 0.999
    assert main(["apply", field, *pair, str(bent.moving)]) == 0
    np.testing.assert_allclose(values(out), values(bent.out / "moved.nii.gz"), atol=1.0)

    # points of the foreground, there and back
    index = np.argwhere(values(bent.fixed) > values(bent.fixed).mean())[::40]
    where = 2.0 * index
    given, there, back = (bent.folder / f"{name}.csv" for name in ("given", "there", "back"))
    np.savetxt(given, where, delimiter=",", header="x,y", comments="")
    assert main(["apply", field, "--points", str(given), "--save-points", str(there)]) == 0
    moved = np.loadtxt(there, delimiter=",", skiprows=1)
    truth = where + 2.0 * bent.field[(slice(None), *index.T)].T + np.array(images.shift)
    assert np.median(np.linalg.norm(moved - truth, axis=1)) < 0.6 * np.median(np.linalg.norm(where - truth, axis=1))
    assert main(["apply", field, "--invert", "--points", str(there), "--save-points", str(back)]) == 0
    np.testing.assert_allclose(np.loadtxt(back, delimiter=",", skiprows=1), where, atol=2e-3)


def test_fields_and_matrices_are_composed(bent: SimpleNamespace, images: SimpleNamespace) -> None:
    field, shift = str(bent.out / "displacement.nii.gz"), bent.folder / "shift.tfm"
    matrix = np.array([[0.9, -0.2, 4.0], [0.2, 1.1, -3.0], [0.0, 0.0, 1.0]])
    write_transform(shift, matrix)
    where = torch.from_numpy(np.random.default_rng(0).uniform(60, 120, (50, 2)))
    whole = Deformation.load(field)
    turned = (apply_affine(torch.from_numpy(matrix), points) for points in (where, whole.apply(where)))
    expected = [whole.apply(next(turned)), next(turned), whole.apply(whole.apply(where))]
    orders = [(shift, field), (field, shift), (field, field)]
    # exact; where both bend, between the points of a lattice of 4 mm
    for order, wanted, off in zip(orders, expected, (2e-3, 2e-3, 0.2), strict=True):
        np.testing.assert_allclose(map_points(compose_transforms(order), where), wanted, atol=off)
    # the other way, on the grid of an image, for which the lattice of an inverse is no substitute
    saved = bent.folder / "inverse.nii.gz"
    words = ["apply", field, str(shift), "--invert", "--save-transform", str(saved)]
    assert main(words) == 2
    assert main([*words, "--fixed", str(bent.fixed)]) == 0
    back = Deformation.load(saved).apply(where)
    np.testing.assert_allclose(map_points(compose_transforms([field, shift]), back), where, atol=0.1)


@pytest.mark.parametrize(
    ("words", "argument"),
    [
        (["--transform", "deformable", "--preset", "keypoints"], "transform"),
        (["--transform", "deformable", "--set", "stiffness=-1"], "stiffness"),
        (["--transform", "deformable", "--set", "stifness=1"], "stiffness"),
    ],
)
def test_wrong_arguments_are_told(images: SimpleNamespace, tmp_path: Path, capsys, words, argument: str) -> None:
    assert main(["register", str(images.t1), str(images.t2), "-o", str(tmp_path), *words]) == 2
    assert argument in capsys.readouterr().err


def test_wrong_fields_are_told(bent: SimpleNamespace, images: SimpleNamespace, tmp_path: Path, capsys) -> None:
    field, out = str(bent.out / "displacement.nii.gz"), str(tmp_path / "out")
    pair = ["--fixed", str(bent.fixed), "--moving", str(bent.moving), "-o", f"{out}.nii.gz"]
    write_transform(tmp_path / "solid.tfm", np.eye(4))
    for words, told in (
        ([str(images.t1), *pair], "displacement field"),
        ([field, str(tmp_path / "solid.tfm"), *pair], "2D transform"),
        ([field, "--save-transform", f"{out}.tfm"], "nii"),
        ([field, "--save-transform", f"{out}.nii.gz", "--save-format", "fsl"], "save-format"),
    ):
        assert main(["apply", *words]) == 2
        assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["solid.tfm"]


def test_a_bent_failure_has_its_status_and_no_stale_field(images: SimpleNamespace, tmp_path: Path) -> None:
    words = ["-o", str(tmp_path), "--no-page", "-q", "--name", "x"]
    assert main(["register", str(images.t1), str(images.noise), *words, "--transform", "deformable"]) == 3
    assert main(["register", str(images.t1), str(images.t2), *words]) == 0
    assert not (tmp_path / "x" / "displacement.nii.gz").exists()
