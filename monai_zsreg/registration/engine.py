# SPDX-License-Identifier: Apache-2.0
"""The default method: search everywhere, then refine below a voxel. No training, no weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, apply_affine, decompose_affine
from monai_zsreg.registration.blocks import Blocks
from monai_zsreg.registration.confidence import common_spread
from monai_zsreg.registration.correlate import correlate
from monai_zsreg.registration.descriptors import DESCRIPTORS, LocalScores
from monai_zsreg.registration.refine import (
    Evidence,
    Refinement,
    distance,
    lead_of,
    loose,
    refine,
    settled,
    standing,
    weigh,
)
from monai_zsreg.registration.search import PoseSearch
from monai_zsreg.registration.side import Level, Pair

TRANSFORMS = ("rigid", "similarity", "affine")
SEARCHES = ("global", "local", "none")
COARSE = ("search", "keypoints")

# lattice steps along the longest side that a level needs: below, blocks would be larger than what they show
_SIDE = 24
# descriptors of two scans of one brain differ by less at the finest level; by somewhat more where the coarser image
# shows nothing there, but then their slopes agree
_LIKE, _LIKELY, _AGREE = 0.085, 0.095, 0.3
# agreement below which nothing corresponds
_RELATED = 0.15
# agreement beyond which two images may be of one contrast, and correlation of their local scores beyond which they are:
# with 2 % of noise 0.82 and more was seen, between T2 and the negative of T1 up to 0.77
_CLOSE, _ONE_CONTRAST = 0.65, 0.8
# how far the correlation's best score stands above all others where it is right; the lead in standard errors that a
# better fit needs against it
_MARGIN, _BETTER = 0.1, 3.0
# how far off an answer may be by what its own blocks say, lattice steps
_SURE = 2.0
# distance of candidates that mean the same place, frame units
_SAME = 0.35
# steps along the longest side that edges are found on
_EDGES = {2: 256, 3: 80}
# lattice steps between two answers that are not the same; and within which the first level may move one that is
_APART, _STAYS = 3.0, 0.75
# difference of costs that tells nothing
_TIE = 5e-4
# standard errors that a rival is behind by where it is given up
_BEATEN = 5.0


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
        source: where candidates come from, a key of `SOURCES`.
        reach: of the correlation, degrees about what the headers say; None for every rotation.
        points: samples of the search.
        keep: candidates that the search improves.
        trials: trials for each of them in a round.
        results: candidates that are refined.
        followed: candidates that are followed at the first level, whatever they cost at its begin.
        reflections: reflected candidates of the correlation: those of the search lie about the middle of the object.
        patience: iterations at the first level, as a multiple of the usual ones; further ones for half of those.
        catch: levels before the usual ones, for a search that ended a few blocks off.
        faint: see `monai_zsreg.foreground.appearance`.
    """

    source: str = "information"
    reach: float | None = None
    points: int = 2500
    keep: int = 24
    trials: int = 24
    results: int = 4
    followed: int = 3
    reflections: int = 0
    patience: int = 1
    catch: tuple[_Stage, ...] = ()
    faint: bool = False


#: first attempt, and those for pairs that do not look alike after it; the last for images that fade into the background
EFFORTS = {
    2: (
        Effort(points=1000, keep=16, trials=16),
        Effort("correlation", points=1000, results=10, followed=6, reflections=4, patience=2),
        Effort(
            points=4000,
            keep=30,
            trials=48,
            results=12,
            catch=(_Stage(8, 12, 100, 4), _Stage(4, 8, 40, 12)),
            faint=True,
        ),
    ),
    3: (
        Effort(),
        Effort("correlation", reach=45.0, results=10, followed=6, patience=2),
        Effort("correlation", results=10, followed=6, patience=2),
        Effort(points=5000, keep=64, trials=48, results=12, faint=True),
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
        stiffness: how smooth the map of transform ``"deformable"`` is, see
            `monai_zsreg.registration.deformable.register_deformable`; None for what suits the images.
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
    stiffness: float | None = None
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
            whole = isinstance(number, Integral) and not isinstance(number, bool)
            if number is not None and (not whole or number < 8):
                raise RegistrationError(name, number, "a whole number of at least 8, or None")


@dataclass(frozen=True)
class Hypothesis:
    """A transform that is followed down the levels beside others.

    Attributes:
        kind: ``"header"``, what the headers or the user say; ``"second"``, another; ``"mirror"``, a reflection.
        transform: ``(D+1, D+1)``, fixed frame to moving frame.
        cost: mean clipped difference of the descriptors at the last level where it was followed.
        behind: how much more its descriptors differ than those of the answer.
        errors: the same in standard errors.
    """

    kind: str
    transform: Tensor
    cost: float = math.inf
    behind: float = math.inf
    errors: float = math.inf


@dataclass
class Found:
    """
    Attributes:
        pair: the two images, in whose frames the transform is.
        answer: the best hypothesis.
        rivals: the others that ended apart from it, each as of the last level where it was followed.
        costs: of the answer at each level, coarse to fine.
        lattices: blocks of each level, coarse to fine.
        evidence: what those of the level that is surest say of the answer.
        agreement: see `Evidence`, at the resolution of the coarser image.
        margin: how far the correlation's score of the answer stands above the best score apart from it; None where
            candidates came from elsewhere.
        given_up: whether nothing corresponded at the first level, so that it was the last.
    """

    pair: Pair
    answer: Hypothesis
    rivals: list[Hypothesis]
    costs: list[float]
    lattices: list[Blocks]
    evidence: Evidence
    agreement: float
    margin: float | None = None
    given_up: bool = False

    @property
    def convincing(self) -> bool:
        """Whether the images look so alike at the answer that there is no need to look further."""
        if self.given_up:
            return False
        cost = self.costs[-1]
        alike = cost <= _LIKE or (cost <= _LIKELY and self.agreement >= _AGREE)
        # of images with much that is flat any place costs little
        leads = _leads(self.rivals) and self.agreement >= _RELATED
        return (alike and leads or self.stands_out) and self.spread() <= _SURE

    @property
    def alike(self) -> bool:
        """Whether the images' structures agree, so that nothing else needs to speak for the answer."""
        return self.convincing and self.agreement >= _AGREE

    @cached_property
    def lead(self) -> float | None:
        """How clearly the answer fits better than places at random; None where nothing needs to speak for it."""
        if not self.sound or self.alike:
            return None
        pair, stage = self.pair, _STAGES[self.pair.dims][0]
        step = min(stage.step * pair.base, 2 * pair.extent / _SIDE)
        within = self.answer.transform[None]
        blocks = Blocks(pair, self.lattices[-1].describe, step, stage.size, 2 * stage.blocks, within=within)
        return standing(blocks, self.answer.transform)

    @property
    def stands_out(self) -> bool:
        """Whether the correlation has one best place, and the answer is there."""
        return self.margin is not None and self.margin >= _MARGIN

    def supersedes(self, earlier: Found) -> bool:
        """Whether this answer is the better one of two attempts, of which it had the earlier one's to compare with."""
        if self.given_up or earlier.given_up:
            return earlier.given_up
        return self.stands_out or (not earlier.stands_out and self.costs[-1] < earlier.costs[-1] + _TIE)

    def suffices(self, earlier: Found, effort: Effort) -> bool:
        """Whether there is no need to look further after an attempt of such effort beside what an earlier one found.

        The correlation, by itself, says first what the other candidates led to; or it says first what turned out best,
        or it found nothing better among all rotations, and the images fit much better there than at places at random.
        """
        first = self.margin is not None and self.margin > 0
        if first and not earlier.given_up:
            there = self.pair.to_frames(earlier.affine())
            if float(distance(self.answer.transform, there)) <= _APART * self.lattices[-1].step:
                return True
        stands = self.answer is earlier.answer and effort.reach is None
        return (first or stands) and not self.given_up and (self.lead or 0) >= _BETTER

    def beyond_reach(self, effort: Effort) -> bool:
        """Whether the answer, of which its blocks are sure, is turned too far for an effort to come upon it."""
        if effort.reach is None or self.given_up or self.spread() > _SURE:
            return False
        return decompose_affine(self.affine()).angle_deg > effort.reach

    def spread(self) -> float:
        """How far off the blocks say that the answer is where both images show something, steps of the finest level."""
        if not self.sound:
            return math.inf
        covariance, affine = self._in_world(self.evidence.covariance).numpy(), self.affine().numpy()
        return common_spread(covariance, self.pair.fixed.grid, self.pair.moving.grid, affine) / self.pair.base

    @property
    def sound(self) -> bool:
        """Whether the answer is a matrix that keeps left and right; images without sense lead elsewhere."""
        affine = self.affine()
        return bool(affine.isfinite().all()) and float(torch.linalg.det(affine[:-1, :-1])) > 0

    def affine(self) -> Tensor:
        """The answer, ``(D+1, D+1)``, fixed world to moving world, its last row exact."""
        affine = self.pair.to_world(self.answer.transform)
        affine[-1] = torch.eye(len(affine), dtype=torch.float64)[-1]
        return affine

    def measures(self) -> dict[str, float]:
        """What the verdict rests on; see `monai_zsreg.registration.confidence.Limits`."""
        found = {
            "step": max(self.pair.base, self.pair.detail),
            "agreement": self.agreement,
            "cost": self.costs[-1],
            "coarse_cost": self.costs[0],
            "overlap": self.pair.overlap(self.answer.transform),
            "beyond": self.evidence.beyond * self.pair.unit,
        }
        if self.margin is not None:
            found["margin"] = self.margin
        if self.lead is not None:
            found["lead"] = self.lead
        mirrored = [rival.errors for rival in self.rivals if rival.kind == "mirror"]
        if mirrored:
            found["mirror"] = mirrored[0]
        second = min(
            (rival for rival in self.rivals if rival.kind != "mirror"), key=lambda rival: rival.errors, default=None
        )
        if second is not None:
            away = float(distance(second.transform, self.answer.transform)) * self.pair.unit
            found |= {"second": second.errors, "second_distance": away}
        return found

    def covariance(self) -> Tensor:
        """Covariance ``(D(D+1), D(D+1))`` of the world matrix's rows."""
        weight = self.pair.fixed.weight
        shown = weight.values if bool(weight.values.any()) else torch.ones_like(weight.values)
        to_frame = torch.linalg.inv(self.pair.fixed_frame.to_index(weight.grid)).cpu().double()
        points = apply_affine(to_frame, shown.nonzero().cpu().double())
        free = loose(self.lattices, self.answer.transform, self.evidence, points)
        return self._in_world(self.evidence.covariance + free)

    def _in_world(self, covariance: Tensor) -> Tensor:
        """From that of a motion of the fixed frame."""
        pair, dims = self.pair, self.pair.dims
        to_fixed = torch.linalg.inv(pair.fixed_frame.to_world)
        change = (pair.moving_frame.to_world @ self.answer.transform) @ self.evidence.basis @ to_fixed
        change = change[:, :dims].flatten(-2)  # [P, D(D+1)]
        return change.mT @ covariance @ change


def find(
    pair: Pair, settings: Settings, effort: Effort, earlier: Found | None = None, only_chance: bool = True
) -> Found:
    """One attempt: candidates, then level by level down to the images' own resolution.

    1. Candidates come from one of `SOURCES`. Where the user or the headers put the images is one too.
    2. All are refined by Gauss-Newton on local descriptors (`refine`). What ends apart from the best, and the best
       reflection of it, are its rivals: they are followed as long as they are not clearly behind. Where the first
       level says that an earlier attempt was right, its answer stands.
    3. Where both images turn out to be of one contrast, their intensities have the last word.

    Args:
        pair: the two images.
        settings: options of the method.
        effort: how hard to look.
        earlier: what an earlier attempt found.
        only_chance: whether no other attempt follows; else this one is given up where nothing corresponds after its
            first level.
    """
    describe = DESCRIPTORS[settings.features](pair.dims, settings.vgg19_weights).to(pair.fixed.coarse.values.device)
    stages = list(_STAGES[pair.dims])
    if settings.blocks is not None:
        stages[-1] = replace(stages[-1], blocks=settings.blocks)
    levels = [
        (number, stage)
        for number, stage in enumerate((*effort.catch, *stages), start=-len(effort.catch))
        if stage is stages[-1] or stage.step * pair.base <= pair.extent / _SIDE
    ]
    # the level where the coarser image still shows something
    shown = min(levels, key=lambda level: abs(math.log(level[1].step * pair.base / pair.detail)))
    before = None if earlier is None else pair.to_frames(earlier.affine())
    candidates = _candidates(pair, settings, effort, before)
    # an answer that may stand as it is
    known = None if earlier is None or earlier.given_up else before
    going: list[Hypothesis] = []
    beaten: list[Hypothesis] = []
    costs: list[float] = []
    lattices: list[Blocks] = []
    for number, stage in levels:
        # no negative seeds
        seed, within = settings.seed + number % 64, torch.stack([h.transform for h in going]) if going else None
        blocks = Blocks(pair, describe, stage.step * pair.base, stage.size, stage.blocks, seed, within)
        if not going:
            going = _begin(blocks, candidates, settings, effort, stage.iterations)
            stands = _stands(blocks, going, known)
            if not stands or candidates.reflections is not None:
                mirrored = _reflected(blocks, candidates, going[0].transform, settings, stage.iterations)
                stands = stands and _stands(blocks, going[:1] + mirrored, known)
                going += mirrored
            if stands:
                assert earlier is not None and known is not None
                return replace(earlier, margin=candidates.margin(known))
        else:
            going = _followed(blocks, going, settings.transform, stage.iterations)
        going, lost = _compared(blocks, going, candidates)
        beaten += lost
        if number >= 0:
            # a level that was left out shows the next one's
            costs += [going[0].cost] * (number + 1 - len(costs))
        lattices.append(blocks)
        if len(lattices) == 1 and not only_chance and _hopeless(blocks, going, candidates, settings.transform):
            break
    answer, margin = going[0], candidates.margin(going[0].transform)
    first = min(levels.index(shown), len(lattices) - 1)
    every = [weigh(blocks, answer.transform, settings.transform) for blocks in lattices[first:]]
    agreement = every[0].agreement
    # voxels may be finer than what images show that have little in common: who tells most tells how sure it is
    coarser = lattices[:first] if agreement < _AGREE else []
    others = [weigh(blocks, answer.transform, settings.transform) for blocks in coarser]
    evidence = min([*reversed(every), *others], key=lambda one: one.spread)
    together = settled(answer.transform, every) if len(every) > 1 else answer.transform
    if float(distance(together, answer.transform)) <= shown[1].step * pair.base / pair.unit:
        answer = replace(answer, transform=together)
    if agreement >= _CLOSE and settings.features == "mind":
        sharper = _sharpened(pair, answer.transform, settings, stages[-1])
        if sharper is not None:
            answer, evidence.covariance = replace(answer, transform=sharper[0]), sharper[1]
    given_up = len(lattices) < len(levels)
    return Found(pair, answer, going[1:] + beaten, costs, lattices, evidence, agreement, margin, given_up)


def _sharpened(pair: Pair, answer: Tensor, settings: Settings, stage: _Stage) -> tuple[Tensor, Tensor] | None:
    """The answer once more, and its covariance, by the intensities where the two images agree in them."""
    scores = LocalScores(pair.dims)
    blocks = Blocks(pair, scores, stage.step * pair.base, stage.size, stage.blocks, settings.seed, answer[None])
    if blocks.correlation(torch.stack([answer, torch.linalg.inv(answer)])) < _ONE_CONTRAST:
        return None
    found = refine(blocks, answer[None], settings.transform, 2 * stage.iterations).transform[0]
    if float(distance(found, answer)) > blocks.step:
        return None
    return found, weigh(blocks, found, settings.transform).covariance


@dataclass
class _Candidates:
    """Where to start: first what the headers say, then what an earlier attempt found, then what a source gives.

    Attributes:
        pose: the search, which also finds reflections.
        starts: ``[K, D+1, D+1]``, fixed frame to moving frame.
        scores: of the last ones, ``[J]``; None for sources without.
        reflections: those beside what the search finds, ``[R, D+1, D+1]``.
    """

    pose: PoseSearch
    starts: Tensor
    scores: Tensor | None = None
    reflections: Tensor | None = None

    def margin(self, answer: Tensor) -> float | None:
        """How far the score of an answer ``(D+1, D+1)`` stands above the best score apart from it."""
        if self.scores is None:
            return None
        there = distance(self.starts[-len(self.scores) :], answer) < _SAME
        best = [float(self.scores[part].max()) if bool(part.any()) else 0.0 for part in (there, ~there)]
        return best[0] - best[1]


def _candidates(pair: Pair, settings: Settings, effort: Effort, known: Tensor | None) -> _Candidates:
    pose = PoseSearch(
        pair, settings.transform != "rigid", effort.points, effort.keep, effort.trials, seed=settings.seed
    )
    header = pair.start[None]
    if settings.search == "none":
        return _Candidates(pose, header)
    if settings.search == "local":
        return _Candidates(pose, pose.around(pair.start, effort.results))
    found, scores = SOURCES[effort.source](pair, pose, settings, effort)
    reflections = _reflections(pair, settings, effort) if effort.reflections else None
    before = header if known is None else torch.stack([pair.start, known])
    return _Candidates(pose, torch.cat([before, found]), scores, reflections)


def _begin(
    blocks: Blocks, candidates: _Candidates, settings: Settings, effort: Effort, iterations: int
) -> list[Hypothesis]:
    """Hypotheses after the first level, best first, none of them a reflection."""
    starts = candidates.starts
    proper = refine(blocks, starts, settings.transform, iterations, results=effort.followed)
    kinds = ["header" if origin == 0 and len(starts) > 1 else "second" for origin in proper.origin.tolist()]
    if effort.patience > 1:
        more = (effort.patience - 1) * iterations
        proper = refine(blocks, proper.transform, settings.transform, more, results=effort.followed // 2)
        kinds = [kinds[origin] for origin in proper.origin.tolist()]
    return _hypotheses(kinds, proper)


def _reflected(
    blocks: Blocks, candidates: _Candidates, answer: Tensor, settings: Settings, iterations: int
) -> list[Hypothesis]:
    """The best reflection of an answer ``(D+1, D+1)`` after the first level."""
    starts = candidates.pose.mirrored(answer, 2)
    if candidates.reflections is not None:
        starts = torch.cat([starts, candidates.reflections])
    mirrored = refine(blocks, starts, settings.transform, iterations)
    return _hypotheses(["mirror"], mirrored)


def _stands(blocks: Blocks, going: list[Hypothesis], known: Tensor | None) -> bool:
    """Whether the first level leads back to an earlier answer ``(D+1, D+1)``, and all else is clearly behind it."""
    if known is None or float(distance(going[0].transform, known)) > _STAYS * blocks.step:
        return False
    return _leads(_against(blocks, going)[1:])


def _leads(rivals: list[Hypothesis]) -> bool:
    """Whether all rivals are clearly behind, and no reflection is ahead: that of a symmetric object fits as well."""
    return all(rival.errors >= (-_BETTER if rival.kind == "mirror" else _BETTER) for rival in rivals)


def _by_information(pair: Pair, pose: PoseSearch, settings: Settings, effort: Effort) -> tuple[Tensor, Tensor | None]:
    """Rotations spread over all directions, scored by mutual information of coarse images, the best shaken."""
    return pose.everywhere(settings.rotations or {2: 60, 3: 4000}[pair.dims], effort.results), None


def _by_correlation(pair: Pair, pose: PoseSearch, settings: Settings, effort: Effort) -> tuple[Tensor, Tensor | None]:
    """Every place, for many rotations, by correlation of edge orientations: fields of view may overlap in part."""
    scales = (1.0,) if settings.transform == "rigid" or pair.dims == 3 else (0.9, 1.0, 1.12)
    fixed, moving = _edges_on(pair)
    found = correlate(fixed, moving, reach=effort.reach, scales=scales, count=effort.results, seed=settings.seed)
    return pair.to_frames(found.transform), found.score


def _reflections(pair: Pair, settings: Settings, effort: Effort) -> Tensor:
    """Places of the reflected moving image by the same correlation, ``[R, D+1, D+1]``, fixed frame to moving frame."""
    mirror = torch.eye(pair.dims + 1, dtype=torch.float64)
    mirror[0, 0] = -1.0
    fixed, moving = _edges_on(pair)
    moving = replace(moving, grid=Grid(moving.grid.shape, mirror @ moving.grid.affine))
    # of one scale alone: a rival need not be found as surely as the answer
    found = correlate(fixed, moving, reach=effort.reach, count=effort.reflections, seed=settings.seed)
    return pair.to_frames(mirror @ found.transform)


def _edges_on(pair: Pair) -> tuple[Level, Level]:
    """Both images as the correlation takes them."""
    step = max(pair.base, pair.extent / _EDGES[pair.dims])
    return pair.fixed.at(step), pair.moving.at(step)


#: candidates of the coarse stage, ``[K, D+1, D+1]``, fixed frame to moving frame, and their scores if they have any. A
#: new source is an entry here.
SOURCES: dict[str, Callable[[Pair, PoseSearch, Settings, Effort], tuple[Tensor, Tensor | None]]] = {
    "information": _by_information,
    "correlation": _by_correlation,
}


def _followed(blocks: Blocks, going: list[Hypothesis], transform: str, iterations: int) -> list[Hypothesis]:
    starts = torch.stack([hypothesis.transform for hypothesis in going])
    result = refine(blocks, starts, transform, iterations, results=len(going))
    return _hypotheses([going[int(origin)].kind for origin in result.origin], result)


def _hypotheses(kinds: list[str], result: Refinement) -> list[Hypothesis]:
    rows = zip(kinds, result.transform, result.cost.tolist(), strict=True)
    return [Hypothesis(*row) for row in rows]


def _compared(
    blocks: Blocks, going: list[Hypothesis], candidates: _Candidates
) -> tuple[list[Hypothesis], list[Hypothesis]]:
    """The hypotheses to follow, the answer first, and those that are clearly behind it."""
    # a reflection is no answer, however well it fits
    going = _against(blocks, sorted(going, key=lambda hypothesis: (hypothesis.kind == "mirror", hypothesis.cost)))
    for rival in going[1:]:
        # descriptors of images that share little do not tell such places apart
        if rival.kind != "mirror" and rival.errors < _BETTER and (candidates.margin(rival.transform) or 0) >= _MARGIN:
            going = _against(blocks, [rival] + [other for other in going if other is not rival])
            break
    rivals = going[1:]
    return (
        going[:1] + [rival for rival in rivals if rival.errors < _BEATEN],
        [rival for rival in rivals if rival.errors >= _BEATEN],
    )


def _hopeless(blocks: Blocks, going: list[Hypothesis], candidates: _Candidates, transform: str) -> bool:
    """Whether nothing corresponds at the answer, and the correlation says another place first."""
    answer = going[0].transform
    if (candidates.margin(answer) or 0) > 0:
        return False
    return weigh(blocks, answer, transform).agreement < _RELATED


def _against(blocks: Blocks, going: list[Hypothesis]) -> list[Hypothesis]:
    """The first hypothesis and those that did not meet it, with how far they are behind it."""
    transforms = torch.stack([hypothesis.transform for hypothesis in going])
    apart = distance(transforms, transforms[0]) > _APART * blocks.step
    going = [going[0]] + [hypothesis for hypothesis, far in zip(going, apart, strict=True) if far]
    if len(going) == 1:
        return going
    behind, errors = lead_of(blocks, torch.stack([hypothesis.transform for hypothesis in going]))
    return [
        replace(hypothesis, behind=mean, errors=error)
        for hypothesis, mean, error in zip(going, behind.tolist(), errors.tolist(), strict=True)
    ]
