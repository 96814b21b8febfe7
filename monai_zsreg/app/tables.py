# SPDX-License-Identifier: Apache-2.0
"""What is told of registered pairs: of one in words, of many in tables."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from monai_zsreg.app.settings import EVALUATION, INDEX, REPORT, SUMMARY, TABLE, Settings
from monai_zsreg.io import atomic_path, output_folder, write_json
from monai_zsreg.metrics.statistics import success_rate

# measures of a pair, each before and after; the last two only where a true transform or landmarks are given
MEASURES = ("dice", "ssim", "mi", "nmi", "mse", "rmse", "tre", "landmark_tre")
WHEN = ("before", "after")

# worst first, where the first is that of a pair without a result
_VERDICTS = ("", "FAIL", "WARN", "PASS")
_MEASURED = tuple(f"{measure}_{when}" for measure in MEASURES for when in WHEN)
_SUMMARY = ["name", "verdict", "reasons", "score", "expected_error", "nmi_before", "nmi_after", "dice_before"]
_SUMMARY += ["dice_after", "seconds", "fixed", "moving"]
_EVALUATION = ("name", "verdict", "seconds", "reasons", "dice_of", *_MEASURED, "fixed", "moving")


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in the folder of a pair, None where there is none."""
    with suppress(OSError, ValueError):
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return report if isinstance(report, dict) else None
    return None


def _rows(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the tables show of each report, by the names of their columns; None for what a report does not have."""
    found = []
    for report in reports:
        metrics = report.get("metrics", {})
        row = {name: report.get(name) for name in ("name", "score", "seconds")}
        row |= {"verdict": report.get("verdict", ""), "reasons": "; ".join(report.get("reasons", ["no result"]))}
        row |= {"expected_error": report.get("expected_error", {}).get("root_mean_square")}
        row |= {"dice_of": metrics.get("dice_of")}
        row |= {f"{measure}_{when}": metrics.get(when, {}).get(measure) for measure in MEASURES for when in WHEN}
        found.append(row | {key: report.get("input", {}).get(key) for key in ("fixed", "moving")})
    return found


def _save_table(path: Path, found: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    with atomic_path(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(found)


# --------------------------------------------------------------------------------------------------------------------
# one pair
# --------------------------------------------------------------------------------------------------------------------


def in_words(report: Mapping[str, Any]) -> str:
    """A report in a few lines for the terminal."""
    before, after = (report["metrics"][when] for when in WHEN)
    unit = "pixels" if report["unit"] == "pixel" else "mm"
    lines = [
        f"{report['name']}: {report['verdict']} in {report['seconds']:.1f} s "
        f"(preset {report['preset']}, {report['transform']})"
    ]
    lines += [f"  {reason}" for reason in report["reasons"]]
    if "expected_error" in report:
        expected = report["expected_error"]
        lines.append(
            "  expected error in the center of the fixed image: "
            f"below {expected['below_in_50_percent']:.2f} {unit} in half of such cases, "
            f"below {expected['below_in_95_percent']:.2f} {unit} in 95 %"
        )
    if "deformation" in report:
        bent, change = (report["deformation"][key] for key in ("displacement", "determinant"))
        lines.append(
            f"  the map moves half of the foreground by more than {bent['median']:.2f} {unit}, none by more than "
            f"{bent['max']:.2f}; Jacobian determinant {change['min']:.2f} to {change['max']:.2f}; how far off it is at "
            "a point is not known"
        )
    lines.append(
        f"  normalized mutual information {before['nmi']:.4f} before, {after['nmi']:.4f} after; "
        f"Dice of the {report['metrics']['dice_of']} {before['dice']:.3f} before, {after['dice']:.3f} after"
    )
    if "tre" in after:
        lines.append(
            f"  mean error against the known transform: {before['tre']:.2f} {unit} before, "
            f"{after['tre']:.2f} {unit} after (largest {after['tre_max']:.2f} {unit})"
        )
    if report.get("uncertainty"):
        spread = report["uncertainty"]["std_mm_at_center"]
        told = "unknown, too few repeats succeeded" if spread is None else f"{spread:.2f} {unit}"
        lines.append(f"  standard deviation of the displacement in the center of the fixed image: {told}")
    lines.append(f"  results in {Path(report['output']['moved']).parent}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# many pairs
# --------------------------------------------------------------------------------------------------------------------


def worst_first(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a summary: by verdict, then by score."""

    def rank(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return _VERDICTS.index(row["verdict"]), row["score"] is not None, row["score"] or 0.0, row["name"]

    return sorted(_rows(reports), key=rank)


def save_summary(found: Sequence[Mapping[str, Any]], output_dir: Any, new: int) -> str:
    """Write ``summary.csv`` and ``index.html``; what comes back says so.

    Args:
        found: of `worst_first`.
        output_dir: made if it is missing.
        new: how many of them this run has registered.
    """
    from monai_zsreg.app.report import save_index

    folder = output_folder(output_dir)
    _save_table(folder / SUMMARY, found, _SUMMARY)
    files = {"link": "report.html", "thumbnail": "overview.png"}
    shown = []
    for row in found:
        paths = {key: f"{row['name']}/{file}" for key, file in files.items()}
        there = {key: path for key, path in paths.items() if (folder / path).exists()}
        shown.append({name: row[name] for name in _SUMMARY} | there)
    save_index(shown, folder / INDEX)
    counts = ", ".join(f"{sum(row['verdict'] == verdict for row in found)} {verdict}" for verdict in _VERDICTS[:0:-1])
    done = f"{len(found) - new} kept, {new} registered"
    return f"{len(found)} pairs ({done}): {counts}; {folder / SUMMARY}, {folder / INDEX}"


def save_evaluation(reports: Sequence[Mapping[str, Any]], settings: Settings, success_mm: float) -> str:
    """Write ``evaluation.csv``, a row a pair, and ``evaluation.json``, the summary.

    Args:
        reports: of all pairs.
        settings: of the run.
        success_mm: a pair counts as accurate below this mean error after registration, of the landmarks if it has any,
            else against the true transform.

    Returns:
        The summary in words.
    """
    found = _rows(reports)
    folder = output_folder(settings.output_dir)
    _save_table(folder / TABLE, found, _EVALUATION)
    off = [math.inf if row["verdict"] == "FAIL" else 0.0 for row in found]
    errors = []
    for row, failed in zip(found, off, strict=True):
        error = row["tre_after"] if row["landmark_tre_after"] is None else row["landmark_tre_after"]
        errors += [] if error is None else [max(error, failed)]
    columns = {
        measure: {when: told for when in WHEN if (told := _statistics(found, f"{measure}_{when}"))}
        for measure in MEASURES
    }
    kinds = ("labels", "masks", "foregrounds")
    total = {
        "pairs": len(found),
        "registered": success_rate(off, 1.0)._asdict(),
        "accurate": success_rate(errors, success_mm)._asdict() | {"below": success_mm} if errors else None,
        "dice_of": {kind: n for kind in kinds if (n := sum(row["dice_of"] == kind for row in found))},
        "columns": {name: told for name, told in columns.items() if told},
        "seconds": _statistics(found, "seconds"),
        "settings": {key: value for key, value in reports[-1]["made_from"].items() if key != "files"},
        "versions": reports[-1]["versions"],
    }
    write_json(folder / EVALUATION, total)
    lines = [f"pairs: {total['pairs']}", f"  {'':<14}{'before':>22}{'after':>22}   (mean, median)"]
    for name, told in total["columns"].items():
        cells = (f"{told[when]['mean']:>12.4f}{told[when]['median']:>10.4f}" for when in WHEN if when in told)
        lines.append(f"  {name:<14}{''.join(cells)}")
    for text, rate in (("registered", total["registered"]), (f"error below {success_mm:g}", total["accurate"])):
        if rate is not None:
            limits = f"{100 * rate['low']:.0f} to {100 * rate['high']:.0f} %"
            lines.append(f"  {text}: {rate['successes']} of {rate['n']} (95 % interval {limits})")
    return "\n".join([*lines, f"  {TABLE} and {EVALUATION} in {folder}"])


def mean_metrics(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the pairs that have a measure, by names such as ``"dice_after"``."""
    found = _rows(reports)
    statistics = {name: _statistics(found, name) for name in _MEASURED}
    return {name: told["mean"] for name, told in statistics.items() if told}


def _statistics(found: Sequence[Mapping[str, Any]], column: str) -> dict[str, Any]:
    """Of the pairs that have a value; empty if none has. The standard deviation is that of a sample."""
    values = np.array([row[column] for row in found if row[column] is not None], dtype=np.float64)
    if len(values) == 0:
        return {}
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"n": len(values), "mean": float(values.mean()), "median": float(np.median(values)), "std": std}
