# SPDX-License-Identifier: Apache-2.0
"""A bounded run of the fuzz command."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    # by its own name, for the processes that it starts
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(__file__).parent))
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_wrong_input_ends_in_an_error_that_names_it(fuzz: ModuleType) -> None:
    count = 30
    rows = fuzz.run(count, seed=11, workers=1)
    assert not fuzz.bad(rows), fuzz.summary(rows)
    outcomes = {row["number"]: row["outcome"] for row in rows}
    assert len(outcomes) == count
    # cases that register, and cases that do not, or this proves nothing
    assert sum(outcome == "PASS" for outcome in outcomes.values()) > 4
    assert sum(outcome.startswith("error") for outcome in outcomes.values()) > 12
    assert sum(row.get("right", False) for row in rows) > 2


def test_what_must_not_be_is_seen(fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: another exception, a wrong answer that passes, and a warning are bad."""
    number = next(n for n in range(50) if fuzz.draw(0, n, _folder(tmp_path, n))[0] == [])
    assert fuzz.run_case(0, number, tmp_path / "a")["outcome"] == "PASS"

    real = fuzz._register

    def wrong(*arguments: object) -> object:
        result = real(*arguments)
        result.affine[0, -1] += 100.0
        return result

    def crashing(*arguments: object) -> object:
        raise IndexError("list index out of range")

    def warning(*arguments: object) -> object:
        import warnings

        warnings.warn("invalid value in divide", RuntimeWarning, stacklevel=1)
        return real(*arguments)

    for place, (broken, seen) in enumerate(
        ((wrong, "PASS and wrong"), (crashing, "IndexError"), (warning, "RuntimeWarning"))
    ):
        monkeypatch.setattr(fuzz, "_register", broken)
        outcome = fuzz.run_case(0, number, tmp_path / str(place))["outcome"]
        assert outcome.startswith("BAD") and seen in outcome


@pytest.mark.parametrize("number", [2411, 2443, 4398, 8903])
def test_what_ten_thousand_cases_found(fuzz: ModuleType, tmp_path: Path, number: int) -> None:
    """Headers of 1e29 mm, and a step to a matrix without an inverse."""
    assert not fuzz.run_case(2026, number, tmp_path)["outcome"].startswith("BAD")


def _folder(base: Path, number: int) -> Path:
    folder = base / f"draw{number}"
    folder.mkdir()
    return folder
