# SPDX-License-Identifier: Apache-2.0
"""elastix through itk-elastix, at the default parameter map.

``default`` starts at the identity (the map asks for no initialization), ``mass`` at the centers of mass.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import itk
import numpy as np

from monai_zsreg.benchmark.peers import Task, field_of, itk_image, matrix_of
from monai_zsreg.benchmark.volumes import Volume

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
    images = [itk_image(image, itk.image_from_array, itk.matrix_from_array) for image in (fixed, moving)]
    deformable = task.transform == "deformable"
    parameters = itk.ParameterObject.New()
    settings = parameters.GetDefaultParameterMap(task.start if deformable else task.transform)
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
        if task.mask is not None:
            mask = itk.image_from_array(np.ascontiguousarray(task.mask.T.astype(np.uint8)))
            mask.CopyInformation(images[0])
            method.SetFixedMask(mask)
        method.Update()
        if deformable:
            found = method.GetTransformParameterObject()
            shown = itk.TransformixFilter.New(images[1], transform_parameter_object=found)
            shown.ComputeDeformationFieldOn()
            with tempfile.TemporaryDirectory(prefix="zsreg-") as folder:
                # it writes the field to a file as well
                shown.SetOutputDirectory(folder)
                shown.Update()
            return field_of(itk.array_from_image(shown.GetOutputDeformationField()))
        found = method.ConvertToItkTransform(method.GetCombinationTransform())
        point = itk.Point[itk.D, fixed.dims]
        return matrix_of(lambda place: list(found.TransformPoint(point(place))), fixed.dims)

    return run
