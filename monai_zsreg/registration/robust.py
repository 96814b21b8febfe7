# SPDX-License-Identifier: Apache-2.0
"""The robust engine: search everywhere, then refine below a voxel. No training, no weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, theta_from_unit, unit_from_world
from monai_zsreg.networks import IMAGENET, TRANSFORMS, AffineResampler, Status
from monai_zsreg.networks.mind import MINDSSC
from monai_zsreg.networks.vgg import VGG19Patches
from monai_zsreg.registration.pyramid import Frame, Level, index_points, normalize, pool
from monai_zsreg.registration.refine import Evidence, Refiner
from monai_zsreg.registration.search import PoseSearch

__all__ = ["COARSE", "FEATURES", "SEARCHES", "RobustEngine", "RobustEstimate"]

SEARCHES = ("global", "local", "none")
COARSE = ("search", "keypoints")
FEATURES = ("mind", "vgg19")

# voxels along the longest side: beyond it images are averaged first, so the cost stops growing
_FINEST = {2: 512, 3: 256}
_COARSEST = {2: 80, 3: 40}


@dataclass(frozen=True)
class _Stage:
    step: float  # lattice step, in steps of the finest level
    iterations: int
    blocks: int
    block: int


_STAGES = {
    2: (_Stage(2, 5, 24, 12), _Stage(1, 5, 64, 16)),
    3: (_Stage(4, 6, 30, 8), _Stage(2, 6, 64, 8), _Stage(1, 4, 100, 8)),
}


# lattice steps along the longest side that a level needs: below, blocks would be larger than what they show
_SIDE = 24


@dataclass
class RobustEstimate:
    """
    Attributes:
        matrix: ``[N, D+1, D+1]`` float64 on the CPU, fixed world to moving world.
        status: ``[N]`` codes of `Status`.
        cost: ``[N, L]`` mean clipped difference of the descriptors at each level, coarse to fine.
        overlap: ``[N]`` part of the sampled foreground of both images that lies in the other's field of view.
        agreement: ``[N]`` see `Evidence`.
        covariance: ``[N, D(D+1), D(D+1)]`` of the first D rows of ``matrix``, row after row, as the images' own
            blocks show it; `monai_zsreg.registration.confidence` makes it honest.
        step: ``[N]`` lattice step of the finest level, mm.
    """

    matrix: Tensor
    status: Tensor
    cost: Tensor
    overlap: Tensor
    agreement: Tensor
    covariance: Tensor
    step: Tensor

    def take(self, which: Tensor) -> RobustEstimate:
        """Part of the batch."""
        return RobustEstimate(*(getattr(self, field.name)[which] for field in fields(self)))

    def replaced(self, which: Tensor, other: RobustEstimate) -> RobustEstimate:
        """A copy with the pairs ``which`` from ``other``."""
        parts = []
        for field in fields(self):
            part = getattr(self, field.name).clone()
            part[which] = getattr(other, field.name)
            parts.append(part)
        return RobustEstimate(*parts)


@dataclass(frozen=True)
class _Effort:
    points: int
    keep: int
    trials: int
    results: int
    #: levels before the engine's own, for a search that ended a few blocks off
    catch: tuple[_Stage, ...] = ()
    #: whether all that differs at all from a background without noise is foreground
    faint: bool = False


# first attempt, and those for pairs that do not look alike after it; the last for images that fade into the background
_EFFORTS = {
    2: (
        _Effort(1000, 16, 16, 4),
        _Effort(4000, 30, 48, 12),
        _Effort(4000, 30, 48, 12, (_Stage(8, 12, 100, 4), _Stage(4, 8, 40, 12)), faint=True),
    ),
    3: (
        _Effort(2500, 24, 24, 4),
        _Effort(5000, 64, 48, 12),
        _Effort(5000, 64, 48, 12, faint=True),
    ),
}


class RobustEngine(nn.Module):
    """Finds the transform between images of any modality from any starting position.

    1. Rotations spread over all directions are scored by normalized mutual information of coarse images
       (`PoseSearch`); the best are shaken until they no longer improve.
    2. The best few are refined by Gauss-Newton on local descriptors, level by level down to the images' own
       resolution, sampled in blocks (`Refiner`); the one whose descriptors agree best goes on.

    As a module it registers pairs on one grid: ``image [B, 2, *spatial]``, channel 0 moving, channel 1 fixed, to
    ``[B, 1, *spatial]``, the moved images. Every pair gets what it would get alone.

    Args:
        spatial_dims: 2 or 3.
        transform: ``"rigid"``, ``"similarity"`` or ``"affine"``.
        search: ``"global"``, every rotation; ``"local"``, around the start; ``"none"``, refine the start.
        features: descriptors of the fine stage, ``"mind"`` or ``"vgg19"`` (dense responses of its first two layers).
        seed: of all random draws.
        rotations: number of rotations of the global search; None for 60 in 2D, 4000 in 3D.
        blocks: number of blocks at the finest level; None for 64 in 2D, 100 in 3D.
        vgg19_weights: see `monai_zsreg.register`; for ``features="vgg19"``.

    Raises:
        RegistrationError: an argument out of its range.
    """

    def __init__(
        self,
        spatial_dims: int,
        transform: str = "affine",
        search: str = "global",
        features: str = "mind",
        seed: int = 0,
        rotations: int | None = None,
        blocks: int | None = None,
        vgg19_weights: str = IMAGENET,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("spatial_dims", spatial_dims, (2, 3)),
            ("transform", transform, TRANSFORMS),
            ("search", search, SEARCHES),
            ("features", features, FEATURES),
        ):
            if value not in allowed:
                raise RegistrationError(name, value, f"one of {allowed}")
        for name, number in (("rotations", rotations), ("blocks", blocks)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 8):
                raise RegistrationError(name, number, "a whole number of at least 8, or None")
        self.spatial_dims = spatial_dims
        self.transform = transform
        self.search = search
        self.seed = seed
        self.rotations = rotations or {2: 60, 3: 4000}[spatial_dims]
        stages = list(_STAGES[spatial_dims])
        if blocks is not None:
            stages[-1] = replace(stages[-1], blocks=blocks)
        self.stages = tuple(stages)
        self.describe = MINDSSC(spatial_dims) if features == "mind" else VGG19Patches(spatial_dims, vgg19_weights)
        self.resample = AffineResampler()

    def forward(self, image: Tensor, spacing: float | tuple[float, ...] = 1.0) -> Tensor:
        """
        Args:
            image: ``[B, 2, *spatial]``, channel 0 moving, channel 1 fixed.
            spacing: voxel size of both, mm, one number or one an axis.

        Returns:
            ``[B, 1, *spatial]``.

        Raises:
            RegistrationError: another shape, or a spacing that is not positive.
        """
        dims = self.spatial_dims
        if image.ndim != dims + 2 or image.shape[1] != 2:
            raise RegistrationError("image", tuple(image.shape), f"[B, 2, {', '.join('HWD'[:dims])}]")
        sizes = [float(s) for s in (spacing if isinstance(spacing, (tuple, list)) else [spacing] * dims)]
        if len(sizes) != dims or not all(math.isfinite(s) and s > 0 for s in sizes):
            raise RegistrationError("spacing", spacing, f"one positive number, or {dims}")
        shape = tuple(int(n) for n in image.shape[2:])
        grid = Grid(shape, torch.diag(torch.tensor([*sizes, 1.0], dtype=torch.float64)))
        moving, fixed = image[:, :1].float(), image[:, 1:].float()
        matrix = self.estimate(fixed, moving, grid, grid).matrix
        theta = torch.stack([theta_from_unit(unit_from_world(m, grid, grid), list(shape)) for m in matrix])
        return self.resample(moving, theta.to(moving), list(shape)).to(image.dtype)

    @torch.no_grad()
    def estimate(
        self,
        fixed: Tensor,
        moving: Tensor,
        fixed_grid: Grid,
        moving_grid: Grid,
        fixed_mask: Tensor | None = None,
        moving_mask: Tensor | None = None,
        initial: Tensor | None = None,
        spacing: float | None = None,
        search: str | None = None,
    ) -> RobustEstimate:
        """Register a batch of pairs.

        Args:
            fixed: ``[N, 1, *spatial]`` float32; float64 is refined in that, for comparison.
            moving: likewise.
            fixed_grid: of all fixed images.
            moving_grid: of all moving images.
            fixed_mask: where to look, above 0, ``[N, 1, *spatial]``; None for the foreground.
            moving_mask: likewise.
            initial: where to start, ``[N, D+1, D+1]``, fixed world to moving world; None to take the headers' word
                (and, for the global search, the middles of the foregrounds).
            spacing: finest lattice step, mm; None for the finest spacing of the images, but no more than 512 (3D:
                256) steps along the longest side.
            search: in place of the engine's own.

        Pairs that do not look alike at what the first attempt finds get further ones with more candidates.
        """
        search = search or self.search
        options = (fixed_mask, moving_mask, initial)

        def attempt(effort: _Effort, which: Tensor | slice) -> RobustEstimate:
            one, two, three = (part if part is None else part[which] for part in options)
            parts = (fixed[which], moving[which], fixed_grid, moving_grid, one, two, three)
            pair = _Prepared(*parts, spacing, effort.faint)
            return self._attempt(pair, search, effort)

        first, *others = _EFFORTS[self.spatial_dims]
        with _full_precision(fixed.device):
            # by a slice, which copies nothing
            result = attempt(first, slice(None))
            for effort in others if search != "none" else ():
                doubtful = (result.cost[:, -1] > _DOUBTFUL).nonzero()[:, 0]
                if len(doubtful) == 0:
                    break
                again = attempt(effort, doubtful if len(doubtful) < len(fixed) else slice(None))
                better = again.cost[:, -1] < result.cost[doubtful, -1]
                result = result.replaced(doubtful[better], again.take(better))
        return result

    def _attempt(self, pair: _Prepared, search: str, effort: _Effort) -> RobustEstimate:
        transforms = pair.start[:, None]
        if search != "none":
            found = self._search(pair, search, effort)
            # where the user or the headers put it may be right
            transforms = torch.cat([found, transforms], dim=1) if search == "global" else found
        costs: list[Tensor] = []
        stages = effort.catch + self.stages
        for number, stage in enumerate(stages, start=len(self.stages) - len(stages)):
            step = stage.step * pair.base
            if step > pair.extent / _SIDE and stage is not stages[-1]:
                continue
            refiner = Refiner(self.describe, self.transform, stage.block, stage.blocks, stage.iterations)
            result = refiner(
                transforms,
                pair.fixed.at(step),
                pair.moving.at(step),
                pair.fixed_frame,
                pair.moving_frame,
                pair.fixed.seen,
                pair.moving.seen,
                step / pair.unit,
                self.seed + number % 64,  # no negative seeds
                weigh=stage is self.stages[-1],
            )
            transforms = result.transform[:, None]
            if number >= 0:
                # a level that was left out shows the next one's
                costs += [result.cost] * (number + 1 - len(costs))
        matrix = pair.moving_frame.to_world @ result.transform @ torch.linalg.inv(pair.fixed_frame.to_world)
        cost = torch.stack(costs, 1)
        assert result.evidence is not None
        covariance = self._spread(pair, result.transform, result.evidence)
        status = self._judge(matrix, cost)
        steps = torch.full((len(matrix),), pair.base, dtype=torch.float64)
        return RobustEstimate(matrix, status, cost, result.overlap, result.evidence.agreement, covariance, steps)

    def _spread(self, pair: _Prepared, transform: Tensor, evidence: Evidence) -> Tensor:
        """Covariance of the world matrix's rows from that of a motion of the fixed frame."""
        dims = self.spatial_dims
        to_fixed = torch.linalg.inv(pair.fixed_frame.to_world)
        change = (pair.moving_frame.to_world @ transform)[:, None] @ evidence.basis @ to_fixed[:, None]
        change = change[..., :dims, :].flatten(-2)  # [N, P, D(D+1)]
        return change.mT @ evidence.covariance @ change

    def _search(self, pair: _Prepared, search: str, effort: _Effort) -> Tensor:
        pose = PoseSearch(
            self.transform != "rigid",
            search,
            self.rotations,
            effort.points,
            effort.keep,
            effort.trials,
            effort.results,
        )
        fixed, moving = pair.fixed, pair.moving
        ratio = (moving.size / fixed.size.clamp(min=1e-6)) ** (1 / self.spatial_dims)
        return pose(
            pair.centered if search == "global" else pair.start,
            fixed.coarse,
            moving.coarse,
            pair.fixed_frame,
            pair.moving_frame,
            fixed.seen.values > 0,
            moving.seen.values > 0,
            ratio.clamp(0.4, 2.5).cpu().double(),
            self.seed,
        ).transform

    def _judge(self, matrix: Tensor, cost: Tensor) -> Tensor:
        dims = self.spatial_dims
        finite = matrix.flatten(1).isfinite().all(1)
        mirrored = torch.linalg.det(matrix[:, :dims, :dims].nan_to_num()) <= 0
        status = torch.where(finite, torch.where(mirrored, Status.MIRRORED, Status.OK), Status.DIFFERENT)
        unlike = cost.amin(1) > _UNLIKE[dims]
        return torch.where((status == Status.OK) & unlike, Status.DIFFERENT, status)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Coordinates bear neither half precision nor TF32, whatever the caller lets a network compute in."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    # torch 2.9 brought another interface, and the two must not be mixed
    newer = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    before = [backend.fp32_precision for backend in newer] if newer else [torch.get_float32_matmul_precision()]

    def allow(precisions: Sequence[str]) -> None:
        if not newer:
            torch.set_float32_matmul_precision(precisions[0])
        for backend, precision in zip(newer, precisions, strict=False):
            backend.fp32_precision = precision

    allow(["ieee"] * len(newer) if newer else ["highest"])
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        allow(before)


# descriptors of two scans of one brain differ by less at the finest level
_DOUBTFUL = 0.085
# those of images without common structure differ by more at every level
_UNLIKE = {2: 0.099, 3: 0.09}


class _Images:
    """One side of a batch of pairs: its pyramid, its foreground, and where that lies."""

    def __init__(
        self, values: Tensor, grid: Grid, mask: Tensor | None, base: float, coarse: float, faint: bool
    ) -> None:
        self._levels = {base: pool(Level(values, grid), base)}
        half = 2 * base
        window, seen = normalize(pool(self.at(half) if half <= coarse else self.at(base), coarse), faint)
        self._levels = {step: replace(level, window=window).clipped() for step, level in self._levels.items()}
        self.coarse = self.at(coarse)
        if mask is not None:
            # by the same steps as the image, or the two would end on different grids
            given = Level(mask.to(values.dtype), grid)
            for step in sorted({base, *self._levels, coarse}):
                given = pool(given, step)
            seen = Level(seen.values * (given.values > 0), given.grid)
            # nothing stands out there: take the mask at its word
            empty = seen.values.flatten(1).sum(1) == 0
            seen.values[empty] = (given.values[empty] > 0).to(seen.values)
        self.seen = seen
        self.center, self.radius, self.size = _moments(seen)

    def at(self, step: float) -> Level:
        """The images at about this spacing, each level made from the next finer one."""
        if step not in self._levels:
            finer = max(known for known in self._levels if known < step)
            self._levels[step] = pool(self._levels[finer], step)
        return self._levels[step]


class _Prepared:
    """What every attempt at a batch of pairs needs; for the arguments see `RobustEngine.estimate`."""

    def __init__(
        self,
        fixed: Tensor,
        moving: Tensor,
        fixed_grid: Grid,
        moving_grid: Grid,
        fixed_mask: Tensor | None,
        moving_mask: Tensor | None,
        initial: Tensor | None,
        spacing: float | None,
        faint: bool = False,
    ) -> None:
        dims = fixed_grid.dims
        extent = self.extent = float(torch.maximum(fixed_grid.extent, moving_grid.extent).max())
        finest = min(min(fixed_grid.spacing), min(moving_grid.spacing))
        self.base = spacing or max(finest, extent / _FINEST[dims])
        coarse = max(self.base, extent / _COARSEST[dims])
        self.fixed = _Images(fixed, fixed_grid, fixed_mask, self.base, coarse, faint)
        self.moving = _Images(moving, moving_grid, moving_mask, self.base, coarse, faint)
        #: length of a frame unit, mm
        self.unit = max(float((self.fixed.radius.mean() * self.moving.radius.mean()).sqrt()), self.base)
        self.fixed_frame = Frame.of(fixed_grid, self.fixed.center, self.unit)
        self.moving_frame = Frame.of(moving_grid, self.moving.center, self.unit)
        to_moving = torch.linalg.inv(self.moving_frame.to_world)
        eye = torch.eye(dims + 1, dtype=torch.float64).repeat(len(fixed), 1, 1)
        given = eye if initial is None else initial.cpu().double()
        #: fixed frame to moving frame, as the user or the headers say
        self.start = to_moving @ given @ self.fixed_frame.to_world
        eye[:, :dims, dims] = (self.moving.center - self.fixed.center).cpu().double()
        #: likewise, the middle of one foreground on that of the other
        self.centered = to_moving @ eye @ self.fixed_frame.to_world


def _moments(seen: Level) -> tuple[Tensor, Tensor, Tensor]:
    """Middle ``[N, D]`` (world), root mean square radius ``[N]`` and size ``[N]`` of the foregrounds."""
    points = index_points(seen.grid, seen.values)
    origin = points.mean(0)
    weight = seen.values.flatten(1)
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, torch.ones_like(weight))
    total = weight.sum(1, keepdim=True)
    share = weight / total
    middle = share @ (points - origin)
    spread = (share @ (points - origin).square().sum(1) - middle.square().sum(1)).clamp(min=0)
    volume = abs(float(torch.linalg.det(seen.grid.affine)))
    return middle + origin, spread.sqrt(), total[:, 0] * volume
