# SPDX-License-Identifier: Apache-2.0
"""The loop, the tables and the command, on small made-up subjects."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from monai_zsreg.benchmark import cost, pairs, summary, whole
from monai_zsreg.benchmark.__main__ import main
from monai_zsreg.benchmark.brains import ROWS, brain_cases
from monai_zsreg.benchmark.cases import Case, Row, Sample
from monai_zsreg.benchmark.methods import Method, set_caps
from monai_zsreg.benchmark.peers import Task
from monai_zsreg.benchmark.run import read_results, run_cases
from monai_zsreg.benchmark.volumes import Volume


class Answers(Method):
    """A method that answers in this process."""

    def __init__(self, name: str, answer: Callable[[], dict[str, Any]]) -> None:
        super().__init__("none", Task())
        self.name, self.answer, self.calls = name, answer, 0
        self.family = name.partition("/")[0]

    def register(self, *_: Any) -> dict[str, Any]:
        self.calls += 1
        return self.answer()


def none() -> Answers:
    return Answers("none", lambda: {"matrix": np.eye(4), "seconds": 1.0, "peak_mib": 0.0})


def broken() -> Answers:
    return Answers("answer/broken", lambda: {"failure": "RuntimeError: no idea"})


def right(case: Case, **more: Any) -> Answers:
    truth = case.build().corrected
    return Answers("answer/right", lambda: {"matrix": truth, "seconds": 1.0, "peak_mib": 0.0} | more)


@pytest.fixture(scope="module")
def case(subjects: Path) -> Case:
    found, _ = pairs.find_pairs(subjects, [("t1", "t2")])
    found = pairs.with_residuals(found, subjects / "residuals.csv")
    return brain_cases(next(r for r in ROWS if r.name == "mild-3d-real"), found, 1, seed=0)[0]


def test_results_of_a_right_a_broken_and_no_method(case: Case, tmp_path: Path) -> None:
    log = tmp_path / "r.jsonl"
    assert run_cases([case], [right(case, point=[1.0, 2.0, 3.0]), broken(), none()], log) == []
    results = {r["method"]: r for r in read_results(log)}
    good, bad, nothing = (results[m] for m in ("answer/right", "answer/broken", "none"))
    assert good["tre_corrected"] == pytest.approx(0, abs=1e-6) and good["success"] and good["error_at_point"] < 1e-6
    # the residual of the pair is 1.4 mm
    assert 1.2 < good["tre"] < 1.6
    assert bad["failure"] == "RuntimeError: no idea" and not bad["success"]
    assert bad["tre"] == nothing["tre"] > 2 and "seconds" not in bad and nothing["tre_max"] > nothing["tre"]
    assert good["dice_after"] > good["dice_before"] and good["ssim_after"] > good["ssim_before"] + 0.1
    assert nothing["mi_after"] == pytest.approx(nothing["mi_before"]) and bad["mi_after"] == bad["mi_before"]


def test_a_right_answer_that_calls_itself_failed_is_no_success(case: Case, tmp_path: Path) -> None:
    run_cases([case], [right(case, verdict="FAIL")], tmp_path / "r.jsonl", with_similarity=False)
    result = read_results(tmp_path / "r.jsonl")[0]
    assert result["right"] and not result["success"]


def test_what_cannot_run_is_left_out_and_not_scored(case: Case, tmp_path: Path) -> None:
    absent = Answers("absent", lambda: {"failure": "ImportError: no weights", "cannot_run": True})
    wrong = Answers("wrong", lambda: {"matrix": np.full((4, 4), np.nan), "seconds": 1.0, "peak_mib": 0.0})
    notes = run_cases([case], [absent, wrong], tmp_path / "r.jsonl", with_similarity=False)
    assert notes == ["absent in mild-3d-real: ImportError: no weights"]
    assert [r["failure"] for r in read_results(tmp_path / "r.jsonl")] == ["not a finite 4 x 4 matrix"]


def test_a_case_that_refers_to_another_is_judged_by_the_same_methods_answer(tmp_path: Path) -> None:
    image = Volume(np.zeros((9, 9), np.float32), np.eye(3))
    step = np.array([[1, 0, 3], [0, 1, 0], [0, 0, 1.0]])
    points = np.zeros((1, 2))

    def given(case: Case) -> Sample:
        return Sample(image, image, points, None)

    def turned(case: Case) -> Sample:
        return Sample(image, image, points, step, reference=first.name)

    first, second = (Case(Row("x", 2, "header", 1, 0, n), 0, "s", "p", 0, m) for n, m in (("a", given), ("b", turned)))
    answers = iter([step, step @ step])
    method = Answers("ours:x", lambda: {"matrix": next(answers), "seconds": 1.0, "peak_mib": 0.0})
    run_cases([first, second], [method], tmp_path / "r.jsonl", with_similarity=False)
    results = read_results(tmp_path / "r.jsonl")
    assert "success" not in results[0] and results[1]["tre"] == 0 and results[1]["success"]


def test_resume_redo_and_half_written_line(case: Case, tmp_path: Path) -> None:
    log = tmp_path / "r.jsonl"
    good, bad = right(case), broken()
    for _ in range(2):
        run_cases([case], [good, bad], log, with_similarity=False)
    assert good.calls == bad.calls == 1
    with open(log, "a") as file:
        file.write('{"case": "half')
    run_cases([case], [good, bad, none()], log, with_similarity=False)
    assert len(read_results(log)) == 3 and good.calls == 1
    run_cases([case], [good, bad], log, with_similarity=False, redo=["failures"])
    assert bad.calls == 2 and good.calls == 1
    run_cases([case], [good], log, with_similarity=False, redo=["answer/right"])
    assert good.calls == 2 and len(read_results(log)) == 3


def test_time_limit_and_caps(case: Case, tmp_path: Path) -> None:
    method = none()
    assert "1 runs" in run_cases([case], [method], tmp_path / "a.jsonl", end=time.monotonic() - 1)[0]
    set_caps([method], False, ["none:3=0"])
    run_cases([case], [method], tmp_path / "a.jsonl")
    assert method.calls == 0
    # the name counts where the family is given too
    good = right(case)
    set_caps([good], False, ["answer:3=0", "answer/right:3=1"])
    run_cases([case], [good], tmp_path / "a.jsonl", with_similarity=False)
    assert good.calls == 1


def _result(method: str, tre: float, subject: str = "a", failure: str = "", **more: Any) -> dict[str, Any]:
    good = tre < 2 and not failure
    family = "ours" if method.startswith("ours") else method.split("/")[0]
    base = {"row": "paper-2d-real", "kind": "real", "dims": 2, "subject": subject, "failure": failure, "success": good}
    base |= {"method": method, "family": family, "tre": tre, "tre_max": tre, "seconds": 1.0, "peak_mib": 1.0}
    return base | {"right": tre < 2} | more


def test_summary_counts_failures_and_takes_the_better_start() -> None:
    results = [
        *[_result("elastix/default", 0.5, s) for s in "abc"],
        *[_result("elastix/mass", tre, s) for s, tre in zip("abc", (0.1, 0.1, 30.0), strict=True)],
        _result("ours:robust", 0.3, "a", tre_corrected=0.2, tre_corrected_max=0.4, verdict="PASS"),
        _result("ours:robust", 1.0, "b", failure="gone", verdict="FAIL"),
        _result("ours:paper", 9.0, "b", verdict="PASS"),
    ]
    table = summary.summarize(pd.DataFrame(results))
    assert table["method"].tolist() == ["ours:paper", "ours:robust", "elastix/default", "elastix/mass"]
    lines = table.set_index("method")
    assert lines["best"].to_dict() == {
        "ours:paper": True,
        "ours:robust": True,
        "elastix/default": True,
        "elastix/mass": False,
    }
    ours = lines.loc["ours:robust"]
    assert ours["success"] == 50 and ours["failures"] == 1 and ours["tre_corrected_n"] == 1
    assert (ours["PASS"], ours["FAIL"], ours["right_fail"], ours["wrong_pass"]) == (1, 1, 1, 0)
    assert lines.loc["ours:paper", "wrong_pass"] == 1
    assert lines.loc["elastix/mass", "tre_p95"] == lines.loc["elastix/mass", "tre_max"] == 30.0
    # Wilson, 3 of 3
    assert lines.loc["elastix/default", "success_low"] == pytest.approx(43.85, abs=0.1)


def test_command_end_to_end(subjects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [str(subjects), "--output", str(tmp_path), "--residuals", str(subjects / "residuals.csv"), "--threads", "1"]
    args += "--methods none --protocols paper mild noise --cases 2 --min-side 30 --slices 2".split()
    assert main(args) == 0
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    rows = {"paper-2d-real", "paper-2d-exact", "mild-3d-exact", "mild-3d-real", "noise-2d-real", "noise-3d-real"}
    assert {json.loads(line)["row"] for line in lines} == rows
    assert main(args) == 0
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines
    lines = pd.read_csv(tmp_path / "summary.csv")
    assert len(lines) == 6 and (lines["success"] == 0).all()
    text = (tmp_path / "summary.md").read_text()
    for part in ("| exact |", "Not comparable", "SimpleElastix | +0.263", "processor", "command", "0 % [0, 66]"):
        assert part in text, part
    assert (tmp_path / "capture.png").stat().st_size > 10_000
    # other slices would be other cases under the same rows
    capsys.readouterr()
    assert main([*args[:-1], "3"]) == 2
    assert "slices" in capsys.readouterr().err
    assert main(["table", "--output", str(tmp_path)]) == 0


def test_command_refuses_what_it_cannot_use(subjects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bad, word in (
        ([str(tmp_path / "missing.json")], "datalist"),
        ([str(tmp_path / "missing")], "folder"),
        ([], "folder"),
        ([str(subjects), "--pairs", "t1"], "hyphen"),
        ([str(subjects), "--cap", "ants"], "METHOD:DIMS=N"),
        ([str(subjects), "--protocols", "unknown"], "protocols"),
        ([str(subjects), "--methods", "magic"], "methods"),
    ):
        methods = [] if "--methods" in bad else ["--methods", "none"]
        assert main([*bad, "--output", str(tmp_path / "o"), "--cases", "1", *methods]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("dims", [2, 3])
def test_phantom_has_one_shape_at_every_size(dims: int) -> None:
    small, moving, truth = cost.phantom_pair(dims, 48)
    large = cost.phantom_pair(dims, 96)[0]
    assert small.shape == moving.shape == (48,) * dims and truth.shape == (dims + 1, dims + 1)
    share = [float((image.values > 0.2).mean()) for image in (small, large)]
    assert share[0] == pytest.approx(share[1], rel=0.1)


def test_cost_runs_in_processes_of_its_own(tmp_path: Path) -> None:
    command = [
        "cost",
        "--output",
        str(tmp_path),
        "--dims",
        "2",
        "--sizes-2d",
        "64",
        "--methods",
        "none",
        "--threads",
        "1",
    ]
    assert main(command) == 0
    assert "| none | 64^2 | 0.000 |" in (tmp_path / "cost.md").read_text()
    assert len(read_results(tmp_path / "cost.jsonl")) == 3 and (tmp_path / "cost.png").stat().st_size > 5000


def test_whole_processes_are_timed_and_what_fails_is_left_out(tmp_path: Path) -> None:
    moving = tmp_path / "m.nii.gz"
    moving.write_bytes(b"not read" * 3000)
    copy = ["python", "-c", "import shutil, sys; shutil.copy(*sys.argv[1:])", "MOVING", "OUTPUT"]
    fail = ["python", "-c", "raise SystemExit('no such option')"]
    lazy = ["python", "-c", "print('done')", "FOLDER"]
    found, notes = whole.timed({"copy": copy, "fail": fail, "lazy": lazy}, moving, moving, repeats=2)
    assert found.keys() == {"copy"} and 0 < found["copy"]["seconds"] < 20 and found["copy"]["peak MB"] > 1
    assert found["copy"]["MB written"] == found["copy"]["moved MB"] == 0.024
    assert notes == ["fail: status 1, no such option", "lazy: status 0, done"]


def test_the_rows_of_the_table_of_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_SHAPES", ((40, 40, 30), (200, 200)))
    commands, _ = whole._commands(tmp_path, ["ours", "none"], ["processes", "cohort", "chain", "resampling"])
    names = ["zsreg --help", "a wrong argument", *[name for name in commands if name.endswith("]")]]
    found, notes = whole.timed({name: commands[name] for name in names}, tmp_path, tmp_path, repeats=0)
    assert [note for note in notes if "SimpleITK" not in note] == []
    lines = [line[0] for line in whole._ratios(found)]
    assert lines[:2] == names[:2] and {"register, in Python", "bundle"} <= commands.keys()
    assert len(lines) == (2 if notes else 6) and found["ours [200, 200]"]["value"] > 0
