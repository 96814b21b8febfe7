# SPDX-License-Identifier: Apache-2.0
"""The bundle's option ``uncertainty``: maps, picture and numbers of section 2.7 of the paper."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_zsreg import inference
from monai_zsreg.errors import RegistrationError
from monai_zsreg.inference import DescribeUncertainty
from monai_zsreg.io import write_json
from monai_zsreg.registration import RegistrationResult
from monai_zsreg.registration.uncertainty import BlackeningUncertainty

INFERENCE = Path(__file__).parents[2] / "bundles" / "zero_shot_affine_registration" / "configs" / "inference.json"
FILES = ("uncertainty_displacement.nii.gz", "uncertainty_intensity.nii.gz", "uncertainty.png")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, load_slice: Callable[..., MetaTensor]) -> SimpleNamespace:
    """A real slice with an oblique header, and the same one shifted."""
    folder = tmp_path_factory.mktemp("pair")
    values = load_slice()[0, ::2, ::2].numpy().astype(np.float32)
    header = np.array([[-1.98, 0.2, 0, 90.0], [0.25, 1.98, 0, -110.0], [0, 0, 1, 0], [0, 0, 0, 1]])
    shift = np.eye(4)
    shift[:2, 3] = 6.0, -5.0
    for name, affine in (("fixed", header), ("moving", shift @ header)):
        image = nib.Nifti1Image(values, affine)
        image.set_qform(affine, code="scanner")
        nib.save(image, folder / f"{name}.nii.gz")
    return SimpleNamespace(fixed=folder / "fixed.nii.gz", moving=folder / "moving.nii.gz", shape=values.shape)


def run(pair: SimpleNamespace, output_dir: Path, vgg19_weights: Path, **options: Any) -> dict:
    settings = {"fixed": str(pair.fixed), "moving": str(pair.moving), "name": "p", "output_dir": str(output_dir)}
    settings |= {
        "vgg19_weights": str(vgg19_weights),
        "device": "cpu",
        "preset": "keypoints",
        "options": {"scales": [1], "iterations": 1},
    }
    monai.bundle.run(config_file=str(INFERENCE), logging_file=False, **(settings | options))
    return json.loads((output_dir / "p" / "report.json").read_text())


@pytest.mark.parametrize(("preset", "options"), [("keypoints", {"scales": [1], "iterations": 1}), ("robust", {})])
def test_maps_picture_and_numbers(
    preset: str, options: dict, pair: SimpleNamespace, vgg19_weights: Path, tmp_path: Path
) -> None:
    report = run(pair, tmp_path, vgg19_weights, uncertainty=True, preset=preset, options=options)
    numbers = report["uncertainty"]
    assert numbers["repeats"] == 10 and 2 <= numbers["succeeded"] <= 10 and numbers["seconds"] > 0
    variance = np.array(numbers["variance"])
    assert variance.shape == (2, 3) and (variance >= 0).all() and variance.max() > 0
    folder = tmp_path / "p"
    images = {name: nib.load(folder / name) for name in FILES[:2]}
    for key, name in zip(("uncertainty_displacement", "uncertainty_intensity"), FILES, strict=False):
        image = images[name]
        assert report["output"][key] == str(folder / name)
        assert image.shape == (*pair.shape, 1) or image.shape == pair.shape
        np.testing.assert_allclose(image.affine, nib.load(pair.fixed).affine, atol=1e-5)
        assert image.header.get_xyzt_units()[0] == "mm" and int(image.header["sform_code"]) == 1
        values = np.asarray(image.dataobj).squeeze()
        assert np.isfinite(values).all() and (values >= 0).all() and values.max() > 0
    displacement = np.asarray(images[FILES[0]].dataobj).squeeze()
    middle = displacement[tuple(slice((n - 1) // 2, n // 2 + 1) for n in displacement.shape)].mean()
    assert middle == pytest.approx(numbers["std_mm_at_center"], rel=0.02)
    pytest.importorskip("matplotlib")
    assert report["output"]["uncertainty"] == str(folder / FILES[2]) and (folder / FILES[2]).stat().st_size > 5000

    # another run without it leaves nothing behind that is not its own
    report = run(pair, tmp_path, vgg19_weights, uncertainty="false", preset=preset, options=options)
    assert "uncertainty" not in report and not set(report["output"]) & {"uncertainty", "uncertainty_displacement"}
    assert not [name for name in FILES if (folder / name).exists()]


def test_command_line_leaves_true_as_text(
    pair: SimpleNamespace, vgg19_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(pair, tmp_path / "out", vgg19_weights, uncertainty="maybe")
    assert stop.value.code == inference.WRONG_INPUT
    assert "wrong input: uncertainty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    data = {"pred": None, "report": {}}
    assert all(DescribeUncertainty(word)(data) == data for word in (False, "false", "False"))
    with pytest.raises(RegistrationError, match="uncertainty"):
        DescribeUncertainty(2)(data)


def result_with(succeeded: int, success: bool = True) -> RegistrationResult:
    """A result whose uncertainty comes from ``succeeded`` of ten repeats, each a shift of its own."""
    image = MetaTensor(torch.rand(1, 12, 9, generator=torch.Generator().manual_seed(0)))
    count = 0

    def estimate(copies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal count
        matrices = torch.eye(3, dtype=torch.float64).repeat(len(copies), 1, 1)
        matrices[:, 0, 2] = torch.arange(count, count + len(copies))
        count += len(copies)
        return matrices, matrices[:, 0, 2] < succeeded

    return RegistrationResult(
        affine=np.eye(3), success=success, warnings=[], seconds=0.1, preset="p", transform="affine", fixed=image,
        moving=image, _uncertainty=BlackeningUncertainty(estimate, image.as_tensor(), image, image),
    )  # fmt: skip


def test_spread_of_known_estimates() -> None:
    pair = DescribeUncertainty("true")({"pred": result_with(10), "report": {"name": "n"}})
    assert pair["report"]["name"] == "n"
    # shifts of 0 to 9 mm
    assert pair["report"]["uncertainty"]["variance"][0][2] == pytest.approx(np.var(np.arange(10), ddof=1))
    np.testing.assert_allclose(pair["uncertainty_displacement"], np.std(np.arange(10), ddof=1), rtol=1e-5)
    assert pair["uncertainty_intensity"].shape == (1, 12, 9)


@pytest.mark.parametrize("succeeded", [0, 1])
def test_unknown_is_null_and_has_no_map(succeeded: int, tmp_path: Path) -> None:
    pair = DescribeUncertainty()({"pred": result_with(succeeded), "report": {}})
    write_json(tmp_path / "report.json", pair["report"])
    report = json.loads((tmp_path / "report.json").read_text())["uncertainty"]
    assert report["variance"] == [[None] * 3] * 2 and report["std_mm_at_center"] is None
    assert report["repeats"] == 10
    assert not [key for key in pair if key.startswith("uncertainty")]


def test_a_failed_registration_has_none() -> None:
    pair = DescribeUncertainty()({"pred": result_with(10, success=False), "report": {}})
    assert pair["report"] == {"uncertainty": None}
    assert not [key for key in pair if key.startswith("uncertainty")]
