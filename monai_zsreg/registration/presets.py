# SPDX-License-Identifier: Apache-2.0
"""The named methods: which parameters of `ZeroShotAffineNet` a preset stands for."""

from __future__ import annotations

from typing import Any

from monai_zsreg.errors import RegistrationError

__all__ = ["DEFAULT_PRESET", "PRESETS", "preset_options"]

DEFAULT_PRESET = "keypoints"

PRESETS: dict[str, dict[str, Any]] = {
    # Kori and Krishnamurthi as written; README of the bundle: which readings were tried
    "paper": {"estimator": "mlp"},
    # the paper mended: contrast-symmetric maps of coarser copies, consensus in place of the regressor
    "keypoints": {
        "estimator": "consensus",
        "symmetric": True,
        "scales": (2, 3, 4),
        "iterations": 7,
        "coarse_passes": 5,
    },
}


def preset_options(preset: str) -> dict[str, Any]:
    """A copy of a preset's parameters.

    Raises:
        RegistrationError: no such preset.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RegistrationError("preset", preset, "one of " + ", ".join(repr(name) for name in PRESETS))
    return dict(PRESETS[preset])
