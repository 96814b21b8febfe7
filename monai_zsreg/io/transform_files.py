# SPDX-License-Identifier: Apache-2.0
"""The former name of `monai_zsreg.io.transforms`, until the last user of it is gone."""

from monai_zsreg.io.transforms import TRANSFORM_FORMATS, GridLike, read_transform, write_transform

__all__ = ["TRANSFORM_FORMATS", "GridLike", "read_transform", "write_transform"]
