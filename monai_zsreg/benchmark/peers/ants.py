# SPDX-License-Identifier: Apache-2.0
"""ANTs through antspyx; its default start is the centers of mass, ``identity`` exists for comparison."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import ants
import numpy as np

from monai_zsreg.benchmark.peers import Task, matrix_of
from monai_zsreg.benchmark.volumes import Volume
from monai_zsreg.geometry import itk_lattice
from monai_zsreg.io.displacement import read_displacement

WHOLE = """
import ants
images = ants.image_read(fixed), ants.image_read(moving)
ants.image_write(ants.registration(*images, type_of_transform="Affine")["warpedmovout"], output)
"""


def prepare(fixed: Volume, moving: Volume, task: Task) -> Callable[[], np.ndarray]:
    deformable = task.transform == "deformable"
    options = {
        "fixed": _image(fixed),
        "moving": _image(moving),
        "mask": None if task.mask is None else _image(Volume(task.mask, fixed.affine)),
        "type_of_transform": task.start if deformable else task.transform.capitalize(),
        "initial_transform": "Identity" if deformable or task.start == "identity" else None,
        "random_seed": task.seed + 1,
    }

    def run() -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="zsreg-") as folder:
            files = ants.registration(**options, outprefix=f"{folder}/")["fwdtransforms"]
            if deformable:
                return read_displacement(next(file for file in files if file.endswith("Warp.nii.gz")))[0].numpy()
            found = ants.read_transform(files[0])
        return matrix_of(found.apply_to_point, fixed.dims)

    return run


def _image(image: Volume) -> Any:
    spacing, origin, direction = itk_lattice(image.grid)
    values = np.ascontiguousarray(image.values, dtype=np.float32)
    return ants.from_numpy(values, origin=origin.tolist(), spacing=spacing.tolist(), direction=direction)
