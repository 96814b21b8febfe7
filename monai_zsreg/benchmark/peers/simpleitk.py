# SPDX-License-Identifier: Apache-2.0
"""SimpleITK's registration framework with Mattes mutual information, in three resolutions.

``exhaustive`` tries a lattice of rotations about the centers of mass first, coarsely; ``mass`` starts at the centers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import SimpleITK as sitk

from monai_zsreg.benchmark.peers import Task, matrix_of, sitk_image
from monai_zsreg.benchmark.volumes import Volume

# steps on each side of zero, by number of dimensions: 30 degrees apart in 2D, 45 in 3D
_STEPS = {2: 6, 3: 4}


def prepare(fixed: Volume, moving: Volume, task: Task) -> Callable[[], np.ndarray]:
    images = sitk_image(fixed), sitk_image(moving)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(task.threads)
    dims = fixed.dims

    def run() -> np.ndarray:
        rigid = sitk.Euler2DTransform() if dims == 2 else sitk.Euler3DTransform()
        start = sitk.CenteredTransformInitializer(*images, rigid, sitk.CenteredTransformInitializerFilter.MOMENTS)
        if task.start == "exhaustive":
            method = _method(task, dims, [4], [2])
            angles = 1 if dims == 2 else 3
            method.SetOptimizerAsExhaustive([_STEPS[dims]] * angles + [0] * dims)
            method.SetOptimizerScales([math.pi / _STEPS[dims]] * angles + [1.0] * dims)
            method.SetInitialTransform(start)
            start = method.Execute(*images)
        method = _method(task, dims, [4, 2, 1], [2, 1, 0])
        method.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-3, 300, relaxationFactor=0.7)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(_refined(start, dims, task.transform))
        return matrix_of(method.Execute(*images).TransformPoint, dims)

    return run


def _method(task: Task, dims: int, shrink: list[int], smooth: list[int]) -> Any:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(50)
    if dims == 3:
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(0.1, task.seed + 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel(smooth)
    return method


def _refined(start: Any, dims: int, transform: str) -> Any:
    """A transform with the degrees of freedom that are asked for, at a rigid one."""
    rigid = sitk.Euler2DTransform(start) if dims == 2 else sitk.Euler3DTransform(start)
    if transform == "rigid":
        return rigid
    made = sitk.AffineTransform(dims)
    made.SetCenter(rigid.GetCenter())
    made.SetMatrix(rigid.GetMatrix())
    made.SetTranslation(rigid.GetTranslation())
    return made
