# SPDX-License-Identifier: Apache-2.0
"""The command: quick where there is nothing to do, one line where something is wrong, results that others can read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from phantoms import sitk_moved

from monai_zsreg.app import cli, demo, settings
from monai_zsreg.app.cli import main
from monai_zsreg.app.demo import demo_pair
from monai_zsreg.registration import PRESETS
from monai_zsreg.registration.deformable import DEFORMABLE
from monai_zsreg.registration.engine import TRANSFORMS

ROOT = Path(__file__).parents[2]

_IMPORTED = """
import sys
from monai_zsreg.app.cli import main
try:
    status = main({words!r})
except SystemExit as end:
    status = end.code
print(status, *[name for name in {names!r} if name in sys.modules])
"""


def imported(words: list[str], *names: str) -> list[str]:
    """The status of the command in a process of its own, and which of some modules it has imported."""
    code = _IMPORTED.format(words=words, names=names)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--help"], "0"), (["register", "--help"], "0"), (["--version"], "0"), (["register", "x.nii", "y.nii"], "2"),
     (["regsiter"], "2"), (["register", "--transfrom", "rigid"], "2"), (["register", "--preset", "best"], "2")],
)  # fmt: skip
def test_help_and_mistakes_do_not_wait_for_torch(words: list[str], status: str) -> None:
    assert imported(words, "torch", "monai", "numpy", "nibabel") == [status]


def test_the_benchmark_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("monai_zsreg.benchmark")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert main(["benchmark", "--help"]) == 2
    assert 'needs pandas: pip install "monai-zsreg[benchmark]"' in capsys.readouterr().err


@pytest.mark.slow
def test_registering_imports_no_monai(images: SimpleNamespace, tmp_path: Path) -> None:
    words = ["register", str(images.t1), str(images.t2), "-o", str(tmp_path), "-q"]
    assert imported(words, "torch", "monai", "itk", "matplotlib", "torchvision", "pandas") == ["0", "torch"]


def test_tables_of_choices_are_those_of_the_package() -> None:
    assert set(settings.PRESETS) == set(PRESETS) and settings.PRESETS[0] == PRESETS[0]
    assert set(settings.TRANSFORMS) == {*TRANSFORMS, DEFORMABLE}


def test_register_writes_what_others_read(
    images: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = str(images.folder / "t2_labels.nii.gz")
    words = ["register", str(images.t1), str(images.t2), "--labels", labels, "-o", str(tmp_path), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    folder = tmp_path / "t2"
    assert report == json.loads((folder / "report.json").read_text())
    assert {path.name for path in folder.iterdir()} == {
        "moved.nii.gz", "moved_labels.nii.gz", "expected_error.nii.gz", "transform.tfm", "overview.png", "report.html",
        "report.json",
    }  # fmt: skip
    np.testing.assert_allclose(np.array(report["matrix"])[:2, 2], images.shift, atol=1.0)
    assert report["verdict"] == "PASS" and report["metrics"]["after"]["nmi"] > report["metrics"]["before"]["nmi"]

    # ITK moves the image as we did
    fixed, moving = (sitk.ReadImage(str(path), sitk.sitkFloat32) for path in (images.t1, images.t2))
    expected = sitk_moved(moving, fixed, sitk.ReadTransform(str(folder / "transform.tfm")))
    ours = nib.load(folder / "moved.nii.gz")
    np.testing.assert_allclose(ours.affine, nib.load(images.t1).affine, atol=1e-5)
    values = np.squeeze(ours.get_fdata())
    np.testing.assert_allclose(values[3:-3, 3:-3], expected[3:-3, 3:-3], atol=2e-3 * expected.max())
    assert set(np.unique(nib.load(folder / "moved_labels.nii.gz").dataobj)) <= {0, 1, 2}


def test_the_map_of_the_expected_error_lies_on_the_image(images: SimpleNamespace, tmp_path: Path) -> None:
    words = ["register", str(images.t1), str(images.t2), "-o", str(tmp_path), "-q", "--no-page", "--fill-value=-7"]
    assert main(words) == 0
    assert nib.load(tmp_path / "t2" / "moved.nii.gz").get_fdata().min() < -1  # at the rim; T2 has no such values
    report = json.loads((tmp_path / "t2" / "report.json").read_text())
    small, fixed = nib.load(tmp_path / "t2" / "expected_error.nii.gz"), nib.load(images.t1)
    assert max(small.shape) <= 24 and small.get_data_dtype() == np.int16
    for corner in (0.0, 1.0):  # the outer corners of both fields of view
        ends = [
            image.affine @ np.append(np.array((*image.shape, 1)[:3]) * corner - 0.5, 1.0) for image in (small, fixed)
        ]
        np.testing.assert_allclose(ends[0][:2], ends[1][:2], atol=1e-3)
    covariance = np.array(report["covariance"]).reshape(2, 3, 2, 3)
    h = np.append((small.affine @ [3, 5, 0, 1])[:2], 1.0)
    expected = np.sqrt(np.einsum("iaib,a,b->", covariance, h, h))
    assert small.get_fdata().reshape(small.shape[:2])[3, 5] == pytest.approx(expected, rel=1e-3)


def test_fail_has_a_status_of_its_own(images: SimpleNamespace, tmp_path: Path, capsys) -> None:
    assert main(["register", str(images.t1), str(images.noise), "-o", str(tmp_path), "--no-page"]) == 3
    assert capsys.readouterr().out.startswith("noise: FAIL in ")


def test_pages_are_drawn_anew(images: SimpleNamespace, tmp_path: Path) -> None:
    words = ["register", str(images.t1), str(images.t2), "-o", str(tmp_path), "-q"]
    assert main(words) == 0
    page = tmp_path / "t2" / "report.html"
    before = page.read_text()
    page.unlink()
    assert main(["report", str(tmp_path)]) == 0
    numbers = re.compile(r"<td.*")
    assert numbers.findall(page.read_text()) == numbers.findall(before)
    assert (tmp_path / "index.html").is_file()
    assert main(["report", str(tmp_path / "t2" / "nothing")]) == 2


@pytest.mark.parametrize(
    ("words", "argument"),
    [
        (["register", "T1"], "images"),
        (["register", "T1", "nowhere.nii"], "images"),
        (["register", "T1", "TEXT"], "moving"),
        (["register", "T1", "T2", "--labels", "nowhere.nii"], "labels"),
        (["register", "T1", "T2", "NOISE", "--name", "x"], "name"),
        (["register", "T1", "T2", "--name", "../x"], "name"),
        (["register", "T1", "T2", "--fixed-mask", "nowhere.nii"], "fixed-mask"),
        (["register", "T1", "T2", "--device", "cuda:99"], "device"),
        (["register", "T1", "T2", "--seed", "-1"], "seed"),
        (["register", "T1", "T2", "--set", "serach=local"], "options"),
        (["register", "T1", "T2", "--set", "spacing"], "set"),
        (["register", "T1", "T2", "--set", "seed=3"], "set"),
        (["register", "T1", "T2", "--interactive"], "interactive"),
        (["register", "T1", "T2", "--set", "spacing=1000"], "spacing"),
        (["cohort", "nowhere.csv"], "datalist"),
        (["cohort", "TEXT"], "datalist"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], argument: str, images: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"T1": images.t1, "T2": images.t2, "TEXT": images.text, "NOISE": images.noise}
    assert main([*(str(named.get(word, word)) for word in words), "-o", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"zsreg {words[0]}: error: {argument}: ") and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_results_do_not_overwrite_the_input(images: SimpleNamespace, tmp_path: Path) -> None:
    moving = tmp_path / "a" / "moved.nii.gz"
    moving.parent.mkdir()
    moving.write_bytes(images.t2.read_bytes())
    assert main(["register", str(images.t1), str(moving), "--name", "a", "-o", str(tmp_path)]) == 2
    assert moving.read_bytes() == images.t2.read_bytes()


def test_errors_of_the_machine_are_no_wrong_input(
    images: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("monai_zsreg.app.run.write_image", full)
    assert main(["register", str(images.t1), str(images.t2), "-o", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "zsreg register: error: [Errno 28] No space left on device\n"


def test_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In 2D, where the command has it in 3D, as the README's first command does in its test."""
    pytest.importorskip("nilearn")
    monkeypatch.setattr(demo, "demo_pair", lambda folder, dims: demo_pair(folder, dims - 1))
    assert main(["register", "--demo", "-o", str(tmp_path), "--no-page"]) == 0
    told = capsys.readouterr()
    assert told.err.count("SIMULATED") == 1
    error = json.loads((tmp_path / "demonstration" / "report.json").read_text())["metrics"]
    assert f"{error['before']['tre']:.2f} mm before, {error['after']['tre']:.2f} mm after" in told.out
    assert error["after"]["tre"] < 0.2 < 5.0 < error["before"]["tre"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["register", "a", "b", "--ouput=x"], "--ouput=x; did you mean --output?"),
        (["cohort", "pairs.csv", "--no-resum"], "--no-resum; did you mean --no-resume?"),
        (["register", "a", "b", "--zzz"], "unrecognized argument --zzz\n"),
    ],
)
def test_a_mistyped_option_is_refused_with_the_nearest(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2 and told in capsys.readouterr().err
