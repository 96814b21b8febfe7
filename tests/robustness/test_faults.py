# SPDX-License-Identifier: Apache-2.0
"""After a kill, a full disk, a dead worker or a second process: whole files, and a rerun that completes."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import psutil
import pytest
import torch.nn.functional as F

from monai_zsreg.errors import RegistrationError
from monai_zsreg.io import read_transform, write_json, write_transform
from monai_zsreg.io.files import remove_leftovers

INFERENCE = Path(__file__).parents[2] / "bundles" / "zero_shot_affine_registration" / "configs" / "inference.json"
PAIRS = 8


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, load_slice) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("pairs")
    files = {}
    for modality in ("t1", "t2"):
        values = F.avg_pool2d(load_slice(modality=modality).as_tensor(), 2)[0].numpy()
        files[modality] = folder / f"{modality}.nii.gz"
        nib.save(nib.Nifti1Image(values, np.diag([2.0, 2.0, 1.0, 1.0])), files[modality])
    datalist = folder / "pairs.csv"
    with datalist.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["fixed", "moving", "name"])
        writer.writerows([files["t1"], files["t2"], f"p{i}"] for i in range(PAIRS))
    return SimpleNamespace(datalist=datalist, **files)


def bundle(pairs: SimpleNamespace, output: Path, *options: str) -> list[str]:
    words = ["-m", "monai.bundle", "run", "--config_file", str(INFERENCE), "--device", "cpu", "--page", "False"]
    return [*words, "--output_dir", str(output), "--datalist", str(pairs.datalist), *options]


def zsreg(pairs: SimpleNamespace, output: Path) -> list[str]:
    """The same without the six seconds that MONAI takes to import, where it is not what is tested."""
    words = ["-m", "monai_zsreg.app.cli", "cohort", str(pairs.datalist), "--device", "cpu", "--no-page"]
    return [*words, "--output", str(output)]


def start(words: list[str], **arguments) -> subprocess.Popen:
    command = [sys.executable, *words]
    path = os.pathsep.join(filter(None, [str(INFERENCE.parents[3]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, **arguments
    )


def wait_for_reports(output: Path, count: int) -> None:
    begin = time.monotonic()
    while len(list(output.glob("*/report.json"))) < count:
        assert time.monotonic() - begin < 120, "nothing was registered"
        time.sleep(0.02)


def whole_files(output: Path) -> int:
    """Read every file of a final name; how many there were."""
    count = 0
    for path in output.rglob("*"):
        if path.is_dir() or path.name.startswith(".partial-"):
            continue
        count += 1
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name.endswith(".nii.gz"):
            nib.load(path).get_fdata()
        elif path.suffix in (".tfm", ".h5", ".mat"):
            read_transform(path, format="itk")
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        else:
            end = {".csv": "\n", ".html": "</html>"}[path.suffix]
            assert path.read_text(encoding="utf-8").endswith(end), path
    return count


def assert_completes(pairs: SimpleNamespace, output: Path) -> None:
    """The bundle's command, once more or on what the other one left, in this process."""
    options: dict[str, Any] = {"output_dir": str(output), "datalist": str(pairs.datalist), "page": False}
    monai.bundle.run(config_file=str(INFERENCE), device="cpu", logging_file=False, **options)
    with open(output / "summary.csv", newline="") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == ["PASS"] * PAIRS
    assert whole_files(output) > 4 * PAIRS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "sent"), [(bundle, signal.SIGINT), (bundle, signal.SIGTERM), (zsreg, signal.SIGKILL)]
)
def test_signal_in_the_middle(
    pairs: SimpleNamespace, tmp_path: Path, command: Callable[..., list[str]], sent: signal.Signals
) -> None:
    # a shell's background jobs ignore SIGINT, and so would what they start
    process = start(command(pairs, tmp_path), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for_reports(tmp_path, 2)
    process.send_signal(sent)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert whole_files(tmp_path) >= 4
    assert not (tmp_path / "summary.csv").exists()
    assert_completes(pairs, tmp_path)


@pytest.mark.slow
def test_no_room_for_an_image(pairs: SimpleNamespace, tmp_path: Path) -> None:
    limit = 12_000  # bytes a file: the transform fits, the moved image does not

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(zsreg(pairs, tmp_path), preexec_fn=small_files)
    _, errors = process.communicate(timeout=300)
    assert process.returncode not in (0, None)
    assert "room to write it" in errors
    whole_files(tmp_path)
    assert not list(tmp_path.glob("*/moved.nii.gz")) and not list(tmp_path.rglob(".partial-*"))
    assert_completes(pairs, tmp_path)


@pytest.mark.slow
def test_two_runs_on_one_folder(pairs: SimpleNamespace, tmp_path: Path) -> None:
    both = [start(zsreg(pairs, tmp_path)) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-6000:]
    assert not list(tmp_path.rglob(".partial-*"))
    assert_completes(pairs, tmp_path)


@pytest.mark.slow
def test_worker_that_dies(pairs: SimpleNamespace, tmp_path: Path) -> None:
    process = start(bundle(pairs, tmp_path, "--num_workers", "1"))
    wait_for_reports(tmp_path, 1)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    _, errors = process.communicate(timeout=120)
    # the worker may have read everything before it died
    assert process.returncode == 0 or "worker" in errors.lower(), errors[-6000:]
    whole_files(tmp_path)
    assert_completes(pairs, tmp_path)


def test_devices_are_not_replaced(tmp_path: Path) -> None:
    before = os.stat("/dev/full")
    with pytest.raises(RegistrationError, match="^path: "):
        write_json("/dev/full", {})
    with pytest.raises(RegistrationError, match="^path: "):
        write_transform("/dev/null", np.eye(4), format="text")
    assert os.stat("/dev/full").st_rdev == before.st_rdev
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(RegistrationError, match="^path: "):
        write_json(pipe, {})


def test_leftovers_of_a_kill_go_when_they_are_old(tmp_path: Path) -> None:
    old, young, mine = tmp_path / ".partial-a.nii.gz", tmp_path / ".partial-b.nii.gz", tmp_path / "moved.nii.gz"
    for path in (old, young, mine):
        path.write_text("x")
    past = time.time() - 2 * 3600
    os.utime(old, (past, past))
    os.utime(mine, (past, past))
    remove_leftovers(tmp_path)
    assert not old.exists() and young.exists() and mine.exists()
