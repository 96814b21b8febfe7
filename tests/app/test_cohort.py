# SPDX-License-Identifier: Apache-2.0
"""Tests of many pairs in one run: lists, BIDS folders, bad files, resuming, workers that are killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest

from monai_zsreg.app import cohort
from monai_zsreg.app.cli import main
from monai_zsreg.app.cohort import fingerprint
from monai_zsreg.app.datalist import bids_pairs, one_pair, read_datalist
from monai_zsreg.app.settings import SUMMARY, Settings
from monai_zsreg.app.tables import worst_first
from monai_zsreg.errors import RegistrationError

ROOT = Path(__file__).parents[2]
# enough that a kill after the fifth is in the middle
MANY = 14


def rows(output: Path) -> dict[str, dict[str, str]]:
    with open(output / SUMMARY, newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def times(output: Path, pattern: str = "*/report.json") -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in output.glob(pattern)}


def write_list(path: Path, entries: list[dict[str, str]]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for entry in entries for key in entry)))
        writer.writeheader()
        writer.writerows(entries)
    return str(path)


def test_bad_pairs_are_rows_and_a_rerun_does_only_what_is_missing(
    images: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"good0": "t2", "good1": "t2", "text": "text", "missing": "missing", "noise": "noise"}
    entries = [{"fixed": "t1.nii.gz", "moving": f"{file}.nii.gz", "name": name} for name, file in names.items()]
    entries[0]["labels"] = "t2_labels.nii.gz"  # and an empty cell for the others
    datalist = write_list(tmp_path / "pairs.csv", entries)
    out = tmp_path / "out"
    words = ["cohort", datalist, "-o", str(out), "--dataset-dir", str(images.folder)]
    assert main(words) == 3
    told = capsys.readouterr()
    assert "5 pairs (0 kept, 5 registered)" in told.out and "missing: FAILED" in told.err
    assert told.err.count("\n") <= 4
    found = rows(out)
    assert {name: row["verdict"] for name, row in found.items()} == {
        "good0": "PASS", "good1": "PASS", "text": "FAIL", "missing": "FAIL", "noise": "FAIL",
    }  # fmt: skip
    assert "moving" in found["missing"]["reasons"] and "text.nii.gz" in found["text"]["reasons"]
    assert set(list(found)[:3]) == {"text", "missing", "noise"}  # worst first
    assert (out / "good0" / "moved_labels.nii.gz").exists() and not (out / "good1" / "moved_labels.nii.gz").exists()
    matrix = np.array(json.loads((out / "good1" / "report.json").read_text())["matrix"])
    np.testing.assert_allclose(matrix[:2, 2], images.shift, atol=1.0)

    # files that could not be used are tried again; what was registered stays, bad or good
    before = times(out)
    assert main(words) == 3
    after = times(out)
    assert {name for name in before if before[name] != after[name]} == {"text", "missing"}
    assert "3 kept, 2 registered" in capsys.readouterr().out
    # as JSON: the reports of this run, in a list
    one = write_list(tmp_path / "one.csv", entries[:1])
    assert main([words[0], one, *words[2:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    # another transform: nothing is kept
    assert main([*words, "--transform", "rigid", "-q"]) == 3
    told = capsys.readouterr()
    assert told.out == "" and json.loads((out / "good1" / "report.json").read_text())["transform"] == "rigid"
    assert all(time > after[name] for name, time in times(out).items())


def test_summary_is_sorted_worst_first() -> None:
    found = {"fine": ("PASS", 0.4), "doubtful": ("WARN", -0.1), "worse": ("WARN", -0.9), "failed": ("FAIL", None)}
    reports = [{"name": n, "verdict": verdict, "reasons": [], "score": score} for n, (verdict, score) in found.items()]
    names = [row["name"] for row in worst_first([*reports, {"name": "no result"}])]
    assert names == ["no result", "failed", "worse", "doubtful", "fine"]


def test_what_a_result_depends_on(images: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moving = tmp_path / "moving.nii.gz"
    moving.write_bytes(images.t2.read_bytes())
    entry = one_pair(images.t1, moving)
    settings = Settings(tmp_path, page=False)
    before = fingerprint(entry, settings)
    assert before == json.loads(json.dumps(before)) == fingerprint(entry, replace(settings, device="cpu", page=True))
    for change in (
        {"transform": "rigid"}, {"preset": "paper"}, {"seed": 1}, {"options": {"spacing": 3}}, {"uncertainty": True},
    ):  # fmt: skip
        assert fingerprint(entry, replace(settings, **change)) != before
    assert fingerprint(entry | {"labels": str(images.t1)}, settings) != before
    monkeypatch.setattr("monai_zsreg.__version__", "99")
    assert fingerprint(entry, settings) != before
    monkeypatch.undo()
    os.utime(moving, ns=(1, 1))
    assert fingerprint(entry, settings) != before
    # a file among the options counts with its state
    mask = tmp_path / "mask.nii.gz"
    mask.write_bytes(images.t1.read_bytes())
    masked = replace(settings, options={"moving_mask": str(mask)})
    before = fingerprint(entry, masked)
    os.utime(mask, ns=(1, 1))
    assert fingerprint(entry, masked) != before


def command(datalist: str, output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "monai_zsreg.app.cli", "cohort", datalist, "-o", str(output), "--no-page", *options]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def wait_until(condition: Callable[[], Any]) -> Any:
    begin = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - begin < 120
        time.sleep(0.02)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_in_the_middle_leaves_whole_files_and_goes_on(
    images: SimpleNamespace, tmp_path: Path, workers: int
) -> None:
    entries = [{"fixed": str(images.t1), "moving": str(images.t2), "name": f"p{i:02d}"} for i in range(MANY)]
    words = command(write_list(tmp_path / "pairs.csv", entries), tmp_path / "out", "--workers", str(workers))
    out = tmp_path / "out"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment()) as process:
        wait_until(lambda: len(list(out.glob("*/report.json"))) >= 5)
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not children(process.pid))  # the workers follow
    kept = times(out)
    assert 5 <= len(kept) < MANY and not (out / SUMMARY).exists()
    assert main([*words[3:-1], "0"]) == 0
    assert {name: time for name, time in times(out).items() if name in kept} == kept
    assert [row["verdict"] for row in rows(out).values()] == ["PASS"] * MANY


def test_nothing_in_a_list_is_evaluated(images: SimpleNamespace, tmp_path: Path) -> None:
    names = ["$moving.nii.gz", "@moving.nii.gz", "a\nb.nii.gz", " c.nii.gz", "é脳.nii.gz"]
    for name in names:
        (tmp_path / name).write_bytes(images.t2.read_bytes())
    entries = [{"fixed": str(images.t1), "moving": name, "name": f"${number}"} for number, name in enumerate(names)]
    (tmp_path / "pairs.json").write_text(json.dumps({"testing": entries}))
    out = tmp_path / "out"
    assert (
        main(
            ["cohort", str(tmp_path / "pairs.json"), "-o", str(out), "--dataset-dir", str(tmp_path), "-q", "--no-page"]
        )
        == 0
    )
    assert all((out / f"${number}" / "moved.nii.gz").is_file() for number in range(len(names)))


# --------------------------------------------------------------------------------------------------------------------
# a cluster
# --------------------------------------------------------------------------------------------------------------------


def children(process: int) -> list[psutil.Process]:
    try:
        return [one for one in psutil.Process(process).children(recursive=True) if "spawn_main" in one.cmdline()[-2]]
    except (psutil.NoSuchProcess, IndexError):
        return []


def results(output: Path) -> dict[str, Any]:
    """All that was found, by name."""
    reports = {path.parent.name: json.loads(path.read_text()) for path in output.glob("*/report.json")}
    parts = ("matrix", "covariance", "measures", "metrics", "verdict", "reasons", "made_from", "input")
    return {name: {part: report[part] for part in parts} for name, report in reports.items()}


@pytest.fixture
def bids(images: SimpleNamespace, tmp_path: Path) -> str:
    for subject in ("01", "02"):
        anat = tmp_path / "bids" / f"sub-{subject}" / "anat"
        anat.mkdir(parents=True)
        for source, suffix in ((images.t1, "T1w"), (images.t2, "T2w"), (images.noise, "FLAIR")):
            (anat / f"sub-{subject}_{suffix}.nii.gz").write_bytes(source.read_bytes())
    return str(tmp_path / "bids")


@pytest.mark.slow
def test_workers_give_what_one_process_gives(bids: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(bids, tmp_path / "out1")[3:]) == 3
    one = capsys.readouterr()
    assert main(command(bids, tmp_path / "out2", "--workers", "2")[3:]) == 3
    two = capsys.readouterr()
    assert "4 pairs (0 kept, 4 registered): 2 PASS, 0 WARN, 2 FAIL" in two.out and two.err == one.err
    assert len(two.out.splitlines()) == 5, "a line a pair and one summary"
    assert results(tmp_path / "out1") == results(tmp_path / "out2") != {}
    for file in tmp_path.glob("out1/*/moved.nii.gz"):
        assert file.read_bytes() == (tmp_path / "out2" / file.parent.name / file.name).read_bytes()
    # either goes on where the other has been
    assert main(command(bids, tmp_path / "out1", "--workers", "2")[3:]) == 3
    assert "4 pairs (4 kept, 0 registered)" in capsys.readouterr().out


@pytest.mark.slow
def test_on_a_cluster_of_the_users(
    bids: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster:
        monkeypatch.chdir(tmp_path)  # the workers are elsewhere
        assert main(command("bids", Path("out"), "--scheduler", cluster.scheduler_address)[3:]) == 3
    assert main(command(bids, tmp_path / "out1")[3:]) == 3
    assert results(tmp_path / "out") == results(tmp_path / "out1") != {}
    capsys.readouterr()
    assert main(command(bids, tmp_path / "out", "--scheduler", "nothing://there")[3:]) == 3, "nothing is left to do"
    assert main(command(bids, tmp_path / "out", "--no-resume", "--scheduler", "nothing://there")[3:]) == 2
    assert "scheduler: got 'nothing://there', expected the address of a running" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(images: SimpleNamespace, tmp_path: Path) -> None:
    entries = [{"fixed": str(images.t1), "moving": str(images.t2), "name": f"p{i:02d}"} for i in range(MANY)]
    out = tmp_path / "out"
    words = command(write_list(tmp_path / "pairs.csv", entries), out, "--workers", "2")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        wait_until(lambda: len(list(out.glob("*/report.json"))) >= 5)
        children(process.pid)[0].kill()
        assert len(list(out.glob("*/report.json"))) < MANY
        told = str(process.communicate(timeout=300)[0])
    assert process.returncode == 0 and f"{MANY} pairs (0 kept, {MANY} registered): {MANY} PASS" in told


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_pair_whose_workers_die_twice_is_a_row(images: SimpleNamespace, tmp_path: Path) -> None:
    """A worker stays with a pipe, which tells who is to be killed."""
    pipe = tmp_path / "pipe.nii"
    os.mkfifo(pipe)
    holder = os.open(pipe, os.O_RDWR)  # else to open it would wait already
    entries = [{"fixed": str(images.t1), "moving": str(images.t2), "name": f"p{i:02d}"} for i in range(6)]
    entries[1]["moving"] = str(pipe)
    out = tmp_path / "out"
    words = command(write_list(tmp_path / "pairs.csv", entries), out, "--workers", "2")

    def stuck(process: int) -> list[psutil.Process]:
        found = []
        for one in children(process):
            with suppress(OSError):
                opened = [os.path.realpath(file) for file in Path(f"/proc/{one.pid}/fd").iterdir()]
                found += [one] if str(pipe) in opened else []
        return found

    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as run:
        try:
            for _ in range(2):
                victim = wait_until(lambda: stuck(run.pid))[0]
                victim.kill()
                victim.wait(60)  # or the same one is found, and killed, twice
            told, errors = run.communicate(timeout=300)
        finally:
            run.kill()  # where it waits for the pipe, so would this test
    os.close(holder)
    assert run.returncode == 3 and "6 pairs (0 kept, 6 registered): 5 PASS, 0 WARN, 1 FAIL" in told
    assert "p01: FAILED" in errors and errors.count("\n") == 2, errors
    assert "every process that tried it was killed" in rows(out)["p01"]["reasons"]


def test_without_the_extra_one_process_does_it(
    images: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)  # type: ignore[arg-type]
    datalist = write_list(tmp_path / "pairs.csv", [{"fixed": str(images.t1), "moving": str(images.t2)}])
    assert main(command(datalist, tmp_path / "out", "--workers", "2")[3:]) == 0
    assert "monai-zsreg[cluster]" in capsys.readouterr().err and rows(tmp_path / "out")["t2"]["verdict"] == "PASS"
    assert main(command(datalist, tmp_path / "out", "--scheduler", "tcp://a:1", "--no-resume")[3:]) == 1
    assert "distributed" in capsys.readouterr().err
    assert main(command(datalist, tmp_path / "out", "--scheduler", "tcp://a:1", "--workers", "2")[3:]) == 2


# --------------------------------------------------------------------------------------------------------------------
# lists
# --------------------------------------------------------------------------------------------------------------------


def files(folder: Path, *names: str) -> dict[str, str]:
    for name in names:
        (folder / name).touch()
    return {name: str(folder / name) for name in names}


def test_a_list_may_name_what_is_known(tmp_path: Path) -> None:
    given = files(tmp_path, "a.nii.gz", "b.nii.gz", "m.nii.gz", "n.nii.gz", "t.tfm")
    pairs = [
        {"fixed": "a.nii.gz", "moving": "b.nii.gz", "fixed_mask": "m.nii.gz", "moving_mask": "n.nii.gz"},
        {"fixed": "a.nii.gz", "moving": given["b.nii.gz"], "truth": "t.tfm", "name": 7, "moving_mask": ""},
        {"fixed": "a.nii.gz", "moving": "b.nii.gz", "fixed_labels": "m.nii.gz", "moving_labels": "n.nii.gz"},
    ]
    for content in (pairs, {"testing": pairs, "description": "of no interest"}):
        (tmp_path / "pairs.json").write_text(json.dumps(content))
        one, two, three = read_datalist(tmp_path / "pairs.json", tmp_path, must_exist=True)
        assert one["fixed"] == given["a.nii.gz"] and one["moving_mask"] == given["n.nii.gz"]
        assert two == {
            "fixed": given["a.nii.gz"], "moving": given["b.nii.gz"], "truth": given["t.tfm"], "name": "7",
        }  # fmt: skip
        # the moving labels are those that are carried along
        assert three["labels"] == given["n.nii.gz"] and "moving_labels" not in three
        assert [one["name"], three["name"]] == ["b", "b_2"]


def test_one_pair() -> None:
    entry = one_pair("t1.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz", dataset_dir="study", labels=None)
    fixed, moving = (
        os.path.abspath(os.path.join("study", name)) for name in ("t1.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz")
    )
    assert entry == {"fixed": fixed, "moving": moving, "name": "sub-01_T2w"}
    assert one_pair("a.png", "b.png", name=7)["name"] == "7"
    assert one_pair() == {"name": "demonstration"}


def test_bids_pairs(tmp_path: Path) -> None:
    names = {
        "sub-1/ses-a/anat": ["sub-1_ses-a_T1w.nii.gz", "sub-1_ses-a_ce-gad_T1w.nii.gz", "sub-1_ses-a_FLAIR.nii"],
        "sub-2/anat": ["sub-2_run-1_T1w.nii.gz", "sub-2_run-2_T1w.nii.gz", "sub-2_T2w.nii.gz", "sub-2_T1w.json"],
        "sub-3/anat": ["sub-3_T2w.nii.gz", "sub-3_FLAIR.nii.gz"],
        "sub-4/anat": ["sub-4_T1w.nii.gz", "sub-4_desc-brain_T2w.nii.gz", "sub-4_label-x_mask.nii.gz"],
    }
    for folder, found in names.items():
        (tmp_path / folder).mkdir(parents=True)
        files(tmp_path / folder, *found)
    assert {pair["name"]: Path(pair["fixed"]).name for pair in bids_pairs(tmp_path)} == {
        "sub-1_ses-a_ce-gad_T1w": "sub-1_ses-a_T1w.nii.gz",
        "sub-1_ses-a_FLAIR": "sub-1_ses-a_T1w.nii.gz",
        "sub-2_run-2_T1w": "sub-2_run-1_T1w.nii.gz",
        "sub-2_T2w": "sub-2_run-1_T1w.nii.gz",
    }
    with pytest.raises(RegistrationError, match="datalist"):
        bids_pairs(tmp_path / "sub-3")


def test_names_are_made_unique() -> None:
    pair = {"fixed": "a.nii", "moving": "x/b.nii"}
    names = [entry["name"] for entry in read_datalist([pair, pair | {"name": "b"}, pair])]
    assert names == ["b_2", "b", "b_3"]
    assert len({entry["name"] for entry in read_datalist([pair] * 3000)}) == 3000


@pytest.mark.parametrize(
    ("datalist", "argument"),
    [
        ([], "datalist"),
        ("nowhere.csv", "datalist"),
        ({"training": []}, "datalist"),
        ({"testing": "a"}, "datalist"),
        (["a"], "datalist[0]"),
        ([{}], "datalist[0].fixed"),
        ([{"fixed": "a", "moving": ""}], "datalist[0].moving"),
        ([{"moving": "b"}], "datalist[0].fixed"),
        ([{"fixed": "a", "moving": 3.5}], "datalist[0].moving"),
        ([{"fixed": "a", "moving": "b", "movign": "c"}], "datalist[0]"),
        ([{"fixed": "a", "moving": "b", "fixed_mask": "a"}], "datalist[0].moving_mask"),
        ([{"fixed": "a", "moving": "b", "fixed_labels": "a"}], "datalist[0].moving_labels"),
        ([{"fixed": "a", "moving": "b", "labels": "a", "moving_labels": "a"}], "datalist[0].labels"),
        ([{"fixed": "a", "moving": "b", "name": "../x"}], "datalist[0].name"),
        ([{"fixed": "a", "moving": "b", "name": "evaluation.csv"}], "name"),
        ([{"fixed": "a", "moving": "b", "name": "x"}] * 2, "name"),
    ],
)
def test_wrong_lists(datalist: Any, argument: str) -> None:
    with pytest.raises(RegistrationError) as caught:
        read_datalist(datalist)
    assert caught.value.argument == argument


def test_a_file_that_must_exist(tmp_path: Path) -> None:
    with pytest.raises(RegistrationError) as caught:
        read_datalist([{"fixed": files(tmp_path, "a")["a"], "moving": "nowhere"}], must_exist=True)
    assert caught.value.argument == "datalist[0].moving"


def test_several_moving_images_share_the_fixed_one(
    images: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    register = cohort.register_pair
    monkeypatch.setattr(
        cohort, "register_pair", lambda pair, settings: seen.append(pair["prepared"]) or register(pair, settings)
    )
    moving = [str(images.folder / f"{name}.nii.gz") for name in ("t2", "noise")]
    assert main(["register", str(images.t1), *moving, "-o", str(tmp_path), "-q", "--no-page"]) == 3
    assert seen[0] is seen[1] and (tmp_path / "t2" / "report.json").exists() and (tmp_path / "noise").is_dir()
    assert nib.load(tmp_path / "t2" / "moved.nii.gz").shape[:2] == nib.load(images.t1).shape
