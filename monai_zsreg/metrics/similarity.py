# SPDX-License-Identifier: Apache-2.0
"""How alike two images on one grid are: Dice, SSIM, mutual information, MSE and RMSE (paper, section 2.6).

The paper's equation 3 divides by the union (Dice would reach 2) and its equation 5 multiplies where it should take
the expectation; both are computed here as they are commonly defined.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_zsreg.errors import RegistrationWarning, require
from monai_zsreg.foreground import foreground_mask, plain_image, scale_intensity
from monai_zsreg.geometry import Grid

MEASURES = ("dice", "ssim", "mi", "nmi", "mse", "rmse")
REGIONS = ("foreground", "image")
_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5


def similarity(
    fixed: Tensor | np.ndarray,
    moving: Tensor | np.ndarray,
    region: str = "foreground",
    fixed_mask: Tensor | np.ndarray | None = None,
    moving_mask: Tensor | np.ndarray | None = None,
    scale: bool = True,
    measures: Sequence[str] = MEASURES,
    bins: int = 64,
) -> dict[str, float]:
    """Similarity measures of a pair on one grid (paper, section 2.6).

    SSIM, MSE and RMSE assume one contrast. Between contrasts that are each other's negative, such as T1 and T2, they
    can be worse where the images are aligned than where they are not; Dice, MI and NMI are not misled.

    Args:
        fixed: ``[C, *spatial]``, 2 or 3 spatial dimensions. What is not finite was not seen and does not count.
        moving: the moving image on the grid of ``fixed``, same shape.
        region: "foreground": SSIM, MI, MSE and RMSE over the union of both foregrounds; "image": over the whole
            image, as the paper does. Dice is that of the foregrounds in both cases.
        fixed_mask: foreground of ``fixed``, channel first, anything but 0 counts; `foreground_mask` if None.
        moving_mask: foreground of ``moving``, on the same grid, likewise.
        scale: scale each image by its own 0.5 and 99.5 percentiles to [0, 1]. Without it MSE and RMSE are in the
            images' own units and SSIM expects intensities in [0, 1].
        measures: which to compute.
        bins: number of bins an image, for MI and NMI.

    Returns:
        What was asked for, of ``dice``, ``ssim``, ``mi`` (nats), ``nmi`` ([0, 1]), ``mse`` and ``rmse``; never NaN.

    Raises:
        RegistrationError: shapes differ, an unknown region or measure, nothing that both images saw.

    Warns:
        RegistrationWarning: both images carry an affine, and these differ: the voxels do not show the same places.
    """
    require(region in REGIONS, "region", region, f"one of {REGIONS}")
    unknown = set(measures) - set(MEASURES)
    require(not unknown, "measures", sorted(unknown), f"some of {MEASURES}")
    _warn_of_other_places(fixed, moving)
    one, seen_one = _seen(fixed, "fixed")
    two, seen_two = _seen(moving, "moving")
    allowed = f"the shape of fixed, {tuple(one.shape)}: resample moving onto fixed first"
    require(one.shape == two.shape, "moving", tuple(two.shape), allowed)
    two, seen = two.to(one.device), seen_one & seen_two.to(one.device)
    require(bool(seen.any()), "moving", "no voxel that is finite in both images", "finite intensities")
    inside, found = (
        foreground_mask(image)[0] & seen if mask is None else plain_mask(mask, image.shape[1:], name).to(image.device)
        for image, mask, name in ((one, fixed_mask, "fixed_mask"), (two, moving_mask, "moving_mask"))
    )
    one, two = (scale_intensity(image) if scale else image.float() for image in (one, two))
    where = (inside | found) & seen if region == "foreground" else seen
    # two constant images have no foreground; the whole image keeps every measure defined
    where = where if bool(where.any()) else seen
    values = {"dice": _dice(inside, found)}
    if "ssim" in measures:
        values["ssim"] = structural_similarity(one, two, where)
    if {"mi", "nmi"} & set(measures):
        values["mi"], values["nmi"] = mutual_information(one, two, where, bins)
    if {"mse", "rmse"} & set(measures):
        values["mse"] = float(((one - two) ** 2)[:, where].mean())
        values["rmse"] = math.sqrt(values["mse"])
    return {name: values[name] for name in measures}


def label_dice(fixed: Tensor, moved: Tensor) -> float:
    """Mean Dice over the labels that the fixed label image has, 0 left out; a label that ``moved`` lacks counts as 0.

    Args:
        fixed, moved: ``[1, *spatial]``, whole numbers, on one grid.

    Raises:
        RegistrationError: no labels, or shapes that differ.
    """
    one, two = fixed.as_subclass(Tensor), moved.as_subclass(Tensor)
    require(one.shape == two.shape, "moved", tuple(two.shape), f"{tuple(one.shape)}, as fixed")
    labels = one[one != 0].unique()
    require(len(labels) > 0, "fixed", "only zeros", "at least one label")
    # label by label: one-hot images of an anatomical atlas would fill the memory
    return float(np.mean([_dice(one == label, two == label) for label in labels]))


def mutual_information(
    fixed: Tensor, moving: Tensor, mask: Tensor | None = None, bins: int = 64
) -> tuple[float, float]:
    """Mutual information of a joint histogram (paper, equation 5, corrected).

    Histograms have equal bins between each image's own minimum and maximum (0 and 1 after scaling). With few voxels
    they overestimate: a plain count has a bias of about (bins - 1)^2 / (2 voxels) nats.

    Args:
        fixed, moving: ``[C, *spatial]``; channel i is compared with channel i and the channels are averaged.
        mask: ``[*spatial]`` bool, the voxels that count; all if None.
        bins: number of bins an image; a RegistrationError for fewer than 2.

    Returns:
        Mutual information I in nats, and 2 I / (H + H) in [0, 1]. Both are 0 where an image is constant.
    """
    require(bins >= 2, "bins", bins, "2 or more")
    results = []
    for a, b in zip(fixed, moving, strict=True):
        index = _bin_index(a, mask, bins) * bins + _bin_index(b, mask, bins)
        counts = torch.bincount(index, minlength=bins * bins)
        # the 4096 probabilities are summed on the CPU in double precision: not every device has it, and AMP stays out
        joint = (counts.cpu().double() / max(1, int(counts.sum()))).reshape(bins, bins)
        entropies = _entropy(joint.sum(1)) + _entropy(joint.sum(0))
        shared = max(0.0, entropies - _entropy(joint))
        shared = shared if shared > 1e-12 else 0.0
        results.append((shared, min(1.0, 2.0 * shared / entropies) if shared else 0.0))
    mean = np.mean(results, axis=0)
    return float(mean[0]), float(mean[1])


def structural_similarity(fixed: Tensor, moving: Tensor, mask: Tensor | None = None) -> float:
    """SSIM of intensities in [0, 1]: Gaussian window of 11 voxels, sigma 1.5, k1 = 0.01, k2 = 0.03 (paper, equation 4).

    An axis shorter than the window gets the largest odd window that fits. Only windows that lie inside the image
    count, as in ``monai.metrics.compute_ssim_and_cs``, whose values this reproduces with one-dimensional passes: the
    full 11^3 convolution there takes much longer on a CPU.

    Args:
        fixed, moving: ``[C, *spatial]``.
        mask: ``[*spatial]`` bool: average over windows centered on these voxels. All windows if None, or if the mask
            holds no window's center.

    Returns:
        The mean over windows and channels, in [-1, 1].
    """
    x, y = fixed.float(), moving.float()
    windows = [min(_SSIM_WINDOW, n - 1 + n % 2) for n in x.shape[1:]]
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = _window_mean(x, windows), _window_mean(y, windows)
    squares, product = mean_x**2 + mean_y**2, mean_x.mul_(mean_y)
    del mean_x, mean_y
    covariance = _window_mean(x * y, windows).sub_(product)
    ssim = product.mul_(2).add_(c1) * covariance.mul_(2).add_(c2)
    del product, covariance
    variances = _window_mean(x * x + y * y, windows).sub_(squares)
    ssim /= squares.add_(c1) * variances.add_(c2)
    if mask is not None:
        for axis, window in enumerate(windows):
            mask = mask.narrow(axis, window // 2, mask.shape[axis] - window + 1)
        if bool(mask.any()):
            return float(ssim[:, mask].mean())
    return float(ssim.mean())


def _window_mean(image: Tensor, windows: Sequence[int]) -> Tensor:
    # shifted sums: single-channel convolutions are much slower on a CPU, and autocast would turn them to half
    for axis, window in enumerate(windows, start=1):
        weights = [math.exp(-0.5 * ((i - window // 2) / _SSIM_SIGMA) ** 2) for i in range(window)]
        length = image.shape[axis] - window + 1
        out = image.narrow(axis, 0, length) * (weights[0] / sum(weights))
        for start in range(1, window):
            out.add_(image.narrow(axis, start, length), alpha=weights[start] / sum(weights))
        image = out
    return image


def _bin_index(image: Tensor, mask: Tensor | None, bins: int) -> Tensor:
    """The bin of every voxel that counts, between the extremes of all."""
    low, high = image.aminmax()
    width = torch.where(high > low, high - low, torch.ones_like(low))
    values = image.flatten() if mask is None else image[mask]
    return ((values - low) / width * bins).int().clamp_(0, bins - 1)


def _entropy(probability: Tensor) -> float:
    return float(torch.special.entr(probability).sum())


def _dice(one: Tensor, two: Tensor) -> float:
    """2 |A and B| / (|A| + |B|) of two masks; 1 where both are empty."""
    total = int(one.sum()) + int(two.sum())
    return 2.0 * int((one & two).sum()) / total if total else 1.0


def _seen(image: Tensor | np.ndarray, name: str) -> tuple[Tensor, Tensor]:
    """The image ``[C, *spatial]`` with its smallest value in place of what is not finite, and where it is finite."""
    tensor = torch.as_tensor(image).as_subclass(Tensor).detach()
    seen = torch.isfinite(tensor)
    if not bool(seen.all()) and bool(seen.any()):
        tensor = torch.where(seen, tensor, tensor[seen].min())
    return plain_image(tensor, name), seen.all(dim=0)


def plain_mask(mask: Tensor | np.ndarray, shape: Sequence[int], name: str) -> Tensor:
    """Where a mask ``[C, *shape]`` is anything but 0, in any of its channels: bool, on its own device."""
    tensor = torch.as_tensor(mask).as_subclass(Tensor).detach()
    fits = tuple(tensor.shape[1:]) == tuple(shape)
    require(fits, name, tuple(tensor.shape), f"channel-first, spatial shape {tuple(shape)}")
    return (tensor != 0).any(dim=0)


def _warn_of_other_places(fixed: Any, moving: Any) -> None:
    if hasattr(fixed, "affine") and hasattr(moving, "affine") and fixed.shape == moving.shape:
        if not Grid.of(fixed, "fixed").same_as(Grid.of(moving, "moving")):
            text = "fixed and moving have one shape but different affines; resample moving onto fixed before comparing"
            warnings.warn(text, RegistrationWarning, stacklevel=3)
