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
    # the paper mended: contrast-symmetric maps, consensus in place of the regressor
    "keypoints": {"estimator": "consensus", "symmetric": True, "scales": (1, 2, 4), "iterations": 4},
}


# a pass over a volume takes seconds, not tenths
_IN_3D: dict[str, dict[str, Any]] = {"keypoints": {"scales": (1, 2), "iterations": 2}}


def preset_options(preset: str, spatial_dims: int) -> dict[str, Any]:
    """A copy of a preset's parameters for 2 or 3 spatial dimensions.

    Raises:
        RegistrationError: no such preset.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RegistrationError("preset", preset, "one of " + ", ".join(repr(name) for name in PRESETS))
    return PRESETS[preset] | (_IN_3D.get(preset, {}) if spatial_dims == 3 else {})
