# SPDX-License-Identifier: Apache-2.0
"""What a case is: a row of the table, the images it is made of, and the sample that comes out.

A case is drawn from its name and the seed alone. So the first N cases of a row are the same however many are asked
for, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from monai_zsreg.benchmark.volumes import Volume

__all__ = ["SUCCESS", "Case", "Row", "Sample"]

SUCCESS = 2.0  # mm, pixels in 2D


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Its kind says what the truth is: ``exact``; ``real``, two scans, off by the pair's residual; ``natural``, exact,
    from one photograph; ``between``, two people, none but labels; ``header``, what the headers say.
    """

    protocol: str  # what is done to the images; what ``--protocols`` selects
    dims: int
    kind: str
    cases: int  # by default
    quick: int  # in a quick run
    own_name: str = ""
    transform: str = "affine"  # what the methods look for

    @property
    def name(self) -> str:
        return self.own_name or f"{self.protocol}-{self.dims}d-{self.kind}"


@dataclass(frozen=True)
class Sample:
    """A case ready to be registered."""

    fixed: Volume
    moving: Volume
    points: np.ndarray  # [N, D], fixed world, where the error is measured
    truth: np.ndarray | None  # (D+1, D+1), fixed world to moving world
    corrected: np.ndarray | None = None  # composed with the pair's residual; as truth where that is exact
    tolerance: float = SUCCESS  # largest error of a success, mm (pixels in 2D)
    info: dict[str, Any] = field(default_factory=dict)  # for the results file
    labels: tuple[Volume, Volume] | None = None
    reference: str | None = None  # the case whose answer by the same method the truth is to be composed with

    @property
    def facts(self) -> dict[str, Any]:
        """``info``, and shapes and spacings of both images."""
        facts = dict(self.info)
        for role, image in (("fixed", self.fixed), ("moving", self.moving)):
            facts |= {f"{role}_shape": list(image.shape), f"{role}_spacing": image.spacing.round(4).tolist()}
        return facts


@dataclass(frozen=True)
class Case:
    """A case before it is made."""

    row: Row
    index: int  # in the row
    subject: str  # the unit that intervals resample
    images: str  # which images and slice, for the name
    seed: int
    make: Callable[[Case], Sample] = field(compare=False)
    notes: dict[str, Any] = field(default_factory=dict)  # for the results file; ``group`` is the kind of data

    @property
    def name(self) -> str:
        return f"{self.row.name}:{self.index:04d}:{self.images}"

    def rng(self, purpose: str) -> np.random.Generator:
        """A stream of random numbers that belongs to this case and purpose."""
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.name}|{purpose}".encode())])

    def build(self) -> Sample:
        """Make the images; the same in every run."""
        return self.make(self)
