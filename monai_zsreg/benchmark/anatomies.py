# SPDX-License-Identifier: Apache-2.0
"""Rows of other anatomies and of fields of view that overlap in part; only the moving *header* is moved.

``anatomies`` and ``slices`` need a folder with a ``manifest.csv`` of the columns ``pair, fixed, moving, kind, truth,
tolerance_mm``; ``truth`` beginning with ``consensus`` means that the headers say nothing, and a method's answer at the
pose as given stands for the truth. ``retina`` makes its pairs from scikit-image's photograph.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from monai_zsreg.benchmark import damage
from monai_zsreg.benchmark.brains import full_slices, head_foot
from monai_zsreg.benchmark.cases import SUCCESS, Case, Row, Sample
from monai_zsreg.benchmark.perturb import about, turn, unit
from monai_zsreg.benchmark.volumes import Volume, foreground, moved, read_volume, transformed

# degrees from and to, mm
_POSES = {"given": (0, 0, 0), "p10": (10, 10, 10), "p30": (30, 30, 20), "any": (90, 180, 20), "cut": (10, 10, 10)}
_COLUMNS = ("pair", "fixed", "moving", "kind", "truth", "tolerance_mm")
_SLICED = "T[12].*(?:PET|SPECT|ADC)"  # what `slices` takes of the manifest's kinds

ROWS = (
    *[Row("anatomies", 3, "header", 50, 1, f"anatomies-{pose}-rigid", "rigid") for pose in _POSES],
    *[Row("anatomies", 3, "header", 50, 0, f"anatomies-{pose}-affine") for pose in _POSES],
    *[Row("overlap", 2, "header", 20, 1, f"slices-{pose}", "rigid") for pose in ("given", "p10", "p30", "any")],
    Row("overlap", 2, "natural", 24, 2, "retina"),
)


def is_anatomies(folder: Path) -> bool:
    """True for a folder with a manifest of such pairs."""
    listed = folder / "manifest.csv"
    return listed.is_file() and set(_COLUMNS) <= set(pd.read_csv(listed, nrows=0))


def anatomy_cases(row: Row, folder: Path | None, count: int, seed: int) -> list[Case]:
    """The first ``count`` cases of a row of `ROWS`, at most one for each pair (three slices of each).

    ``folder``: see `is_anatomies`; None where there is none, which leaves ``retina``.
    """
    if row.name == "retina":
        return [Case(row, k, f"retina{k}", f"retina{k}", seed, _retina, {"group": "retina"}) for k in range(count)]
    if folder is None:
        return []
    manifest = pd.read_csv(folder / "manifest.csv", dtype=str)
    if row.dims == 2:
        manifest = manifest[manifest["kind"].str.contains(_SLICED)]
    units = [(pair, where) for where in ((None,) if row.dims == 3 else range(3)) for _, pair in manifest.iterrows()]
    cases = []
    for index, (pair, where) in enumerate(units[:count]):
        name = pair["pair"] if where is None else f"{pair['pair']}:{where}"
        group = f"anatomies: {pair['pair'].split('_')[0]}" if where is None else "slices of PET, SPECT, ADC"
        maker = partial(_make, folder=folder, pair=pair, where=where)
        cases.append(Case(row, index, pair["pair"], name, seed, maker, {"group": group}))
    return cases


def _make(case: Case, folder: Path, pair: pd.Series, where: int | None) -> Sample:
    fixed, moving = (read_volume(folder / pair[role]) for role in ("fixed", "moving"))
    tolerance = float(pair["tolerance_mm"])
    if where is not None:
        fixed, moving, pixel = _slices(fixed, moving, where)
        tolerance = max(SUCCESS, tolerance / pixel)
    pose = case.row.name.split("-")[1]
    low, high, reach = _POSES[pose]
    rng = case.rng("motion")
    if pose == "cut":
        longest = int(np.argmax(moving.spacing * moving.shape))
        first = 0 if rng.integers(2) else round(moving.shape[longest] / 3)
        moving = damage.crop(moving, longest, first, first + round(moving.shape[longest] * 2 / 3))
    # a small image would leave the other altogether
    shift = reach * min(1.0, float((moving.spacing * moving.shape).max()) / 150)
    angle = rng.uniform(low, high)
    motion = about(moving.center, turn(angle, moving.dims, rng), shift * unit(rng, moving.dims))
    # errors are measured where both show something, as far as that is known
    points = fixed.points(foreground(fixed.values))
    inside = moving.shows(points)
    points = points[inside] if inside.sum() > 50 else points
    moving = Volume(moving.values, motion @ moving.affine)
    consensus = pair["truth"].startswith("consensus")
    given = case.row.name.replace(f"-{pose}", "-given") + case.name[len(case.row.name) :]
    return Sample(
        fixed,
        moving,
        points,
        truth=None if consensus and pose == "given" else motion,
        tolerance=tolerance,
        info={"rotation_deg": round(float(angle), 4), "shift": round(float(shift), 4)},
        reference=given if consensus and pose != "given" else None,
    )


def _slices(fixed: Volume, moving: Volume, where: int) -> tuple[Volume, Volume, float]:
    """An axial slice of each at one place, in pixels of the fixed image, and the pixel's size."""
    shown = moved(moving, fixed.shape, fixed.affine, np.eye(4), order=1)
    axis = head_foot(fixed.affine)
    both = foreground(fixed.values) & foreground(shown.values)
    spots = full_slices(both, axis, 3) or [fixed.shape[axis] // 2]
    index = spots[min(where, len(spots) - 1)]
    sizes = np.delete(fixed.spacing, axis)
    pixels = np.diag([*(sizes / sizes[0]), 1.0])
    images = [Volume(np.take(image.values, index, axis=axis), pixels) for image in (fixed, shown)]
    return images[0], images[1], float(sizes[0])


def _retina(case: Case) -> Sample:
    fixed, moving, truth, points = retina_pair(case.rng("retina"), any_rotation=case.index % 2 == 0)
    return Sample(fixed, moving, points, truth, truth)


def retina_pair(rng: np.random.Generator, any_rotation: bool) -> tuple[Volume, Volume, np.ndarray, np.ndarray]:
    """Two circular views of one retina: a photograph, and its green channel in the contrast of an angiogram.

    They are turned by up to 25 degrees unless ``any_rotation``. Returns both, the truth, and the points of the fixed
    image that both show.
    """
    from skimage import data

    side, radius = 560, 270.0

    green = ndimage.zoom(data.retina()[..., 1].astype(np.float32), 0.75, order=1)
    photograph = Volume(green, np.eye(3))
    apart = rng.uniform(0.35, 0.95) * radius * unit(rng, 2)
    angle = rng.uniform(-180, 180) if any_rotation else rng.uniform(-25, 25)
    turned = rng.uniform(0.9, 1.12) * turn(angle, 2, rng)
    # each view's pixels to those of the photograph
    center = np.full(2, (side - 1) / 2)
    middle = photograph.center - center
    to_photo = [about(center, np.eye(2), middle - apart / 2), about(center, turned, middle + apart / 2)]
    offset = np.indices((side, side)) - center[:, None, None]
    circle = (offset**2).sum(axis=0) < radius**2
    views = []
    for number, pull in enumerate(to_photo):
        values = moved(photograph, (side, side), np.eye(3), pull, order=1, fill=0.0).values
        if number:
            # vessels shine in an angiogram, and what lies between them says little
            values = 110 - 2.2 * (values - ndimage.gaussian_filter(values, 12)) - 0.15 * values
        slope = rng.uniform(-0.3, 0.3, 2) / radius
        values = values * (1 + np.tensordot(slope, offset, axes=1)) + rng.normal(0, 5 if number else 3, circle.shape)
        views.append(Volume(np.where(circle, values, 0).astype(np.float32), np.eye(3)))
    truth = np.linalg.inv(to_photo[1]) @ to_photo[0]
    points = np.argwhere(circle)
    seen = ((transformed(truth, points) - center) ** 2).sum(axis=1) < radius**2
    return views[0], views[1], truth, points[seen].astype(float)
