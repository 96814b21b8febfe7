# SPDX-License-Identifier: Apache-2.0
"""The bundle's inference, run as a user runs it, and its results judged by other tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import itk
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

from monai_zsreg import RegistrationWarning
from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import AffineParameters, compose_parameters
from monai_zsreg.inference import FAILED, WRONG_INPUT, PairInferer, ReadPair, pair_list, trained_network
from monai_zsreg.metrics import foreground_tre
from monai_zsreg.networks import UNTRAINED_FOR_CHECKS_ONLY
from monai_zsreg.registration.robust import RobustEngine

BUNDLE = Path(__file__).parents[2] / "bundles" / "zero_shot_affine_registration"
INFERENCE = BUNDLE / "configs" / "inference.json"
QUICK = {"scales": [1], "iterations": 2}
# a name that a shell, Python and MONAI might each take for something else
AWKWARD = """it's a "moving", image.nii.gz"""


def run(**options: Any) -> None:
    """The command in this process."""
    settings = {"device": "cpu", "preset": "keypoints", "options": QUICK} | options
    monai.bundle.run(config_file=str(INFERENCE), logging_file=False, **settings)


def command(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, as typed, from another working directory."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    # so that the package is found from another folder also where it is not installed
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BUNDLE.parents[1]), environment.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(INFERENCE), *arguments]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def save(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    full = np.eye(4)
    axes = [*range(len(affine) - 1), 3]
    full[np.ix_(axes, axes)] = affine
    image = nib.Nifti1Image(data, full)
    image.set_qform(full, code="scanner")
    nib.save(image, path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, load_slice: Callable[..., MetaTensor]) -> SimpleNamespace:
    """A real slice, and the same one cropped, its world turned and shifted by a known transform; labels of it."""
    folder = tmp_path_factory.mktemp("a folder")
    native = load_slice()
    values, affine = native[0, ::2, ::2].numpy().astype(np.float32), native.affine.numpy() @ np.diag([2.0, 2.0, 1.0])
    image = MetaTensor(values[None], affine=affine)
    truth = compose_parameters(AffineParameters((9.0, -6.0), (3.0,), (1.0, 1.0), (0.0,), (90.0, 110.0)))
    crop = values[3:-5, 4:-2]
    moved = truth @ affine @ np.array([[1, 0, 3], [0, 1, 4], [0, 0, 1.0]])
    fixed = folder / "fixed image.nii.gz"
    save(fixed, values, affine)
    save(folder / AWKWARD, crop, moved)
    save(folder / "labels.nii.gz", (crop > np.percentile(crop, 80)).astype(np.uint8) * 7, moved)
    return SimpleNamespace(
        fixed=fixed, moving=folder / AWKWARD, labels=folder / "labels.nii.gz", truth=truth, image=image, folder=folder
    )


def resample_by_itk(folder: Path, fixed: Path, moving: Path) -> np.ndarray:
    """The moving image on the fixed grid through the written transform, array axes in NIfTI's order."""
    reference, image = (itk.imread(os.fspath(path), itk.F) for path in (fixed, moving))
    (transform,) = itk.transformread(os.fspath(folder / "transform.tfm"))
    moved = itk.resample_image_filter(
        image, transform=transform, reference_image=reference, use_reference_image=True, default_pixel_value=0.0
    )
    return itk.array_from_image(moved).T


def test_command_registers_a_pair_from_another_folder(pair: SimpleNamespace, tmp_path: Path) -> None:
    """As users type it: the default preset, which needs no weights."""
    done = command(
        tmp_path,
        *("--fixed", str(pair.fixed), "--moving", str(pair.moving), "--labels", str(pair.labels)),
        *("--output_dir", "my results"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "my results" / AWKWARD.removesuffix(".nii.gz")
    assert {p.name for p in folder.iterdir()} == {
        "moved.nii.gz", "moved_labels.nii.gz", "transform.tfm", "report.json", "overview.png",
            "uncertainty.nii.gz", "report.html",
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["my results"]

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    matrix = np.array(report["matrix"])
    assert foreground_tre(matrix, pair.truth, pair.image)["mean"] < 0.2  # pixels of 2 mm
    assert report["success"] and report["preset"] == "robust" and report["transform"] == "affine"
    parameters = AffineParameters(**{k: tuple(v) for k, v in report["parameters"].items() if k != "angle_deg"})
    np.testing.assert_allclose(compose_parameters(parameters), matrix, atol=1e-9)
    assert report["seconds"] > 0
    assert report["metrics"]["after"]["nmi"] > report["metrics"]["before"]["nmi"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["input"]["moving"] == str(pair.moving)
    assert "registered" in done.stdout and "SIMULATED" not in done.stdout

    ours = nib.load(folder / "moved.nii.gz")
    np.testing.assert_allclose(ours.affine, nib.load(pair.fixed).affine, atol=1e-5)
    theirs = resample_by_itk(folder, pair.fixed, pair.moving)
    ours_values = ours.get_fdata()
    assert ours_values.shape == theirs.shape
    # the two treat the half voxel at the rim of the moving image differently; the slice has no content there
    np.testing.assert_allclose(ours_values, theirs, atol=1e-3 * theirs.max())

    labels = nib.load(folder / "moved_labels.nii.gz")
    assert labels.get_data_dtype() == np.uint8
    assert set(np.unique(labels.dataobj)) == {0, 7}
    bright = ours_values > np.percentile(nib.load(pair.moving).get_fdata(), 80)
    assert (bright == (np.asarray(labels.dataobj) == 7)).mean() > 0.97


def test_command_names_wrong_input_without_a_stack_trace(pair: SimpleNamespace, tmp_path: Path) -> None:
    done = command(tmp_path, "--fixed", str(pair.fixed), "--moving", "not there.nii.gz")
    assert done.returncode == WRONG_INPUT
    assert "moving" in done.stderr and "not there.nii.gz" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_demonstration_says_that_it_is_simulated_and_how_far_off_it_is(
    vgg19_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nilearn")
    run(output_dir=str(tmp_path), vgg19_weights=str(vgg19_weights), demonstration_dims=2)
    printed = capsys.readouterr().out
    folder = tmp_path / "demonstration"
    report = json.loads((folder / "report.json").read_text())
    error = report["error_mm"]
    assert "SIMULATED" in printed
    assert f"{error['before']['mean']:.2f} mm before, {error['after']['mean']:.2f} mm after" in printed
    assert 5.0 < error["before"]["mean"] < 30.0
    assert error["after"]["mean"] < error["before"]["mean"]
    assert (folder / "fixed_t1.nii.gz").is_file() and (folder / "moving_simulated_t2.nii.gz").is_file()


def test_a_volume(vgg19_weights: Path, load_volume: Callable[..., MetaTensor], tmp_path: Path) -> None:
    image = load_volume()
    values, affine = image[0].numpy()[::4, ::4, ::4], image.affine.numpy() @ np.diag([4.0, 4.0, 4.0, 1.0])
    shift = np.eye(4)
    shift[:3, 3] = (8.0, -5.0, 6.0)
    save(tmp_path / "fixed.nii.gz", values, affine)
    save(tmp_path / "moving.nii.gz", values[2:], shift @ affine @ np.array(np.diag([1.0] * 4) + np.eye(4, k=3) * 2))
    run(
        fixed=str(tmp_path / "fixed.nii.gz"),
        moving=str(tmp_path / "moving.nii.gz"),
        output_dir=str(tmp_path / "out"),
        vgg19_weights=str(vgg19_weights),
        transform="rigid",
        options={"spacing": 6.0, "scales": [1], "iterations": 1},
    )
    folder = tmp_path / "out" / "moving"
    report = json.loads((folder / "report.json").read_text())
    matrix = np.array(report["matrix"])
    assert matrix.shape == (4, 4)
    np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-5)
    assert foreground_tre(matrix, shift, MetaTensor(values[None], affine=affine))["mean"] < 6.0
    ours = nib.load(folder / "moved.nii.gz").get_fdata()
    theirs = resample_by_itk(folder, tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz")
    inside = (slice(2, -2),) * 3
    assert np.abs(ours - theirs)[inside].max() < 1e-3 * theirs.max()


def test_failure_is_written_and_reported(vgg19_weights: Path, tmp_path: Path, pair: SimpleNamespace) -> None:
    # a regressor that answers with a mirror image, whatever it is shown
    state = torch.load(BUNDLE / "models" / "model.pt", weights_only=True)
    *_, last = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    state[f"{last}.weight"].zero_()
    state[f"{last}.bias"].copy_(torch.tensor([-1.0, 0.0, 0.0, 0.0, 1.0, 0.0]))
    torch.save(state, tmp_path / "mirror.pt")
    with pytest.warns(RegistrationWarning), pytest.raises(SystemExit) as stop:
        run(
            fixed=str(pair.fixed),
            moving=str(pair.moving),
            name="mirror",
            output_dir=str(tmp_path / "out"),
            vgg19_weights=str(vgg19_weights),
            regressor_weights=str(tmp_path / "mirror.pt"),
            preset="paper",
            options={},
        )
    assert stop.value.code == FAILED
    folder = tmp_path / "out" / "mirror"
    report = json.loads((folder / "report.json").read_text())
    assert report["success"] is False and "mirror" in report["warnings"][0]
    assert report["matrix"] == np.eye(3).tolist()
    assert (folder / "moved.nii.gz").is_file() and (folder / "transform.tfm").is_file()


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
        ({"moving": "TEXT"}, "moving"),
        ({"moving": "FLAT"}, "moving"),
        ({"labels": "VOLUME"}, "labels"),
    ],
)
def test_wrong_input(
    options: dict,
    word: str,
    pair: SimpleNamespace,
    vgg19_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "TEXT").write_text("no image")
    save(tmp_path / "FLAT.nii.gz", np.ones((20, 20), dtype=np.float32), np.eye(3))
    save(tmp_path / "VOLUME.nii.gz", np.ones((20, 20, 20), dtype=np.float32), np.eye(4))
    files = {name: str(next(tmp_path.glob(f"{name}*"))) for name in ("TEXT", "FLAT", "VOLUME")}
    options = {key: files.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    good = {"fixed": str(pair.fixed), "moving": str(pair.moving), "vgg19_weights": str(vgg19_weights)}
    good["output_dir"] = str(tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        run(**(good | options))
    assert stop.value.code == WRONG_INPUT
    assert f"wrong input: {word}" in capsys.readouterr().err
    assert not list(tmp_path.rglob("out*"))


def test_results_do_not_overwrite_the_input(pair: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    save(folder / "moved.nii.gz", np.eye(20, dtype=np.float32), np.eye(3))
    (entry,) = pair_list(pair.fixed, folder / "moved.nii.gz", name="a")
    with pytest.raises(RegistrationError, match="overwrite"):
        ReadPair(tmp_path)(entry)


def test_list_of_one_pair() -> None:
    (entry,) = pair_list("t1.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz", dataset_dir="study")
    assert entry == {
        "fixed": os.path.join("study", "t1.nii.gz"),
        "moving": os.path.join("study", "sub-01/anat/sub-01_T2w.nii.gz"),
        "name": "sub-01_T2w",
    }
    assert pair_list("a.png", "b.png", name=7)[0]["name"] == "7"
    assert pair_list() == [{"name": "demonstration"}]


def test_several_pairs(pair: SimpleNamespace, vgg19_weights: Path, tmp_path: Path) -> None:
    data = [{"fixed": str(pair.fixed), "moving": str(pair.fixed), "name": name} for name in ("one", "two")]
    run(
        **{"dataset#data": data, "output_dir": str(tmp_path), "vgg19_weights": str(vgg19_weights)},
        options={"spacing": 5.0, "scales": [1], "iterations": 1},
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    assert (tmp_path / "two" / "report.json").is_file()


def test_inferer_takes_the_trained_network_for_what_it_was_trained_for(vgg19_weights: Path) -> None:
    network = trained_network(vgg19_weights)
    assert network is not trained_network(vgg19_weights)
    device = torch.device("cpu")
    paper = PairInferer("paper", vgg19_weights=vgg19_weights)
    assert paper.method_for(2, network, device).args[0] is network
    keypoints = PairInferer("keypoints", vgg19_weights=vgg19_weights)
    assert keypoints.method_for(2, network, device).args[0] is not network
    assert isinstance(PairInferer().method_for(3, network, device).args[0], RobustEngine)
    other = PairInferer("paper", vgg19_weights=vgg19_weights, options={"num_sets": 3})
    assert other.method_for(2, network, device).args[0].num_sets == 3


def test_properties(tmp_path: Path) -> None:
    workflow = ConfigWorkflow(str(INFERENCE), workflow_type="infer", logging_file=False, output_dir=str(tmp_path / "o"))
    workflow.initialize()
    assert workflow.check_properties() == []
    assert workflow.version == "0.1.0"
    assert workflow.dataset_data == [{"name": "demonstration"}]
    assert list(tmp_path.iterdir()) == []  # looking at a bundle writes nothing


def test_targets_are_installed_packages() -> None:
    text = INFERENCE.read_text()
    targets = [line.split('"')[3] for line in text.splitlines() if '"_target_"' in line]
    assert targets and all(t.split(".")[0] in ("monai_zsreg", "torch") or "." not in t for t in targets)


def test_one_image_only_is_refused() -> None:
    """MONAI Label's own bundle app hands over a single image."""
    with pytest.raises(RegistrationError, match="data: got .*image.* expected two images, fixed and moving"):
        ReadPair()({"image": "t1.nii.gz", "device": "cpu"})
