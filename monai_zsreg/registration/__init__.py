# SPDX-License-Identifier: Apache-2.0
"""Registration of a pair: from two images to a transform, its error bars and a verdict."""

from monai_zsreg.registration.module import AffineRegistration
from monai_zsreg.registration.pair import DEFAULT_PRESET, PRESETS, check_options, register
from monai_zsreg.registration.prepared import Prepared, resolve_device
from monai_zsreg.registration.result import RegistrationResult

__all__ = [
    "AffineRegistration",
    "DEFAULT_PRESET",
    "PRESETS",
    "Prepared",
    "RegistrationResult",
    "check_options",
    "register",
    "resolve_device",
]
