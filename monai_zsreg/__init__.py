# SPDX-License-Identifier: Apache-2.0
"""Zero-shot, multi-modal, affine image registration for MONAI."""

from monai_zsreg.errors import RegistrationError, RegistrationFailure, RegistrationWarning
from monai_zsreg.registration import RegistrationResult, register

__all__ = [
    "RegistrationError",
    "RegistrationFailure",
    "RegistrationResult",
    "RegistrationWarning",
    "__version__",
    "register",
]

__version__ = "0.1.0"
