# SPDX-License-Identifier: Apache-2.0
"""What every method of registration gives back, before it is judged."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class Estimate:
    """A transform and what its method knows about it.

    Attributes:
        affine: ``(D+1, D+1)`` float64 on the CPU, fixed world to moving world, RAS mm: the best matrix that was found.
        failed: whether the method itself says that this is no answer.
        reasons: why it failed, or why to doubt it, in words.
        covariance: ``(D(D+1), D(D+1))`` of the first D rows of ``affine``, row after row; None where unknown.
        measures: numbers that the verdict rests on.
        keypoints: for the methods that have them: ``fixed`` and ``moving``, ``[K, D]`` world mm, paired by position.
    """

    affine: Tensor
    failed: bool = False
    reasons: list[str] = field(default_factory=list)
    covariance: np.ndarray | None = None
    measures: dict[str, float] = field(default_factory=dict)
    keypoints: dict[str, np.ndarray] = field(default_factory=dict)
