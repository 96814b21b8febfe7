# SPDX-License-Identifier: Apache-2.0
"""The pages: what they say. How they look stands in ``templates/``."""

from __future__ import annotations

import base64
import gzip
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader

from monai_zsreg.app.report.pictures import Views, blend, checkerboard, colored, data_url, edges, filled, grid_lines
from monai_zsreg.foreground import quantiles
from monai_zsreg.geometry import apply_affine
from monai_zsreg.io import Image, atomic_path
from monai_zsreg.io.images import as_nifti
from monai_zsreg.registration import DEFAULT_PRESET, RegistrationResult
from monai_zsreg.registration.confidence import LIMITS, Limits
from monai_zsreg.resample import resample

__all__ = ["save_html_report", "save_index", "save_interactive"]

_ORDER = {"FAIL": 0, "WARN": 1, "PASS": 2}
_METRICS = {
    "nmi": "normalized mutual information",
    "mi": "mutual information, nats",
    "dice": "Dice",
    "ssim": "SSIM",
    "mse": "mean squared difference",
    "tre": "error against the known transform",
    "landmark_tre": "error of the landmarks",
}
_AXES = ("left to right", "back to front", "feet to head")
_WHEN = ("before", "after")


def save_html_report(
    result: RegistrationResult,
    path: str | os.PathLike,
    name: str = "",
    report: Mapping[str, Any] | None = None,
    views: Views | None = None,
) -> None:
    """Write the page of one registration: a single file that opens offline.

    Args:
        result: of `monai_zsreg.register`.
        path: HTML file.
        name: of the pair, for the title.
        report: what is known beside the result, as ``report.json`` has it: ``input``, ``metrics``, ``versions``.
        views: of the pair, where they have been made already.
    """
    told = report or {}
    views = views or _views(result)
    unit = result.fixed_image.length_unit
    tables = [
        *_agreement(told.get("metrics", {}), unit),
        *_expected(result, unit),
        *_bent(told, unit),
        *_judged(result),
    ]
    text = _template("pair.html").render(
        title=name or "registration",
        verdict=result.verdict,
        reasons=result.reasons,
        sections=_sections(result, views, unit),
        tables=[*tables, _transform(result, unit)],
        matrix=[[f"{value:.6f}" for value in row] for row in result.affine],
        unit=unit,
        origin=_origin(result, told, unit),
        sides=any(plane.sides for plane in views.planes),
        volume=len(views.planes) > 1,
    )
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def save_index(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str = "Registrations") -> None:
    """Write an index of many registrations with a sortable table.

    Args:
        rows: in the order to show, with ``verdict``; their columns are shown as they are. ``link`` and ``thumbnail``,
            paths relative to the index, are used where a row has them.
        path: HTML file.
        title: its heading.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("link", "thumbnail")))
    text = _template("index.html").render(
        title=title,
        rows=rows,
        columns=columns,
        counts=", ".join(f"{sum(row['verdict'] == verdict for row in rows)} {verdict}" for verdict in _ORDER),
        order=_ORDER,
        pictures=any(row.get("thumbnail") for row in rows),
    )
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def save_interactive(fixed: Image, moved: Image, path: Any, title: str, library: Any) -> None:
    """Write a page on which one looks through both images in three planes; it opens offline.

    Args:
        fixed: image.
        moved: on the grid of ``fixed``.
        path: HTML file.
        title: of the page.
        library: file ``niivue.umd.js`` of NiiVue, which becomes part of the page.
    """
    images = []
    for name, image in (("fixed", fixed), ("moved", moved)):
        values = torch.nan_to_num(image.values[:1].float())
        low, high = quantiles(values[:, ::2, ::2])
        gray = ((values - low) / (high - low).clamp(min=1e-20) * 255).clamp(0, 255).round().to(torch.uint8)
        nifti = as_nifti(Image(gray, fixed.affine, {"place": fixed.meta["place"]} if "place" in fixed.meta else {}))
        images.append((name, base64.b64encode(gzip.compress(nifti.to_bytes(), 1)).decode()))
    # what ends a script in HTML must not stand in one
    text = Path(library).read_text(encoding="utf-8").replace("</script", "<\\/script")
    sides = fixed.length_unit == "mm" and not fixed.meta.get("notes")
    page = _template("interactive.html").render(
        title=title, library=text, images=images, sides=sides, volume=fixed.dims == 3
    )
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")


@cache
def _template(name: str) -> Any:
    folder = Path(__file__).parent / "templates"
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = _shown
    # relative, so that a colon is no protocol
    environment.filters["address"] = lambda path: "./" + quote(str(path))
    return environment.get_template(name)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _views(result: RegistrationResult) -> Views:
    channels = (result.options.get(f"{side}_channel", 0) for side in ("fixed", "moving"))
    return Views(result.fixed_image, result.moving_image, result.pull, *channels)


# --------------------------------------------------------------------------------------------------------------------
# pictures: sections of figures, each figure a plane
# --------------------------------------------------------------------------------------------------------------------


def _sections(result: RegistrationResult, views: Views, unit: str) -> list[dict[str, Any]]:
    planes, fixed = views.planes, [data_url(picture) for picture in views.fixed]
    moved = [data_url(picture) for picture in views.after]
    rows: list[dict[str, Any]] = [
        {
            "title": "Swipe: fixed to the left of the line, moved to the right",
            "figures": [_figure(*row) for row in zip(planes, fixed, moved, strict=True)],
        }
    ]
    kinds: list[tuple[str, Any]] = [
        ("Checkerboards of fixed with moving", checkerboard),
        ("Edges of the fixed image over the moving one", lambda one, two, _: edges(one, two)),
        ("Blend: fixed green, moving magenta", lambda one, two, _: blend(one, two)),
    ]
    for title, draw in kinds:
        figures = [
            _figure(plane, data_url(draw(one, two, plane)), caption=when)
            for when, others in (("before, by the headers", views.before), ("after", views.after))
            for plane, one, two in zip(planes, views.fixed, others, strict=True)
        ]
        rows.append({"title": title, "figures": figures})
    if result.covariance is not None:
        rows.append(_error_section(result, views, unit))
    if result.deformation is not None:
        rows += _bent_sections(result, views)
    if len(result.keypoints.get("fixed", ())):
        rows.append(_keypoint_section(result, views, fixed))
    return rows


def _figure(plane: Any, picture: str, over: str | None = None, caption: str = "", **more: Any) -> dict[str, Any]:
    width, height = plane.size
    shape = f"{width / height:.4f}"
    named = ", ".join(part for part in (plane.name, caption) if part)
    return {"picture": picture, "over": over, "caption": named, "shape": shape, "sides": plane.sides} | more


def _error_section(result: RegistrationResult, views: Views, unit: str) -> dict[str, Any]:
    maps = [plane.picture(result.expected_error(plane.grid)[0]) for plane in views.planes]
    return _colored_section(f"Expected error (root mean square), {unit}", views, maps, unit)


def _bent_sections(result: RegistrationResult, views: Views) -> list[dict[str, Any]]:
    found = result._deformed()
    still = torch.eye(found.dims + 1, dtype=torch.float64)
    grids = [
        _figure(plane, data_url(grid_lines(found, plane, gray)))
        for plane, gray in zip(views.planes, views.fixed, strict=True)
    ]
    changes = found.jacobian()
    maps = [plane.picture(resample(changes, found.grid, plane.grid, still, fill=1.0)[0]) for plane in views.planes]
    title = "Jacobian determinant of what bends: above 1 the moving image's tissue is larger, at 0 the map would fold"
    return [
        {"title": "Grid that the map bends, the matrix taken out", "figures": grids},
        _colored_section(title, views, maps, ""),
    ]


def _colored_section(title: str, views: Views, maps: list[np.ndarray], unit: str) -> dict[str, Any]:
    """A map over the fixed image, with its scale."""
    masks = [filled(gray > 0.05) for gray in views.fixed]
    inside = np.concatenate(
        [values[mask] if mask.any() else values.ravel() for values, mask in zip(maps, masks, strict=True)]
    )
    limits = float(inside.min()), float(inside.max())
    figures = [
        _figure(plane, data_url(colored(gray, values, limits, mask)))
        for plane, gray, values, mask in zip(views.planes, views.fixed, maps, masks, strict=True)
    ]
    return {"title": title, "figures": figures, "scale": limits, "unit": unit}


def _keypoint_section(result: RegistrationResult, views: Views, fixed: list[str]) -> dict[str, Any]:
    points, there = (np.asarray(result.keypoints[side], dtype=np.float64) for side in ("fixed", "moving"))
    back = torch.linalg.inv(torch.as_tensor(result.affine))
    ends = {"before": there, "after": apply_affine(back, torch.as_tensor(there)).numpy()}
    figures = []
    for when, others in ends.items():
        for plane, picture in zip(views.planes, fixed, strict=True):
            pairs = zip(100 * plane.position(points), 100 * plane.position(others), strict=True)
            lines = [tuple(round(float(v), 2) for v in (*one, *two)) for one, two in pairs]
            figures.append(_figure(plane, picture, caption=when, lines=lines))
    return {"title": "Keypoints of fixed (circles) and moving (crosses)", "figures": figures}


# --------------------------------------------------------------------------------------------------------------------
# tables: a title, a head, rows, and a note
# --------------------------------------------------------------------------------------------------------------------


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> dict[str, Any]:
    return {"title": title, "head": head, "rows": rows, "note": note}


def _agreement(metrics: Mapping[str, Any], unit: str) -> list[dict[str, Any]]:
    if not metrics:
        return []
    told = {"dice": f" of the {metrics['dice_of']}", "tre": f", {unit}", "landmark_tre": f", {unit}"}
    rows = [
        (title + told.get(key, ""), *(metrics[when].get(key) for when in _WHEN))
        for key, title in _METRICS.items()
        if key in metrics["after"]
    ]
    worse = [
        name
        for key, name, sign in (("ssim", "SSIM", 1), ("mse", "the mean squared difference", -1))
        if sign * (metrics["after"].get(key, 0.0) - metrics["before"].get(key, 0.0)) < 0
    ]
    note = ""
    if worse and metrics["after"]["nmi"] > metrics["before"]["nmi"]:
        note = (
            f"{' and '.join(worse)} became worse although the images agree better: these two expect both images to "
            "have one contrast, and between contrasts such as T1 and T2 the right answer can lower them."
        )
    return [_table("Before and after", (f"over the {metrics['region']}", *_WHEN), rows, note[:1].upper() + note[1:])]


def _expected(result: RegistrationResult, unit: str) -> list[dict[str, Any]]:
    if result.covariance is None:
        return []
    center = result.fixed_image.grid.center.numpy()[None]
    rows = [
        (f"{100 * level:.0f} % of such errors are below, {unit}", float(result.uncertainty_at(center, level)[0]))
        for level in (0.5, 0.9, 0.95)
    ]
    return [_table("Expected error in the middle of the fixed image", (), rows)]


def _bent(told: Mapping[str, Any], unit: str) -> list[dict[str, Any]]:
    found = told.get("deformation")
    if not found:
        return []
    words = {"median": "median", "p1": "1 % are below", "p95": "95 % are below", "p99": "99 % are below"}
    rows = [
        (f"{title}, {words.get(key, key + 'imum')}", value)
        for title, name in ((f"displacement, {unit}", "displacement"), ("Jacobian determinant", "determinant"))
        for key, value in found[name].items()
    ]
    rows.append(("points of the lattice where it folds", found["folds"]))
    return [_table("What the map adds to the matrix, over the foreground", (), rows, found["not_known"])]


def _judged(result: RegistrationResult) -> list[dict[str, Any]]:
    features = result.options.get("features", "mind") if result.preset == DEFAULT_PRESET else ""
    limits = LIMITS.get(features, Limits())
    rows = [
        (key.replace("_", " "), value, *getattr(limits, key, (None, None))) for key, value in result.measures.items()
    ]
    return (
        [_table("What the verdict rests on", ("measure", "value", "WARN beyond", "FAIL beyond"), rows)] if rows else []
    )


def _transform(result: RegistrationResult, unit: str) -> dict[str, Any]:
    values = result.parameters
    axes = _AXES if unit == "mm" else ("1", "2", "3")
    rows: list[tuple[str, float]] = [
        (f"translation {axis}, {unit}", v) for axis, v in zip(axes, values.translation, strict=False)
    ]
    rows += [(f"rotation {number}, degrees", v) for number, v in enumerate(values.rotation_deg, 1)]
    rows += [(f"scale {number}, %", 100 * v) for number, v in enumerate(values.scale, 1)]
    rows += [(f"shear {number}, %", 100 * v) for number, v in enumerate(values.shear, 1)]
    return _table("Transform, about the middle of the fixed image", (), rows)


def _origin(result: RegistrationResult, told: Mapping[str, Any], unit: str) -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = list(told.get("input", {}).items())
    lines += [("preset", result.preset), ("transform", result.transform), ("seconds", result.seconds)]
    for side in ("fixed", "moving"):
        lines.append((f"{side} grid", _grid(getattr(result, f"{side}_image"), unit)))
    return [*lines, *told.get("versions", {}).items()]


def _grid(image: Image, unit: str) -> str:
    size = " x ".join(str(n) for n in image.grid.shape)
    if unit == "pixels":
        return f"{size} pixels"
    return f"{size} voxels of {' x '.join(f'{s:.3g}' for s in image.grid.spacing)} mm"
