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

__all__ = ["machine", "markdown", "percent", "summarize", "write_csv", "write_lines", "write_summary"]

_KINDS = {
    "real": "real pair",
    "exact": "exact truth",
    "natural": "exact truth, channels of one photograph",
    "between": "two people, no truth",
    "header": "the headers, within the pair's tolerance",
}
_CHANGES = ("dice", "mi", "nmi", "ssim", "mse")
_PACKAGES = sorted({package for peer in PEERS.values() for package in peer.package.split()})

_NOTES = f"""
Error of a case: mean over the foreground of the fixed image, mm in 3D, pixels in 2D. Success: below 2 (rows of
anatomies and slices: below the pair's tolerance), and the method does not say itself that it failed, with Wilson's
95 % interval. The interval of the median resamples subjects. A run without an answer counts with the error of doing
nothing. Seconds: median, registration alone, images in memory, after a warm-up.

**Exact truth** means that the second contrast is simulated from the first image (or is another channel of one
photograph), so the known transform is the whole truth. **Real pairs** are two scans that were co-registered to within a
few tenths of a millimeter; `plain` takes the known transform alone for the truth, `corrected` composes it with the
residual shift that was measured for the pair. Success counts the corrected error where there is one.

Peers run at their defaults and from the centers of mass; the better start of each is shown. Methods with a smaller n
ran the first n cases of the same list. `verdict`: our PASS / WARN / FAIL, then wrong answers with PASS and right ones
with FAIL.

Rows: `paper` (shift up to 50 px an axis, rotation 0.3 rad, shear 0.03), `mild` (15 degrees, 15 mm, 8 % scale, 5 %
shear), `so3` (any rotation; 50 mm, or a third of the image in 2D), `natural`: photographs under `paper`. Stress rows on
top of `paper` (2D) or `mild` (3D): {"; ".join(f"`{key}`: {text}" for key, text in STRESS.items())}. `anatomies` and
`overlap`: only the moving header is moved: `given` not at all, `p10` by 10 degrees and 10 mm, `p30` by 30 degrees and
20 mm, `any` by 90 to 180 degrees, `cut` as `p10` with a third of the moving image cut off; `retina`: photographs of one
retina that share 44 to 84 % of their fields of view.
"""
_CHANGE_NOTES = """
Mean of after minus before. Each image is scaled by its own 0.5 and 99.5 percentiles to [0, 1]; SSIM, MI and MSE are over
the union of both foregrounds, Dice is that of the foregrounds. MI is in nats, NMI is 2I/(H+H). Across modalities a right
answer need not lower the MSE or raise the SSIM.
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


def median_interval(values: np.ndarray, subjects: Sequence[str], resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap of the median, resampling subjects; NaN with one subject."""
    owners, codes = np.unique(subjects, return_inverse=True)
    if len(owners) == 1:
        return np.nan, np.nan
    groups = [values[codes == owner] for owner in range(len(owners))]
    draws = np.random.default_rng(0).integers(len(groups), size=(resamples, len(groups)))
    medians = [np.median(np.concatenate([groups[i] for i in draw])) for draw in draws]
    # no interpolation, which would turn infinities into NaN; outward, so the interval is never too short
    low, high = np.percentile(medians, 2.5, method="lower"), np.percentile(medians, 97.5, method="higher")
    return float(low), float(high)


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """One line for each row and method, in the order of their first results, ours before others.

    Figures of a row are over all of its cases that the method ran. ``best`` marks the better start of a method in that
    row: higher success, then lower median.
    """
    table = pd.DataFrame([_line(group) for _, group in results.groupby(["row", "method"], sort=False)])
    order = {row: number for number, row in enumerate(results["row"].unique())}
    table["others"] = table["family"] != "ours"
    table["order"] = table["row"].map(order)
    # presets are methods of their own, not starts of one method
    table["rival"] = np.where(table["others"], table["family"], table["method"])
    columns = table.reindex(columns=["success", "tre_median", "label_dice"])
    ranked = table.assign(a=-columns["success"], b=columns["tre_median"], c=-columns["label_dice"]).sort_values(
        list("abc")
    )
    table["best"] = ~ranked.duplicated(["row", "rival"]).reindex(table.index)
    table = table.sort_values(["order", "others", "method"])
    return table.drop(columns=["order", "others", "rival"]).reset_index(drop=True)


def _line(group: pd.DataFrame) -> dict[str, Any]:
    first = group.iloc[0]
    line = {name: first[name] for name in ("row", "method", "family", "kind", "dims")}
    line |= {"n": len(group), "subjects": group["subject"].nunique(), "failures": int((group["failure"] != "").sum())}
    for name in ("tre", "tre_corrected"):
        if name not in group or f"{name}_max" not in group:
            continue
        known = group[group[f"{name}_max"].notna() | (group[name].notna())]
        if len(known):
            values = known[name].to_numpy(dtype=float)
            low, high = median_interval(values, known["subject"].tolist())
            line |= {
                f"{name}_n": len(known),
                f"{name}_median": float(np.median(values)),
                f"{name}_median_low": low,
                f"{name}_median_high": high,
                f"{name}_p95": float(np.percentile(values, 95, method="higher")),
                f"{name}_max": float(values.max()),
                f"{name}_max_point": float(known[f"{name}_max"].max()),
            }
    judged = group[group["success"].notna()] if "success" in group else group.iloc[:0]
    if len(judged):
        successes = int(judged["success"].sum())
        share, low, high = percent(successes, len(judged))
        line |= {"successes": successes, "success": share, "success_low": low, "success_high": high}
    if "verdict" in group and group["verdict"].notna().any():
        line |= {name: int((group["verdict"] == name).sum()) for name in ("PASS", "WARN", "FAIL")}
        if len(judged):
            right = judged["right"].astype(bool)
            line["wrong_pass"] = int((~right & (judged["verdict"] == "PASS")).sum())
            line["right_fail"] = int((right & (judged["verdict"] == "FAIL")).sum())
    for name in _CHANGES:
        if f"{name}_after" in group and group[f"{name}_after"].notna().any():
            line[f"{name}_change"] = float((group[f"{name}_after"] - group[f"{name}_before"]).mean())
    for name in ("label_dice_before", "label_dice"):
        if name in group and group[name].notna().any():
            line[name] = float(group[name].mean())
    if "seconds" in group and group["seconds"].notna().any():
        line |= {"seconds_median": float(group["seconds"].median()), "seconds_mean": float(group["seconds"].mean())}
        line["peak_mib"] = float(group["peak_mib"].max()) if "peak_mib" in group else np.nan
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
    rows = table.astype(object).where(table.notna(), "").astype(str).to_numpy().tolist()
    return [f"| {' | '.join(cells)} |" for cells in [list(table.columns), ["---"] * len(table.columns), *rows]]


def machine(threads: int) -> list[str]:
    """Where and when a run was made, as a Markdown list."""
    names = [platform.processor() or platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ] or names
    versions = []
    for package in ("monai-zsreg", "monai", "torch", "numpy", *_PACKAGES):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return [
        f"- date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"- processor: {names[0]}, {os.cpu_count()} cores; threads of each method: {threads}",
        f"- load average at the end: {load}",
        f"- system: {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"- versions: {', '.join(versions)}",
        f"- command: `{shlex.join(['python', '-m', 'monai_zsreg.benchmark', *sys.argv[1:]])}`",
    ]


def write_summary(path: Path, table: pd.DataFrame, threads: int, notes: Sequence[str] = ()) -> None:
    """The tables that people read.

    Args:
        path: the file.
        table: of `summarize`.
        threads: of each method.
        notes: lines on what was left out.
    """
    shown = table[table["best"]]
    text = ["# Benchmark of affine registration", "", *machine(threads)]
    text += ["", "## Target registration error", _NOTES]
    if "success" in shown:
        text += markdown(pd.DataFrame([_error_cells(x) for _, x in shown[shown["success"].notna()].iterrows()]))
    if "label_dice" in shown:
        known = shown[shown["label_dice"].notna()]
        cells = {"method": known["method"], "n": known["n"], "before": known["label_dice_before"].map("{:.3f}".format)}
        cells |= {"after": known["label_dice"].map("{:.3f}".format), "seconds": known["seconds_median"].map(_seconds)}
        text += ["", "## Between subjects: Dice of anatomical labels", "", *markdown(pd.DataFrame(cells))]
    changes = [f"{name}_change" for name in _CHANGES]
    if changes[0] in shown:
        known = shown[shown[changes[0]].notna()]
        cells = {name: known[name] for name in ("row", "method", "n")}
        cells |= {name: known[f"{name}_change"].map("{:+.3f}".format) for name in _CHANGES}
        cells |= {"seconds per image": known["seconds_median"].map(_seconds)}
        text += [
            "",
            "## Change of similarity (the paper's Table 1)",
            _CHANGE_NOTES,
            *markdown(pd.DataFrame(cells)),
            _PAPER_TABLE,
        ]
    if notes:
        text += ["", "## Left out", "", *[f"- {note}" for note in notes]]
    write_lines(path, text)


def cost_table(table: pd.DataFrame) -> list[str]:
    """Seconds, memory and error of `summarize`'s lines, in Markdown."""
    cells = {name: table[name] for name in ("method", "row")}
    cells |= {"seconds": table["seconds_median"].map(_seconds), "peak MiB": table["peak_mib"].map("{:.0f}".format)}
    cells |= {"error (mm)": table["tre_median"].map("{:.2f}".format), "no answer": table["failures"]}
    note = (
        "A made-up object of one shape and field of view (240 mm) in two contrasts, moved by the `mild` protocol. Memory: by"
        " how much the peak resident size of a process of its own grew during the registration, after imports and a warm-up."
    )
    return [note, "", *markdown(pd.DataFrame(cells).rename(columns={"row": "size"}))]


def _error_cells(x: pd.Series) -> dict[str, str]:
    cells = {
        "row": x["row"],
        "truth": _KINDS[x["kind"]],
        "method": x["method"],
        "n (subjects)": f"{x['n']} ({x['subjects']})",
    }
    cells["success"] = f"{x['success']:.0f} % [{x['success_low']:.0f}, {x['success_high']:.0f}]"
    for name, title in (("tre_corrected", "corrected"), ("tre", "plain")):
        known = pd.notna(x.get(f"{name}_n"))
        cells[f"{title}: median [95 %]"] = f"{x[f'{name}_median']:.2f}" if known else "-"
        if known and pd.notna(x[f"{name}_median_low"]):
            cells[f"{title}: median [95 %]"] += f" [{x[f'{name}_median_low']:.2f}, {x[f'{name}_median_high']:.2f}]"
        if known and x[f"{name}_n"] != x["n"]:
            cells[f"{title}: median [95 %]"] += f" (n = {x[f'{name}_n']:.0f})"
        cells[f"{title}: p95"] = f"{x[f'{name}_p95']:.2f}" if known else "-"
        cells[f"{title}: max"] = f"{x[f'{name}_max']:.2f}" if known else "-"
    cells["no answer"] = str(x["failures"])
    verdicts = ("PASS", "WARN", "FAIL", "wrong_pass", "right_fail")
    known = pd.notna(x.get("PASS"))
    cells["verdict"] = (
        "{:.0f} / {:.0f} / {:.0f}; {:.0f}, {:.0f}".format(*[x[name] for name in verdicts]) if known else ""
    )
    return cells | {"seconds": _seconds(x.get("seconds_median"))}


def _seconds(value: Any) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:.3f}" if value < 1 else f"{value:.1f}"
