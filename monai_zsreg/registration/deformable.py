# SPDX-License-Identifier: Apache-2.0
"""The deformable stage: what an affine matrix leaves between two images, as a smooth map that can be inverted.

From coarse to fine, each iteration takes a Gauss-Newton step per point (Lucas and Kanade 1981, with the gradient of
both images as in Thirion's demons), smooths its equations like a fluid, composes the step with the map and smooths the
map. The images are compared point by point:

- by intensity, freed of its local mean and divided by its local deviation, where the two agree in it after the affine
  stage. One channel, and the one that tells most where the contrast is the same;
- else by local descriptors (MIND-SSC), of which each iteration looks at a quarter in turn.

Where they differ by far more than elsewhere after the coarsest level, as in a cavity, they are not compared, nor where
the map leads out of the moving image: the map is carried by its surroundings, as where a mask says so.

All smoothing and resizing is separable: a matrix along each axis. The map has half the resolution of the images at the
two finest levels; of these, each iteration then looks at every second point along each axis, at others in turn, and
only where there is something. Of images of one contrast, the map is smoothed more where its details explain no more
than noise does, which brings it nearer to a smooth truth and keeps what sets two people apart. The map is checked for
folds after each level, and smoothed where there is one. In the end it is dropped, place by place, where it makes the
images no more alike than noise and another contrast do in scans of one person.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.foreground import appearance
from monai_zsreg.geometry import Grid
from monai_zsreg.registration.displacement import Deformation, least_determinant
from monai_zsreg.registration.precision import full_precision
from monai_zsreg.registration.prepared import Prepared, is_number, resolve_device
from monai_zsreg.registration.separable import along, blurred, flattened, kernel, resized
from monai_zsreg.registration.side import finest_step

#: the name of this kind of transform
DEFORMABLE = "deformable"

# resolutions of the images in steps of the finest, and iterations at each
_LEVELS = ((8, 10), (4, 12), (2, 12), (1, 9))
# levels of no more than so many finest steps have a map of half their resolution
_HALVED = 2
# points along an axis that a level needs
_SMALLEST = 6
# most points of the finest level
_MOST = {2: 2**20, 3: 5 * 2**20}
# local correlation after the affine stage beyond which two images count as of one contrast: between people 0.28 to 0.5
# for T1-T1, T1-T1ce, T2-T2 and FLAIR-FLAIR, -0.5 to 0.03 for T1-T2, T1-FLAIR and FLAIR-T2; templates of T1 and PD, PET
# or SPECT 0.06 to 0.23
_ALIKE = 0.26
# width of the surroundings that intensities are freed of for that, parts of what the images show: in voxels, it would
# depend on the resolution whether details or coarse shades decide
_SURROUNDINGS = 0.03
# default of the smoothing length, finest steps
_STIFFNESS = 0.8
# weight of the neighbors in the patches of descriptors, that of the middle being 1: wider patches move the place where
# two contrasts agree best, narrower ones let noise through
_BESIDE = 0.25
# levels of less than so many finest steps smooth by the same length, coarser ones by as many of their own steps
_GROWTH = 1.6
# smallest Jacobian determinant that the map keeps
_LEAST = 0.05
# width of the surroundings in which it is measured what the map explains, points of the map
_REGION = 8.0
# the same for its details
_PLACE = 3.0
# length by which the map is smoothed where its details are noise, parts of that elsewhere
_SMOOTHER = 3.0
# squared difference, of the usual one at the coarsest level, from which on a region has no counterpart: a cavity 30 to
# 350, in other pairs up to 20 but for a thousandth of the points
_STRANGE = 25.0
# looks at the images for that
_LOOKS = 2
# parts that looking up is divided into, for the cores
_PARTS = 8


@dataclass(frozen=True)
class _Likeness:
    """How two images are compared.

    Attributes:
        fluid: smoothing of the equations, steps of the level.
        ridge: what is added to the diagonal of the equations, parts of its mean: points that show little move little.
        turns: looks that it takes to see all channels.
        looks: at the images in each iteration, where the map has half their resolution.
        tolerance: difference of a channel at which a point counts half.
        chance: part of the difference of the images, by number of dimensions, that a map explains by chance; at twice
            that it is kept whole. Measured at scans of one person with noise or of two contrasts: up to 0.10 by
            intensity, 0.10 (2D) and 0.04 (3D) by descriptors; between people from 0.25, and from 0.08 on.
        detail: likewise of what details of the map explain; None where they are not asked. At two finest steps details
            of a smooth truth and noise explain up to 0.01 in the 95 %, between people from 0.03 in the 5 % on.
    """

    fluid: float
    ridge: float
    turns: int
    looks: int
    tolerance: float
    chance: dict[int, float]
    detail: float | None


# more smoothing of the equations keeps noise out, less of the map follows what is there
_INTENSITY = _Likeness(2.0, 0.5, 1, 2, 1.0, {2: 0.1, 3: 0.1}, 0.01)
_DESCRIPTORS = _Likeness(4.0, 0.3, 4, 1, 1.0, {2: 0.08, 3: 0.04}, None)
# how intensities are freed of their surroundings: see `_local`
_AROUND = (2.4, 0.1)


def register_deformable(
    result: Any,
    stiffness: float | None = None,
    fixed_mask: Any = None,
    moving_mask: Any = None,
    device: str | torch.device | None = None,
) -> Deformation:
    """Go on from an affine result to a smooth map.

    Args:
        result: of `monai_zsreg.register`.
        stiffness: standard deviation, mm, of the Gaussian that the map is smoothed with after each step at the finest
            level (coarser levels smooth more): larger is smoother. None for 0.8 finest steps.
        fixed_mask: where the fixed image counts, an image or an array as in `register`; elsewhere, such as in a
            resected region, the map is carried by its surroundings. None for the mask that the result was made with.
        moving_mask: likewise for the moving image.
        device: where to compute; None for where the result was.

    Returns:
        Fixed world to moving world.

    Raises:
        RegistrationError: a stiffness that is no length, or a mask that cannot be used.
    """
    where = resolve_device(device, result.device)
    sides = []
    for name, image, mask, before in (
        ("fixed", result.fixed_image, fixed_mask, result.masks[0]),
        ("moving", result.moving_image, moving_mask, result.masks[1]),
    ):
        side = Prepared(image, result.options.get(f"{name}_channel", 0), mask, name)
        side.mask = before if side.mask is None else side.mask
        sides.append(side)
    with full_precision(where), torch.inference_mode():
        affine = torch.as_tensor(result.affine)
        return deform_prepared(sides[0], sides[1], affine, result.options.get("spacing"), stiffness, where)


def deform_prepared(
    fixed: Prepared,
    moving: Prepared,
    affine: Tensor,
    spacing: float | None,
    stiffness: float | None,
    device: torch.device,
) -> Deformation:
    """`deform` for two `Prepared` images, on a device."""
    sides = []
    for side in (fixed, moving):
        masks = [mask[0].to(device) for mask in (side.mask, side.seen) if mask is not None]
        sides.append((side.values[0].to(device), side.image.grid, torch.stack(masks).all(0) if masks else None))
    found = deform(sides[0], sides[1], affine, spacing, stiffness)
    # not an inference tensor, with which a caller's autograd could not work
    with torch.inference_mode(False):
        return Deformation(found.affine.clone(), found.displacement.cpu().clone(), found.grid)


def check_stiffness(stiffness: Any) -> None:
    """
    Raises:
        RegistrationError: it is neither None nor a length.
    """
    if stiffness is not None and not (is_number(stiffness) and 0 < float(stiffness) < math.inf):
        raise RegistrationError("stiffness", stiffness, "a length above 0, mm, or None")


def deform(
    fixed: tuple[Tensor, Grid, Tensor | None],
    moving: tuple[Tensor, Grid, Tensor | None],
    affine: Tensor,
    spacing: float | None = None,
    stiffness: float | None = None,
) -> Deformation:
    """The algorithm.

    Args:
        fixed: values ``[*spatial]`` float32, lattice, and where they count, ``[*spatial]`` bool or None.
        moving: likewise.
        affine: ``(D+1, D+1)``, fixed world to moving world.
        spacing: finest step, mm; None for that of the images.
        stiffness: see `register_deformable`.
    """
    check_stiffness(stiffness)
    scene = _Scene(fixed, moving, affine, spacing)
    likeness = _INTENSITY if scene.agreement() > _ALIKE else _DESCRIPTORS
    length = _STIFFNESS * scene.step if stiffness is None else float(stiffness)
    levels = [(scale, n) for scale, n in _LEVELS if scale == 1 or min(scene.shape) >= _SMALLEST * scale]
    shift: Tensor | None = None
    detail: Tensor | None = None
    for number, (scale, iterations) in enumerate(levels):
        shape = [-(-n // (2 * scale if scale <= _HALVED else scale)) for n in scene.shape]
        before = fixed[0].new_zeros(scene.dims, *shape) if shift is None else resized(shift, shape)
        detail = None if detail is None else resized(detail, shape)
        smooth = length * max(1.0, scale / _GROWTH)
        pair = _Pair(scene, likeness, scale, shape)
        shift = _level(pair, likeness, iterations, before, smooth, detail)
        if number == 0 and len(levels) > 1 and scene.leave_out(pair.strange(shift)):
            pair = _Pair(scene, likeness, scale, shape)
            shift = _level(pair, likeness, iterations, before, smooth, detail)
        if scale > 1 and likeness.detail is not None:
            detail = _detail(pair, likeness, shift, smooth)
        shift = _without_folds(_trusted(pair, likeness, shift) if scale == 1 else shift)
    assert shift is not None
    return scene.deformation(shift, affine)


class _Scene:
    """Both images on one lattice, which lies along the fixed image's axes, cut to the part that shows something.

    Coordinates are those of ``grid_sample`` on that box, so that they do not depend on the resolution.

    Args:
        fixed: see `deform`.
        moving: likewise.
        affine: likewise.
        spacing: likewise.

    Attributes:
        step: distance of the points of the finest level, mm.
        steps: the same along each axis.
        shape: number of points along each axis of the box.
        images: the fixed and the moving image there, ``[1, *shape]`` each.
        shown: 1 where either shows something, ``[1, *shape]``.
        counts: where both count, the moving image's first seen through the affine matrix, ``[1, *shape]`` or None.
    """

    def __init__(
        self,
        fixed: tuple[Tensor, Grid, Tensor | None],
        moving: tuple[Tensor, Grid, Tensor | None],
        affine: Tensor,
        spacing: float | None,
    ) -> None:
        grid = fixed[1]
        self.dims = grid.dims
        numbers = _numbers(fixed), _numbers(moving)
        step = finest_step(grid, moving[1], spacing)[0]
        while True:
            self._whole = _lattice(grid, step)
            # where there is something a coarse look tells
            coarse = _over(grid, [-(-n // 4) if n >= 16 else n for n in self._whole.shape])
            every = 4 if coarse.shape != self._whole.shape else 1
            still = [resized(image, coarse.shape) for image in numbers[0]]
            seen = _seen(numbers[1][:1], moving[1], affine, coarse, every * step)[0]
            self._begin, self.shape, shown = _box([still[0], seen[0]], self._whole.shape)
            if torch.Size(self.shape).numel() <= _MOST[self.dims]:
                break
            step *= 1.02 * (torch.Size(self.shape).numel() / _MOST[self.dims]) ** (1 / self.dims)
        self.step, self.steps = step, self._whole.spacing
        cut = (slice(None), *[slice(b, b + n) for b, n in zip(self._begin, self.shape, strict=True)])
        self.shown, *still = (resized(image, self._whole.shape)[cut].contiguous() for image in [shown, *numbers[0]])
        place = torch.eye(self.dims + 1, dtype=torch.float64)
        place[:-1, -1] = torch.tensor(self._begin, dtype=torch.float64)
        box = Grid(tuple(self.shape), self._whole.affine @ place)
        seen, inside = _seen(numbers[1], moving[1], affine, box, step)
        if inside is not None:
            seen = [seen[0], inside if len(seen) == 1 else seen[1] * inside]
        self.counts = tuple(images[1] if len(images) > 1 else None for images in (still, seen))
        self.images = tuple(_filled(images[0], c) for images, c in zip((still, seen), self.counts, strict=True))

    def agreement(self) -> float:
        """Correlation of the two images' local z-scores, at half the resolution, inside both foregrounds.

        Their rims look alike whatever the contrast is.
        """
        shape = [-(-n // 2) for n in self.shape]
        images = [resized(image, shape) for image in self.images]
        both = torch.stack([appearance(image[0]).foreground for image in images]).all(0)[None].to(images[0])
        weight = (blurred(both, [1.5] * self.dims) > 0.97).to(images[0])
        if not bool(weight.any()):
            weight = resized(self.shown, shape)
        for count in self.counts:
            weight = weight if count is None else weight * resized(count, shape)
        width = _SURROUNDINGS * torch.Size(shape).numel() ** (1 / self.dims)
        one, two = (_local(image, width) for image in images)
        common, *own = ((a * b * weight).double().sum() for a, b in ((one, two), (one, one), (two, two)))
        return float(common / (own[0] * own[1]).clamp(min=1e-20).sqrt())

    def leave_out(self, where: Tensor) -> bool:
        """Let the places ``[1, *n]`` bool of the fixed image count no more; whether there were any."""
        if not bool(where.any()):
            return False
        rest = 1 - resized(where.to(self.shown), self.shape)
        self.counts = (rest if self.counts[0] is None else rest * self.counts[0], self.counts[1])
        self.images = (_filled(self.images[0], self.counts[0]), self.images[1])
        return True

    def deformation(self, shift: Tensor, affine: Tensor) -> Deformation:
        """The map on a lattice over the whole field of view; beyond the box it goes on as it is at its edge."""
        # whole steps of the map in front of the box and behind it
        coarse = [n / m for n, m in zip(self.shape, shift.shape[1:], strict=True)]
        before = [int(-(-b // c)) for b, c in zip(self._begin, coarse, strict=True)]
        after = [
            max(0, int(-(-(whole - b - n) // c)))
            for whole, b, n, c in zip(self._whole.shape, self._begin, self.shape, coarse, strict=True)
        ]
        pad = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
        size = torch.tensor(self.shape, dtype=torch.float64)
        index = F.pad(shift[None], pad, mode="replicate")[0] * (0.5 * size).to(shift).view(-1, *[1] * self.dims)
        linear = self._whole.affine[: self.dims, : self.dims].to(index)
        place = torch.eye(self.dims + 1, dtype=torch.float64)
        for axis, (c, b, skip) in enumerate(zip(coarse, before, self._begin, strict=True)):
            place[axis, axis] = c
            place[axis, -1] = 0.5 * c - 0.5 - b * c + skip
        grid = Grid(tuple(index.shape[1:]), self._whole.affine @ place)
        return Deformation(affine, torch.einsum("ij,j...->i...", linear, index).contiguous(), grid)


def _numbers(side: tuple[Tensor, Grid, Tensor | None]) -> list[Tensor]:
    """The image, so that nothing of the size of its numbers matters, and where it counts, ``[1, *spatial]`` each."""
    values, _, counts = side
    found = appearance(values)
    numbers = ((values - found.background) / found.scale).clamp_(-10.0, 10.0)[None]
    return [numbers] if counts is None else [numbers, counts.to(values.dtype)[None]]


def _seen(
    images: Sequence[Tensor], grid: Grid, affine: Tensor, lattice: Grid, step: float
) -> tuple[list[Tensor], Tensor | None]:
    """Images of the moving world at the points of a lattice of the fixed world.

    Args:
        images: ``[1, *grid.shape]`` each.
        grid: of the images.
        affine: fixed world to moving world.
        lattice: where to look.
        step: distance of its points, mm, over which the images are averaged.

    Returns:
        ``[1, *lattice.shape]`` each, and 1 where they have something, or None for everywhere.
    """
    dims, like = grid.dims, images[0]
    finer = _lattice(grid, step)
    pull = lattice.index_pull(affine.cpu().double(), finer)
    size = torch.tensor(finer.shape, dtype=torch.float64)
    # normalized coordinates in double precision axis by axis, summed in single
    where = ((2 * pull[:dims, dims] + 1) / size - 1).flip(-1).to(like)
    for axis, n in enumerate(lattice.shape):
        part = ((2 / size * pull[:dims, axis]) * torch.arange(n, dtype=torch.float64)[:, None]).flip(-1).to(like)
        where = where + part.view(*[-1 if a == axis else 1 for a in range(dims)], dims)
    found = [
        F.grid_sample(resized(image, finer.shape)[None], where[None], padding_mode="border", align_corners=False)[0]
        for image in images
    ]
    outside = (where.abs() > 1).any(-1)[None]
    return found, (~outside).to(like) if bool(outside.any()) else None


def _lattice(grid: Grid, step: float) -> Grid:
    """A lattice over the same field of view, of points ``step`` apart but nowhere finer than ``grid``."""
    return _over(grid, [max(1, min(n, round(n * s / step))) for n, s in zip(grid.shape, grid.spacing, strict=True)])


def _over(grid: Grid, shape: Sequence[int]) -> Grid:
    """A lattice of so many points over the same field of view."""
    place = torch.eye(grid.dims + 1, dtype=torch.float64)
    for axis, (n, m) in enumerate(zip(grid.shape, shape, strict=True)):
        place[axis, axis], place[axis, -1] = n / m, 0.5 * n / m - 0.5
    return Grid(tuple(shape), grid.affine @ place)


def _filled(image: Tensor, counts: Tensor | None) -> Tensor:
    """An image ``[1, *n]`` with what does not count replaced by the mean of the nearest that does.

    What lies there would reach far into the local statistics of the coarse levels.
    """
    if counts is None:
        return image
    dims, width = image.ndim - 1, 2.0
    known, result = counts, image * counts
    while width < max(image.shape) and bool((known < 0.5).any()):
        share = blurred(known, [width] * dims)
        mean = blurred(result, [width] * dims) / share.clamp(min=1e-6)
        new = (known < 0.5) & (share > 0.02)
        result = torch.where(new, mean, result)
        known = torch.where(new, 1.0, known)
        width *= 2
    return torch.where(counts > 0.5, image, result)


def _box(images: Sequence[Tensor], shape: Sequence[int]) -> tuple[list[int], list[int], Tensor]:
    """First point and size of the part that shows something, with a rim; ``[1, *coarse]``, 1 where an image does.

    Args:
        images: ``[1, *coarse]`` each.
        shape: of the lattice whose points are counted.
    """
    shown = torch.stack([appearance(image[0]).foreground for image in images]).any(0)[None].float()
    shown = (blurred(shown, [0.7] * len(shape)) > 0.02).float()
    begin, size = [], []
    for axis, (n, m) in enumerate(zip(shape, shown.shape[1:], strict=True)):
        places = shown[0].movedim(axis, 0).flatten(1).amax(1).nonzero().flatten()
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, m - 1)
        start = max(0, int((first - 1) * n / m))
        begin.append(start)
        size.append(min(n, int(-(-(last + 2) * n // m))) - start)
    return begin, size, shown


# --------------------------------------------------------------------------------------------------------------------
# one level
# --------------------------------------------------------------------------------------------------------------------


def _level(
    pair: _Pair, likeness: _Likeness, iterations: int, shift: Tensor, smooth: float, detail: Tensor | None
) -> Tensor:
    """Improve the map at one resolution.

    Args:
        pair: the images.
        likeness: how they are compared.
        iterations: how often.
        shift: the map, ``[D, *lattice]`` in coordinates of ``grid_sample``, axes in array order.
        smooth: length by which the map is smoothed after each step, mm.
        detail: where it is smoothed by that alone, 0 to 1, ``[1, *lattice]``; None for everywhere.
    """
    dims, lattice = len(shift), shift.shape[1:]
    fluid = [likeness.fluid * min(pair.steps) / apart for apart in pair.apart]
    elastic = [smooth / apart for apart in pair.apart]
    half = _column([0.5 * n for n in pair.shape], shift)
    pairs = [(i, j) for i in range(dims) for j in range(i, dims)]
    looks = likeness.looks if tuple(lattice) != tuple(pair.shape) else 1
    equations = shift.new_empty(len(pairs) + dims, *lattice)
    for number in range(iterations):
        equations.zero_()
        rows = equations.flatten(1)
        for look in range(number * looks, (number + 1) * looks):
            at, weight, channels = pair.look(shift, look)
            total = shift.new_zeros(len(rows), len(at))
            for one, two, slopes in channels:
                gap = (one - two) * weight
                # what differs much has no counterpart there
                share = (gap / likeness.tolerance).square_().add_(1).reciprocal_()
                shared = [slope * share for slope in slopes]
                for numbers, (i, j) in zip(total, pairs, strict=False):
                    numbers.addcmul_(shared[i], slopes[j])
                for numbers, slope in zip(total[len(pairs) :], shared, strict=True):
                    numbers.addcmul_(slope, gap)
            for row, numbers in zip(rows, total, strict=True):
                row.index_add_(0, at, numbers)
        smoothed = blurred(equations, fluid)
        step = _solved(smoothed[: len(pairs)], smoothed[len(pairs) :], pairs, likeness.ridge)
        length = torch.stack([part.square() for part in step]).sum(0, keepdim=True).sqrt_()
        step = step / length.clamp_(min=1.0) / half
        rough = step + _pulled(shift, step)
        shift = blurred(rough, elastic)
        if detail is not None:
            shift = torch.lerp(flattened(rough, [_SMOOTHER * e for e in elastic]), shift, detail)
    return shift


class _Pair:
    """Both images at one resolution, looked at where a map has its points.

    Args:
        scene: the images.
        likeness: how they are compared.
        scale: resolution, finest steps.
        lattice: of the map. Where it has half the points of the images, each look is at other ones of theirs.

    Attributes:
        shape: number of points of the images along each axis.
        steps: distance between them along each axis, mm.
        apart: the same of the points of the map.
    """

    def __init__(self, scene: _Scene, likeness: _Likeness, scale: int, lattice: Sequence[int]) -> None:
        self.shape = [-(-n // scale) for n in scene.shape]
        self.steps = [s * n / m for s, n, m in zip(scene.steps, scene.shape, self.shape, strict=True)]
        self.apart = [s * n / m for s, n, m in zip(scene.steps, scene.shape, lattice, strict=True)]
        self._lattice, self._turns = tuple(lattice), likeness.turns
        fixed, self._moving = (_described(resized(image, self.shape), likeness) for image in scene.images)
        self._fixed = fixed.flatten(1)
        shown, counted, self._seen = (
            None if part is None else resized(part, self.shape) for part in (scene.shown, *scene.counts)
        )
        # a channel of the moving image and twice its derivatives, 0 at the edge
        self._bent = self._moving.new_zeros(1 + len(self.shape), *self.shape, dtype=torch.float32)
        assert shown is not None
        self._weight = (shown if counted is None else shown * counted).flatten()

    def look(
        self, shift: Tensor, number: int, slopes: bool = True
    ) -> tuple[Tensor, Tensor, Iterator[tuple[Tensor, Tensor, list[Tensor]]]]:
        """What there is to compare.

        Args:
            shift: the map.
            number: of the look.
            slopes: whether the derivatives are asked for.

        Returns:
            The numbers of the points of the map that count, how much they do, and for each channel the fixed and the
            moving image there ``[N]``, and along each axis the sum of twice their own derivatives, per point of the
            images. How the map turns the moving image's is left out: no map came nearer to a truth for it.
        """
        dims = len(self.shape)
        # opposite corners of a cell of the map follow one another
        corner = (0, 7, 3, 4, 5, 2, 6, 1)[number % 8]
        axes = [
            (
                (torch.arange(m, device=shift.device) * 2 + (corner >> axis & 1)).clamp_(max=n - 1)
                if n > m
                else torch.arange(n, device=shift.device)
            )
            for axis, (n, m) in enumerate(zip(self.shape, self._lattice, strict=True))
        ]
        strides = [torch.Size(self.shape[axis + 1 :]).numel() for axis in range(dims)]
        flat = _outer([ticks * stride for ticks, stride in zip(axes, strides, strict=True)])
        at = (self._weight.index_select(0, flat) > 0.01).nonzero().flatten()
        flat = flat.index_select(0, at)
        weight = self._weight.index_select(0, flat)
        rows = [kernel(m, n, 0.0) for n, m in zip(self.shape, self._lattice, strict=True)]
        here = along(shift, [None if k is None else k[t.cpu()] for k, t in zip(rows, axes, strict=True)]).flatten(1)
        index = [ticks.index_select(0, at) for ticks in _each(axes)]
        parts = [(2 * i + 1) / n - 1 + h.index_select(0, at) for i, n, h in zip(index, self.shape, here, strict=True)]
        where = torch.stack(parts[::-1], -1)
        if self._seen is not None:
            weight = weight * _looked_up(self._seen, where)[0]
        # beyond the edge there is nothing to compare: its last values, repeated, would draw the map ever further out
        weight = weight * (where.abs() <= 1).all(-1)
        beside = [
            (flat + (i < n - 1) * stride, flat - (i > 0) * stride)
            for i, n, stride in zip(index, self.shape, strides, strict=True)
            if slopes
        ]
        channels = range(number % self._turns, len(self._fixed), self._turns)
        return at, weight, (self._channel(channel, flat, where, beside) for channel in channels)

    def _channel(
        self, channel: int, flat: Tensor, where: Tensor, beside: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """One channel as `look` gives it, at points of the fixed and places of the moving image."""
        one, moving = self._fixed[channel], self._bent[0].copy_(self._moving[channel])
        for axis, (n, slope) in enumerate(zip(self.shape, self._bent[1:] if beside else (), strict=False)):
            if n > 2:
                ahead, behind = moving.narrow(axis, 2, n - 2), moving.narrow(axis, 0, n - 2)
                torch.sub(ahead, behind, out=slope.narrow(axis, 1, n - 2))
        two, *slopes = _looked_up(self._bent if beside else self._bent[:1], where)
        for slope, (a, b) in zip(slopes, beside, strict=True):
            slope.add_(one.index_select(0, a)).sub_(one.index_select(0, b))
        return one.index_select(0, flat), two, slopes

    def difference(self, shift: Tensor, looks: int) -> tuple[Tensor, Tensor]:
        """Squared difference of the images under a map, and how much it counts, ``[1, *lattice]`` each."""
        gap, counted = torch.zeros_like(shift[:1]), torch.zeros_like(shift[:1])
        for look in range(looks):
            at, weight, channels = self.look(shift, look, slopes=False)
            for one, two, _ in channels:
                gap.view(-1).index_add_(0, at, (one - two).square_())
                counted.view(-1).index_add_(0, at, weight)
        return gap, counted

    def strange(self, shift: Tensor) -> Tensor:
        """Where the images differ by far more than elsewhere, ``[1, *lattice]`` bool: a resected region."""
        gap, counted = self.difference(shift, self._turns)
        around = [0.75] * len(shift)
        usual = blurred(counted.square(), around)
        known = usual > 0.25 * usual.max()
        gap = blurred(gap * counted, around) / usual.clamp(min=1e-6)
        return known & (gap > _STRANGE * gap[known].median()) if bool(known.any()) else known


def _detail(pair: _Pair, likeness: _Likeness, shift: Tensor, smooth: float) -> Tensor:
    """Where the details of a map are more than noise, 0 to 1, ``[1, *lattice]``.

    Args:
        pair: the images.
        likeness: how they are compared.
        shift: the map, ``[D, *lattice]``.
        smooth: see `_level`.
    """
    assert likeness.detail is not None
    plain = flattened(shift, [_SMOOTHER * smooth / apart for apart in pair.apart])
    return (_explained(pair, shift, plain, _PLACE) / likeness.detail - 1).clamp_(0, 1)


def _trusted(pair: _Pair, likeness: _Likeness, shift: Tensor) -> Tensor:
    """The map, left out where it explains no more of the difference of the images than it would by chance."""
    keep = (_explained(pair, shift, torch.zeros_like(shift), _REGION) / likeness.chance[len(shift)] - 1).clamp_(0, 1)
    return shift * blurred(keep, [_REGION / 2] * len(shift))


def _explained(pair: _Pair, shift: Tensor, plain: Tensor, width: float) -> Tensor:
    """Part of the difference of the images under ``plain`` that a map explains, ``[1, *lattice]``.

    Interpolation smooths, and alone makes images more alike. So the map is compared with its opposite: to second order,
    the difference is what it explains four times.

    Args:
        pair: the images.
        shift: the map, ``[D, *lattice]``.
        plain: a simpler one.
        width: of the Gaussian that weighs the surroundings, points of the map.
    """
    around = [width] * len(shift)
    gaps = [pair.difference(way, _LOOKS) for way in (shift, 2 * plain - shift)]
    weight = torch.minimum(gaps[0][1], gaps[1][1])
    # of what either way takes out of sight, nothing is explained
    lost = (torch.maximum(gaps[0][1], gaps[1][1]) - weight) * (gaps[0][0] * weight).sum() / weight.sum().clamp(min=1e-6)
    ours, opposite = (blurred(gap * weight + lost, around) + 1e-3 * (gap * weight).mean() + 1e-20 for gap, _ in gaps)
    return (opposite - ours) / (3 * ours + opposite)


def _described(image: Tensor, likeness: _Likeness) -> Tensor:
    return _local(image, *_AROUND) if likeness is _INTENSITY else _mind(image)


def _local(image: Tensor, width: float, quiet: float = 1e-3) -> Tensor:
    """An image freed of its local mean and divided by its local deviation, ``[1, *n]``.

    Args:
        image: ``[1, *n]``.
        width: of the Gaussian that weighs the surroundings, points.
        quiet: part of the usual variance that is added to each: what varies less is noise.
    """
    widths = [width] * (image.ndim - 1)
    mean = blurred(image, widths)
    variance = (blurred(image.square(), widths) - mean.square()).clamp_(min=0)
    return (image - mean) / (variance + quiet * variance.mean()).clamp_(min=1e-20).sqrt_()


def _mind(image: Tensor) -> Tensor:
    """MIND-SSC (Heinrich et al. 2013) at every point, in half precision where that saves memory, ``[C, *n]``.

    Four consecutive channels of the twelve in 3D have one of every pair of axes each, so that every fourth has all.
    """
    dims, shape = image.ndim - 1, image.shape[1:]
    padded = F.pad(image[None], (3,) * (2 * dims), mode="replicate")[0, 0]

    def part(values: Tensor, rim: int, place: Sequence[int]) -> Tensor:
        for axis, step in enumerate(place):
            rest = (values.shape[axis] - shape[axis]) // 2
            values = values.narrow(axis, rest - rim + step, shape[axis] + 2 * rim)
        return values

    def unit(axis: int, side: int) -> list[int]:
        return [side if other == axis else 0 for other in range(dims)]

    channels = []
    for a, b in combinations(range(dims), 2):
        # two pairs of neighbors have the same difference, at another place
        same = {}
        for t in (-1, 1):
            apart = [y - x for x, y in zip(unit(a, 1), unit(b, t), strict=True)]
            gap = (part(padded, 2, [0] * dims) - part(padded, 2, apart)).square_()
            for axis in range(dims):
                n = gap.shape[axis] - 2
                gap = torch.add(gap.narrow(axis, 1, n), gap.narrow(axis, 0, n), alpha=_BESIDE).add_(
                    gap.narrow(axis, 2, n), alpha=_BESIDE
                )
            same[1, t], same[-1, -t] = part(gap, 0, unit(a, 1)), part(gap, 0, unit(b, -t))
        channels += [same[s, t] for s in (-1, 1) for t in (-1, 1)]
    least = channels[0].clone(memory_format=torch.contiguous_format)
    mean = torch.zeros_like(least)
    for channel in channels:
        torch.minimum(least, channel, out=least)
        mean.add_(channel, alpha=1 / len(channels))
    mean -= least
    usual = mean.mean()
    mean.clamp_(usual * 1e-3, usual * 1e3).clamp_(min=1e-20)
    factor, half = mean.reciprocal_().neg_(), torch.float16 if image.dtype == torch.float32 else image.dtype
    result = torch.empty(len(channels), *shape, dtype=half, device=image.device)
    for channel, place in zip(channels, result, strict=True):
        place.copy_((channel - least).mul_(factor).exp_())
    return result


def _solved(normal: Tensor, right: Tensor, pairs: list[tuple[int, int]], part: float) -> Tensor:
    """The step of every point, ``[D, *lattice]``, points of the level.

    The slopes are those of the sum of both images, over two points: four times the derivative of their mean.

    Args:
        normal: upper triangles of the normal matrices, ``[D(D + 1) / 2, *lattice]``.
        right: right-hand sides, ``[D, *lattice]``.
        pairs: which entries ``normal`` has.
        part: see `_Likeness.ridge`.
    """
    dims = len(right)
    matrix = dict(zip(pairs, normal, strict=True))
    ridge = part * sum(matrix[i, i].mean() for i in range(dims)).clamp(min=1e-20)
    sides = [4.0 * side for side in right]
    matrix = {(i, j): entry + ridge if i == j else entry for (i, j), entry in matrix.items()}
    for i in range(dims):
        for j in range(i + 1, dims):
            factor = matrix[i, j] / matrix[i, i]
            for k in range(j, dims):
                matrix[j, k] = matrix[j, k] - factor * matrix[i, k]
            sides[j] = sides[j] - factor * sides[i]
    for i in reversed(range(dims)):
        for k in range(i + 1, dims):
            sides[i] = sides[i] - matrix[i, k] * sides[k]
        sides[i] = sides[i] / matrix[i, i]
    return torch.stack(sides)


def _without_folds(shift: Tensor) -> Tensor:
    """The map, smoothed around points where its determinant is too small until it is not."""
    dims = len(shift)
    half = _column([0.5 * n for n in shift.shape[1:]], shift)
    for attempt in range(40):
        bad = least_determinant(shift * half) < _LEAST
        if not bool(bad.any()):
            return shift
        around = (blurred(bad[None].to(shift), [1.5 + 0.1 * attempt] * dims) * 20).clamp_(max=1.0)
        shift = torch.lerp(shift, blurred(shift, [1.0 + 0.1 * attempt] * dims), around)
    while bool((least_determinant(shift * half) < _LEAST).any()):
        # the identity at the latest
        shift = 0.8 * shift
    return shift


# --------------------------------------------------------------------------------------------------------------------
# separable smoothing and resizing
# --------------------------------------------------------------------------------------------------------------------


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))


def _each(axes: Sequence[Tensor]) -> list[Tensor]:
    """The coordinates of every point of a lattice, from those along its axes, flat."""
    return [part.flatten() for part in torch.meshgrid(*axes, indexing="ij")]


def _outer(axes: Sequence[Tensor]) -> Tensor:
    """Sums of one number of each axis, for every point of a lattice, flat."""
    total = axes[0]
    for numbers in axes[1:]:
        total = total.unsqueeze(-1) + numbers
    return total.flatten()


@lru_cache(maxsize=8)
def _identity(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    axes = [(2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1]).to(device, dtype)


def _pulled(values: Tensor, shift: Tensor) -> Tensor:
    """``[C, *n]`` looked up at every point of the lattice of ``shift``, plus ``shift``, ``[C, *lattice]``."""
    where = _identity(tuple(shift.shape[1:]), shift.dtype, shift.device) + shift.flip(0)
    return _looked_up(values, where.flatten(1).mT).view(len(values), *shift.shape[1:])


def _looked_up(values: Tensor, where: Tensor) -> Tensor:
    """``[C, *n]`` at places ``[N, D]``, coordinates of ``grid_sample``, ``[C, N]``."""
    dims, count = where.shape[1], len(where)
    # in three dimensions torch uses one core for each image of a batch
    where = F.pad(where, (0, 0, 0, -count % _PARTS)).view(_PARTS, *[1] * (dims - 1), -1, dims)
    found = F.grid_sample(values.expand(_PARTS, *values.shape), where, padding_mode="border", align_corners=False)
    return found.movedim(0, 1).reshape(len(values), -1)[:, :count]
