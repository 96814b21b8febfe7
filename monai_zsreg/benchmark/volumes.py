# SPDX-License-Identifier: Apache-2.0
"""One-channel images as numpy arrays, and a resampling that the judge does not share with what it judges."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from monai_zsreg.errors import require
from monai_zsreg.geometry import Grid
from monai_zsreg.io.images import Image, load_image
from monai_zsreg.metrics import label_dice


@dataclass(frozen=True)
class Volume:
    """An image with one channel."""

    values: np.ndarray  # [*spatial], 2D or 3D
    affine: np.ndarray  # (D+1, D+1), index to world: RAS mm, pixels for slices and photographs

    @property
    def dims(self) -> int:
        return self.values.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, torch.from_numpy(np.asarray(self.affine, dtype=np.float64)))

    @property
    def spacing(self) -> np.ndarray:
        return np.array(self.grid.spacing)

    @property
    def center(self) -> np.ndarray:
        return self.grid.center.numpy()

    @property
    def image(self) -> Image:
        """As our own method takes it."""
        return load_image(np.asarray(self.values, dtype=np.float32), affine=self.affine)

    def points(self, mask: np.ndarray) -> np.ndarray:
        """World coordinates ``[N, D]`` of the voxels of a mask."""
        return transformed(self.affine, np.argwhere(mask))

    def shows(self, points: np.ndarray) -> np.ndarray:
        """Which of some points ``[N, D]``, world, lie in the image's field of view: ``[N]`` bool."""
        index = transformed(np.linalg.inv(self.affine), points)
        return np.all((index > -0.5) & (index < np.array(self.shape) - 0.5), axis=1)


def transformed(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points ``[..., D]`` through a ``(D+1, D+1)`` matrix."""
    return np.asarray(points @ matrix[:-1, :-1].T + matrix[:-1, -1])


@lru_cache(maxsize=10)
def read_volume(path: Path) -> Volume:
    """Read one image; values that are not finite become 0.

    Raises:
        RegistrationError: the file cannot be read or holds more than one channel.
    """
    image = load_image(path)
    require(len(image.values) == 1, "data", str(path), "images with one channel")
    values = np.nan_to_num(image.values[0].numpy().astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    values.setflags(write=False)
    return Volume(values, image.affine.numpy())


def background_value(image: np.ndarray) -> float:
    """Median of the values on the border of the image."""
    faces = [np.take(image, (0, -1), axis=axis).ravel() for axis in range(image.ndim)]
    return float(np.median(np.concatenate(faces)))


def foreground(image: np.ndarray) -> np.ndarray:
    """The object: other than the border's value where much of the image has it, otherwise by Otsu's classes.

    All true without a background. The product's definition may change; the points where errors are measured must not.
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

    ``order`` is that of the spline (0 for labels), whose overshoot is cut off at the image's own range; ``fill`` the
    value where the image has nothing, its background if None.
    """
    back = background_value(image.values) if fill is None else fill
    out = np.full(shape, back, dtype=np.float32)
    index = np.linalg.inv(image.affine) @ pull @ affine
    # compute only where something other than background can land
    used = ndimage.find_objects((image.values != back).astype(np.int8))
    if not used:
        return Volume(out, affine)
    corners = np.array(list(product(*[(s.start - 1, s.stop) for s in used[0]])))
    landed = transformed(np.linalg.inv(index), corners)
    first = np.clip(np.floor(landed.min(axis=0)).astype(int), 0, shape)
    size = np.clip(np.ceil(landed.max(axis=0)).astype(int) + 1, 0, shape) - first
    if (size > 0).all():
        values, offset = image.values.astype(np.float32) - back, transformed(index, first)
        window = ndimage.affine_transform(values, index[:-1, :-1], offset, tuple(size), order=order, mode="constant")
        out[tuple(map(slice, first, first + size))] = np.clip(window, values.min(), values.max()) + back
    return Volume(out, affine)


def labels_dice(fixed: Volume, moving: Volume, shown: np.ndarray) -> float:
    """Mean Dice over the labels that both label images have; ``shown`` is the moving one on the fixed grid."""
    still = np.where(np.isin(fixed.values, moving.values), fixed.values, 0)
    return label_dice(torch.from_numpy(still), torch.from_numpy(shown))
