# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_zsreg.benchmark import data
from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid

from .conftest import AFFINE, RESIDUAL, SHAPE


def test_find_pairs_ignores_the_prefix_and_attaches_residuals(subjects: Path) -> None:
    pairs, left_out = data.find_pairs(subjects, [("t1", "t2"), ("t1", "flair")])
    assert [p.name for p in pairs] == ["a:t1-t2", "b:t1-t2", "c:t1-t2"]
    assert left_out == []
    known = data.read_residuals(subjects / "residuals.csv")
    attached = data.attach_residuals(pairs, known)
    assert attached[0].residual == RESIDUAL
    assert attached[2].residual is None
    turned = data.attach_residuals([pairs[0].reversed()], known)[0]
    assert turned.residual == tuple(-r for r in RESIDUAL)
    assert attached[0].reversed() == turned


def test_pairs_on_different_grids_are_left_out(subjects: Path, tmp_path: Path) -> None:
    shutil.copytree(subjects / "a", tmp_path / "a")
    image = nib.load(tmp_path / "a" / "t2.nii.gz")
    moved = AFFINE.copy()
    moved[0, 3] += 1.0
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved), tmp_path / "a" / "t2.nii.gz")
    pairs, left_out = data.find_pairs(tmp_path, [("t1", "t2")])
    assert pairs == [] and left_out == ["a: t1 and t2 lie on different grids"]


def test_datalist(subjects: Path, tmp_path: Path) -> None:
    listed = subjects / "pairs.json"
    item = {"fixed": "a/t1.nii.gz", "moving": "a/t2.nii.gz", "subject": "x", "residual": [1, 0, 0]}
    listed.write_text(json.dumps([item]))
    pair = data.read_datalist(listed)[0]
    assert pair.subject == "x" and pair.residual == (1.0, 0.0, 0.0)
    for wrong, name in (
        ([{"fixed": "a/t1.nii.gz"}], "moving"),
        ([item | {"moving": "none.nii.gz"}], "exists"),
        ([item | {"residual": [1, 2]}], "3 finite"),
        ([], "list"),
    ):
        listed.write_text(json.dumps(wrong))
        with pytest.raises(RegistrationError, match=name):
            data.read_datalist(listed)
    with pytest.raises(RegistrationError, match="folder"):
        data.find_pairs(tmp_path / "missing", [("t1", "t2")])


def test_residuals_file_with_other_columns(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("subject,from,to\n1,2,3\n")
    with pytest.raises(RegistrationError, match="residuals"):
        data.read_residuals(tmp_path / "r.csv")


def test_superior_axis_and_slices() -> None:
    # array axes: first points to feet, second to the right, third to the front
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -1, 1, 1, 1
    assert data.superior_axis(Grid((10, 20, 30), affine)) == 0
    mask = np.zeros(SHAPE, bool)
    mask[10:30, 10:40, 12:25] = True
    assert data.slices_of(mask, 2, 3) == [15, 18, 21]
    assert data.slices_of(np.zeros(SHAPE, bool), 2, 3) == []


def test_foreground_of_stripped_and_whole_images() -> None:
    image = np.zeros((40, 40), np.float32)
    image[10:30, 12:28] = 5
    assert data.foreground(image).sum() == 20 * 16
    noisy = image * 20 + np.random.default_rng(0).normal(0, 1, image.shape).astype(np.float32)
    seen = data.foreground(noisy)
    assert (seen == (image > 0)).mean() > 0.99
