# SPDX-License-Identifier: Apache-2.0
"""Pictures of a registered pair (extra ``report``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.layers import GaussianFilter
from monai.transforms import Orientation, ResampleToMatch
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid
from monai_zsreg.io.files import atomic_path
from monai_zsreg.metrics.intensity import foreground_mask, otsu_threshold, scale_intensity
from monai_zsreg.registration.result import RegistrationResult

__all__ = [
    "Plane",
    "checkerboard",
    "cut",
    "mark_sides",
    "matplotlib_figure",
    "planes_of",
    "save_overview",
    "save_uncertainty",
    "upright",
]

_TILES = 8
# over the grey image; more hides the anatomy, less hides the color
_OPACITY = 0.45


def save_overview(result: RegistrationResult, path: str | os.PathLike) -> None:
    """Draw the pair before and after as one PNG: fixed, moving, moved, and checkerboards of fixed with each.

    Volumes are cut through the middle of the fixed foreground, axial first; right of the picture is the patient's
    left, as radiologists look at it, and sides are marked. "Before" shows the moving image where its header puts it.

    Args:
        result: of `monai_zsreg.register`.
        path: PNG file.

    Raises:
        RegistrationError: matplotlib is not installed.
    """
    figure_class = matplotlib_figure(path)
    channel = MetaTensor(result.moving.as_tensor()[:1].float(), affine=result.moving.affine)
    before = ResampleToMatch(padding_mode="zeros")(channel, result.fixed[:1])
    images = [upright(image) for image in (result.fixed[:1], before, result.moved[:1])]
    fixed, moving, moved = (np.asarray(scale_intensity(image)[0].cpu()) for image in images)
    spacing = Grid.of(images[0]).spacing
    planes = planes_of(fixed, spacing)
    columns = ["fixed", "moving, by its header", "moved", "fixed | before", "fixed | after"]
    figure = figure_class(figsize=(2.6 * len(columns), 2.8 * len(planes)), facecolor="black", layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(planes), len(columns)))
    for row, plane in zip(axes, planes, strict=True):
        shown = [cut(volume, plane) for volume in (fixed, moving, moved)]
        shown += [checkerboard(shown[0], other, plane.in_plane) for other in shown[1:]]
        for place, picture in zip(row, shown, strict=True):
            place.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect=plane.aspect, interpolation="nearest")
            place.set_axis_off()
        mark_sides(row[0], plane.sides)
    for place, title in zip(axes[0], columns, strict=True):
        place.set_title(title, color="white", fontsize=11)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=90, format="png", facecolor="black")


def save_uncertainty(fixed: MetaTensor, displacement: MetaTensor, path: str | os.PathLike) -> None:
    """Draw the uncertainty of a registration in color over the fixed image as one PNG: red is high, blue is low.

    The fixed image alone stands beside it (2D) or above (3D). Volumes are cut as in `save_overview`, and sides are
    marked as there. Color shows on the object only, and its scale covers the foreground of the whole image.

    Args:
        fixed: ``[C, *spatial]``; the first channel is shown.
        displacement: standard deviation of the displacement in mm on the same grid, ``[1, *spatial]``, finite, as
            `Uncertainty.displacement_map` gives it.
        path: PNG file.

    Raises:
        RegistrationError: matplotlib is not installed, or a map that lies on another grid or is not finite.
    """
    figure_class = matplotlib_figure(path)
    if displacement.shape[1:] != fixed.shape[1:]:
        raise RegistrationError("displacement", tuple(displacement.shape), f"[1, {tuple(fixed.shape[1:])}], as fixed")
    if not bool(displacement.isfinite().all()):
        raise RegistrationError("displacement", "infinity or NaN", "finite numbers: nothing is known about the spread")
    channel = MetaTensor(fixed.as_tensor()[:1].float().cpu(), affine=fixed.affine)
    spread = MetaTensor(displacement.as_tensor()[:1].float().cpu(), affine=fixed.affine)
    gray, color = (upright(image) for image in (channel, spread))
    spacing = Grid.of(gray).spacing
    inside = np.asarray(foreground_mask(gray)[0])
    inside = inside if inside.any() else np.ones_like(inside)
    anatomy, values = np.asarray(scale_intensity(gray)[0]), np.asarray(color.as_tensor()[0])
    low, high = _limits(values[inside])

    planes = planes_of(anatomy, spacing)
    darkest = 0.3 * otsu_threshold(scale_intensity(gray))
    cuts = []
    for plane in planes:
        below, above = (cut(volume, plane) for volume in (anatomy, values))
        shadow = inside if plane.axis < 0 else np.asarray(inside.any(axis=plane.axis, keepdims=True))
        window = _window(cut(shadow, replace(plane, index=0)))
        cuts.append((below[window], np.ma.masked_where(~_object(below, plane.in_plane, darkest), above)[window]))
    # widths in mm give all planes about one scale; a slice has its two pictures in a row, a volume its three planes
    widths = [below.shape[1] * plane.in_plane[0] for (below, _), plane in zip(cuts, planes, strict=True)]
    heights = [below.shape[0] * plane.in_plane[1] for (below, _), plane in zip(cuts, planes, strict=True)]
    inch = 3.0 / max(heights)
    two_d = len(planes) == 1
    rows, columns = (1, 2) if two_d else (2, 3)
    size = ((2 if two_d else 1) * sum(widths) * inch + 0.3 * columns + 1.3, rows * 3.4)
    figure = figure_class(figsize=size, facecolor="black", layout="constrained")
    axes = figure.subplots(rows, columns, width_ratios=widths * (columns // len(widths)), squeeze=False)
    for (below, above), plane, places in zip(cuts, planes, axes if two_d else axes.transpose(), strict=True):
        aspect = plane.aspect
        for place in places:
            place.imshow(below, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
            place.set_axis_off()
            mark_sides(place, plane.sides)
        colored = places[1].imshow(
            above, cmap="jet", vmin=low, vmax=high, alpha=_OPACITY, aspect=aspect, interpolation="nearest"
        )
    bar = figure.colorbar(colored, ax=axes, shrink=0.8, aspect=25, pad=0.02)
    bar.solids.set_alpha(1.0)
    bar.set_label("standard deviation of the displacement, mm", color="white", fontsize=8)
    bar.ax.tick_params(colors="white", labelsize=9)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=110, format="png", facecolor="black")


def _window(mask: np.ndarray) -> tuple[slice, ...]:
    """What to show of a plane: the box around the foreground with a margin, so that the object fills the picture."""
    window = []
    for axis, length in enumerate(mask.shape):
        where = np.flatnonzero(mask.any(axis=1 - axis))
        margin = max(2, (where[-1] - where[0]) // 10) if len(where) else length
        first, last = (where[0], where[-1]) if len(where) else (0, length - 1)
        window.append(slice(max(0, int(first - margin)), int(last + margin) + 1))
    return tuple(window)


def _object(plane: np.ndarray, in_plane: Sequence[float], darkest: float) -> np.ndarray:
    """The object with a smooth edge and without holes: color on the foreground alone would hide the anatomy."""
    sides = in_plane[::-1]
    sigma = 0.015 * max(n * s for n, s in zip(plane.shape, sides, strict=True))
    smooth = GaussianFilter(2, [sigma / s for s in sides])(torch.as_tensor(plane.copy())[None, None])
    mask = np.asarray(smooth[0, 0] > darkest)
    inside = np.ones_like(mask)
    for axis in (0, 1):  # between the first and the last pixel of the row, and of the column
        after = np.maximum.accumulate(mask, axis=axis)
        before = np.flip(np.maximum.accumulate(np.flip(mask, axis), axis=axis), axis)
        inside &= after & before
    return inside


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    # one value everywhere would leave the color bar without a length
    return (low, high) if high - low > 1e-6 * max(high, 1e-6) else (max(0.0, low - 0.5e-3), high + 0.5e-3)


def matplotlib_figure(path: str | os.PathLike) -> Any:
    """Matplotlib's figure class.

    Raises:
        RegistrationError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RegistrationError(
            "path", str(path), 'matplotlib for pictures; install it with pip install "monai-zsreg[report]"'
        ) from error
    return Figure


def upright(image: Tensor) -> MetaTensor:
    """The image with its axes along the patient's, so that its planes are pictures."""
    # array axes towards left, posterior, superior: rows and columns of the pictures then follow by transposing
    return Orientation(axcodes="LPS"[: image.ndim - 1], labels=None)(image)  # type: ignore[return-value]


@dataclass(frozen=True)
class Plane:
    """A plane through the middle of an upright volume, as a picture.

    Attributes:
        axis: at right angles to the plane; -1 in 2D.
        index: where along that axis.
        sides: letters for left, right, top and bottom of the picture.
        in_plane: spacing of the plane's axes, mm; the picture's columns first.
        shape: rows and columns of the picture.
    """

    axis: int
    index: int
    sides: tuple[str, str, str, str]
    in_plane: tuple[float, float]
    shape: tuple[int, int]

    @property
    def aspect(self) -> float:
        """Height of a pixel over its width."""
        return self.in_plane[1] / self.in_plane[0]

    @property
    def width(self) -> float:
        """Of the picture, mm."""
        return self.shape[1] * self.in_plane[0]

    @property
    def height(self) -> float:
        """Of the picture, mm."""
        return self.shape[0] * self.in_plane[1]

    def position(self, points: np.ndarray) -> np.ndarray:
        """Column and row of voxel indices ``[N, D]`` in the picture, ``[N, 2]``."""
        kept = np.delete(points, self.axis, axis=1) if self.axis >= 0 else points
        rows = self.shape[0] - 1 - kept[:, 1] if self.axis in (0, 1) else kept[:, 1]
        return np.stack([kept[:, 0], rows], axis=1)


def planes_of(volume: np.ndarray, spacing: Sequence[float]) -> list[Plane]:
    """The planes to show of an upright image, through the middle of what it shows: axial, coronal, sagittal."""
    if volume.ndim == 2:
        return [Plane(-1, 0, ("R", "L", "A", "P"), (spacing[0], spacing[1]), (volume.shape[1], volume.shape[0]))]
    planes = []
    sides = {2: ("R", "L", "A", "P"), 1: ("R", "L", "S", "I"), 0: ("A", "P", "S", "I")}
    for axis in (2, 1, 0):
        middle = round(float(np.average(np.arange(volume.shape[axis]), weights=_profile(volume, axis) + 1e-9)))
        one, two = (a for a in range(3) if a != axis)
        planes.append(
            Plane(axis, middle, sides[axis], (spacing[one], spacing[two]), (volume.shape[two], volume.shape[one]))
        )
    return planes


def _profile(volume: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(volume.sum(axis=tuple(a for a in range(volume.ndim) if a != axis)))


def cut(volume: np.ndarray, plane: Plane) -> np.ndarray:
    """The plane of a volume as a picture."""
    picture = (volume if plane.axis < 0 else np.take(volume, plane.index, axis=plane.axis)).T
    # superior is up, and it is the last axis of the coronal and the sagittal plane
    return picture[::-1] if plane.axis in (0, 1) else picture


def checkerboard(first: np.ndarray, second: np.ndarray, in_plane: Sequence[float]) -> np.ndarray:
    """Tiles of two pictures by turns."""
    # tiles are square in mm, or thick slices would make stripes; rows of the picture are the second axis of the plane
    rows, columns = (index * s for index, s in zip(np.indices(first.shape), in_plane[::-1], strict=True))
    tile = max(columns.max(), rows.max()) / _TILES
    return np.where((rows // tile + columns // tile) % 2 == 0, first, second)


def mark_sides(place: Any, sides: tuple[str, str, str, str]) -> None:
    """Write the letters of the patient's sides at the edges of a picture."""
    positions = [(0.02, 0.5), (0.98, 0.5), (0.5, 0.97), (0.5, 0.03)]
    for letter, (x, y) in zip(sides, positions, strict=True):
        place.text(
            x,
            y,
            letter,
            color="yellow",
            fontsize=10,
            transform=place.transAxes,
            ha="center",
            va="center",
            clip_on=False,
        )
