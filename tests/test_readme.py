# SPDX-License-Identifier: Apache-2.0
"""Every block of the README runs as it stands, on a small head in files of the names that it uses."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fire
import monai.bundle.__main__
import nibabel as nib
import numpy as np
import pytest
from phantoms import padded, pooled, template, turn

from monai_zsreg.app.cli import main

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# what the environment of these tests, the tests themselves and those of the server stand for
ELSEWHERE = ("pip install", "python -m pytest", "monailabel start_server", "bash .ci/run")


def commands() -> Iterator[str]:
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S):
        for line in block.splitlines():
            yield from (command.strip() for command in line.partition("  #")[0].split("&&") if command.strip())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """t1, t2, flair of one head, which the headers of the last two have moved; lesions of flair; a list of pairs."""
    monkeypatch.chdir(tmp_path)
    for name in ("t1", "t2", "flair"):
        image = padded(pooled(template(name), 3), 4)
        motion = np.eye(4) if name == "t1" else turn(image, 12.0, (6.0, -5.0, 4.0), 1.0)
        values = image[0].numpy()
        nib.save(nib.Nifti1Image(values, motion @ image.affine.numpy()), f"{name}.nii.gz")
    lesions = (values > np.percentile(values, 99)).astype(np.uint8)
    nib.save(nib.Nifti1Image(lesions, motion @ image.affine.numpy()), "lesions.nii.gz")
    Path("pairs.csv").write_text("fixed,moving\nt1.nii.gz,t2.nii.gz\nt1.nii.gz,flair.nii.gz\n")
    return tmp_path


def test_length_and_order() -> None:
    assert len(TEXT.splitlines()) <= 150
    titles = re.findall(r"^## (.*)$", TEXT, re.M)
    order = "Install, One pair, PASS, In a Compose, Many pairs, Other tools, Accuracy, MONAI Label, Cite".split(", ")
    assert len(titles) == len(order) and all(map(str.startswith, titles, order))
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith(ELSEWHERE)])
def test_command(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [re.sub("^bundles/", f"{ROOT}/bundles/", word) for word in shlex.split(command)]
    if words[0] == "zsreg":
        # two workers do what four do
        assert main(["2" if before == "--workers" else word for before, word in itertools.pairwise(words)]) == 0
    else:
        words += ["--output_dir", str(folder / "eval")]  # the clone stays clean
        assert words[:3] == ["python", "-m", "monai.bundle"]
        if "--datalist" in words:
            # here, because that a process of its own works is shown by the first command
            monkeypatch.setattr(sys, "argv", [monai.bundle.__main__.__file__, *words[3:]])
            fire.Fire({"run": monai.bundle.run}, words[3:])
        else:
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stdout + done.stderr
    assert list(folder.rglob("report.html" if words[0] == "zsreg" else "report.json"))


@pytest.mark.slow
@pytest.mark.parametrize("block", re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S))
def test_python(folder: Path, block: str) -> None:
    names: dict = {}
    exec(block, names)
    verdict = names["result"].verdict if "result" in names else names["data"]["flair"].meta["registration_verdict"]
    assert verdict == "PASS"
