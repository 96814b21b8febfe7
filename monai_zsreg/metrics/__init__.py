# SPDX-License-Identifier: Apache-2.0
"""Measures of registration: similarity of images, target registration error, and intervals for both."""

from __future__ import annotations

from monai_zsreg.metrics.intensity import foreground_mask, otsu_threshold, scale_intensity
from monai_zsreg.metrics.pairwise import (
    ForegroundDiceMetric,
    MutualInformationMetric,
    RegionMSEMetric,
    RegionRMSEMetric,
    StructuralSimilarityMetric,
)
from monai_zsreg.metrics.similarity import mutual_information, similarity, squared_error, structural_similarity
from monai_zsreg.metrics.statistics import Interval, SuccessRate, bootstrap_interval, success_rate, wilson_interval
from monai_zsreg.metrics.tre import TREMetric, foreground_tre, landmark_tre, target_registration_error

__all__ = [
    "ForegroundDiceMetric",
    "Interval",
    "MutualInformationMetric",
    "RegionMSEMetric",
    "RegionRMSEMetric",
    "StructuralSimilarityMetric",
    "SuccessRate",
    "TREMetric",
    "bootstrap_interval",
    "foreground_mask",
    "foreground_tre",
    "landmark_tre",
    "mutual_information",
    "otsu_threshold",
    "scale_intensity",
    "similarity",
    "squared_error",
    "structural_similarity",
    "success_rate",
    "target_registration_error",
    "wilson_interval",
]
