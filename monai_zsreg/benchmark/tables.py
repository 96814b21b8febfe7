# SPDX-License-Identifier: Apache-2.0
"""The results as CSV and Markdown."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from monai_zsreg.benchmark.brains import STRESS
from monai_zsreg.benchmark.peers import PEERS
from monai_zsreg.io.files import atomic_path

__all__ = ["cost_table", "machine", "markdown", "percent", "summarize", "write_csv", "write_lines", "write_summary"]

_CHANGES = ("dice", "mi", "nmi", "ssim", "mse")
_VERDICTS = ("PASS", "WARN", "FAIL")

_NOTES = f"""
Error of a case: mean over the foreground of the fixed image, mm in 3D, pixels in 2D. Success: below 2 (rows of
anatomies and slices: below the pair's tolerance), and the method does not say itself that it failed, with Wilson's
95 % interval. The interval of the median resamples subjects. A run without an answer counts with the error of doing
nothing. Seconds: median, registration alone, images in memory, after a warm-up. Peers run at their defaults and from
the centers of mass; the better start of each is shown. Methods with a smaller n ran the first n cases of the same list.
Verdicts are ours: PASS / WARN / FAIL; then wrong answers with PASS, and right ones with FAIL.

`exact`: the second contrast is simulated from the first image, and the known transform is the whole truth (`natural`:
another channel of one photograph). `real`: two scans that were co-registered to within a few tenths of a millimeter;
`plain` takes the known transform alone for the truth, `corrected` composes it with the residual shift that was measured
for the pair. `header`: what the headers say, within the pair's tolerance. Success counts the corrected error where
there is one.

Rows: `paper` (shift up to 50 px an axis, rotation 0.3 rad, shear 0.03), `mild` (15 degrees, 15 mm, 8 % scale, 5 %
shear), `so3` (any rotation; 50 mm, or a third of the image in 2D), `natural`: photographs under `paper`. Stress rows on
top of `paper` (2D) or `mild` (3D): {"; ".join(f"`{key}`: {text}" for key, text in STRESS.items())}. `anatomies` and
`slices`: only the moving header is moved: `given` not at all, `p10` by 10 degrees and 10 mm, `p30` by 30 degrees and
20 mm, `any` by 90 to 180 degrees, `cut` as `p10` with a third of the moving image cut off. `retina`: photographs of one
retina whose fields of view overlap in part.
"""
_CHANGE_NOTES = """
Mean of after minus before. Each image is scaled by its own 0.5 and 99.5 percentiles to [0, 1]; SSIM, MI and MSE are
over the union of both foregrounds, Dice is that of the foregrounds. MI is in nats, NMI is 2I/(H+H). Across modalities a
right answer need not lower the MSE or raise the SSIM.
"""
_PAPER_TABLE = """
The paper's own Table 1. **Not comparable**: its data and its scaling of the metrics are different, and its Table 1 and
Figure 4 disagree with each other.

| method (paper) | Dice | MI | SSIM | MSE | seconds per image |
|---|---|---|---|---|---|
| SimpleElastix | +0.263 | +0.221 | +0.404 | -0.0361 | 1.6 |
| SIFT | +0.248 | +0.150 | +0.383 | -0.0410 | 0.3 |
| the paper's method | +0.294 | +0.373 | +0.431 | -0.0720 | 0.2 |
"""


def percent(successes: int, n: int) -> tuple[float, float, float]:
    """A share and Wilson's 95 % interval of it, in percent."""
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return 100 * successes / n, 100 * float(interval.low), 100 * float(interval.high)


def _median_interval(values: pd.Series, subjects: pd.Series) -> list[float]:
    """95 % percentile bootstrap of the median, resampling subjects; NaN with one subject."""
    groups = [group.to_numpy() for _, group in values.groupby(subjects)]
    if len(groups) == 1:
        return [np.nan, np.nan]
    draws = np.random.default_rng(0).integers(len(groups), size=(2000, len(groups)))
    medians = [np.median(np.concatenate([groups[i] for i in draw])) for draw in draws]
    # outward, so the interval is never too short
    return [np.percentile(medians, 2.5, method="lower"), np.percentile(medians, 97.5, method="higher")]


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """One line for each row and method, in the order of the rows' first results, ours first.

    Figures of a row are over all of its cases that the method ran. ``best`` marks the better start of a method in that
    row: higher success, then lower median.
    """
    table = pd.DataFrame([_line(group) for _, group in results.groupby(["row", "method"], sort=False)])
    for name in ("success", "tre_median", "label_dice", "seconds_median"):
        table[name] = table.get(name)
    # presets are methods of their own, not starts of one method
    table["rival"] = np.where(table["family"] == "ours", table["method"], table["family"])
    ranked = table.sort_values(["success", "tre_median", "label_dice"], ascending=[False, True, False])
    table["best"] = ~ranked.duplicated(["row", "rival"]).reindex(table.index)
    order = {row: number for number, row in enumerate(results["row"].unique())}
    table = table.assign(order=table["row"].map(order), others=table["family"] != "ours")
    table = table.sort_values(["order", "others", "method"], ignore_index=True)
    return table.drop(columns=["order", "others", "rival"])


def _line(group: pd.DataFrame) -> dict[str, Any]:
    group = group.dropna(axis="columns", how="all")
    line = group.iloc[0][["row", "method", "family", "kind", "dims"]].to_dict()
    line |= {"n": len(group), "subjects": group["subject"].nunique(), "failures": int((group["failure"] != "").sum())}
    for name in ("tre", "tre_corrected"):
        if name in group:
            known = group[group[name].notna()]
            low, high = _median_interval(known[name], known["subject"])
            line |= {f"{name}_n": len(known), f"{name}_median": known[name].median()}
            line |= {f"{name}_median_low": low, f"{name}_median_high": high}
            line |= {f"{name}_p95": known[name].quantile(0.95, "higher"), f"{name}_max": known[name].max()}
            line |= {f"{name}_max_point": known[f"{name}_max"].max()}
    if "success" in group:
        judged = group[group["success"].notna()]
        share, low, high = percent(int(judged["success"].sum()), len(judged))
        line |= {"successes": judged["success"].sum(), "success": share, "success_low": low, "success_high": high}
    if "verdict" in group:
        line |= {name: (group["verdict"] == name).sum() for name in _VERDICTS}
        right = group["right"] if "right" in group else pd.Series(index=group.index, dtype=object)
        line["wrong_pass"] = (right.eq(False) & group["verdict"].eq("PASS")).sum()
        line["right_fail"] = (right.eq(True) & group["verdict"].eq("FAIL")).sum()
    if "dice_after" in group:
        line |= {f"{name}_change": (group[f"{name}_after"] - group[f"{name}_before"]).mean() for name in _CHANGES}
    if "label_dice" in group:
        line |= {name: group[name].mean() for name in ("label_dice_before", "label_dice")}
    if "seconds" in group:
        line |= {"seconds_median": group["seconds"].median(), "seconds_mean": group["seconds"].mean()}
        line["peak_mib"] = group["peak_mib"].max()
    return line


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table, whole or not at all."""
    with atomic_path(path) as partial:
        table.to_csv(partial, index=False)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines of text, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def markdown(table: pd.DataFrame) -> list[str]:
    """A table in Markdown; empty cells where a value is missing."""
    rows = [["" if pd.isna(cell) else str(cell) for cell in row] for row in table.to_numpy(dtype=object)]
    return [f"| {' | '.join(cells)} |" for cells in [list(table.columns), ["---"] * len(table.columns), *rows]]


def machine(threads: int) -> list[str]:
    """Where and when a run was made, as a Markdown list."""
    names = [platform.processor() or platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")] or names
    versions = []
    for package in ("monai-zsreg", "monai", "torch", "numpy", *sorted({peer.package for peer in PEERS.values()})):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    module = getattr(sys.modules["__main__"], "__spec__", None)  # None for a script such as zsreg
    started = ["zsreg"] if module is None else ["python", "-m", module.name.removesuffix(".__main__")]
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return [
        f"- date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC; load average at the end: {load}",
        f"- processor: {names[0]}, {os.cpu_count()} cores; threads of each method: {threads}",
        f"- system: {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"- versions: {', '.join(versions)}",
        f"- command: `{shlex.join([*started, *sys.argv[1:]])}`",
    ]


def write_summary(path: Path, table: pd.DataFrame, threads: int, notes: Sequence[str] = ()) -> None:
    """The tables that people read, of `summarize`'s ``table`` and with ``notes`` on what was left out."""
    shown = table[table["best"]]
    text = ["# Benchmark of affine registration", "", *machine(threads), "", "## Target registration error", _NOTES]
    judged = shown[shown["success"].notna()].to_dict("records")
    text += markdown(pd.DataFrame([_error_cells(line) for line in judged]))
    seconds = {"seconds": shown["seconds_median"].map(_seconds)}
    if shown["label_dice"].notna().any():
        cells = {name: shown[name].map("{:.3f}".format) for name in ("label_dice_before", "label_dice")}
        cells = {"method": shown["method"], "n": shown["n"], **cells, **seconds}
        known = pd.DataFrame(cells)[shown["label_dice"].notna()]
        text += ["", "## Between subjects: Dice of anatomical labels", "", *markdown(known)]
    if "dice_change" in shown:
        cells = {name: shown[f"{name}_change"].map("{:+.3f}".format) for name in _CHANGES}
        cells = {"row": shown["row"], "method": shown["method"], "n": shown["n"], **cells, **seconds}
        known = pd.DataFrame(cells)[shown["dice_change"].notna()]
        text += ["", "## Change of similarity (the paper's Table 1)", _CHANGE_NOTES, *markdown(known), _PAPER_TABLE]
    if notes:
        text += ["", "## Left out", "", *[f"- {note}" for note in notes]]
    write_lines(path, text)


def _error_cells(x: dict[str, Any]) -> dict[str, str]:
    success = "{success:.0f} % [{success_low:.0f}, {success_high:.0f}]".format(**x)
    cells = {"row": x["row"], "truth": x["kind"], "method": x["method"], "n (subjects)": f"{x['n']} ({x['subjects']})"}
    cells["success"] = success
    for name, title in (("tre_corrected", "corrected"), ("tre", "plain")):
        figures = {"median": "", "p95": "", "max": ""}
        if pd.notna(x.get(f"{name}_n")):
            figures = {key: f"{x[f'{name}_{key}']:.2f}" for key in figures}
            if pd.notna(x[f"{name}_median_low"]):
                figures["median"] += f" [{x[f'{name}_median_low']:.2f}, {x[f'{name}_median_high']:.2f}]"
            if x[f"{name}_n"] != x["n"]:
                figures["median"] += f" (n = {x[f'{name}_n']:.0f})"
        cells |= {f"{title}: {key}": figure for key, figure in figures.items()}
    cells["no answer"] = str(x["failures"])
    told = [x.get(name, np.nan) for name in (*_VERDICTS, "wrong_pass", "right_fail")]
    cells["verdicts"] = "{:.0f} / {:.0f} / {:.0f}; {:.0f}, {:.0f}".format(*told) if pd.notna(told[0]) else ""
    return cells | {"seconds": _seconds(x["seconds_median"])}


def cost_table(table: pd.DataFrame) -> list[str]:
    """Seconds, memory and error of `summarize`'s lines, in Markdown."""
    cells = {"method": table["method"], "size": table["row"], "seconds": table["seconds_median"].map(_seconds)}
    cells["peak MiB"] = table["peak_mib"].map("{:.0f}".format)
    cells["error (mm)"] = table["tre_median"].map("{:.2f}".format)
    note = (
        "A made-up object of one shape and field of view (240 mm) in two contrasts, moved by the `mild` protocol."
        " Memory: by how much the largest size of a process of its own grew during the registration, after a warm-up."
    )
    return [note, "", *markdown(pd.DataFrame(cells | {"no answer": table["failures"]}))]


def _seconds(value: Any) -> str:
    return "-" if pd.isna(value) else f"{value:.3f}" if value < 1 else f"{value:.1f}"
