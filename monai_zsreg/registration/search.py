# SPDX-License-Identifier: Apache-2.0
"""The coarse stage: where, at any rotation, do two images share the most information?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from monai_zsreg.geometry import apply_affine
from monai_zsreg.registration.pyramid import Frame, Level

__all__ = ["Candidates", "PoseSearch", "even_rotations", "rotation_matrices"]

_BINS = 16
# part of the samples that must fall into the moving image before the rest is forgiven
_ENOUGH = 0.6
# samples that are looked up at once: what fits a processor's cache; a GPU has room
_CHUNK = (300_000, 16_000_000)


def even_rotations(count: int, dims: int) -> Tensor:
    """Rotations spread evenly, ``[count, D, D]`` float64: equal angles in 2D, a super-Fibonacci spiral in 3D.

    The spiral is Alexa's (CVPR 2022). The identity is the first in 2D; in 3D none is.
    """
    i = torch.arange(count, dtype=torch.float64)
    if dims == 2:
        return rotation_matrices((2 * math.pi / count * i)[:, None])
    s = i + 0.5
    phi, psi = math.sqrt(2.0), 1.533751168755204288118041
    alpha, beta = 2 * math.pi * s / phi, 2 * math.pi * s / psi
    inner, outer = (s / count).sqrt(), (1 - s / count).sqrt()
    return _from_quaternions(
        torch.stack([inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin(), outer * beta.cos()], dim=-1)
    )


def _from_quaternions(q: Tensor) -> Tensor:
    x, y, z, w = q.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def rotation_matrices(vectors: Tensor) -> Tensor:
    """Rotation vectors (angle in 2D ``[..., 1]``, axis times angle in 3D ``[..., 3]``) to matrices ``[..., D, D]``."""
    if vectors.shape[-1] == 1:
        cos, sin = vectors[..., 0].cos(), vectors[..., 0].sin()
        return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [[zero, -z, y], [z, zero, -x], [-y, x, zero]]
    return torch.matrix_exp(torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2))


@dataclass
class Candidates:
    """
    Attributes:
        transform: ``[N, K, D+1, D+1]`` float64, fixed frame to moving frame, best first.
        score: ``[N, K]`` normalized mutual information, 1 to 2.
    """

    transform: Tensor
    score: Tensor


class PoseSearch:
    """Scores rotations about the objects' middles by normalized mutual information, and improves the best by trial.

    Intensities are sampled at points of the fixed image's foreground and a rim around it, sorted into sixteen bins of
    equal count (one of them background), and counted for all candidates at once.

    Args:
        scaled: whether trials change the scale too.
        reach: ``"global"``, all rotations; ``"local"``, only trials around the start.
        rotations: number of rotations of the global search.
        points: number of samples.
        keep: number of candidates that are improved.
        trials: number of trials for each of them in a round.
        results: number of candidates to give back, apart from each other.
    """

    def __init__(
        self,
        scaled: bool = True,
        reach: str = "global",
        rotations: int = 4000,
        points: int = 2500,
        keep: int = 24,
        trials: int = 24,
        results: int = 4,
    ) -> None:
        self.scaled = scaled
        self.reach = reach
        self.rotations = rotations
        self.points = points
        self.keep = keep
        self.trials = trials
        self.results = results

    def __call__(
        self,
        start: Tensor,
        fixed: Level,
        moving: Level,
        fixed_frame: Frame,
        moving_frame: Frame,
        fixed_mask: Tensor,
        moving_mask: Tensor,
        ratio: Tensor,
        seed: int,
    ) -> Candidates:
        """
        Args:
            start: ``[N, D+1, D+1]`` float64, fixed frame to moving frame: rotations multiply its own.
            fixed: coarse images.
            moving: coarse images.
            fixed_frame: of the fixed images.
            moving_frame: of the moving images.
            fixed_mask: foreground, ``[N, 1, *spatial]`` bool.
            moving_mask: likewise.
            ratio: ``[N]`` size of the moving object over that of the fixed one, a second guess at the scale.
            seed: of all draws.
        """
        n, dims = len(start), fixed.grid.dims
        generator = torch.Generator().manual_seed(seed)
        points, bins = self._samples(fixed, fixed_frame, fixed_mask, generator)
        volume = _framed(_equal_bins(moving.values, moving_mask))
        to_index = torch.linalg.inv(moving.grid.affine) @ moving_frame.to_world

        def score(transforms: Tensor) -> Tensor:
            return self._score(transforms, points, bins, volume, to_index)

        if self.reach == "global":
            turns = even_rotations(self.rotations, dims)
            candidates = _turned(start[:, None], turns[None])
        else:
            candidates = start[:, None]
        if self.scaled and self.reach == "global" and bool((ratio.log().abs() > 0.06).any()):
            other = candidates.clone()
            other[..., :dims, :dims] *= ratio[:, None, None, None]
            candidates = torch.cat([candidates, other], 1)
        kept, values = _apart(candidates, score(candidates), self.keep)

        spread = 1.0 if self.reach == "global" else 2.0
        for number, (angle, shift, scale) in enumerate(_ROUNDS):
            k = kept.shape[1]
            draw = torch.randn(k, self.trials, 2 * dims + 1, generator=generator, dtype=torch.float64)
            vectors = draw[..., : 1 if dims == 2 else 3] * math.radians(angle) * spread
            motion = torch.eye(dims + 1, dtype=torch.float64).repeat(k, self.trials, 1, 1)
            grow = (draw[..., -1] * (scale if self.scaled else 0.0)).exp()
            motion[..., :dims, :dims] = rotation_matrices(vectors) * grow[..., None, None]
            motion[..., :dims, dims] = draw[..., -1 - dims : -1] * shift * spread
            tried = kept[:, :, None] @ motion
            got = score(tried.flatten(1, 2)).view(n, k, self.trials)
            top = got.max(-1)
            pick = torch.gather(tried, 2, top.indices[..., None, None, None].expand(-1, -1, 1, dims + 1, dims + 1))
            better = top.values > values
            kept = torch.where(better[..., None, None], pick[:, :, 0], kept)
            values = torch.where(better, top.values, values)
            if number == 1:
                kept, values = _apart(kept, values, max(self.results, self.keep // 3))
        return Candidates(*_apart(kept, values, self.results))

    def _samples(self, level: Level, frame: Frame, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points ``[N, S, D]`` in the fixed frame, and the bins ``[N, S]`` of the fixed image there."""
        dims = level.grid.dims
        widen = F.max_pool2d if dims == 2 else F.max_pool3d
        near = widen(mask.float(), 5 if dims == 2 else 3, 1, 2 if dims == 2 else 1).flatten(1)
        below = near.cumsum(1)
        u = (torch.arange(self.points) + torch.rand(self.points, generator=generator)) / self.points
        place = torch.searchsorted(below, u.to(below) * below[:, -1:], right=True).clamp(max=near.shape[1] - 1)
        bins = torch.gather(_equal_bins(level.values, mask).flatten(1), 1, place)
        strides = torch.tensor([math.prod(level.grid.shape[i + 1 :]) for i in range(dims)], device=place.device)
        sides = torch.tensor(level.grid.shape, device=place.device)
        index = (place[..., None] // strides) % sides
        to_frame = torch.linalg.inv(frame.to_world) @ level.grid.affine
        return apply_affine(to_frame.to(place.device), index.double()).float(), bins

    def _score(self, transforms: Tensor, points: Tensor, bins: Tensor, volume: Tensor, to_index: Tensor) -> Tensor:
        """Scores ``[N, K]`` of transforms ``[N, K, D+1, D+1]``; ``volume`` as `_framed` makes it."""
        n, dims = len(transforms), points.shape[-1]
        device = points.device
        matrices = (to_index[:, None] @ transforms)[..., :dims, :]
        # by the frame's width, and half a voxel so that cutting off decimals rounds
        matrices[..., -1] += 1.5
        matrices = matrices.to(device, torch.float32)
        count = points.shape[1]
        sides = volume.shape[2:]
        begin = torch.arange(n, device=device, dtype=torch.int32)[:, None, None] * math.prod(sides)
        # one product for all candidates: coordinates [N, K D, S], a row an axis
        columns = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1).mT.contiguous()
        cells = _BINS * (_BINS + 1)
        rows = (bins * (_BINS + 1)).int()[:, None]
        # counts are whole numbers: looking n log n up is quicker than computing it
        known = torch.arange(count + 1, dtype=torch.float32, device=device)
        known = torch.xlogy(known, known)
        results = []
        for part in matrices.split(max(1, _CHUNK[device.type == "cuda"] // (n * count)), dim=1):
            where = (part.flatten(1, 2) @ columns).view(n, -1, dims, count)
            for axis, side in enumerate(sides):
                where[:, :, axis].clamp_(0.0, side - 0.5)
            index = where.int()
            place = index[:, :, 0]
            for axis in range(1, dims):
                place = place.mul_(sides[axis]).add_(index[:, :, axis])
            if n > 1:
                place = place + begin
            groups = n * part.shape[1]
            joint = volume.view(-1).index_select(0, place.flatten()).view(n, -1, count)
            first = torch.arange(0, groups * cells, cells, device=device, dtype=torch.int32).view(n, -1, 1)
            joint.add_(rows).add_(first)
            table = torch.bincount(joint.flatten(), minlength=groups * cells).view(n, -1, _BINS, _BINS + 1)
            # what the moving image does not show says nothing
            table = table[..., :_BINS]
            seen = table.sum((2, 3))
            both = _entropy(table.flatten(2), seen, known).clamp(min=1e-3)
            gain = (_entropy(table.sum(-1), seen, known) + _entropy(table.sum(-2), seen, known)) / both - 1
            # a few points agree by chance
            results.append(1 + gain * (seen / (_ENOUGH * count)).clamp(max=1))
        return torch.cat(results, 1).cpu().double()


# widths of the trials of each round: rotation (degrees), shift (object radii), scale (logarithm)
_ROUNDS = (
    (9.0, 0.22, 0.08),
    (7.0, 0.12, 0.06),
    (5.0, 0.07, 0.05),
    (3.0, 0.04, 0.03),
    (2.0, 0.03, 0.02),
)


def _framed(bins: Tensor) -> Tensor:
    """Bins as int32 with a border one voxel wide, in a bin of its own, for all that lies outside."""
    return F.pad(bins, [1, 1] * (bins.ndim - 2), value=_BINS).int()


def _entropy(counts: Tensor, total: Tensor, known: Tensor) -> Tensor:
    """Of counts ``[N, K, B]`` that add up to ``total [N, K]``; ``known[n]`` is n log n."""
    total = total.clamp(min=1)
    return total.log() - known.index_select(0, counts.flatten()).view(counts.shape).sum(-1) / total


def _turned(start: Tensor, turns: Tensor) -> Tensor:
    """``start`` after a rotation of the fixed frame about its origin."""
    dims = turns.shape[-1]
    full = torch.eye(dims + 1, dtype=torch.float64).repeat(*turns.shape[:-2], 1, 1)
    full[..., :dims, :dims] = turns
    return start @ full


def _apart(transforms: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best of each neighborhood of rotations (12 degrees), best first; fewer than ``count`` give copies."""
    dims = transforms.shape[-1] - 1
    linear = transforms[..., :dims, :dims]
    linear = linear / torch.linalg.det(linear).abs()[..., None, None] ** (1 / dims)
    # the angle between two rotations by the trace of their quotient; NumPy, for the many small steps
    flat, left = linear.flatten(-2).numpy(), values.numpy().copy()
    limit = math.cos(math.radians(12.0))
    limit = 2 * limit if dims == 2 else 1 + 2 * limit
    batch = np.arange(len(flat))
    chosen: list[np.ndarray] = []
    for _ in range(count):
        top = left.argmax(1)
        # all gone: repeat the best
        top = np.where(left[batch, top] == -np.inf, chosen[0] if chosen else top, top)
        chosen.append(top)
        left[(flat @ flat[batch, top][:, :, None])[..., 0] > limit] = -np.inf
    picked = torch.from_numpy(np.stack(chosen, 1))
    index = picked[..., None, None].expand(-1, -1, dims + 1, dims + 1)
    return torch.gather(transforms, 1, index), torch.gather(values, 1, picked)


def _equal_bins(values: Tensor, mask: Tensor) -> Tensor:
    """Bins ``[N, 1, *spatial]``: 0 for background, 1 to 15 by rank among the foreground."""
    result = torch.zeros(values.shape, dtype=torch.long, device=values.device)
    for image, inside, out in zip(values, mask, result, strict=True):
        seen = image[inside]
        if seen.numel() == 0:
            continue
        ranks = torch.linspace(0, 1, _BINS, device=values.device)[1:-1]
        cuts = torch.quantile(seen[:: 1 + seen.numel() // 1_000_000].float(), ranks)
        out[inside] = 1 + torch.searchsorted(cuts, seen.contiguous())
    return result
