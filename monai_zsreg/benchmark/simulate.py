# SPDX-License-Identifier: Apache-2.0
"""A second contrast made from one image, so that the true transform of the pair is known exactly.

Two real scans of one person are aligned to within a few tenths of a millimeter at best. A contrast computed voxel by
voxel from a T1 has no such residual. It does not carry the T1's noise either: tissue fractions come from a lightly
smoothed T1 (a symmetric kernel moves nothing), and noise and bias field are drawn afresh after the warp.
"""

from __future__ import annotations

import numpy as np
import torch
from monai.utils import optional_import
from torch.nn.functional import interpolate

from monai_zsreg.benchmark.data import background_value

ndimage, _ = optional_import("scipy.ndimage")

__all__ = ["add_bias", "add_noise", "bias_field", "reference_level", "simulated_t2"]

# relative signal of a T2-weighted spin echo: cerebrospinal fluid, gray matter, white matter
_T2_SIGNAL = (1.0, 0.62, 0.42)


def simulated_t2(t1: np.ndarray, mask: np.ndarray, tissue: np.ndarray | None = None) -> np.ndarray:
    """A T2-like image of a T1-weighted brain.

    Args:
        t1: T1-weighted image, 2D or 3D.
        mask: brain, boolean, same shape.
        tissue: classes 1 (fluid), 2 (gray), 3 (white) inside the brain, other values elsewhere; None to take the
            classes from the T1's intensities.

    Returns:
        float32, 0 outside the brain, about 1 in fluid.
    """
    brain = ndimage.binary_fill_holes(mask)
    smooth = ndimage.gaussian_filter(t1.astype(np.float32), 0.5)
    if tissue is not None and all((tissue == label).sum() > 100 for label in (1, 2, 3)):
        means = sorted(float(np.median(t1[tissue == label])) for label in (1, 2, 3))
    else:
        means = _class_means(t1[brain & (t1 != background_value(t1))])
    # between two class means a voxel is a mixture of the two tissues
    knots = [means[0] - 1e-3, *means, means[2] + (means[2] - means[1])]
    values = [_T2_SIGNAL[0], *_T2_SIGNAL, 0.9 * _T2_SIGNAL[2]]
    signal = np.interp(smooth, np.maximum.accumulate(knots), values)
    if tissue is not None:
        by_class = sum(
            value * ndimage.gaussian_filter((tissue == label).astype(np.float32), 0.5)
            for label, value in zip((1, 2, 3), _T2_SIGNAL, strict=True)
        )
        inside = ndimage.gaussian_filter(np.isin(tissue, (1, 2, 3)).astype(np.float32), 0.5)
        # hard classes have stairs for edges; the intensities give the fractions in between
        signal = np.where(inside > 0.5, 0.5 * signal + 0.5 * by_class / np.maximum(inside, 0.5), signal)
    return np.where(brain, signal, 0.0).astype(np.float32)


def _class_means(values: np.ndarray, iterations: int = 25) -> list[float]:
    """Three class means by Lloyd's algorithm in one dimension, started at fixed percentiles."""
    values = np.sort(values[:: max(1, len(values) // 200_000)].astype(np.float64))
    means = np.percentile(values, [8, 40, 80])
    for _ in range(iterations):
        cuts = np.searchsorted(values, (means[1:] + means[:-1]) / 2)
        means = np.array(
            [part.mean() if len(part) else old for part, old in zip(np.split(values, cuts), means, strict=True)]
        )
    return [float(m) for m in means]


def reference_level(image: np.ndarray, mask: np.ndarray) -> float:
    """What noise levels are relative to: the 99th percentile of the foreground above the background."""
    inside = image[mask]
    return float(np.percentile(inside, 99) - background_value(image)) if inside.size else 1.0


def add_noise(image: np.ndarray, mask: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise of ``fraction`` times `reference_level`, everywhere (also outside the foreground)."""
    sigma = fraction * reference_level(image, mask)
    return (image + rng.normal(0.0, sigma, image.shape)).astype(np.float32)


def bias_field(shape: tuple[int, ...], fraction: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth factor within ``1 +- fraction``, with a handful of bumps over the field of view.

    Args:
        shape: spatial shape.
        fraction: largest deviation from 1 (0.2 is "20 %").
        rng: source of the field.

    Returns:
        float32 of that shape.
    """
    coarse = ndimage.zoom(rng.normal(size=(4,) * len(shape)), 4, order=3, mode="nearest", grid_mode=True)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    # the spline above has the shape; straight lines between its 16 samples a side are fast at any size
    field = interpolate(torch.from_numpy(coarse)[None, None].float(), size=shape, mode=mode, align_corners=False)[
        0, 0
    ].numpy()
    field -= field.mean()
    field /= max(float(np.abs(field).max()), 1e-12)
    return (1.0 + fraction * field).astype(np.float32)


def add_bias(image: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Multiply what lies above the background by a `bias_field`."""
    back = background_value(image)
    return (back + (image - back) * bias_field(image.shape, fraction, rng)).astype(np.float32)
