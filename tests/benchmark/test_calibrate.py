# SPDX-License-Identifier: Apache-2.0
"""Tests of the calibration: does it find what was put into made-up records, and does the command run for real?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monai_zsreg.benchmark import calibrate
from monai_zsreg.benchmark.__main__ import main
from monai_zsreg.benchmark.run import read_results
from monai_zsreg.errors import RegistrationError
from monai_zsreg.registration.confidence import CALIBRATION, FAIL, PASS, Calibration


def records(constants: Calibration, count: int = 600, dims: int = 2) -> list[dict[str, Any]]:
    """Runs whose errors follow the distribution that the constants name."""
    rng = np.random.default_rng(0)
    raw = rng.uniform(0.02, 0.2, count)
    spread = np.hypot(constants.inflation * raw, constants.floor)
    scale = spread / math.sqrt(math.gamma(1 + 2 / constants.shape))
    errors = scale * rng.weibull(constants.shape, count)
    return [
        {
            "dims": dims,
            "method": "good",
            "subject": f"s{i % 6}",
            "wrong": False,
            "raw": raw[i],
            "step": 1.0,
            "error": errors[i],
            "verdict": PASS,
            "score": 1.0,
        }
        for i in range(count)
    ]


def test_fit_finds_the_constants_and_they_cover() -> None:
    truth = Calibration(2.5, CALIBRATION[2].floor, 1.5)
    made = records(truth)
    found = calibrate.fit(made, 2)
    assert found.inflation == pytest.approx(2.5, rel=0.08) and found.shape == pytest.approx(1.5, abs=0.15)
    assert calibrate.coverage(made, truth) == pytest.approx([0.5, 0.9, 0.95], abs=0.04)
    assert max(calibrate.coverage(made, Calibration(1.0, 0.01, 1.5))) < 0.75
    with pytest.raises(RegistrationError, match="records"):
        calibrate.fit(made, 3)


def test_halves_share_no_subject() -> None:
    first, second = calibrate.halves(records(CALIBRATION[2]))
    assert {r["subject"] for r in first} == {"s0", "s2", "s4"} and {r["subject"] for r in second} == {"s1", "s3", "s5"}


def test_roc_area_of_known_scores() -> None:
    assert calibrate.roc([1.0, 2.0], [-1.0, 0.0])[2] == 1.0
    assert calibrate.roc([1.0, 3.0], [2.0, 0.0])[2] == 0.75
    assert calibrate.roc([1.0, 1.0], [1.0])[2] == 0.5


def test_tables_of_made_records() -> None:
    made = records(CALIBRATION[2])
    failures = [{**made[i], "method": "noise", "wrong": True, "verdict": FAIL, "score": -3.0} for i in range(10)]
    failures[3] |= {"verdict": PASS, "score": 2.0}
    lines = {line["runs of"]: line for line in calibrate.summarize_verdicts(made + failures)}
    assert lines["good"][PASS] == 600 and lines["failures"][FAIL] == 9 and lines["failures"][PASS] == 1
    assert lines["failures"]["ROC area"] == 0.9 and lines["noise"]["runs"] == 10
    for line in calibrate.summarize_coverage(made):
        assert abs(line["90 % interval holds, %"] - 90) < 6 and line["runs"] in (300, 600)


@pytest.mark.slow
def test_command_on_small_subjects(subjects: Path, tmp_path: Path) -> None:
    options = ["--residuals", str(subjects / "residuals.csv"), "--output", str(tmp_path), "--threads", "1"]
    command = ["calibrate", str(subjects), "--dims", "3", "--cases", "2", "--pairs", "t1-t2", *options]
    assert main(command) == 0
    found = read_results(tmp_path / "calibration.jsonl")
    kinds = {r["method"] for r in found}
    assert {"real", "noise", "other", "mirrored", "narrow"} <= kinds
    assert all(r["verdict"] == FAIL for r in found if r["method"] in ("noise", "other"))
    real = [r for r in found if r["method"] == "real" and not r["wrong"]]
    assert real and all(r["raw"] > 0 and r["residual"] > 0.5 for r in real)
    text = (tmp_path / "calibration.md").read_text()
    assert "## Verdicts" in text and "| 3 | failures |" in text and (tmp_path / "roc.png").stat().st_size > 5000
    # a second run has nothing left to do
    before = (tmp_path / "calibration.jsonl").read_bytes()
    assert main(command) == 0 and (tmp_path / "calibration.jsonl").read_bytes() == before
    assert main(["calibrate", str(subjects), "--output", str(tmp_path), "--dims", "2", "--cases", "2"]) == 2
