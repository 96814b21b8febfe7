# SPDX-License-Identifier: Apache-2.0
"""One pair, from its files to its results: read, register, describe, write.

The bundle, MONAI Label and the command line go through these functions. A pair is a dictionary that each step adds to.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import monai_zsreg
from monai_zsreg.app.evaluate import measure_deformation, measure_pair, read_known
from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid
from monai_zsreg.io import Image, load_image, output_folder, write_image, write_json, write_transform
from monai_zsreg.io.files import remove_leftovers
from monai_zsreg.registration import Prepared, RegistrationResult, register
from monai_zsreg.registration.displacement import Deformation
from monai_zsreg.resample import outside_value

__all__ = [
    "DEMONSTRATION",
    "FAILED",
    "INDEX",
    "REPORT",
    "SUMMARY",
    "WRONG_INPUT",
    "Settings",
    "describe_pair",
    "draw_anew",
    "folder_of",
    "read_pair",
    "register_pair",
    "summary",
    "write_pair",
]

#: name of the pair that is registered where the user names none
DEMONSTRATION = "demonstration"
#: the file of a pair's results that is written last
REPORT = "report.json"
#: files beside the folders of many pairs
SUMMARY, INDEX = "summary.csv", "index.html"
#: exit statuses of the commands; 0: registered, 1: anything else
WRONG_INPUT, FAILED = 2, 3

_IMAGES = {
    "moved": "moved.nii.gz",
    "moved_labels": "moved_labels.nii.gz",
    "expected_error": "expected_error.nii.gz",
    "uncertainty_displacement": "uncertainty_displacement.nii.gz",
    "uncertainty_intensity": "uncertainty_intensity.nii.gz",
}
_TRANSFORMS = {"transform": "transform.tfm", "displacement": "displacement.nii.gz"}
_PICTURES = {
    "overview": "overview.png",
    "uncertainty": "uncertainty.png",
    "interactive": "interactive.html",
    "page": "report.html",
}
# nodes a side of the map of the expected error, which is the root of a quadratic form
_MAP_SIDE = 24


@dataclass(frozen=True)
class Settings:
    """What is done with every pair of a run.

    Args:
        output_dir: results of a pair go to a folder of its name in here.
        preset: see `monai_zsreg.register`, as the next five.
        transform: kind of transform.
        device: where to compute.
        vgg19_weights: file.
        regressor_weights: file.
        seed: of all random draws.
        options: further arguments of `monai_zsreg.register`.
        uncertainty: whether to blacken pixels and estimate again (section 2.7 of the paper); costs ten estimates.
        page: whether to draw the pictures and the page.
        niivue: file ``niivue.umd.js`` of NiiVue, for a page on which one looks through both images; None for none.
        exact: whether to measure how alike the images are on all voxels, not on some two million.
        fill_value: what stands outside of the moved image; None for its own background.
        demonstration_dims: 2 for a slice or 3 for a volume of the demonstration pair.
    """

    output_dir: str | os.PathLike = "output"
    preset: str = "robust"
    transform: str = "affine"
    device: str | torch.device | None = None
    vgg19_weights: str | os.PathLike | None = None
    regressor_weights: str | os.PathLike | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    uncertainty: bool = False
    page: bool = True
    niivue: str | os.PathLike | None = None
    exact: bool = False
    fill_value: float | None = None
    demonstration_dims: int = 3

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `monai_zsreg.register`."""
        names = ("preset", "transform", "device", "vgg19_weights", "regressor_weights", "seed")
        return {name: getattr(self, name) for name in names} | dict(self.options)

    def channel(self, side: str) -> int:
        """The channel of the fixed or the moving image that is registered."""
        return int(self.options.get(f"{side}_channel", 0))


def folder_of(output_dir: str | os.PathLike, name: str) -> Path:
    """Where a pair's results go."""
    return Path(output_dir) / name


# --------------------------------------------------------------------------------------------------------------------
# read
# --------------------------------------------------------------------------------------------------------------------


def read_pair(entry: Mapping[str, Any], settings: Settings, last: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The images of a pair on their native grids, and what is known about them.

    Args:
        entry: ``name``, ``fixed`` and ``moving``, files; further files as `monai_zsreg.app.cohort` names them. With a
            name alone the demonstration pair is made.
        settings: of the run.
        last: the pair before, whose fixed image serves again where it is the same file.

    Returns:
        ``name``; ``files``, the paths by key; ``fixed``, ``moving``: `Image`; ``prepared``, the fixed image for the
        registration; what `read_known` adds.

    Raises:
        RegistrationError: a file that cannot be used, or that the results would overwrite.
    """
    pair = dict(entry)
    if "name" not in pair:  # another program's single image, such as MONAI Label's own app gives
        allowed = "two images, fixed and moving; in MONAI Label use the app of monai_zsreg.label"
        error = RegistrationError("data", sorted(pair), allowed)
        if "fastapi" in sys.modules:  # that app's server tells its client the reason of this exception alone
            raise sys.modules["fastapi"].HTTPException(400, str(error)) from error
        raise error
    folder = folder_of(settings.output_dir, pair["name"])
    if "fixed" not in pair:
        from monai_zsreg.app.demo import demo_pair

        print(
            "Demonstration pair: the fixed image is the MNI152 T1 template; the moving one is SIMULATED from its "
            "tissue maps and moved by a known transform. It is no patient's image.",
            file=sys.stderr,
            flush=True,
        )
        pair |= demo_pair(folder, settings.demonstration_dims)
    pair["files"] = {
        key: str(path) for key, path in pair.items() if isinstance(path, (str, os.PathLike)) and key != "name"
    }
    written = (*_IMAGES.values(), *_PICTURES.values(), *_TRANSFORMS.values(), REPORT)
    targets = {(folder / name).resolve() for name in written}
    for key, path in pair["files"].items():
        if Path(path).resolve() in targets:
            raise RegistrationError(key, path, "a file that the results do not overwrite: another name or output_dir")
    if last is not None and last["files"].get("fixed") == pair["files"]["fixed"] and "prepared" in last:
        pair["prepared"] = last["prepared"]
    else:
        options = settings.options
        channel, mask = options.get("fixed_channel", 0), options.get("fixed_mask")
        pair["prepared"] = Prepared(load_image(pair["fixed"], "fixed"), channel, mask)
    pair["fixed"] = pair["prepared"].image
    for key in ("moving", "labels"):
        if key in pair:
            pair[key] = load_image(pair[key], key)
    if "labels" in pair and pair["labels"].dims != pair["moving"].dims:
        allowed = f"a {pair['moving'].dims}D image, as moving is"
        raise RegistrationError("labels", f"{pair['labels'].dims}D image", allowed)
    return read_known(pair)


# --------------------------------------------------------------------------------------------------------------------
# register
# --------------------------------------------------------------------------------------------------------------------


def register_pair(pair: Mapping[str, Any], settings: Settings, **further: Any) -> RegistrationResult:
    """`monai_zsreg.register` with the pair's images, the settings of the run and further arguments."""
    arguments = settings.arguments | further
    for name in ("fixed_channel", "fixed_mask"):
        arguments.pop(name, None)  # the prepared image has them
    return register(pair["prepared"], pair["moving"], **arguments)


# --------------------------------------------------------------------------------------------------------------------
# describe
# --------------------------------------------------------------------------------------------------------------------


def describe_pair(pair: Mapping[str, Any], result: RegistrationResult, settings: Settings) -> dict[str, Any]:
    """What there is to say about a registered pair; each measure is taken once, here.

    Args:
        pair: as `read_pair` gives it.
        result: of the pair.
        settings: of the run.

    Returns:
        ``report``, for JSON, whose fields the bundle's README describes, and images on the fixed grid by name:
        ``moved``; ``moved_labels`` where there are labels; ``expected_error``, on a coarser grid of the same extent,
        where the preset knows its covariance; with ``uncertainty`` ``uncertainty_displacement`` and
        ``uncertainty_intensity``, unless fewer than two repeats succeeded. The report of a deformed pair has
        ``deformation``, see `measure_deformation`.
    """
    fixed: Image = pair["fixed"]
    background = outside_value(pair["moving"].values[settings.channel("moving")], "bilinear")
    images: dict[str, Image] = {"moved": result.resampled()}
    if "labels" in pair:
        images["moved_labels"] = result.resampled(pair["labels"], mode="nearest", fill_value=0.0)
    report: dict[str, Any] = {
        "name": pair["name"],
        "verdict": result.verdict,
        "reasons": list(result.reasons),
        "score": result.score,
        "measures": dict(result.measures),
        "preset": result.preset,
        "transform": result.transform,
        "seed": settings.seed,
        "device": str(settings.device or "cpu"),
        "options": {name: _plain(value) for name, value in settings.options.items()},
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
        images["expected_error"] = _error_map(result, fixed)
        center = fixed.grid.center.numpy()[None]
        levels = {"root_mean_square": None, "below_in_50_percent": 0.5, "below_in_95_percent": 0.95}
        found = {name: float(result.uncertainty_at(center, level)[0]) for name, level in levels.items()}
        report["expected_error"] = {"at": "center of the fixed image"} | found
    if result.deformation is not None:
        report["deformation"] = measure_deformation(result, settings.channel("fixed"))
    if settings.uncertainty:
        report["uncertainty"] = None if result.uncertainty is None else _blackening(result, settings, images)
    return {"report": _finite(report), "images": images}


def _error_map(result: RegistrationResult, fixed: Image) -> Image:
    """The expected error at some nodes of the fixed field of view, to be stored in two bytes each."""
    shape = tuple(min(n, _MAP_SIDE) for n in fixed.grid.shape)
    dims = fixed.dims
    widen = torch.eye(4, dtype=torch.float64)
    for axis, (n, m) in enumerate(zip(fixed.grid.shape, shape, strict=True)):
        widen[axis, axis], widen[axis, 3] = n / m, (n / m - 1) / 2
    keep = [*range(dims), 3]
    grid = Grid(shape, fixed.affine @ widen[keep][:, keep])
    values = result.expected_error(grid)
    slope = max(float(values.max()), 1e-20) / np.iinfo(np.int16).max
    meta: dict[str, Any] = {"dtype": "int16", "slope": slope, "intercept": 0.0}
    if "place" in fixed.meta:  # of a slice in the world of a volume
        meta["place"] = (torch.as_tensor(fixed.meta["place"], dtype=torch.float64) @ widen).tolist()
    return Image(values, grid.affine, meta)


def _blackening(result: RegistrationResult, settings: Settings, images: dict[str, Image]) -> dict[str, Any]:
    start = time.perf_counter()
    spread = result.uncertainty
    told = spread.as_dict()
    displacement = spread.displacement_map()
    if bool(displacement.isfinite().all()):
        images["uncertainty_displacement"] = load_image(displacement)
        images["uncertainty_intensity"] = load_image(spread.intensity_map(settings.channel("moving")))
    return told | {"seconds": time.perf_counter() - start}


def _versions() -> dict[str, str]:
    # MONAI need not be imported to be asked
    found = {"monai_zsreg": monai_zsreg.__version__, "monai": version("monai"), "torch": torch.__version__}
    return found | {"numpy": np.__version__, "python": platform.python_version()}


def _plain(value: Any) -> Any:
    """A setting for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _finite(value: Any) -> Any:
    """``value`` with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------------------------------------------
# write
# --------------------------------------------------------------------------------------------------------------------


def write_pair(
    pair: Mapping[str, Any], result: RegistrationResult, described: Mapping[str, Any], settings: Settings
) -> dict[str, Any]:
    """Write the results of a pair to its folder.

    Every file gets its name when it is complete. ``report.json`` is taken away first and written last: where it is, the
    others belong to it.

    Returns:
        The report, with the paths of what was written as ``output``.

    Raises:
        RegistrationError: a folder that cannot be written to.
    """
    folder = output_folder(folder_of(settings.output_dir, pair["name"]))
    remove_leftovers(folder)
    report, images = described["report"], described["images"]
    for name in (REPORT, *_IMAGES.values(), *_PICTURES.values(), *_TRANSFORMS.values()):
        (folder / name).unlink(missing_ok=True)  # another run's
    written = {"transform": folder / _TRANSFORMS["transform"]}
    write_transform(written["transform"], result.affine, result.fixed_image)
    if result.deformation is not None:
        written["displacement"] = folder / _TRANSFORMS["displacement"]
        result.deformation.save(written["displacement"])
    sources = {"moved": pair["moving"], "moved_labels": pair.get("labels")}
    with ThreadPoolExecutor(1) as pool:  # compressing leaves Python's lock free
        pending = []
        for key, image in images.items():
            written[key] = folder / _IMAGES[key]
            labels = key == "moved_labels"
            pending.append(pool.submit(write_image, written[key], image, like=sources.get(key), labels=labels))
        if settings.page:
            written |= draw_pair(folder, result, described, settings)
        for writing in pending:
            writing.result()
    report = report | {"output": {key: str(path) for key, path in written.items()}}
    write_json(folder / REPORT, report)
    return report


def draw_pair(
    folder: Path, result: RegistrationResult, described: Mapping[str, Any], settings: Settings
) -> dict[str, Path]:
    """The pictures and the page of a pair, by name."""
    from monai_zsreg.app.report import Views, save_html_report, save_interactive, save_overview, save_spread

    channels = settings.channel("fixed"), settings.channel("moving")
    views = Views(result.fixed_image, result.moving_image, result.pull, *channels)
    paths = {key: folder / name for key, name in _PICTURES.items()}
    save_overview(views, paths["overview"])
    save_html_report(result, paths["page"], described["report"]["name"], described["report"], views)
    spread = described["images"].get("uncertainty_displacement")
    if spread is not None:
        save_spread(result.fixed_image, spread.values, paths["uncertainty"], channels[0])
    if settings.niivue is not None:
        moved = described["images"].get("moved") or result.resampled()
        save_interactive(result.fixed_image, moved, paths["interactive"], described["report"]["name"], settings.niivue)
    made = {"uncertainty": spread, "interactive": settings.niivue}
    return {key: path for key, path in paths.items() if made.get(key, path) is not None}


def draw_anew(folder: str | os.PathLike) -> str:
    """Draw the pictures and the page of a pair from its ``report.json`` and the images that it names.

    Returns:
        The path of the page.

    Raises:
        RegistrationError: an image that is no longer there.
    """
    place = Path(folder)
    report = json.loads((place / REPORT).read_text(encoding="utf-8"))
    if "failure" in report:
        return f"{place}: nothing to draw, {report['failure']}"
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
    settings = Settings(place.parent, options=report["options"])
    return str(draw_pair(place, result, {"report": report, "images": {}}, settings)["page"])


def summary(report: Mapping[str, Any]) -> str:
    """A report in a few lines for the terminal."""
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    unit = "pixels" if report["unit"] == "pixel" else "mm"
    lines = [
        f"{report['name']}: {report['verdict']} in {report['seconds']:.1f} s "
        f"(preset {report['preset']}, {report['transform']})"
    ]
    lines += [f"  {reason}" for reason in report["reasons"]]
    if "expected_error" in report:
        expected = report["expected_error"]
        lines.append(
            "  expected error in the middle of the fixed image: "
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
        lines.append(f"  standard deviation of the displacement in the middle of the fixed image: {told}")
    lines.append(f"  results in {Path(report['output']['moved']).parent}")
    return "\n".join(lines)
