# SPDX-License-Identifier: Apache-2.0
"""Lists of pairs, figures before and after, and the table with its summary."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.evaluation import (
    MEASURES,
    EvaluationWriter,
    MeasureHandler,
    MeasurePair,
    ReadReference,
    additional_metrics,
    evaluation_list,
    label_dice,
)
from monai_zsreg.inference import MovePair
from monai_zsreg.io import write_itk_transform
from monai_zsreg.metrics import similarity
from monai_zsreg.registration import RegistrationResult

SHIFT = 4  # voxels of 1 mm along the first axis, from the fixed to the moving image


def files(folder: Path, *names: str) -> dict[str, str]:
    for name in names:
        (folder / name).touch()
    return {name: str(folder / name) for name in names}


def square(start: int, value: float = 1.0) -> torch.Tensor:
    image = torch.zeros(1, 30, 30)
    image[0, start : start + 10, 8:20] = value
    return image


def measured(matrix: np.ndarray, success: bool = True, **known: Any) -> dict[str, Any]:
    """A pair with a given answer, through the chain of the evaluation; all images lie on one grid of 1 mm."""
    fixed, moving = MetaTensor(square(6)), MetaTensor(square(6 + SHIFT))
    result = RegistrationResult(
        affine=matrix, success=success, warnings=[], seconds=1.0, preset="p", transform="rigid", fixed=fixed,
        moving=moving,
    )  # fmt: skip
    pair = {"fixed": fixed, "moving": moving, "pred": result} | known
    return MeasurePair()(MovePair()(pair))["metrics"]


def shifted(mm: float) -> np.ndarray:
    matrix = np.eye(3)
    matrix[0, 2] = mm
    return matrix


# --------------------------------------------------------------------------------------------------------------------
# the list
# --------------------------------------------------------------------------------------------------------------------


def test_list_is_a_file_with_or_without_a_key(tmp_path: Path) -> None:
    given = files(tmp_path, "a.nii.gz", "b.nii.gz", "m.nii.gz", "n.nii.gz", "t.tfm")
    pairs = [
        {"fixed": "a.nii.gz", "moving": "b.nii.gz", "fixed_mask": "m.nii.gz", "moving_mask": "n.nii.gz"},
        {"fixed": "a.nii.gz", "moving": given["b.nii.gz"], "truth": "t.tfm", "name": 7, "moving_mask": None},
        {"fixed": "a.nii.gz", "moving": "b.nii.gz", "fixed_labels": "m.nii.gz", "moving_labels": "n.nii.gz"},
    ]
    for content in (pairs, {"testing": pairs, "description": "of no interest"}):
        (tmp_path / "pairs.json").write_text(json.dumps(content))
        one, two, three = evaluation_list(tmp_path / "pairs.json", tmp_path)
        assert one["fixed"] == given["a.nii.gz"] and one["moving_mask"] == given["n.nii.gz"]
        assert two == {
            "fixed": given["a.nii.gz"], "moving": given["b.nii.gz"], "truth": given["t.tfm"], "name": "7",
        }  # fmt: skip
        # the moving labels go the way of those that inference carries along
        assert three["labels"] == given["n.nii.gz"] and "moving_labels" not in three
        assert [one["name"], three["name"]] == ["b", "b_2"]
    assert evaluation_list() == [{"name": "demonstration"}]


def test_paths_start_in_the_working_directory_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, "a.nii", "b.nii")
    monkeypatch.chdir(tmp_path)
    assert evaluation_list([{"fixed": "a.nii", "moving": "b.nii"}])[0]["fixed"] == "a.nii"


@pytest.mark.parametrize(
    ("entry", "argument"),
    [
        ("a.nii", "datalist[0]"),
        ({"fixed": "a.nii"}, "datalist[0].moving"),
        ({"moving": "b.nii"}, "datalist[0].fixed"),
        ({}, "datalist[0].fixed"),
        ({"fixed": "a.nii", "moving": "c.nii"}, "datalist[0].moving"),
        ({"fixed": "a.nii", "moving": 3}, "datalist[0].moving"),
        ({"fixed": "a.nii", "moving": "b.nii", "fixed_mask": "a.nii"}, "datalist[0].moving_mask"),
        ({"fixed": "a.nii", "moving": "b.nii", "moving_labels": "a.nii"}, "datalist[0].fixed_labels"),
        ({"fixed": "a.nii", "moving": "b.nii", "fixed_landmark": "a.nii"}, "datalist[0]"),
        ({"fixed": "a.nii", "moving": "b.nii", "name": "x/y"}, "name"),
        ({"fixed": "a.nii", "moving": "b.nii", "name": "evaluation.csv"}, "name"),
    ],
)
def test_list_refuses(entry: Any, argument: str, tmp_path: Path) -> None:
    files(tmp_path, "a.nii", "b.nii")
    with pytest.raises(RegistrationError) as caught:
        evaluation_list([entry], tmp_path)
    assert caught.value.argument == argument


@pytest.mark.parametrize("content", [None, "not JSON", "[]", '{"training": []}', '{"testing": "a"}', "3"])
def test_file_that_is_no_list(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "pairs.json").write_text(content)
    with pytest.raises(RegistrationError) as caught:
        evaluation_list(tmp_path / "pairs.json")
    assert caught.value.argument == "datalist"


def test_two_pairs_of_one_name(tmp_path: Path) -> None:
    files(tmp_path, "a.nii", "b.nii")
    pair = {"fixed": "a.nii", "moving": "b.nii"}
    with pytest.raises(RegistrationError, match="name"):
        evaluation_list([pair | {"name": "one"}, pair | {"name": "one"}], tmp_path)
    # a pair without a name makes way for one that has it
    names = [entry["name"] for entry in evaluation_list([pair, pair | {"name": "b"}, pair], tmp_path)]
    assert names == ["b_2", "b", "b_3"]


# --------------------------------------------------------------------------------------------------------------------
# what is known about a pair
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(tmp_path: Path) -> dict[str, Any]:
    """A pair as `ReadPair` gives it, the images read and the rest still paths."""
    header = np.diag([2.0, 2.0, 1.0, 1.0])
    mask = np.zeros((12, 15), dtype=np.uint8)
    mask[2:9, 3:12] = 3
    nib.save(nib.Nifti1Image(mask, header), tmp_path / "mask.nii.gz")
    nib.save(nib.Nifti1Image(mask * 0, header), tmp_path / "empty.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((9, 9, 9), dtype=np.uint8), np.eye(4)), tmp_path / "volume.nii.gz")
    write_itk_transform(tmp_path / "truth.tfm", shifted(5.0))
    write_itk_transform(tmp_path / "truth_3d.tfm", np.eye(4))
    (tmp_path / "f.csv").write_text("label,x,y\na,1,2\nb,3,4\n")
    (tmp_path / "m.csv").write_text("label,x,y\nb,30,40\na,10,20\n")
    (tmp_path / "m3.csv").write_text("label,x,y,z\nb,30,40,0\na,10,20,0\n")
    # the fixed grid is finer than the mask's
    fixed = MetaTensor(torch.rand(1, 24, 30, generator=torch.Generator().manual_seed(0)))
    return {"fixed": fixed, "moving": fixed, "name": "n", "files": {"fixed": "f.nii", "moving": "m.nii"}}


def test_reads_what_is_known(known: dict[str, Any], tmp_path: Path) -> None:
    names = {
        "fixed_mask": "mask.nii.gz", "moving_mask": "mask.nii.gz", "truth": "truth.tfm",
        "fixed_landmarks": "f.csv", "moving_landmarks": "m.csv",
    }  # fmt: skip
    paths = {key: str(tmp_path / name) for key, name in names.items()}
    pair = ReadReference()(known | paths)
    assert pair["files"] == {"fixed": "f.nii", "moving": "m.nii"} | paths
    assert known["files"] == {"fixed": "f.nii", "moving": "m.nii"}
    assert pair["fixed_mask"].shape == (1, 24, 30) and set(pair["fixed_mask"].unique().tolist()) == {0.0, 3.0}
    assert pair["moving_mask"].shape == (1, 12, 15)
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
        ReadReference()(known | {key: str(tmp_path / name) for key, name in names.items()})
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
    assert metrics["region"] == metrics["dice_of"] == "foreground"
    assert "landmark_tre" not in metrics["after"]
    assert metrics["before"] | {"tre": 0} == similarity(square(6), square(6 + SHIFT)) | {"tre": 0}


def test_masks_take_the_place_of_the_foreground() -> None:
    masks = {"fixed_mask": MetaTensor(square(6)), "moving_mask": MetaTensor(square(8))}
    metrics = measured(shifted(3.0), **masks)
    assert metrics["region"] == metrics["dice_of"] == "masks"
    assert metrics["before"]["dice"] == pytest.approx(0.8)  # 8 of 10 rows
    assert metrics["after"]["dice"] == pytest.approx(0.9)  # one row too far
    # the mask, not the foreground, is where the error against the truth is taken
    corner = torch.zeros(1, 30, 30)
    corner[0, :2, :2] = 1
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    near = measured(turn, fixed_mask=MetaTensor(corner), moving_mask=MetaTensor(square(8)), truth=np.eye(3))
    assert near["after"]["tre"] < 2.0 < 10.0 < measured(turn, truth=np.eye(3))["after"]["tre"]


def test_labels_take_the_place_of_both() -> None:
    fixed, moving = square(6), square(6 + SHIFT)
    fixed[0, 20:24, 8:20], moving[0, 20:24, 8:20] = 5, 5
    labels = {"fixed_labels": MetaTensor(fixed), "labels": MetaTensor(moving)}
    metrics = measured(shifted(SHIFT), **labels, fixed_mask=MetaTensor(square(6)), moving_mask=MetaTensor(square(8)))
    assert (metrics["region"], metrics["dice_of"]) == ("masks", "labels")
    assert metrics["before"]["dice"] == pytest.approx((0.6 + 1.0) / 2)
    assert metrics["after"]["dice"] == pytest.approx((1.0 + 0.0) / 2)  # label 5 did not move, the answer moves it


def test_landmarks() -> None:
    points = np.array([[8.0, 9.0], [12.0, 15.0]])
    metrics = measured(shifted(3.0), fixed_landmarks=points, moving_landmarks=points + [SHIFT, 0.0])
    assert metrics["before"]["landmark_tre"] == pytest.approx(SHIFT)
    assert metrics["after"]["landmark_tre"] == pytest.approx(1.0)
    assert "tre" not in metrics["after"]


def test_label_dice() -> None:
    one = torch.tensor([[[0, 1, 1, 2, 2, 2]]])
    assert label_dice(one, one) == 1.0
    two = torch.tensor([[[0, 1, 0, 2, 2, 9]]])
    assert label_dice(one, two) == pytest.approx((2 / 3 + 4 / 5) / 2)
    for wrong in ((one * 0, one), (one, two[..., :3])):
        with pytest.raises(RegistrationError):
            label_dice(*wrong)


# --------------------------------------------------------------------------------------------------------------------
# handlers
# --------------------------------------------------------------------------------------------------------------------


def output(name: str, success: bool = True, tre: float | None = None, landmark: float | None = None) -> dict[str, Any]:
    metrics: dict[str, Any] = {"dice_of": "foreground", "region": "foreground"}
    for when, factor in (("before", 2.0), ("after", 1.0)):
        metrics[when] = {measure: factor * 0.1 * len(name) for measure in MEASURES[:6]}
        metrics[when] |= {k: factor * v for k, v in (("tre", tre), ("landmark_tre", landmark)) if v is not None}
    report = {
        "name": name, "success": success, "seconds": 2.0, "warnings": [] if success else ["no, this failed"],
        "versions": {"torch": "2"}, "input": {"fixed": "a, b.nii", "moving": "m.nii"},
    }  # fmt: skip
    return {"metrics": metrics, "report": report}


def evaluate(folder: Path, outputs: list[dict[str, Any]], **options: Any) -> Engine:
    engine = Engine(lambda engine, batch: batch)
    for name, handler in additional_metrics().items():
        handler.attach(engine, name)
    MeasureHandler("dice", "after").attach(engine, "dice_after")
    EvaluationWriter(folder, **options).attach(engine)
    engine.run(outputs, max_epochs=1)
    return engine


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "evaluation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_and_summary(tmp_path: Path) -> None:
    outputs = [
        output("a", tre=1.0),
        output("bb", tre=9.0, landmark=1.5),  # landmarks decide
        output("ccc", success=False, tre=0.5),  # a failure is no success, wherever it lies
        output("dddd"),
    ]
    engine = evaluate(tmp_path / "out", outputs, success_mm=2.0, preset="keypoints", device=torch.device("cpu"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["evaluation.csv", "evaluation.json"]
    rows = rows_of(tmp_path / "out")
    assert [row["name"] for row in rows] == ["a", "bb", "ccc", "dddd"]
    assert [row["success"] for row in rows] == ["True", "True", "False", "True"]
    assert [row["tre_after"] for row in rows] == ["1.0", "9.0", "0.5", ""]
    assert rows[2]["warnings"] == "no, this failed" and rows[0]["fixed"] == "a, b.nii"
    assert {f"{m}_{w}" for m in MEASURES for w in ("before", "after")} <= set(rows[0])

    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["pairs"] == 4
    assert (summary["registered"]["successes"], summary["registered"]["n"]) == (3, 4)
    accurate = summary["accurate"]
    assert (accurate["successes"], accurate["n"], accurate["below_mm"]) == (2, 3, 2.0)
    # Wilson, 2 of 3, from the formula
    z, p, n = 1.959963984540054, 2 / 3, 3
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert (accurate["low"], accurate["high"]) == pytest.approx((middle - half, middle + half))
    dice = summary["columns"]["dice"]["before"]
    values = [0.2, 0.4, 0.6, 0.8]
    assert dice == pytest.approx({"n": 4, "mean": 0.5, "median": 0.5, "std": float(np.std(values, ddof=1))})
    assert summary["columns"]["tre"]["after"]["n"] == 3
    assert summary["columns"]["landmark_tre"]["after"] == {"n": 1, "mean": 1.5, "median": 1.5, "std": None}
    assert summary["settings"] == {"preset": "keypoints", "device": "cpu"}
    assert summary["seconds"]["mean"] == 2.0 and summary["dice_of"] == {"foreground": 4}

    # ignite's means, of the pairs that have the number
    assert engine.state.metrics["dice_after"] == pytest.approx(0.25)
    assert engine.state.metrics["tre_after"] == pytest.approx(3.5)
    assert engine.state.metrics["landmark_tre_before"] == pytest.approx(3.0)
    assert engine.state.metric_details["tre_after"].shape == (4, 1)


def test_without_references_no_claim_is_made(tmp_path: Path) -> None:
    engine = evaluate(tmp_path, [output("a"), output("b")])
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert summary["accurate"] is None
    assert "tre" not in summary["columns"] and "landmark_tre" not in summary["columns"]
    assert math.isnan(engine.state.metrics["tre_after"])


def test_a_run_that_stops_leaves_its_rows_and_no_summary(tmp_path: Path) -> None:
    evaluate(tmp_path, [output("before")])
    assert (tmp_path / "evaluation.json").is_file()
    broken = output("c")
    del broken["report"]["seconds"]
    with pytest.raises(KeyError):
        evaluate(tmp_path, [output("a"), output("b"), broken])
    assert [row["name"] for row in rows_of(tmp_path)] == ["a", "b"]
    assert os.listdir(tmp_path) == ["evaluation.csv"]


@pytest.mark.parametrize("arguments", [("dise",), ("dice", "later")])
def test_handler_refuses(arguments: tuple[str, ...]) -> None:
    with pytest.raises(RegistrationError):
        MeasureHandler(*arguments)
