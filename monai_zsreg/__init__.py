# SPDX-License-Identifier: Apache-2.0
"""Zero-shot, multi-modal, affine image registration for MONAI."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monai_zsreg.errors import RegistrationError, RegistrationFailure, RegistrationWarning
    from monai_zsreg.registration import Prepared, RegistrationResult, register

__all__ = [
    "Prepared",
    "RegistrationError",
    "RegistrationFailure",
    "RegistrationResult",
    "RegistrationWarning",
    "__version__",
    "register",
]

__version__ = "0.1.0"

# imported when asked for: torch takes two seconds, and a command that only prints its help needs none of it
_HOMES = {name: "monai_zsreg.errors" if name.endswith(("Error", "Failure", "Warning")) else "monai_zsreg.registration"
          for name in __all__ if not name.startswith("__")}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # kept, so that it is looked up once, and is there for tools that read a module's own names
    globals()[name] = found = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
