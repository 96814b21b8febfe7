# SPDX-License-Identifier: Apache-2.0
"""``monai_zsreg.register`` at a preset, options after commas (``robust,search=none``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from monai_zsreg import RegistrationResult, register
from monai_zsreg.benchmark.peers import LEVELS, Task
from monai_zsreg.benchmark.volumes import Volume, foreground
from monai_zsreg.registration.displacement import map_points, sampled

Answer = dict[str, Any]


def prepare(fixed: Volume, moving: Volume, task: Task) -> Callable[[], tuple[np.ndarray, Callable[[], Answer]]]:
    """Here what it says of itself comes beside the transform."""
    torch.set_num_threads(task.threads)
    preset, *more = task.start.split(",")
    options: dict[str, Any] = dict(item.split("=", 1) for item in more)
    options |= {"device": task.device, "vgg19_weights": task.vgg19_weights, "seed": task.seed}
    if task.mask is not None:
        options["fixed_mask"] = Volume(task.mask, fixed.affine).image
    images = fixed.image, moving.image

    def run() -> tuple[np.ndarray, Callable[[], Answer]]:
        result = register(*images, preset=preset, transform=task.transform, **options)
        found = result.affine
        if task.transform == "deformable":
            found = sampled(partial(map_points, result.pull), fixed.grid).displacement.numpy()
        return found, lambda: _own_word(result, fixed)

    return run


def _own_word(result: RegistrationResult, fixed: Volume) -> Answer:
    """Verdict, and how far off the result may be at one random point of the foreground."""
    answer: Answer = {"verdict": result.verdict, "score": float(result.score), "reasons": result.reasons}
    if result.covariance is not None:
        inside = fixed.points(foreground(fixed.values))
        point = inside[np.random.default_rng(len(inside)).integers(len(inside))][None]
        bounds = {str(level): float(result.uncertainty_at(point, level)[0]) for level in LEVELS}
        answer |= {"point": point[0].tolist(), "spread": float(result.uncertainty_at(point)[0]), "bounds": bounds}
    return answer
