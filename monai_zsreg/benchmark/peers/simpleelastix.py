# SPDX-License-Identifier: Apache-2.0
"""SimpleElastix, at the default parameter map; starts as those of elastix."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import numpy as np
import SimpleITK as sitk

from monai_zsreg.benchmark.peers import Task, matrix_of, sitk_image
from monai_zsreg.benchmark.volumes import Volume


def prepare(fixed: Volume, moving: Volume, task: Task) -> Callable[[], np.ndarray]:
    if not hasattr(sitk, "ElastixImageFilter"):
        # one module name, two packages: the one installed last is there
        raise ImportError("the SimpleITK that is installed is the package SimpleITK, which has no elastix")
    dims = fixed.dims
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(task.threads)
    settings = sitk.GetDefaultParameterMap(task.transform)
    settings["WriteResultImage"] = ["false"]
    if task.start == "mass":
        settings["AutomaticTransformInitialization"] = ["true"]
        settings["AutomaticTransformInitializationMethod"] = ["CenterOfGravity"]
    method = sitk.ElastixImageFilter()
    method.SetParameterMap(settings)
    method.SetFixedImage(sitk_image(fixed))
    method.SetMovingImage(sitk_image(moving))
    method.SetNumberOfThreads(task.threads)
    method.LogToConsoleOff()
    method.LogToFileOff()
    rigid = sitk.Euler2DTransform() if dims == 2 else sitk.Euler3DTransform()
    transform = sitk.AffineTransform(dims) if task.transform == "affine" else rigid

    def run() -> np.ndarray:
        # it leaves files behind whatever it is told
        with tempfile.TemporaryDirectory(prefix="zsreg-") as folder:
            method.SetOutputDirectory(folder)
            method.Execute()
        found = method.GetTransformParameterMap(0)
        transform.SetParameters([float(v) for v in found["TransformParameters"]])
        transform.SetCenter([float(v) for v in found["CenterOfRotationPoint"]])
        return matrix_of(transform.TransformPoint, dims)

    return run
