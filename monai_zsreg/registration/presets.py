# SPDX-License-Identifier: Apache-2.0
"""The named methods: which parameters of `RobustEngine` or `ZeroShotAffineNet` a preset stands for."""

from __future__ import annotations

from typing import Any

from monai_zsreg.errors import RegistrationError

__all__ = ["DEFAULT_PRESET", "PRESETS", "ROBUST", "preset_options"]

#: the preset of `RobustEngine`; all others are `ZeroShotAffineNet`'s
ROBUST = "robust"

DEFAULT_PRESET = ROBUST

PRESETS: dict[str, dict[str, Any]] = {
    # global search, then descriptors; coarse "keypoints" puts the preset of that name in the place of the search
    ROBUST: {"coarse": "search", "search": "global", "features": "mind"},
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
