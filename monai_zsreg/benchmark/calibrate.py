# SPDX-License-Identifier: Apache-2.0
"""Is the uncertainty honest, and does the verdict find the failures?

Good runs are exact-truth pairs of all protocols, each with one random point of the brain at which the error is
compared with what was predicted, and real pairs. Failures are made: noise, a part of another image, a mirrored image,
ends of a head that share nothing, and a search that is too narrow. Subjects are split in two: constants fitted on one
half are scored on the other, and the other way round.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import optional_import

from monai_zsreg.benchmark.cases import Case, Row, Sample, build, draw_cases
from monai_zsreg.benchmark.data import Pair
from monai_zsreg.benchmark.plots import COLORS, save_figure
from monai_zsreg.benchmark.run import SUCCESS, interleave, read_results, result_key
from monai_zsreg.benchmark.tables import machine_lines, markdown_table
from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, apply_affine
from monai_zsreg.io.files import atomic_path
from monai_zsreg.metrics import foreground_tre
from monai_zsreg.metrics.statistics import wilson_interval
from monai_zsreg.registration import register
from monai_zsreg.registration.confidence import CALIBRATION, FAIL, PASS, WARN, Calibration, error_quantile

Figure, _ = optional_import("matplotlib.figure", name="Figure")
tqdm, _ = optional_import("tqdm", name="tqdm")

__all__ = [
    "FAILURES",
    "LEVELS",
    "calibration_cases",
    "collect",
    "coverage",
    "fit",
    "halves",
    "roc",
    "summarize_coverage",
    "summarize_verdicts",
    "write_report",
]

LEVELS = (0.5, 0.9, 0.95)
FAILURES = ("noise", "other", "mirrored", "disjoint", "narrow")

Record = dict[str, Any]

_GOOD = {
    2: ("paper", "so3", "noise", "bias", "scale", "cut", "cavity"),
    3: ("mild", "so3", "noise", "bias", "scale", "cut", "thick", "cavity"),
}
_REAL = {2: ("paper", "so3"), 3: ("mild", "so3")}


def calibration_cases(
    pairs: Sequence[Pair], dims: Sequence[int], count: int, seed: int, symmetric: Sequence[str] = ()
) -> list[tuple[str, Case]]:
    """What to run: names of the kinds (``"good"``, ``"real"``, or one of `FAILURES`) and their cases.

    Args:
        pairs: as `draw_cases` takes them.
        dims: 2, 3 or both.
        count: cases of a protocol of good runs; half as many of real pairs and of each kind of failure.
        seed: of all draws.
        symmetric: patterns of subjects, such as averages of many heads, whose mirror image cannot be told from them.
    """
    lists: list[list[tuple[str, Case]]] = []
    half = max(1, count // 2)
    for d in dims:
        for protocol in _GOOD[d]:
            cases = draw_cases(Row(protocol, d, "exact", count, count), pairs, count, seed)
            lists.append([("good", case) for case in cases])
        for protocol in _REAL[d]:
            cases = draw_cases(Row(protocol, d, "real", half, half), pairs, half, seed + 1)
            lists.append([("real", case) for case in cases])
        for number, kind in enumerate(FAILURES):
            protocol = "so3" if kind == "narrow" else _REAL[d][0]
            some = pairs
            if kind == "mirrored":
                some = [p for p in pairs if not any(fnmatch(p.subject, pattern) for pattern in symmetric)]
            cases = draw_cases(Row(protocol, d, "real", half, half), some, half, seed + 2 + number)
            lists.append([(kind, case) for case in cases])
    # `interleave` only passes its items on
    return interleave(lists)  # type: ignore[arg-type, return-value]


def collect(
    cases: Iterable[tuple[str, Case]], output: Path, device: str | None = None, time_limit: float | None = None
) -> list[Record]:
    """Register what ``output`` (JSON lines) does not hold yet; all its records.

    Args:
        cases: of `calibration_cases`.
        output: one line a run, appended at once.
        device: where to compute.
        time_limit: seconds after which no further run begins.
    """
    have = {(r["case"], r["method"], r["seed"]) for r in read_results(output)}
    due = [(kind, case) for kind, case in cases if result_key(case.name, kind, case.seed) not in have]
    output.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    sample: Sample | None = None
    with open(output, "a", encoding="utf-8") as file:
        for kind, case in tqdm(due, unit="run"):
            if time_limit is not None and time.monotonic() - begin > time_limit:
                break
            # another head, for the failures that need one
            previous, sample = sample, build(case)
            record = _run_one(kind, case, sample, previous, device)
            if record is not None:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
    return read_results(output)


def _run_one(kind: str, case: Case, sample: Sample, previous: Sample | None, device: str | None) -> Record | None:
    rng = case.rng(f"failure {kind}")
    options: dict[str, Any] = {}
    if kind in _SPOIL:
        spoiled = _SPOIL[kind](sample, previous, rng)
        if spoiled is None:
            return None
        sample = spoiled
    elif kind == "narrow":
        options["search"] = ("local", "none")[case.index % 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a failure is a record here
        result = register(sample.fixed, sample.moving, device=device, **options)
    record: Record = {
        "case": case.name,
        "method": kind,
        "seed": case.seed,
        "row": case.row.name,
        "subject": case.pair.subject,
        "dims": case.row.dims,
        "failure": "",
        "verdict": result.quality.verdict,
        "reasons": result.quality.reasons,
        "score": result.quality.score if math.isfinite(result.quality.score) else -1e9,
        "measures": result.quality.measures,
        "seconds": round(result.seconds, 4),
        "wrong": kind in _SPOIL,
    }
    truth = sample.corrected if sample.corrected is not None else sample.truth
    if kind not in _SPOIL:
        assert truth is not None
        record["tre"] = foreground_tre(result.affine, truth, sample.fixed, sample.mask)["mean"]
        record["wrong"] = record["tre"] > SUCCESS
        if result.success:
            grid = Grid.of(sample.fixed)
            inside = np.argwhere(sample.mask[0].numpy())
            index = torch.from_numpy(inside[rng.integers(len(inside))].astype(np.float64))[None]
            point = apply_affine(grid.affine, index)
            error = apply_affine(torch.from_numpy(result.affine), point) - apply_affine(truth, point)
            record["error"] = float(error.norm())
            spread = float(result.uncertainty_at(point.numpy())[0])
            constants, step = CALIBRATION[case.row.dims], min(*grid.spacing, *Grid.of(sample.moving).spacing)
            record["step"] = step
            # what the images' own blocks said
            record["raw"] = math.sqrt(max(spread**2 - (constants.floor * step) ** 2, 0.0)) / constants.inflation
            if sample.corrected is not None:
                assert sample.truth is not None
                shift = apply_affine(sample.truth, point) - apply_affine(truth, point)
                record["residual"] = float(shift.norm())
                error = apply_affine(torch.from_numpy(result.affine), point) - apply_affine(sample.truth, point)
                record["error_nominal"] = float(error.norm())
    return record


def _noise(sample: Sample, previous: Sample | None, rng: np.random.Generator) -> Sample:
    """Noise in the shape of the object, smooth or not."""
    import torch.nn.functional as F

    values = torch.from_numpy(rng.normal(size=tuple(sample.moving.shape)).astype(np.float32))
    smooth = int(rng.integers(1, 6))
    dims = values.ndim - 1
    pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
    if smooth > 1:
        values = pool(values[None], smooth | 1, 1, (smooth | 1) // 2)[0]
    values = values / values.std() * 0.3 + 1.0
    seen = sample.moving.as_tensor() > sample.moving.as_tensor().min() + 0.05 * float(sample.moving.max())
    return replace(sample, moving=MetaTensor(values * seen, affine=sample.moving.affine))


def _other(sample: Sample, previous: Sample | None, rng: np.random.Generator) -> Sample | None:
    """Something else: a slice of another body plane, a photograph, or a phantom of boxes and balls."""
    shape = tuple(int(n) for n in sample.moving.shape[1:])
    dims = len(shape)
    axes = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in shape], indexing="ij")
    values = np.zeros(shape, dtype=np.float32)
    for _ in range(int(rng.integers(8, 25))):
        middle, radius = rng.uniform(-0.6, 0.6, dims), rng.uniform(0.08, 0.35, dims)
        distance = [(a - m) / r for a, m, r in zip(axes, middle, radius, strict=True)]
        inside = sum(d**2 for d in distance) < 1 if rng.random() < 0.5 else np.max(np.abs(distance), axis=0) < 1
        values[inside] = rng.uniform(0.2, 1.0)
    values += rng.normal(0, 0.02, shape).astype(np.float32) * (values > 0)
    return replace(sample, moving=MetaTensor(torch.from_numpy(values)[None], affine=sample.moving.affine))


def _mirrored(sample: Sample, previous: Sample | None, rng: np.random.Generator) -> Sample:
    """A header that tells left for right."""
    axis = 1 + int(rng.integers(sample.moving.ndim - 1))
    return replace(sample, moving=MetaTensor(sample.moving.as_tensor().flip(axis), affine=sample.moving.affine))


def _disjoint(sample: Sample, previous: Sample | None, rng: np.random.Generator) -> Sample:
    """The first third of one image and the last third of the other, along the longest side of the object."""
    inside = sample.mask[0].nonzero()
    axis = int((inside.amax(0) - inside.amin(0)).argmax())
    low, high = int(inside[:, axis].min()), int(inside[:, axis].max())
    third = (high - low) // 3
    keep = sample.fixed.as_tensor().clone()
    keep.narrow(axis + 1, low + third, keep.shape[axis + 1] - low - third).fill_(float(keep.min()))
    grid, assert_truth = Grid.of(sample.fixed), sample.truth
    assert assert_truth is not None
    moving = sample.moving.as_tensor().clone()
    # where the moving image's voxels lie in the fixed one
    index = torch.stack(
        torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in moving.shape[1:]], indexing="ij"), -1
    )
    back = Grid.of(sample.moving).index_pull(torch.linalg.inv(assert_truth), grid)
    where = apply_affine(back, index.reshape(-1, index.shape[-1])).view(index.shape)
    moving[0][where[..., axis] < high - third] = float(moving.min())
    return replace(
        sample,
        fixed=MetaTensor(keep, affine=sample.fixed.affine),
        moving=MetaTensor(moving, affine=sample.moving.affine),
    )


_SPOIL: dict[str, Callable[[Sample, Sample | None, np.random.Generator], Sample | None]] = {
    "noise": _noise,
    "other": _other,
    "mirrored": _mirrored,
    "disjoint": _disjoint,
}


# --------------------------------------------------------------------------------------------------------------------
# what it says
# --------------------------------------------------------------------------------------------------------------------


def halves(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Records of two groups of subjects, every second one in the order of their names."""
    subjects = sorted({r["subject"] for r in records})
    first = set(subjects[::2])
    return [r for r in records if r["subject"] in first], [r for r in records if r["subject"] not in first]


def fit(records: Sequence[Record], dims: int) -> Calibration:
    """The constants under which the errors of good runs with exact truth are most likely.

    Args:
        records: of `collect`.
        dims: 2 or 3.

    Raises:
        RegistrationError: fewer than 20 such runs.
    """
    runs = _exact(records, dims)
    if len(runs) < 20:
        raise RegistrationError("records", len(runs), f"at least 20 good runs in {dims}D")
    errors = np.array([r["error"] for r in runs])
    floor = CALIBRATION[dims].floor
    best = CALIBRATION[dims]
    most = -math.inf
    for inflation in np.arange(0.5, 6.01, 0.05):
        spreads = _spreads(runs, replace(best, inflation=float(inflation)))
        for shape in np.arange(1.0, 2.61, 0.1):
            scale = spreads / math.sqrt(math.gamma(1 + 2 / shape))
            z = np.maximum(errors, 1e-6) / scale
            likelihood = float(np.sum(np.log(shape / scale) + (shape - 1) * np.log(z) - z**shape))
            if likelihood > most:
                most, best = likelihood, Calibration(round(float(inflation), 2), floor, round(float(shape), 1))
    return best


def coverage(
    records: Sequence[Record], constants: Calibration, levels: Sequence[float] | np.ndarray = LEVELS
) -> list[float]:
    """Part of the runs whose error stays below the quantile of each level."""
    spreads = _spreads(records, constants)
    errors = np.array([r["error"] for r in records])
    return [float(np.mean(errors <= error_quantile(spreads, level, constants))) for level in levels]


def _exact(records: Sequence[Record], dims: int) -> list[Record]:
    return [r for r in records if r["dims"] == dims and r["method"] == "good" and "error" in r and not r["wrong"]]


def _spreads(runs: Sequence[Record], constants: Calibration) -> np.ndarray:
    raw, step = (np.array([r[key] for r in runs]) for key in ("raw", "step"))
    return np.hypot(constants.inflation * raw, constants.floor * step)


def _with_residual(records: Sequence[Record], dims: int, constants: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """Errors of real pairs against the nominal truth, and their spread with the pair's residual in quadrature."""
    runs = [r for r in records if r["dims"] == dims and r["method"] == "real" and "residual" in r and not r["wrong"]]
    residuals = np.array([r["residual"] for r in runs])
    return np.array([r["error_nominal"] for r in runs]), np.hypot(_spreads(runs, constants), residuals)


def roc(good: Sequence[float], wrong: Sequence[float]) -> tuple[np.ndarray, np.ndarray, float]:
    """Receiver operating characteristic of a score that is larger for good runs.

    Returns:
        Part of the failures found and part of the good runs suspected, at every threshold, and the area.
    """
    scores = np.unique(np.concatenate([good, wrong]))
    thresholds = np.concatenate([[-np.inf], scores, [np.inf]])
    found = np.array([np.mean(np.asarray(wrong) < t) for t in thresholds])
    suspected = np.array([np.mean(np.asarray(good) < t) for t in thresholds])
    area = float(np.sum(np.diff(suspected) * (found[1:] + found[:-1]) / 2))
    return found, suspected, area


def summarize_coverage(records: Sequence[Record]) -> list[dict[str, Any]]:
    """How many errors the intervals hold, a line for each set of runs and choice of constants."""
    lines = []
    for dims in sorted({r["dims"] for r in records}):
        runs = _exact(records, dims)
        first, second = halves(runs)
        sets: list[tuple[str, Calibration, list[Record]]] = [("as shipped, exact truth", CALIBRATION[dims], runs)]
        if min(len(first), len(second)) >= 20:
            sets.append(("fitted on one half, scored on the other", fit(first, dims), second))
            sets.append(("the other way round", fit(second, dims), first))
        for name, constants, scored in sets:
            if scored:
                held = coverage(scored, constants)
                lines.append(_coverage_line(dims, name, constants, len(scored), held))
        errors, spreads = _with_residual(records, dims, CALIBRATION[dims])
        if len(errors):
            held = [float(np.mean(errors <= error_quantile(spreads, q, CALIBRATION[dims]))) for q in LEVELS]
            lines.append(_coverage_line(dims, "as shipped, real pairs", CALIBRATION[dims], len(errors), held))
    return lines


def _coverage_line(dims: int, name: str, constants: Calibration, count: int, held: Sequence[float]) -> dict[str, Any]:
    line: dict[str, Any] = {"dims": dims, "set": name, "runs": count}
    line |= {"inflation": constants.inflation, "floor": constants.floor, "shape": constants.shape}
    return line | {f"{100 * q:.0f} % interval holds, %": round(100 * h, 1) for q, h in zip(LEVELS, held, strict=True)}


def summarize_verdicts(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Verdicts on good runs and on failures of each kind, all and those of the second half of the subjects."""
    lines = []
    for dims in sorted({r["dims"] for r in records}):
        mine = [r for r in records if r["dims"] == dims]
        held_out = halves(mine)[1]
        good = [r for r in mine if not r["wrong"]]
        groups = [("good", good), ("good, second half", [r for r in held_out if not r["wrong"]])]
        wrong = [r for r in mine if r["wrong"]]
        groups += [(kind, [r for r in wrong if r["method"] == kind]) for kind in sorted({r["method"] for r in wrong})]
        groups += [("failures", wrong), ("failures, second half", [r for r in held_out if r["wrong"]])]
        for name, runs in groups:
            if not runs:
                continue
            line: dict[str, Any] = {"dims": dims, "runs of": name, "runs": len(runs)}
            for verdict in (PASS, WARN, FAIL):
                line[verdict] = sum(r["verdict"] == verdict for r in runs)
            low, high = wilson_interval(line[PASS], len(runs))
            line["PASS, 95 % interval"] = f"{100 * low:.1f} to {100 * high:.1f} %"
            if name.startswith("failures"):
                base = good if name == "failures" else [r for r in held_out if not r["wrong"]]
                if base:
                    line["ROC area"] = round(roc([r["score"] for r in base], [r["score"] for r in runs])[2], 4)
            lines.append(line)
    return lines


def plot_reliability(records: Sequence[Record], path: Path) -> bool:
    """Part of the errors inside the interval against its level, as shipped and fitted on the other half.

    Returns:
        False if there is nothing to show, and no file then.
    """
    dims = [d for d in sorted({r["dims"] for r in records}) if _exact(records, d)]
    if not dims:
        return False
    levels = np.linspace(0.02, 0.98, 49)
    figure = Figure(figsize=(5.2 * len(dims), 5), layout="constrained")
    for axes, d in zip(np.ravel(figure.subplots(1, len(dims))), dims, strict=True):
        runs = _exact(records, d)
        axes.plot([0, 1], [0, 1], color="0.6", lw=0.8)
        axes.plot(levels, coverage(runs, CALIBRATION[d], levels), color=COLORS[0], label=f"exact truth ({len(runs)})")
        first, second = halves(runs)
        if min(len(first), len(second)) >= 20:
            style = {"lw": 1.0, "ls": "--"}
            axes.plot(levels, coverage(second, fit(first, d), levels), color=COLORS[1], label="held-out half", **style)
            axes.plot(levels, coverage(first, fit(second, d), levels), color=COLORS[2], label="other half", **style)
        errors, spreads = _with_residual(records, d, CALIBRATION[d])
        if len(errors):
            held = [float(np.mean(errors <= error_quantile(spreads, q, CALIBRATION[d]))) for q in levels]
            axes.plot(levels, held, color=COLORS[3], ls=":", label=f"real pairs with residual ({len(errors)})")
        axes.set(xlabel="level of the interval", ylabel="part of the errors inside", title=f"{d}D", aspect="equal")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left")
    save_figure(figure, path)
    return True


def plot_roc(records: Sequence[Record], path: Path) -> bool:
    """Failures found against good runs suspected.

    Returns:
        False if there is nothing to show, and no file then.
    """
    figure = Figure(figsize=(5.2, 5), layout="constrained")
    axes = figure.subplots()
    shown = False
    for number, d in enumerate(sorted({r["dims"] for r in records})):
        good, wrong = ([r["score"] for r in records if r["dims"] == d and r["wrong"] is bad] for bad in (False, True))
        if good and wrong:
            found, suspected, area = roc(good, wrong)
            label = f"{d}D: area {area:.4f} ({len(good)} good, {len(wrong)} failures)"
            axes.plot(suspected, found, color=COLORS[number], label=label)
            shown = True
    axes.set(xlabel="good runs suspected", ylabel="failures found", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    if shown:
        axes.legend(fontsize=8, loc="lower right")
        save_figure(figure, path)
    return shown


def write_report(records: Sequence[Record], folder: Path, about: dict[str, str]) -> Path:
    """``calibration.md``, ``reliability.png`` and ``roc.png``; the path of the first."""
    plot_reliability(records, folder / "reliability.png")
    plot_roc(records, folder / "roc.png")
    text = ["# Calibration of the uncertainty and of the verdict", "", *machine_lines(about), "", "## Intervals", ""]
    text += markdown_table(summarize_coverage(records))
    text += ["", "## Verdicts", "", *markdown_table(summarize_verdicts(records)), ""]
    path = folder / "calibration.md"
    with atomic_path(path) as partial:
        partial.write_text("\n".join(text), encoding="utf-8")
    return path
