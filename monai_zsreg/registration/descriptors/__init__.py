# SPDX-License-Identifier: Apache-2.0
"""Local descriptors of the fine stage. A new one is a file beside this one and an entry in `DESCRIPTORS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from monai_zsreg.registration.descriptors.mind import MINDSSC
from monai_zsreg.registration.descriptors.scores import LocalScores
from monai_zsreg.registration.descriptors.vgg19 import VGG19Patches

__all__ = ["DESCRIPTORS", "MINDSSC", "Descriptor", "LocalScores", "VGG19Patches"]


class Descriptor(Protocol):
    """Describes the inner points of patches ``[Q, *n]``: ``[Q, C, *(n - 2 margin)]``, values of order one.

    Attributes:
        name: key in `DESCRIPTORS`; limits and calibration are kept under it.
        margin: lattice steps that are lost on each side.
        worst: squared difference beyond which more does not count.
    """

    name: str
    margin: int
    worst: float

    def __call__(self, patches: Tensor) -> Tensor: ...

    def to(self, device: Any) -> Any: ...


#: name to what makes it from the number of dimensions and the source of VGG-19's weights
DESCRIPTORS: dict[str, Callable[[int, Any], Descriptor]] = {
    MINDSSC.name: lambda dims, weights: MINDSSC(dims),
    VGG19Patches.name: VGG19Patches,
}
