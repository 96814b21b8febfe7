# SPDX-License-Identifier: Apache-2.0
"""The coarse stage: where, at any rotation, do two images share the most information?"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_zsreg.geometry import apply_affine, lattice_index
from monai_zsreg.registration.side import Pair, Side

_BINS = 16
# fraction of the samples that must fall into the moving image before the rest is forgiven
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
    return from_quaternions(
        torch.stack([inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin(), outer * beta.cos()], dim=-1)
    )


def from_quaternions(q: Tensor) -> Tensor:
    """Unit quaternions ``[..., 4]``, real part last, to rotation matrices ``[..., 3, 3]``."""
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


class PoseSearch:
    """Scores rotations about the objects' centers by normalized mutual information, and improves the best by trial.

    Intensities are sampled at points of the fixed image's foreground and a rim around it, sorted into sixteen bins of
    equal count (one of them background), and counted for all candidates at once.

    Args:
        pair: the two images.
        scaled: whether trials change the scale too.
        points: number of samples.
        keep: number of candidates that are improved.
        trials: number of trials for each of them in a round.
        seed: of all draws.
    """

    def __init__(
        self, pair: Pair, scaled: bool = True, points: int = 2500, keep: int = 24, trials: int = 24, seed: int = 0
    ) -> None:
        self.pair = pair
        self.scaled = scaled
        self.keep = keep
        self.trials = trials
        self.generator = torch.Generator().manual_seed(seed)
        self.points, self.bins = self._samples(points)
        moving = pair.moving
        self.volume = _framed(_equal_bins(moving.coarse.values, moving.weight.values > 0))
        self.to_index = pair.moving_frame.to_index(moving.coarse.grid)

    def everywhere(self, rotations: int, results: int) -> Tensor:
        """Candidates ``[results, D+1, D+1]`` float64, fixed frame to moving frame, best first, from all rotations.

        Args:
            rotations: number of rotations to score.
            results: number of candidates, apart from each other.
        """
        pair = self.pair
        candidates = _turned(pair.centered, even_rotations(rotations, pair.dims))
        # the ratio of the objects' sizes is a second guess at the scale
        ratio = min(max((pair.moving.size / max(pair.fixed.size, 1e-6)) ** (1 / pair.dims), 0.4), 2.5)
        if self.scaled and abs(math.log(ratio)) > 0.06:
            other = candidates.clone()
            other[:, : pair.dims, : pair.dims] *= ratio
            candidates = torch.cat([candidates, other])
        return self.improve(candidates, results)

    def around(self, start: Tensor, results: int) -> Tensor:
        """Candidates around ``start (D+1, D+1)``, see `everywhere`."""
        return self.improve(start[None], results, spread=2.0)

    def mirrored(self, transform: Tensor, results: int) -> Tensor:
        """What fits best after a reflection of the fixed image across a plane (2D: a line) through its center.

        Args:
            transform: ``(D+1, D+1)``, fixed frame to moving frame, without the reflection.
            results: number of candidates, see `everywhere`.
        """
        dims = self.pair.dims
        normals = _normals(dims)
        flips = torch.eye(dims, dtype=torch.float64) - 2 * normals[:, :, None] * normals[:, None, :]
        return self.improve(_turned(transform, flips), results, keep=2 * results)

    def improve(self, candidates: Tensor, results: int, spread: float = 1.0, keep: int | None = None) -> Tensor:
        """The best ``keep`` of candidates ``[K, D+1, D+1]``, shaken ``spread`` times as wide as usual."""
        dims, generator, keep = self.pair.dims, self.generator, keep or self.keep
        kept, values = apart(candidates, self.score(candidates), keep)
        for number, (angle, shift, scale) in enumerate(_ROUNDS):
            k = len(kept)
            draw = torch.randn(k, self.trials, 2 * dims + 1, generator=generator, dtype=torch.float64)
            vectors = draw[..., : 1 if dims == 2 else 3] * math.radians(angle) * spread
            motion = torch.eye(dims + 1, dtype=torch.float64).repeat(k, self.trials, 1, 1)
            grow = (draw[..., -1] * (scale if self.scaled else 0.0)).exp()
            motion[..., :dims, :dims] = rotation_matrices(vectors) * grow[..., None, None]
            motion[..., :dims, dims] = draw[..., -1 - dims : -1] * shift * spread
            tried = kept[:, None] @ motion
            top = self.score(tried.flatten(0, 1)).view(k, self.trials).max(-1)
            better = top.values > values
            kept = torch.where(better[:, None, None], tried[torch.arange(k), top.indices], kept)
            values = torch.where(better, top.values, values)
            if number == 1:
                kept, values = apart(kept, values, max(results, keep // 3))
        return apart(kept, values, results)[0]

    def _samples(self, count: int) -> tuple[Tensor, Tensor]:
        """Points ``[D + 1, S]`` in the fixed frame, homogeneous, and the bins ``[S]`` of the fixed image there."""
        side: Side = self.pair.fixed
        grid = side.coarse.grid
        widen = F.max_pool2d if grid.dims == 2 else F.max_pool3d
        mask = side.weight.values > 0
        size, edge = (5, 2) if grid.dims == 2 else (3, 1)
        near = widen(mask.float()[None, None], size, 1, edge).flatten()
        below = near.cumsum(0)
        u = (torch.arange(count) + torch.rand(count, generator=self.generator)) / count
        place = torch.searchsorted(below, u.to(below) * below[-1], right=True).clamp(max=len(near) - 1)
        bins = _equal_bins(side.coarse.values, mask).flatten()[place]
        index = lattice_index(place, grid.shape)
        to_frame = torch.linalg.inv(self.pair.fixed_frame.to_index(grid))
        points = apply_affine(to_frame.to(place.device), index.double()).float()
        return torch.cat([points.mT, torch.ones_like(points[:, :1].mT)]).contiguous(), bins

    def score(self, transforms: Tensor) -> Tensor:
        """Normalized mutual information, 1 to 2, of transforms ``[K, D+1, D+1]``, ``[K]`` float64 on the CPU."""
        dims = self.pair.dims
        device, count = self.points.device, self.points.shape[1]
        matrices = (self.to_index @ transforms)[..., :dims, :]
        # by the frame's width, and half a voxel so that cutting off decimals rounds
        matrices[..., -1] += 1.5
        matrices = matrices.to(device, torch.float32)
        sides = self.volume.shape
        cells = _BINS * (_BINS + 1)
        rows = (self.bins * (_BINS + 1)).int()
        # counts are whole numbers: looking n log n up is quicker than computing it
        known = torch.arange(count + 1, dtype=torch.float32, device=device)
        known = torch.xlogy(known, known)
        results = []
        for part in matrices.split(max(1, _CHUNK[device.type == "cuda"] // count)):
            # one product for all candidates: coordinates [K D, S], a row an axis
            where = (part.flatten(0, 1) @ self.points).view(-1, dims, count)
            for axis, side in enumerate(sides):
                where[:, axis].clamp_(0.0, side - 0.5)
            index = where.int()
            place = index[:, 0]
            for axis in range(1, dims):
                place = place.mul_(sides[axis]).add_(index[:, axis])
            joint = self.volume.view(-1).index_select(0, place.flatten()).view(-1, count)
            first = torch.arange(0, len(part) * cells, cells, device=device, dtype=torch.int32)[:, None]
            joint.add_(rows).add_(first)
            table = torch.bincount(joint.flatten(), minlength=len(part) * cells).view(-1, _BINS, _BINS + 1)
            # what the moving image does not show says nothing
            table = table[..., :_BINS]
            seen = table.sum((1, 2))
            both = _entropy(table.flatten(1), seen, known).clamp(min=1e-3)
            gain = (_entropy(table.sum(-1), seen, known) + _entropy(table.sum(-2), seen, known)) / both - 1
            # a few points agree by chance
            results.append(1 + gain * (seen / (_ENOUGH * count)).clamp(max=1))
        return torch.cat(results).cpu().double()


# widths of the trials of each round: rotation (degrees), shift (object radii), scale (logarithm)
_ROUNDS = (
    (9.0, 0.22, 0.08),
    (7.0, 0.12, 0.06),
    (5.0, 0.07, 0.05),
    (3.0, 0.04, 0.03),
    (2.0, 0.03, 0.02),
)


def _normals(dims: int) -> Tensor:
    """Directions of the half circle (36) or of the half sphere (150), spread evenly, ``[K, D]`` float64."""
    if dims == 2:
        angles = torch.arange(36, dtype=torch.float64) * (math.pi / 36)
        return torch.stack([angles.cos(), angles.sin()], dim=-1)
    i = torch.arange(150, dtype=torch.float64) + 0.5
    height, turn = i / 150, i * math.pi * (3 - math.sqrt(5))
    across = (1 - height.square()).sqrt()
    return torch.stack([across * turn.cos(), across * turn.sin(), height], dim=-1)


def _framed(bins: Tensor) -> Tensor:
    """Bins as int32 with a border one voxel wide, in a bin of its own, for all that lies outside."""
    return F.pad(bins, [1, 1] * bins.ndim, value=_BINS).int()


def _entropy(counts: Tensor, total: Tensor, known: Tensor) -> Tensor:
    """Of counts ``[K, B]`` that add up to ``total [K]``; ``known[n]`` is n log n."""
    total = total.clamp(min=1)
    return total.log() - known.index_select(0, counts.flatten()).view(counts.shape).sum(-1) / total


def _turned(start: Tensor, turns: Tensor) -> Tensor:
    """``start`` after rotations ``[K, D, D]`` of the fixed frame about its origin."""
    dims = turns.shape[-1]
    full = torch.eye(dims + 1, dtype=torch.float64).repeat(len(turns), 1, 1)
    full[:, :dims, :dims] = turns
    return start @ full


def apart(transforms: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best of each neighborhood of rotations (12 degrees), best first; fewer than ``count`` give copies.

    Args:
        transforms: ``[K, D+1, D+1]``.
        values: ``[K]``, higher is better.
        count: how many to keep.
    """
    dims = transforms.shape[-1] - 1
    linear = transforms[:, :dims, :dims]
    linear = linear / torch.linalg.det(linear).abs()[:, None, None] ** (1 / dims)
    # the angle between two rotations by the trace of their quotient; NumPy, for the many small steps
    flat, left = linear.flatten(1).numpy(), values.numpy().copy()
    limit = math.cos(math.radians(12.0))
    limit = 2 * limit if dims == 2 else 1 + 2 * limit
    chosen: list[int] = []
    for _ in range(count):
        top = int(left.argmax())
        # all gone: repeat the best
        top = chosen[0] if chosen and left[top] == -math.inf else top
        chosen.append(top)
        left[flat @ flat[top] > limit] = -math.inf
    return transforms[chosen], values[chosen]


def _equal_bins(values: Tensor, mask: Tensor) -> Tensor:
    """Bins ``[*spatial]``: 0 for background, 1 to 15 by rank among the foreground."""
    result = torch.zeros(values.shape, dtype=torch.long, device=values.device)
    seen = values[mask]
    if seen.numel() > 0:
        ranks = torch.linspace(0, 1, _BINS, device=values.device)[1:-1]
        cuts = torch.quantile(seen[:: 1 + seen.numel() // 1_000_000].float(), ranks)
        result[mask] = 1 + torch.searchsorted(cuts, seen.contiguous())
    return result
