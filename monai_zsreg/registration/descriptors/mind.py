# SPDX-License-Identifier: Apache-2.0
"""Local descriptors that do not depend on the modality."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from monai_zsreg.errors import RegistrationError


class MINDSSC(nn.Module):
    """Modality independent neighborhood descriptor, self-similarity context (Heinrich et al., MICCAI 2013).

    Around each point stand the 2D neighbors at ``dilation`` steps along the axes. Each pair of neighbors that do not
    lie opposite one another gives a channel: ``exp(-d / v)`` with ``d`` the mean squared difference of the patches
    (three steps wide) around the two, less the smallest of all channels, and ``v`` the mean over the channels. Four
    channels in 2D, twelve in 3D. Brightness and contrast, also inverted, do not change them.

    Only differences matter, so two pairs with the same difference vector are crops of one smoothed map: two maps
    instead of four in 2D, six instead of twelve in 3D.

    Args:
        spatial_dims: 2 or 3.
        dilation: distance of the neighbors, lattice steps.
    """

    name = "mind"
    worst = 0.15

    def __init__(self, spatial_dims: int, dilation: int = 1) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise RegistrationError("spatial_dims", spatial_dims, "2 or 3")
        if not isinstance(dilation, int) or dilation < 1:
            raise RegistrationError("dilation", dilation, "a whole number of at least 1")
        self.spatial_dims = spatial_dims
        self.dilation = dilation
        #: lattice steps that are lost on each side
        self.margin = dilation + 1
        self._maps = self._plan()
        self.channels = sum(len(crops) for _, crops in self._maps)

    def _plan(self) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
        neighbors = []
        for axis in range(self.spatial_dims):
            for sign in (1, -1):
                step = [0] * self.spatial_dims
                step[axis] = sign * self.dilation
                neighbors.append(tuple(step))
        maps: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for one, other in combinations(neighbors, 2):
            if all(a == -b for a, b in zip(one, other, strict=True)):
                continue
            gap = tuple(b - a for a, b in zip(one, other, strict=True))
            if next(g for g in gap if g) < 0:  # the same squared difference seen from its other end
                gap, one = tuple(-g for g in gap), other
            maps.setdefault(gap, []).append(one)
        return list(maps.items())

    def forward(self, patches: Tensor) -> Tensor:
        """Describe the inner points of patches ``[Q, *n]``: ``[Q, channels, *(n - 2 margin)]``, values in (0, 1]."""
        reach = self.margin
        inner = [n - 2 * reach for n in patches.shape[1:]]
        channels = []
        for gap, anchors in self._maps:
            # where both ends of the gap lie inside, for all anchors, widened by the patch radius of 1
            starts = [min(a[axis] for a in anchors) + reach - 1 for axis in range(len(inner))]
            stops = [max(a[axis] for a in anchors) + reach + 1 + inner[axis] for axis in range(len(inner))]
            here, there = patches, patches
            for axis, (start, stop, step) in enumerate(zip(starts, stops, gap, strict=True)):
                here = here.narrow(axis + 1, start, stop - start)
                there = there.narrow(axis + 1, start + step, stop - start)
            mean = (there - here).square_()
            for axis in range(len(inner)):
                n = mean.shape[axis + 1] - 2
                mean = mean.narrow(axis + 1, 0, n) + mean.narrow(axis + 1, 1, n) + mean.narrow(axis + 1, 2, n)
            for anchor in anchors:
                crop = mean
                for axis, n in enumerate(inner):
                    crop = crop.narrow(axis + 1, anchor[axis] + reach - 1 - starts[axis], n)
                channels.append(crop)
        distance = torch.stack(channels, dim=1)
        distance *= 3.0 ** -len(inner)
        spread = distance.mean(dim=1, keepdim=True) + 1e-10
        distance -= distance.amin(dim=1, keepdim=True)
        distance /= spread
        return distance.neg_().exp_()
