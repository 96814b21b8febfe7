# SPDX-License-Identifier: Apache-2.0
"""The pages: their pictures and numbers. The words stand in ``templates/``."""

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
from scipy.ndimage import binary_fill_holes

from monai_zsreg.app.report.pictures import (
    Plane,
    Views,
    blend,
    checkerboard,
    colored,
    data_url,
    edges,
    grid_lines,
)
from monai_zsreg.foreground import quantiles
from monai_zsreg.geometry import apply_affine
from monai_zsreg.io import Image, atomic_path
from monai_zsreg.io.images import as_nifti
from monai_zsreg.registration import DEFAULT_PRESET, RegistrationResult
from monai_zsreg.registration.confidence import LIMITS, Limits
from monai_zsreg.resample import resample

_ORDER = {"FAIL": 0, "WARN": 1, "PASS": 2}


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
    if views is None:
        channels = (result.options.get(f"{side}_channel", 0) for side in ("fixed", "moving"))
        views = Views(result.fixed_image, result.moving_image, result.pull, *channels)
    unit, center = result.fixed_image.length_unit, result.fixed_image.grid.center.numpy()[None]
    levels = () if result.covariance is None else (0.5, 0.9, 0.95)
    features = result.options.get("features", "mind") if result.preset == DEFAULT_PRESET else ""
    _write(
        path,
        "pair.html",
        title=name or "registration",
        result=result,
        report=told,
        sections=_sections(result, views, unit),
        expected={level: float(result.uncertainty_at(center, level)[0]) for level in levels},
        worse=_worse(told.get("metrics")),
        limits=LIMITS.get(features, Limits()),
        unit=unit,
        sides=any(plane.sides for plane in views.planes),
        volume=len(views.planes) > 1,
    )


def _worse(metrics: Mapping[str, Any] | None) -> str:
    """Which measures became worse although the images agree better, and expect both images to have one contrast."""
    if not metrics or metrics["after"]["nmi"] <= metrics["before"]["nmi"]:
        return ""
    signs = {"ssim": ("SSIM", 1), "mse": ("the mean squared difference", -1)}
    gains = {key: metrics["after"].get(key, 0.0) - metrics["before"].get(key, 0.0) for key in signs}
    return " and ".join(name for key, (name, sign) in signs.items() if sign * gains[key] < 0)


def save_index(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str = "Registrations") -> None:
    """Write an index of many registrations with a sortable table.

    Args:
        rows: in the order to show, with ``verdict``; their columns are shown as they are. ``link`` and ``thumbnail``,
            paths relative to the index, are used where a row has them.
        path: HTML file.
        title: its heading.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("link", "thumbnail")))
    _write(
        path,
        "index.html",
        title=title,
        rows=rows,
        columns=columns,
        counts=", ".join(f"{sum(row['verdict'] == verdict for row in rows)} {verdict}" for verdict in _ORDER),
        order=_ORDER,
        pictures=any(row.get("thumbnail") for row in rows),
    )


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
    _write(path, "interactive.html", title=title, library=text, images=images, sides=sides, volume=fixed.dims == 3)


def _write(path: str | os.PathLike, template: str, **context: Any) -> None:
    text = _templates().get_template(template).render(**context)
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


@cache
def _templates() -> Environment:
    folder = Path(__file__).parent / "templates"
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = _shown
    environment.filters["significant"] = "{:.3g}".format
    # relative, so that a colon is no protocol
    environment.filters["address"] = lambda path: "./" + quote(str(path))
    return environment


def _shown(value: Any) -> str:
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------------------------------------------------
# pictures: sections of figures, each figure a plane
# --------------------------------------------------------------------------------------------------------------------


def _sections(result: RegistrationResult, views: Views, unit: str) -> list[dict[str, Any]]:
    shown = list(zip(views.planes, views.fixed, views.before, views.after, strict=True))
    swipes = [_figure(plane, fixed, over=data_url(after)) for plane, fixed, _, after in shown]
    sections: list[dict[str, Any]] = [
        {"title": "Swipe: fixed to the left of the line, moved to the right", "figures": swipes}
    ]
    kinds: dict[str, Any] = {
        "Checkerboards of fixed with moving": checkerboard,
        "Edges of the fixed image over the moving one": lambda one, two, _: edges(one, two),
        "Blend: fixed green, moving magenta": lambda one, two, _: blend(one, two),
    }
    for title, draw in kinds.items():
        figures = [_figure(plane, draw(one, two, plane), "before, by the headers") for plane, one, two, _ in shown]
        figures += [_figure(plane, draw(one, two, plane), "after") for plane, one, _, two in shown]
        sections.append({"title": title, "figures": figures})
    if result.covariance is not None:
        maps = [plane.picture(result.expected_error(plane.grid)[0]) for plane in views.planes]
        sections.append(_colored(f"Expected error (root mean square), {unit}", views, maps, unit))
    if result.deformation is not None:
        bent = result.deformation
        figures = [_figure(plane, grid_lines(bent, plane, fixed)) for plane, fixed, *_ in shown]
        sections.append({"title": "Grid that the map bends, the matrix taken out", "figures": figures})
        changes = bent.jacobian()
        maps = [plane.picture(resample(changes, bent.grid, plane.grid, fill=1.0)[0]) for plane in views.planes]
        title = "Jacobian determinant of what bends: above 1 the moving image's tissue is larger, at 0 the map would"
        sections.append(_colored(f"{title} fold", views, maps, ""))
    if len(result.keypoints.get("fixed", ())):
        sections.append(
            {"title": "Keypoints of fixed (circles) and moving (crosses)", "figures": _keypoints(result, views)}
        )
    return sections


def _figure(plane: Plane, picture: np.ndarray, caption: str = "", **more: Any) -> dict[str, Any]:
    width, height = plane.size
    named = ", ".join(part for part in (plane.name, caption) if part)
    shape = f"{width / height:.4f}"
    return {"picture": data_url(picture), "caption": named, "shape": shape, "sides": plane.sides} | more


def _colored(title: str, views: Views, maps: list[np.ndarray], unit: str) -> dict[str, Any]:
    """A map over the fixed image, with its scale."""
    masks = [binary_fill_holes(gray > 0.05) for gray in views.fixed]
    inside = [values[mask] if mask.any() else values.ravel() for values, mask in zip(maps, masks, strict=True)]
    limits = min(float(values.min()) for values in inside), max(float(values.max()) for values in inside)
    figures = [
        _figure(plane, colored(gray, values, limits, mask))
        for plane, gray, values, mask in zip(views.planes, views.fixed, maps, masks, strict=True)
    ]
    return {"title": title, "figures": figures, "scale": limits, "unit": unit}


def _keypoints(result: RegistrationResult, views: Views) -> list[dict[str, Any]]:
    points, there = (np.asarray(result.keypoints[side], dtype=np.float64) for side in ("fixed", "moving"))
    back = torch.linalg.inv(torch.as_tensor(result.affine))
    ends = {"before": there, "after": apply_affine(back, torch.as_tensor(there)).numpy()}
    figures = []
    for when, others in ends.items():
        for plane, picture in zip(views.planes, views.fixed, strict=True):
            lines = np.hstack([100 * plane.position(points), 100 * plane.position(others)]).round(2).tolist()
            figures.append(_figure(plane, picture, when, lines=lines))
    return figures
