# SPDX-License-Identifier: Apache-2.0
"""The deformable kind beside SyN, SyNQuick, elastix' B-spline, greedy and ConvexAdam.

    python -m monai_zsreg.benchmark deformable DATA ... --output FOLDER

DATA are folders as in ``python -m monai_zsreg.benchmark``, whose options hold here too. Every method gets the same two
images on one grid, the moving one put there by our affine stage, and a process of its own. Rows:

- ``between``: two people, mean Dice of the labels that both have, of T1 and T1, and of T1 and T2 where there is one;
- ``known``: a smooth displacement of up to 10 mm, the other contrast simulated;
- ``resection``, ``resection masked``: up to 5 mm, and a cavity in the fixed image: errors within 10 mm of it and
  beyond 30 mm, without and with a mask (methods that take none are left out);
- ``rigid``: one head, turned by 8 degrees, noise of its own in each image: the displacement that is added.

Written to FOLDER: ``results.jsonl`` (the same command goes on where it stopped) and ``deformable.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from monai_zsreg import register
from monai_zsreg.benchmark import damage
from monai_zsreg.benchmark.cases import Case, Row, Sample
from monai_zsreg.benchmark.methods import DEFORMABLE
from monai_zsreg.benchmark.pairs import Pair
from monai_zsreg.benchmark.perturb import about, turn
from monai_zsreg.benchmark.report import markdown, write_page
from monai_zsreg.benchmark.volumes import Volume, foreground, labels_dice, moved, read_volume, transformed
from monai_zsreg.registration.displacement import determinant


@dataclass(frozen=True)
class FieldSample(Sample):
    """Two images on one grid. Fields ``[D, *shape]`` are mm, from fixed to moving, RAS."""

    displacement: np.ndarray | None = None  # the truth
    regions: Mapping[str, np.ndarray] = field(default_factory=dict)  # masks of where errors are measured
    affine: np.ndarray | None = None  # which put the moving image, and not its labels, on this grid

    @property
    def nothing(self) -> np.ndarray:
        return np.zeros((self.fixed.dims, *self.fixed.shape))

    def judge(self, given: np.ndarray, *_: Any) -> dict[str, Any]:
        """Dice, errors (mm, median and 95 % of each region) and folded voxels of a field."""
        fixed = self.fixed
        steps = np.einsum("ij,j...->i...", np.linalg.inv(fixed.affine[:-1, :-1]), given)
        folded = determinant(torch.from_numpy(steps)).numpy() <= 0
        result = {"folded": float(folded.sum()), "folded inside": float((folded & foreground(fixed.values)).sum())}
        if self.labels is not None:
            still, labels = self.labels
            place = np.moveaxis(np.indices(fixed.shape) + steps, 0, -1)
            index = transformed(np.linalg.inv(labels.affine) @ self.affine @ fixed.affine, place)
            shown = ndimage.map_coordinates(labels.values, np.moveaxis(index, -1, 0), order=0)
            result["dice"] = labels_dice(still, labels, shown)
        for name, region in self.regions.items():
            gaps = np.linalg.norm((given - self.displacement)[:, region], axis=0)
            result |= {f"{name} median".strip(): float(np.median(gaps))}
            result |= {f"{name} 95 %".strip(): float(np.quantile(gaps, 0.95))}
        return result


def deformable_cases(pairs: Sequence[Pair], folder: str, count: int, seed: int = 0) -> list[Case]:
    """At most ``count`` cases of each row.

    Args:
        pairs: as `find_pairs` gives them.
        folder: name of the data set, for those of the cases.
        count: of each row.
        seed: kept with the results.
    """
    made = []
    people = [pair for pair in pairs if pair.kind == "between"][:count]
    for contrast in ("t1", "t2"):
        for pair in people:
            other = pair.moving.with_name(pair.moving.name.replace("t1", contrast))
            if other.exists():
                name = pair.subject.replace("|", "-")
                made.append((f"between {folder} t1-{contrast}", name, partial(_between, pair=pair, moving=other)))
    for pair in [pair for pair in pairs if pair.kind == "exact" and pair.mask is not None][:count]:
        for row in ("known", "resection", "resection masked", "rigid"):
            made.append((row, f"{folder}/{pair.subject}", partial(_made, pair=pair)))
    return [
        Case(Row("deformable", 3, "deformable", count, 0, row, "deformable"), index, name, name, seed, make)
        for index, (row, name, make) in enumerate(made)
    ]


def _between(case: Case, pair: Pair, moving: Path) -> FieldSample:
    assert pair.labels is not None
    affine = register(pair.fixed, moving).affine
    fixed, labels = read_volume(pair.fixed), (read_volume(pair.labels[0]), read_volume(pair.labels[1]))
    shown = moved(read_volume(moving), fixed.shape, fixed.affine, affine)
    return FieldSample(fixed, shown, np.empty((0, 3)), None, labels=labels, affine=affine)


def _made(case: Case, pair: Pair) -> FieldSample:
    assert pair.mask is not None
    moving, brain = read_volume(pair.fixed), read_volume(pair.mask).values > 0
    rng, row = np.random.default_rng(0), case.row.name

    def noisy(image: Volume, inside: np.ndarray) -> Volume:
        return Volume(damage.add_noise(image.values, inside, 0.02, rng), image.affine)

    def sample(fixed: Volume, moving: Volume, truth: np.ndarray, **more: Any) -> FieldSample:
        return FieldSample(fixed, moving, np.empty((0, 3)), None, displacement=truth, **more)

    if row == "rigid":
        motion = about(moving.center, turn(8.0, 3, rng), np.array([3.0, -5.0, 4.0]))
        shown = noisy(moved(moving, moving.shape, moving.affine, np.linalg.inv(motion)), brain)
        fixed = noisy(moving, brain)
        found = register(fixed.image, shown.image, transform="rigid").affine
        back = moved(shown, fixed.shape, fixed.affine, found)
        return sample(fixed, back, np.zeros((3, *fixed.shape)), regions={"": brain})
    values = moving.values
    if row == "known":
        tissue = None if pair.tissue is None else read_volume(pair.tissue).values
        values = damage.simulated_t2(values, brain, tissue)
    smooth = [ndimage.gaussian_filter(rng.standard_normal(moving.shape), 16 / moving.spacing) for _ in range(3)]
    truth = np.stack(smooth) * (10.0 if row == "known" else 5.0) / np.linalg.norm(smooth, axis=0)[brain].max()
    where = np.indices(moving.shape) + np.einsum("ij,j...->i...", np.linalg.inv(moving.affine[:-1, :-1]), truth)
    seen = ndimage.map_coordinates(brain.astype(np.float32), where, order=1) > 0.5
    bent = Volume(ndimage.map_coordinates(values, where, order=3).astype(np.float32), moving.affine)
    regions, mask = {"": seen}, None
    if row != "known":
        cut = damage.blacken_cavity(bent, seen, rng)
        hole = cut.values != bent.values
        away = ndimage.distance_transform_edt(~hole, sampling=moving.spacing)
        regions = {"near": seen & (away > 0) & (away <= 10), "far": seen & (away > 30)}
        bent, mask = cut, ~hole if row.endswith("masked") else None
    fixed = noisy(bent, seen)
    return sample(fixed, noisy(moving, brain), truth, regions=regions, mask=mask)


def write_report(results: pd.DataFrame, folder: Path, threads: int, notes: Sequence[str] = ()) -> Path:
    """``deformable.md``, whose path is returned."""
    failed = results[results["failure"] != ""]
    notes = [*notes, *dict.fromkeys(failed["method"] + " in " + failed["row"] + ": " + failed["failure"])]
    done = results[results["failure"] == ""].assign(method=lambda t: pd.Categorical(t["method"], list(DEFORMABLE)))
    lines = []
    for (row, method), runs in done.groupby(["row", "method"], observed=True):
        known = [n for n in runs.dropna(axis="columns", how="all") if n == "dice" or n.endswith(("median", "95 %"))]
        line = {"row": row, "method": method, "n": len(runs), "measure": ", ".join(known)}
        line |= {"value": ", ".join(f"{runs[name].mean():.3f}" for name in known)}
        line |= {name: f"{runs[name].max():.0f}" for name in ("folded", "folded inside")}
        lines.append(line | {"seconds": f"{runs['seconds'].median():.1f}", "MiB": f"{runs['peak_mib'].max():.0f}"})
    meaning = "Means over n trials (folded voxels, MiB: the largest; seconds: the median); errors in mm."
    body = [meaning, "", *markdown(pd.DataFrame(lines))]
    return write_page(folder / "deformable.md", "Benchmark of deformable registration", threads, body, notes)
