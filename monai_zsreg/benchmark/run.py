# SPDX-License-Identifier: Apache-2.0
"""The loop: for each case all methods one after another, each result on disk before the next begins."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from monai_zsreg.benchmark.cases import Case, Sample
from monai_zsreg.benchmark.methods import Method
from monai_zsreg.benchmark.volumes import labels_dice, moved, transformed

__all__ = ["read_results", "run_cases", "score"]

Result = dict[str, Any]
Key = tuple[str, str, int]


def _key(result: Result) -> Key:
    return result["case"], result["method"], result["seed"]


def read_results(path: Path) -> list[Result]:
    """Results of a JSON-lines file, the last one of each case and method.

    A line that an interruption left half-written is passed over.
    """
    results = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                result = json.loads(line)
                results[_key(result)] = result
    return list(results.values())


def run_cases(
    cases: Sequence[Case],
    methods: Sequence[Method],
    log: Path,
    caps: Mapping[tuple[str, int], int] | None = None,
    end: float = math.inf,
    with_similarity: bool = True,
    redo: Collection[str] = (),
) -> list[str]:
    """Run every method on every case that the log does not hold yet; notes on what was left out.

    Args:
        cases, methods: in the order to run them.
        log: JSON-lines file that results are appended to.
        caps: how many cases of a row a slow method gets, ``{("ants", 3): 20}``, by name or else by family.
        end: of ``time.monotonic``, after which no further run begins.
        with_similarity: measure Dice, SSIM, MI and MSE before and after.
        redo: names of methods to run again; ``"failures"`` for all runs that gave no answer.
    """
    results = read_results(log)
    have = {_key(r) for r in results if r["method"] not in redo and not (r["failure"] and "failures" in redo)}
    answers = {_key(r): np.array(r["matrix"]) for r in results if not r["failure"]}
    due = [(case, _due(case, methods, caps or {}, have)) for case in cases]
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
            before = _similarity(sample, np.eye(case.row.dims + 1)) if with_similarity else {}
            for method in todo:
                if time.monotonic() > end:
                    break
                bar.set_postfix_str(method.name)
                answer = method.register(sample.fixed, sample.moving, case.row.transform)
                bar.update()
                left -= 1
                if answer.pop("cannot_run", False):
                    notes[f"{method.name} in {case.row.name}: {answer['failure']}"] = None
                    continue
                reference = answers.get((sample.reference or "", method.name, case.seed))
                result = {"method": method.name, "family": method.family}
                result |= score(case, sample, answer, before, reference)
                file.write(json.dumps({k: _rounded(v) for k, v in result.items()}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                if not result["failure"]:
                    answers[_key(result)] = np.array(result["matrix"])
    if left:
        notes[f"{left} runs that the time limit left; the same command goes on from here"] = None
    return list(notes)


def _due(case: Case, methods: Sequence[Method], caps: Mapping[tuple[str, int], int], have: set[Key]) -> list[Method]:
    """Methods that have yet to run a case, each in turn the first: whoever goes first finds cold caches."""
    dims = case.row.dims
    able = [m for m in methods if dims in m.dims and (case.name, m.name, case.seed) not in have]
    able = [m for m in able if case.index < caps.get((m.name, dims), caps.get((m.family, dims), math.inf))]
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

    ``before`` is the similarity of the images as they were, empty to leave it out; ``reference`` the same method's
    answer to the case that the sample refers to.
    """
    row, dims = case.row, case.row.dims
    result: Result = {"case": case.name, "row": row.name, "index": case.index, "subject": case.subject}
    result |= {"kind": row.kind, "dims": dims, "seed": case.seed, "failure": "", **case.notes, **sample.facts, **answer}
    if not result["failure"] and (
        np.shape(answer["matrix"]) != (dims + 1,) * 2 or not np.isfinite(answer["matrix"]).all()
    ):
        result["failure"] = f"not a finite {dims + 1} x {dims + 1} matrix"
    # a method that gives no answer leaves the images as they were
    given = np.eye(dims + 1) if result["failure"] else np.asarray(answer["matrix"], dtype=np.float64)
    result["matrix"] = given.tolist()
    truths = {"tre": sample.truth, "tre_corrected": sample.corrected}
    if sample.reference is not None and sample.truth is not None:
        truths = {"tre": None if reference is None else sample.truth @ reference}
    for name, truth in truths.items():
        if truth is None:
            continue
        gaps = np.linalg.norm(transformed(given - truth, sample.points), axis=1)
        result |= {name: float(gaps.mean()), f"{name}_max": float(gaps.max())}
        if "point" in result:
            result["error_at_point"] = float(np.linalg.norm(transformed(given - truth, np.array(result["point"]))))
    judged = result.get("tre_corrected", result.get("tre"))
    if judged is not None:
        # what says of itself that it failed is no success
        right = judged < sample.tolerance
        success = right and not result["failure"] and result.get("verdict") != "FAIL"
        result |= {"tolerance": sample.tolerance, "right": right, "success": success}
    if sample.labels is not None:
        result["label_dice_before"] = labels_dice(*sample.labels, np.eye(dims + 1))
        result["label_dice"] = labels_dice(*sample.labels, given)
    if before:
        after = before if result["failure"] else _similarity(sample, given)
        result |= {f"{k}_before": v for k, v in before.items()} | {f"{k}_after": v for k, v in after.items()}
    return result


def _similarity(sample: Sample, matrix: np.ndarray) -> dict[str, float]:
    """Similarity on the fixed grid, after ``matrix``."""
    import torch

    from monai_zsreg.metrics import similarity

    shown = moved(sample.moving, sample.fixed.shape, sample.fixed.affine, matrix, order=1)
    one, two = (torch.from_numpy(image.values[None].astype(np.float32)) for image in (sample.fixed, shown))
    return similarity(one, two, region="foreground")
