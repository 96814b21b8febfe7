# SPDX-License-Identifier: Apache-2.0
"""An image onto a grid through a transform.

The result is filled block by block. The part of the image that a block needs is cut out, with a rim of the fill value
where it reaches past the edge, and interpolated by index arithmetic. Coordinates count from the corner of that part:
they stay small, so single precision holds them to 1e-5 voxels however large the image is, and beyond the result no
more memory is needed than for one block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from monai_zsreg.errors import require
from monai_zsreg.foreground import all_finite, background_value
from monai_zsreg.geometry import Grid

#: interpolations, and how many voxels before and after the one at or below a point they use along each axis
MODES = {"nearest": (0, 1), "bilinear": (0, 1), "bicubic": (1, 2)}

# voxels of a block: what fits a core's cache; a GPU wants fewer and larger calls
_BLOCK_ON_CPU, _BLOCK_ON_GPU = 2**17, 2**20
# bytes, above those of a block and its temporaries
_FREED = 2**24
# voxels along an axis that tell what the background is
_ENOUGH = 64
# values of these types need double precision
_WIDE = (torch.float64, torch.int64, torch.int32, torch.uint64, torch.uint32)
# nearest neighbors are moved as whole numbers of their size, so that any value of any type arrives as it was
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def resample(
    values: Tensor,
    source: Grid,
    target: Grid,
    transform: Tensor | np.ndarray | None = None,
    mode: str = "bilinear",
    fill: float | None = None,
    dtype: torch.dtype | None = None,
    shifts: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Put an image on another grid.

    Voxels that are not finite count as not seen. An interpolated voxel is the weighted mean of the seen ones around
    it, and NaN where these have less than half of the weight; nearest neighbors are handed on as they are.

    Args:
        values: ``[C, *spatial]``, any real type, on any device.
        source: lattice of ``values``.
        target: lattice of the result.
        transform: ``(D+1, D+1)``, world of ``target`` to world of ``source``, RAS mm; None for the identity.
        mode: ``"bilinear"`` (in 3D trilinear), ``"nearest"`` (labels: an exact lookup), or ``"bicubic"``.
        fill: value outside. Interpolation changes over to it within one voxel of the outermost voxel centers. None:
            the background of each channel; for nearest neighbors 0, unless the channel has negative values.
        dtype: of the result, that of ``values`` if None. Whole-number types get rounded and clipped values.
        shifts: what is added to where ``transform`` leads: from indices ``[N, D]`` of ``target`` (float64, CPU) to
            shifts ``[N, D]`` along the axes of ``source``, voxels; None for none.

    Returns:
        ``[C, *target.shape]`` on the device of ``values``, without gradients.

    Raises:
        RegistrationError: an unknown mode, values that are complex or do not lie on ``source``, or a fill value that
            the type of the result cannot hold.
    """
    values = values.as_subclass(Tensor)
    dtype = dtype or values.dtype
    require(mode in MODES, "mode", mode, f"one of {', '.join(MODES)}")
    fits = not values.is_complex() and tuple(values.shape[1:]) == source.shape
    require(fits, "values", f"{values.dtype} {tuple(values.shape)}", f"real numbers [C, *{source.shape}]")
    fills = [outside_value(channel, mode, dtype) if fill is None else _checked(fill, dtype) for channel in values]
    holes = [
        not (math.isfinite(outside) and all_finite(channel)) for channel, outside in zip(values, fills, strict=True)
    ]
    world = torch.eye(source.dims + 1) if transform is None else torch.as_tensor(transform)
    pull = target.index_pull(world.to("cpu", torch.float64), source).numpy()
    if values.is_cpu:
        # glibc hands freed memory back to the system, to be faulted in again block by block (which took as long as all
        # the rest), unless a larger piece was freed before
        torch.empty(_FREED, dtype=torch.uint8)
    result = torch.empty((len(values), *target.shape), dtype=dtype, device=values.device)
    for block in _blocks(target.shape, pull, _BLOCK_ON_CPU if values.is_cpu else _BLOCK_ON_GPU):
        part, points = _locate(block, pull, source.shape, *MODES[mode], shifts)
        points = [[step.to(values.device, torch.float32) for step in axis] for axis in points]
        for out, channel, outside, hole in zip(result, values, fills, holes, strict=True):
            if part is None:
                out[block] = outside
                continue
            if mode == "nearest":
                out[block] = _settled(_look_up(_cut(channel, part, outside), points), dtype)
                continue
            cut = _cut(channel, part, outside, torch.float64 if channel.dtype in _WIDE else torch.float32)
            low, high = cut.aminmax()
            if not hole and bool(low == high):  # as much of most medical images is
                out[block] = _settled(low, dtype)
            else:
                out[block] = _settled(_interpolate(cut, points, mode, hole), dtype)
    return result


def outside_value(channel: Tensor, mode: str, dtype: torch.dtype | None = None) -> float:
    """What stands for "outside" of ``[*spatial]`` where nobody says it: the background of an image, and 0 for labels,
    as which counts what is looked up (``"nearest"``) unless it has negative values. ``dtype`` must be able to hold
    it."""
    if channel.numel() == 0 or (mode == "nearest" and not (channel.dtype.is_signed and bool(channel.min() < 0))):
        return 0.0
    for axis, n in enumerate(channel.shape):
        if n > _ENOUGH:
            keep = torch.linspace(0, n - 1, _ENOUGH, device=channel.device).round().long()
            channel = channel.index_select(axis, keep)
    value = torch.tensor(background_value(channel), dtype=torch.float64)
    return float(_settled(value, dtype or channel.dtype))


# ----------------------------------------------------------------------------------------------------- where to look


def _blocks(shape: Sequence[int], pull: np.ndarray, voxels: int) -> Iterator[tuple[slice, ...]]:
    """Cover a grid with blocks of at most so many voxels, both of the grid and of the image that they look at."""
    dims = len(shape)
    side = voxels ** (1 / dims)
    steps = np.linalg.norm(pull[:dims, :dims], axis=0)
    sides = [max(1, min(n, int(side / max(1.0, step)))) for n, step in zip(shape, steps, strict=True)]
    starts = itertools.product(*[range(0, n, s) for n, s in zip(shape, sides, strict=True)])
    for start in starts:
        yield tuple(slice(a, min(a + s, n)) for a, s, n in zip(start, sides, shape, strict=True))


def _locate(
    block: tuple[slice, ...],
    pull: np.ndarray,
    shape: Sequence[int],
    before: int,
    after: int,
    shifts: Callable[[Tensor], Tensor] | None,
) -> tuple[list[tuple[int, int]] | None, list[list[Tensor]]]:
    """Where a block lies in the image.

    Returns:
        First and past-the-last voxel along each axis of the image that the block needs, up to a rim outside of the
        image; None where it needs nothing but the fill value. For each axis of the image, what the axes of the block
        contribute to the coordinate, counted from the first voxel, and the shifts: tensors that broadcast to the block.
    """
    dims = len(shape)
    corner = pull[:dims, :dims] @ [s.start for s in block] + pull[:dims, dims]
    part, points = [], []
    bent = None
    if shifts is not None:
        index = torch.cartesian_prod(*[torch.arange(s.start, s.stop, dtype=torch.float64) for s in block])
        bent = shifts(index.view(-1, dims)).mT.reshape(dims, *[s.stop - s.start for s in block])
    for axis in range(dims):
        steps = [pull[axis, i] * np.arange(s.stop - s.start) for i, s in enumerate(block)]
        ends = [(step[0], step[-1]) for step in steps]
        low, high = (corner[axis] + sum(map(end, ends)) for end in (min, max))
        if bent is not None:
            low, high = (end + float(shift) for end, shift in zip((low, high), bent[axis].aminmax(), strict=True))
        if high <= -after or low >= shape[axis] + before:
            return None, []
        first = max(int(np.floor(low)), -after) - before
        # one more, for a point that rounding or the clamp below puts on the next whole number
        last = min(int(np.floor(high)), shape[axis] - 1 + before) + after + 1
        steps[0] += corner[axis] - first
        part.append((first, last + 1))
        lying = [[-1 if i == j else 1 for j in range(dims)] for i in range(dims)]
        points.append([torch.from_numpy(step).reshape(*along) for step, along in zip(steps, lying, strict=True)])
        points[-1] += [] if bent is None else [bent[axis]]
    return part, points


def _cut(channel: Tensor, part: list[tuple[int, int]], outside: float, dtype: torch.dtype | None = None) -> Tensor:
    """A part of an image, with the fill value where it reaches out of the image."""
    inside = [(max(first, 0), min(last, n)) for (first, last), n in zip(part, channel.shape, strict=True)]
    seen = channel[tuple(slice(*ends) for ends in inside)]
    if inside == part:
        return seen.to(dtype or channel.dtype)
    size = [last - first for first, last in part]
    cut = torch.full(size, outside, dtype=dtype or channel.dtype, device=channel.device)
    cut[tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(inside, part, strict=True))] = seen
    return cut


# ----------------------------------------------------------------------------------------------------- what is there


def _look_up(cut: Tensor, points: list[list[Tensor]]) -> Tensor:
    nearest = [reduce(torch.add, steps).round_().clamp_(0, n - 1) for steps, n in zip(points, cut.shape, strict=True)]
    flat, index = _flat(cut.view(_BITS[cut.element_size()]), nearest)
    return flat.index_select(0, index.flatten()).view(cut.dtype).view(index.shape)


def _flat(cut: Tensor, points: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The memory that a part of an image lies in, and where in it the voxels at or below some points are."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(cut.shape, cut.stride(), strict=True))
    whole = torch.int32 if span < 2**31 else torch.int64
    index = torch.zeros((), dtype=whole, device=cut.device)
    for point, stride in zip(points, cut.stride(), strict=True):
        index = torch.add(index, point.to(whole), alpha=stride)
    return cut.as_strided((span,), (1,)), index


def _interpolate(cut: Tensor, points: list[list[Tensor]], mode: str, hole: bool) -> Tensor:
    before, after = MODES[mode]
    where = [reduce(torch.add, steps).clamp_(before, n - 1 - after) for steps, n in zip(points, cut.shape, strict=True)]
    seen = cut.isfinite() if hole else None
    cut = cut if seen is None else torch.where(seen, cut, 0.0).contiguous()
    flat, index = _flat(cut, where)
    shape, index = index.shape, index.flatten()
    if before:
        index -= before * sum(cut.stride())
    weights = [point.frac_().flatten().to(cut.dtype) for point in where]
    blend = _bilinear if mode == "bilinear" else _bicubic
    mean = blend(flat, index, cut.stride(), weights)
    if seen is not None:
        share = blend(seen.to(cut.dtype).flatten(), index, cut.stride(), weights)
        mean = torch.where(share >= 0.5, mean / share, torch.nan)
    return mean.view(shape)


def _bilinear(flat: Tensor, index: Tensor, strides: Sequence[int], weights: list[Tensor]) -> Tensor:
    """Interpolate along the first axis between what the others give: ``index`` is where all of them begin."""
    if not strides:
        return flat.index_select(0, index)
    low, high = (_bilinear(flat[shift:], index, strides[1:], weights[1:]) for shift in (0, strides[0]))
    return torch.lerp(low, high, weights[0])


def _bicubic(flat: Tensor, index: Tensor, strides: Sequence[int], weights: list[Tensor]) -> Tensor:
    """The same with Keys' kernel, a = -0.75 as in ``grid_sample``."""
    if not strides:
        return flat.index_select(0, index)
    distances = [weights[0] + 1, weights[0], 1 - weights[0], 2 - weights[0]]
    total = torch.zeros_like(weights[0])
    for tap, t in enumerate(distances):
        near = (1.25 * t - 2.25) * t * t + 1
        far = ((-0.75 * t + 3.75) * t - 6) * t + 3
        kernel = near if tap in (1, 2) else far
        total += kernel * _bicubic(flat[tap * strides[0] :], index, strides[1:], weights[1:])
    return total


# --------------------------------------------------------------------------------------------- types and fill values


def _range(dtype: torch.dtype) -> tuple[int, int]:
    if dtype == torch.bool:
        return 0, 1
    # the largest double that a 64-bit integer holds
    return torch.iinfo(dtype).min, min(torch.iinfo(dtype).max, 2**63 - 2**10)


def _settled(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in the type of the result."""
    if values.dtype == dtype:
        return values
    if values.is_floating_point() and not dtype.is_floating_point:
        values = values.round().clamp_(*_range(dtype))
    return values.to(dtype)


def _checked(fill: float, dtype: torch.dtype) -> float:
    if not dtype.is_floating_point:
        low, high = _range(dtype)
        fits = low <= fill <= high and float(fill).is_integer()
        require(fits, "fill_value", fill, f"a whole number from {low} to {high}, for an image of {dtype}")
    return float(fill)
