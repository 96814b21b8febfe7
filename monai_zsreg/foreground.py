# SPDX-License-Identifier: Apache-2.0
"""What of an image is foreground, and how bright tissue is: the one definition that the whole package uses.

Two places have a simpler one with a purpose of its own: `monai_zsreg.networks.zero_shot` (batches, in TorchScript) and
`monai_zsreg.benchmark.volumes` (the points where errors are measured stay the same when this one changes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_zsreg.errors import require

# quantiles between which intensities count as ordinary
_LOW, _HIGH = 0.005, 0.995
# a quantile of this many voxels is as good as one of all
_ENOUGH = 4_000_000
# fraction of the range that foreground stands out by: air may be cut to zero in one place and noisy in another
_LEAST, _FAINT = 0.08, 0.005
# likewise where the rim shows tissue, so that the background is not known but by being dark
_DARK = 0.06
# likewise of what an image does not show
_DARKEST = 0.03
# fraction of the range that a background varies by, and that it lies from the end of the range, at most; variation
# that averages of one number have
_EVEN, _EXTREME, _SAME = 0.12, 0.1, 1e-5


@dataclass(frozen=True)
class Appearance:
    """How the intensities of an image are to be read.

    Attributes:
        background: intensity that counts as nothing, a 0-dimensional tensor.
        scale: length of the range from there to bright tissue (or dark tissue on a bright background), above 0.
        foreground: ``[*spatial]`` bool.
    """

    background: Tensor
    scale: Tensor
    foreground: Tensor


def appearance(image: Tensor, faint: bool = False) -> Appearance:
    """Background, range and foreground of one channel.

    The background is the median of the outermost voxels, if these hardly vary and are among the darkest or brightest,
    or if most are one number, as where an image was padded. Else they show tissue, as in a slab or a photograph: then
    all that stands out from the darkest half per cent is foreground.

    Args:
        image: ``[*spatial]``, floating point, finite. Pool it first where noise must not count.
        faint: whether all that differs at all from a background without noise is foreground.
    """
    low, high = quantiles(image)
    border = torch.cat([image.select(axis, end).flatten() for axis in range(image.ndim) for end in (0, -1)])
    middle = border.median()
    noise = 1.4826 * (border - middle).abs().median()
    length = (high - low).clamp(min=1e-20)
    inner = torch.minimum(middle - low, high - middle) > _EXTREME * length
    if bool((noise > _EVEN * length) | (inner & (noise > _SAME * length))):
        return Appearance(low, length, image > low + _DARK * length)
    least = _FAINT if faint and bool(noise == 0) else _LEAST
    scale = torch.maximum(high - middle, middle - low).clamp(min=1e-20)
    return Appearance(middle, scale, (image - middle).abs() > torch.maximum(least * scale, 4 * noise))


def quantiles(image: Tensor) -> tuple[Tensor, Tensor]:
    """The 0.5 and 99.5 percentiles of an image; where these coincide, its minimum and maximum."""
    flat = image.flatten()
    ends = torch.tensor([_LOW, _HIGH], dtype=flat.dtype, device=flat.device)
    low, high = torch.quantile(flat[:: 1 + flat.numel() // _ENOUGH], ends)
    # less than half a per cent of the voxels show anything
    return (flat.min(), flat.max()) if bool(low == high) else (low, high)


def background_value(image: Tensor) -> float:
    """The intensity that stands for "outside" an image ``[*spatial]`` of any real type: of air, or of what the scanner
    fills up with, such as -1024 in CT. What is not finite does not count."""
    values = image.detach()
    values = values if values.dtype == torch.float64 else values.float()
    if not all_finite(values):
        finite = torch.isfinite(values)
        if not bool(finite.any()):
            return 0.0
        values = torch.where(finite, values, values[finite].median())
    return float(appearance(values).background)


def foreground_mask(image: Tensor) -> Tensor:
    """Foreground of an image ``[C, *spatial]`` of any real type, in any of its channels: ``[1, *spatial]`` bool, all
    False for a constant image. A RegistrationError for a shape or an intensity that cannot be used."""
    values = plain_image(image)
    varied = (channel for channel in values if bool(channel.min() < channel.max()))
    masks = [appearance(channel).foreground for channel in varied]
    return torch.stack(masks or [torch.zeros_like(values[0], dtype=torch.bool)]).any(dim=0, keepdim=True)


def scale_intensity(image: Tensor) -> Tensor:
    """Scale each channel of ``[C, *spatial]``, of any real type, by its own 0.5 and 99.5 percentiles to [0, 1] and
    clip: float32 on the same device. A constant channel becomes 0; a RegistrationError as of `foreground_mask`."""
    values = plain_image(image)
    scaled = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
    for channel, out in zip(values, scaled, strict=True):
        low, high = quantiles(channel)
        if bool(low < high):
            out.copy_(((channel - low) / (high - low)).clamp_(0.0, 1.0))
    return scaled


def all_finite(values: Tensor) -> bool:
    """Whether every voxel is: told from the sum, which takes a tenth of the time, unless that overflows."""
    return not values.is_floating_point() or bool(values.sum().isfinite()) or bool(values.isfinite().all())


def plain_image(image: Tensor, name: str = "image") -> Tensor:
    """``image`` as a detached floating tensor ``[C, *spatial]`` without metadata.

    Wide integers and float64 stay exact as float64; all else becomes float32.

    Raises:
        RegistrationError: not 2 or 3 spatial dimensions, empty, or a value that is not finite.
    """
    # a MetaTensor would carry its metadata through every step
    tensor = torch.as_tensor(image).as_subclass(Tensor).detach()
    usable = tensor.ndim in (3, 4) and tensor.numel() > 0
    require(usable, name, tuple(tensor.shape), "a channel-first image with 2 or 3 spatial dimensions")
    tensor = tensor.to(torch.float64 if tensor.dtype in (torch.float64, torch.int64, torch.int32) else torch.float32)
    require(all_finite(tensor), name, "NaN or infinity", "finite intensities")
    return tensor


def seen_region(values: Tensor) -> Tensor:
    """What an image ``[*spatial]`` shows: all but the darkness that begins at its rim, as outside a camera's circle or
    in padding; bool, all True where hardly anything would remain.

    The border between the two is no structure of the object, and gradients across it mislead: it is left out too.
    """
    low, high = quantiles(values)
    dark = values <= low + _DARKEST * (high - low)
    rim = torch.zeros_like(dark)
    for axis in range(values.ndim):
        for end in (0, -1):
            rim.select(axis, end).fill_(True)
    reached, size = dark & rim, -1
    while int(reached.sum()) != size:
        size = int(reached.sum())
        for _ in range(8):
            reached = grown(reached) & dark
    for _ in range(2):
        reached = grown(reached)
    return torch.ones_like(dark) if float(reached.float().mean()) > 0.98 else ~reached


def grown(mask: Tensor) -> Tensor:
    """A mask and its neighbors along the axes."""
    result = mask.clone()
    for axis in range(mask.ndim):
        n = mask.shape[axis] - 1
        result.narrow(axis, 1, n).logical_or_(mask.narrow(axis, 0, n))
        result.narrow(axis, 0, n).logical_or_(mask.narrow(axis, 1, n))
    return result
