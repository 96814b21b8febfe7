# SPDX-License-Identifier: Apache-2.0
"""Tests of many pairs in one run: lists, BIDS folders, bad files, resuming, and two processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from monai_zsreg.app import cohort
from monai_zsreg.app.cli import main
from monai_zsreg.app.cohort import SUMMARY, bids_pairs, fingerprint, one_pair, read_datalist
from monai_zsreg.app.run import Settings
from monai_zsreg.errors import RegistrationError

ROOT = Path(__file__).parents[2]


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
    # another transform: nothing is kept
    assert main([*words, "--transform", "rigid", "-q"]) == 3
    told = capsys.readouterr()
    assert told.out == "" and json.loads((out / "good1" / "report.json").read_text())["transform"] == "rigid"
    assert all(time > after[name] for name, time in times(out).items())


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


def test_processes_share_what_is_left_not_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second pair is done: a share of all pairs would leave everything to one of two processes."""
    entries = [{"name": str(number), "fixed": "a", "moving": "b"} for number in range(8)]
    monkeypatch.setattr(cohort, "_finished", lambda entry, settings: int(entry["name"]) % 2 == 1)
    monkeypatch.setattr(cohort, "place", lambda: (0, 2))
    assert [entry["name"] for entry in cohort.remaining(entries, Settings(tmp_path))] == ["0", "4"]
    # the other one does not look for itself: the first may have gone on meanwhile
    monkeypatch.setattr(cohort, "place", lambda: (1, 2))
    monkeypatch.setattr(cohort, "_finished", lambda entry, settings: True)
    monkeypatch.setattr(cohort.dist, "is_initialized", lambda: True)

    def told(box: list[Any], src: int) -> None:
        box[0] = entries[::2]

    monkeypatch.setattr(cohort.dist, "broadcast_object_list", told)
    assert [entry["name"] for entry in cohort.remaining(entries, Settings(tmp_path))] == ["2", "6"]


def command(datalist: str, output: Path, processes: int = 1) -> list[str]:
    head = [sys.executable, "-m"]
    if processes > 1:
        head += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return [*head, "monai_zsreg.app.cli", "cohort", datalist, "-o", str(output), "--no-page"]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.mark.slow
def test_kill_in_the_middle_leaves_whole_files_and_goes_on(images: SimpleNamespace, tmp_path: Path) -> None:
    entries = [{"fixed": str(images.t1), "moving": str(images.t2), "name": f"p{i:02d}"} for i in range(40)]
    words = command(write_list(tmp_path / "pairs.csv", entries), tmp_path / "out")
    out = tmp_path / "out"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment()) as process:
        begin = time.monotonic()
        while len(list(out.glob("*/report.json"))) < 5 and time.monotonic() - begin < 120:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    kept = times(out)
    assert 5 <= len(kept) < 40 and not (out / SUMMARY).exists()
    assert main(words[3:]) == 0
    assert {name: time for name, time in times(out).items() if name in kept} == kept
    assert [row["verdict"] for row in rows(out).values()] == ["PASS"] * 40


@pytest.mark.slow
def test_two_processes_give_what_one_gives_on_a_bids_folder(images: SimpleNamespace, tmp_path: Path) -> None:
    for subject in ("01", "02"):
        anat = tmp_path / "bids" / f"sub-{subject}" / "anat"
        anat.mkdir(parents=True)
        for source, suffix in ((images.t1, "T1w"), (images.t2, "T2w"), (images.t2, "FLAIR")):
            (anat / f"sub-{subject}_{suffix}.nii.gz").write_bytes(source.read_bytes())
    datalist = str(tmp_path / "bids")
    assert main(command(datalist, tmp_path / "out1")[3:]) == 0
    words = command(datalist, tmp_path / "out2", processes=2)
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 pairs (0 kept, 4 registered)" in done.stdout and "terminate" not in done.stderr
    one, two = (
        {p.parent.name: json.loads(p.read_text())["matrix"] for p in (tmp_path / f"out{n}").glob("*/report.json")}
        for n in (1, 2)
    )
    assert set(one) == {f"sub-{s}_{m}" for s in ("01", "02") for m in ("T2w", "FLAIR")} and one == two


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
    fixed, moving = (os.path.join("study", name) for name in ("t1.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz"))
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
