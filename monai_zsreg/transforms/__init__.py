# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms that register an image pair, apply a known transform and save one."""

from __future__ import annotations

from monai_zsreg.transforms.array import ApplyAffineRegistration, RegisterAffine, SaveAffine
from monai_zsreg.transforms.deformable import (
    ApplyDeformation,
    RegisterDeformable,
    RegisterDeformableD,
    RegisterDeformabled,
    RegisterDeformableDict,
)
from monai_zsreg.transforms.dictionary import (
    ApplyAffineRegistrationD,
    ApplyAffineRegistrationd,
    ApplyAffineRegistrationDict,
    RegisterAffineD,
    RegisterAffined,
    RegisterAffineDict,
    SaveAffineD,
    SaveAffined,
    SaveAffineDict,
)

__all__ = [
    "ApplyDeformation",
    "RegisterDeformable",
    "RegisterDeformableD",
    "RegisterDeformableDict",
    "RegisterDeformabled",
    "ApplyAffineRegistration",
    "ApplyAffineRegistrationD",
    "ApplyAffineRegistrationDict",
    "ApplyAffineRegistrationd",
    "RegisterAffine",
    "RegisterAffineD",
    "RegisterAffineDict",
    "RegisterAffined",
    "SaveAffine",
    "SaveAffineD",
    "SaveAffineDict",
    "SaveAffined",
]
