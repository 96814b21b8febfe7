# SPDX-License-Identifier: Apache-2.0
"""Pictures of a registered pair (extra ``report``)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.transforms import Orientation, ResampleToMatch
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid
from monai_zsreg.io.files import atomic_path
from monai_zsreg.metrics.intensity import scale_intensity
from monai_zsreg.registration.result import RegistrationResult

__all__ = ["save_overview"]

_TILES = 8


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RegistrationError(
            "path", str(path), 'matplotlib for pictures; install it with pip install "monai-zsreg[report]"'
        ) from error

    channel = MetaTensor(result.moving.as_tensor()[:1].float(), affine=result.moving.affine)
    before = ResampleToMatch(padding_mode="zeros")(channel, result.fixed[:1])
    images = [_upright(image) for image in (result.fixed[:1], before, result.moved[:1])]
    fixed, moving, moved = (np.asarray(scale_intensity(image)[0].cpu()) for image in images)
    spacing = Grid.of(images[0]).spacing
    planes = _planes(fixed)
    columns = ["fixed", "moving, by its header", "moved", "fixed | before", "fixed | after"]
    figure = Figure(figsize=(2.6 * len(columns), 2.8 * len(planes)), facecolor="black", layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(planes), len(columns)))
    for row, (axis, index, sides) in zip(axes, planes, strict=True):
        shown = [_cut(volume, axis, index) for volume in (fixed, moving, moved)]
        in_plane = [s for a, s in enumerate(spacing) if a != axis]
        shown += [_checkerboard(shown[0], other, in_plane) for other in shown[1:]]
        for place, picture in zip(row, shown, strict=True):
            place.imshow(
                picture, cmap="gray", vmin=0, vmax=1, aspect=in_plane[1] / in_plane[0], interpolation="nearest"
            )
            place.set_axis_off()
        _mark(row[0], sides)
    for place, title in zip(axes[0], columns, strict=True):
        place.set_title(title, color="white", fontsize=11)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=90, format="png", facecolor="black")


def _upright(image: Tensor) -> MetaTensor:
    # array axes towards left, posterior, superior: rows and columns of the pictures then follow by transposing
    return Orientation(axcodes="LPS"[: image.ndim - 1], labels=None)(image)  # type: ignore[return-value]


def _planes(volume: np.ndarray) -> list[tuple[int, int, tuple[str, str, str, str]]]:
    """Axis at right angles to the plane (-1 in 2D), position, and letters for left, right, top, bottom."""
    if volume.ndim == 2:
        return [(-1, 0, ("R", "L", "A", "P"))]
    middle = [int(np.average(np.arange(n), weights=_profile(volume, a) + 1e-9)) for a, n in enumerate(volume.shape)]
    return [
        (2, middle[2], ("R", "L", "A", "P")),
        (1, middle[1], ("R", "L", "S", "I")),
        (0, middle[0], ("A", "P", "S", "I")),
    ]


def _profile(volume: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(volume.sum(axis=tuple(a for a in range(volume.ndim) if a != axis)))


def _cut(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    plane = volume if axis < 0 else np.take(volume, index, axis=axis)
    plane = plane.T
    # superior is up, and it is the last axis of the coronal and the sagittal plane
    return plane[::-1] if axis in (0, 1) else plane


def _checkerboard(first: np.ndarray, second: np.ndarray, in_plane: list[float]) -> np.ndarray:
    # tiles are square in mm, or thick slices would make stripes; rows of the picture are the second axis of the plane
    rows, columns = (index * s for index, s in zip(np.indices(first.shape), in_plane[::-1], strict=True))
    tile = max(columns.max(), rows.max()) / _TILES
    return np.where((rows // tile + columns // tile) % 2 == 0, first, second)


def _mark(place: Any, sides: tuple[str, str, str, str]) -> None:
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
