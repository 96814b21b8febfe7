# SPDX-License-Identifier: Apache-2.0
"""greedy through picsl-greedy, NMI; ``default`` starts at what the headers say, ``centers`` at the image centers."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import picsl_greedy

from monai_zsreg.benchmark.methods import Task
from monai_zsreg.benchmark.peers import sitk_image
from monai_zsreg.benchmark.volumes import Volume

__all__ = ["WHOLE", "prepare"]

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
    command = f"-d {fixed.dims} -a -dof {6 if task.transform == 'rigid' else 12} -m NMI -n 100x50x10 {start} -V 0"
    command += f" -i fixed moving -o found -threads {task.threads} -seed {task.seed + 1}"

    def run() -> np.ndarray:
        greedy = picsl_greedy.Greedy2D() if fixed.dims == 2 else picsl_greedy.Greedy3D()
        text = io.StringIO()
        greedy.execute(command, out=text, err=text, found=None, **images)
        # its matrices are RAS, fixed to moving, as ours
        return np.asarray(greedy["found"], dtype=np.float64)

    return run
