# SPDX-License-Identifier: Apache-2.0
"""What a case is: a row of the table, the images it is made of, and the sample that comes out.

A case is drawn from its name and the seed alone. So the first N cases of a row are the same however many are asked
for, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from monai_zsreg.benchmark.volumes import Volume, labels_dice, moved
from monai_zsreg.metrics import target_registration_error

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
    mask: np.ndarray | None = None  # where the fixed image counts, for methods that take one

    @property
    def facts(self) -> dict[str, Any]:
        """``info``, and shapes and spacings of both images."""
        facts = dict(self.info)
        for role, image in (("fixed", self.fixed), ("moving", self.moving)):
            facts |= {f"{role}_shape": list(image.shape), f"{role}_spacing": image.spacing.round(4).tolist()}
        return facts

    @property
    def nothing(self) -> np.ndarray:
        """The answer that leaves the images as they are."""
        return np.eye(self.fixed.dims + 1)

    def judge(
        self, given: np.ndarray, point: Sequence[float] | None = None, reference: np.ndarray | None = None
    ) -> dict[str, Any]:
        """How far off an answer is, mm: mean and maximum over ``points``, and at one more point; Dice of the labels.

        ``reference`` is the same method's answer to the case that this one refers to.
        """
        result: dict[str, Any] = {"matrix": given.tolist()}
        truths = {"tre": self.truth, "tre_corrected": self.corrected}
        if self.reference is not None and self.truth is not None:
            truths = {"tre": None if reference is None else self.truth @ reference}
        for name, truth in truths.items():
            if truth is not None:
                gaps = target_registration_error(given, truth, self.points)
                result |= {name: float(gaps.mean()), f"{name}_max": float(gaps.max())}
                if point is not None:
                    result["error_at_point"] = float(target_registration_error(given, truth, np.array([point]))[0])
        if self.labels is not None:
            fixed, moving = self.labels
            for name, matrix in (("label_dice_before", self.nothing), ("label_dice", given)):
                shown = moved(moving, fixed.shape, fixed.affine, matrix, order=0, fill=0.0)
                result[name] = labels_dice(fixed, moving, shown.values)
        return result


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
    methods: Sequence[str] | None = None  # names of those that are to run it; None for all

    @property
    def name(self) -> str:
        return f"{self.row.name}:{self.index:04d}:{self.images}"

    def rng(self, purpose: str) -> np.random.Generator:
        """A stream of random numbers that belongs to this case and purpose."""
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.name}|{purpose}".encode())])

    def build(self) -> Sample:
        """Make the images; the same in every run."""
        return self.make(self)
