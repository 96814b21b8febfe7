# SPDX-License-Identifier: Apache-2.0
"""The bundle's evaluation, run as a user runs it, and its figures computed once more from the files it wrote."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import MetaTensor

from monai_zsreg.geometry import AffineParameters, compose_parameters
from monai_zsreg.inference import WRONG_INPUT
from monai_zsreg.io import write_itk_transform

BUNDLE = Path(__file__).parents[2] / "bundles" / "zero_shot_affine_registration"
INFERENCE, EVALUATE = (str(BUNDLE / "configs" / name) for name in ("inference.json", "evaluate.json"))
QUICK = {"scales": [1], "iterations": 2}
FAST = {"preset": "keypoints", "device": "cpu", "options": QUICK, "demonstration_dims": 2}


def save(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    full = np.eye(4)
    full[np.ix_([0, 1, 3], [0, 1, 3])] = affine
    image = nib.Nifti1Image(data, full)
    image.set_qform(full, code="scanner")
    nib.save(image, path)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, load_slice: Callable[..., MetaTensor]) -> SimpleNamespace:
    """A real slice, and the same one in a world turned and shifted by a known transform; masks, labels, landmarks."""
    folder = tmp_path_factory.mktemp("study")
    native = load_slice()
    values = native[0, ::2, ::2].numpy().astype(np.float32)
    affine = native.affine.numpy()[:3, :3] @ np.diag([2.0, 2.0, 1.0])
    truth = compose_parameters(AffineParameters((9.0, -6.0), (3.0,), (1.0, 1.0), (0.0,), (90.0, 110.0)))
    labels = np.digitize(values, np.percentile(values[values > 0], [40, 80])).astype(np.int16) * (values > 0)
    for name, data in (("", values), ("_mask", (values > 0).astype(np.uint8)), ("_labels", labels)):
        save(folder / f"fixed{name}.nii.gz", data, affine)
        save(folder / f"moving{name}.nii.gz", data, truth @ affine)
    write_itk_transform(folder / "truth.tfm", truth)
    points = np.array([[60.0, 80.0], [110.0, 90.0], [90.0, 150.0]])
    for name, matrix in (("fixed", np.eye(3)), ("moving", truth)):
        rows = points @ matrix[:2, :2].T + matrix[:2, 2]
        (folder / f"{name}.csv").write_text("x,y\n" + "\n".join(f"{x},{y}" for x, y in rows) + "\n")
    pair = {"fixed": "fixed.nii.gz", "moving": "moving.nii.gz"}
    pairs = [
        pair | {"name": "known", "truth": "truth.tfm", "fixed_mask": "fixed_mask.nii.gz",
                "moving_mask": "moving_mask.nii.gz"},
        pair | {"name": "marked", "fixed_labels": "fixed_labels.nii.gz", "moving_labels": "moving_labels.nii.gz",
                "fixed_landmarks": "fixed.csv", "moving_landmarks": "moving.csv"},
        pair,
    ]  # fmt: skip
    (folder / "pairs.json").write_text(json.dumps({"testing": pairs}))
    return SimpleNamespace(folder=folder, truth=truth, affine=affine, labels=labels, points=points, values=values)


def run(*configs: str, **options: Any) -> None:
    """The command in this process."""
    files = list(configs) or EVALUATE
    monai.bundle.run(config_file=files, logging_file=False, **(FAST | options))


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "evaluation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_command_evaluates_a_list(study: SimpleNamespace, vgg19_weights: Path, tmp_path: Path) -> None:
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    # so that the package is found from another folder also where it is not installed
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BUNDLE.parents[1]), environment.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", EVALUATE]
    words += ["--meta_file", str(BUNDLE / "configs" / "metadata.json"), "--bundle_root", str(BUNDLE)]
    words += ["--datalist", str(study.folder / "pairs.json"), "--dataset_dir", str(study.folder)]
    words += ["--preset", "keypoints", "--vgg19_weights", str(vgg19_weights), "--options", json.dumps(QUICK)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "output"
    assert sorted(p.name for p in folder.iterdir()) == [
        "evaluation.csv", "evaluation.json", "known", "marked", "moving",
    ]  # fmt: skip
    known, marked, plain = rows_of(folder)
    assert [row["name"] for row in (known, marked, plain)] == ["known", "marked", "moving"]
    assert [row["dice_of"] for row in (known, marked, plain)] == ["masks", "labels", "foreground"]
    assert all(row["success"] == "True" for row in (known, marked, plain))

    # errors from the written matrices
    reports = [json.loads((folder / row["name"] / "report.json").read_text()) for row in (known, marked)]
    matrices = [np.array(report["matrix"]) for report in reports]
    index = np.argwhere(study.values > 0)
    mask = index @ study.affine[:2, :2].T + study.affine[:2, 2]
    for row, column, points, matrix in (
        (known, "tre", mask, matrices[0]),
        (marked, "landmark_tre", study.points, matrices[1]),
    ):
        for when, estimate in (("before", np.eye(3)), ("after", matrix)):
            gap = np.c_[points, np.ones(len(points))] @ (estimate - study.truth)[:2].T
            assert float(row[f"{column}_{when}"]) == pytest.approx(np.linalg.norm(gap, axis=1).mean(), rel=1e-3)
        assert float(row[f"{column}_after"]) < 0.6 * float(row[f"{column}_before"])
    assert known["landmark_tre_after"] == marked["tre_after"] == plain["tre_after"] == ""

    # Dice from the written labels
    moved = np.asarray(nib.load(folder / "marked" / "moved_labels.nii.gz").dataobj)
    dice = [
        2
        * ((moved == label) & (study.labels == label)).sum()
        / ((moved == label).sum() + (study.labels == label).sum())
        for label in np.unique(study.labels[study.labels > 0])
    ]
    assert float(marked["dice_after"]) == pytest.approx(np.mean(dice), rel=1e-5)
    for row in (known, marked, plain):
        assert float(row["dice_after"]) > float(row["dice_before"])
        assert float(row["nmi_after"]) > float(row["nmi_before"])

    summary = json.loads((folder / "evaluation.json").read_text())
    column = [float(row["ssim_after"]) for row in (known, marked, plain)]
    stats = summary["columns"]["ssim"]["after"]
    assert (stats["mean"], stats["median"], stats["std"]) == pytest.approx(
        (np.mean(column), np.median(column), np.std(column, ddof=1))
    )
    errors = [float(known["tre_after"]), float(marked["landmark_tre_after"])]
    assert summary["accurate"]["successes"] == sum(error < 2.0 for error in errors) and summary["accurate"]["n"] == 2
    assert summary["registered"]["successes"] == summary["registered"]["n"] == summary["pairs"] == 3
    assert summary["settings"]["preset"] == "keypoints" and summary["settings"]["options"] == QUICK
    assert "accurate" not in done.stderr and "error below 2 mm" in done.stdout


def test_over_the_inference_configuration(study: SimpleNamespace, tmp_path: Path) -> None:
    """With the default preset, which needs no weights."""
    run(
        INFERENCE,
        EVALUATE,
        preset="robust",
        options={},
        datalist=str(study.folder / "pairs.json"),
        dataset_dir=str(study.folder),
        success_mm=0.5,
        output_dir=str(tmp_path),
    )
    assert len(rows_of(tmp_path)) == 3
    accurate = json.loads((tmp_path / "evaluation.json").read_text())["accurate"]
    assert (accurate["successes"], accurate["n"], accurate["below_mm"]) == (2, 2, 0.5)


def test_demonstration_where_nothing_is_named(vgg19_weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    run(output_dir=str(tmp_path), vgg19_weights=str(vgg19_weights))
    (row,) = rows_of(tmp_path)
    report = json.loads((tmp_path / "demonstration" / "report.json").read_text())
    assert float(row["tre_after"]) == pytest.approx(report["error_mm"]["after"]["mean"])
    assert float(row["tre_before"]) > 5.0
    assert float(row["dice_after"]) == pytest.approx(report["metrics"]["after"]["dice"])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"datalist": "no such file.json"}, "datalist"),
        ({"datalist": [{"fixed": "fixed.nii.gz", "moving": "nowhere.nii.gz"}]}, "datalist[0].moving"),
        ({"success_mm": 0}, "success_mm"),
        ({"success_mm": "2 mm"}, "success_mm"),
        ({"preset": "best"}, "preset"),
        ({"uncertainty": "perhaps"}, "uncertainty"),
        ({"datalist": [{"fixed": "fixed.nii.gz", "moving": "moving.nii.gz", "truth": "fixed.csv"}]}, "truth"),
    ],
)
def test_wrong_input(
    options: dict,
    word: str,
    study: SimpleNamespace,
    vgg19_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = {"datalist": str(study.folder / "pairs.json"), "dataset_dir": str(study.folder)}
    good |= {"output_dir": str(tmp_path / "out"), "vgg19_weights": str(vgg19_weights)}
    with pytest.raises(SystemExit) as stop:
        run(**(good | options))
    assert stop.value.code == WRONG_INPUT
    assert f"wrong input: {word}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_truth_is_not_overwritten(study: SimpleNamespace, vgg19_weights: Path, tmp_path: Path) -> None:
    mine = tmp_path / "again" / "transform.tfm"
    write_itk_transform(mine, study.truth)
    before = mine.read_bytes()
    images = {"fixed": str(study.folder / "fixed.nii.gz"), "moving": str(study.folder / "moving.nii.gz")}
    with pytest.raises(SystemExit) as stop:
        run(
            datalist=[images | {"truth": str(mine), "name": "again"}],
            output_dir=str(tmp_path),
            vgg19_weights=str(vgg19_weights),
        )
    assert stop.value.code == WRONG_INPUT
    assert mine.read_bytes() == before


@pytest.mark.parametrize("configs", [[EVALUATE], [INFERENCE, EVALUATE]])
def test_properties(configs: list[str], tmp_path: Path) -> None:
    workflow = ConfigWorkflow(configs, workflow_type="infer", logging_file=False, output_dir=str(tmp_path / "o"))
    workflow.initialize()
    assert workflow.check_properties() == []
    assert workflow.dataset_data == [{"name": "demonstration"}]
    assert list(workflow.key_metric) == ["dice_after"]
    assert list(tmp_path.iterdir()) == []  # looking at a bundle writes nothing


def test_evaluation_differs_from_inference_where_it_must() -> None:
    """`evaluate.json` stands alone, so what both files say is said twice; it must be the same."""
    inference, evaluate = (ConfigParser.load_config_file(path) for path in (INFERENCE, EVALUATE))
    for part in (*(c["preprocessing"]["transforms"][0] for c in (inference, evaluate)), inference["evaluator"],
                 evaluate["evaluator"], inference["handlers"][0], evaluate["handlers"][0]):  # fmt: skip
        part.pop("isolate")  # an evaluation wants all pairs
    same = {"network_def", "network", "dataloader", "prepare_batch", "inferer", "device", "options", "preset", "seed"}
    same |= {"transform", "vgg19_weights", "regressor_weights", "output_dir", "uncertainty", "demonstration_dims"}
    for key in sorted(same):
        assert evaluate[key] == inference[key], key
    for key in ("preprocessing", "postprocessing"):
        ours = [t for t in evaluate[key]["transforms"] if ".evaluation." not in t["_target_"]]
        assert ours == inference[key]["transforms"]
    assert {k: v for k, v in evaluate["evaluator"].items() if k != "additional_metrics"} == inference["evaluator"]
    assert evaluate["handlers"][0] == inference["handlers"][0]


def test_metrics_reach_ignite(study: SimpleNamespace, vgg19_weights: Path, tmp_path: Path) -> None:
    workflow = ConfigWorkflow(
        EVALUATE, workflow_type="infer", logging_file=False, datalist=str(study.folder / "pairs.json"),
        dataset_dir=str(study.folder), output_dir=str(tmp_path), vgg19_weights=str(vgg19_weights),
        device="$torch.device('cpu')", preset="keypoints", options=QUICK,
    )  # fmt: skip
    workflow.initialize()
    workflow.evaluator.run()
    rows, state = rows_of(tmp_path), workflow.evaluator.state
    for name, value in state.metrics.items():
        known = [float(row[name]) for row in rows if row[name]]
        assert value == pytest.approx(np.mean(known), rel=1e-5), name
    assert state.best_metric == pytest.approx(state.metrics["dice_after"])
    assert len(state.metrics) == 16 and torch.isnan(state.metric_details["tre_after"]).sum() == 2
