# SPDX-License-Identifier: Apache-2.0
"""Other registration methods: one module each, and the table of them.

A module of the table has ``prepare(fixed, moving, task)``, which makes the method's own images and returns a function
that registers them: the pull matrix ``(D+1, D+1)`` from fixed world to moving world, RAS mm. It is imported and run in
a process of its own; ``ImportError`` means that it cannot run here. It may have ``WHOLE``, a script that reads the
files ``fixed`` and ``moving``, registers and writes ``output``, as a user of that package would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from monai_zsreg.benchmark.volumes import Volume
from monai_zsreg.geometry import Grid, flip_points, itk_lattice

__all__ = ["PEERS", "Peer", "lattice_of", "matrix_of", "sitk_image"]


@dataclass(frozen=True)
class Peer:
    """An entry of the table."""

    package: str  # what to install
    starts: tuple[str, ...] = ("",)  # where it starts when only the method is named
    extra_starts: tuple[str, ...] = ()  # which run only when named
    dims: tuple[int, ...] = (2, 3)
    # cases of a row by number of dimensions where it takes a minute or more, in a whole and in a quick run
    cases: Mapping[int, int] = field(default_factory=dict)
    quick_cases: Mapping[int, int] = field(default_factory=lambda: {3: 0})


PEERS = {
    "elastix": Peer("itk-elastix", ("default", "mass"), cases={3: 40}, quick_cases={3: 2}),
    "simpleelastix": Peer("SimpleITK-SimpleElastix", ("default", "mass"), cases={3: 10}),
    "ants": Peer("antspyx", ("default",), ("identity",), cases={3: 20}, quick_cases={2: 6, 3: 0}),
    "greedy": Peer("picsl-greedy", ("default",), ("centers",), cases={3: 20}),
    "simpleitk": Peer("SimpleITK", ("exhaustive",), ("mass",), cases={3: 10}, quick_cases={2: 2, 3: 0}),
    "sift": Peer("opencv-python-headless", dims=(2,)),
}


def matrix_of(send: Callable[[list[float]], Sequence[float]], dims: int) -> np.ndarray:
    """RAS matrix ``(D+1, D+1)`` of a transform that sends points of the fixed world (LPS) to the moving world."""
    corners = np.vstack([np.zeros(dims), 100 * np.eye(dims)])
    sent = flip_points(np.array([list(send(point.tolist())) for point in flip_points(corners)], dtype=np.float64))
    matrix = np.eye(dims + 1)
    matrix[:-1, :-1] = (sent[1:] - sent[0]).T / 100
    matrix[:-1, -1] = sent[0]
    return matrix


def lattice_of(image: Volume) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spacing, origin and direction of an ITK image (LPS)."""
    return itk_lattice(Grid(image.shape, torch.from_numpy(image.affine)))


def sitk_image(image: Volume) -> Any:
    """As SimpleITK takes it."""
    import SimpleITK as sitk

    spacing, origin, direction = lattice_of(image)
    # SimpleITK reverses the axes of an array
    made = sitk.GetImageFromArray(np.ascontiguousarray(image.values.T, dtype=np.float32))
    made.SetSpacing(spacing.tolist())
    made.SetOrigin(origin.tolist())
    made.SetDirection(direction.ravel().tolist())
    return made
