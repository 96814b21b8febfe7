# SPDX-License-Identifier: Apache-2.0
"""What the headers say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from monai_zsreg.benchmark.peers import Task
from monai_zsreg.benchmark.volumes import Volume


def prepare(fixed: Volume, moving: Volume, task: Task) -> Callable[[], np.ndarray]:
    if task.transform == "deformable":
        return lambda: np.zeros((fixed.dims, *fixed.shape), dtype=np.float32)
    return lambda: np.eye(fixed.dims + 1)
