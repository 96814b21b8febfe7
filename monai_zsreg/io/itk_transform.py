# SPDX-License-Identifier: Apache-2.0
"""The former names of ITK's part of `monai_zsreg.io.transforms`, until the last user of them is gone."""

from functools import partial

from monai_zsreg.io.transforms import FORMATS, read_transform, write_transform

__all__ = ["ITK_SUFFIXES", "read_itk_transform", "write_itk_transform"]

ITK_SUFFIXES = FORMATS["itk"].suffixes
read_itk_transform = partial(read_transform, format="itk")
write_itk_transform = partial(write_transform, format="itk")
