# SPDX-License-Identifier: Apache-2.0
"""The rows' results as tables and figures: errors, successes, verdicts, similarity before against after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monai_zsreg.benchmark.brains import STRESS
from monai_zsreg.benchmark.report import figure, looks, markdown, percent, save, seconds, write_csv, write_page

_CHANGES = ("dice", "mi", "nmi", "ssim", "mse")
_LABELS = ("label_dice_before", "label_dice")
_VERDICTS = ("PASS", "WARN", "FAIL")
_MEASURES = {"dice": "Dice", "mi": "MI (nats)", "ssim": "SSIM", "mse": "MSE"}
# columns that some rows' results lack
_MEASURED = [f"{name}_{when}" for name in _CHANGES for when in ("before", "after")]
_MEASURED += ["tre", "tre_max", "tre_corrected", "tre_corrected_max", "right", "success", "verdict", *_LABELS]
_MEASURED += ["seconds", "peak_mib"]

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


def _median_interval(values: pd.Series, subjects: pd.Series) -> list[float]:
    """95 % percentile bootstrap of the median, resampling subjects; NaN with one subject."""
    groups = [group.to_numpy() for _, group in values.groupby(subjects)]
    if len(groups) < 2:
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
    known = results.reindex(columns=results.columns.union(_MEASURED, sort=False))
    table = pd.DataFrame([_line(group) for _, group in known.groupby(["row", "method"], sort=False)])
    # presets are methods of their own, not starts of one method
    rival = table["method"].where(table["family"] == "ours", table["family"])
    ranked = table.sort_values(["success", "tre_median", "label_dice"], ascending=[False, True, False])
    table["best"] = ~ranked.assign(rival=rival).duplicated(["row", "rival"]).reindex(table.index)
    order = pd.DataFrame({"row": pd.factorize(table["row"])[0], "other": table["family"] != "ours"})
    order = order.assign(method=table["method"]).sort_values(["row", "other", "method"])
    return table.loc[order.index].reset_index(drop=True)


def _line(group: pd.DataFrame) -> dict[str, Any]:
    line = group.iloc[0][["row", "method", "family", "kind", "dims"]].to_dict()
    line |= {"n": len(group), "subjects": group["subject"].nunique(), "failures": int((group["failure"] != "").sum())}
    for name in ("tre", "tre_corrected"):
        known = group[group[name].notna()]
        low, high = _median_interval(known[name], known["subject"])
        line |= {f"{name}_n": len(known), f"{name}_median": known[name].median()}
        line |= {f"{name}_median_low": low, f"{name}_median_high": high}
        line |= {f"{name}_p95": known[name].quantile(0.95, "higher"), f"{name}_max": known[name].max()}
        line |= {f"{name}_max_point": known[f"{name}_max"].max()}
    judged = group["success"].dropna()
    share, low, high = percent(judged)
    line |= {"successes": judged.sum(), "success": share, "success_low": low, "success_high": high}
    if group["verdict"].notna().any():
        line |= {name: (group["verdict"] == name).sum() for name in _VERDICTS}
        line["wrong_pass"] = (group["right"].eq(False) & group["verdict"].eq("PASS")).sum()
        line["right_fail"] = (group["right"].eq(True) & group["verdict"].eq("FAIL")).sum()
    line |= {f"{name}_change": (group[f"{name}_after"] - group[f"{name}_before"]).mean() for name in _CHANGES}
    line |= {name: group[name].mean() for name in _LABELS}
    line |= {"seconds_median": group["seconds"].median(), "seconds_mean": group["seconds"].mean()}
    return line | {"peak_mib": group["peak_mib"].max()}


def write_report(results: pd.DataFrame, folder: Path, threads: int, notes: Sequence[str] = ()) -> Path:
    """``results.csv``, ``summary.csv``, ``summary.md``, ``figure4.png`` and ``capture.png``; the path of the page."""
    table = summarize(results)
    write_csv(folder / "results.csv", results.drop(columns="matrix"))
    write_csv(folder / "summary.csv", table.dropna(axis="columns", how="all"))
    best = results.merge(table.loc[table["best"], ["row", "method"]], on=["row", "method"])
    _plot_figure4(best, folder / "figure4.png")
    _plot_capture(best, folder / "capture.png")
    shown = table[table["best"]]

    def cells(names: Sequence[str], form: str) -> list[str]:
        chosen = shown[shown[names[0]].notna()]
        figures = chosen[list(names)].map(form.format).rename(columns=lambda name: name.removesuffix("_change"))
        return markdown(
            chosen[["row", "method", "n"]].join(figures).assign(seconds=chosen["seconds_median"].map(seconds))
        )

    judged = [_error_cells(line) for line in shown[shown["success"].notna()].to_dict("records")]
    text = ["## Target registration error", _NOTES, *markdown(pd.DataFrame(judged))]
    if shown["label_dice"].notna().any():
        text += ["", "## Between subjects: Dice of anatomical labels", "", *cells(_LABELS, "{:.3f}")]
    if shown["dice_change"].notna().any():
        changed = cells([f"{name}_change" for name in _CHANGES], "{:+.3f}")
        text += ["", "## Change of similarity (the paper's Table 1)", _CHANGE_NOTES, *changed, _PAPER_TABLE]
    return write_page(folder / "summary.md", "Benchmark of affine registration", threads, text, notes)


def _error_cells(x: dict[str, Any]) -> dict[str, str]:
    success = "{success:.0f} % [{success_low:.0f}, {success_high:.0f}]".format(**x)
    cells = {"row": x["row"], "truth": x["kind"], "method": x["method"], "n (subjects)": f"{x['n']} ({x['subjects']})"}
    cells["success"] = success
    for name, title in (("tre_corrected", "corrected"), ("tre", "plain")):
        figures = {key: f"{x[f'{name}_{key}']:.2f}" if x[f"{name}_n"] else "" for key in ("median", "p95", "max")}
        if pd.notna(x[f"{name}_median_low"]):
            figures["median"] += f" [{x[f'{name}_median_low']:.2f}, {x[f'{name}_median_high']:.2f}]"
        if x[f"{name}_n"] not in (0, x["n"]):
            figures["median"] += f" (n = {x[f'{name}_n']})"
        cells |= {f"{title}: {key}": text for key, text in figures.items()}
    cells["no answer"] = str(x["failures"])
    told = [x.get(name, np.nan) for name in (*_VERDICTS, "wrong_pass", "right_fail")]
    cells["verdicts"] = "{:.0f} / {:.0f} / {:.0f}; {:.0f}, {:.0f}".format(*told) if pd.notna(told[0]) else ""
    return cells | {"seconds": seconds(x["seconds_median"])}


def _plot_figure4(results: pd.DataFrame, path: Path) -> None:
    """Scatter of each measure before and after registration, 2D real pairs under the paper's perturbation."""
    rows = results[(results["row"] == "paper-2d-real") & (results["family"] != "none")]
    if rows.empty or "dice_after" not in rows:
        return
    made, axes = figure(2, 2)
    for ax, (key, title) in zip(axes.ravel(), _MEASURES.items(), strict=True):
        for mine, look in looks(rows):
            ax.scatter(mine[f"{key}_before"], mine[f"{key}_after"], s=18, alpha=0.6, linewidths=0, **look)
        ax.axline((0, 0), slope=1, color="0.6", lw=0.8, zorder=0)
        better = "below" if key == "mse" else "above"
        ax.set(xlabel=f"{title} before", ylabel=f"{title} after", title=f"{title} (better: {better} the line)")
    axes[0, 0].legend(fontsize=8)
    made.suptitle("Before against after registration, the paper's perturbation (as its Figure 4)")
    save(made, path)


def _plot_capture(results: pd.DataFrame, path: Path) -> None:
    """Fraction of successes against rotation and against shift, 2D above, 3D below, with Wilson's intervals.

    Stress rows are left out: they fail for other reasons.
    """
    rows = results[results["row"].str.match("(paper|mild|so3)-")]
    if rows.empty:
        return
    dims = sorted(rows["dims"].unique())
    made, axes = figure(len(dims), 2)
    for (left, right), dim in zip(axes, dims, strict=True):
        mine = rows[rows["dims"] == dim]
        angles = np.array([0, 5, 10, 15, 20, 30, 45, 60, 90, 120, 150, 180.0])
        _capture(left, mine, "rotation_deg", angles, f"{dim}D, all shifts", "rotation (degrees)")
        # turned images fail for the turn; the shift shows among those that are hardly turned
        little = mine[mine["rotation_deg"] <= 20]
        shifts, unit = np.linspace(0, mine["shift"].max() + 1e-6, 9), "px" if dim == 2 else "mm"
        _capture(right, little, "shift", shifts, f"{dim}D, rotation up to 20 degrees", f"shift ({unit})")
    made.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save(made, path)


def _capture(ax: Any, rows: pd.DataFrame, key: str, edges: np.ndarray, title: str, label: str) -> None:
    for number, (mine, look) in enumerate(looks(rows)):
        bins = mine.groupby(pd.cut(mine[key], edges, include_lowest=True), observed=True)
        shares = np.array([percent(runs["success"]) for _, runs in bins]).reshape(-1, 3)
        # a little apart, so that equal curves show
        places = bins[key].mean() + (number - 3) * 0.002 * edges[-1]
        spread = np.clip([shares[:, 0] - shares[:, 1], shares[:, 2] - shares[:, 0]], 0, None)
        ax.errorbar(places, shares[:, 0], yerr=spread, capsize=2, lw=1.2, ms=5, **look)
    ax.set(ylim=(-4, 104), xlabel=label, ylabel="success (%)", title=title)
    ax.grid(alpha=0.3)
