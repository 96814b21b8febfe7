# SPDX-License-Identifier: Apache-2.0
"""Image files, transform files, landmark files, and writing files whole or not at all."""

from __future__ import annotations

from monai_zsreg.io.files import atomic_path, output_folder, write_json
from monai_zsreg.io.images import Image, load_image, read_image, write_image
from monai_zsreg.io.landmarks import Landmarks, pair_landmarks, read_landmarks
from monai_zsreg.io.transforms import TRANSFORM_FORMATS, read_transform, write_transform

__all__ = [
    "Image",
    "Landmarks",
    "TRANSFORM_FORMATS",
    "atomic_path",
    "load_image",
    "output_folder",
    "pair_landmarks",
    "read_image",
    "read_landmarks",
    "read_transform",
    "write_image",
    "write_json",
    "write_transform",
]
