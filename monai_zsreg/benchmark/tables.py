# SPDX-License-Identifier: Apache-2.0
"""The results as CSV and Markdown."""

from __future__ import annotations

import csv
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

from monai_zsreg.benchmark.cases import ROWS, STRESS
from monai_zsreg.benchmark.run import SUCCESS, Result
from monai_zsreg.io.files import atomic_path
from monai_zsreg.metrics import bootstrap_interval, success_rate

__all__ = [
    "PAPER_TABLE",
    "best_starts",
    "machine",
    "machine_lines",
    "markdown_table",
    "summarize",
    "write_cost_markdown",
    "write_csv",
    "write_markdown",
]

# Table 1 of the paper: change of Dice, MI, SSIM and MSE, seconds per image
PAPER_TABLE = {
    "SimpleElastix": (0.263, 0.221, 0.404, -0.0361, 1.6),
    "SIFT": (0.248, 0.15, 0.383, -0.041, 0.3),
    "the paper's method": (0.294, 0.373, 0.431, -0.072, 0.2),
}
_PAPER_NOTE = (
    "The paper's own Table 1. **Not comparable**: its data and its scaling of the metrics are different, and its"
    " Table 1 and Figure 4 disagree with each other."
)
_CHANGES = ("dice", "mi", "nmi", "ssim", "mse")
_KINDS = {
    "real": "real pair",
    "exact": "exact truth",
    "natural": "exact truth, channels of one photograph",
    "between": "two people, no truth",
}
_PACKAGES = (
    "monai-zsreg",
    "monai",
    "torch",
    "numpy",
    "itk-elastix",
    "SimpleITK-SimpleElastix",
    "antspyx",
    "opencv-python-headless",
)


def summarize(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One line for each row and method.

    Figures of a row are over all of its cases that the method ran; a run without an answer counts with the error of
    the identity, and never as a success. ``best`` marks the better start of a method in that row: higher success, then
    lower median.
    """
    order = {row.name: i for i, row in enumerate(ROWS)}
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["row"], result["method"]), []).append(result)
    lines = [_line(row, method, group) for (row, method), group in groups.items()]
    lines.sort(key=lambda line: (order.get(line["row"], len(order)), line["family"] != "ours", line["method"]))
    for row in {line["row"] for line in lines}:
        for family in {line["family"] for line in lines}:
            starts = [x for x in lines if x["row"] == row and x["family"] == family]
            # presets are methods of their own, not starts of one method
            for group in [[x] for x in starts] if family == "ours" else [starts]:
                if group:
                    min(group, key=_rank)["best"] = True
    return lines


def best_starts(results: Sequence[Result]) -> list[Result]:
    """Results of one start a method, for plots: the start with more successes over all cases."""
    methods: dict[str, dict[str, list[bool]]] = {}
    for r in results:
        if r["family"] != "ours" and "success" in r:
            methods.setdefault(r["family"], {}).setdefault(r["method"], []).append(r["success"])
    best = {max(starts, key=lambda m: float(np.mean(starts[m]))) for starts in methods.values()}
    return [r for r in results if r["family"] == "ours" or r["method"] in best]


def _rank(line: dict[str, Any]) -> tuple[float, float, float]:
    return -line.get("success", 0.0), line.get("tre_median", np.inf), -line.get("label_dice", 0.0)


def _line(row: str, method: str, group: Sequence[Result]) -> dict[str, Any]:
    subjects = [r["subject"] for r in group]
    line: dict[str, Any] = {
        "row": row,
        "method": method,
        "family": group[0]["family"],
        "kind": group[0]["kind"],
        "dims": group[0]["dims"],
        "n": len(group),
        "subjects": len(set(subjects)),
        "failures": sum(bool(r["failure"]) for r in group),
        "best": False,
    }
    for name in ("tre", "tre_corrected"):
        known = [r for r in group if name in r]
        if known:
            # None stands for infinity in the file
            values = np.array([np.inf if r[name] is None else r[name] for r in known])
            worst = [np.inf if r[f"{name}_max"] is None else r[f"{name}_max"] for r in known]
            spread = bootstrap_interval(values, [r["subject"] for r in known])
            line |= {
                f"{name}_n": len(known),
                f"{name}_median": spread.estimate,
                f"{name}_median_low": spread.low,
                f"{name}_median_high": spread.high,
                f"{name}_p95": float(np.percentile(values, 95, method="higher")),
                f"{name}_max": float(np.max(values)),
                f"{name}_max_point": float(np.max(worst)),
            }
    judged = [(r.get("tre_corrected", r.get("tre")), r["failure"]) for r in group if "tre" in r]
    if judged:
        rate = success_rate([np.inf if f or t is None else t for t, f in judged], SUCCESS)
        line |= {"success": rate.rate, "success_low": rate.low, "success_high": rate.high, "successes": rate.successes}
    for metric in _CHANGES:
        changes = [r[f"{metric}_after"] - r[f"{metric}_before"] for r in group if f"{metric}_after" in r]
        if changes:
            line[f"{metric}_change"] = float(np.mean(changes))
    if "label_dice" in group[0]:
        line["label_dice_before"] = float(np.mean([r["label_dice_before"] for r in group]))
        line["label_dice"] = float(np.mean([r["label_dice"] for r in group]))
    seconds = [r["seconds"] for r in group if "seconds" in r]
    if seconds:
        line |= {"seconds_median": float(np.median(seconds)), "seconds_mean": float(np.mean(seconds))}
    return line


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with all keys that occur, in order of appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)


def machine(threads: int) -> dict[str, str]:
    """Where and when a run was made."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": model,
        "cores": str(cores),
        "threads of each method": str(threads),
        "load average at the end": load,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(versions),
        "command": shlex.join(["python", "-m", "monai_zsreg.benchmark", *sys.argv[1:]]),
    }


# --------------------------------------------------------------------------------------------------------------------
# Markdown
# --------------------------------------------------------------------------------------------------------------------


def write_markdown(
    path: Path, lines: Sequence[dict[str, Any]], about: dict[str, str], notes: Iterable[str] = ()
) -> None:
    """The tables that people read.

    Args:
        path: the file.
        lines: of `summarize`.
        about: of `machine`.
        notes: lines on what was left out.
    """
    shown = [line for line in lines if line["best"]]
    text = ["# Benchmark of affine registration", ""]
    text += [f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in about.items()]
    text += ["", "## Target registration error", "", *_tre_notes(), ""]
    text += _tre_table(shown)
    if any("label_dice" in line for line in shown):
        text += ["", "## Between subjects: Dice of anatomical labels", ""]
        text += ["| method | n | before | after | seconds |", "|---|---|---|---|---|"]
        text += [
            f"| {x['method']} | {x['n']} | {x['label_dice_before']:.3f} | {x['label_dice']:.3f} | {_seconds(x)} |"
            for x in shown
            if "label_dice" in x
        ]
    text += ["", "## Change of similarity (the paper's Table 1)", "", *_change_notes(), ""]
    text += _change_table(shown)
    text += ["", _PAPER_NOTE, ""]
    text += ["| method (paper) | Dice | MI | SSIM | MSE | seconds per image |", "|---|---|---|---|---|---|"]
    text += [
        f"| {name} | {d:+.3f} | {mi:+.3f} | {s:+.3f} | {mse:+.4f} | {t} |"
        for name, (d, mi, s, mse, t) in PAPER_TABLE.items()
    ]
    notes = list(notes)
    if notes:
        text += ["", "## Left out", "", *[f"- {note}" for note in notes]]
    with atomic_path(path) as partial:
        partial.write_text("\n".join(text) + "\n", encoding="utf-8")


def _tre_notes() -> list[str]:
    stress = "; ".join(f"`{key}`: {text}" for key, text in STRESS.items())
    return [
        "Error of a case: mean over the foreground of the fixed image, mm in 3D, pixels in 2D. Success: below"
        f" {SUCCESS:g}, with Wilson's 95 % interval. The interval of the median resamples subjects. A run that ends"
        " without an answer counts with the error of doing nothing, and as no success. Seconds: median, registration"
        " alone, images in memory, after a warm-up.",
        "",
        "**Exact truth** means that the second contrast is simulated from the first image (or is another channel of one"
        " photograph), so the known transform is the whole truth. **Real pairs** are two scans that were co-registered"
        " to within a few tenths of a millimeter; `plain` takes the known transform alone for the truth, `corrected`"
        " composes it with the residual shift that was measured for the pair. Success counts the corrected error where"
        " there is one.",
        "",
        "Peers run at their defaults and from the centers of mass; the better start of each is shown (ANTs' default is"
        " the centers of mass). Methods with a smaller n ran the first n cases of the same list.",
        "",
        f"Rows: `paper` (shift up to 50 px an axis, rotation 0.3 rad, shear 0.03), `mild` (15 degrees, 15 mm, 8 %"
        f" scale, 5 % shear), `so3` (any rotation; 50 mm, or a third of the image in 2D), `natural`: photographs under"
        f" `paper`. Stress rows on top of `paper` (2D) or `mild` without scale (3D): {stress}.",
    ]


def _tre_table(lines: Sequence[dict[str, Any]]) -> list[str]:
    head = [
        "row",
        "truth",
        "method",
        "n (subjects)",
        "success",
        "corrected: median [95 %]",
        "p95",
        "max",
        "plain: median",
        "p95",
        "max",
        "no answer",
        "seconds",
    ]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for x in lines:
        if "success" not in x:
            continue
        success = f"{100 * x['success']:.0f} % [{100 * x['success_low']:.0f}, {100 * x['success_high']:.0f}]"
        corrected = ["-", "-", "-"]
        if "tre_corrected_median" in x:
            span = f"[{x['tre_corrected_median_low']:.2f}, {x['tre_corrected_median_high']:.2f}]"
            span = "" if "nan" in span else f" {span}"
            of = f" (n = {x['tre_corrected_n']})" if x["tre_corrected_n"] != x["n"] else ""
            corrected = [
                f"{x['tre_corrected_median']:.2f}{span}{of}",
                f"{x['tre_corrected_p95']:.2f}",
                f"{x['tre_corrected_max']:.2f}",
            ]
        plain = [f"{x['tre_median']:.2f}", f"{x['tre_p95']:.2f}", f"{x['tre_max']:.2f}"]
        cells = [
            x["row"],
            _KINDS[x["kind"]],
            x["method"],
            f"{x['n']} ({x['subjects']})",
            success,
            *corrected,
            *plain,
            str(x["failures"]),
            _seconds(x),
        ]
        text.append("| " + " | ".join(cells) + " |")
    return text


def _change_notes() -> list[str]:
    return [
        "Mean of after minus before. Each image is scaled by its own 0.5 and 99.5 percentiles to [0, 1]; SSIM, MI and"
        " MSE are over the union of both foregrounds, Dice is that of the foregrounds. MI is in nats, NMI is 2I/(H+H)."
        " Across modalities a right answer need not lower the MSE or raise the SSIM.",
    ]


def _change_table(lines: Sequence[dict[str, Any]]) -> list[str]:
    head = ["row", "method", "n", "Dice", "MI", "NMI", "SSIM", "MSE", "seconds per image"]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for x in lines:
        if "dice_change" in x:
            changes = [f"{x[f'{metric}_change']:+.3f}" for metric in _CHANGES]
            text.append("| " + " | ".join([x["row"], x["method"], str(x["n"]), *changes, _seconds(x)]) + " |")
    return text


def _seconds(line: dict[str, Any]) -> str:
    value = line.get("seconds_median")
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def machine_lines(about: dict[str, str]) -> list[str]:
    """`machine` as a Markdown list."""
    return [f"- {key}: {value}" for key, value in about.items()]


def markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table with the columns of all of them, in the order of their first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return text + ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]


def write_cost_markdown(path: Path, rows: Sequence[dict[str, Any]], about: dict[str, str]) -> None:
    """The table of `cost.run_cost`; ``about`` of `machine`."""
    text = ["# Seconds and peak memory against size", "", *machine_lines(about), ""]
    text += [
        "A made-up object of one shape and field of view (240 mm) in two contrasts, moved by the `mild` protocol."
        " Memory: peak resident size above the level after imports, loading and a warm-up, of a process of its own.",
        "",
    ]
    lines = []
    for row in rows:
        line: dict[str, Any] = {"method": row["method"], "size": f"{row['size']}^{row['dims']}"}
        if row.get("failure"):
            line |= {"seconds": row["failure"], "peak MiB": "", "error (mm)": ""}
        else:
            line |= {
                "seconds": f"{row['seconds']:.3f}",
                "peak MiB": f"{row['peak_mib']:.0f}",
                "error (mm)": f"{row['tre']:.2f}",
            }
        lines.append(line)
    text += markdown_table(lines)
    with atomic_path(path) as partial:
        partial.write_text("\n".join(text) + "\n", encoding="utf-8")
