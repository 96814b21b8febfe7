# SPDX-License-Identifier: Apache-2.0
"""Does the calibration find what was put into made-up records, and are the failures failures?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from monai_zsreg.benchmark import calibrate, pairs
from monai_zsreg.benchmark.brains import ROWS, brain_cases
from monai_zsreg.benchmark.methods import Method
from monai_zsreg.benchmark.peers import LEVELS, Task
from monai_zsreg.benchmark.run import _due


def records(factor: float, shape: float, count: int = 600) -> list[dict[str, Any]]:
    """Runs whose errors follow a Weibull distribution, ``factor`` times as large as the root mean square predicted."""
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.02, 0.2, count)
    scale = spread / math.sqrt(math.gamma(1 + 2 / shape))
    errors = factor * scale * rng.weibull(shape, count)
    made = []
    for i in range(count):
        bounds = {str(q): scale[i] * (-math.log1p(-q)) ** (1 / shape) for q in LEVELS}
        run = {"group": "brains 2D", "row": "paper-2d-exact", "kind": "exact", "dims": 2, "method": "ours:robust"}
        run |= {"subject": f"s{i % 6}", "right": True, "verdict": "PASS", "score": 1.0, "seconds": 0.1}
        made.append(run | {"spread": spread[i], "error_at_point": errors[i], "bounds": bounds})
    return made


def test_fit_finds_the_constants_and_they_cover() -> None:
    runs = calibrate.tabulate(pd.DataFrame(records(2.5, 1.5)))
    factor, shape = calibrate.fit(runs)
    assert factor == pytest.approx(2.5, rel=0.08) and shape == pytest.approx(1.5, abs=0.15)
    scale = 2.5 * runs["spread"] / math.sqrt(math.gamma(1 + 2 / 1.5))
    bounds = [{str(q): s * (-math.log1p(-q)) ** (1 / 1.5) for q in LEVELS} for s in scale]
    assert calibrate.coverage(runs.assign(bounds=bounds)) == pytest.approx([0.5, 0.9, 0.95], abs=0.04)
    assert max(calibrate.coverage(runs)) < 0.75
    assert calibrate.coverage(calibrate.tabulate(pd.DataFrame(records(1.0, 1.5)))) == pytest.approx(
        [0.5, 0.9, 0.95], abs=0.04
    )


def test_report_of_made_records(tmp_path: Path) -> None:
    made = records(1.0, 1.7)
    wrong = {"row": "noise paper-2d-exact", "kind": "wrong", "right": None, "verdict": "FAIL", "score": -3.0}
    failures = [{**made[i], **wrong, "error_at_point": None} for i in range(10)]
    failures[3] |= {"verdict": "PASS", "score": 2.0}
    lost = {**made[0], "group": "anatomies: cord", "right": False, "verdict": "WARN", "score": -0.5}
    found = {**made[1], "group": "anatomies: cord", "kind": "header"}
    table = calibrate.tabulate(pd.DataFrame(made + failures))
    lines = calibrate.kind_table(table).set_index("runs")
    right = lines.loc["right, exact truth"]
    assert (
        right["PASS"] == 600 and abs(float(right["90 % holds, %"]) - 90) < 4 and abs(float(right["factor"]) - 1) < 0.1
    )
    assert lines.loc["noise", "FAIL"] == 9 and lines.loc["noise", "PASS"] == 1
    assert lines.loc["noise", "ROC area"] == "0.9000"
    results = pd.DataFrame([*made, *failures, lost, found])
    text = calibrate.write_report(results, tmp_path, 1, ["nothing"]).read_text()
    assert text.count("\n## ") == 3
    cord = text.split("## anatomies: cord")[1].split("##")[0]
    assert "| registration | 1 | 0 | 1 | 0 |" in cord and "| right by the header | 1 | 1 | 0 | 0 |" in cord
    assert (tmp_path / "roc.png").stat().st_size > 5000 and (tmp_path / "reliability.png").stat().st_size > 5000


def test_a_narrow_search_is_tried_where_any_rotation_may_be(subjects: Path) -> None:
    found, _ = pairs.find_pairs(subjects, [("t1", "t2")])
    rows = [row for row in ROWS if row.name in ("mild-3d-exact", "so3-3d-real")]
    cases = calibrate.calibration_cases([case for row in rows for case in brain_cases(row, found, 2, 0)])
    methods = [Method("ours", Task(name.removeprefix("ours:"))) for name in (calibrate.ROBUST, *calibrate.NARROW)]
    due = {case.row.name: [method.name for method in _due(case, methods, ())] for case in cases}
    assert sorted(due["so3-3d-real"]) == sorted(method.name for method in methods)
    assert all(names == [calibrate.ROBUST] for row, names in due.items() if row != "so3-3d-real") and len(due) > 2


def test_failures_have_nothing_right_about_them(subjects: Path) -> None:
    found, _ = pairs.find_pairs(subjects, [("t1", "t2")])
    cases = brain_cases(next(row for row in ROWS if row.name == "mild-3d-exact"), found, 8, 0)
    spoiled = calibrate.spoiled_cases(cases)
    assert [case.row.protocol for case in spoiled] == list(calibrate.FAILURES) * 2
    assert len(calibrate.spoiled_cases(cases, ["*"])) == 6
    for case, whole in zip(spoiled[:4], cases, strict=False):
        sample, before = case.build(), whole.build()
        assert sample.truth is None and sample.corrected is None and case.name != whole.name
        kind = case.row.protocol
        moving = sample.moving.values
        assert np.isfinite(moving).all() and not np.array_equal(moving, before.moving.values)
        if kind == "mirrored":
            assert any(np.array_equal(np.flip(moving, axis), before.moving.values) for axis in range(3))
        if kind == "disjoint":
            left = [
                (s.values > s.values.min()).sum() for s in (sample.fixed, before.fixed, sample.moving, before.moving)
            ]
            assert 0 < left[0] < 0.5 * left[1] and 0 < left[2] < 0.5 * left[3]
