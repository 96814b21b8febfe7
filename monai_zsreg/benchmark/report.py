# SPDX-License-Identifier: Apache-2.0
"""What all reports share: pages of Markdown, tables, figures, and where a run was made."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from monai_zsreg.benchmark.peers import PEERS
from monai_zsreg.io.files import atomic_path
from monai_zsreg.metrics import success_rate

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999", "#f0e442")


def percent(right: pd.Series) -> tuple[float, float, float]:
    """The fraction of True and Wilson's 95 % interval of it, in percent; NaN of none."""
    if right.empty:
        return (np.nan,) * 3
    rate = success_rate(1.0 - right.astype(float), 0.5)
    return 100 * rate.rate, 100 * rate.low, 100 * rate.high


def seconds(value: Any) -> str:
    """With the digits that matter."""
    return "-" if pd.isna(value) else f"{value:.3f}" if value < 1 else f"{value:.1f}"


def markdown(table: pd.DataFrame) -> list[str]:
    """A table in Markdown; empty cells where a value is missing."""
    rows = [["" if pd.isna(cell) else str(cell) for cell in row] for row in table.to_numpy(dtype=object)]
    return [f"| {' | '.join(cells)} |" for cells in [list(table.columns), ["---"] * len(table.columns), *rows]]


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table, whole or not at all."""
    with atomic_path(path) as partial:
        table.to_csv(partial, index=False)


def write_page(path: Path, title: str, threads: int, body: Sequence[str], notes: Sequence[str] = ()) -> Path:
    """Write a page of Markdown, whole or not at all, with the machine at its head and what was left out at its end."""
    left_out = ["", "## Left out", "", *[f"- {note}" for note in notes]] if notes else []
    with atomic_path(path) as partial:
        text = "\n".join([f"# {title}", "", *_machine(threads), "", *body, *left_out])
        partial.write_text(text + "\n", encoding="utf-8")
    return path


def _machine(threads: int) -> list[str]:
    """Where and when a run was made, as a Markdown list."""
    names = [platform.processor() or platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")] or names
    versions = []
    for package in ["monai", "torch", *sorted({peer.package for peer in PEERS.values()})]:
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


def figure(rows: int, columns: int, width: float = 5.5, height: float = 4.2) -> tuple[Figure, np.ndarray]:
    """A figure and its axes ``[rows, columns]``."""
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def save(made: Figure, path: Path) -> None:
    """Write a figure, whole or not at all."""
    FigureCanvasAgg(made)
    with atomic_path(path) as partial:
        made.savefig(partial, dpi=130)


def looks(table: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
    """Results by method, ours first, each with its color, marker and label."""
    names = sorted(table["method"].unique(), key=lambda m: (not m.startswith("ours"), m))
    for number, name in enumerate(names):
        look = {"color": COLORS[number % len(COLORS)], "marker": "osD^vP*Xh"[number % 9], "label": name}
        yield table[table["method"] == name], look
