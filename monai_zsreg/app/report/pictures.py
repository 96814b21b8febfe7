# SPDX-License-Identifier: Apache-2.0
"""Pictures of a registered pair, drawn from a few planes: no volume is resampled for them.

Every picture runs from the patient's right to left, from front to back and from head to feet, as radiologists look at
it, whatever the order of the array's axes.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nibabel.orientations import io_orientation
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from scipy.ndimage import binary_fill_holes, convolve1d
from torch import Tensor

from monai_zsreg.foreground import background_value, foreground_mask, quantiles
from monai_zsreg.geometry import Grid, apply_affine
from monai_zsreg.io import Image, atomic_path
from monai_zsreg.registration.displacement import Deformation, Transform, move
from monai_zsreg.resample import resample

_TILES = 8
# lines of a grid along the longer side of a picture
_LINES = 24
# pixels a side above which a picture shows every second, third, ... one
_LARGEST = 700
_OPACITY = 0.45
# voxels along an axis that tell how bright an image is
_ENOUGH = 64
_NAMES = {2: "axial", 1: "coronal", 0: "sagittal"}
_LETTERS = "RAS", "LPI"


@dataclass(frozen=True)
class Plane:
    """A plane of an image as a picture.

    Attributes:
        name: ``"axial"``, ``"coronal"`` or ``"sagittal"`` in 3D, ``""`` in 2D.
        grid: of the plane; its first axis runs along the picture, its second one down, a third one is one voxel thick.
        sides: letters of the patient's sides, left, right, top and bottom; None where they are not known.
    """

    name: str
    grid: Grid
    sides: tuple[str, ...] | None

    @property
    def size(self) -> tuple[float, float]:
        """Width and height, mm or pixels."""
        width, height, *_ = (n * s for n, s in zip(self.grid.shape, self.grid.spacing, strict=True))
        return width, height

    def picture(self, values: Tensor) -> np.ndarray:
        """Values on the plane's grid as rows and columns."""
        return values.reshape(values.shape[:2]).mT.cpu().numpy()

    def position(self, points: np.ndarray) -> np.ndarray:
        """Where world points ``[N, D]`` lie in the picture: fractions of its width and of its height, ``[N, 2]``."""
        index = apply_affine(torch.linalg.inv(self.grid.affine), torch.as_tensor(points)).numpy()
        return (index[:, :2] + 0.5) / self.grid.shape[:2]


def planes_of(image: Image, channel: int = 0) -> list[Plane]:
    """The planes to show: in 3D an axial, a coronal and a sagittal one through the middle of what the image shows."""
    grid = image.grid
    flat = grid.dims == 2 and "place" in image.meta  # a slice in space
    lines = torch.tensor(image.meta["place"], dtype=torch.float64)[:3, :2] if flat else grid.affine[:-1, :-1]
    # for each array axis the world axis that it runs along, each of them once
    world = [int(axis) for axis in io_orientation(np.pad(lines.numpy(), (0, 1)))[:, 0]]
    known = image.length_unit == "mm" and not image.meta.get("notes")
    if grid.dims == 2:
        (normal,) = {0, 1, 2} - set(world)
        return [_plane(grid, lines, world, None, _NAMES[normal] if flat and known else "", known)]
    step = [max(1, n // _ENOUGH) for n in grid.shape]
    coarse = torch.nan_to_num(image.values[channel, :: step[0], :: step[1], :: step[2]].float())
    low, high = quantiles(coarse)
    weights = ((coarse - low) / (high - low).clamp(min=1e-20)).clamp(0.0, 1.0) + 1e-6
    planes = []
    for normal in (2, 1, 0):
        axis = world.index(normal)
        profile = weights.sum(dim=[a for a in range(3) if a != axis])
        middle = float((profile * torch.arange(len(profile))).sum() / profile.sum()) * step[axis]
        planes.append(_plane(grid, lines, world, (axis, round(middle)), _NAMES[normal], known))
    return planes


def _plane(grid: Grid, lines: Tensor, world: list[int], cut: tuple[int, int] | None, name: str, known: bool) -> Plane:
    """The plane through ``cut``, an axis and an index, with its other axes turned as `Plane` has them."""
    turn = torch.zeros_like(grid.affine)
    turn[-1, -1] = 1.0
    shape: list[int] = []
    letters: list[str] = []
    for axis in sorted(range(grid.dims), key=world.__getitem__):
        if cut is not None and axis == cut[0]:
            continue
        step = -(-grid.shape[axis] // _LARGEST)
        count = -(-grid.shape[axis] // step)
        back = bool(lines[world[axis], axis] > 0)
        turn[axis, len(shape)], turn[axis, -1] = (-step, (count - 1) * step) if back else (step, 0)
        shape.append(count)
        letters += [ends[world[axis]] for ends in _LETTERS]
    if cut is not None:
        turn[cut[0], 2], turn[cut[0], -1] = 1, min(cut[1], grid.shape[cut[0]] - 1)
        shape.append(1)
    return Plane(name, Grid(tuple(shape), grid.affine @ turn), tuple(letters) if known else None)


class Views:
    """What the pictures of a pair are made of.

    Attributes:
        planes: of the fixed image.
        fixed: a picture for each plane, gray values in [0, 1].
        before: the moving image where the headers put it.
        after: the moving image through the transform.

    Args:
        fixed, moving: the images.
        transform: fixed world to moving world, a matrix ``(D+1, D+1)`` or a `Deformation`.
        fixed_channel, moving_channel: to show.
    """

    def __init__(
        self, fixed: Image, moving: Image, transform: Any, fixed_channel: int = 0, moving_channel: int = 0
    ) -> None:
        self.planes = planes_of(fixed, fixed_channel)
        still = torch.eye(fixed.dims + 1, dtype=torch.float64)
        pull = transform if isinstance(transform, Deformation) else torch.as_tensor(transform, dtype=torch.float64)
        (self.fixed,) = self._cuts(fixed, fixed_channel, still)
        self.before, self.after = self._cuts(moving, moving_channel, still, pull)

    def _cuts(self, image: Image, channel: int, *transforms: Transform) -> list[list[np.ndarray]]:
        """The planes through an image, for each transform."""
        values = image.values[channel][None]
        coarse = values[0][tuple(slice(None, None, max(1, n // _ENOUGH)) for n in values.shape[1:])].float()
        low, high = (float(end) for end in quantiles(coarse[torch.isfinite(coarse)]))
        fill = background_value(coarse)

        def cut(plane: Plane, transform: Transform) -> np.ndarray:
            gray = move(transform, values, image.grid, plane.grid, fill=fill, dtype=torch.float32)[0]
            scaled = (torch.nan_to_num(gray, nan=low) - low) / max(high - low, 1e-20)
            return plane.picture(scaled.clamp(0.0, 1.0))

        return [[cut(plane, transform) for plane in self.planes] for transform in transforms]


# --------------------------------------------------------------------------------------------------------------------
# pictures of a plane; gray [H, W] or color [H, W, 3], values in [0, 1]
# --------------------------------------------------------------------------------------------------------------------


def checkerboard(first: np.ndarray, second: np.ndarray, plane: Plane) -> np.ndarray:
    """Tiles of two pictures by turns; they are square in mm, or thick slices would make stripes."""
    tile = max(plane.size) / _TILES
    y, x = np.indices(first.shape)
    columns, rows = (
        index * length / n // tile for index, length, n in zip((x, y), plane.size, first.shape[::-1], strict=True)
    )
    return np.where((rows + columns) % 2 == 0, first, second)


def edges(shape: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The edges of one picture in orange over another."""
    smooth = shape
    for axis in (0, 1):
        smooth = convolve1d(smooth, np.array([1, 4, 6, 4, 1]) / 16, axis, mode="nearest")
    slope_y, slope_x = np.gradient(smooth)
    size = np.pad(np.hypot(slope_x, slope_y), 1)
    # an edge is where the slope is steeper than on both sides of it, across the edge
    across = np.abs(slope_x) > np.abs(slope_y)
    diagonal = np.minimum(np.abs(slope_x), np.abs(slope_y)) > 0.4142 * np.maximum(np.abs(slope_x), np.abs(slope_y))
    dx = np.where(diagonal | across, np.sign(slope_x), 0).astype(int)
    dy = np.where(diagonal | ~across, np.sign(slope_y), 0).astype(int)
    y, x = np.indices(shape.shape) + 1
    here = size[y, x]
    thin = (here >= size[y + dy, x + dx]) & (here > size[y - dy, x - dx])
    thin &= here > max(0.02, 0.25 * float(np.quantile(here, 0.98)))
    return np.where(thin[..., None], np.array([1.0, 0.55, 0.0]), below[..., None])


def blend(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One picture in green, the other in magenta: gray where both are as bright, whatever their contrasts."""
    one, two = _ranks(first), _ranks(second)
    return np.stack([two, one, two], axis=-1)


def _ranks(image: np.ndarray) -> np.ndarray:
    """How bright a pixel is among those of the object, 0 to 1; this takes the contrast out."""
    inside = foreground_mask(torch.from_numpy(image.copy())[None])[0].numpy()
    if not inside.any():
        return image
    return np.asarray(inside * np.searchsorted(np.sort(image[inside]), image) / inside.sum())


def colored(below: np.ndarray, values: np.ndarray, limits: tuple[float, float], object_mask: np.ndarray) -> np.ndarray:
    """Values in color, red high and blue low, over a gray picture where ``object_mask`` is True."""
    scaled = np.clip((values - limits[0]) / max(limits[1] - limits[0], 1e-20), 0.0, 1.0)
    color = np.stack([1.5 - np.abs(4 * scaled - middle) for middle in (3, 2, 1)], axis=-1).clip(0.0, 1.0)
    gray = np.repeat(below[..., None], 3, axis=-1)
    return np.where(object_mask[..., None], (1 - _OPACITY) * gray + _OPACITY * color, gray)


def grid_lines(deformation: Deformation, plane: Plane, below: np.ndarray) -> np.ndarray:
    """Where a map without its affine part takes each point, as a grid over a picture: straight where nothing moves."""
    index = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in plane.grid.shape])
    points = deformation.apply(apply_affine(plane.grid.affine, index.view(-1, plane.grid.dims)))
    places = plane.position(apply_affine(torch.linalg.inv(deformation.affine), points).numpy())
    cells = np.floor(places * plane.size * _LINES / max(plane.size))
    lines = np.zeros(below.shape, dtype=bool)
    for cell in cells.T:
        number = plane.picture(torch.from_numpy(cell).view(plane.grid.shape))
        lines[1:] |= np.diff(number, axis=0) != 0
        lines[:, 1:] |= np.diff(number, axis=1) != 0
    return np.where(lines[..., None], np.array([1.0, 0.85, 0.0]), 0.7 * below[..., None])


# --------------------------------------------------------------------------------------------------------------------
# files
# --------------------------------------------------------------------------------------------------------------------


def _pillow(picture: np.ndarray, size: tuple[int, int] | None = None) -> Any:
    image = Pillow.fromarray((picture * 255 + 0.5).astype(np.uint8))
    return image if size is None else image.resize(size, Pillow.Resampling.BILINEAR)


def data_url(picture: np.ndarray) -> str:
    """A picture as the address of an ``<img>`` that holds it."""
    stream = io.BytesIO()
    _pillow(picture).save(stream, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def save_overview(views: Views, path: str | os.PathLike) -> None:
    """Draw a pair before and after as one PNG: fixed, moving, moved, and checkerboards of fixed with each."""
    rows = []
    for plane, *shown in zip(views.planes, views.fixed, views.before, views.after, strict=True):
        boards = [checkerboard(shown[0], other, plane) for other in shown[1:]]
        rows.append([(plane, picture) for picture in (*shown, *boards)])
    titles = ["fixed", "moving, by its header", "moved", "fixed | before", "fixed | after"]
    _save_sheet(path, rows, titles)


def save_spread(fixed: Image, values: Tensor, path: str | os.PathLike, channel: int = 0) -> None:
    """Draw a standard deviation, mm, ``[1, *spatial]``, over the fixed image as one PNG: red is high, blue is low."""
    views = Views(fixed, fixed, np.eye(fixed.dims + 1), channel, channel)
    inside = values[foreground_mask(torch.nan_to_num(fixed.values[channel][None].float()))]
    inside = inside if inside.numel() else values
    low, high = float(inside.min()), float(inside.max())
    limits = (low, high) if high - low > 1e-6 * max(high, 1e-6) else (max(0.0, low - 0.5e-3), high + 0.5e-3)
    rows: list[list[tuple[Plane, np.ndarray]]] = []
    for plane, gray in zip(views.planes, views.fixed, strict=True):
        above = plane.picture(resample(values.cpu(), fixed.grid, plane.grid, fill=0.0)[0])
        rows.append([(plane, gray), (plane, colored(gray, above, limits, binary_fill_holes(gray > 0.05)))])
    _save_sheet(path, rows, ["fixed", f"standard deviation, mm: blue {limits[0]:.3g}, red {limits[1]:.3g}"])


def _save_sheet(
    path: str | os.PathLike, rows: Sequence[Sequence[tuple[Plane, np.ndarray]]], titles: Sequence[str]
) -> None:
    """Pictures in rows and columns, with titles and the patient's sides, at one scale."""
    longest = max(max(plane.size) for row in rows for plane, _ in row)
    scale = 240 / longest
    width = max(round(plane.size[0] * scale) for row in rows for plane, _ in row)
    heights = [max(round(plane.size[1] * scale) for plane, _ in row) for row in rows]
    gap, head = 8, 22
    columns = len(rows[0])
    sheet = Pillow.new("RGB", (columns * (width + gap) + gap, head + sum(heights) + gap * len(heights)))
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(13), ImageFont.load_default(12)
    for number, title in enumerate(titles):
        draw.text((gap + number * (width + gap) + width / 2, head / 2), title, "white", font, anchor="mm")
    top = head
    for row, height in zip(rows, heights, strict=True):
        for number, (plane, picture) in enumerate(row):
            size = max(1, round(plane.size[0] * scale)), max(1, round(plane.size[1] * scale))
            left, upper = gap + number * (width + gap) + (width - size[0]) // 2, top + (height - size[1]) // 2
            sheet.paste(_pillow(picture, size), (left, upper))
            if plane.sides is not None and number == 0:
                places = ((8, size[1] / 2), (size[0] - 8, size[1] / 2), (size[0] / 2, 8), (size[0] / 2, size[1] - 8))
                for letter, (x, y) in zip(plane.sides, places, strict=True):
                    draw.text((left + x, upper + y), letter, "yellow", small, anchor="mm")
        top += height + gap
    with atomic_path(path) as partial:
        sheet.save(partial, "PNG")
