# SPDX-License-Identifier: Apache-2.0
"""The loop, the tables and the command, on small made-up subjects."""

from __future__ import annotations

import csv
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from monai_zsreg.benchmark import cost, data, plots, tables
from monai_zsreg.benchmark.__main__ import main
from monai_zsreg.benchmark.cases import ROWS, Case, build, draw_cases
from monai_zsreg.benchmark.peers import Identity, Method, Options, make_methods
from monai_zsreg.benchmark.run import Caps, interleave, read_results, run_cases


class Answer(Method):
    """A method that knows the answer, or fails on purpose."""

    family = "answer"

    def __init__(self, case: Case, start: str) -> None:
        super().__init__(Options(), start)
        self.truth = build(case).corrected
        self.calls = 0

    def run(self, images: Any) -> np.ndarray:
        self.calls += 1
        if self.start == "broken":
            raise RuntimeError("no idea")
        assert self.truth is not None
        return self.truth.numpy()


@pytest.fixture
def case(subjects: Path) -> Case:
    pairs, _ = data.find_pairs(subjects, [("t1", "t2")])
    pairs = data.attach_residuals(pairs, data.read_residuals(subjects / "residuals.csv"))
    return draw_cases(next(r for r in ROWS if r.name == "mild-3d-real"), pairs, 1, seed=0)[0]


def test_results_of_a_right_a_broken_and_no_method(case: Case, tmp_path: Path) -> None:
    methods = [Answer(case, "right"), Answer(case, "broken"), Identity(Options())]
    results = {r["method"]: r for r in run_cases([case], methods, tmp_path / "r.jsonl")}
    right, broken, none = (results[m] for m in ("answer/right", "answer/broken", "none"))
    assert right["tre_corrected"] == pytest.approx(0, abs=1e-6) and right["success"]
    # the residual of the pair is 1.4 mm
    assert 1.2 < right["tre"] < 1.6
    assert broken["failure"] == "RuntimeError: no idea" and not broken["success"]
    assert broken["tre"] == none["tre"] > 2 and "seconds" not in broken
    assert right["dice_after"] > right["dice_before"] and right["ssim_after"] > right["ssim_before"] + 0.1
    assert none["mi_after"] == none["mi_before"] == broken["mi_after"]
    assert right["tre_corrected_max"] < 1e-5 and none["tre_max"] > none["tre"]


def test_resume_redo_and_half_written_line(case: Case, tmp_path: Path) -> None:
    log = tmp_path / "r.jsonl"
    right, broken = Answer(case, "right"), Answer(case, "broken")
    run_cases([case], [right, broken], log, with_similarity=False)
    calls = right.calls
    assert len(run_cases([case], [right, broken], log, with_similarity=False)) == 2 and right.calls == calls
    with open(log, "a") as file:
        file.write('{"case": "half')
    assert len(run_cases([case], [right, broken, Identity(Options())], log, with_similarity=False)) == 3
    assert right.calls == calls
    broken.start = "broken"
    before = broken.calls
    assert len(run_cases([case], [right, broken], log, with_similarity=False, redo=["failures"])) == 3
    assert broken.calls > before and right.calls == calls
    run_cases([case], [right], log, with_similarity=False, redo=["answer/right"])
    assert right.calls > calls and len(read_results(log)) == 3


def test_time_limit_and_caps(case: Case, tmp_path: Path) -> None:
    assert run_cases([case], [Identity(Options())], tmp_path / "a.jsonl", time_limit=-1.0) == []
    none = Identity(Options())
    assert run_cases([case], [none], tmp_path / "b.jsonl", Caps({("none", 3): 0})) == []
    assert len(run_cases([case], [none], tmp_path / "b.jsonl", Caps({("none", 3): 1}), with_similarity=False)) == 1
    exact = Caps({("elastix", 3): 0, ("elastix/mass", 3): 1})
    starts = {m.name: exact.allow(m, case) for m in make_methods(["elastix"], Options())[0]}
    assert starts in ({}, {"elastix/default": False, "elastix/mass": True})
    assert interleave([[1, 2, 3], [4]]) == [1, 4, 2, 3]  # type: ignore[list-item]


def _result(method: str, tre: float | None, subject: str = "a", failure: str = "", **more: Any) -> dict[str, Any]:
    good = tre is not None and tre < 2 and not failure
    base = {"row": "paper-2d-real", "kind": "real", "dims": 2, "subject": subject, "failure": failure, "success": good}
    family = "ours" if method.startswith("ours") else method.split("/")[0]
    return base | {"method": method, "family": family, "tre": tre, "tre_max": tre, "seconds": 1.0} | more


def test_summary_counts_failures_and_takes_the_better_start() -> None:
    results = [
        *[_result("elastix/default", 0.5, s) for s in "abc"],
        _result("elastix/mass", 0.1, "a"),
        _result("elastix/mass", 0.1, "b"),
        _result("elastix/mass", 30.0, "c"),
        _result("ours:robust", 0.3, "a", tre_corrected=0.2, tre_corrected_max=0.4),
        _result("ours:robust", 1.0, "b", failure="gone"),
        _result("ours:paper", None, "b"),
    ]
    lines = {line["method"]: line for line in tables.summarize(results)}
    assert lines["elastix/default"]["best"] and not lines["elastix/mass"]["best"]
    assert lines["ours:robust"]["best"] and lines["ours:paper"]["best"]
    assert lines["ours:robust"]["success"] == 0.5 and lines["ours:robust"]["failures"] == 1
    assert lines["ours:robust"]["tre_corrected_n"] == 1
    assert lines["ours:paper"]["tre_median"] == np.inf and lines["ours:paper"]["success"] == 0
    assert lines["elastix/mass"]["tre_p95"] == lines["elastix/mass"]["tre_max"] == 30.0
    # Wilson, 3 of 3
    assert lines["elastix/default"]["success_low"] == pytest.approx(0.4385, abs=1e-3)
    kept = {r["method"] for r in tables.best_starts(results)}
    assert kept == {"elastix/default", "ours:robust", "ours:paper"}


def test_command_end_to_end(subjects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [str(subjects), "--output", str(tmp_path), "--residuals", str(subjects / "residuals.csv"), "--threads", "2"]
    args += [
        "--methods",
        "none",
        "--protocols",
        "paper",
        "mild",
        "noise",
        "--cases",
        "2",
        "--min-side",
        "30",
        "--slices",
        "2",
    ]
    assert main(args) == 0
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    rows = {json.loads(line)["row"] for line in lines}
    assert rows == {
        "paper-2d-real",
        "paper-2d-exact",
        "mild-3d-exact",
        "mild-3d-real",
        "noise-2d-real",
        "noise-3d-real",
    }
    assert main(args) == 0
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines
    with open(tmp_path / "summary.csv", newline="") as file:
        summary = list(csv.DictReader(file))
    assert len(summary) == 6 and all(float(r["success"]) == 0 for r in summary)
    text = (tmp_path / "summary.md").read_text()
    for part in (
        "exact truth",
        "real pair",
        "Not comparable",
        "SimpleElastix | +0.263",
        "processor",
        "command",
        "0 % [0, 66]",
    ):
        assert part in text, part
    assert (tmp_path / "capture.png").stat().st_size > 10_000
    # other slices would be other cases under the same rows
    assert main([*args[:-1], "3"]) == 2
    assert "slices" in capsys.readouterr().err
    assert main(["table", "--output", str(tmp_path)]) == 0


def test_command_refuses_what_it_cannot_use(subjects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bad, word in (
        ([str(tmp_path / "missing.json")], "datalist"),
        ([], "folder"),
        ([str(subjects), "--pairs", "t1"], "hyphen"),
        ([str(subjects), "--cap", "ants"], "METHOD:DIMS=N"),
        ([str(subjects), "--protocols", "unknown"], "protocols"),
        ([str(subjects), "--methods", "magic"], "methods"),
    ):
        assert (
            main(
                [*bad, "--output", str(tmp_path / "o"), "--cases", "1"]
                + ([] if "--methods" in bad else ["--methods", "none"])
            )
            == 2
        )
        assert word in capsys.readouterr().err


def test_peak_memory_sees_an_allocation() -> None:
    garbage: list = [np.ones(32 * 2**20)]  # 256 MiB that only the garbage collector frees
    garbage.append(garbage)
    del garbage
    with cost.PeakMemory() as memory:
        gc.collect()
        block = np.ones(8 * 2**20)  # 64 MiB
        del block
    assert 60 < memory.mib < 120


@pytest.mark.parametrize("dims", [2, 3])
def test_phantom_has_one_shape_at_every_size(dims: int) -> None:
    small, moving, truth = cost.phantom_pair(dims, 48)
    large = cost.phantom_pair(dims, 96)[0]
    assert small.shape[1:] == (48,) * dims and moving.shape == small.shape and truth.shape == (dims + 1, dims + 1)
    share = [float((image > 0.2).float().mean()) for image in (small, large)]
    assert share[0] == pytest.approx(share[1], rel=0.1)
    result = cost.measure(Identity(Options()), dims, 48, repeats=1)
    assert result["tre"] > 2 and not result["success"] and result["peak_mib"] >= 0
    assert torch.isfinite(small).all()


@pytest.mark.slow
def test_cost_runs_in_a_process_of_its_own_and_resumes(tmp_path: Path) -> None:
    methods, _ = make_methods(["none"], Options(threads=1))
    log = tmp_path / "cost.jsonl"
    rows = cost.run_cost(methods, Options(threads=1), {2: [64]}, log)
    assert len(rows) == 1 and rows[0]["failure"] == "" and rows[0]["seconds"] >= 0
    assert cost.run_cost(methods, Options(threads=1), {2: [64]}, log) == rows
    tables.write_cost_markdown(tmp_path / "cost.md", rows, tables.machine(1))
    assert "| none | 64^2 | 0.000 |" in (tmp_path / "cost.md").read_text()
    assert plots.plot_cost(rows, tmp_path / "cost.png")
