# SPDX-License-Identifier: Apache-2.0
"""Reports that people look at: one HTML file for a pair, which opens offline, and an index of many (extra ``report``).

Pictures are drawn by matplotlib and stand inside the file. What comes from the user is escaped.
"""

from __future__ import annotations

import base64
import io
import math
import os
import platform
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import monai
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch
from monai.utils import optional_import

import monai_zsreg
from monai_zsreg.geometry import Grid, apply_affine
from monai_zsreg.io.files import atomic_path
from monai_zsreg.metrics import similarity
from monai_zsreg.metrics.intensity import foreground_mask, scale_intensity
from monai_zsreg.registration.result import RegistrationResult
from monai_zsreg.report import (
    Plane,
    checkerboard,
    cut,
    mark_sides,
    matplotlib_figure,
    planes_of,
    save_overview,
    upright,
)

canny, _has_canny = optional_import("skimage.feature", name="canny")

__all__ = ["save_html_report", "save_index"]

_COLORS = {"PASS": "#1b7f3b", "WARN": "#a86a00", "FAIL": "#b3261e"}
_ORDER = {"FAIL": 0, "WARN": 1, "PASS": 2}
_METRICS = {
    "nmi": "normalized mutual information",
    "mi": "mutual information, nats",
    "dice": "Dice of the foregrounds",
    "ssim": "SSIM",
    "mse": "mean squared difference",
}


def save_html_report(
    result: RegistrationResult,
    path: str | os.PathLike,
    name: str = "",
    files: Mapping[str, str] | None = None,
    picture: bool = True,
) -> None:
    """Write a report of one registration: ``path``, and beside it the overview as a PNG of the same name.

    Args:
        result: of `monai_zsreg.register`.
        path: HTML file.
        name: of the pair, for the title.
        files: names of the images to show, such as ``{"fixed": "t1.nii.gz"}``.
        picture: whether to write the PNG.

    Raises:
        RegistrationError: matplotlib is not installed, or a file cannot be written.
    """
    target = Path(path)
    if picture:
        save_overview(result, target.with_suffix(".png"))
    views = _Views(result, path)
    body = [_verdict(result)]
    body.append(_figure("Swipe: fixed on the left, moved on the right of the line", views.swipe()))
    body.append(_figure("Checkerboards of fixed with moving", views.checkerboards()))
    body.append(_figure("Edges of the fixed image over the moving one", views.edges()))
    body.append(_figure("Blend: fixed green, moving magenta", views.blends()))
    spread = views.uncertainty()
    if spread is not None:
        body.append(_figure("Expected error, mm: red is high, blue is low", spread))
    points = views.keypoints()
    if points is not None:
        body.append(_figure("Keypoints of fixed (circles) and moving (crosses), before and after", points))
    body += [_numbers(result), _origin(result, files or {})]
    title = name or "registration"
    _write(target, f"{result.quality.verdict}: {title}", f"<h1>{escape(title)}</h1>" + "".join(body))


def save_index(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str = "Registrations") -> None:
    """Write an index of many registrations with a sortable table, worst first.

    Args:
        rows: ``name``, ``verdict``, ``reasons`` (text), ``score`` (None for unknown); further columns are shown as they
            are. ``link`` and ``thumbnail``, paths relative to the index, are used where a row has them.
        path: HTML file.
        title: its heading.

    Raises:
        RegistrationError: the file cannot be written.
    """
    ordered = sorted(rows, key=lambda row: (_ORDER.get(str(row["verdict"]), -1), _worst(row.get("score")), row["name"]))
    hidden = ("link", "thumbnail")
    columns = [name for name in dict.fromkeys(key for row in ordered for key in row) if name not in hidden]
    pictures = any(row.get("thumbnail") for row in ordered)
    counts = ", ".join(f"{sum(row['verdict'] == v for row in ordered)} {v}" for v in ("FAIL", "WARN", "PASS"))
    head = "".join(
        f'<th scope="col"><button type="button">{escape(column.replace("_", " "))}</button></th>' for column in columns
    )
    lines = []
    for row in ordered:
        cells = [_cell(row, column) for column in columns]
        if pictures:
            shown = row.get("thumbnail")
            image = f'<img loading="lazy" alt="" src="{_url(shown)}">' if shown else ""
            cells.insert(0, f"<td>{image}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    picture_head = "<th></th>" if pictures else ""
    table = (
        f'<div class="wide"><table class="sortable"><thead><tr>{picture_head}{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    _write(Path(path), title, f"<h1>{escape(title)}</h1><p>{len(ordered)} pairs: {counts}</p>{table}", _SORT)


# --------------------------------------------------------------------------------------------------------------------
# pictures
# --------------------------------------------------------------------------------------------------------------------


class _Views:
    """The planes of a pair, before and after, each as a base64 PNG."""

    def __init__(self, result: RegistrationResult, path: str | os.PathLike) -> None:
        self.figure_class = matplotlib_figure(path)
        self.result = result
        channel = MetaTensor(result.moving.as_tensor()[:1].float(), affine=result.moving.affine)
        before = ResampleToMatch(padding_mode="zeros")(channel, result.fixed[:1])
        images = [upright(image) for image in (result.fixed[:1], before, result.moved[:1])]
        self.fixed, self.before, self.after = (np.asarray(scale_intensity(image)[0].cpu()) for image in images)
        self.grid = Grid.of(images[0])
        self.planes = planes_of(self.fixed, self.grid.spacing)

    def _draw(self, rows: Sequence[tuple[str, Any]]) -> str:
        """A row of planes for each of ``rows``: a title and what draws a plane into axes, given the plane."""
        # planes side by side at one scale, widths in mm
        widths = [plane.width for plane in self.planes]
        height = max(plane.height for plane in self.planes)
        inch = 9.0 / sum(widths) if len(widths) > 1 else 4.2 / widths[0]
        two_d = len(self.planes) == 1
        shape = (1, len(rows)) if two_d else (len(rows), len(self.planes))
        size = (sum(widths) * inch * (len(rows) if two_d else 1), (height * inch + 0.35) * (1 if two_d else len(rows)))
        figure = self.figure_class(figsize=size, facecolor="black", layout="constrained")
        axes = figure.subplots(*shape, squeeze=False, width_ratios=widths * (len(rows) if two_d else 1))
        for number, (title, draw) in enumerate(rows):
            places = axes[0, number : number + 1] if two_d else axes[number]
            for place, plane in zip(places, self.planes, strict=True):
                draw(place, plane)
                place.set_axis_off()
                mark_sides(place, plane.sides)
            places[0].set_title(title, color="white", fontsize=10, loc="left")
        return _png(figure)

    def _before_and_after(self, draw: Any) -> str:
        return self._draw(
            [
                ("before (by the headers)", lambda place, plane: draw(place, plane, self.before)),
                ("after", lambda place, plane: draw(place, plane, self.after)),
            ]
        )

    def checkerboards(self) -> str:
        def draw(place: Any, plane: Plane, other: np.ndarray) -> None:
            board = checkerboard(cut(self.fixed, plane), cut(other, plane), plane.in_plane)
            place.imshow(board, cmap="gray", vmin=0, vmax=1, aspect=plane.aspect, interpolation="nearest")

        return self._before_and_after(draw)

    def edges(self) -> str:
        def draw(place: Any, plane: Plane, other: np.ndarray) -> None:
            place.imshow(cut(other, plane), cmap="gray", vmin=0, vmax=1, aspect=plane.aspect, interpolation="nearest")
            shape = cut(self.fixed, plane)
            if _has_canny:
                lines = canny(shape.astype(float), sigma=1.5).astype(float)
                shown = np.ma.masked_equal(lines, 0.0)
                place.imshow(shown, cmap="autumn", vmin=0, vmax=1, aspect=plane.aspect, interpolation="nearest")
            elif shape.max() > shape.min():
                place.contour(shape, levels=3, colors="red", linewidths=0.6)

        return self._before_and_after(draw)

    def blends(self) -> str:
        def draw(place: Any, plane: Plane, other: np.ndarray) -> None:
            one, two = (
                _ranks(cut(volume, plane), cut(np.asarray(foreground_mask(torch.as_tensor(volume)[None])[0]), plane))
                for volume in (self.fixed, other)
            )
            colors = np.stack([two, one, two], axis=-1)
            place.imshow(colors, aspect=plane.aspect, interpolation="nearest")

        return self._before_and_after(draw)

    def swipe(self) -> str:
        """Two pictures of the same size, one over the other."""
        pictures = []
        for volume in (self.fixed, self.after):

            def draw(place: Any, plane: Plane, shown: np.ndarray = volume) -> None:
                image = cut(shown, plane)
                place.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=plane.aspect, interpolation="nearest")

            pictures.append(self._draw([(" ", draw)]))
        return "|".join(pictures)

    def uncertainty(self) -> str | None:
        if not self.result.success or self.result.covariance is None:
            return None
        values = np.asarray(upright(self.result.uncertainty_map())[0].cpu())
        inside = self.fixed > 0.05
        shown = values[inside] if inside.any() else values
        low, high = float(shown.min()), float(shown.max())
        drawn: list[Any] = []

        def draw(place: Any, plane: Plane) -> None:
            below, above = cut(self.fixed, plane), cut(values, plane)
            place.imshow(below, cmap="gray", vmin=0, vmax=1, aspect=plane.aspect, interpolation="nearest")
            hidden = np.ma.masked_where(below <= 0.05, above)
            drawn.append(
                place.imshow(hidden, cmap="jet", vmin=low, vmax=max(high, low + 1e-6), alpha=0.45, aspect=plane.aspect)
            )
            if plane is self.planes[-1]:
                bar = place.figure.colorbar(drawn[-1], ax=place.figure.axes, shrink=0.8, aspect=25, pad=0.02)
                bar.solids.set_alpha(1.0)
                bar.ax.tick_params(colors="white", labelsize=8)
                bar.set_label("mm", color="white", fontsize=8)

        return self._draw([("root mean square", draw)])

    def keypoints(self) -> str | None:
        points = self.result.keypoints
        if not self.result.success or not len(points.get("fixed", ())):
            return None
        to_index = torch.linalg.inv(self.grid.affine)
        back = torch.linalg.inv(torch.as_tensor(self.result.affine))
        fixed = torch.as_tensor(np.asarray(points["fixed"]), dtype=torch.float64)
        moving = torch.as_tensor(np.asarray(points["moving"]), dtype=torch.float64)
        ends = {"before (by the headers)": moving, "after": apply_affine(back, moving)}
        starts = apply_affine(to_index, fixed).numpy()

        def drawer(other: torch.Tensor, volume: np.ndarray) -> Any:
            stops = apply_affine(to_index, other).numpy()

            def draw(place: Any, plane: Plane) -> None:
                image = cut(volume, plane)
                place.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=plane.aspect, interpolation="nearest")
                one, two = (plane.position(p) for p in (starts, stops))
                place.plot(np.stack([one[:, 0], two[:, 0]]), np.stack([one[:, 1], two[:, 1]]), color="cyan", lw=0.5)
                place.plot(*one.T, "o", mfc="none", mec="lime", ms=4)
                place.plot(*two.T, "x", color="orange", ms=4)
                place.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))

            return draw

        volumes = (self.fixed, self.fixed)
        return self._draw([(title, drawer(end, v)) for (title, end), v in zip(ends.items(), volumes, strict=True)])


def _ranks(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """How bright a pixel is among those of the object, 0 to 1; this takes the contrast out."""
    if not inside.any():
        return image
    return np.asarray(inside * np.searchsorted(np.sort(image[inside]), image) / inside.sum())


def _png(figure: Any) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=100, format="png", facecolor="black")
    return base64.b64encode(stream.getvalue()).decode()


# --------------------------------------------------------------------------------------------------------------------
# text
# --------------------------------------------------------------------------------------------------------------------


def _verdict(result: RegistrationResult) -> str:
    quality = result.quality
    reasons = quality.reasons or ["nothing speaks against it"]
    items = "".join(f"<li>{escape(reason)}</li>" for reason in [*reasons, *(set(result.warnings) - set(reasons))])
    note = (
        ""
        if result.success
        else "<p>No transform was found; what is shown as moved is the moving image by its header.</p>"
    )
    return (
        f'<section class="verdict" style="border-color:{_COLORS[quality.verdict]}">'
        f'<strong style="color:{_COLORS[quality.verdict]}">{quality.verdict}</strong><ul>{items}</ul>{note}</section>'
    )


def _figure(title: str, picture: str) -> str:
    images = [f"data:image/png;base64,{part}" for part in picture.split("|")]
    alt = escape(title, quote=True)
    if len(images) == 1:
        return f'<section><h2>{escape(title)}</h2><img alt="{alt}" src="{images[0]}"></section>'
    return (
        f'<section><h2>{escape(title)}</h2><div class="shown"><div class="swipe">'
        f'<img alt="fixed" src="{images[0]}">'
        f'<img class="over" alt="moved" src="{images[1]}"><div class="line"></div></div>'
        '<input class="slide" type="range" min="0" max="100" value="50" aria-label="position of the line">'
        "</div></section>"
    )


def _numbers(result: RegistrationResult) -> str:
    text = ""
    fixed = MetaTensor(result.fixed.as_tensor()[:1].float(), affine=result.fixed.affine)
    moving = MetaTensor(result.moving.as_tensor()[:1].float(), affine=result.moving.affine)
    before = similarity(fixed, ResampleToMatch(padding_mode="zeros")(moving, fixed))
    after = similarity(fixed, result.moved[:1])
    lines = [(title, before.get(key), after.get(key)) for key, title in _METRICS.items() if key in after]
    text += "<section><h2>Before and after</h2>" + _table(("over the foreground", "before", "after"), lines)
    if result.success and result.covariance is not None:
        center = Grid.of(result.fixed).center.numpy()[None]
        expected = [(f"{100 * p:.0f} % of such errors are below, mm", float(result.uncertainty_at(center, p)[0]))
                    for p in (0.5, 0.9, 0.95)]  # fmt: skip
        text += "</section><section><h2>Expected error in the middle of the fixed image</h2>" + _table(
            ("", ""), expected
        )
    if result.quality.measures:
        text += "</section><section><h2>What the verdict rests on</h2>"
        text += _table(("", ""), [(key.replace("_", " "), value) for key, value in result.quality.measures.items()])
    values = result.parameters
    axes = ("left to right", "posterior to anterior", "inferior to superior")
    named = [(f"translation {axis}, mm", v) for axis, v in zip(axes, values.translation, strict=False)]
    named += [(f"rotation {number + 1}, degrees", v) for number, v in enumerate(values.rotation_deg)]
    named += [(f"scale {number + 1}, %", 100 * v) for number, v in enumerate(values.scale)]
    named += [(f"shear {number + 1}, %", 100 * v) for number, v in enumerate(values.shear)]
    text += "</section><section><h2>Transform, about the middle of the fixed image</h2>" + _table(("", ""), named)
    rows = [[f"{v:.6f}" for v in row] for row in result.affine]
    text += "<p>Matrix: points of the fixed image to points of the moving image, RAS, mm</p>"
    text += _table((), rows) + "</section>"
    return text


def _origin(result: RegistrationResult, files: Mapping[str, str]) -> str:
    lines: list[tuple[Any, ...]] = [(key, str(value)) for key, value in files.items()]
    lines += [("preset", result.preset), ("transform", result.transform), ("seconds", result.seconds)]
    for key, image in (("fixed", result.fixed), ("moving", result.moving)):
        grid = Grid.of(image)
        size = " x ".join(str(n) for n in grid.shape)
        spacing = " x ".join(f"{s:.3g}" for s in grid.spacing)
        lines.append((f"{key} grid", f"{size} voxels of {spacing} mm"))
    versions = {"monai_zsreg": monai_zsreg.__version__, "monai": monai.__version__, "torch": torch.__version__}
    versions |= {"python": platform.python_version()}
    lines += [(key, version) for key, version in versions.items()]
    side = "<p>Right of a picture is the patient's left, as radiologists look at it.</p>"
    return f"<section><h2>Origin</h2>{_table(('', ''), lines)}{side}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "<thead><tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr></thead>" if any(head) else ""
    lines = "".join("<tr>" + "".join(_plain(cell) for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{lines}</tbody></table></div>'


def _plain(value: Any) -> str:
    """A cell; numbers are not broken over lines."""
    kind = ' class="number"' if isinstance(value, float) else ""
    return f"<td{kind}>{_text(value)}</td>"


def _text(value: Any) -> str:
    if value is None:
        return "&ndash;"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "&ndash;"
    return escape(str(value))


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    shown = _text(value)
    key = escape(str(_ORDER.get(str(value), -1) if column == "verdict" else "" if value is None else value), quote=True)
    if column == "verdict" and value in _COLORS:
        shown = f'<strong style="color:{_COLORS[value]}">{shown}</strong>'
    if column == "name" and row.get("link"):
        shown = f'<a href="{_url(row["link"])}">{shown}</a>'
    kind = ' class="number"' if isinstance(value, float) else ""
    return f'<td{kind} data-key="{key}">{shown}</td>'


def _url(path: Any) -> str:
    # "./" keeps a name with a colon from being read as a scheme
    return escape("./" + quote(str(path)), quote=True)


def _worst(score: Any) -> float:
    return float(score) if isinstance(score, (int, float)) and math.isfinite(score) else -math.inf


def _write(path: Path, title: str, body: str, script: str = "") -> None:
    policy = "default-src 'none'; img-src data: 'self' file:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    text = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{body}<script>{script or _SWIPE}</script></body></html>"
    )
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


_STYLE = """
body{font:16px/1.45 system-ui,sans-serif;max-width:64rem;margin:0 auto;padding:1rem;color:#1c1c1c;background:#fff}
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:1.4rem 0 .4rem}
img{max-width:100%;height:auto;display:block;background:#000}
.verdict{border-left:.5rem solid;padding:.3rem 1rem;background:#f5f5f5}.verdict strong{font-size:1.5rem}
.wide{overflow-x:auto}table{border-collapse:collapse}td,th{padding:.25rem .7rem;text-align:left;vertical-align:top;
border-bottom:1px solid #ddd}td{overflow-wrap:anywhere;max-width:28rem}
.number{white-space:nowrap}td img{width:9rem;max-width:none}
th button{font:inherit;font-weight:600;border:0;background:none;padding:0;
cursor:pointer}
.shown{display:inline-block;max-width:100%}.swipe{position:relative}
.swipe .over{position:absolute;inset:0;clip-path:inset(0 0 0 50%)}
.swipe .line{position:absolute;top:0;bottom:0;left:50%;border-left:2px solid #ff0}.slide{width:100%;margin:.4rem 0}
"""
_SWIPE = """
document.querySelectorAll('.slide').forEach(s=>s.addEventListener('input',()=>{const b=s.previousElementSibling;
b.querySelector('.over').style.clipPath='inset(0 0 0 '+s.value+'%)';b.querySelector('.line').style.left=s.value+'%'}));
"""
_SORT = """
document.querySelectorAll('table.sortable th button').forEach(b=>{let up=false;b.addEventListener('click',()=>{up=!up;
const h=b.parentElement,i=[...h.parentElement.children].indexOf(h),t=h.closest('table').tBodies[0];
const k=r=>r.children[i].dataset.key??'',c=(a,d)=>{const x=k(a),y=k(d),n=x-y;
return x!==''&&y!==''&&!isNaN(n)?n:x.localeCompare(y)};
[...t.rows].sort((a,d)=>(up?1:-1)*c(a,d)).forEach(r=>t.append(r));
h.parentElement.querySelectorAll('th').forEach(o=>o.removeAttribute('aria-sort'));
h.setAttribute('aria-sort',up?'ascending':'descending')})});
"""
