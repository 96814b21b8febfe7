# SPDX-License-Identifier: Apache-2.0
"""From what a user names to an image that is ready to be registered, and the device to do it on."""

from __future__ import annotations

import operator
import os
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.io.images import Image, ImageLike, load_image
from monai_zsreg.registration.side import Side
from monai_zsreg.resample import resample

# sides of an image that are kept: one for each scale that moving images may ask for
_KEPT = 3


class Prepared:
    """An image and what the engine has found out about it, so that a series of pairs finds it out once.

    Args:
        source: see `register`.
        channel: channel (or volume of a 4D file) to register on.
        mask: where to look, above 0: an image on any grid in its world, or an array on its own; None: its foreground.
        name: of the argument, for messages.

    Raises:
        RegistrationError: an image, channel or mask that cannot be used.

    Example::

        fixed = Prepared("t1.nii.gz")
        results = [register(fixed, moving) for moving in ("t2.nii.gz", "flair.nii.gz")]
    """

    def __init__(self, source: ImageLike, channel: int = 0, mask: ImageLike | None = None, name: str = "fixed") -> None:
        self.image: Image = load_image(source, name)
        self.values, self.seen = self.image.channel(channel, name), self.image.seen
        self.channel = int(channel)
        self.mask = None if mask is None else _mask_on(mask, self.image, f"{name}_mask")
        self._sides: dict[tuple[Any, ...], Side] = {}

    def side(self, base: float, coarse: float, faint: bool, device: torch.device) -> Side:
        """See `Side`; kept for the next pair that asks for the same."""
        key = (base, coarse, faint, str(device))
        kept = dict(self._sides)
        side = kept.pop(key, None)
        if side is None:
            mask, seen = (None if m is None else m[0].to(device) for m in (self.mask, self.seen))
            side = Side(self.values[0].to(device), self.image.grid, base, coarse, mask, seen, faint)
        # replaced, not changed: other threads may be looking
        self._sides = dict([*kept.items(), (key, side)][-_KEPT:])
        return side


def resolve_device(device: str | torch.device | None, default: torch.device | str = "cpu") -> torch.device:
    """A usable device.

    Raises:
        RegistrationError: no such device on this machine.
    """
    try:
        found = torch.device(default if device is None else device)
        torch.zeros(1, device=found).item()  # "meta" is a device too, but holds no numbers
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise RegistrationError(
            "device", str(device), f'"cpu", or a device of this machine such as "cuda" ({error})'
        ) from error
    return found


def is_number(value: Any) -> bool:
    """Whether it is a real number of any type but bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def whole_number(value: Any) -> int | None:
    """``value`` as an int if it is a whole number of any type but bool."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _mask_on(mask: ImageLike, image: Image, name: str) -> Tensor:
    """A mask on the grid of its image, ``[1, *spatial]`` bool."""
    read = load_image(mask, name)
    if read.dims != image.dims:
        raise RegistrationError(name, f"{read.dims}D image", f"a {image.dims}D image, as its image is")
    values = (read.values[:1] > 0).to(torch.uint8)
    if not isinstance(mask, (str, os.PathLike)) and not hasattr(mask, "affine"):
        # an array lies on the grid of its image
        if read.values.shape[1:] != image.values.shape[1:]:
            allowed = f"the shape of its image, {tuple(image.values.shape[1:])}"
            raise RegistrationError(name, tuple(read.values.shape), allowed)
    else:
        identity = torch.eye(image.dims + 1, dtype=torch.float64)
        values = resample(values, read.grid, image.grid, identity, mode="nearest", fill=0)
    if not bool(values.any()):
        raise RegistrationError(name, "no voxel above 0 within its image", "a mask that shows where to look")
    return values > 0
