# SPDX-License-Identifier: Apache-2.0
"""How alike two images on one grid are: Dice, SSIM, mutual information, MSE and RMSE (paper, section 2.6).

The paper's equation 3 divides by the union (Dice would reach 2) and its equation 5 multiplies where it should take
the expectation; both are computed here as they are commonly defined.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data import MetaTensor
from monai.metrics import compute_dice
from torch import Tensor

from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import Grid
from monai_zsreg.metrics.intensity import foreground_mask, plain_image, scale_intensity

__all__ = [
    "REGIONS",
    "ImagePair",
    "mutual_information",
    "similarity",
    "squared_error",
    "ssim_window",
    "structural_similarity",
]

REGIONS = ("foreground", "image")
_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5


@dataclass(frozen=True)
class ImagePair:
    """Two scaled images on one grid and the region to compare them in.

    Args:
        fixed: ``[C, *spatial]`` float32.
        moving: likewise.
        fixed_mask: ``[1, *spatial]`` bool, foreground.
        moving_mask: likewise.
        region: ``[*spatial]`` bool, the union of both foregrounds; None for the whole image.
    """

    fixed: Tensor
    moving: Tensor
    fixed_mask: Tensor
    moving_mask: Tensor
    region: Tensor | None

    @classmethod
    def of(
        cls,
        fixed: Tensor | np.ndarray,
        moving: Tensor | np.ndarray,
        region: str = "foreground",
        fixed_mask: Tensor | np.ndarray | None = None,
        moving_mask: Tensor | np.ndarray | None = None,
        scale: bool = True,
    ) -> ImagePair:
        """Check, scale and find the foreground; arguments as in `similarity`."""
        if region not in REGIONS:
            raise RegistrationError("region", region, f"one of {REGIONS}")
        prepare = scale_intensity if scale else plain_image
        plain_fixed = plain_image(fixed, "fixed")
        plain_moving = plain_image(moving, "moving").to(plain_fixed.device)
        if plain_fixed.shape != plain_moving.shape:
            allowed = f"the shape of fixed, {tuple(plain_fixed.shape)}: resample moving onto fixed first"
            raise RegistrationError("moving", tuple(plain_moving.shape), allowed)
        one, two = prepare(plain_fixed).float(), prepare(plain_moving).float()
        masks = [
            foreground_mask(image, scale=False) if mask is None else _plain_mask(mask, image, name)
            for image, mask, name in ((one, fixed_mask, "fixed_mask"), (two, moving_mask, "moving_mask"))
        ]
        union = (masks[0] | masks[1])[0]
        # two constant images have no foreground; the whole image keeps every metric defined
        where = union if region == "foreground" and bool(union.any()) else None
        return cls(one, two, masks[0], masks[1], where)

    def dice(self) -> float:
        """2 |A and B| / (|A| + |B|) of the foregrounds; 1 where both are empty. It ignores the region."""
        value = compute_dice(self.moving_mask[None].float(), self.fixed_mask[None].float(), ignore_empty=False)
        return float(value)

    def mutual_information(self, bins: int = 64) -> tuple[float, float]:
        """Mutual information in nats, and normalized; see `mutual_information`."""
        return mutual_information(self.fixed, self.moving, self.region, bins)

    def ssim(self) -> float:
        """Structural similarity; see `structural_similarity`."""
        return structural_similarity(self.fixed, self.moving, self.region)

    def mse(self) -> float:
        """Mean squared difference; see `squared_error`."""
        return squared_error(self.fixed, self.moving, self.region)


def _plain_mask(mask: Tensor | np.ndarray, image: Tensor, name: str) -> Tensor:
    tensor = torch.as_tensor(mask)
    tensor = (tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor).detach().to(image.device)
    if tensor.shape[1:] != image.shape[1:]:
        raise RegistrationError(name, tuple(tensor.shape), f"channel-first, spatial shape {tuple(image.shape[1:])}")
    return (tensor != 0).any(dim=0, keepdim=True)


def mutual_information(
    fixed: Tensor, moving: Tensor, mask: Tensor | None = None, bins: int = 64
) -> tuple[float, float]:
    """Mutual information of a joint histogram (paper, equation 5, corrected).

    Histograms have equal bins between each image's own minimum and maximum (0 and 1 after scaling). With few voxels
    they overestimate: a plain count has a bias of about (bins - 1)^2 / (2 voxels) nats.

    Args:
        fixed: ``[C, *spatial]``.
        moving: likewise; channel i is compared with channel i and the channels are averaged.
        mask: ``[*spatial]`` bool, the voxels that count; all if None.
        bins: number of bins an image.

    Returns:
        Mutual information I in nats, and 2 I / (H + H) in [0, 1]. Both are 0 where an image is constant.

    Raises:
        RegistrationError: fewer than 2 bins.
    """
    if bins < 2:
        raise RegistrationError("bins", bins, "2 or more")
    results = []
    for a, b in zip(fixed, moving, strict=True):
        index = _bin_index(a, bins) * bins + _bin_index(b, bins)
        counts = torch.bincount(index.flatten() if mask is None else index[mask], minlength=bins * bins)
        # the 4096 probabilities are summed on the CPU in double precision: not every device has it, and AMP stays out
        joint = (counts.cpu().double() / max(1, int(counts.sum()))).reshape(bins, bins)
        entropies = _entropy(joint.sum(1)) + _entropy(joint.sum(0))
        shared = max(0.0, entropies - _entropy(joint.flatten()))
        shared = shared if shared > 1e-12 else 0.0
        results.append((shared, min(1.0, 2.0 * shared / entropies) if shared else 0.0))
    mean = np.mean(results, axis=0)
    return float(mean[0]), float(mean[1])


def _bin_index(image: Tensor, bins: int) -> Tensor:
    low, high = image.min(), image.max()
    width = torch.where(high > low, high - low, torch.ones_like(low))
    return ((image - low) / width * bins).long().clamp_(0, bins - 1)


def _entropy(probability: Tensor) -> float:
    return float(torch.special.entr(probability).sum())


def ssim_window(spatial: Sequence[int]) -> tuple[int, ...]:
    """Window of each axis: 11 voxels, or the largest odd number that fits a shorter axis."""
    return tuple(min(_SSIM_WINDOW, n - 1 + n % 2) for n in spatial)


def structural_similarity(fixed: Tensor, moving: Tensor, mask: Tensor | None = None, data_range: float = 1.0) -> float:
    """SSIM with a Gaussian window of 11 voxels, sigma 1.5, k1 = 0.01, k2 = 0.03 (paper, equation 4).

    An axis shorter than the window gets the largest odd window that fits. Only windows that lie inside the image
    count, as in ``monai.metrics.compute_ssim_and_cs``, whose values this reproduces with one-dimensional passes: the
    full 11^3 convolution there takes much longer on a CPU.

    Args:
        fixed: ``[C, *spatial]``.
        moving: likewise.
        mask: ``[*spatial]`` bool: average over windows centered on these voxels. All windows if None, or if the mask
            holds no window's center.
        data_range: width of the intensity range.

    Returns:
        The mean over windows and channels, in [-1, 1].
    """
    x, y = fixed.float(), moving.float()
    windows = ssim_window(x.shape[1:])
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = _window_mean(x, windows), _window_mean(y, windows)
    variances = _window_mean(x * x + y * y, windows) - mean_x**2 - mean_y**2
    covariance = _window_mean(x * y, windows) - mean_x * mean_y
    ssim = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    ssim /= (mean_x**2 + mean_y**2 + c1) * (variances + c2)
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


def squared_error(fixed: Tensor, moving: Tensor, mask: Tensor | None = None) -> float:
    """Mean squared difference (paper, equation 6).

    Args:
        fixed: ``[C, *spatial]``.
        moving: likewise.
        mask: ``[*spatial]`` bool, the voxels that count; all if None.
    """
    squares = (fixed.float() - moving.float()) ** 2
    return float((squares if mask is None else squares[:, mask]).mean())


def similarity(
    fixed: Tensor | np.ndarray,
    moving: Tensor | np.ndarray,
    region: str = "foreground",
    fixed_mask: Tensor | np.ndarray | None = None,
    moving_mask: Tensor | np.ndarray | None = None,
    scale: bool = True,
) -> dict[str, float]:
    """All similarity measures of a pair on one grid (paper, section 2.6).

    SSIM, MSE and RMSE assume one contrast. Between contrasts that are each other's negative, such as T1 and T2, they
    can be worse where the images are aligned than where they are not; Dice, MI and NMI are not misled.

    Args:
        fixed: ``[C, *spatial]``, 2 or 3 spatial dimensions.
        moving: the moving image on the grid of ``fixed``, same shape.
        region: "foreground": SSIM, MI, MSE and RMSE over the union of both foregrounds; "image": over the whole
            image, as the paper does. Dice is that of the foregrounds in both cases.
        fixed_mask: foreground of ``fixed``, channel first, anything but 0 counts; by Otsu if None.
        moving_mask: foreground of ``moving``, on the same grid; by Otsu if None.
        scale: scale each image by its own 0.5 and 99.5 percentiles to [0, 1]. Without it MSE and RMSE are in the
            images' own units and SSIM expects intensities in [0, 1].

    Returns:
        ``dice``, ``ssim``, ``mi`` (nats), ``nmi`` ([0, 1]), ``mse`` and ``rmse``; never NaN.

    Raises:
        RegistrationError: shapes differ, an unknown region, a value that is not finite.

    Warns:
        RegistrationWarning: both images carry an affine, and these differ: the voxels do not show the same places.
    """
    if isinstance(fixed, MetaTensor) and isinstance(moving, MetaTensor) and fixed.shape == moving.shape:
        if not Grid.of(fixed, "fixed").same_as(Grid.of(moving, "moving")):
            text = "fixed and moving have one shape but different affines; resample moving onto fixed before comparing"
            warnings.warn(text, RegistrationWarning, stacklevel=2)
    pair = ImagePair.of(fixed, moving, region, fixed_mask, moving_mask, scale)
    mi, nmi = pair.mutual_information()
    mse = pair.mse()
    return {"dice": pair.dice(), "ssim": pair.ssim(), "mi": mi, "nmi": nmi, "mse": mse, "rmse": math.sqrt(mse)}
