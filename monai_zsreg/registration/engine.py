# SPDX-License-Identifier: Apache-2.0
"""The default method: search everywhere, then refine below a voxel. No training, no weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.registration.blocks import Blocks
from monai_zsreg.registration.descriptors import DESCRIPTORS, Descriptor
from monai_zsreg.registration.refine import Evidence, Refinement, refine, weigh
from monai_zsreg.registration.search import PoseSearch
from monai_zsreg.registration.side import Pair

__all__ = ["COARSE", "DOUBTFUL", "EFFORTS", "Effort", "SEARCHES", "TRANSFORMS", "Found", "Settings", "find"]

TRANSFORMS = ("rigid", "similarity", "affine")
SEARCHES = ("global", "local", "none")
COARSE = ("search", "keypoints")

# lattice steps along the longest side that a level needs: below, blocks would be larger than what they show
_SIDE = 24
# descriptors of two scans of one brain differ by less at the finest level
DOUBTFUL = 0.085


@dataclass(frozen=True)
class _Stage:
    step: float  # lattice step, in steps of the finest level
    iterations: int
    blocks: int
    size: int


_STAGES = {
    2: (_Stage(2, 5, 24, 12), _Stage(1, 5, 64, 16)),
    3: (_Stage(4, 6, 30, 8), _Stage(2, 6, 64, 8), _Stage(1, 4, 100, 8)),
}


@dataclass(frozen=True)
class Effort:
    """How hard to look.

    Attributes:
        points: samples of the search.
        keep: candidates that the search improves.
        trials: trials for each of them in a round.
        results: candidates that are refined.
        catch: levels before the usual ones, for a search that ended a few blocks off.
        faint: see `monai_zsreg.foreground.appearance`.
    """

    points: int
    keep: int
    trials: int
    results: int
    catch: tuple[_Stage, ...] = ()
    faint: bool = False


#: first attempt, and those for pairs that do not look alike after it; the last for images that fade into the background
EFFORTS = {
    2: (
        Effort(1000, 16, 16, 4),
        Effort(4000, 30, 48, 12),
        Effort(4000, 30, 48, 12, (_Stage(8, 12, 100, 4), _Stage(4, 8, 40, 12)), faint=True),
    ),
    3: (
        Effort(2500, 24, 24, 4),
        Effort(5000, 64, 48, 12),
        Effort(5000, 64, 48, 12, faint=True),
    ),
}


@dataclass(frozen=True)
class Settings:
    """Options of the method.

    Args:
        transform: ``"rigid"``, ``"similarity"`` or ``"affine"``.
        search: ``"global"``, every rotation; ``"local"``, around the start; ``"none"``, refine the start.
        features: descriptors of the fine stage, a key of `DESCRIPTORS`.
        coarse: where candidates come from, ``"search"`` or ``"keypoints"`` (the paper's, see `monai_zsreg.paper`).
        seed: of all random draws.
        rotations: number of rotations of the global search; None for 60 in 2D, 4000 in 3D.
        blocks: number of blocks at the finest level; None for 64 in 2D, 100 in 3D.
        vgg19_weights: file with VGG-19's weights for what uses them; None for torchvision's.

    Raises:
        RegistrationError: an argument out of its range.
    """

    transform: str = "affine"
    search: str = "global"
    features: str = "mind"
    coarse: str = "search"
    seed: int = 0
    rotations: int | None = None
    blocks: int | None = None
    vgg19_weights: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, allowed in (
            ("transform", TRANSFORMS),
            ("search", SEARCHES),
            ("features", tuple(DESCRIPTORS)),
            ("coarse", COARSE),
        ):
            if getattr(self, name) not in allowed:
                raise RegistrationError(name, getattr(self, name), f"one of {allowed}")
        for name in ("rotations", "blocks"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 8):
                raise RegistrationError(name, number, "a whole number of at least 8, or None")


@dataclass
class Found:
    """
    Attributes:
        pair: the two images, in whose frames the transform is.
        transform: ``(D+1, D+1)``, fixed frame to moving frame.
        costs: mean clipped difference of the descriptors at each level, coarse to fine.
        overlap: fraction of the sampled foreground of both images that lies in the other's field of view.
        evidence: what the blocks of the finest level say of it.
    """

    pair: Pair
    transform: Tensor
    costs: list[float]
    overlap: float
    evidence: Evidence

    def covariance(self) -> Tensor:
        """Covariance ``(D(D+1), D(D+1))`` of the world matrix's rows from that of a motion of the fixed frame."""
        pair, dims = self.pair, self.pair.dims
        to_fixed = torch.linalg.inv(pair.fixed_frame.to_world)
        change = (pair.moving_frame.to_world @ self.transform) @ self.evidence.basis @ to_fixed
        change = change[:, :dims].flatten(-2)  # [P, D(D+1)]
        return change.mT @ self.evidence.covariance @ change


def find(pair: Pair, settings: Settings, effort: Effort) -> Found:
    """One attempt: candidates, then level by level down to the images' own resolution.

    1. Rotations spread over all directions are scored by normalized mutual information of coarse images
       (`PoseSearch`); the best are shaken until they no longer improve. Where the user or the headers put the images
       is a candidate too.
    2. All are refined by Gauss-Newton on local descriptors (`refine`); the one whose descriptors agree best at the
       coarsest level goes on.

    Args:
        pair: the two images.
        settings: options of the method.
        effort: how hard to look.
    """
    describe = DESCRIPTORS[settings.features](pair.dims, settings.vgg19_weights).to(pair.fixed.coarse.values.device)
    stages = list(_STAGES[pair.dims])
    if settings.blocks is not None:
        stages[-1] = replace(stages[-1], blocks=settings.blocks)
    transforms, costs, first = _candidates(pair, settings, effort), [], -len(effort.catch)
    for number, stage in enumerate((*effort.catch, *stages), start=first):
        spacing = stage.step * pair.base
        if spacing > pair.extent / _SIDE and stage is not stages[-1]:
            continue
        # no negative seeds
        blocks = Blocks(pair, describe, spacing, stage.size, stage.blocks, settings.seed + number % 64)
        result = refine(blocks, transforms, settings.transform, stage.iterations)
        transforms = result.transform
        if number >= 0:
            # a level that was left out shows the next one's
            costs += [float(result.cost[0])] * (number + 1 - len(costs))
    evidence = weigh(blocks, transforms[0], settings.transform)
    return Found(pair, transforms[0], costs, float(result.overlap[0]), evidence)


def _candidates(pair: Pair, settings: Settings, effort: Effort) -> Tensor:
    """Where to start, ``[K, D+1, D+1]``, fixed frame to moving frame."""
    if settings.search == "none":
        return pair.start[None]
    pose = PoseSearch(
        pair, settings.transform != "rigid", effort.points, effort.keep, effort.trials, seed=settings.seed
    )
    if settings.search == "local":
        return pose.around(pair.start, effort.results)
    rotations = settings.rotations or {2: 60, 3: 4000}[pair.dims]
    return torch.cat([pose.everywhere(rotations, effort.results), pair.start[None]])
