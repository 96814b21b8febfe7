# SPDX-License-Identifier: Apache-2.0
"""The metrics of this package in an ignite engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ignite.engine import Engine
from ignite.metrics.metric import reinit__is_reduced
from monai.handlers import IgniteMetricHandler

from monai_zsreg.errors import require
from monai_zsreg.metrics.pairwise import PairMetric


class PairMetricHandler(IgniteMetricHandler):
    """MONAI's ``IgniteMetricHandler`` for a `PairMetric`, whose output may hold more than ``(y_pred, y)``.

    For Dice of masks or labels use ``monai.handlers.MeanDice``.

    .. code-block:: python

        PairMetricHandler(SimilarityMetric("nmi"), from_engine(["pred", "fixed"])).attach(evaluator, "nmi")

    Args:
        metric_fn: the metric.
        output_transform: from the engine's output to ``(y_pred, y)`` and, in order, what the metric's ``further``
            names; each a batch or a list of decollated tensors.
        save_details: keep each pair's value in ``engine.state.metric_details``.
    """

    def __init__(
        self, metric_fn: PairMetric, output_transform: Callable = lambda x: x, save_details: bool = True
    ) -> None:
        super().__init__(metric_fn=metric_fn, output_transform=output_transform, save_details=save_details)
        self._further = metric_fn.further

    @reinit__is_reduced
    def update(self, output: Sequence[Any]) -> None:
        """Measure one batch; a RegistrationError for too few or too many outputs."""
        fits = 2 <= len(output) <= 2 + len(self._further)
        require(fits, "output", len(output), f"(y_pred, y), then any of {self._further}")
        y_pred, y, *further = output
        self.metric_fn(y_pred, y, **dict(zip(self._further, further, strict=False)))

    def iteration_completed(self, engine: Engine) -> None:
        """Hand the whole output to `update`: ignite itself splits lists of tensors, and only pairs of them."""
        self.update(self._output_transform(engine.state.output))
