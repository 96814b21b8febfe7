# SPDX-License-Identifier: Apache-2.0
"""Registration of pairs of images."""

from monai_zsreg.registration.pair import register
from monai_zsreg.registration.presets import DEFAULT_PRESET, PRESETS
from monai_zsreg.registration.result import RegistrationResult
from monai_zsreg.registration.uncertainty import Uncertainty

__all__ = ["DEFAULT_PRESET", "PRESETS", "RegistrationResult", "Uncertainty", "register"]
