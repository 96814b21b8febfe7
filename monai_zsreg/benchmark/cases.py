# SPDX-License-Identifier: Apache-2.0
"""What a case is: a row of the table, the images it is made of, and the sample that comes out.

A case is drawn from its name and the seed alone. So the first N cases of a row are the same however many are asked
for, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np

from monai_zsreg.benchmark.volumes import Volume

__all__ = ["SUCCESS", "Case", "Row", "Sample", "interleave"]

SUCCESS = 2.0  # mm, pixels in 2D

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        protocol: what is done to the images; what ``--protocols`` selects.
        dims: 2 or 3.
        kind: ``exact`` (the truth is exact), ``real`` (two scans: the truth is off by the pair's residual), ``natural``
            (channels of a photograph: exact), ``between`` (two people: no truth, label Dice) or ``header`` (two scans
            that their headers put together).
        cases: default number of cases.
        quick: number of cases in a quick run.
        detail: more for the name.
        transform: what the methods look for.
    """

    protocol: str
    dims: int
    kind: str
    cases: int
    quick: int
    detail: str = ""
    transform: str = "affine"

    @property
    def name(self) -> str:
        return self.detail or f"{self.protocol}-{self.dims}d-{self.kind}"


@dataclass(frozen=True)
class Case:
    """A case before it is made.

    Args:
        row: the row that it counts in.
        index: its number in the row.
        subject: the unit that intervals resample.
        images: which images and slice, for the name.
        seed: seed of the run.
        make: makes the sample.
        notes: more for the results file.
    """

    row: Row
    index: int
    subject: str
    images: str
    seed: int
    make: Callable[[Case], Sample] = field(compare=False)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.row.name}:{self.index:04d}:{self.images}"

    def rng(self, purpose: str) -> np.random.Generator:
        """A stream of random numbers that belongs to this case and purpose."""
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.name}|{purpose}".encode())])

    def build(self) -> Sample:
        """Make the images; the same in every run."""
        return self.make(self)


@dataclass(frozen=True)
class Sample:
    """A case ready to be registered.

    Args:
        fixed: the fixed image.
        moving: the moving image, on its own grid.
        points: ``[N, D]``, fixed world, where the error is measured.
        truth: ``(D+1, D+1)``, fixed world to moving world; None where there is none.
        corrected: the same composed with the pair's residual; equal to ``truth`` where that is exact, None if unknown.
        tolerance: largest error of a success, mm (pixels in 2D).
        info: rotation, shift and shapes, for the results file.
        labels: anatomical labels of both images on their grids, or None.
        reference: name of the case whose answer by the same method ``truth`` is to be composed with, or None.
    """

    fixed: Volume
    moving: Volume
    points: np.ndarray
    truth: np.ndarray | None
    corrected: np.ndarray | None = None
    tolerance: float = SUCCESS
    info: dict[str, Any] = field(default_factory=dict)
    labels: tuple[Volume, Volume] | None = None
    reference: str | None = None


def shapes(fixed: Volume, moving: Volume) -> dict[str, Any]:
    """Shapes and spacings of both images, for the results file."""
    images = {"fixed": fixed, "moving": moving}
    spacings = {f"{role}_spacing": [round(float(s), 4) for s in image.spacing] for role, image in images.items()}
    return {f"{role}_shape": list(image.shape) for role, image in images.items()} | spacings


def interleave(rows: Iterable[Sequence[T]]) -> list[T]:
    """Cases of all rows in turn, so that a run cut short has some of each."""
    return [case for turn in zip_longest(*rows) for case in turn if case is not None]
