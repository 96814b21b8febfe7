# SPDX-License-Identifier: Apache-2.0
"""Intensity scaling and foreground, as every similarity metric of this package uses them."""

from __future__ import annotations

import numpy as np
import torch
from monai.transforms.utils_pytorch_numpy_unification import percentile
from torch import Tensor

from monai_zsreg.errors import RegistrationError

__all__ = ["LOWER_PERCENTILE", "UPPER_PERCENTILE", "foreground_mask", "otsu_threshold", "scale_intensity"]

LOWER_PERCENTILE = 0.5
UPPER_PERCENTILE = 99.5


def plain_image(image: Tensor | np.ndarray, name: str = "image") -> Tensor:
    """``image`` as a detached floating tensor ``[C, *spatial]`` without metadata.

    Wide integers and float64 stay exact as float64; all else becomes float32.

    Raises:
        RegistrationError: not 2 or 3 spatial dimensions, empty, or a value that is not finite.
    """
    tensor = torch.as_tensor(image)
    # MetaTensor would carry its metadata through every sum below
    tensor = (tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor).detach()
    if tensor.ndim not in (3, 4) or tensor.numel() == 0:
        raise RegistrationError(name, tuple(tensor.shape), "a channel-first image with 2 or 3 spatial dimensions")
    tensor = tensor.to(torch.float64 if tensor.dtype in (torch.float64, torch.int64, torch.int32) else torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise RegistrationError(name, "NaN or infinity", "finite intensities")
    return tensor


def scale_intensity(image: Tensor | np.ndarray) -> Tensor:
    """Scale each channel by its own 0.5 and 99.5 percentiles to [0, 1] and clip.

    Where the two percentiles coincide (less than 0.5 % of the image differs from its background) minimum and maximum
    take their place. A constant channel becomes 0.

    Args:
        image: ``[C, *spatial]``, any real dtype.

    Returns:
        ``[C, *spatial]`` float32 on the same device.

    Raises:
        RegistrationError: see `plain_image`.
    """
    values = plain_image(image)
    out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    for channel, scaled in zip(values, out, strict=True):
        # older torch.quantile stops at 16 million elements; MONAI's percentile goes through numpy above one million
        low, high = (float(percentile(channel, q)) for q in (LOWER_PERCENTILE, UPPER_PERCENTILE))
        if not high > low:
            low, high = float(channel.min()), float(channel.max())
        scaled.copy_(((channel - low) / (high - low)).clamp(0.0, 1.0) if high > low else torch.zeros_like(channel))
    return out


def otsu_threshold(image: Tensor, bins: int = 256) -> float:
    """Otsu's threshold of all values: the bin center that leaves the largest variance between the two classes.

    The definition is scikit-image's ``threshold_otsu``. Foreground is what lies *above* the threshold.

    Args:
        image: any shape, finite.
        bins: number of equal bins between minimum and maximum.

    Returns:
        The threshold; the value itself for a constant image, so that nothing lies above it.
    """
    values = image.detach().flatten()
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return low
    index = ((values - low) * (bins / (high - low))).long().clamp_(0, bins - 1)
    counts = torch.bincount(index, minlength=bins).cpu().double()
    centers = low + (torch.arange(bins, dtype=torch.float64) + 0.5) * ((high - low) / bins)
    below, above = counts.cumsum(0), counts.flip(0).cumsum(0).flip(0)
    moments = counts * centers
    mean_below = moments.cumsum(0) / below
    mean_above = moments.flip(0).cumsum(0).flip(0) / above
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return float(centers[int(between.argmax())])


def foreground_mask(image: Tensor | np.ndarray, scale: bool = True) -> Tensor:
    """Foreground by Otsu, for images whose background is dark; give a mask of your own for others.

    Args:
        image: ``[C, *spatial]``.
        scale: scale by percentiles first, so that a few very bright voxels do not move the threshold.

    Returns:
        ``[1, *spatial]`` bool: above the threshold in any channel. All False for a constant image.

    Raises:
        RegistrationError: see `plain_image`.
    """
    values = scale_intensity(image) if scale else plain_image(image)
    return torch.stack([channel > otsu_threshold(channel) for channel in values]).any(dim=0, keepdim=True)
