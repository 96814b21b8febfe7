# SPDX-License-Identifier: Apache-2.0
"""One pair, from its files to its results: read, register, describe, write.

The bundle, MONAI Label and the command line go through these functions. A pair is a dictionary that each step adds to.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import monai_zsreg
from monai_zsreg.app.evaluate import measure_deformation, measure_pair, read_known
from monai_zsreg.app.settings import REPORT, Settings
from monai_zsreg.app.tables import read_report
from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid
from monai_zsreg.io import Image, load_image, output_folder, write_image, write_json, write_transform
from monai_zsreg.io.files import remove_leftovers
from monai_zsreg.registration import Prepared, RegistrationResult, register
from monai_zsreg.registration.displacement import Deformation
from monai_zsreg.resample import outside_value

# what a pair's folder may hold beside the report
_FILES = {
    "transform": "transform.tfm",
    "displacement": "displacement.nii.gz",
    "moved": "moved.nii.gz",
    "moved_labels": "moved_labels.nii.gz",
    "expected_error": "expected_error.nii.gz",
    "uncertainty_displacement": "uncertainty_displacement.nii.gz",
    "uncertainty_intensity": "uncertainty_intensity.nii.gz",
    "overview": "overview.png",
    "uncertainty": "uncertainty.png",
    "interactive": "interactive.html",
    "page": "report.html",
}
# nodes a side of the map of the expected error, which is the root of a quadratic form
_MAP_SIDE = 24


def files_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """The paths of an entry, by key."""
    return {key: str(path) for key, path in entry.items() if isinstance(path, (str, os.PathLike)) and key != "name"}


def read_pair(entry: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The images of a pair on their native grids, and what is known about them.

    Args:
        entry: ``name``, ``fixed`` and ``moving``, files; further files as `monai_zsreg.app.datalist` names them. With a
            name alone the demonstration pair is made. What has been ``prepared`` of the same fixed image serves again.
        settings: of the run.

    Returns:
        ``name``; ``files``, the paths by key; ``fixed``, ``moving``: `Image`; ``prepared``, the fixed image for the
        registration; what `read_known` adds.

    Raises:
        RegistrationError: a file that cannot be used, or that the results would overwrite.
    """
    pair = dict(entry)
    folder = settings.folder(pair["name"])
    if "fixed" not in pair:
        from monai_zsreg.app.demo import demo_pair

        print(
            "Demonstration pair: the fixed image is the MNI152 T1 template; the moving one is SIMULATED from its "
            "tissue maps and moved by a known transform. It is no patient's image.",
            file=sys.stderr,
            flush=True,
        )
        pair |= demo_pair(folder, settings.demonstration_dims)
    pair["files"] = files_of(pair)
    targets = {(folder / name).resolve() for name in (*_FILES.values(), REPORT)}
    for key, path in pair["files"].items():
        if Path(path).resolve() in targets:
            raise RegistrationError(key, path, "a file that the results do not overwrite: another name or output_dir")
    if "prepared" not in pair:
        channel, mask = settings.options.get("fixed_channel", 0), settings.options.get("fixed_mask")
        pair["prepared"] = Prepared(load_image(pair["fixed"], "fixed"), channel, mask)
    pair["fixed"] = pair["prepared"].image
    for key in ("moving", "labels"):
        if key in pair:
            pair[key] = load_image(pair[key], key)
    if "labels" in pair and pair["labels"].dims != pair["moving"].dims:
        allowed = f"a {pair['moving'].dims}D image, as moving is"
        raise RegistrationError("labels", f"{pair['labels'].dims}D image", allowed)
    return read_known(pair)


def register_pair(pair: Mapping[str, Any], settings: Settings, **further: Any) -> RegistrationResult:
    """`monai_zsreg.register` with the pair's images, the settings of the run and further arguments."""
    arguments = settings.arguments | further
    for name in ("fixed_channel", "fixed_mask"):
        arguments.pop(name, None)  # the prepared image has them
    return register(pair["prepared"], pair["moving"], **arguments)


# --------------------------------------------------------------------------------------------------------------------
# describe
# --------------------------------------------------------------------------------------------------------------------


def describe_pair(
    pair: Mapping[str, Any], result: RegistrationResult, settings: Settings
) -> tuple[dict[str, Any], dict[str, Image]]:
    """What there is to say about a registered pair; each measure is taken once, here.

    Args:
        pair: as `read_pair` gives it.
        result: of the pair.
        settings: of the run.

    Returns:
        The report, for JSON, whose fields the bundle's README describes. Images on the fixed grid by name: ``moved``;
        ``moved_labels`` where there are labels; ``expected_error``, on a coarser grid of the same extent, where the
        preset knows its covariance; with ``uncertainty`` ``uncertainty_displacement`` and ``uncertainty_intensity``,
        unless fewer than two repeats succeeded.
    """
    fixed: Image = pair["fixed"]
    background = outside_value(pair["moving"].values[settings.channel("moving")], "bilinear")
    images = {"moved": result.resampled()}
    if "labels" in pair:
        images["moved_labels"] = result.resampled(pair["labels"], mode="nearest", fill_value=0.0)
    report: dict[str, Any] = {
        "name": pair["name"],
        "verdict": result.verdict,
        "reasons": result.reasons,
        "score": result.score,
        "measures": result.measures,
        "preset": result.preset,
        "transform": result.transform,
        "seed": settings.seed,
        "device": str(settings.device or "cpu"),
        "options": settings.options,
        "input": pair["files"],
        "unit": fixed.meta.get("unit", "mm"),
        "matrix": result.affine.tolist(),
        "matrix_maps": "points of the fixed image to points of the moving image, RAS",
        "parameters": result.parameters.as_dict(),
        "covariance": None if result.covariance is None else result.covariance.tolist(),
        "keypoints": len(result.keypoints.get("fixed", ())),
        "metrics": measure_pair(pair, result, images["moved"], background, settings),
        "seconds": result.seconds,
        "versions": _versions(),
        "made_from": pair.get("made_from"),
    }
    if settings.fill_value is not None:
        images["moved"] = result.resampled(fill_value=settings.fill_value)
    if result.covariance is not None:
        images["expected_error"] = _error_map(result)
        center = fixed.grid.center.numpy()[None]
        levels = {"root_mean_square": None, "below_in_50_percent": 0.5, "below_in_95_percent": 0.95}
        found = {name: float(result.uncertainty_at(center, level)[0]) for name, level in levels.items()}
        report["expected_error"] = {"at": "center of the fixed image"} | found
    if result.deformation is not None:
        report["deformation"] = measure_deformation(result, settings.channel("fixed"))
    if settings.uncertainty:
        start = time.perf_counter()
        spread = result.uncertainty
        report["uncertainty"] = None if spread is None else spread.as_dict()
        if spread is not None:
            images |= _spread_maps(spread, settings.channel("moving"))
            report["uncertainty"]["seconds"] = time.perf_counter() - start
    return _plain(report), images


def _error_map(result: RegistrationResult) -> Image:
    """The expected error at some nodes of the fixed field of view, to be stored in two bytes each."""
    fixed = result.fixed_image
    shape = tuple(min(n, _MAP_SIDE) for n in fixed.grid.shape)
    widen = torch.eye(4, dtype=torch.float64)
    for axis, (n, m) in enumerate(zip(fixed.grid.shape, shape, strict=True)):
        widen[axis, axis], widen[axis, 3] = n / m, (n / m - 1) / 2
    keep = [*range(fixed.dims), 3]
    grid = Grid(shape, fixed.affine @ widen[keep][:, keep])
    values = result.expected_error(grid)
    slope = max(float(values.max()), 1e-20) / np.iinfo(np.int16).max
    meta: dict[str, Any] = {"dtype": "int16", "slope": slope, "intercept": 0.0}
    if "place" in fixed.meta:  # of a slice in the world of a volume
        meta["place"] = (torch.as_tensor(fixed.meta["place"], dtype=torch.float64) @ widen).tolist()
    return Image(values, grid.affine, meta)


def _spread_maps(spread: Any, channel: int) -> dict[str, Image]:
    displacement = spread.displacement_map()
    if not bool(displacement.isfinite().all()):
        return {}
    maps = {"uncertainty_displacement": displacement, "uncertainty_intensity": spread.intensity_map(channel)}
    return {name: load_image(values) for name, values in maps.items()}


def _versions() -> dict[str, str]:
    # MONAI need not be imported to be asked
    found = {"monai_zsreg": monai_zsreg.__version__, "monai": version("monai"), "torch": torch.__version__}
    return found | {"numpy": np.__version__, "python": platform.python_version()}


def _plain(value: Any) -> Any:
    """``value`` for JSON: text for what it does not know, None for what it has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


# --------------------------------------------------------------------------------------------------------------------
# write
# --------------------------------------------------------------------------------------------------------------------


def write_pair(pair: Mapping[str, Any], result: RegistrationResult, settings: Settings) -> dict[str, Any]:
    """Describe a pair, and write its results to its folder.

    Every file gets its name when it is complete. ``report.json`` is taken away first and written last: where it is, the
    others belong to it.

    Returns:
        The report, with the paths of what was written as ``output``.

    Raises:
        RegistrationError: a folder that cannot be written to.
    """
    report, images = describe_pair(pair, result, settings)
    folder = output_folder(settings.folder(pair["name"]))
    remove_leftovers(folder)
    for name in (REPORT, *_FILES.values()):
        (folder / name).unlink(missing_ok=True)  # another run's
    written = {"transform": folder / _FILES["transform"]}
    write_transform(written["transform"], result.affine, result.fixed_image)
    if result.deformation is not None:
        written["displacement"] = folder / _FILES["displacement"]
        result.deformation.save(written["displacement"])
    sources = {"moved": pair["moving"], "moved_labels": pair.get("labels")}
    with ThreadPoolExecutor(1) as pool:  # compressing leaves Python's lock free
        pending = []
        for key, image in images.items():
            written[key] = folder / _FILES[key]
            labels = key == "moved_labels"
            pending.append(pool.submit(write_image, written[key], image, like=sources.get(key), labels=labels))
        if settings.page:
            written |= _draw(folder, result, report, images, settings)
        for writing in pending:
            writing.result()
    report["output"] = {key: str(path) for key, path in written.items()}
    write_json(folder / REPORT, report)
    return report


def _draw(
    folder: Path,
    result: RegistrationResult,
    report: Mapping[str, Any],
    images: Mapping[str, Image],
    settings: Settings,
) -> dict[str, Path]:
    """The pictures and the pages of a pair, by name."""
    from monai_zsreg.app.report import Views, save_html_report, save_interactive, save_overview, save_spread

    fixed, name, channel = result.fixed_image, report["name"], settings.channel("fixed")
    views = Views(fixed, result.moving_image, result.pull, channel, settings.channel("moving"))
    paths = {key: folder / _FILES[key] for key in ("overview", "page")}
    save_overview(views, paths["overview"])
    save_html_report(result, paths["page"], name, report, views)
    spread = images.get("uncertainty_displacement")
    if spread is not None:
        paths["uncertainty"] = folder / _FILES["uncertainty"]
        save_spread(fixed, spread.values, paths["uncertainty"], channel)
    if settings.niivue is not None:
        paths["interactive"] = folder / _FILES["interactive"]
        save_interactive(fixed, images["moved"], paths["interactive"], name, settings.niivue)
    return paths


def draw_anew(folder: Path) -> str:
    """Draw the pictures and the page of a pair from its ``report.json`` and the images that it names.

    Returns:
        The path of the page.

    Raises:
        RegistrationError: an image that is no longer there.
    """
    report = read_report(folder)
    if report is None:
        raise RegistrationError("folder", str(folder), f"a folder with a {REPORT} that can be read")
    if "failure" in report:
        return f"{folder}: nothing to draw, {report['failure']}"
    bent = report["output"].get("displacement")
    fields = ("verdict", "reasons", "measures", "seconds", "preset", "transform", "options", "device")
    result = RegistrationResult(
        affine=np.array(report["matrix"]),
        covariance=None if report["covariance"] is None else np.array(report["covariance"]),
        score=-math.inf if report["score"] is None else report["score"],
        fixed_image=load_image(report["input"]["fixed"], "fixed"),
        moving_image=load_image(report["input"]["moving"], "moving"),
        deformation=Deformation.load(bent, report["matrix"]) if bent else None,
        **{name: report[name] for name in fields},
    )
    return str(_draw(folder, result, report, {}, Settings(options=report["options"]))["page"])
