# SPDX-License-Identifier: Apache-2.0
"""Measures of registration: similarity of images, target registration error, and success rates.

`SimilarityMetric` and `TREMetric` are MONAI metrics; MONAI is imported when one is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from monai_zsreg.foreground import foreground_mask, scale_intensity
from monai_zsreg.metrics.similarity import label_dice, mutual_information, similarity, structural_similarity
from monai_zsreg.metrics.statistics import SuccessRate, success_rate
from monai_zsreg.metrics.tre import foreground_tre, landmark_tre, target_registration_error

if TYPE_CHECKING:
    from monai_zsreg.metrics.pairwise import PairMetric, SimilarityMetric, TREMetric

__all__ = [
    "PairMetric",
    "SimilarityMetric",
    "SuccessRate",
    "TREMetric",
    "foreground_mask",
    "foreground_tre",
    "label_dice",
    "landmark_tre",
    "mutual_information",
    "scale_intensity",
    "similarity",
    "structural_similarity",
    "success_rate",
    "target_registration_error",
]


def __getattr__(name: str) -> object:
    if name in ("PairMetric", "SimilarityMetric", "TREMetric"):
        from monai_zsreg.metrics import pairwise

        globals()[name] = found = getattr(pairwise, name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
