# SPDX-License-Identifier: Apache-2.0
"""The bundle's inference and evaluation, run as a user runs them. What they compute is tested in ``tests/app``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fire
import monai.bundle.__main__
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

from monai_zsreg.app.bundle import ReadAhead, ReadPair, print_options
from monai_zsreg.app.settings import FAILED, WRONG_INPUT, Settings
from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import AffineParameters, compose_parameters
from monai_zsreg.io import write_transform
from monai_zsreg.metrics import foreground_tre
from monai_zsreg.networks import UNTRAINED_FOR_CHECKS_ONLY

BUNDLE = Path(__file__).parents[2] / "bundles" / "zero_shot_affine_registration"
INFERENCE, EVALUATE = (str(BUNDLE / "configs" / name) for name in ("inference.json", "evaluate.json"))
# a name that a shell, Python and MONAI might each take for something else
AWKWARD = """it's a "moving", image.nii.gz"""


def run(*configs: str, **options: Any) -> None:
    """The command in this process."""
    monai.bundle.run(config_file=list(configs or [INFERENCE]), logging_file=False, **({"device": "cpu"} | options))


def command(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, as typed, from another working directory."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    # so that the package is found from another folder also where it is not installed
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BUNDLE.parents[1]), environment.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", INFERENCE, *arguments]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def save(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    full = np.eye(4)
    axes = [*range(len(affine) - 1), 3]
    full[np.ix_(axes, axes)] = affine
    nib.save(nib.Nifti1Image(data, full), path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, load_slice: Callable[..., MetaTensor]) -> SimpleNamespace:
    """A slice, and the same one cropped, its world turned and shifted by a known transform; files about it."""
    folder = tmp_path_factory.mktemp("a folder")
    native = load_slice()
    values, affine = native[0, ::2, ::2].numpy().astype(np.float32), np.diag([2.0, 2.0, 1.0])
    image = MetaTensor(values[None], affine=affine)
    truth = compose_parameters(AffineParameters((9.0, -6.0), (3.0,), (1.0, 1.0), (0.0,), (90.0, 110.0)))
    crop = values[3:-5, 4:-2]
    moved = truth @ affine @ np.array([[1, 0, 3], [0, 1, 4], [0, 0, 1.0]])
    save(folder / "fixed image.nii.gz", values, affine)
    save(folder / AWKWARD, crop, moved)
    save(folder / "labels.nii.gz", (crop > np.percentile(crop, 80)).astype(np.uint8) * 7, moved)
    save(folder / "flat.nii.gz", np.ones((20, 20), dtype=np.float32), np.eye(3))
    save(folder / "noise.nii.gz", np.random.default_rng(0).random((90, 100)).astype(np.float32), affine)
    save(folder / "volume.nii.gz", np.ones((20, 20, 20), dtype=np.float32), np.eye(4))
    (folder / "text.nii.gz").write_text("no image")
    write_transform(folder / "truth.tfm", truth)
    return SimpleNamespace(
        folder=folder, fixed=folder / "fixed image.nii.gz", moving=folder / AWKWARD, truth=truth, image=image
    )


def test_command_registers_a_pair_from_another_folder(pair: SimpleNamespace, tmp_path: Path) -> None:
    done = command(
        tmp_path,
        *("--fixed", str(pair.fixed), "--moving", str(pair.moving), "--labels", str(pair.folder / "labels.nii.gz")),
        *("--output_dir", "my results"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "my results" / AWKWARD.removesuffix(".nii.gz")
    assert {p.name for p in folder.iterdir()} == {
        "moved.nii.gz", "moved_labels.nii.gz", "transform.tfm", "report.json", "overview.png", "expected_error.nii.gz",
        "report.html",
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["my results"]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    matrix = np.array(report["matrix"])
    assert foreground_tre(matrix, pair.truth, pair.image)["mean"] < 0.2  # pixels of 2 mm
    assert report["verdict"] == "PASS" and report["preset"] == "robust" and report["transform"] == "affine"
    parameters = AffineParameters(**{k: tuple(v) for k, v in report["parameters"].items() if k != "angle_deg"})
    np.testing.assert_allclose(compose_parameters(parameters), matrix, atol=1e-9)
    assert report["seconds"] > 0 and report["versions"]["torch"] == torch.__version__
    assert report["input"]["moving"] == str(pair.moving)
    assert ": PASS in " in done.stdout and "SIMULATED" not in done.stdout + done.stderr
    assert "ignite" not in done.stdout


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """The command as typed, from another working directory, in this process."""

    def run_typed(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", [monai.bundle.__main__.__file__, "run", *words, "--config_file", INFERENCE])
        monkeypatch.chdir(tmp_path)
        fire.Fire({"run": monai.bundle.run}, sys.argv[1:])

    return run_typed


def test_command_refuses_a_mistyped_option_with_the_nearest(
    pair: SimpleNamespace, tmp_path: Path, typed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        typed("--fixed", str(pair.fixed), "--moving", str(pair.moving), "--ouput_dir", "x")
    assert ended.value.code == WRONG_INPUT
    told = capsys.readouterr().err
    assert "--ouput_dir" in told and "did you mean --output_dir?" in told and "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def test_help_tells_every_option_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    print_options(BUNDLE)
    told = capsys.readouterr().out
    config = json.loads(Path(INFERENCE).read_text())
    assert set(re.findall(r"--(\w+)", told)) == {*config["request"], "num_workers"} - {"evaluation"}
    assert "(default: 3)" in told.partition("--demonstration_dims")[2].partition("--")[0]
    assert config["help"] == "$app.print_options(@bundle_root)"


def test_help_is_found_from_any_folder(
    tmp_path: Path, typed: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("of something else")
    typed("help")
    assert "--demonstration_dims" in capfd.readouterr().out
    sys.argv[:] = ["another program"]
    with pytest.raises(SystemExit) as ended:
        print_options(tmp_path)
    assert ended.value.code == WRONG_INPUT and f"bundle_root: got '{tmp_path}'" in capfd.readouterr().err


def test_demonstration_says_once_that_it_is_simulated_and_how_far_off_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nilearn")
    run(output_dir=str(tmp_path), demonstration_dims=2)
    told = capsys.readouterr()
    report = json.loads((tmp_path / "demonstration" / "report.json").read_text())
    before, after = (report["metrics"][when]["tre"] for when in ("before", "after"))
    assert (told.out + told.err).count("SIMULATED") == 1
    assert f"{before:.2f} mm before, {after:.2f} mm after" in told.out
    assert after < 0.5 < 5.0 < before
    assert (tmp_path / "demonstration" / "moving_simulated_t2.nii.gz").is_file()


@pytest.mark.weights
def test_other_presets_and_an_exported_network(vgg19_weights: Path, pair: SimpleNamespace, tmp_path: Path) -> None:
    options = {"fixed": str(pair.fixed), "moving": str(pair.moving), "vgg19_weights": str(vgg19_weights)}
    run(preset="keypoints", transform="rigid", output_dir=str(tmp_path), name="keypoints", **options)
    report = json.loads((tmp_path / "keypoints" / "report.json").read_text())
    assert report["keypoints"] > 50 and report["covariance"] is None
    matrix = np.array(report["matrix"])
    np.testing.assert_allclose(matrix[:2, :2] @ matrix[:2, :2].T, np.eye(2), atol=1e-5)
    assert "Keypoints of fixed" in (tmp_path / "keypoints" / "report.html").read_text()


def test_failure_is_written_and_reported(tmp_path: Path, pair: SimpleNamespace) -> None:
    noise = str(pair.folder / "noise.nii.gz")
    options = {"fixed": str(pair.fixed), "moving": noise, "output_dir": str(tmp_path), "page": "false"}
    with pytest.raises(SystemExit) as stop:
        run(**options)
    assert stop.value.code == FAILED
    report = json.loads((tmp_path / "noise" / "report.json").read_text())
    assert report["verdict"] == "FAIL" and report["reasons"]
    assert (tmp_path / "noise" / "moved.nii.gz").is_file() and (tmp_path / "noise" / "transform.tfm").is_file()
    run(**options, exit_on_fail="false")


def test_a_list_and_the_rest_of_it(pair: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = {"fixed": str(pair.fixed), "moving": str(pair.moving)}
    data = [images | {"name": "one"}, images | {"name": "two", "moving": str(pair.folder / "text.nii.gz")}]
    for expected in ("0 kept, 2 registered", "1 kept, 1 registered"):
        with pytest.raises(SystemExit) as stop:
            run(datalist=data, output_dir=str(tmp_path), page=False, fill_value=-7)
        assert stop.value.code == FAILED and expected in capsys.readouterr().out
    assert nib.load(tmp_path / "one" / "moved.nii.gz").get_fdata().min() == -7
    assert (tmp_path / "summary.csv").is_file()


def test_evaluation_is_an_overlay(pair: SimpleNamespace, tmp_path: Path) -> None:
    entry = {
        "fixed": str(pair.fixed),
        "moving": str(pair.moving),
        "name": "known",
        "truth": str(pair.folder / "truth.tfm"),
    }
    workflow = ConfigWorkflow(
        [INFERENCE, EVALUATE], workflow_type="infer", logging_file=False, datalist=[entry], output_dir=str(tmp_path),
        device="cpu", page=False, success_mm=0.5,
    )  # fmt: skip
    workflow.initialize()
    workflow.run()
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert (summary["accurate"]["successes"], summary["accurate"]["n"], summary["accurate"]["below"]) == (1, 1, 0.5)
    metrics = workflow.evaluator.state.metrics
    assert metrics["tre_after"] == pytest.approx(summary["columns"]["tre"]["after"]["mean"])
    assert len(metrics) == 14  # no landmarks


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"preset": "best"}, "preset"),
        ({"transform": "elastic"}, "transform"),
        ({"device": "cuda:99"}, "device"),
        ({"seed": "one"}, "seed"),
        ({"name": "../outside"}, "name"),
        ({"name": 1.5}, "name"),
        ({"fixed": None}, "fixed"),
        ({"output_dir": ["a", "b"]}, "output_dir"),
        ({"vgg19_weights": "no such file.pth"}, "vgg19_weights"),
        ({"vgg19_weights": UNTRAINED_FOR_CHECKS_ONLY}, "vgg19_weights"),
        ({"options": {"sets": 3}}, "options"),
        ({"options": "sets"}, "options"),
        ({"moving": "not there.nii.gz"}, "moving"),
        ({"moving": "TEXT"}, "moving"),
        ({"moving": "FLAT"}, "moving"),
        ({"labels": "VOLUME"}, "labels"),
        ({"uncertainty": "perhaps"}, "uncertainty"),
        ({"success_mm": "2 mm"}, "success_mm"),
        ({"fill_value": "air"}, "fill_value"),
        ({"datalist": [{"fixed": "a", "moving": "b"}]}, "fixed"),
        ({"fixed": None, "moving": None, "datalist": "no such file.json"}, "datalist"),
    ],
)
def test_wrong_input(
    options: dict, word: str, pair: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {name.upper(): str(pair.folder / f"{name}.nii.gz") for name in ("text", "flat", "volume")}
    options = {key: named.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    good = {"fixed": str(pair.fixed), "moving": str(pair.moving), "output_dir": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as stop:
        run(**(good | options))
    told = capsys.readouterr().err
    assert stop.value.code == WRONG_INPUT and told.count("\n") == 1
    assert told.startswith(f"wrong input: {word}")
    assert not list(tmp_path.rglob("out*"))


@pytest.mark.parametrize("configs", [[INFERENCE], [INFERENCE, EVALUATE]])
def test_properties(configs: list[str], tmp_path: Path) -> None:
    workflow = ConfigWorkflow(configs, workflow_type="infer", logging_file=False, output_dir=str(tmp_path / "o"))
    workflow.initialize()
    assert workflow.check_properties() == []
    assert workflow.version == "0.1.0"
    assert workflow.dataset_data == [{"name": "demonstration"}]
    assert list(tmp_path.iterdir()) == []  # looking at a bundle writes nothing


def test_targets_are_installed_packages() -> None:
    text = Path(INFERENCE).read_text()
    targets = [line.split('"')[3] for line in text.splitlines() if '"_target_"' in line]
    assert targets and all(t.split(".")[0] in ("monai_zsreg", "torch") or "." not in t for t in targets)


def test_one_image_only_is_refused() -> None:
    """MONAI Label's own bundle app hands over a single image."""
    with pytest.raises(RegistrationError, match="data: got .*image.* expected two images, fixed and moving"):
        ReadPair(Settings())({"image": "t1.nii.gz", "device": "cpu"})


def test_next_pair_is_read_meanwhile() -> None:
    class Numbers(list):
        def __getitem__(self, index: int) -> int:  # type: ignore[override]
            read.append(index)
            if index == 2:
                raise RegistrationError("fixed", "a.nii.gz", "an image")
            return index

    read: list[int] = []
    loader = iter(ReadAhead(Numbers(range(3)), batch_size=None))
    assert next(loader) == 0
    begin = time.monotonic()
    while len(read) < 2 and time.monotonic() - begin < 60:  # nobody has asked for the next one
        time.sleep(0.01)
    assert read == [0, 1] and next(loader) == 1
    with pytest.raises(RegistrationError, match="a.nii.gz"):
        next(loader)
    # and it may be broken off
    for item in ReadAhead(list(range(50)), batch_size=None):
        if item == 3:
            break
