# SPDX-License-Identifier: Apache-2.0
"""The error and warning classes of the package."""

from __future__ import annotations

from typing import Any

_LONGEST_VALUE = 200


class RegistrationError(ValueError):
    """Something the caller passed cannot be used.

    Args:
        argument: name of the argument, as the caller wrote it.
        value: what it was. Long values are shortened in the message.
        allowed: what is allowed, or how to mend it, as the end of the sentence "expected ...".
    """

    def __init__(self, argument: str, value: Any = None, allowed: str = "") -> None:
        self.argument = argument
        self.value = value
        self.allowed = allowed
        shown = repr(value)
        if len(shown) > _LONGEST_VALUE:
            shown = shown[: _LONGEST_VALUE - 3] + "..."
        # torch rebuilds an exception of a data loader's worker from its traceback text alone
        super().__init__(f"{argument}: got {shown}, expected {allowed}" if allowed else argument)

    def __reduce__(self) -> tuple[type[RegistrationError], tuple[str, Any, str]]:
        # exceptions cross process borders; the default would pass the message alone
        return type(self), (self.argument, self.value, self.allowed)


class RegistrationFailure(RuntimeError):
    """The input was fine, but no transform was found that can be trusted."""


class RegistrationWarning(UserWarning):
    """A pair could be run but its result should not be trusted without a look."""


def require(good: bool, argument: str, value: Any, allowed: str) -> None:
    """Raise a `RegistrationError` of these three unless ``good``."""
    if not good:
        raise RegistrationError(argument, value, allowed)
