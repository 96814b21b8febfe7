# SPDX-License-Identifier: Apache-2.0
"""Dense responses of VGG-19's first two layers as a descriptor."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn


class VGG19Patches(nn.Module):
    """The 64 responses of conv1_2 to an image and to its negative, added, so that the sign of an edge does not count.

    A volume is described slice by slice, across each of its axes in turn, by every third channel.

    Args:
        spatial_dims: 2 or 3.
        weights: file with VGG-19's weights; None for torchvision's.
    """

    name = "vgg19"
    margin = 2
    worst = 0.15

    def __init__(self, spatial_dims: int, weights: str | os.PathLike | None = None) -> None:
        super().__init__()
        # only here, because it brings torchvision along
        from monai_zsreg.networks.vgg import IMAGENET, VGG19Features

        self.spatial_dims = spatial_dims
        self.features = VGG19Features(IMAGENET if weights is None else os.fspath(weights), layers=(2,))

    def forward(self, patches: Tensor) -> Tensor:
        """Describe the inner points of patches ``[Q, *n]`` in about [0, 1]: ``[Q, C, *(n - 2 margin)]``."""
        image = patches.clamp(0, 1)
        if self.spatial_dims == 2:
            maps = self._both(image)
        else:
            parts = []
            for axis in range(3):
                slices = image.movedim(axis + 1, 1)[:, self.margin : -self.margin]
                q, s = slices.shape[:2]
                found = self._both(slices.flatten(0, 1))[:, axis::3]
                parts.append(found.unflatten(0, (q, s)).movedim(1, axis + 2))
            maps = torch.cat(parts, dim=1)
        maps = maps - maps.mean(1, keepdim=True)
        # two random unit vectors are apart by the root of two
        length = maps.norm(dim=1, keepdim=True) + 0.1
        return maps * ((self.worst * maps.shape[1] / 2) ** 0.5 / length)

    def _both(self, image: Tensor) -> Tensor:
        both = self.features(image[:, None]) + self.features(1 - image[:, None])
        return both[:, :, self.margin : -self.margin, self.margin : -self.margin]
