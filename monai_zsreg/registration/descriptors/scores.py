# SPDX-License-Identifier: Apache-2.0
"""Intensities themselves, for two images of one contrast."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# half the width of the surroundings, lattice steps
_AROUND = 3
# deviation of what varies by noise alone, parts of the range from background to tissue
_QUIET = 0.02


class LocalScores:
    """How far each point lies above its surroundings, in standard deviations of these: one channel.

    Two images of one contrast agree in it closely, whatever their brightness and bias fields; other contrasts do not.

    Args:
        spatial_dims: 2 or 3.
    """

    name = "scores"
    margin = _AROUND
    worst = 1.0

    def __init__(self, spatial_dims: int) -> None:
        self.spatial_dims = spatial_dims

    def to(self, device: Any) -> LocalScores:
        return self

    def __call__(self, patches: Tensor) -> Tensor:
        """``[Q, *n]`` to ``[Q, 1, *(n - 2 margin)]``."""
        mean, square, inner = patches, patches.square(), patches
        for axis in range(1, self.spatial_dims + 1):
            n = patches.shape[axis] - 2 * _AROUND
            mean, square = (values.unfold(axis, 2 * _AROUND + 1, 1).mean(-1) for values in (mean, square))
            inner = inner.narrow(axis, _AROUND, n)
        variance = (square - mean.square()).clamp_(min=0) + _QUIET**2
        return ((inner - mean) / variance.sqrt_())[:, None]
