# SPDX-License-Identifier: Apache-2.0
"""The registration methods, ours and others: one module each, and the table of them.

A module of the table has ``prepare(fixed, moving, task)``, which makes the method's own images and returns a function
that registers them: the pull matrix ``(D+1, D+1)`` from fixed world to moving world, RAS mm, or for a deformable task
the displacement ``[D, *fixed.shape]``; also a pair of that and a function that gives what the method says of itself,
which is not timed. It is imported and run in a process of its own; ``ImportError`` means that it
cannot run here. It may have ``WHOLE``, a script that reads the files ``fixed`` and ``moving``, registers and writes
``output``, as a user of that package would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from monai_zsreg.benchmark.volumes import Volume
from monai_zsreg.geometry import flip_points, itk_lattice


@dataclass(frozen=True)
class Task:
    """What a method is asked for."""

    start: str = ""  # where it starts; of ours the preset, options after commas (``robust,search=none``)
    transform: str = "affine"  # or rigid, deformable
    threads: int = 2
    seed: int = 0
    device: str | None = None  # where ours runs; None for its own choice
    vgg19_weights: str | None = None  # for the presets of ours that need them
    mask: np.ndarray | None = None  # where the fixed image counts; None for everywhere


LEVELS = (0.5, 0.9, 0.95)  # of the intervals of ours that are checked
ALL = (math.inf, math.inf)


@dataclass(frozen=True)
class Peer:
    """An entry of the table."""

    package: str  # what to install
    # by number of dimensions how many cases of a row it gets, in a whole and in a quick run: few where one takes a
    # minute or more
    cases: Mapping[int, tuple[float, float]]
    starts: tuple[str, ...] = ("",)  # where it starts when only the method is named
    extra_starts: tuple[str, ...] = ()  # which run only when named
    # its deformable methods: the name in the table, and what ``Task.start`` is then
    deformable: Mapping[str, str] = field(default_factory=dict)


_ANTS = {"SyN": "SyNOnly", "SyNQuick": "antsRegistrationSyNQuick[so]"}
_GREEDY = {"greedy NCC": "-m NCC 2x2x2 -s 1.5vox 0.5vox", "greedy NMI": "-m NMI"}
_ELASTIX = {"elastix B-spline": "bspline"}

PEERS = {
    "ours": Peer("monai-zsreg", {2: ALL, 3: ALL}, (), deformable={"ours": "robust,search=none"}),
    "elastix": Peer("itk-elastix", {2: ALL, 3: (40, 2)}, ("default", "mass"), deformable=_ELASTIX),
    "simpleelastix": Peer("SimpleITK-SimpleElastix", {2: ALL, 3: (10, 0)}, ("default", "mass")),
    "ants": Peer("antspyx", {2: (math.inf, 6), 3: (20, 0)}, ("default",), ("identity",), _ANTS),
    "greedy": Peer("picsl-greedy", {2: ALL, 3: (20, 0)}, ("default",), ("centers",), _GREEDY),
    "simpleitk": Peer("SimpleITK", {2: (math.inf, 2), 3: (10, 0)}, ("exhaustive",), ("mass",)),
    "sift": Peer("opencv-python-headless", {2: ALL}),
    "convexadam": Peer("convexAdam", {3: ALL}, (), deformable={"ConvexAdam": ""}),
    "none": Peer("numpy", {2: ALL, 3: ALL}, deformable={"affine alone": ""}),
}


def matrix_of(send: Callable[[list[float]], Sequence[float]], dims: int) -> np.ndarray:
    """RAS matrix ``(D+1, D+1)`` of a transform that sends points of the fixed world (LPS) to the moving world."""
    corners = np.vstack([np.zeros(dims), 100 * np.eye(dims)])
    sent = flip_points(np.array([list(send(point.tolist())) for point in flip_points(corners)], dtype=np.float64))
    matrix = np.eye(dims + 1)
    matrix[:-1, :-1] = (sent[1:] - sent[0]).T / 100
    matrix[:-1, -1] = sent[0]
    return matrix


def field_of(vectors: np.ndarray) -> np.ndarray:
    """Displacements ``[D, *shape]``, RAS mm, of an array of ITK's vectors, ``[*reversed shape, D]``, LPS mm."""
    return flip_points(vectors).transpose(*range(vectors.ndim - 1, -1, -1)).astype(np.float32)


def itk_image(image: Volume, from_array: Callable[[np.ndarray], Any], direction: Callable[[np.ndarray], Any]) -> Any:
    """As a wrapper of ITK takes it, which makes images and directions of arrays."""
    spacing, origin, axes = itk_lattice(image.grid)
    # these wrappers reverse the axes of an array
    made = from_array(np.ascontiguousarray(image.values.T, dtype=np.float32))
    made.SetSpacing(spacing.tolist())
    made.SetOrigin(origin.tolist())
    made.SetDirection(direction(np.ascontiguousarray(axes)))
    return made


def sitk_image(image: Volume) -> Any:
    """As SimpleITK takes it."""
    import SimpleITK as sitk

    return itk_image(image, sitk.GetImageFromArray, lambda axes: axes.ravel().tolist())
