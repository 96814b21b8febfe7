# SPDX-License-Identifier: Apache-2.0
"""Where the images lie that a transform file depends on."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from torch import Tensor

from monai_zsreg.errors import RegistrationError, require
from monai_zsreg.geometry import Grid, checked_affine
from monai_zsreg.io.images import Image, load_image

#: what tells where an image lies: a file, an image of nibabel or MONAI or ours, or its grid
GridLike = str | os.PathLike | SpatialImage | Tensor | Image | Grid


@dataclass(frozen=True)
class Volume:
    """The lattice of an image, the voxel sizes that its header states, and the name of its file."""

    grid: Grid
    spacing: tuple[float, ...]
    name: str


@dataclass
class Images:
    """The fixed and the moving image, for formats that depend on them. They are looked at when a format asks.

    Args:
        given: what tells where ``"fixed"`` and ``"moving"`` lie, or None.
        format: for messages.
    """

    given: dict[str, Any]
    format: str
    _seen: dict[str, Volume] = field(default_factory=dict)

    def known(self, name: str) -> Volume | None:
        """The ``"fixed"`` or the ``"moving"`` image if it was given."""
        if self.given[name] is None:
            return None
        if name not in self._seen:
            self._seen[name] = _volume(self.given[name], name)
        return self._seen[name]

    def need(self, name: str, dims: int = 3) -> Volume:
        """The same; a RegistrationError where it was not given, or is of another dimension."""
        volume = self.known(name)
        if volume is None:
            allowed = f"the {name} image: transforms of format {self.format!r} depend on it"
            raise RegistrationError(name, None, allowed)
        allowed = f"a {dims}D image: so is this transform of format {self.format!r}"
        require(volume.grid.dims == dims, name, f"{volume.grid.dims}D image", allowed)
        return volume


def _volume(image: Any, name: str) -> Volume:
    if isinstance(image, Grid):
        return Volume(image, image.spacing, "unknown")
    if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
        # the header is enough; what nibabel does not read, the general reader does, or says why not
        with suppress(Exception):
            image = nib.load(image)
    if isinstance(image, SpatialImage):
        shape, affine = (*image.shape, 1, 1)[:3], getattr(image, "affine", None)
        flat = affine is None or len(image.shape) < 2
        require(not flat, name, f"an image of shape {image.shape}", "a volume with an affine")
        grid = Grid(tuple(int(n) for n in shape), checked_affine(affine, 3, name))
        header: Any = image.header
        spacing = (*(float(zoom) for zoom in header.get_zooms()[:3]), *grid.spacing[len(image.shape) :])
        sized = all(np.isfinite(zoom) and zoom > 0 for zoom in spacing)
        require(sized, name, f"voxel sizes {spacing}", "positive voxel sizes in the header")
        return Volume(grid, spacing, str(image.get_filename() or "unknown"))
    if not isinstance(image, (str, os.PathLike, Tensor, Image)):
        allowed = "a path, an image of nibabel, a MetaTensor, an Image or a Grid"
        raise RegistrationError(name, type(image).__name__, allowed)
    loaded = load_image(image, name)
    return Volume(loaded.grid, loaded.grid.spacing, str(loaded.meta.get("path", "unknown")))
