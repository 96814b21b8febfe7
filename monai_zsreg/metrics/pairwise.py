# SPDX-License-Identifier: Apache-2.0
"""The similarity measures as MONAI metrics: accumulate over pairs, then reduce.

Every class is called as ``metric(y_pred, y)`` with the moved images first and the fixed ones second, each a batch
``[B, C, *spatial]`` or a list of ``[C, *spatial]``. Pairs of a list may differ in shape from one another. Scaling to
[0, 1] happens inside, so the images go in as they are. ``moving_mask`` and ``fixed_mask`` (batch or list, None for
Otsu) are optional keyword arguments of the call.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from monai.metrics.regression import RegressionMetric
from monai.utils import MetricReduction
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.metrics.similarity import REGIONS, ImagePair

__all__ = [
    "ForegroundDiceMetric",
    "MutualInformationMetric",
    "PairMetric",
    "RegionMSEMetric",
    "RegionRMSEMetric",
    "StructuralSimilarityMetric",
]


class PairMetric(RegressionMetric):
    """Base class: one number a pair, ``[B, 1]`` a call.

    Args:
        region: "foreground" (union of both) or "image".
        scale: scale each image by its own 0.5 and 99.5 percentiles to [0, 1].
        reduction: as in ``monai.metrics.RegressionMetric``.
        get_not_nans: likewise.

    Raises:
        RegistrationError: an unknown region.
    """

    def __init__(
        self,
        region: str = "foreground",
        scale: bool = True,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
    ) -> None:
        super().__init__(reduction=reduction, get_not_nans=get_not_nans)
        if region not in REGIONS:
            raise RegistrationError("region", region, f"one of {REGIONS}")
        self.region = region
        self.scale = scale

    @abstractmethod
    def measure(self, pair: ImagePair) -> float:
        """The value of one prepared pair."""

    def _compute_list(self, y_pred: Any, y: Any = None, **masks: Any) -> Tensor:
        return self._compute_tensor(y_pred, y, **masks)

    def _compute_tensor(  # type: ignore[override]
        self, y_pred: Any, y: Any = None, moving_mask: Any = None, fixed_mask: Any = None
    ) -> Tensor:
        if y is None or not len(y_pred) == len(y) > 0:
            raise RegistrationError("y", None if y is None else len(y), f"as many images as y_pred, {len(y_pred)}")
        columns = [[None] * len(y) if m is None else m for m in (moving_mask, fixed_mask)]
        if any(len(column) != len(y) for column in columns):
            raise RegistrationError("masks", [len(column) for column in columns], f"one for each of {len(y)} pairs")
        values = [
            self.measure(ImagePair.of(fixed, moved, self.region, mask_f, mask_m, self.scale))
            for moved, fixed, mask_m, mask_f in zip(y_pred, y, *columns, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float32).unsqueeze(1)

    def _compute_metric(self, y_pred: Tensor, y: Tensor) -> Tensor:
        return self._compute_tensor(y_pred, y)


class ForegroundDiceMetric(PairMetric):
    """Dice of the foregrounds of two images; 1 where both are empty.

    For masks and labels use ``monai.metrics.DiceMetric``.
    """

    def measure(self, pair: ImagePair) -> float:
        return pair.dice()


class StructuralSimilarityMetric(PairMetric):
    """SSIM, see `structural_similarity`."""

    def measure(self, pair: ImagePair) -> float:
        return pair.ssim()


class MutualInformationMetric(PairMetric):
    """Mutual information, see `mutual_information`.

    Args:
        normalized: 2 I / (H + H) in [0, 1] instead of nats.
        bins: number of bins an image.
        kwargs: arguments of `PairMetric`.
    """

    def __init__(self, normalized: bool = False, bins: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalized = normalized
        self.bins = bins

    def measure(self, pair: ImagePair) -> float:
        return pair.mutual_information(self.bins)[int(self.normalized)]


class RegionMSEMetric(PairMetric):
    """Mean squared difference of the scaled images over the region."""

    def measure(self, pair: ImagePair) -> float:
        return pair.mse()


class RegionRMSEMetric(PairMetric):
    """Root of the mean squared difference of the scaled images over the region, pair by pair."""

    def measure(self, pair: ImagePair) -> float:
        return math.sqrt(pair.mse())
