# SPDX-License-Identifier: Apache-2.0
"""The loop: for each case all methods one after another, each result on disk before the next begins."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from monai_zsreg.benchmark.cases import Case, Sample
from monai_zsreg.benchmark.volumes import Volume, labels_dice, moved, transformed

__all__ = ["Log", "Registers", "read_results", "run_cases", "score"]

Result = dict[str, Any]


class Registers(Protocol):
    """What the loop needs of a method; see `monai_zsreg.benchmark.methods.Method`."""

    name: str
    family: str
    dims: tuple[int, ...]

    def register(self, fixed: Volume, moving: Volume, transform: str) -> Result: ...


def _key(result: Result) -> tuple[str, str, int]:
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


class Log:
    """A JSON-lines file that results are appended to, each on disk before the next.

    Args:
        path: the file.
        time_limit: seconds after which `late` is true.
    """

    def __init__(self, path: Path, time_limit: float | None = None) -> None:
        self.path = path
        self._end = math.inf if time_limit is None else time.monotonic() + time_limit

    @property
    def late(self) -> bool:
        """Whether no further run is to begin."""
        return time.monotonic() > self._end

    @contextmanager
    def open(self) -> Iterator[Log]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a half-written last line must not be joined by the next
        cut = self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        with open(self.path, "a", encoding="utf-8") as self._file:
            if cut:
                self._file.write("\n")
            yield self

    def write(self, result: Result) -> None:
        """Append a result; what JSON has no word for becomes null."""
        self._file.write(json.dumps({k: _rounded(v) for k, v in result.items()}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def run_cases(
    cases: Sequence[Case],
    methods: Sequence[Registers],
    log: Log,
    caps: dict[tuple[str, int], int] | None = None,
    with_similarity: bool = True,
    redo: Collection[str] = (),
) -> list[str]:
    """Run every method on every case that the log does not hold yet.

    Args:
        cases: in the order to run them.
        methods: under test.
        log: where the results go.
        caps: how many cases of a row a slow method gets, by its name or family and dimensions, such as
            ``{("ants", 3): 20}``; the name counts where both are given.
        with_similarity: measure Dice, SSIM, MI and MSE before and after.
        redo: names of methods to run again; ``"failures"`` for all runs that gave no answer.

    Returns:
        Notes on what was left out.
    """
    caps = caps or {}
    results = read_results(log.path)
    have = {_key(r) for r in results if r["method"] not in redo and not (r["failure"] and "failures" in redo)}
    answers = {_key(r): np.array(r["matrix"]) for r in results if not r["failure"]}
    due = []
    for case in cases:
        dims = case.row.dims
        able = [m for m in methods if dims in m.dims]
        able = [m for m in able if case.index < caps.get((m.name, dims), caps.get((m.family, dims), math.inf))]
        todo = [m for m in able if (case.name, m.name, case.seed) not in have]
        if todo:
            due.append((case, todo))
    notes: dict[str, None] = {}
    with log.open(), tqdm(total=sum(len(todo) for _, todo in due), unit="run", disable=None) as bar:
        for case, todo in due:
            if log.late:
                break
            bar.set_description(case.row.name)
            try:
                sample = case.build()
            except Exception as error:  # one bad file must not end a run of hours
                notes[f"{case.name} could not be made: {error!r}"] = None
                bar.update(len(todo))
                continue
            before = _similarity(sample, np.eye(case.row.dims + 1)) if with_similarity else {}
            # whoever goes first finds cold caches: take turns
            turn = case.index % len(todo)
            for method in todo[turn:] + todo[:turn]:
                if log.late:
                    break
                bar.set_postfix_str(method.name)
                answer = method.register(sample.fixed, sample.moving, case.row.transform)
                bar.update()
                if answer.get("cannot_run"):
                    notes[f"{method.name} in {case.row.name}: {answer['failure']}"] = None
                    continue
                reference = answers.get((sample.reference or "", method.name, case.seed))
                result = score(case, sample, answer, before, reference)
                result |= {"method": method.name, "family": method.family}
                log.write(result)
                if not result["failure"]:
                    answers[_key(result)] = np.array(result["matrix"])
        if bar.n < bar.total:
            notes[f"{bar.total - bar.n} runs that the time limit left; the same command goes on from here"] = None
    return list(notes)


def score(
    case: Case, sample: Sample, answer: Result, before: dict[str, float], reference: np.ndarray | None = None
) -> Result:
    """The line of the results file for an answer.

    Args:
        case: the case.
        sample: what was made of it.
        answer: of `Method.register`.
        before: similarity of the images as they were; empty to leave it out.
        reference: the same method's answer to the case that the sample refers to.
    """
    result: Result = {
        "case": case.name,
        "row": case.row.name,
        "index": case.index,
        "subject": case.subject,
        "kind": case.row.kind,
        "dims": case.row.dims,
        "seed": case.seed,
        **case.notes,
        **sample.info,
        **{k: v for k, v in answer.items() if k not in ("matrix", "cannot_run")},
        "failure": answer.get("failure", ""),
    }
    # a method that gives no answer leaves the images as they were
    given = np.eye(case.row.dims + 1)
    if not result["failure"]:
        found = np.asarray(answer["matrix"], dtype=np.float64)
        if found.shape == given.shape and np.isfinite(found).all():
            given = found
        else:
            result["failure"] = f"not a finite {len(given)} x {len(given)} matrix"
    result["matrix"] = given.tolist()
    for name, truth in (("tre", sample.truth), ("tre_corrected", sample.corrected)):
        if sample.reference is not None and truth is not None:
            truth = None if reference is None else truth @ reference
        if truth is not None:
            gaps = np.linalg.norm(transformed(given - truth, sample.points), axis=1)
            result |= {name: float(gaps.mean()), f"{name}_max": float(gaps.max())}
    judged = result.get("tre_corrected", result.get("tre"))
    if judged is not None:
        result |= {"tolerance": sample.tolerance, "right": bool(judged < sample.tolerance)}
        # what says of itself that it failed is no success
        result["success"] = result["right"] and not result["failure"] and result.get("verdict") != "FAIL"
    truth = sample.truth if sample.corrected is None else sample.corrected
    if "point" in result and truth is not None and sample.reference is None:
        gap = transformed(given, np.array(result["point"])) - transformed(truth, np.array(result["point"]))
        result["error_at_point"] = float(np.linalg.norm(gap))
    if sample.labels is not None:
        result["label_dice_before"] = labels_dice(*sample.labels, np.eye(len(given)))
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
