# SPDX-License-Identifier: Apache-2.0
"""What the benchmark computes with: one-channel images as numpy arrays, and its own resampling.

The judge does not share the resampling of what it judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import ndimage

from monai_zsreg.errors import RegistrationError

__all__ = ["Volume", "background_value", "foreground", "labels_dice", "moved", "read_volume", "transformed"]


@dataclass(frozen=True)
class Volume:
    """An image with one channel.

    Args:
        values: ``[*spatial]``, 2D or 3D.
        affine: ``(D+1, D+1)`` float64, index to world (RAS mm; pixels for slices and photographs).
    """

    values: np.ndarray
    affine: np.ndarray

    @property
    def dims(self) -> int:
        return self.values.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def spacing(self) -> np.ndarray:
        return np.linalg.norm(self.affine[:-1, :-1], axis=0)

    @property
    def center(self) -> np.ndarray:
        """World coordinates of the center of the field of view."""
        return transformed(self.affine, (np.array(self.shape) - 1) / 2)

    def points(self, mask: np.ndarray) -> np.ndarray:
        """World coordinates ``[N, D]`` of the voxels of a mask."""
        return transformed(self.affine, np.argwhere(mask))


def transformed(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points ``[..., D]`` through a ``(D+1, D+1)`` matrix."""
    return np.asarray(points @ matrix[:-1, :-1].T + matrix[:-1, -1])


@lru_cache(maxsize=10)
def read_volume(path: Path) -> Volume:
    """Read one image; values that are not finite become 0.

    Raises:
        RegistrationError: the file holds more than one channel.
    """
    from monai_zsreg.io.images import load_image

    image = load_image(path)
    if len(image.values) != 1:
        raise RegistrationError("data", str(path), "images with one channel")
    values = np.nan_to_num(image.values[0].numpy().astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    values.setflags(write=False)
    return Volume(values, image.affine.numpy())


def background_value(image: np.ndarray) -> float:
    """Median of the values on the border of the image."""
    faces = [np.take(image, (0, -1), axis=axis).ravel() for axis in range(image.ndim)]
    return float(np.median(np.concatenate(faces)))


def foreground(image: np.ndarray) -> np.ndarray:
    """The object: other than the border's value where much of the image has it, otherwise by Otsu's classes.

    The product's definition may change from release to release; the points at which errors are measured must not.

    Returns:
        Boolean, same shape. All true where the image has no background.
    """
    from skimage.filters import threshold_otsu

    flat = image == background_value(image)
    if flat.mean() > 0.1:
        return ~flat
    clipped = np.minimum(image, np.percentile(image, 99.5))
    if clipped.max() <= clipped.min():
        return np.ones_like(image, dtype=bool)
    above = clipped > threshold_otsu(clipped)
    # between two far apart classes Otsu's threshold is arbitrary; a third of the way up keeps dark tissue
    low, high = float(clipped[~above].mean()), float(clipped[above].mean())
    mask = np.asarray(image > low + (high - low) / 3)
    # photographs fill their frame: a threshold would call the dark half of the scene background
    return mask if mask.mean() < 0.8 else np.ones_like(mask)


def moved(
    image: Volume,
    shape: tuple[int, ...],
    affine: np.ndarray,
    pull: np.ndarray,
    order: int = 3,
    fill: float | None = None,
) -> Volume:
    """An image on another lattice: the voxel at world y takes the image's value at ``pull(y)``.

    Args:
        image: what to show.
        shape: of the result.
        affine: of the result.
        pull: ``(D+1, D+1)``, the result's world to the image's.
        order: of the spline; 0 for labels.
        fill: value where the image has nothing; its background if None.
    """
    back = background_value(image.values) if fill is None else fill
    out = np.full(shape, back, dtype=np.float32)
    index = np.linalg.inv(image.affine) @ pull @ affine
    # compute only where something other than background can land
    used = _box(image.values != back)
    if not len(used):
        return Volume(out, affine)
    low = np.maximum(used[0] - 6, 0)
    high = np.minimum(used[1] + 7, image.shape)
    corners = np.stack(np.meshgrid(*zip(low - 1, high, strict=True), indexing="ij"), -1).reshape(-1, image.dims)
    landed = transformed(np.linalg.inv(index), corners)
    first = np.clip(np.floor(landed.min(axis=0)).astype(int), 0, shape)
    last = np.clip(np.ceil(landed.max(axis=0)).astype(int) + 1, 0, shape)
    if (last <= first).any():
        return Volume(out, affine)
    part = image.values[tuple(map(slice, low, high))].astype(np.float32) - back
    window = ndimage.affine_transform(
        part,
        index[:-1, :-1],
        transformed(index, first) - low,
        tuple(last - first),
        np.float32,
        order=order,
        mode="constant",
    )
    # cubic overshoot is cut off at the image's own range
    out[tuple(map(slice, first, last))] = np.clip(window, part.min(), part.max()) + back
    return Volume(out, affine)


def _box(mask: np.ndarray) -> np.ndarray:
    """First and last index of a mask along each axis, ``[2, D]``; empty for an empty mask."""
    ranges = [
        np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis))) for axis in range(mask.ndim)
    ]
    return np.array([[r[0] for r in ranges], [r[-1] for r in ranges]]) if len(ranges[0]) else np.empty((0, mask.ndim))


def labels_dice(fixed: Volume, moving: Volume, matrix: np.ndarray) -> float:
    """Mean Dice over the labels that both images have, the moving labels by nearest neighbor on the fixed grid."""
    still = np.rint(fixed.values).astype(int)
    shown = np.rint(moved(moving, fixed.shape, fixed.affine, matrix, order=0, fill=0.0).values).astype(int)
    shared = set(np.unique(still)) & set(np.unique(np.rint(moving.values).astype(int))) - {0}
    scores = [2 * ((still == k) & (shown == k)).sum() / ((still == k).sum() + (shown == k).sum()) for k in shared]
    return float(np.mean(scores)) if scores else math.nan
