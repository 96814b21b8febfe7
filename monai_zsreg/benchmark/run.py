# SPDX-License-Identifier: Apache-2.0
"""The loop: for each case all methods one after another, each result on disk before the next begins."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from monai_zsreg.benchmark.cases import Case, Sample
from monai_zsreg.benchmark.methods import Method
from monai_zsreg.benchmark.volumes import moved
from monai_zsreg.metrics import similarity

Result = dict[str, Any]
Key = tuple[str, str, int]


def _key(result: Result) -> Key:
    return result["case"], result["method"], result["seed"]


def read_results(path: Path) -> list[Result]:
    """Results of a JSON-lines file, the last one of each case and method.

    A line that an interruption left half-written is passed over.
    """
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            result = json.loads(line)
            results[_key(result)] = result
    return list(results.values())


def run_cases(
    cases: Sequence[Case],
    methods: Sequence[Method],
    log: Path,
    end: float = math.inf,
    with_similarity: bool = True,
    redo: Collection[str] = (),
) -> list[str]:
    """Run every method on every case that the log does not hold yet; notes on what was left out.

    Args:
        cases, methods: in the order to run them.
        log: JSON-lines file that results are appended to.
        end: of ``time.monotonic``, after which no further run begins.
        with_similarity: measure Dice, SSIM, MI and MSE before and after.
        redo: names of methods to run again; ``"failures"`` for all runs that gave no answer.
    """
    done = {_key(result): result for result in read_results(log)}
    kept = {key for key, r in done.items() if r["method"] not in redo and not (r["failure"] and "failures" in redo)}
    due = [(case, _due(case, methods, kept)) for case in cases]
    notes: dict[str, None] = {}
    left = sum(len(todo) for _, todo in due)
    with open(log, "ab+") as file, tqdm(total=left, unit="run", disable=None) as bar:
        if file.tell() and not log.read_bytes().endswith(b"\n"):
            file.write(b"\n")  # after a half-written line
        for case, todo in due:
            if not todo or time.monotonic() > end:
                continue
            bar.set_description(case.row.name)
            try:
                sample = case.build()
            except Exception as error:  # one bad file must not end a run of hours
                notes[f"{case.name} could not be made: {error!r}"] = None
                left -= len(todo)
                continue
            before = _similarity(sample, sample.nothing) if with_similarity else {}
            for method in todo:
                if time.monotonic() > end:
                    break
                bar.set_postfix_str(method.name)
                answer = method.register(sample.fixed, sample.moving, case.row.transform, sample.mask)
                bar.update()
                left -= 1
                if answer.pop("cannot_run", False):
                    notes[f"{method.name} in {case.row.name}: {answer['failure']}"] = None
                    continue
                given = done.get((sample.reference or "", method.name, case.seed), {"failure": "none"})
                reference = None if given["failure"] else np.array(given["matrix"])
                result = {"method": method.name, "family": method.family}
                result |= score(case, sample, answer, before, reference)
                file.write(json.dumps({k: _rounded(v) for k, v in result.items()}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                done[_key(result)] = result
    if left:
        notes[f"{left} runs that the time limit left; the same command goes on from here"] = None
    return list(notes)


def _due(case: Case, methods: Sequence[Method], kept: Collection[Key]) -> list[Method]:
    """Methods that have yet to run a case, each in turn the first: whoever goes first finds cold caches."""
    able = [method for method in methods if case.index < method.cases.get(case.row.dims, 0)]
    able = [m for m in able if m.name in (case.methods or (m.name,)) and (case.name, m.name, case.seed) not in kept]
    turn = case.index % max(1, len(able))
    return able[turn:] + able[:turn]


def _rounded(value: Any) -> Any:
    # JSON has no word for NaN and infinity
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def score(
    case: Case, sample: Sample, answer: Result, before: dict[str, float], reference: np.ndarray | None = None
) -> Result:
    """The line of the results file for an answer of `Method.register`.

    ``before`` is the similarity of the images as they were, empty to leave it out; ``reference``: see `Sample.judge`.
    """
    row, nothing = case.row, sample.nothing
    result: Result = {"case": case.name, "row": row.name, "index": case.index, "subject": case.subject}
    result |= {"kind": row.kind, "dims": row.dims, "seed": case.seed, "failure": "", **case.notes, **sample.facts}
    result |= answer
    given = np.asarray(result.pop("matrix", nothing), dtype=np.float64)
    if given.shape != nothing.shape or not np.isfinite(given).all():
        result["failure"] = f"not a finite {' x '.join(map(str, nothing.shape))} matrix"
        given = nothing
    # a method that gives no answer leaves the images as they were
    result |= sample.judge(given, result.get("point"), reference)
    judged = result.get("tre_corrected", result.get("tre"))
    if judged is not None:
        # what says of itself that it failed is no success
        right = judged < sample.tolerance
        success = right and not result["failure"] and result.get("verdict") != "FAIL"
        result |= {"tolerance": sample.tolerance, "right": right, "success": success}
    if before:
        after = before if result["failure"] else _similarity(sample, given)
        result |= {f"{k}_before": v for k, v in before.items()} | {f"{k}_after": v for k, v in after.items()}
    return result


def _similarity(sample: Sample, matrix: np.ndarray) -> dict[str, float]:
    """Similarity on the fixed grid, after ``matrix``."""
    shown = moved(sample.moving, sample.fixed.shape, sample.fixed.affine, matrix, order=1)
    one, two = (torch.from_numpy(image.values[None].astype(np.float32)) for image in (sample.fixed, shown))
    return similarity(one, two, region="foreground")
