# SPDX-License-Identifier: Apache-2.0
"""What is known about a pair, figures before and after, and the table with its summary."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_zsreg.app.cli import main
from monai_zsreg.app.evaluate import measure_pair, read_known
from monai_zsreg.app.settings import Settings
from monai_zsreg.app.tables import MEASURES, mean_metrics, save_evaluation
from monai_zsreg.errors import RegistrationError
from monai_zsreg.io import Image, write_transform
from monai_zsreg.metrics import similarity
from monai_zsreg.registration import RegistrationResult

SHIFT = 4  # voxels of 1 mm along the first axis, from the fixed to the moving image


def square(start: int) -> Image:
    image = torch.zeros(1, 30, 30)
    image[0, start : start + 10, 8:20] = 1.0
    return Image(image, torch.eye(3, dtype=torch.float64), {"unit": "mm"})


def shifted(by: float) -> np.ndarray:
    matrix = np.eye(3)
    matrix[0, 2] = by
    return matrix


def measured(affine: np.ndarray, **known: Any) -> dict[str, Any]:
    """Measures of a bright square, the same one moved by `SHIFT`, and an answer."""
    fixed, moving = square(6), square(6 + SHIFT)
    result = RegistrationResult(affine, "PASS", [], {}, 0.1, 0.1, "robust", "affine", fixed, moving)
    pair = {"fixed": fixed, "moving": moving} | known
    return measure_pair(pair, result, result.resampled(), 0.0, Settings())


# --------------------------------------------------------------------------------------------------------------------
# what is known about a pair
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(tmp_path: Path) -> dict[str, Any]:
    """Two images, and files beside them."""
    header = np.diag([2.0, 2.0, 1.0, 1.0])
    mask = np.zeros((12, 15), dtype=np.uint8)
    mask[2:9, 3:12] = 3
    nib.save(nib.Nifti1Image(mask, header), tmp_path / "mask.nii.gz")
    nib.save(nib.Nifti1Image(mask * 0, header), tmp_path / "empty.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((9, 9, 9), dtype=np.uint8), np.eye(4)), tmp_path / "volume.nii.gz")
    write_transform(tmp_path / "truth.tfm", shifted(5.0))
    write_transform(tmp_path / "truth_3d.tfm", np.eye(4))
    (tmp_path / "f.csv").write_text("label,x,y\na,1,2\nb,3,4\n")
    (tmp_path / "m.csv").write_text("label,x,y\nb,30,40\na,10,20\n")
    (tmp_path / "m3.csv").write_text("label,x,y,z\nb,30,40,0\na,10,20,0\n")
    # the fixed grid is finer than the mask's
    values = torch.rand(1, 24, 30, generator=torch.Generator().manual_seed(0))
    fixed = Image(values, torch.eye(3, dtype=torch.float64))
    return {"fixed": fixed, "moving": fixed, "name": "n", "files": {}}


def test_reads_what_is_known(known: dict[str, Any], tmp_path: Path) -> None:
    names = {
        "fixed_mask": "mask.nii.gz", "moving_mask": "mask.nii.gz", "truth": "truth.tfm",
        "fixed_landmarks": "f.csv", "moving_landmarks": "m.csv",
    }  # fmt: skip
    pair = read_known(known | {key: str(tmp_path / name) for key, name in names.items()})
    assert pair["fixed_mask"].values.shape == (1, 24, 30)
    assert set(pair["fixed_mask"].values.unique().tolist()) == {0.0, 3.0}
    assert pair["moving_mask"].values.shape == (1, 12, 15)
    np.testing.assert_allclose(pair["truth"], shifted(5.0))
    # by label
    np.testing.assert_array_equal(pair["fixed_landmarks"], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(pair["moving_landmarks"], [[10, 20], [30, 40]])


@pytest.mark.parametrize(
    ("names", "argument"),
    [
        ({"fixed_mask": "empty.nii.gz"}, "fixed_mask"),
        ({"moving_mask": "volume.nii.gz"}, "moving_mask"),
        ({"fixed_labels": "f.csv"}, "fixed_labels"),
        ({"truth": "truth_3d.tfm"}, "truth"),
        ({"truth": "f.csv"}, "truth"),
        ({"fixed_landmarks": "mask.nii.gz", "moving_landmarks": "m.csv"}, "fixed_landmarks"),
        ({"fixed_landmarks": "f.csv", "moving_landmarks": "m3.csv"}, "moving_landmarks"),
    ],
)
def test_refuses_what_does_not_fit(known: dict[str, Any], tmp_path: Path, names: dict, argument: str) -> None:
    with pytest.raises(RegistrationError) as caught:
        read_known(known | {key: str(tmp_path / name) for key, name in names.items()})
    assert caught.value.argument == argument


# --------------------------------------------------------------------------------------------------------------------
# measures
# --------------------------------------------------------------------------------------------------------------------


def test_measures_before_and_after() -> None:
    metrics = measured(shifted(SHIFT), truth=shifted(SHIFT))
    # 10 rows, of which 6 overlap by the headers alone
    assert metrics["before"]["dice"] == pytest.approx(0.6)
    assert metrics["after"]["dice"] == pytest.approx(1.0)
    assert metrics["before"]["tre"] == pytest.approx(SHIFT) and metrics["after"]["tre"] == pytest.approx(0.0)
    assert metrics["after"]["mse"] < 1e-6 < metrics["before"]["mse"]
    assert metrics["region"] == "foreground" and metrics["dice_of"] == "foregrounds" and metrics["every"] == 1
    assert "landmark_tre" not in metrics["after"]
    expected = similarity(square(6).values, square(6 + SHIFT).values)
    assert {key: metrics["before"][key] for key in expected} == pytest.approx(expected)


def test_masks_take_the_place_of_the_foreground() -> None:
    masks = {"fixed_mask": square(6), "moving_mask": square(8)}
    metrics = measured(shifted(3.0), **masks)
    assert metrics["region"] == metrics["dice_of"] == "masks"
    assert metrics["before"]["dice"] == pytest.approx(0.8)  # 8 of 10 rows
    assert metrics["after"]["dice"] == pytest.approx(0.9)  # one row too far
    # the mask, not the foreground, is where the error against the truth is taken
    corner = torch.zeros(1, 30, 30)
    corner[0, :2, :2] = 1
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    small = Image(corner, torch.eye(3, dtype=torch.float64))
    near = measured(turn, fixed_mask=small, moving_mask=square(8), truth=np.eye(3))
    assert near["after"]["tre"] < 2.0 < 10.0 < measured(turn, truth=np.eye(3))["after"]["tre"]


def test_labels_take_the_place_of_both() -> None:
    fixed, moving = square(6), square(6 + SHIFT)
    for image in (fixed, moving):
        image.values[0, 20:24, 8:20] = 5
    masks = {"fixed_mask": square(6), "moving_mask": square(8)}
    metrics = measured(shifted(SHIFT), fixed_labels=fixed, labels=moving, **masks)
    assert (metrics["region"], metrics["dice_of"]) == ("masks", "labels")
    assert metrics["before"]["dice"] == pytest.approx((0.6 + 1.0) / 2)
    assert metrics["after"]["dice"] == pytest.approx((1.0 + 0.0) / 2)  # label 5 did not move, the answer moves it


def test_landmarks() -> None:
    points = np.array([[8.0, 9.0], [12.0, 15.0]])
    metrics = measured(shifted(3.0), fixed_landmarks=points, moving_landmarks=points + [SHIFT, 0.0])
    assert metrics["before"]["landmark_tre"] == pytest.approx(SHIFT)
    assert metrics["after"]["landmark_tre"] == pytest.approx(1.0)
    assert "tre" not in metrics["after"]


def test_large_images_are_measured_on_a_part_of_their_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(shifted(SHIFT), truth=shifted(SHIFT + 1.0))
    monkeypatch.setattr("monai_zsreg.app.evaluate._ENOUGH", 15 * 15)
    thin = measured(shifted(SHIFT), truth=shifted(SHIFT + 1.0))
    assert (whole["every"], thin["every"]) == (1, 2)
    assert thin["before"]["dice"] == pytest.approx(whole["before"]["dice"])
    assert thin["after"]["tre"] == pytest.approx(1.0) == pytest.approx(whole["after"]["tre"])


# --------------------------------------------------------------------------------------------------------------------
# many pairs
# --------------------------------------------------------------------------------------------------------------------


def report(name: str, verdict: str = "PASS", tre: float | None = None, landmark: float | None = None) -> dict[str, Any]:
    metrics: dict[str, Any] = {"dice_of": "foregrounds", "region": "foreground"}
    for when, factor in (("before", 2.0), ("after", 1.0)):
        metrics[when] = {measure: factor * 0.1 * len(name) for measure in MEASURES[:6]}
        metrics[when] |= {k: factor * v for k, v in (("tre", tre), ("landmark_tre", landmark)) if v is not None}
    return {
        "metrics": metrics, "name": name, "verdict": verdict, "seconds": 2.0, "reasons": ["no, this failed"],
        "versions": {"torch": "2"}, "input": {"fixed": "a, b.nii", "moving": "m.nii"},
        "made_from": {"preset": "keypoints", "files": {}},
    }  # fmt: skip


def test_table_and_summary(tmp_path: Path) -> None:
    reports = [
        report("a", tre=1.0),
        report("bb", tre=9.0, landmark=1.5),  # landmarks decide
        report("ccc", "FAIL", tre=0.5),  # a failure is no success, wherever it lies
        report("dddd", "WARN"),
    ]
    told = save_evaluation(reports, Settings(tmp_path / "out"), 2.0)
    assert "registered: 3 of 4" in told and "error below 2: 2 of 3" in told
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["evaluation.csv", "evaluation.json"]
    with (tmp_path / "out" / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a", "bb", "ccc", "dddd"]
    assert [row["tre_after"] for row in rows] == ["1.0", "9.0", "0.5", ""]
    assert rows[2]["reasons"] == "no, this failed" and rows[0]["fixed"] == "a, b.nii"
    assert {f"{m}_{w}" for m in MEASURES for w in ("before", "after")} <= set(rows[0])

    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["pairs"] == 4
    assert (summary["registered"]["successes"], summary["registered"]["n"]) == (3, 4)
    accurate = summary["accurate"]
    assert (accurate["successes"], accurate["n"], accurate["below"]) == (2, 3, 2.0)
    # Wilson, 2 of 3, from the formula
    z, p, n = 1.959963984540054, 2 / 3, 3
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert (accurate["low"], accurate["high"]) == pytest.approx((middle - half, middle + half))
    dice = summary["columns"]["dice"]["before"]
    values = [0.2, 0.4, 0.6, 0.8]
    assert dice == pytest.approx({"n": 4, "mean": 0.5, "median": 0.5, "std": float(np.std(values, ddof=1))})
    assert summary["columns"]["landmark_tre"]["after"] == {"n": 1, "mean": 1.5, "median": 1.5, "std": None}
    assert summary["settings"] == {"preset": "keypoints"} and summary["dice_of"] == {"foregrounds": 4}
    means = mean_metrics(reports)
    assert means["dice_after"] == pytest.approx(0.25) and means["tre_after"] == pytest.approx(3.5)
    # without references no claim is made
    save_evaluation([report("a")], Settings(tmp_path), 2.0)
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert summary["accurate"] is None and "tre" not in summary["columns"]


def test_command(images: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [str(images.folder / f"{name}_labels.nii.gz") for name in ("t1", "t2")]
    write_transform(tmp_path / "truth.tfm", shifted(0.0) + np.array([[0, 0, x] for x in (*images.shift, 0.0)]))
    pair = {"fixed": str(images.t1), "moving": str(images.t2)}
    pairs = [
        pair | {"name": "known", "truth": str(tmp_path / "truth.tfm")},
        pair | {"name": "labeled", "fixed_labels": labels[0], "moving_labels": labels[1], "truth": ""},
        {"fixed": str(images.t1), "moving": str(images.noise), "name": "noise", "truth": None},
    ]
    (tmp_path / "pairs.json").write_text(json.dumps({"testing": pairs}))
    # a FAIL is a figure here, no failure of the command
    assert main(["cohort", str(tmp_path / "pairs.json"), "-o", str(tmp_path), "--evaluate", "--no-page"]) == 0
    with (tmp_path / "evaluation.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["known"]["tre_before"]) == pytest.approx(math.hypot(*images.shift), rel=1e-6)
    assert float(rows["known"]["tre_after"]) < 1.0 and rows["known"]["landmark_tre_after"] == ""
    assert rows["labeled"]["dice_of"] == "labels" and rows["noise"]["verdict"] == "FAIL"
    assert "registered: 2 of 3" in capsys.readouterr().out
    pairs[0]["truth"] = str(tmp_path / "nowhere.tfm")
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    assert main(["cohort", str(tmp_path / "pairs.json"), "-o", str(tmp_path), "--evaluate"]) == 2
    assert "datalist[0].truth" in capsys.readouterr().err
