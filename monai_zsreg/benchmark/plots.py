# SPDX-License-Identifier: Apache-2.0
"""The figures: similarity before against after, success against rotation and shift, cost against size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_zsreg.benchmark.run import Result
from monai_zsreg.io.files import atomic_path
from monai_zsreg.metrics import wilson_interval

Figure, _ = optional_import("matplotlib.figure", name="Figure")
FigureCanvasAgg, _ = optional_import("matplotlib.backends.backend_agg", name="FigureCanvasAgg")

__all__ = ["COLORS", "plot_capture", "plot_cost", "plot_figure4", "save_figure"]

_FIGURE4 = (("dice", "Dice"), ("mi", "MI (nats)"), ("ssim", "SSIM"), ("mse", "MSE"))
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999", "#f0e442")
_MARKERS = "osD^vP*Xh"


def _style(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    names = sorted(set(methods), key=lambda m: (not m.startswith("ours"), m))
    return {m: {"color": COLORS[i % len(COLORS)], "marker": _MARKERS[i % len(_MARKERS)]} for i, m in enumerate(names)}


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all."""
    FigureCanvasAgg(figure)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=130)


def plot_figure4(results: Sequence[Result], path: Path) -> bool:
    """Scatter of each metric before and after registration, 2D real pairs under the paper's perturbation.

    Returns:
        False if there are no such cases, and no file then.
    """
    rows = [r for r in results if r["row"] == "paper-2d-real" and "dice_after" in r and r["family"] != "none"]
    if not rows:
        return False
    style = _style([r["method"] for r in rows])
    figure = Figure(figsize=(11, 10), layout="constrained")
    for axes, (key, title) in zip(np.ravel(figure.subplots(2, 2)), _FIGURE4, strict=True):
        for method, look in style.items():
            mine = [r for r in rows if r["method"] == method]
            before, after = ([r[f"{key}_{when}"] for r in mine] for when in ("before", "after"))
            axes.scatter(before, after, s=18, alpha=0.6, linewidths=0, label=method, **look)
        low, high = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([low, high], [low, high], color="0.6", lw=0.8, zorder=0)
        better = "below" if key == "mse" else "above"
        axes.set(xlabel=f"{title} before", ylabel=f"{title} after", title=f"{title} (better: {better} the line)")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle("Before against after registration, the paper's perturbation (as its Figure 4)")
    save_figure(figure, path)
    return True


def plot_capture(results: Sequence[Result], path: Path) -> bool:
    """Share of successes against rotation and against shift, 2D above, 3D below, with Wilson intervals.

    Stress rows are left out: they fail for other reasons.

    Returns:
        False if there are no cases, and no file then.
    """
    rows = [r for r in results if "success" in r and r["row"].split("-")[0] in ("paper", "mild", "so3")]
    dims = sorted({r["dims"] for r in rows})
    if not dims:
        return False
    style = _style([r["method"] for r in rows])
    figure = Figure(figsize=(12, 4.2 * len(dims)), layout="constrained")
    for line, dim in zip(figure.subplots(len(dims), 2, squeeze=False), dims, strict=True):
        unit = "px" if dim == 2 else "mm"
        mine = [r for r in rows if r["dims"] == dim]
        _capture(line[0], mine, "rotation_deg", np.array([0, 5, 10, 15, 20, 30, 45, 60, 90, 120, 150, 180.0]), style)
        line[0].set(xlabel="rotation (degrees)", ylabel="success", title=f"{dim}D, all shifts")
        # turned images fail for the turn; the shift shows among those that are hardly turned, where there are any
        little = [r for r in mine if r["rotation_deg"] <= 20]
        top = max((r["shift"] for r in mine), default=1.0)
        _capture(line[1], little, "shift", np.linspace(0, top + 1e-6, 9), style)
        line[1].set(xlabel=f"shift ({unit})", ylabel="success", title=f"{dim}D, rotation up to 20 degrees")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)
    return True


def _capture(axes: Any, rows: Sequence[Result], key: str, edges: np.ndarray, style: dict[str, dict[str, Any]]) -> None:
    for number, (method, look) in enumerate(style.items()):
        mine = [r for r in rows if r["method"] == method]
        values = np.array([r[key] for r in mine])
        good = np.array([r["success"] for r in mine], dtype=bool)
        xs, ys, below, above = [], [], [], []
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            inside = (values >= low) & ((values < high) | (high == edges[-1]))
            if inside.any():
                share = float(good[inside].mean())
                span = wilson_interval(int(good[inside].sum()), int(inside.sum()))
                # a little apart, so that equal curves show
                xs.append(float(values[inside].mean()) + (number - len(style) / 2) * 0.002 * (edges[-1] - edges[0]))
                ys.append(share)
                below.append(share - span[0])
                above.append(span[1] - share)
        if xs:
            axes.errorbar(
                xs, ys, yerr=[np.maximum(below, 0), np.maximum(above, 0)], capsize=2, lw=1.2, ms=5, label=method, **look
            )
    axes.set_ylim(-0.04, 1.04)
    axes.grid(alpha=0.3)


def plot_cost(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Seconds and peak memory against the number of voxels, both axes logarithmic.

    Returns:
        False if there is nothing to show, and no file then.
    """
    done = [r for r in rows if not r.get("failure")]
    dims = sorted({r["dims"] for r in done})
    if not dims:
        return False
    style = _style([r["method"] for r in done])
    figure = Figure(figsize=(11, 4.2 * len(dims)), layout="constrained")
    for line, dim in zip(figure.subplots(len(dims), 2, squeeze=False), dims, strict=True):
        for axes, key, label in zip(line, ("seconds", "peak_mib"), ("seconds", "peak memory (MiB)"), strict=True):
            for method, look in style.items():
                mine = sorted((r for r in done if r["method"] == method and r["dims"] == dim), key=lambda r: r["size"])
                if mine:
                    axes.loglog(
                        [r["size"] ** dim for r in mine], [max(r[key], 1e-3) for r in mine], label=method, **look
                    )
            axes.set(xlabel="voxels", ylabel=label, title=f"{dim}D")
            axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize=8)
    save_figure(figure, path)
    return True
