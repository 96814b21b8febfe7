# SPDX-License-Identifier: Apache-2.0
"""ConvexAdam; deformable only, without masks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from convexAdam.convex_adam_MIND import convex_adam_pt

from monai_zsreg.benchmark.peers import Task
from monai_zsreg.benchmark.volumes import Volume


def prepare(fixed: Volume, moving: Volume, task: Task) -> Callable[[], np.ndarray]:
    torch.set_num_threads(task.threads)
    if task.mask is not None:
        raise NotImplementedError("run without masks")

    def run() -> np.ndarray:
        found = convex_adam_pt(fixed.values.copy(), moving.values.copy(), device=torch.device("cpu"))
        return np.einsum("ij,...j->i...", fixed.affine[:-1, :-1], found).astype(np.float32)

    return run
