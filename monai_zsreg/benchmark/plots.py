# SPDX-License-Identifier: Apache-2.0
"""The figures: similarity before against after, success against rotation and shift, cost against size."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from monai_zsreg.benchmark.tables import percent
from monai_zsreg.io.files import atomic_path

__all__ = ["COLORS", "figure", "plot_capture", "plot_cost", "plot_figure4", "save"]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999", "#f0e442")
_MEASURES = {"dice": "Dice", "mi": "MI (nats)", "ssim": "SSIM", "mse": "MSE"}


def figure(rows: int, columns: int, width: float = 5.5, height: float = 4.2) -> tuple[Figure, np.ndarray]:
    """A figure and its axes ``[rows, columns]``."""
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def save(made: Figure, path: Path) -> None:
    """Write a figure, whole or not at all."""
    FigureCanvasAgg(made)
    with atomic_path(path) as partial:
        made.savefig(partial, dpi=130)


def _groups(table: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Results by method, ours first, each with its color and marker."""
    names = sorted(table["method"].unique(), key=lambda m: (not m.startswith("ours"), m))
    for number, name in enumerate(names):
        look = {"color": COLORS[number % len(COLORS)], "marker": "osD^vP*Xh"[number % 9], "label": name}
        yield name, table[table["method"] == name], look


def plot_figure4(results: pd.DataFrame, path: Path) -> None:
    """Scatter of each measure before and after registration, 2D real pairs under the paper's perturbation."""
    if "dice_after" not in results:
        return
    rows = results[(results["row"] == "paper-2d-real") & results["dice_after"].notna() & (results["family"] != "none")]
    if rows.empty:
        return
    made, axes = figure(2, 2)
    for ax, (key, title) in zip(axes.ravel(), _MEASURES.items(), strict=True):
        for _, mine, look in _groups(rows):
            ax.scatter(mine[f"{key}_before"], mine[f"{key}_after"], s=18, alpha=0.6, linewidths=0, **look)
        ax.axline((0, 0), slope=1, color="0.6", lw=0.8, zorder=0)
        better = "below" if key == "mse" else "above"
        ax.set(xlabel=f"{title} before", ylabel=f"{title} after", title=f"{title} (better: {better} the line)")
    axes[0, 0].legend(fontsize=8)
    made.suptitle("Before against after registration, the paper's perturbation (as its Figure 4)")
    save(made, path)


def plot_capture(results: pd.DataFrame, path: Path) -> None:
    """Fraction of successes against rotation and against shift, 2D above, 3D below, with Wilson's intervals.

    Stress rows are left out: they fail for other reasons.
    """
    if "success" not in results:
        return
    rows = results[results["row"].str.match("(paper|mild|so3)-") & results["success"].notna()]
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
    for number, (_, mine, look) in enumerate(_groups(rows)):
        bins = mine.groupby(pd.cut(mine[key], edges, include_lowest=True), observed=True)
        shares = np.array([percent(int(g["success"].sum()), len(g)) for _, g in bins]).reshape(-1, 3)
        # a little apart, so that equal curves show
        places = bins[key].mean() + (number - 3) * 0.002 * edges[-1]
        spread = np.clip([shares[:, 0] - shares[:, 1], shares[:, 2] - shares[:, 0]], 0, None)
        ax.errorbar(places, shares[:, 0], yerr=spread, capsize=2, lw=1.2, ms=5, **look)
    ax.set(ylim=(-4, 104), xlabel=label, ylabel="success (%)", title=title)
    ax.grid(alpha=0.3)


def plot_cost(table: pd.DataFrame, path: Path) -> None:
    """Seconds and peak memory of `summarize`'s lines against the number of voxels, both axes logarithmic."""
    dims = sorted(table["dims"].unique())
    made, axes = figure(len(dims), 2)
    for line, dim in zip(axes, dims, strict=True):
        for ax, key, label in zip(line, ("seconds_median", "peak_mib"), ("seconds", "peak memory (MiB)"), strict=True):
            for _, mine, look in _groups(table[(table["dims"] == dim) & table[key].notna()]):
                sides = mine["row"].str.split("^").str[0].astype(float)
                ax.loglog(sides**dim, mine[key].clip(lower=1e-3), **look)
            ax.set(xlabel="voxels", ylabel=label, title=f"{dim}D")
            ax.grid(alpha=0.3, which="both")
    axes[0, 0].legend(fontsize=8)
    save(made, path)
