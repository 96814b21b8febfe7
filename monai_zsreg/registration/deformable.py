# SPDX-License-Identifier: Apache-2.0
"""The deformable stage: what an affine matrix leaves between two images, as a smooth map that can be inverted.

From coarse to fine, each iteration takes a Gauss-Newton step per point (Lucas and Kanade 1981, with the gradient of
both images as in Thirion's demons), smooths its equations like a fluid, composes the step with the map and smooths the
map. The images are compared point by point:

- by intensity, freed of its local mean and divided by its local deviation, where the two agree in it after the affine
  stage. One channel, and the one that tells most where the contrast is the same;
- else by local descriptors (MIND-SSC), of which each iteration looks at a quarter in turn.

All smoothing and resizing is separable: a matrix along each axis. The map has half the resolution of the images, is
checked for folds after each level, and smoothed where there is one. In the end it is dropped, place by place, where it
makes the images no more alike than noise and another contrast do in scans of one person.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from monai_zsreg.registration.side import finest_step

__all__ = ["DEFORMABLE", "check_stiffness", "deform", "deform_prepared", "register_deformable"]

#: the name of this kind of transform
DEFORMABLE = "deformable"

# resolutions of the images in steps of the finest, and iterations at each
_LEVELS = ((8, 10), (4, 12), (2, 12), (1, 7))
# points along an axis that a level needs
_SMALLEST = 6
# most points of the finest level
_MOST = {2: 2**20, 3: 5 * 2**20}
# local correlation after the affine stage beyond which two images count as of one contrast: between people 0.09 to 0.16
# for T1-T1, T1-T1ce and T2-T2, -0.15 to -0.02 for T1-T2 and T1-FLAIR
_ALIKE = 0.04
# levels of less than so many finest steps smooth by the same length, coarser ones by as many of their own steps
_GROWTH = 1.6
# smallest Jacobian determinant that the map keeps
_LEAST = 0.05
# width of the surroundings in which it is measured what the map explains, points of the map
_REGION = 8.0


@dataclass(frozen=True)
class _Likeness:
    """How two images are compared.

    Attributes:
        stiffness: default of the smoothing length, finest steps.
        fluid: smoothing of the equations, steps of the level.
        ridge: what is added to the diagonal of the equations, parts of its mean: points that show little move little.
        turns: iterations that it takes to look at all channels.
        tolerance: difference of a channel at which a point counts half.
        chance: part of the difference of the images, by number of dimensions, that a map explains by chance; at twice
            that it is kept whole. Measured at scans of one person with noise or of two contrasts: up to 0.10 by
            intensity, 0.10 (2D) and 0.04 (3D) by descriptors; between people from 0.25, and from 0.08 on.
    """

    stiffness: float
    fluid: float
    ridge: float
    turns: int
    tolerance: float
    chance: dict[int, float]


_INTENSITY = _Likeness(0.8, 1.5, 0.5, 1, 1.0, {2: 0.1, 3: 0.1})
_DESCRIPTORS = _Likeness(2.0, 2.0, 0.3, 4, 1.0, {2: 0.08, 3: 0.04})
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
            level (coarser levels smooth more): larger is smoother. None for 0.8 finest steps where intensities agree,
            2 where only descriptors do.
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
    length = likeness.stiffness * scene.step if stiffness is None else float(stiffness)
    shift = None
    for scale, iterations in _LEVELS:
        if min(scene.shape) < _SMALLEST * scale and scale > 1:
            continue
        shape = [-(-n // max(scale, 2)) for n in scene.shape]
        shift = fixed[0].new_zeros(scene.dims, *shape) if shift is None else _resized(shift, shape)
        smooth = length * max(1.0, scale / _GROWTH)
        shift = _without_folds(_level(scene, likeness, scale, iterations, shift, smooth))
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
        step = finest_step(grid, moving[1], spacing)[0]
        while True:
            self._whole = _lattice(grid, step)
            images, counts = self._look(fixed, moving, affine, step)
            self._begin, self.shape, shown = _box(images, step)
            if torch.Size(self.shape).numel() <= _MOST[self.dims]:
                break
            step *= 1.02 * (torch.Size(self.shape).numel() / _MOST[self.dims]) ** (1 / self.dims)
        self.step, self.steps = step, self._whole.spacing
        cut = (slice(None), *[slice(b, b + n) for b, n in zip(self._begin, self.shape, strict=True)])
        self.shown = shown[cut].contiguous()
        self.counts = tuple(None if count is None else count[cut].contiguous() for count in counts)
        self.images = tuple(_filled(image[cut].contiguous(), c) for image, c in zip(images, self.counts, strict=True))

    def _look(
        self,
        fixed: tuple[Tensor, Grid, Tensor | None],
        moving: tuple[Tensor, Grid, Tensor | None],
        affine: Tensor,
        step: float,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        lattice = self._whole
        on_fixed = [_resized(image[None], lattice.shape) for image in _numbers(fixed)]
        finer = _lattice(moving[1], step)
        pull = lattice.index_pull(affine.cpu().double(), finer)
        axes = [torch.arange(n, dtype=torch.float64) for n in lattice.shape]
        size = torch.tensor(finer.shape, dtype=torch.float64)
        # normalized coordinates in double precision axis by axis, summed in single
        parts = [
            ((2 / size * pull[: self.dims, axis]) * ticks[:, None]).flip(-1).float().to(fixed[0].device)
            for axis, ticks in enumerate(axes)
        ]
        where = ((2 * pull[: self.dims, self.dims] + 1) / size - 1).flip(-1).float().to(fixed[0].device)
        for axis, part in enumerate(parts):
            where = where + part.view(*[-1 if a == axis else 1 for a in range(self.dims)], self.dims)
        on_moving = [
            F.grid_sample(
                _resized(image[None], finer.shape)[None], where[None], padding_mode="border", align_corners=False
            )[0]
            for image in _numbers(moving)
        ]
        outside = (where.abs() > 1).any(-1)[None]
        seen = on_moving[1] if len(on_moving) > 1 else None
        if bool(outside.any()):
            seen = (~outside).float() if seen is None else seen * ~outside
        return [on_fixed[0], on_moving[0]], [on_fixed[1] if len(on_fixed) > 1 else None, seen]

    def agreement(self) -> float:
        """Correlation of the two images' local z-scores, at half the resolution, inside both foregrounds.

        Their rims look alike whatever the contrast is.
        """
        shape = [-(-n // 2) for n in self.shape]
        images = [_resized(image, shape) for image in self.images]
        both = torch.stack([appearance(image[0]).foreground for image in images]).all(0)[None].to(images[0])
        weight = (_blurred(both, [1.5] * self.dims) > 0.97).to(images[0])
        if not bool(weight.any()):
            weight = _resized(self.shown, shape)
        for count in self.counts:
            weight = weight if count is None else weight * _resized(count, shape)
        one, two = (_local(image, 0.8) for image in images)
        common, *own = ((a * b * weight).double().sum() for a, b in ((one, two), (one, one), (two, two)))
        return float(common / (own[0] * own[1]).clamp(min=1e-20).sqrt())

    def weight(self, shift: Tensor) -> Tensor:
        """How much each point counts under a map, ``[1, *n]`` for ``[D, *n]``."""
        weight = _resized(self.shown, shift.shape[1:])
        for number, count in enumerate(self.counts):
            if count is not None:
                count = _resized(count, shift.shape[1:])
                weight = weight * (_pulled(count, shift) if number else count)
        return weight

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
    values, _, counts = side
    found = appearance(values)
    # so that nothing of the size of the numbers matters
    numbers = ((values - found.background) / found.scale).clamp_(-10.0, 10.0)
    return [numbers] if counts is None else [numbers, counts.to(values.dtype)]


def _lattice(grid: Grid, step: float) -> Grid:
    """A lattice over the same field of view, of points ``step`` apart but nowhere finer than ``grid``."""
    shape = [max(1, min(n, round(n * s / step))) for n, s in zip(grid.shape, grid.spacing, strict=True)]
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
        share = _blurred(known, [width] * dims)
        mean = _blurred(result, [width] * dims) / share.clamp(min=1e-6)
        new = (known < 0.5) & (share > 0.02)
        result = torch.where(new, mean, result)
        known = torch.where(new, 1.0, known)
        width *= 2
    return torch.where(counts > 0.5, image, result)


def _box(images: Sequence[Tensor], step: float) -> tuple[list[int], list[int], Tensor]:
    """First point and size of the part that shows something, with a rim; ``[1, *lattice]``, 1 where one does."""
    shape = images[0].shape[1:]
    coarse = [-(-n // 4) if n >= 16 else n for n in shape]
    shown = torch.stack([appearance(_resized(image, coarse)[0]).foreground for image in images]).any(0)[None].float()
    shown = (_blurred(shown, [0.7] * len(shape)) > 0.02).float()
    begin, size = [], []
    for axis, (n, m) in enumerate(zip(shape, coarse, strict=True)):
        places = shown[0].movedim(axis, 0).flatten(1).amax(1).nonzero().flatten()
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, m - 1)
        start = max(0, int((first - 1) * n / m))
        begin.append(start)
        size.append(min(n, int(-(-(last + 2) * n // m))) - start)
    return begin, size, _resized(shown, shape)


# --------------------------------------------------------------------------------------------------------------------
# one level
# --------------------------------------------------------------------------------------------------------------------


def _level(scene: _Scene, likeness: _Likeness, scale: int, iterations: int, shift: Tensor, smooth: float) -> Tensor:
    """Improve the map at one resolution.

    Args:
        scene: the images.
        likeness: how they are compared.
        scale: resolution, finest steps.
        iterations: how often.
        shift: the map, ``[D, *lattice]`` in coordinates of ``grid_sample``, axes in array order.
        smooth: length by which the map is smoothed after each step, mm.
    """
    dims, shape = scene.dims, [-(-n // scale) for n in scene.shape]
    lattice = shift.shape[1:]
    fixed, moving = (_described(_resized(image, shape), likeness) for image in scene.images)
    weight = scene.weight(_resized(shift, shape))
    voxel = [s * a / b for s, a, b in zip(scene.steps, scene.shape, shape, strict=True)]
    fluid = [likeness.fluid * min(voxel) / v for v in voxel]
    elastic = [smooth * m / (s * n) for s, n, m in zip(scene.steps, scene.shape, lattice, strict=True)]
    half = _column([0.5 * n for n in shape], shift)
    pairs = [(i, j) for i in range(dims) for j in range(i, dims)]
    equations = shift.new_empty(len(pairs) + dims, *shape)
    for number in range(iterations):
        equations.zero_()
        channels = slice(number % likeness.turns, None, likeness.turns)
        moved = _pulled(moving[channels].to(shift.dtype), _resized(shift, shape))
        for one, two in zip(fixed[channels].to(shift.dtype), moved, strict=True):
            gap, slopes = (one - two) * weight[0], _slopes(one + two)
            # what differs much has no counterpart there
            share = 1 / (1 + (gap / likeness.tolerance).square_())
            shared = [slope * share for slope in slopes]
            for equation, (i, j) in zip(equations, pairs, strict=False):
                equation.addcmul_(shared[i], slopes[j])
            for equation, slope in zip(equations[len(pairs) :], shared, strict=True):
                equation.addcmul_(slope, gap)
        smoothed = _resized(equations, lattice, fluid)
        step = _solved(smoothed[: len(pairs)], smoothed[len(pairs) :], pairs, likeness.ridge)
        step = step / step.norm(dim=0, keepdim=True).clamp(min=1.0) / half
        shift = _blurred(step + _pulled(shift, step), elastic)
    return shift if scale > 1 else _trusted(scene, likeness, fixed, moving, shift, _resized(shift, shape))


def _trusted(scene: _Scene, likeness: _Likeness, fixed: Tensor, moving: Tensor, shift: Tensor, whole: Tensor) -> Tensor:
    """The map, left out where it explains no more of the difference of the images than it would by chance.

    Interpolation smooths, and alone makes images more alike. So the map is compared with its opposite: to second order,
    the difference is what it explains four times.

    Args:
        scene: the images.
        likeness: how they are compared.
        fixed: what is compared, ``[C, *n]``.
        moving: likewise.
        shift: the map, ``[D, *lattice]``.
        whole: the map, ``[D, *n]``.
    """
    dims, channels = scene.dims, slice(None, None, likeness.turns)
    weight = torch.minimum(scene.weight(whole), scene.weight(-whole))
    gaps = []
    for way in (whole, -whole):
        moved = _pulled(moving[channels].to(shift.dtype), way)
        gap = (fixed[channels] - moved).square_().mean(0, keepdim=True) * weight
        gaps.append(_blurred(_resized(gap, shift.shape[1:]), [_REGION] * dims) + 1e-3 * gap.mean() + 1e-20)
    explained = (gaps[1] - gaps[0]) / (3 * gaps[0] + gaps[1])
    keep = (explained / likeness.chance[dims] - 1).clamp_(0, 1)
    return shift * _blurred(keep, [_REGION / 2] * dims)


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
    mean = _blurred(image, widths)
    variance = (_blurred(image.square(), widths) - mean.square()).clamp_(min=0)
    return (image - mean) / (variance + quiet * variance.mean()).clamp_(min=1e-20).sqrt_()


def _mind(image: Tensor) -> Tensor:
    """MIND-SSC (Heinrich et al. 2013) at every point, in half precision where that saves memory, ``[C, *n]``.

    Four consecutive channels of the twelve in 3D have one of every pair of axes each, so that every fourth has all.
    """
    dims = image.ndim - 1
    padded = F.pad(image[None], (1,) * (2 * dims), mode="replicate")[0, 0]

    def beside(axis: int, side: int) -> Tensor:
        found = padded
        for other, n in enumerate(image.shape[1:]):
            found = found.narrow(other, 1 + (side if other == axis else 0), n)
        return found

    channels = [
        _blurred((beside(a, s) - beside(b, t)).square_()[None], [0.8] * dims)
        for a, b in combinations(range(dims), 2)
        for s in (-1, 1)
        for t in (-1, 1)
    ]
    least = channels[0].clone()
    mean = torch.zeros_like(least)
    for channel in channels:
        torch.minimum(least, channel, out=least)
        mean.add_(channel, alpha=1 / len(channels))
    mean -= least
    usual = mean.mean()
    mean.clamp_(usual * 1e-3, usual * 1e3).clamp_(min=1e-20)
    half = torch.float16 if image.dtype == torch.float32 else image.dtype
    return torch.cat([channel.sub_(least).div_(mean).neg_().exp_().to(half) for channel in channels])


def _slopes(image: Tensor) -> list[Tensor]:
    """Twice the derivative of ``[*n]`` along each axis, per point, by central differences; 0 at the edge."""
    slopes = []
    for axis, n in enumerate(image.shape):
        slope = torch.zeros_like(image)
        if n > 2:
            inner = slope.narrow(axis, 1, n - 2)
            torch.sub(image.narrow(axis, 2, n - 2), image.narrow(axis, 0, n - 2), out=inner)
        slopes.append(slope)
    return slopes


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
        around = (_blurred(bad[None].to(shift), [1.5 + 0.1 * attempt] * dims) * 20).clamp_(max=1.0)
        shift = torch.lerp(shift, _blurred(shift, [1.0 + 0.1 * attempt] * dims), around)
    while bool((least_determinant(shift * half) < _LEAST).any()):
        # the identity at the latest
        shift = 0.8 * shift
    return shift


# --------------------------------------------------------------------------------------------------------------------
# separable smoothing and resizing
# --------------------------------------------------------------------------------------------------------------------


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))


def _along(values: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Multiply ``[C, *n]`` with a matrix ``[m, n]`` along each axis; None leaves it."""
    for axis, matrix in enumerate(matrices, start=1):
        if matrix is None:
            continue
        matrix = matrix.to(values)
        if axis == values.ndim - 1:
            values = values @ matrix.mT
        else:
            shape = values.shape
            flat = torch.matmul(matrix, values.reshape(*shape[: axis + 1], -1))
            values = flat.view(*shape[:axis], len(matrix), *shape[axis + 1 :])
    return values


def _blurred(values: Tensor, widths: Sequence[float]) -> Tensor:
    """``[C, *n]`` smoothed by a Gaussian of so many points along each axis."""
    return _along(values, [_kernel(n, n, round(w, 4)) for n, w in zip(values.shape[1:], widths, strict=True)])


def _resized(values: Tensor, shape: Sequence[int], widths: Sequence[float] | None = None) -> Tensor:
    """``[C, *n]`` on as many points over the same extent: averaged where there are fewer, interpolated where more.

    Args:
        values: what to resize.
        shape: number of points.
        widths: of a Gaussian that smooths it, in points of ``values``; None for none.
    """
    widths = [0.0] * len(shape) if widths is None else widths
    return _along(values, [_kernel(n, m, round(w, 4)) for n, m, w in zip(values.shape[1:], shape, widths, strict=True)])


@lru_cache(maxsize=256)
def _kernel(n: int, m: int, width: float) -> Tensor | None:
    """From ``n`` to ``m`` points, ``[m, n]``, rows that sum to 1; None where nothing changes."""
    factor = n / m
    at = (torch.arange(m, dtype=torch.float64) + 0.5) * factor - 0.5
    distance = at[:, None].clamp(0, n - 1) - torch.arange(n, dtype=torch.float64)
    if m > n and width == 0.0:
        kernel = (1 - distance.abs()).clamp(min=0)
    else:
        # as wide as the average over a point of the result
        variance = width**2 + max(0.0, factor**2 - 1) / 12
        if variance < 0.09:
            if m == n:
                return None
            variance = 0.09
        kernel = torch.exp(-0.5 * distance.square() / variance)
    return (kernel / kernel.sum(1, keepdim=True)).float()


@lru_cache(maxsize=8)
def _identity(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    axes = [(2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1).to(device, dtype)


def _pulled(values: Tensor, shift: Tensor) -> Tensor:
    """``[C, *n]`` looked up at every point of the lattice of ``shift``, plus ``shift``, ``[C, *lattice]``."""
    where = _identity(tuple(shift.shape[1:]), shift.dtype, shift.device) + shift.flip(0).movedim(0, -1)
    return F.grid_sample(values[None], where[None], padding_mode="border", align_corners=False)[0]
