# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_zsreg.benchmark import pairs
from monai_zsreg.benchmark.brains import _axial_slices, full_slices
from monai_zsreg.benchmark.cases import Sample
from monai_zsreg.benchmark.volumes import Volume, foreground, labels_dice, read_volume
from monai_zsreg.errors import RegistrationError

from .conftest import AFFINE, RESIDUAL, SHAPE


def test_find_pairs_ignores_the_prefix_and_attaches_residuals(subjects: Path) -> None:
    found, left_out = pairs.find_pairs(subjects, [("t1", "t2"), ("t1", "flair")])
    assert [p.name for p in found if p.kind == "real"] == ["a:t1-t2", "b:t1-t2", "c:t1-t2"]
    assert [p.name for p in found if p.kind == "exact"] == ["a:t1-t2-sim", "b:t1-t2-sim", "c:t1-t2-sim"]
    assert left_out == []
    known = subjects / "residuals.csv"
    real = [p for p in found if p.kind == "real"]
    attached = pairs.with_residuals(real, known)
    assert attached[0].residual == RESIDUAL and attached[2].residual is None
    turned = pairs.with_residuals([real[0].reversed()], known)[0]
    assert turned.residual == tuple(-r for r in RESIDUAL)
    assert attached[0].reversed() == turned


def test_pairs_on_different_grids_are_left_out(subjects: Path, tmp_path: Path) -> None:
    shutil.copytree(subjects / "a", tmp_path / "a")
    image = nib.load(tmp_path / "a" / "t2.nii.gz")
    moved = AFFINE.copy()
    moved[0, 3] += 1.0
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved), tmp_path / "a" / "t2.nii.gz")
    found, left_out = pairs.find_pairs(tmp_path, [("t1", "t2")])
    assert [p.kind for p in found] == ["exact"] and left_out == ["a: t1 and t2 lie on different grids"]


def test_people_need_labels_of_anatomy(subjects: Path, tmp_path: Path) -> None:
    for name, labels in (("a", 10), ("b", 10), ("c", 1)):
        shutil.copytree(subjects / "a", tmp_path / name)
        seg = np.arange(np.prod(SHAPE)).reshape(SHAPE) % (labels + 1)
        nib.save(nib.Nifti1Image(seg.astype(np.int16), AFFINE), tmp_path / name / "seg.nii.gz")
    found, _ = pairs.find_pairs(tmp_path, [])
    assert {p.subject for p in found if p.kind == "between"} == {"a|b", "b|a"}


def test_datalist(subjects: Path) -> None:
    listed = subjects / "pairs.json"
    item = {"fixed": "a/t1.nii.gz", "moving": "a/t2.nii.gz", "subject": "x", "residual": [1, 0, 0]}
    listed.write_text(json.dumps({"testing": [item]}))
    pair = pairs.read_datalist(listed)[0]
    assert pair.name == "x:fixed-moving" and pair.residual == (1.0, 0.0, 0.0)
    for wrong, name in (
        ([{"fixed": "a/t1.nii.gz"}], "moving"),
        ([item | {"moving": "none.nii.gz"}], "exist"),
        ([item | {"residual": [1, 2]}], "3 finite"),
        ("text", "list"),
    ):
        listed.write_text(json.dumps(wrong))
        with pytest.raises(RegistrationError, match=name):
            pairs.read_datalist(listed)


def test_residuals_file_with_other_columns(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("subject,from,to\n1,2,3\n")
    with pytest.raises(RegistrationError, match="residuals"):
        pairs.with_residuals([], tmp_path / "r.csv")


def test_slices(subjects: Path) -> None:
    image = read_volume(subjects / "a" / "t1.nii.gz")
    spots = _axial_slices(image, 3, min_side=30)
    assert {axis for axis, _ in spots} == {2} and len(spots) == 3
    oblong = Volume(image.values, image.affine @ np.diag([1.0, 1.2, 1.0, 1.0]))
    assert _axial_slices(oblong, 3, min_side=30) == [] == _axial_slices(image, 3, min_side=200)
    mask = np.zeros(SHAPE, bool)
    mask[10:30, 10:40, 12:25] = True
    assert full_slices(mask, 2, 3) == [15, 18, 21]
    assert full_slices(np.zeros(SHAPE, bool), 2, 3) == []


def test_foreground_of_stripped_and_whole_images() -> None:
    image = np.zeros((40, 40), np.float32)
    image[10:30, 12:28] = 5
    assert foreground(image).sum() == 20 * 16
    noisy = image * 20 + np.random.default_rng(0).normal(0, 1, image.shape).astype(np.float32)
    assert (foreground(noisy) == (image > 0)).mean() > 0.99


def test_label_dice_follows_the_matrix() -> None:
    labels = np.zeros((20, 20), np.float32)
    labels[5:10, 5:15], labels[10:15, 5:15] = 1, 2
    one, two = Volume(labels, np.eye(3)), Volume(np.roll(labels, 3, axis=1), np.eye(3))
    back = np.array([[1, 0, 0], [0, 1, 3], [0, 0, 1.0]])
    dice = []
    for matrix in (back, np.eye(3)):
        result = Sample(one, two, np.zeros((1, 2)), None, labels=(one, two)).judge(matrix)
        assert result["label_dice_before"] == pytest.approx(0.7)
        dice.append(result["label_dice"])
    assert dice == [1.0, pytest.approx(0.7)]
    # a label that is moved out of view counts as 0, one that the moving image does not have not at all
    shown = np.where(labels == 2, 0, labels)
    assert labels_dice(one, one, shown) == 0.5 and labels_dice(one, Volume(shown, np.eye(3)), shown) == 1.0
