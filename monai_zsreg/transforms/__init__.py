# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms that register an image pair, apply a known transform and save one."""

from __future__ import annotations

from monai_zsreg.transforms import dictionary
from monai_zsreg.transforms.array import ApplyAffineRegistration, RegisterAffine, RegisterDeformable, SaveAffine
from monai_zsreg.transforms.dictionary import *  # noqa: F403

__all__ = ["ApplyAffineRegistration", "RegisterAffine", "RegisterDeformable", "SaveAffine"]
__all__ += dictionary.__all__
