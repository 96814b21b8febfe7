# SPDX-License-Identifier: Apache-2.0
"""greedy through picsl-greedy, NMI; ``default`` starts at what the headers say, ``centers`` at the image centers."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import picsl_greedy
import SimpleITK as sitk

from monai_zsreg.benchmark.peers import Task, field_of, sitk_image
from monai_zsreg.benchmark.volumes import Volume

WHOLE = """
import os, tempfile
from picsl_greedy import Greedy3D
matrix = os.path.join(tempfile.mkdtemp(), "affine.mat")
greedy = Greedy3D()
greedy.execute(f"-d 3 -a -m NMI -n 100x50x10 -i {fixed} {moving} -o {matrix}")
greedy.execute(f"-d 3 -rf {fixed} -rm {moving} {output} -r {matrix}")
"""


def prepare(fixed: Volume, moving: Volume, task: Task) -> Callable[[], np.ndarray]:
    images = {"fixed": sitk_image(fixed), "moving": sitk_image(moving)}
    start = "-ia-image-centers" if task.start == "centers" else "-ia-identity"
    affine = f"-a -dof {6 if task.transform == 'rigid' else 12} -m NMI {start} -seed {task.seed + 1}"
    command = f"-d {fixed.dims} -i fixed moving -o found -n 100x50x10 -threads {task.threads} -V 0 "
    command += task.start if task.transform == "deformable" else affine
    if task.mask is not None:
        images["mask"] = sitk_image(Volume(task.mask, fixed.affine))
        command += " -gm mask"

    def run() -> np.ndarray:
        greedy = picsl_greedy.Greedy2D() if fixed.dims == 2 else picsl_greedy.Greedy3D()
        text = io.StringIO()
        greedy.execute(command, out=text, err=text, found=None, **images)
        if task.transform == "deformable":
            return field_of(sitk.GetArrayFromImage(greedy["found"]))
        # its matrices are RAS, fixed to moving, as ours
        return np.asarray(greedy["found"], dtype=np.float64)

    return run
