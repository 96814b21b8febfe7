# SPDX-License-Identifier: Apache-2.0
"""What is done to images before a method sees them: another contrast, noise, bias, thick slices, cuts, cavities.

Two real scans of one person are aligned to within a few tenths of a millimeter at best. A contrast computed voxel by
voxel from a T1 has no such residual. It does not carry the T1's noise either: tissue fractions come from a lightly
smoothed T1 (a symmetric kernel moves nothing), and noise and bias field are drawn afresh after the warp.

The demonstration pair's `monai_zsreg.app.demo.simulated_scan` needs tissue maps and a head in empty air. Scans have
neither, and what is measured on them must not change with what is demonstrated, so the two stand apart.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage
from scipy.cluster.vq import kmeans2

from monai_zsreg.benchmark.volumes import Volume, background_value, moved, transformed

# relative signal of a T2-weighted spin echo: cerebrospinal fluid, gray matter, white matter
_T2_SIGNAL = (1.0, 0.62, 0.42)


def simulated_t2(t1: np.ndarray, mask: np.ndarray, tissue: np.ndarray | None = None) -> np.ndarray:
    """A T2-like image of a T1-weighted brain: float32, 0 outside ``mask``, about 1 in fluid.

    ``tissue`` has the classes 1 (fluid), 2 (gray) and 3 (white); without it they are taken from the T1's intensities.
    """
    brain = ndimage.binary_fill_holes(mask)
    smooth = ndimage.gaussian_filter(t1.astype(np.float32), 0.5)
    if tissue is not None and all((tissue == label).sum() > 100 for label in (1, 2, 3)):
        means = sorted(float(np.median(t1[tissue == label])) for label in (1, 2, 3))
    else:
        values = t1[brain & (t1 != background_value(t1))].astype(np.float64)
        values = values[:: max(1, len(values) // 200_000), None]
        means = kmeans2(values, np.percentile(values, [8, 40, 80])[:, None], iter=25, minit="matrix")[0][:, 0].tolist()
    # between two class means a voxel is a mixture of the two tissues
    knots = [means[0] - 1e-3, *means, means[2] + (means[2] - means[1])]
    signal = np.interp(smooth, np.maximum.accumulate(knots), [_T2_SIGNAL[0], *_T2_SIGNAL, 0.9 * _T2_SIGNAL[2]])
    if tissue is not None:
        shares = [ndimage.gaussian_filter((tissue == label).astype(np.float32), 0.5) for label in (1, 2, 3)]
        inside = np.sum(shares, axis=0)
        by_class = np.tensordot(_T2_SIGNAL, shares, axes=1) / np.maximum(inside, 0.5)
        # hard classes have stairs for edges; the intensities give the fractions in between
        signal = np.where(inside > 0.5, 0.5 * signal + 0.5 * by_class, signal)
    return np.where(brain, signal, 0.0).astype(np.float32)


def add_noise(image: np.ndarray, mask: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise everywhere, relative to the foreground's 99th percentile above the background."""
    level = np.percentile(image[mask], 99) - background_value(image) if mask.any() else 1.0
    return (image + rng.normal(0.0, fraction * float(level), image.shape)).astype(np.float32)


def bias_field(shape: tuple[int, ...], fraction: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth factor within ``1 +- fraction``, with a handful of bumps over the field of view."""
    field = ndimage.zoom(rng.normal(size=(4,) * len(shape)), 4, order=3, mode="nearest", grid_mode=True)
    # the spline has the shape; straight lines between its 16 samples a side are fast at any size
    field = ndimage.zoom(field.astype(np.float32), np.array(shape) / 16, order=1, mode="nearest", grid_mode=True)
    field -= field.mean()
    return np.asarray(1 + fraction * field / max(float(np.abs(field).max()), 1e-12), dtype=np.float32)


def add_bias(image: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Multiply what lies above the background by a `bias_field`."""
    back = background_value(image)
    return (back + (image - back) * bias_field(image.shape, fraction, rng)).astype(np.float32)


def thick_slices(
    image: Volume, shape: tuple[int, ...], affine: np.ndarray, pull: np.ndarray, axis: int, thickness: float
) -> Volume:
    """`moved` onto slices of ``thickness`` mm along ``axis``: a box profile, with the header that belongs to it."""
    spacing = float(np.linalg.norm(affine[:-1, axis]))
    parts = max(1, math.ceil(thickness / spacing - 1e-6))
    count = max(1, int(shape[axis] * spacing / thickness + 1e-6))
    fine = affine.copy()
    fine[:-1, axis] *= thickness / parts / spacing
    size = tuple(count * parts if a == axis else n for a, n in enumerate(shape))
    values = moved(image, size, fine, pull).values
    values = values.reshape(*size[:axis], count, parts, *size[axis + 1 :]).mean(axis=axis + 1)
    fine[:-1, -1] += fine[:-1, axis] * (parts - 1) / 2
    fine[:-1, axis] *= parts
    return Volume(values.astype(np.float32), fine)


def crop(image: Volume, axis: int, first: int, last: int) -> Volume:
    """Slices ``first`` to ``last`` (left out) along an axis; the header follows."""
    affine = image.affine.copy()
    affine[:-1, -1] = transformed(affine, first * np.eye(image.dims)[axis])
    return Volume(np.ascontiguousarray(np.take(image.values, range(first, last), axis=axis)), affine)


def seen_slices(image: Volume, axis: int) -> tuple[int, int]:
    """First and last slice (left out) along an axis that shows more than background."""
    inside = image.values != background_value(image.values)
    used = np.flatnonzero(inside.any(axis=tuple(a for a in range(image.dims) if a != axis)))
    return int(used[0]), int(used[-1]) + 1


def cut_end(image: Volume, axis: int, fraction: float, top: bool) -> Volume:
    """Cut off ``fraction`` of the slices that show something, from one end of ``axis``."""
    first, last = seen_slices(image, axis)
    lost = round(fraction * (last - first))
    return crop(image, axis, 0, last - lost) if top else crop(image, axis, first + lost, image.shape[axis])


def blacken_cavity(image: Volume, mask: np.ndarray, rng: np.random.Generator) -> Volume:
    """Blacken an ellipsoid in the foreground, with semi-axes of 20 to 30 % of the radius of a ball of its size."""
    size = float(mask.sum()) * float(np.prod(image.spacing))
    radius = math.sqrt(size / math.pi) if image.dims == 2 else (3 * size / (4 * math.pi)) ** (1 / 3)
    deep = ndimage.binary_erosion(mask, iterations=3) if mask.sum() > 1000 else mask
    where = np.argwhere(deep if deep.any() else mask)
    center = where[rng.integers(len(where))]
    axes = radius * rng.uniform(0.2, 0.3, image.dims)
    index = np.ogrid[tuple(map(slice, image.shape))]
    gaps = [((i - c) * s / a) ** 2 for i, c, s, a in zip(index, center, image.spacing, axes, strict=True)]
    return Volume(np.where(sum(gaps) <= 1, background_value(image.values), image.values), image.affine)
