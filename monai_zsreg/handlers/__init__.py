# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers for the metrics of this package."""

from __future__ import annotations

from monai_zsreg.handlers.metrics import (
    ForegroundDiceHandler,
    MSEHandler,
    MutualInformationHandler,
    RMSEHandler,
    SSIMHandler,
    TREHandler,
)

__all__ = [
    "ForegroundDiceHandler",
    "MSEHandler",
    "MutualInformationHandler",
    "RMSEHandler",
    "SSIMHandler",
    "TREHandler",
]
