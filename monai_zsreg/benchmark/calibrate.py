# SPDX-License-Identifier: Apache-2.0
"""Is the uncertainty honest, and does the verdict find the failures? One table for each kind of data.

Good runs are those of the benchmark's rows. Each has one random point of the foreground at which the error is compared
with what was predicted. Failures are made of the same images: noise, another object, a mirrored image, ends that share
nothing, and a search that is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.stats import weibull_min
from sklearn.metrics import roc_auc_score, roc_curve

from monai_zsreg.benchmark.cases import Case, Row, Sample
from monai_zsreg.benchmark.peers import LEVELS
from monai_zsreg.benchmark.report import COLORS, figure, markdown, percent, save, write_page
from monai_zsreg.benchmark.volumes import Volume, transformed

ROBUST = "ours:robust"
NARROW = ("ours:robust,search=local", "ours:robust,search=none")
_ENOUGH = 20  # runs to fit constants to


def _noise(sample: Sample, rng: np.random.Generator) -> Sample:
    """Noise in the shape of the object, smooth or not."""
    values = ndimage.uniform_filter(rng.normal(size=sample.moving.shape), int(rng.integers(1, 6)) | 1)
    image = sample.moving.values
    return _moving(sample, (values / values.std() * 0.3 + 1) * (image > image.min() + 0.05 * np.ptp(image)))


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
    from_world = np.linalg.inv(sample.fixed.affine)
    index = transformed(from_world, sample.points)
    axis = int(np.argmax(np.ptp(index, axis=0) * sample.fixed.spacing))
    low, high = np.quantile(index[:, axis], [0, 1])
    fixed, moving = sample.fixed.values.copy(), sample.moving.values.copy()
    fixed[np.indices(fixed.shape)[axis] > low + (high - low) / 3] = fixed.min()
    # where the moving image's voxels lie in the fixed one
    back = from_world @ np.linalg.inv(sample.truth) @ sample.moving.affine
    where = np.tensordot(back[axis, :-1], np.indices(moving.shape), axes=1) + back[axis, -1]
    moving[where < high - (high - low) / 3] = moving.min()
    return replace(_moving(sample, moving), fixed=Volume(fixed, sample.fixed.affine))


def _moving(sample: Sample, values: np.ndarray) -> Sample:
    return replace(sample, moving=Volume(np.ascontiguousarray(values, dtype=np.float32), sample.moving.affine))


FAILURES = {"noise": _noise, "other": _other, "mirrored": _mirrored, "disjoint": _disjoint}


def calibration_cases(cases: Iterable[Case], symmetric: Sequence[str] = ()) -> list[Case]:
    """Those of the rows that have a truth, for the methods that are to run them, and `spoiled_cases` of them.

    A search that is too narrow fails where any rotation may be.
    """
    good = [case for case in cases if case.row.kind != "between"]
    judged = [case if case.row.protocol == "so3" else replace(case, methods=(ROBUST,)) for case in good]
    return judged + spoiled_cases(good, symmetric)


def spoiled_cases(cases: Iterable[Case], symmetric: Sequence[str] = ()) -> list[Case]:
    """Failures made of cases that have a truth, one of `FAILURES` each in turn.

    ``symmetric``: patterns of subjects, such as averages of many heads, whose mirror image cannot be told from them.
    """
    spoiled = []
    for number, case in enumerate(cases):
        kind = list(FAILURES)[number % len(FAILURES)]
        if kind != "mirrored" or not any(fnmatch(case.subject, pattern) for pattern in symmetric):
            row = Row(kind, case.row.dims, "wrong", 0, 0, f"{kind} {case.row.name}", case.row.transform)
            spoiled.append(replace(case, row=row, make=partial(_spoil, inner=case), methods=(ROBUST,)))
    return spoiled


def _spoil(case: Case, inner: Case) -> Sample:
    sample = inner.build()
    if sample.truth is None or sample.reference is not None:
        raise ValueError("its truth is not known")
    spoiled = FAILURES[case.row.protocol](sample, case.rng("failure"))
    return replace(spoiled, truth=None, corrected=None)


def fit(runs: pd.DataFrame) -> tuple[float, float]:
    """Factor on the predicted root mean square, and Weibull's shape, under which the errors are most likely."""
    shape, _, scale = weibull_min.fit(np.maximum(runs["error_at_point"] / runs["spread"], 1e-6), floc=0)
    return float(scale * math.sqrt(math.gamma(1 + 2 / shape))), float(shape)


def coverage(runs: pd.DataFrame) -> list[float]:
    """Fraction of the runs whose error stays below the bound that was predicted for each level."""
    bounds = pd.DataFrame(list(runs["bounds"]), runs.index)
    return [float((runs["error_at_point"] <= bounds[str(level)]).mean()) for level in LEVELS]


def tabulate(results: pd.DataFrame) -> pd.DataFrame:
    """Results with ``wrong``, ``what`` went wrong and ``judged``: the truth is good enough for intervals."""
    table = results.reindex(columns=results.columns.union(_OPTIONAL, sort=False))
    made = table["kind"] == "wrong"
    table = table[made | table["right"].notna()]
    table["wrong"] = made | table["right"].eq(False)
    table["what"] = np.where(made, table["row"].str.split().str[0], "registration")
    table.loc[table["method"].isin(NARROW), "what"] = "narrow search"
    table["judged"] = ~table["wrong"] & table["error_at_point"].notna() & (table["kind"] != "header")
    table["score"] = table["score"].astype(float).fillna(-1e9)
    return table


_OPTIONAL = ("right", "score", "verdict", "error_at_point", "spread", "bounds")
_TRUTHS = {"real": "right, real pairs", "header": "right by the header"}


def kind_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Verdicts, intervals and ROC areas of `tabulate`'s runs of one kind of data.

    A line for right runs by each sort of truth, one for each kind of failure, and one for all of these. ``factor`` and
    ``shape`` are `fit`'s: how far, and with what shape, the shipped constants would have to be changed for these runs.
    """
    good, bad = runs[~runs["wrong"]], runs[runs["wrong"]]
    groups = [*good.groupby(good["kind"].map(_TRUTHS).fillna("right, exact truth")), *bad.groupby("what")]
    groups += [("all failures", bad)] if bad["what"].nunique() > 1 else []
    lines = []
    for name, group in groups:
        passed = "{:.1f} [{:.1f}, {:.1f}]".format(*percent(group["verdict"] == "PASS"))
        counts = {verdict: int((group["verdict"] == verdict).sum()) for verdict in ("PASS", "WARN", "FAIL")}
        line = {"runs": name, "n": len(group), **counts, "PASS, %": passed}
        if bool(group["wrong"].iloc[0]) and len(good):
            line["ROC area"] = f"{_roc_area(pd.concat([good, group])):.4f}"
        judged = group[group["judged"]]
        if len(judged):
            held = zip(LEVELS, coverage(judged), strict=True)
            line |= {f"{100 * level:.0f} % holds, %": f"{100 * part:.1f}" for level, part in held}
        if len(judged) >= _ENOUGH:
            line |= dict(zip(("factor", "shape"), (f"{number:.2f}" for number in fit(judged)), strict=True))
        lines.append(line | {"seconds": f"{group['seconds'].median():.2f}"})
    return pd.DataFrame(lines).fillna("")


def _roc_area(runs: pd.DataFrame) -> float:
    return float(roc_auc_score(runs["wrong"].astype(bool), -runs["score"]))


def _plot_reliability(table: pd.DataFrame, path: Path) -> None:
    """Fraction of the errors inside the interval against its level, a diagram for each kind of data."""
    kinds = list(table[table["judged"]].groupby("group"))
    if not kinds:
        return
    made, axes = figure(math.ceil(len(kinds) / 4), min(4, len(kinds)), 4.5, 4.5)
    for ax, (kind, runs) in zip(axes.ravel(), kinds, strict=False):
        ax.plot([0, 1], [0, 1], color="0.6", lw=0.8)
        for color, (real, mine) in zip(COLORS, runs.groupby(runs["kind"] == "real"), strict=False):
            label = f"{'real pairs' if real else 'exact truth'} ({len(mine)})"
            ax.plot(LEVELS, coverage(mine), "o-", color=color, label=label)
        ax.set(xlabel="level of the interval", ylabel="fraction of the errors inside", title=kind)
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="upper left")
    for ax in axes.ravel()[len(kinds) :]:
        ax.set_axis_off()
    save(made, path)


def _plot_roc(table: pd.DataFrame, path: Path) -> None:
    """Failures found against good runs suspected, a curve for each kind of data."""
    made, axes = figure(1, 1, 6, 5.5)
    for color, (kind, runs) in zip(COLORS * 3, table.groupby("group"), strict=False):
        wrong = runs["wrong"].astype(bool)
        if wrong.nunique() == 2:
            suspected, found, _ = roc_curve(wrong, -runs["score"])
            label = f"{kind}: {_roc_area(runs):.4f} ({(~wrong).sum()} good, {wrong.sum()} failures)"
            axes[0, 0].plot(suspected, found, color=color, label=label)
    axes[0, 0].set(xlabel="good runs suspected", ylabel="failures found")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    save(made, path)


def write_report(results: pd.DataFrame, folder: Path, threads: int, notes: Sequence[str] = ()) -> Path:
    """``calibration.md``, ``reliability.png`` and ``roc.png``; the path of the first."""
    table = tabulate(results)
    _plot_reliability(table, folder / "reliability.png")
    _plot_roc(table, folder / "roc.png")
    kinds = table.groupby("group")
    text = [line for kind, runs in kinds for line in (f"## {kind}", "", *markdown(kind_table(runs)), "")]
    title = "Calibration of the uncertainty and of the verdict"
    return write_page(folder / "calibration.md", title, threads, text[:-1], notes)
