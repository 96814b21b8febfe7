# SPDX-License-Identifier: Apache-2.0
"""What a registration costs: seconds and memory against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from monai_zsreg.benchmark.cases import Case, Row, Sample
from monai_zsreg.benchmark.perturb import PROTOCOLS, draw
from monai_zsreg.benchmark.report import figure, looks, markdown, save, seconds, write_csv, write_page
from monai_zsreg.benchmark.summary import summarize
from monai_zsreg.benchmark.volumes import Volume, foreground, moved

SIZES = {2: (128, 256, 512, 1024), 3: (64, 96, 128, 192, 240, 320)}
_FIELD_OF_VIEW = 240.0  # mm
_NOTE = """
A made-up object of one shape and field of view (240 mm) in two contrasts, moved by the `mild` protocol. Memory: by how
much the largest size of a process of its own grew during the registration, after a warm-up.
"""


def phantom_pair(dims: int, size: int, seed: int = 0) -> tuple[Volume, Volume, np.ndarray]:
    """A layered object in two contrasts, the second one moved by the mild protocol, and the truth.

    The object has the same shape and field of view (240 mm) at every size.
    """
    rng = np.random.default_rng(seed)
    side = 64
    axes = np.meshgrid(*[np.linspace(-1, 1, side)] * dims, indexing="ij")
    radius = np.sqrt(sum((a / w) ** 2 for a, w in zip(axes, (0.62, 0.72, 0.58), strict=False)))
    waves = ndimage.gaussian_filter(rng.normal(size=(side,) * dims), 2.5)
    level = np.clip(1.2 * (1 - radius) + 0.45 * waves / waves.std(), 0, 2) * (radius < 1)
    enlarge = partial(ndimage.zoom, zoom=size / side, order=1, mode="nearest", grid_mode=True)
    level, inside = enlarge(level.astype(np.float32)), enlarge((radius < 1).astype(np.float32)) > 0.5
    affine = np.diag([_FIELD_OF_VIEW / size] * dims + [1.0])
    contrasts = ([0.25, 0.5, 0.8, 1.0], [1.0, 0.6, 0.4, 0.7])
    still, other = (np.where(inside, np.interp(level, [0, 0.5, 1.0, 2.0], values), 0) for values in contrasts)
    truth, _ = draw(PROTOCOLS["mild", dims], Volume(still, affine), rng)
    shown = moved(Volume(other, affine), still.shape, affine, np.linalg.inv(truth), order=1, fill=0.0).values
    noisy = [(image + (image > 0) * rng.normal(0, 0.02, image.shape)).astype(np.float32) for image in (still, shown)]
    return Volume(noisy[0], affine), Volume(noisy[1], affine), truth


def phantom_cases(sizes: Mapping[int, Sequence[int]], seed: int) -> list[Case]:
    """One case a size, small sizes three, so that a median can be taken."""
    cases = []
    for dims, side in [(dims, side) for dims, sides in sizes.items() for side in sides]:
        row = Row("cost", dims, "exact", 3, 0, f"{side}^{dims}")
        for number in range(3 if side**dims <= 2**20 else 1):
            maker = partial(_make, size=side)
            cases.append(Case(row, number, "phantom", "phantom", seed, maker, {"group": "phantoms"}))
    return cases


def _make(case: Case, size: int) -> Sample:
    fixed, moving, truth = phantom_pair(case.row.dims, size, case.seed)
    return Sample(fixed, moving, fixed.points(foreground(fixed.values)), truth, truth)


def write_report(results: pd.DataFrame, folder: Path, threads: int, notes: Sequence[str] = ()) -> Path:
    """``cost.csv``, ``cost.png`` and ``cost.md``, whose path is returned."""
    table = summarize(results)
    write_csv(folder / "cost.csv", table.dropna(axis="columns", how="all"))
    _plot(table, folder / "cost.png")
    cells = {"method": table["method"], "size": table["row"], "seconds": table["seconds_median"].map(seconds)}
    cells |= {
        "peak MiB": table["peak_mib"].map("{:.0f}".format),
        "error (mm)": table["tre_median"].map("{:.2f}".format),
    }
    body = [_NOTE, *markdown(pd.DataFrame(cells | {"no answer": table["failures"]}))]
    return write_page(folder / "cost.md", "Seconds and peak memory against size", threads, body, notes)


def _plot(table: pd.DataFrame, path: Path) -> None:
    """Seconds and peak memory against the number of voxels, both axes logarithmic."""
    dims = sorted(table["dims"].unique())
    made, axes = figure(len(dims), 2)
    for line, dim in zip(axes, dims, strict=True):
        for ax, key, label in zip(line, ("seconds_median", "peak_mib"), ("seconds", "peak memory (MiB)"), strict=True):
            for mine, look in looks(table[(table["dims"] == dim) & table[key].notna()]):
                sides = mine["row"].str.split("^").str[0].astype(float)
                ax.loglog(sides**dim, mine[key].clip(lower=1e-3), **look)
            ax.set(xlabel="voxels", ylabel=label, title=f"{dim}D")
            ax.grid(alpha=0.3, which="both")
    axes[0, 0].legend(fontsize=8)
    save(made, path)
