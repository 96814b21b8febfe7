# SPDX-License-Identifier: Apache-2.0
"""ANTs through antspyx; its default start is the centers of mass, ``identity`` exists for comparison."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import ants
import numpy as np

from monai_zsreg.benchmark.methods import Task
from monai_zsreg.benchmark.peers import lattice_of, matrix_of
from monai_zsreg.benchmark.volumes import Volume

__all__ = ["WHOLE", "prepare"]

WHOLE = """
import ants
images = ants.image_read(fixed), ants.image_read(moving)
ants.image_write(ants.registration(*images, type_of_transform="Affine")["warpedmovout"], output)
"""


def prepare(fixed: Volume, moving: Volume, task: Task) -> Callable[[], np.ndarray]:
    images = [_image(image) for image in (fixed, moving)]

    def run() -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="zsreg-") as folder:
            done = ants.registration(
                *images,
                type_of_transform=task.transform.capitalize(),
                initial_transform="Identity" if task.start == "identity" else None,
                outprefix=f"{folder}/",
                random_seed=task.seed + 1,
            )
            found = ants.read_transform(done["fwdtransforms"][0])
        return matrix_of(found.apply_to_point, fixed.dims)

    return run


def _image(image: Volume) -> Any:
    spacing, origin, direction = lattice_of(image)
    values = np.ascontiguousarray(image.values, dtype=np.float32)
    return ants.from_numpy(values, origin=origin.tolist(), spacing=spacing.tolist(), direction=direction)
