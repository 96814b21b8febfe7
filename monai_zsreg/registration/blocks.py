# SPDX-License-Identifier: Apache-2.0
"""Both images of a pair sampled in blocks, and how to look the other image up at them."""

from __future__ import annotations

import math
from copy import copy
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_zsreg.geometry import apply_affine
from monai_zsreg.registration.descriptors import Descriptor
from monai_zsreg.registration.side import Frame, Level, Pair

# points of a start that the median of the differences is taken of, about
_MEDIAN_OF = 1000
# how far a header's columns may be from right angles, cosine, before they count as sheared
_UPRIGHT = 1e-5


class Blocks:
    """Cubic blocks of the fixed image and of the moving one, and their descriptors with gradients.

    Tensors have the images first: 0 the fixed image's blocks, looked up in the moving image, 1 the other way round, so
    that one set of operations does for both. Blocks lie along the columns of their own image: where a header shears
    them, descriptors along other axes would have slopes of which the other image shows little.

    Args:
        pair: the two images.
        describe: makes descriptors of patches.
        spacing: distance of lattice points, mm.
        size: inner points of a block along each axis.
        count: number of blocks in each image.
        seed: of the choice of blocks.
        within: ``[K, D+1, D+1]``, fixed frame to moving frame: choose blocks that one of them shows; None for any.
        robustness: a point whose squared difference is this many times the median counts a quarter.

    Attributes:
        step: distance of lattice points, frame units.
        features: ``[2, B, C, P]``, P the inner points of a block.
        gradient: ``[D, 2, B, C, P]``.
        coordinates: ``[2, D + 1, B * P]`` inner points, own frame, homogeneous.
        weight: ``[2, B * P]`` of the inner points.
        chance: mean clipped difference of the descriptors of places that do not belong together. What an image does
            not show counts as much: that it is not seen speaks neither for a transform nor against it.
    """

    def __init__(
        self,
        pair: Pair,
        describe: Descriptor,
        spacing: float,
        size: int = 8,
        count: int = 128,
        seed: int = 0,
        within: Tensor | None = None,
        robustness: float = 4.0,
    ) -> None:
        self.dims = pair.dims
        self.describe = describe
        self.size = size
        self.robustness = robustness
        self.step = spacing / pair.unit
        images = (pair.fixed.at(spacing), pair.moving.at(spacing))
        frames = (pair.fixed_frame, pair.moving_frame)
        weights = (pair.fixed.weight, pair.moving.weight)
        self._axes = torch.stack([f.columns(i.grid) for i, f in zip(images, frames, strict=True)])
        # rounding in headers is no shear
        self._sheared = bool((self._axes - torch.eye(self.dims)).abs().max() > _UPRIGHT)
        self._others = images[::-1]
        self._other_to_grid = torch.stack([f.to_grid(i.grid) for i, f in zip(images[::-1], frames[::-1], strict=True)])

        shown: list[Tensor | None] = [None, None]
        if within is not None:
            shown = list(self._other_to_grid[:, None] @ torch.stack([within, torch.linalg.inv(within)]))
        sides = zip(images, frames, self._axes, weights, shown, strict=True)
        chosen = [self._corners(*side, count, seed) for side in sides]
        # as many in one as in the other; those that fill up do not count
        most = max(len(part) for part in chosen)
        self._corner = torch.stack([F.pad(part, (0, 0, 0, most - len(part))) for part in chosen])
        counts = torch.stack([torch.arange(most, device=part.device) < len(part) for part in chosen])

        own = torch.stack([f.to_grid(i.grid) for i, f in zip(images, frames, strict=True)])
        margin = describe.margin + 1  # one more for the gradient
        maps = self._described(images, _placed(self._corner, self._lattice(margin), own), margin)
        features, slopes = self._sloped(maps)
        self.features = features.view(2, most, *features.shape[1:])
        self.gradient = torch.stack([slope.view(self.features.shape) for slope in slopes])
        self.tensor = _tensor(self.gradient)

        inner = self._lattice(0)
        own = torch.stack([f.to_grid(w.grid) for w, f in zip(weights, frames, strict=True)])
        where = _placed(self._corner, inner, own)
        seen = _looked_up(weights, where) * (where.abs() <= 1).all(-1).flatten(1)
        self.weight = (seen.view(2, most, -1) * counts[..., None]).flatten(1)
        self._total = self.weight.sum(1).clamp(min=1e-6)[:, None]
        self.chance = self._chance()
        places = (self._corner[:, :, None] + inner[:, None]).flatten(1, 2)
        self.coordinates = torch.cat([places.mT, torch.ones_like(places[:, None, :, 0])], dim=1)
        self.products = _products(self.coordinates, 1)

    def compare(self, pull: Tensor, around: int = 0) -> tuple[Tensor, Tensor]:
        """The other images at the blocks.

        Args:
            pull: ``[2, K, D+1, D+1]``, own frame to other frame.
            around: further lattice points on each side of a block.

        Returns:
            Their descriptors ``[2, K, B, C, *n]`` with ``n = size + 2 around``; and the weight of the inner points
            ``[2, K, B * P]``, 0 outside the other's field of view.
        """
        margin = self.describe.margin + around
        to_grid = self._other_to_grid[:, None] @ pull
        where = _placed(self._corner[:, None], self._lattice(margin)[:, None], to_grid)
        maps = self._described(self._others, where, margin)
        maps = maps.view(2, pull.shape[1], -1, *maps.shape[1:])
        inner = to_grid[..., :-1, :].to(self.coordinates) @ self.coordinates[:, None]
        return maps, self.weight[:, None] * (inner.abs_().amax(2) <= 1)

    def equations(self, pull: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gauss-Newton's equations for a change of the own frame's points, summed over all blocks.

        Args:
            pull: ``[2, K, D+1, D+1]``, own frame to other frame.

        Returns:
            Normal matrix ``[2, K, D(D+1), D(D+1)]`` and right-hand side ``[2, K, D(D+1)]``; mean clipped difference of
            the descriptors, ``[2, K]``. All float64 on the CPU.
        """
        k, dims = pull.shape[1], self.dims
        features, weight = self.compare(pull)
        residual = self.features[:, None] - features.flatten(4)
        square = residual.square().mean(3).flatten(2)
        square_or_worst = square.clamp(max=self.describe.worst)
        cost = ((square_or_worst - self.chance) * weight).sum(2) / self._total + self.chance
        weight = self.trusted(weight, square)
        force = torch.stack([(slope[:, None] * residual).sum(3).flatten(2) for slope in self.gradient], dim=2)
        moments = (self.tensor[:, None] * weight[:, :, None]).flatten(1, 2) @ self.products.mT
        right = (force * weight[:, :, None]).flatten(1, 2) @ self.coordinates.mT
        # the unique entries over the whole matrix
        index = square_index(dims, pull.device)
        full = self.spread(moments.view(2, k, -1, moments.shape[-1])[..., index, :])
        parts = (full, right.view(2, k, dims * (dims + 1)), cost)
        full, right, cost = (part.cpu().double() for part in parts)
        return full, right, cost

    def differences(self, pull: Tensor) -> tuple[Tensor, Tensor]:
        """How much each block differs from the other image, for comparing transforms on the same points.

        Args:
            pull: ``[2, K, D+1, D+1]``, own frame to other frame.

        Returns:
            Summed clipped difference of the descriptors, ``[K, 2 B]``, where what the other image does not show counts
            as unrelated; weight of the blocks, ``[2 B]``. Both float64 on the CPU.
        """
        features, weight = self.compare(pull)
        count = features.shape[2]
        square = (self.features[:, None] - features.flatten(4)).square().mean(3).flatten(2)
        lost = (square.clamp(max=self.describe.worst) - self.chance) * weight + self.chance * self.weight[:, None]
        blocks = lost.unflatten(2, (count, -1)).sum(3).transpose(0, 1).flatten(1)
        return blocks.cpu().double(), self.weight.unflatten(1, (count, -1)).sum(2).flatten().cpu().double()

    def correlation(self, pull: Tensor) -> float:
        """Of the descriptors with those of the other image, at ``pull [2, D+1, D+1]``, own frame to other frame."""
        features, weight = self.compare(pull[:, None])
        one, two = self.features, features.flatten(4)[:, 0]
        weight = weight.view(2, one.shape[1], 1, -1)
        common, *own = (float((a * b * weight).sum()) for a, b in ((one, two), (one, one), (two, two)))
        return common / max((own[0] * own[1]) ** 0.5, 1e-20)

    def other_slopes(self, pull: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals and slopes of the other images at the blocks.

        Args:
            pull: ``[2, D+1, D+1]``, own frame to other frame.

        Returns:
            Residual ``[2, B, C, P]``; slopes ``[D, 2, B, C, P]``; trusted weight ``[2, B * P]``.
        """
        maps, weight = self.compare(pull[:, None], 1)
        features, slopes = self._sloped(maps[:, 0].flatten(0, 1))
        residual = self.features - features.view(self.features.shape)
        weight = self.trusted(weight, residual.square().mean(2).flatten(1)[:, None])[:, 0]
        return residual, torch.stack([slope.view(self.features.shape) for slope in slopes]), weight

    def half(self) -> Blocks:
        """Every second block, for what compares but does not solve."""
        count, part = self.features.shape[1], copy(self)
        part._corner, part.features = self._corner[:, ::2], self.features[:, ::2]
        part.weight = self.weight.unflatten(1, (count, -1))[:, ::2].flatten(1)
        part.coordinates = self.coordinates.unflatten(2, (count, -1))[:, :, ::2].flatten(2)
        return part

    def apart(self) -> Tensor:
        """Distance of the blocks of each image along each column, block widths, ``[2, B, B, D]`` float64 on the CPU."""
        places = self._corner.cpu().double() @ torch.linalg.inv(self._axes).mT / (self.size * self.step)
        return (places[:, :, None] - places[:, None]).abs()

    def _chance(self) -> float:
        weight = self.weight.unflatten(1, (self.features.shape[1], -1))
        total = count = 0.0
        for shift in (1, 3, 7):
            square = (self.features[0] - self.features[1].roll(shift, 0)).square().mean(1)
            both = weight[0] * weight[1].roll(shift, 0)
            total += float((square.clamp(max=self.describe.worst) * both).sum())
            count += float(both.sum())
        return total / count if count > 0 else self.describe.worst

    def trusted(self, weight: Tensor, square: Tensor) -> Tensor:
        """Less weight for points that disagree more than others: Geman and McClure's function."""
        # the median over a part of the points is as good; an odd step meets all columns of the blocks
        thin = (square.shape[2] // _MEDIAN_OF) | 1
        flat = torch.where(weight[..., ::thin] > 0, square[..., ::thin], torch.nan)
        median = flat.nanmedian(-1, keepdim=True).values.nan_to_num(1.0).clamp(min=1e-6)
        return weight / (1 + square / (self.robustness * median)).square_()

    def spread(self, moments: Tensor) -> Tensor:
        """``[..., D, D, products of coordinates]`` to ``[..., D(D+1), D(D+1)]``."""
        full = moments[..., square_index(self.dims + 1, moments.device)]  # [..., i, j, e, f]
        size = self.dims * (self.dims + 1)
        return full.transpose(-3, -2).reshape(*full.shape[:-4], size, size)

    def _described(self, images: tuple[Level, Level], where: Tensor, margin: int) -> Tensor:
        return self.describe(_looked_up(images, where).view(-1, *[self.size + 2 * margin] * self.dims))

    def _sloped(self, maps: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Maps ``[2 B, C, *n]`` without their outermost points, ``[2 B, C, P]``, and their slopes there, own frame."""

        def crop(values: Tensor, axes: list[int]) -> Tensor:
            for axis in axes:
                values = values.narrow(axis + 2, 1, maps.shape[axis + 2] - 2)
            return values

        slopes = []
        for axis in range(self.dims):
            part = crop(maps, [other for other in range(self.dims) if other != axis])
            n = maps.shape[axis + 2] - 2
            change = part.narrow(axis + 2, 2, n) - part.narrow(axis + 2, 0, n)
            slopes.append(change.flatten(2) * (0.5 / self.step))
        if self._sheared:
            back = torch.linalg.inv(self._axes).to(maps).repeat_interleave(len(maps) // 2, dim=0)
            slopes = list(torch.einsum("qji,jqcp->iqcp", back, torch.stack(slopes)))
        return crop(maps, list(range(self.dims))).flatten(2), slopes

    def _corners(
        self, own: Level, frame: Frame, columns: Tensor, weight: Level, shown: Tensor | None, count: int, seed: int
    ) -> Tensor:
        """First inner points of the blocks, ``[B, D]`` in the own frame.

        The blocks stand side by side over the field of view, each shifted by a random part of a step, so that their
        points fall between the voxels as those of the other image do, and not everywhere alike where the grids lie
        alike: what interpolation does then pulls at all of them in one direction. Where there are more than needed, a
        random choice of those that show foreground and that the other image shows at one of the places ``shown [K, D+1,
        D+1]``, own frame to the other's grid.
        """
        dims, device = self.dims, own.values.device
        generator = torch.Generator().manual_seed(seed)
        width = self.size * self.step
        sides = [m * s / frame.unit for m, s in zip(own.grid.shape, own.grid.spacing, strict=True)]
        cells = [max(1, int(-(-side // width))) for side in sides]
        axes = [(torch.arange(c) - c / 2) * width for c in cells]
        along = columns.to(own.values.dtype).mT
        middle = apply_affine(torch.linalg.inv(frame.to_world), own.grid.center[None])
        jitter = torch.rand(math.prod(cells), dims, generator=generator)
        corners = (torch.cartesian_prod(*axes).view(-1, dims) + (jitter + 0.5) * self.step).to(along) @ along
        corners = (corners + middle.to(along)).to(device)
        # how much of the block is foreground, from a few points of it
        probe = torch.cartesian_prod(*[torch.tensor([1 / 4, 3 / 4]) * width] * dims).to(along) @ along
        probe = probe.to(device)
        inside = weight.sample(_placed(corners[None], probe, frame.to_grid(weight.grid)[None]).flatten(0, 2))
        inside = inside.view(len(corners), len(probe)).mean(-1)
        inside = torch.where(inside > 0.1, inside, torch.zeros_like(inside))
        if shown is not None:
            there = _placed(corners.expand(len(shown), -1, -1), probe, shown).abs().amax(-1) <= 1
            there = inside * there.to(inside).mean(-1).amax(0)
            inside = there if bool((there > 0).any()) else inside
        wanted = min(count, max(1, int((inside > 0).sum())))
        # weighted choice without replacement (Efraimidis and Spirakis 2006)
        draw = torch.rand(len(corners), generator=generator).clamp(min=1e-6).to(device)
        key = torch.where(inside > 0, draw.log() / inside.clamp(min=1e-6), torch.full_like(inside, -torch.inf))
        chosen = key.topk(wanted).indices.sort().values
        return corners[chosen[inside[chosen] > 0]] if bool((inside > 0).any()) else corners[chosen]

    def _lattice(self, around: int) -> Tensor:
        """From a block's first inner point to its points, and ``around`` of them on each side, ``[2, L, D]``."""
        ticks = _ticks(self.size, around, self.dims, self._corner.dtype, self._corner.device)
        return (ticks * self.step) @ self._axes.to(ticks).mT


@lru_cache(maxsize=64)
def _ticks(size: int, around: int, dims: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    ticks = torch.arange(-around, size + around, dtype=dtype, device=device)
    return torch.cartesian_prod(*[ticks] * dims)


@lru_cache(maxsize=16)
def square_index(dims: int, device: torch.device) -> Tensor:
    """Position of entry (i, j) of a symmetric matrix among its upper triangle's, ``[dims, dims]``."""
    index = torch.zeros(dims, dims, dtype=torch.long, device=device)
    rows, columns = torch.triu_indices(dims, dims, device=device)
    number = torch.arange(len(rows), device=device)
    index[rows, columns] = number
    index[columns, rows] = number
    return index


def _products(values: Tensor, axis: int) -> Tensor:
    """Products of all pairs of entries along an axis, as the upper triangle's rows name them."""
    parts = values.unbind(axis)
    return torch.stack([parts[i] * parts[j] for i in range(len(parts)) for j in range(i, len(parts))], dim=axis)


def _tensor(gradient: Tensor) -> Tensor:
    """Products of slopes ``[D, 2, B, C, P]`` along two axes, summed over the channels, ``[2, D(D + 1) / 2, B * P]``."""
    return _products(gradient, 0).sum(3).flatten(2).transpose(0, 1)


def _placed(corners: Tensor, lattice: Tensor, to_grid: Tensor) -> Tensor:
    """Where a matrix takes the points of blocks.

    Args:
        corners: ``[..., B, D]``.
        lattice: ``[..., L, D]``, the same for all blocks.
        to_grid: ``[..., D+1, D+1]``.

    Returns:
        ``[..., B, L, D]``, the type of ``corners``.
    """
    matrix = to_grid.to(corners)
    linear = matrix[..., :-1, :-1].mT
    begin = corners @ linear + matrix[..., None, :-1, -1]
    lanes = (lattice @ linear).flatten(-2)
    # begin + lattice as one product: a sum that broadcasts over rows of two or three numbers takes four times as long
    flat = begin.flatten(0, -3)
    repeat = _repeat(corners.shape[-1], lattice.shape[-2], corners.dtype, corners.device).expand(len(flat), -1, -1)
    return torch.baddbmm(lanes.view(len(flat), 1, -1), flat, repeat).view(*begin.shape[:-1], *lattice.shape[-2:])


@lru_cache(maxsize=64)
def _repeat(dims: int, times: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(dims, dtype=dtype, device=device).repeat(1, times)


def _looked_up(images: tuple[Level, Level], where: Tensor) -> Tensor:
    """Values of each image at its half of the points ``[2, ..., D]``, ``[2, S]``."""
    return torch.stack([image.sample(part.flatten(0, -2)) for image, part in zip(images, where, strict=True)])
