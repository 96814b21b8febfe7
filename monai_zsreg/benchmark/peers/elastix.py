# SPDX-License-Identifier: Apache-2.0
"""elastix through itk-elastix, at the default parameter map.

``default`` starts at the identity (the map asks for no initialization), ``mass`` at the centers of mass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import itk
import numpy as np

from monai_zsreg.benchmark.methods import Task
from monai_zsreg.benchmark.peers import lattice_of, matrix_of
from monai_zsreg.benchmark.volumes import Volume

__all__ = ["WHOLE", "prepare"]

WHOLE = """
import itk
images = itk.imread(fixed, itk.F), itk.imread(moving, itk.F)
parameters = itk.ParameterObject.New()
parameters.AddParameterMap(parameters.GetDefaultParameterMap("affine"))
moved, transform = itk.elastix_registration_method(*images, parameter_object=parameters)
itk.imwrite(moved, output)
"""


def prepare(fixed: Volume, moving: Volume, task: Task) -> Callable[[], np.ndarray]:
    if not hasattr(itk, "ElastixRegistrationMethod"):
        raise ImportError("the itk that is installed has no elastix, which is the package itk-elastix")
    images = [_image(image) for image in (fixed, moving)]
    parameters = itk.ParameterObject.New()
    settings = parameters.GetDefaultParameterMap(task.transform)
    # the moved image is not part of what is timed
    settings["WriteResultImage"] = ["false"]
    if task.start == "mass":
        settings["AutomaticTransformInitialization"] = ["true"]
        settings["AutomaticTransformInitializationMethod"] = ["CenterOfGravity"]
    parameters.AddParameterMap(settings)

    def run() -> np.ndarray:
        method = itk.ElastixRegistrationMethod.New(*images)
        method.SetParameterObject(parameters)
        method.SetLogToConsole(False)
        method.SetNumberOfThreads(task.threads)
        method.Update()
        found = method.ConvertToItkTransform(method.GetCombinationTransform())
        point = itk.Point[itk.D, fixed.dims]
        return matrix_of(lambda place: list(found.TransformPoint(point(place))), fixed.dims)

    return run


def _image(image: Volume) -> Any:
    spacing, origin, direction = lattice_of(image)
    made = itk.image_from_array(np.ascontiguousarray(image.values.T, dtype=np.float32))
    made.SetSpacing(spacing.tolist())
    made.SetOrigin(origin.tolist())
    made.SetDirection(itk.matrix_from_array(np.ascontiguousarray(direction)))
    return made
