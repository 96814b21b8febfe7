# SPDX-License-Identifier: Apache-2.0
"""The metrics as ignite handlers, on MONAI's ``IgniteMetricHandler``.

``output_transform`` gives ``(y_pred, y)``: moved and fixed images, as batches or as lists of decollated tensors, whose
shapes may differ from pair to pair. It may give more, in the order each class names. For Dice of masks or labels
use ``monai.handlers.MeanDice``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ignite.engine import Engine
from ignite.metrics.metric import reinit__is_reduced
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric
from monai.utils import MetricReduction

from monai_zsreg.errors import RegistrationError
from monai_zsreg.metrics.pairwise import (
    ForegroundDiceMetric,
    MutualInformationMetric,
    PairMetric,
    RegionMSEMetric,
    RegionRMSEMetric,
    StructuralSimilarityMetric,
)
from monai_zsreg.metrics.tre import TREMetric

__all__ = [
    "ForegroundDiceHandler",
    "MSEHandler",
    "MutualInformationHandler",
    "PairHandler",
    "RMSEHandler",
    "SSIMHandler",
    "TREHandler",
]


class _ExtraInputHandler(IgniteMetricHandler):
    """``IgniteMetricHandler`` whose output may hold more than ``(y_pred, y)``.

    Args:
        metric_fn: the metric.
        extra: names of the metric's keyword arguments that further outputs fill, in order.
        output_transform: from the engine's output to ``(y_pred, y, *further)``.
        save_details: keep each pair's value in ``engine.state.metric_details``.
    """

    def __init__(
        self,
        metric_fn: CumulativeIterationMetric,
        extra: tuple[str, ...],
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        self._extra = extra
        super().__init__(metric_fn=metric_fn, output_transform=output_transform, save_details=save_details)

    @reinit__is_reduced
    def update(self, output: Sequence[Any]) -> None:
        """Measure one batch.

        Raises:
            RegistrationError: too few or too many outputs.
        """
        if not 2 <= len(output) <= 2 + len(self._extra):
            raise RegistrationError("output", len(output), f"(y_pred, y), then any of {self._extra}")
        y_pred, y, *further = output
        self.metric_fn(y_pred, y, **dict(zip(self._extra, further, strict=False)))

    def iteration_completed(self, engine: Engine) -> None:
        """Hand the whole output to `update`: ignite itself splits lists of tensors, and only pairs of them."""
        self.update(self._output_transform(engine.state.output))


class PairHandler(_ExtraInputHandler):
    """Base class of the handlers for a pair of images.

    Output: moved images, fixed images, and optionally the masks of the moved and of the fixed images.

    Args:
        region: "foreground" (union of both) or "image".
        scale: scale each image by its own 0.5 and 99.5 percentiles to [0, 1].
        reduction: over pairs, as in MONAI.
        output_transform: from the engine's output to the outputs above.
        save_details: keep each pair's value in ``engine.state.metric_details``.
        kwargs: further arguments of the metric.
    """

    metric_class: type[PairMetric]

    def __init__(
        self,
        region: str = "foreground",
        scale: bool = True,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
        **kwargs: Any,
    ) -> None:
        metric = self.metric_class(region=region, scale=scale, reduction=reduction, **kwargs)
        super().__init__(metric, ("moving_mask", "fixed_mask"), output_transform, save_details)


class ForegroundDiceHandler(PairHandler):
    """Dice of the foregrounds of moved and fixed images. Arguments and output as for `PairHandler`."""

    metric_class = ForegroundDiceMetric


class SSIMHandler(PairHandler):
    """Structural similarity. Arguments and output as for `PairHandler`."""

    metric_class = StructuralSimilarityMetric


class MutualInformationHandler(PairHandler):
    """Mutual information; ``normalized=True`` for [0, 1], ``bins=64``.

    Arguments and output as for `PairHandler`.
    """

    metric_class = MutualInformationMetric


class MSEHandler(PairHandler):
    """Mean squared difference of the scaled images. Arguments and output as for `PairHandler`."""

    metric_class = RegionMSEMetric


class RMSEHandler(PairHandler):
    """Root mean squared difference of the scaled images. Arguments and output as for `PairHandler`."""

    metric_class = RegionRMSEMetric


class TREHandler(_ExtraInputHandler):
    """Foreground target registration error, mm.

    Output: estimated transforms, true transforms, fixed images, and optionally their masks.

    Args:
        statistic: "mean", "median", "p95", "max" or "rms" over the foreground.
        reduction: over pairs, as in MONAI.
        output_transform: from the engine's output to the outputs above.
        save_details: keep each pair's value in ``engine.state.metric_details``.
    """

    def __init__(
        self,
        statistic: str = "mean",
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        super().__init__(TREMetric(statistic, reduction), ("fixed", "mask"), output_transform, save_details)
