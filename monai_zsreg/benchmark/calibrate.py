# SPDX-License-Identifier: Apache-2.0
"""Is the uncertainty honest, and does the verdict find the failures? One table for each kind of data.

Good runs are those of the benchmark's rows. Each has one random point of the foreground at which the error is compared
with what was predicted. Failures are made of the same images: noise, another object, a mirrored image, ends that share
nothing, and a search that is too narrow. Subjects are split in two: constants fitted on one half are scored on the
other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.stats import weibull_min
from sklearn.metrics import roc_auc_score, roc_curve

from monai_zsreg.benchmark.cases import Case, Row, Sample
from monai_zsreg.benchmark.methods import LEVELS
from monai_zsreg.benchmark.plots import COLORS, figure, save
from monai_zsreg.benchmark.tables import machine, markdown, percent, write_lines
from monai_zsreg.benchmark.volumes import Volume, transformed

__all__ = ["FAILURES", "NARROW", "coverage", "fit", "spoiled_cases", "tables_by_kind", "write_report"]

NARROW = ("ours:robust,search=local", "ours:robust,search=none")
_ENOUGH = 20  # runs in each half, to fit constants


# --------------------------------------------------------------------------------------------------------------------
# failures
# --------------------------------------------------------------------------------------------------------------------


def _noise(sample: Sample, rng: np.random.Generator) -> Sample:
    """Noise in the shape of the object, smooth or not."""
    values = ndimage.uniform_filter(rng.normal(size=sample.moving.shape), int(rng.integers(1, 6)) | 1)
    image = sample.moving.values
    seen = image > image.min() + 0.05 * (image.max() - image.min())
    return _moving(sample, (values / values.std() * 0.3 + 1) * seen)


def _other(sample: Sample, rng: np.random.Generator) -> Sample:
    """Something else: a phantom of boxes and balls."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in sample.moving.shape], indexing="ij")
    values = np.zeros(sample.moving.shape)
    for _ in range(int(rng.integers(8, 25))):
        middle, radius = rng.uniform(-0.6, 0.6, values.ndim), rng.uniform(0.08, 0.35, values.ndim)
        gaps = [np.abs(a - m) / r for a, m, r in zip(axes, middle, radius, strict=True)]
        inside = sum(g**2 for g in gaps) < 1 if rng.random() < 0.5 else np.max(gaps, axis=0) < 1
        values[inside] = rng.uniform(0.2, 1.0)
    return _moving(sample, values + rng.normal(0, 0.02, values.shape) * (values > 0))


def _mirrored(sample: Sample, rng: np.random.Generator) -> Sample:
    """A header that tells left for right."""
    return _moving(sample, np.flip(sample.moving.values, int(rng.integers(sample.moving.dims))))


def _disjoint(sample: Sample, rng: np.random.Generator) -> Sample:
    """The first third of one image and the last third of the other, along the longest side of the object."""
    assert sample.truth is not None
    index = transformed(np.linalg.inv(sample.fixed.affine), sample.points)
    low, high = index.min(axis=0), index.max(axis=0)
    axis = int(np.argmax((high - low) * sample.fixed.spacing))
    third = (high - low)[axis] / 3
    fixed = sample.fixed.values.copy()
    fixed[(slice(None),) * axis + (slice(int(low[axis] + third), None),)] = fixed.min()
    # where the moving image's voxels lie in the fixed one
    back = np.linalg.inv(sample.fixed.affine) @ np.linalg.inv(sample.truth) @ sample.moving.affine
    where = np.tensordot(back[axis, :-1], np.indices(sample.moving.shape), axes=1) + back[axis, -1]
    moving = np.where(where < high[axis] - third, sample.moving.values.min(), sample.moving.values)
    return replace(_moving(sample, moving), fixed=Volume(fixed, sample.fixed.affine))


def _moving(sample: Sample, values: np.ndarray) -> Sample:
    return replace(sample, moving=Volume(np.ascontiguousarray(values, dtype=np.float32), sample.moving.affine))


FAILURES: dict[str, Callable[[Sample, np.random.Generator], Sample]] = {
    "noise": _noise,
    "other": _other,
    "mirrored": _mirrored,
    "disjoint": _disjoint,
}


def spoiled_cases(cases: Iterable[Case], symmetric: Sequence[str] = ()) -> list[Case]:
    """Failures made of cases that have a truth, one of `FAILURES` each in turn.

    Args:
        cases: of the benchmark's rows.
        symmetric: patterns of subjects, such as averages of many heads, whose mirror image cannot be told from them.
    """
    spoiled = []
    for number, case in enumerate(cases):
        kind = list(FAILURES)[number % len(FAILURES)]
        if case.row.kind == "between" or any(fnmatch(case.subject, p) for p in symmetric if kind == "mirrored"):
            continue
        row = Row(kind, case.row.dims, "wrong", 0, 0, f"{kind} {case.row.name}", case.row.transform)
        maker = partial(_spoil, inner=case)
        spoiled.append(Case(row, case.index, case.subject, case.images, case.seed, maker, case.notes))
    return spoiled


def _spoil(case: Case, inner: Case) -> Sample:
    sample = inner.build()
    if sample.truth is None:
        raise ValueError("its truth is not known")
    spoiled = FAILURES[case.row.protocol](sample, case.rng("failure"))
    return replace(spoiled, truth=None, corrected=None, reference=None)


# --------------------------------------------------------------------------------------------------------------------
# what it says
# --------------------------------------------------------------------------------------------------------------------


def fit(runs: pd.DataFrame) -> tuple[float, float]:
    """Factor on the predicted root mean square, and Weibull's shape, under which the errors are most likely."""
    shape, _, scale = weibull_min.fit(np.maximum(runs["error_at_point"] / runs["spread"], 1e-6), floc=0)
    return float(scale * math.sqrt(math.gamma(1 + 2 / shape))), float(shape)


def coverage(runs: pd.DataFrame, constants: tuple[float, float] | None = None, levels: Any = LEVELS) -> list[float]:
    """Fraction of the runs whose error stays below the bound of each level, as predicted or with `fit`'s constants."""
    if constants is None:
        bounds = [runs["bounds"].map(lambda b, q=q: b[str(q)]) for q in levels]
    else:
        factor, shape = constants
        scale = factor * runs["spread"] / math.sqrt(math.gamma(1 + 2 / shape))
        bounds = [scale * (-math.log1p(-q)) ** (1 / shape) for q in levels]
    return [float((runs["error_at_point"] <= bound).mean()) for bound in bounds]


def _table(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Records with ``wrong`` and what the tables count by."""
    table = pd.DataFrame(records)
    for column in ("right", "error_at_point", "spread", "bounds"):
        table[column] = table.get(column)
    table["wrong"] = (table["kind"] == "wrong") | (table["right"] == False)  # noqa: E712  (unknown is not wrong)
    table = table[(table["kind"] == "wrong") | table["right"].notna()].copy()
    table["failure of"] = np.where(table["kind"] == "wrong", table["row"].str.split().str[0], "registration")
    table.loc[table["method"].isin(NARROW), "failure of"] = "narrow search"
    return table


def tables_by_kind(records: Sequence[dict[str, Any]]) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """For each kind of data a table of verdicts and one of intervals."""
    tables = {}
    for kind, mine in _table(records).groupby("group"):
        good = mine[~mine["wrong"]]
        groups = [("right", good), *[(f"wrong: {name}", g) for name, g in mine[mine["wrong"]].groupby("failure of")]]
        verdicts = pd.DataFrame([_verdicts(name, group, good) for name, group in groups if len(group)])
        known = good[good["error_at_point"].notna() & (good["kind"] != "header")]
        lines = []
        for truth, runs in (
            ("exact truth", known[known["kind"] != "real"]),
            ("real pairs", known[known["kind"] == "real"]),
        ):
            halves = [runs[runs["subject"].isin(sorted(runs["subject"].unique())[k::2])] for k in (0, 1)]
            sets: list[tuple[str, pd.DataFrame, tuple[float, float] | None]] = [("as shipped", runs, None)]
            if min(map(len, halves)) >= _ENOUGH:
                sets += [
                    ("fitted on one half", halves[1], fit(halves[0])),
                    ("the other way round", halves[0], fit(halves[1])),
                ]
            lines += [
                _interval(f"{truth}, {name}", scored, constants) for name, scored, constants in sets if len(scored)
            ]
        tables[str(kind)] = verdicts, pd.DataFrame(lines)
    return tables


def _verdicts(name: str, runs: pd.DataFrame, good: pd.DataFrame) -> dict[str, Any]:
    counts = {verdict: int((runs["verdict"] == verdict).sum()) for verdict in ("PASS", "WARN", "FAIL")}
    share, low, high = percent(counts["PASS"], len(runs))
    line = {"runs": name, "n": len(runs), **counts, "PASS, %": f"{share:.1f} [{low:.1f}, {high:.1f}]"}
    if name != "right" and len(good):
        both = pd.concat([good, runs])
        line["ROC area"] = f"{roc_auc_score(~both['wrong'].astype(bool), both['score'].fillna(-1e9)):.4f}"
    return line | {"seconds": f"{runs['seconds'].median():.2f}"}


def _interval(name: str, runs: pd.DataFrame, constants: tuple[float, float] | None) -> dict[str, Any]:
    line: dict[str, Any] = {"intervals": name, "n": len(runs)}
    line |= {
        f"{100 * q:.0f} % holds, %": f"{100 * h:.1f}" for q, h in zip(LEVELS, coverage(runs, constants), strict=True)
    }
    return line | {
        "factor": f"{constants[0]:.2f}" if constants else "1",
        "shape": f"{constants[1]:.2f}" if constants else "",
    }


def plot_reliability(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Fraction of the errors inside the interval against its level, a diagram for each kind of data."""
    table = _table(records)
    known = table[~table["wrong"] & table["error_at_point"].notna() & (table["kind"] != "header")]
    kinds = list(known.groupby("group"))
    if not kinds:
        return
    made, axes = figure(math.ceil(len(kinds) / 3), min(3, len(kinds)), 4.5, 4.5)
    for ax, (kind, runs) in zip(axes.ravel(), kinds, strict=False):
        ax.plot([0, 1], [0, 1], color="0.6", lw=0.8)
        for color, (truth, mine) in zip(COLORS, runs.groupby(runs["kind"] == "real"), strict=False):
            label = f"{'real pairs' if truth else 'exact truth'} ({len(mine)})"
            ax.plot(LEVELS, coverage(mine), "o-", color=color, label=label)
        ax.set(
            xlabel="level of the interval", ylabel="fraction of the errors inside", title=kind, xlim=(0, 1), ylim=(0, 1)
        )
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="upper left")
    save(made, path)


def plot_roc(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Failures found against good runs suspected, a curve for each kind of data."""
    made, axes = figure(1, 1, 6, 5.5)
    for color, (kind, runs) in zip(COLORS * 3, _table(records).groupby("group"), strict=False):
        if runs["wrong"].nunique() == 2:
            wrong, suspicion = runs["wrong"].astype(bool), -runs["score"].fillna(-1e9)
            suspected, found, _ = roc_curve(wrong, suspicion)
            area = roc_auc_score(wrong, suspicion)
            axes[0, 0].plot(
                suspected, found, color=color, label=f"{kind}: {area:.4f} ({(~wrong).sum()}, {wrong.sum()} failures)"
            )
    axes[0, 0].set(xlabel="good runs suspected", ylabel="failures found", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes[0, 0].legend(fontsize=8, loc="lower right")
    save(made, path)


def write_report(records: Sequence[dict[str, Any]], folder: Path, threads: int, notes: Sequence[str] = ()) -> Path:
    """``calibration.md``, ``reliability.png`` and ``roc.png``; the path of the first."""
    plot_reliability(records, folder / "reliability.png")
    plot_roc(records, folder / "roc.png")
    text = ["# Calibration of the uncertainty and of the verdict", "", *machine(threads)]
    for kind, (verdicts, intervals) in tables_by_kind(records).items():
        text += ["", f"## {kind}", "", *markdown(verdicts), ""]
        text += markdown(intervals) if len(intervals) else ["No run whose truth is exact enough for intervals."]
    if notes:
        text += ["", "## Left out", "", *[f"- {note}" for note in notes]]
    write_lines(folder / "calibration.md", text)
    return folder / "calibration.md"
