# SPDX-License-Identifier: Apache-2.0
"""The measures as MONAI metrics: one number a pair, accumulated over pairs and then reduced.

Pairs may be given as batches or as lists, and those of a list may differ in shape from one another.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from monai.utils import MetricReduction
from torch import Tensor

from monai_zsreg.errors import require
from monai_zsreg.metrics.similarity import MEASURES, REGIONS, similarity
from monai_zsreg.metrics.tre import TRE_STATISTICS, foreground_tre


class PairMetric(CumulativeIterationMetric):
    """Base class: called as ``metric(y_pred, y, **further)``, it returns ``[B, 1]`` and keeps the values.

    Args:
        reduction: over pairs, as in ``monai.metrics.RegressionMetric``.
    """

    #: names of the keyword arguments of a call, each with one entry a pair
    further: tuple[str, ...] = ()

    def __init__(self, reduction: MetricReduction | str = MetricReduction.MEAN) -> None:
        super().__init__()
        self.reduction = reduction

    @abstractmethod
    def measure(self, y_pred: Any, y: Any, **further: Any) -> float:
        """The value of one pair."""

    def _compute_list(self, y_pred: Any, y: Any = None, **further: Any) -> Tensor:
        return self._compute_tensor(y_pred, y, **further)

    def _compute_tensor(self, y_pred: Any, y: Any = None, **further: Any) -> Tensor:
        unknown = set(further) - set(self.further)
        if unknown:
            raise TypeError(f"{type(self).__name__} got {sorted(unknown)}, and knows {self.further}")
        columns = {"y": y} | {name: column for name, column in further.items() if column is not None}
        for name, column in columns.items():
            given = None if column is None else len(column)
            require(given == len(y_pred), name, given, f"one for each of {len(y_pred)} pairs")
        rows = [
            self.measure(pred, **{name: column[i] for name, column in columns.items()}) for i, pred in enumerate(y_pred)
        ]
        return torch.tensor(rows, dtype=torch.float32).unsqueeze(1)

    def aggregate(self, reduction: MetricReduction | str | None = None) -> Tensor:
        """Reduce over all pairs so far, a RegistrationError where there are none, by ``reduction`` or the one given at
        construction."""
        data = self.get_buffer()
        require(isinstance(data, Tensor), "metric", "no pairs", "at least one pair before aggregate")
        return do_metric_reduction(data, reduction or self.reduction)[0]


class SimilarityMetric(PairMetric):
    """A measure of `similarity`: ``metric(y_pred, y, moving_mask=..., fixed_mask=...)``, moved images first.

    Args:
        measure: ``"dice"``, ``"ssim"``, ``"mi"``, ``"nmi"``, ``"mse"`` or ``"rmse"``.
        region, scale, bins: see `similarity`.
        reduction: see `PairMetric`.
    """

    further = ("moving_mask", "fixed_mask")

    def __init__(
        self,
        measure: str = "nmi",
        region: str = "foreground",
        scale: bool = True,
        bins: int = 64,
        reduction: MetricReduction | str = MetricReduction.MEAN,
    ) -> None:
        super().__init__(reduction)
        require(measure in MEASURES, "measure", measure, f"one of {MEASURES}")
        require(region in REGIONS, "region", region, f"one of {REGIONS}")
        self.name = measure
        self.options: dict[str, Any] = {"region": region, "scale": scale, "bins": bins}

    def measure(self, y_pred: Tensor, y: Tensor, **further: Any) -> float:
        return similarity(y, y_pred, measures=(self.name,), **self.options, **further)[self.name]


class TREMetric(PairMetric):
    """Foreground target registration error: ``metric(y_pred, y, fixed=..., mask=...)``.

    ``y_pred`` are estimates and ``y`` truths, ``(D+1, D+1)`` each; ``fixed`` are the fixed images and ``mask`` their
    masks, optional. A transform that is not finite counts as infinity, also in the mean.

    Args:
        statistic: one of `TRE_STATISTICS`.
        reduction: see `PairMetric`.
    """

    further = ("fixed", "mask")

    def __init__(self, statistic: str = "mean", reduction: MetricReduction | str = MetricReduction.MEAN) -> None:
        super().__init__(reduction)
        require(statistic in TRE_STATISTICS, "statistic", statistic, f"one of {TRE_STATISTICS}")
        self.statistic = statistic

    def measure(self, y_pred: Tensor, y: Tensor, **further: Any) -> float:
        require("fixed" in further, "fixed", None, "one for each pair")
        return foreground_tre(y_pred, y, **further)[self.statistic]
