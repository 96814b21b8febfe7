# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms that register an image pair, apply a known transform and save one."""

from __future__ import annotations

from monai_zsreg.transforms.array import ApplyAffineRegistration, RegisterAffine, RegisterDeformable, SaveAffine
from monai_zsreg.transforms.dictionary import (
    ApplyAffineRegistrationD,
    ApplyAffineRegistrationd,
    ApplyAffineRegistrationDict,
    RegisterAffineD,
    RegisterAffined,
    RegisterAffineDict,
    RegisterDeformableD,
    RegisterDeformabled,
    RegisterDeformableDict,
    SaveAffineD,
    SaveAffined,
    SaveAffineDict,
)

__all__ = [
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
