# SPDX-License-Identifier: Apache-2.0
"""The loop: for each case all methods one after another, each result on disk before the next begins."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import optional_import

from monai_zsreg.benchmark.cases import Case, Sample, build
from monai_zsreg.benchmark.data import background_value
from monai_zsreg.benchmark.peers import Method
from monai_zsreg.geometry import Grid, theta_from_index
from monai_zsreg.metrics import foreground_tre, similarity
from monai_zsreg.networks import AffineResampler

tqdm, _ = optional_import("tqdm", name="tqdm")

__all__ = ["SUCCESS", "Caps", "interleave", "label_dice", "read_results", "result_key", "run_cases", "warp"]

SUCCESS = 2.0  # mm, pixels in 2D
_METRICS = ("dice", "ssim", "mi", "nmi", "mse", "rmse")

Result = dict[str, Any]


@dataclass
class Caps:
    """How many cases of a row a slow method gets: the first so many.

    Args:
        cases: number by name or family of the method and dimensions, such as ``{("ants", 3): 20}``; the name counts
            where both are given.
    """

    cases: dict[tuple[str, int], int] = field(default_factory=dict)

    def allow(self, method: Method, case: Case) -> bool:
        """Whether the method runs this case."""
        dims = case.row.dims
        most = self.cases.get((method.name, dims), self.cases.get((method.family, dims)))
        return most is None or case.index < most


def interleave(rows: Iterable[Sequence[Case]]) -> list[Case]:
    """Cases of all rows in turn, so that a run cut short has some of each."""
    return [case for turn in zip_longest(*rows) for case in turn if case is not None]


def result_key(case: str, method: str, seed: int) -> tuple[str, str, int]:
    """What makes a result one that need not be computed again."""
    return case, method, seed


def read_results(path: Path) -> list[Result]:
    """Results of a JSON-lines file, the last one of each case and method.

    A line that an interruption left half-written is passed over.
    """
    results: dict[tuple[str, str, int], Result] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                result = json.loads(line)
                results[result_key(result["case"], result["method"], result["seed"])] = result
    return list(results.values())


def run_cases(
    cases: Sequence[Case],
    methods: Sequence[Method],
    output: Path,
    caps: Caps | None = None,
    time_limit: float | None = None,
    with_similarity: bool = True,
    redo: Sequence[str] = (),
) -> list[Result]:
    """Run every method on every case that ``output`` does not hold yet.

    Args:
        cases: in the order to run them.
        methods: under test.
        output: JSON-lines file; one line is appended for each case and method.
        caps: limits for slow methods.
        time_limit: seconds after which no further registration begins.
        with_similarity: measure Dice, SSIM, MI and MSE before and after.
        redo: names of methods to run again; ``"failures"`` for all runs that gave no answer.

    Returns:
        All results of the file.
    """
    caps = caps or Caps()
    have = {
        result_key(r["case"], r["method"], r["seed"])
        for r in read_results(output)
        if r["method"] not in redo and not (r["failure"] and "failures" in redo)
    }
    due = []
    for case in cases:
        wanted = [m for m in methods if case.row.dims in m.dims and caps.allow(m, case)]
        todo = [m for m in wanted if result_key(case.name, m.name, case.seed) not in have]
        if todo:
            due.append((case, todo))
    begin = time.monotonic()
    warm: set[tuple[str, int]] = set()
    output.parent.mkdir(parents=True, exist_ok=True)
    _end_line(output)
    with open(output, "a", encoding="utf-8") as file, tqdm(total=sum(len(t) for _, t in due), unit="run") as bar:
        for case, todo in due:
            if _late(begin, time_limit):
                break
            bar.set_description(case.row.name)
            try:
                sample = build(case)
            except Exception as error:  # one bad file must not end a run of hours
                bar.write(f"{case.name} could not be made: {error!r}")
                bar.update(len(todo))
                continue
            before = _similarity(sample, None) if with_similarity else {}
            # whoever goes first finds cold caches: take turns
            turn = case.index % len(todo)
            for method in todo[turn:] + todo[:turn]:
                if _late(begin, time_limit):
                    break
                if (method.name, case.row.dims) not in warm:
                    _warm_up(method, case.row.dims)
                    warm.add((method.name, case.row.dims))
                bar.set_postfix_str(method.name)
                result = _run_one(case, sample, method, before, with_similarity)
                file.write(json.dumps(result) + "\n")
                file.flush()
                os.fsync(file.fileno())
                bar.update()
        if bar.n < bar.total:
            bar.write(f"{bar.total - bar.n} runs left; the same command goes on from here")
    return read_results(output)


def _late(begin: float, limit: float | None) -> bool:
    return limit is not None and time.monotonic() - begin > limit


def _end_line(path: Path) -> None:
    """Close a half-written last line, so that the next result does not join it."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _run_one(case: Case, sample: Sample, method: Method, before: dict[str, float], with_similarity: bool) -> Result:
    result: Result = {
        "case": case.name,
        "row": case.row.name,
        "index": case.index,
        "subject": case.pair.subject,
        "fixed_modality": case.pair.fixed_modality,
        "moving_modality": case.pair.moving_modality,
        "kind": case.row.kind,
        "dims": case.row.dims,
        "method": method.name,
        "family": method.family,
        "seed": case.seed,
        **sample.info,
        "failure": "",
    }
    matrix = None
    try:
        images = method.prepare(sample.fixed, sample.moving)
        matrix, seconds = method.timed(images)
        result["seconds"] = round(seconds, 5)
        if matrix.shape != (case.row.dims + 1,) * 2 or not np.isfinite(matrix).all():
            result["failure"] = f"not a finite {case.row.dims + 1} x {case.row.dims + 1} matrix"
            matrix = None
    except Exception as error:  # a failed registration is a result
        result["failure"] = f"{type(error).__name__}: {str(error).strip()}"[:300]
    # a method that gives no answer leaves the images as they were
    given = np.eye(case.row.dims + 1) if matrix is None else matrix
    result["matrix"] = given.tolist()
    failed = matrix is None
    for name, truth in (("", sample.truth), ("_corrected", sample.corrected)):
        if truth is not None:
            tre = foreground_tre(given, truth, sample.fixed, sample.mask)
            result[f"tre{name}"] = tre["mean"]
            result[f"tre{name}_max"] = tre["max"]
    judged = result.get("tre_corrected", result.get("tre"))
    if judged is not None:
        result["success"] = bool(not failed and judged < SUCCESS)
    if sample.labels is not None:
        result["label_dice_before"] = label_dice(sample, np.eye(case.row.dims + 1))
        result["label_dice"] = label_dice(sample, given)
    if with_similarity:
        after = before if failed else _similarity(sample, given)
        result |= {f"{k}_before": before[k] for k in _METRICS} | {f"{k}_after": after[k] for k in _METRICS}
    return {k: _rounded(v) for k, v in result.items()}


def _rounded(value: Any) -> Any:
    # JSON has no NaN or infinity
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def warp(
    moving: MetaTensor, matrix: np.ndarray, fixed: MetaTensor, mode: str = "bilinear", fill: float = 0.0
) -> torch.Tensor:
    """The moving image on the fixed grid.

    Args:
        moving: ``[1, *spatial]``.
        matrix: ``(D+1, D+1)``, fixed world to moving world.
        fixed: image whose grid counts.
        mode: of ``grid_sample``.
        fill: value where the moving image has nothing.

    Returns:
        ``[1, *fixed spatial]`` float32.
    """
    one, two = Grid.of(fixed), Grid.of(moving)
    theta = theta_from_index(one.index_pull(torch.from_numpy(matrix), two), one.shape, two.shape).float()
    values = moving.as_tensor().float()[None] - fill
    return AffineResampler(mode)(values, theta[None], list(one.shape))[0] + fill


def _similarity(sample: Sample, matrix: np.ndarray | None) -> dict[str, float]:
    """Similarity on the fixed grid, after ``matrix``; before registration with None."""
    matrix = np.eye(sample.fixed.ndim) if matrix is None else matrix
    moved = warp(sample.moving, matrix, sample.fixed, fill=background_value(sample.moving[0].numpy()))
    return similarity(sample.fixed.as_tensor(), moved, region="foreground")


def label_dice(sample: Sample, matrix: np.ndarray) -> float:
    """Mean Dice over the labels that both images have, the moving labels by nearest neighbor on the fixed grid."""
    assert sample.labels is not None
    fixed, moving = sample.labels
    moved = warp(moving, matrix, fixed, mode="nearest").round().long().flatten()
    still = fixed.as_tensor().round().long().flatten()
    shared = sorted((set(still.unique().tolist()) & set(moving.as_tensor().round().long().unique().tolist())) - {0})
    scores = []
    for label in shared:
        a, b = still == label, moved == label
        scores.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()))
    return float(np.mean(scores))


def _warm_up(method: Method, dims: int) -> None:
    """One small registration, so that libraries are loaded and threads exist when the clock starts."""
    side = 96 if dims == 2 else 48
    axes = np.meshgrid(*[np.linspace(-1, 1, side)] * dims, indexing="ij")
    blob = np.sum([((a - 0.1 * i) * (1.2 + 0.3 * i)) ** 2 for i, a in enumerate(axes)], axis=0)
    texture = np.random.default_rng(0).normal(0, 0.05, blob.shape)
    image = (100 * (np.exp(-3 * blob) + texture) * (blob < 1)).astype(np.float32)
    fixed = MetaTensor(torch.from_numpy(image)[None], affine=torch.eye(4, dtype=torch.float64))
    moving = MetaTensor(torch.from_numpy(np.roll(image, 2, axis=0))[None], affine=torch.eye(4, dtype=torch.float64))
    with suppress(Exception):  # a method that cannot run says so in its results
        method.timed(method.prepare(fixed, moving))
