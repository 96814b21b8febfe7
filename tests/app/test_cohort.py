# SPDX-License-Identifier: Apache-2.0
"""Tests of many pairs in one run: datalists, BIDS folders, bad files, resuming, and two processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch.nn.functional as F

from monai_zsreg.cohort import SUMMARY, ReadAhead, all_pairs, bids_pairs, input_list, number_names
from monai_zsreg.errors import RegistrationError

INFERENCE = Path(__file__).parents[1] / "bundles" / "zero_shot_affine_registration" / "configs" / "inference.json"
SHIFT = (5.0, -4.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, load_slice) -> SimpleNamespace:
    """A T1 and a T2 slice, the second one shifted by its header; one that is no image; noise."""
    folder = tmp_path_factory.mktemp("images")
    header = np.diag([2.0, 2.0, 1.0, 1.0])
    for name, modality in (("t1", "t1"), ("t2", "t2")):
        values = F.avg_pool2d(load_slice(modality=modality).as_tensor(), 2)[0].numpy()
        affine = header.copy()
        if name == "t2":
            affine[:2, 3] = SHIFT
        nib.save(nib.Nifti1Image(values, affine), folder / f"{name}.nii.gz")
    noise = np.random.default_rng(0).random(values.shape).astype(np.float32)
    nib.save(nib.Nifti1Image(noise, header), folder / "noise.nii.gz")
    (folder / "text.nii.gz").write_text("no image")
    return SimpleNamespace(folder=folder, t1=folder / "t1.nii.gz", t2=folder / "t2.nii.gz")


def command(output: Path, *options: str, processes: int = 1) -> list[str]:
    run = ["-m", "monai.bundle", "run", "--config_file", str(INFERENCE), "--output_dir", str(output)]
    head = [sys.executable]
    if processes > 1:
        head += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*head, *run, "--device", "cpu", *options]


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*arguments, **options), capture_output=True, text=True, env=environment, timeout=300)


def rows(output: Path) -> dict[str, dict[str, str]]:
    with open(output / SUMMARY, newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def write_list(path: Path, entries: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["fixed", "moving", "name"])
        writer.writeheader()
        writer.writerows(entries)
    return path


@pytest.mark.slow
def test_bad_pairs_are_rows_and_a_rerun_does_only_what_is_missing(images: SimpleNamespace, tmp_path: Path) -> None:
    entries = [{"fixed": "t1.nii.gz", "moving": "t2.nii.gz", "name": f"good{i}"} for i in range(3)]
    bad = [
        {"fixed": "t1.nii.gz", "moving": "text.nii.gz", "name": "text"},
        {"fixed": "t1.nii.gz", "moving": "missing.nii.gz", "name": "missing"},
        {"fixed": "t1.nii.gz", "moving": "noise.nii.gz", "name": "noise"},
    ]
    datalist = write_list(tmp_path / "pairs.csv", [entries[0], *bad, *entries[1:]])
    options = ("--datalist", str(datalist), "--dataset_dir", str(images.folder))
    done = run(tmp_path / "out", *options)
    assert done.returncode == 3, done.stderr[-2000:]
    found = rows(tmp_path / "out")
    assert [found[f"good{i}"]["verdict"] for i in range(3)] == ["PASS"] * 3
    assert {found[name]["verdict"] for name in ("text", "missing", "noise")} == {"FAIL"}
    assert "moving" in found["missing"]["reasons"] and "missing.nii.gz" in found["missing"]["reasons"]
    assert "text.nii.gz" in found["text"]["reasons"]
    # worst first
    assert set(list(found)[:3]) == {"text", "missing", "noise"}
    matrix = np.array(json.loads((tmp_path / "out" / "good1" / "report.json").read_text())["matrix"])
    # two real contrasts
    np.testing.assert_allclose(matrix[:2, 2], SHIFT, atol=1.5)

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("good*/report.json")}
    (tmp_path / "out" / "good2" / "report.json").unlink()
    before.pop(tmp_path / "out" / "good2" / "report.json")
    # the missing file has come
    nib.save(nib.load(images.t2), images.folder / "missing.nii.gz")
    done = run(tmp_path / "out", *options, "--exit_on_fail", "false")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    found = rows(tmp_path / "out")
    assert found["missing"]["verdict"] == found["good2"]["verdict"] == "PASS" and found["text"]["verdict"] == "FAIL"
    (images.folder / "missing.nii.gz").unlink()


@pytest.mark.slow
def test_nothing_in_a_datalist_is_evaluated(images: SimpleNamespace, tmp_path: Path) -> None:
    """MONAI evaluates ``$...``, resolves ``@...`` and reads ``%...`` in configurations; a datalist is data."""
    trace = tmp_path / "evaluated"
    names = [
        f"$open({str(trace)!r}, 'w')".replace("/", "\u2215"),
        "$1+1",
        "@output_dir",
        "%file",
        "${HOME}",
        "'quoted\".x",
    ]
    files = []
    for number, name in enumerate(
        ["$moving.nii.gz", "@moving.nii.gz", "%moving.nii.gz", "a\nb.nii.gz", " c.nii.gz", "é脳.nii.gz"]
    ):
        files.append(tmp_path / name)
        files[number].write_bytes(images.t2.read_bytes())
    entries = [{"fixed": str(images.t1), "moving": f.name, "name": n} for f, n in zip(files, names, strict=True)]
    datalist = tmp_path / "pairs.json"
    datalist.write_text(json.dumps(entries))
    done = run(tmp_path / "out", "--datalist", str(datalist), "--dataset_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert {name: row["verdict"] for name, row in rows(tmp_path / "out").items()} == dict.fromkeys(names, "PASS")
    assert all((tmp_path / "out" / name / "moved.nii.gz").is_file() for name in names)
    assert not trace.exists()
    # one pair on the command line, where MONAI looks at the first character
    done = run(tmp_path / "one", "--fixed", str(images.t1), "--moving", str(files[0]), "--name", "one")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "one" / "one" / "moved.nii.gz").is_file()


@pytest.mark.slow
def test_kill_in_the_middle_leaves_whole_files_and_goes_on(images: SimpleNamespace, tmp_path: Path) -> None:
    entries = [{"fixed": str(images.t1), "moving": str(images.t2), "name": f"p{i:02d}"} for i in range(30)]
    datalist = write_list(tmp_path / "pairs.csv", entries)
    out = tmp_path / "out"
    with subprocess.Popen(
        command(out, "--datalist", str(datalist)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        begin = time.monotonic()
        while len(list(out.glob("*/report.json"))) < 5 and time.monotonic() - begin < 120:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    kept = {p: p.stat().st_mtime_ns for p in out.glob("*/report.json")}
    assert 5 <= len(kept) < 30 and not (out / SUMMARY).exists()
    for path in kept:
        json.loads(path.read_text())
    done = run(out, "--datalist", str(datalist))
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert [row["verdict"] for row in rows(out).values()] == ["PASS"] * 30
    # nothing left to do
    again = run(out, "--datalist", str(datalist))
    assert again.returncode == 0 and "30 PASS" in again.stdout


@pytest.mark.slow
def test_two_processes_give_what_one_gives_on_a_bids_folder(images: SimpleNamespace, tmp_path: Path) -> None:
    for subject in ("01", "02"):
        anat = tmp_path / "bids" / f"sub-{subject}" / "anat"
        anat.mkdir(parents=True)
        for source, suffix in ((images.t1, "T1w"), (images.t2, "T2w"), (images.t2, "FLAIR")):
            (anat / f"sub-{subject}_{suffix}.nii.gz").write_bytes(source.read_bytes())
    for processes in (1, 2):
        done = run(tmp_path / f"out{processes}", "--datalist", str(tmp_path / "bids"), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        {p.parent.name: json.loads(p.read_text())["matrix"] for p in (tmp_path / f"out{n}").glob("*/report.json")}
        for n in (1, 2)
    )
    assert set(one) == {f"sub-{s}_{m}" for s in ("01", "02") for m in ("T2w", "FLAIR")} and one == two
    first, second = rows(tmp_path / "out1"), rows(tmp_path / "out2")
    assert {k: v["verdict"] for k, v in first.items()} == {k: v["verdict"] for k, v in second.items()}


def test_bids_pairs(tmp_path: Path) -> None:
    names = {
        "sub-1/ses-a/anat": ["sub-1_ses-a_T1w.nii.gz", "sub-1_ses-a_ce-gad_T1w.nii.gz", "sub-1_ses-a_FLAIR.nii"],
        "sub-2/anat": ["sub-2_run-1_T1w.nii.gz", "sub-2_run-2_T1w.nii.gz", "sub-2_T2w.nii.gz", "sub-2_T1w.json"],
        "sub-3/anat": ["sub-3_T2w.nii.gz", "sub-3_FLAIR.nii.gz"],
        "sub-4/anat": ["sub-4_T1w.nii.gz", "sub-4_desc-brain_T2w.nii.gz", "sub-4_label-x_mask.nii.gz"],
    }
    for folder, files in names.items():
        (tmp_path / folder).mkdir(parents=True)
        for file in files:
            (tmp_path / folder / file).touch()
    found = {pair["name"]: Path(pair["fixed"]).name for pair in bids_pairs(tmp_path)}
    assert found == {
        "sub-1_ses-a_ce-gad_T1w": "sub-1_ses-a_T1w.nii.gz",
        "sub-1_ses-a_FLAIR": "sub-1_ses-a_T1w.nii.gz",
        "sub-2_run-2_T1w": "sub-2_run-1_T1w.nii.gz",
        "sub-2_T2w": "sub-2_run-1_T1w.nii.gz",
    }
    with pytest.raises(RegistrationError, match="datalist"):
        bids_pairs(tmp_path / "sub-3")


def test_names_are_made_unique() -> None:
    pairs = all_pairs([{"fixed": "a.nii", "moving": "x/b.nii"}, {"fixed": "a.nii", "moving": "y/b.nii"}])
    assert [pair["name"] for pair in pairs] == ["b", "b_2"]
    pairs = all_pairs([{"fixed": "a.nii", "moving": "b.nii"}, {"fixed": "a.nii", "moving": "c.nii", "name": "b"}])
    assert [pair["name"] for pair in pairs] == ["b_2", "b"]
    many = number_names([({"name": "n"}, False) for _ in range(3000)], ())
    assert len({pair["name"] for pair in many}) == 3000


@pytest.mark.parametrize(
    ("datalist", "argument"),
    [
        ([], "datalist"),
        ("nowhere.csv", "datalist"),
        ([{"fixed": "a"}], r"datalist\[0\]\.moving"),
        ([{"fixed": "a", "moving": "b", "movign": "c"}], r"datalist\[0\]"),
        (["a"], r"datalist\[0\]"),
        ([{"fixed": "a", "moving": "b", "name": "../x"}], "name"),
        ([{"fixed": "a", "moving": "b", "name": "x"}] * 2, "name"),
        ({"training": []}, "datalist"),
    ],
)
def test_wrong_datalists(datalist: Any, argument: str) -> None:
    with pytest.raises(RegistrationError, match=argument):
        all_pairs(datalist)
    with pytest.raises(RegistrationError, match="fixed"):
        input_list(fixed="a.nii", datalist=[{"fixed": "a", "moving": "b"}])


def test_wrong_datalist_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text("{")
    done = run(tmp_path / "out", "--datalist", str(tmp_path / "pairs.json"))
    assert done.returncode == 2 and "wrong input: datalist" in done.stderr and not (tmp_path / "out").exists()


class _Numbers:
    """Items 0, 1, 2; reading item 1 is noticed, reading item 2 fails."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        if index == 1:
            self.begun.set()
        if index == 2:
            raise RegistrationError("fixed", "a.nii.gz", "an image")
        return index


def test_next_pair_is_read_meanwhile() -> None:
    numbers = _Numbers()
    loader = iter(ReadAhead(numbers, batch_size=None))
    assert next(loader) == 0
    assert numbers.begun.wait(60), "nobody asked for the next one, and nobody read it"
    assert next(loader) == 1
    with pytest.raises(RegistrationError, match="a.nii.gz"):
        next(loader)


def test_reading_ahead_may_be_broken_off() -> None:
    before = threading.active_count()
    for item in ReadAhead(list(range(50)), batch_size=None):
        if item == 3:
            break
    assert threading.active_count() == before
    assert list(ReadAhead(list(range(5)), batch_size=None, num_workers=1)) == list(range(5))
