# SPDX-License-Identifier: Apache-2.0
"""Coarse candidates from every translation at once: masked correlation of edge orientations, rotation after rotation.

A search that starts from the middles of the two foregrounds does not find pairs whose fields of view overlap in part
only: slabs, body regions, photographs. Here each rotation is correlated with every translation by FFT, normalized over
what both images show (Padfield, IEEE TIP 2012), so that the answer does not depend on where the images lie.

What is correlated are the structure tensors of the normalized gradient, smoothed (compare the normalized gradient
fields of Haber and Modersitzki, MICCAI 2006). They do not change when contrast is inverted, they are computed on a grid
finer than the lattice of the correlation, and they turn with the image: the moving image is described once and not
again for each rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import permutations, product

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_zsreg.foreground import grown, seen_region
from monai_zsreg.geometry import Grid, lattice_index, nearest_axes, pooled_grid
from monai_zsreg.registration.search import from_quaternions, rotation_matrices
from monai_zsreg.registration.separable import blurred
from monai_zsreg.registration.side import Level


@dataclass(frozen=True)
class Candidates:
    """Transforms to refine, best first, no two of them alike.

    The best score of a pair that belongs together mostly stands 0.1 to 0.5 above the second. That of a mirror image of
    a symmetric body does so as well.

    Attributes:
        transform: ``[K, D+1, D+1]`` float64 on the CPU, fixed world to moving world.
        score: ``[K]`` correlation of the edge orientations over the overlap, 1 for the same image, less where the
            overlap is small.
    """

    transform: Tensor
    score: Tensor


# lattice points along the longest side of the smaller image: of the correlation, with a limit of the rotations and
# without one; and how much finer the grid is that edges are found on
_CELLS = {2: 64, 3: 18}
_CELLS_ALL = {2: 64, 3: 13}
_FINER = 2.5
# number of rotations
_TURNS = {2: 60, 3: 100}
_TURNS_ALL = {2: 60, 3: 1440}
# gradients below the root of this share of their mean square do not count as edges
_FAINT = 0.1
# least overlap, of the smaller region; a score is multiplied by the fourth root of the overlap
_LEAST = 0.2
# numbers of a batch, by whether there is a GPU; on the CPU few enough for its cache
_BATCH = {False: 500_000, True: 20_000_000}
# most points that a transform may have; the lattice gets coarser where a small image is looked for in a large one
_LARGEST = {2: 250_000, 3: 100_000}
# lattice points along an axis below which overlap changes with each of them
_THIN = 8
# turns of a lattice onto itself that go on to all frequencies
_TURNS_KEPT = 6
# widths of the trials that improve candidates, round after round: rotation (degrees), shift (lattice steps), scale
# (logarithm)
_ROUNDS = (
    (8.0, 0.8, 0.05),
    (5.0, 0.5, 0.03),
    (3.0, 0.3, 0.02),
    (2.0, 0.2, 0.01),
    (1.2, 0.12, 0.006),
    (0.7, 0.07, 0.004),
)
_TRIALS = 16
# candidates that take part in each round, and points that they are compared at
_KEEP = (24, 16, 12, 8, 6, 4)
_POINTS = 1200


@torch.no_grad()
def correlate(
    fixed: Level,
    moving: Level,
    *,
    reach: float | None = 45.0,
    scales: tuple[float, ...] = (1.0,),
    count: int = 12,
    seed: int = 0,
) -> Candidates:
    """Find where two images may belong, whatever their positions.

    Args:
        fixed: the fixed image, of any resolution: it is averaged here.
        moving: the moving image, on the same device.
        reach: largest rotation from the headers' word, degrees; None for every rotation.
        scales: lengths in the moving world over those in the fixed world to try.
        count: largest number of candidates.
        seed: of the random draws that improve the candidates.
    """
    sides = [_sides(fixed.grid), _sides(moving.grid)]
    # the smaller one turns, in the smaller box
    swap = float(sides[0].norm()) < float(sides[1].norm())
    step = _step(sides[swap], sides[not swap], reach)
    maps = [_Maps.of(image, step) for image in (fixed, moving)]
    still, turned = reversed(maps) if swap else maps
    factors = [1 / s for s in scales] if swap else list(scales)
    transforms, scores = _scan(still, turned, step, reach, factors)
    transforms, _ = _apart(transforms, scores, still, 1.5 * step, 2 * count)
    transforms, scores = _improve(transforms, still, turned, step, len(scales) > 1, seed)
    transforms, scores = _apart(transforms, scores, still, 2.5 * step, count)
    return Candidates(torch.linalg.inv(transforms) if swap else transforms, scores)


def _step(still: Tensor, turned: Tensor, reach: float | None) -> float:
    """Distance of the lattice points, mm, by the sides of the two fields of view."""
    dims = len(still)
    cells = (_CELLS_ALL if reach is None else _CELLS)[dims]
    step = min(float(still.max()), float(turned.max())) / cells
    whole = (still.max().expand(dims) if reach is None else still) + turned.norm()
    return step * max(1.0, float((whole / step).prod()) / _LARGEST[dims]) ** (1 / dims)


@dataclass(frozen=True)
class _Maps:
    """Edge orientations of an image.

    Attributes:
        values: ``[P + 1, *spatial]``: the upper triangle of the tensor along world axes, and what part is seen.
        grid: their lattice.
    """

    values: Tensor
    grid: Grid

    @classmethod
    def of(cls, image: Level, step: float) -> _Maps:
        grid = image.grid
        dims = grid.dims
        factors = [max(1, min(round(step / _FINER / s), n // 4)) for s, n in zip(grid.spacing, grid.shape, strict=True)]
        grid = pooled_grid(grid, factors)
        average = F.avg_pool2d if dims == 2 else F.avg_pool3d
        values = image.values.float()
        seen = seen_region(values)
        weight = average(seen.to(values)[None, None], factors)[0, 0]
        values = average(torch.where(seen, values, 0.0)[None, None], factors)[0, 0] / weight.clamp(min=1e-6)
        # a gradient needs both its neighbors
        weight = (~grown(weight < 0.99)).to(values)
        along = [
            torch.gradient(values, dim=axis)[0] if n > 1 else torch.zeros_like(values)
            for axis, n in enumerate(values.shape)
        ]
        to_world = torch.linalg.inv(grid.affine[:dims, :dims]).mT.to(values)
        gradient = torch.einsum("ij,j...->i...", to_world, torch.stack(along))
        energy = gradient.square().sum(0)
        typical = (energy * weight).sum() / weight.sum().clamp(min=1)
        gradient = gradient / (energy + _FAINT * typical + 1e-30).sqrt()
        tensor = torch.stack([gradient[i] * gradient[j] for i, j in _upper(dims)] + [torch.ones_like(values)])
        smooth = blurred(tensor * weight, [0.5 * step / s for s in grid.spacing], zeros=True)
        share = smooth[-1:]
        return cls(torch.cat([smooth[:-1] / share.clamp(min=1e-6), share]), grid)

    @property
    def dims(self) -> int:
        return self.grid.dims

    @property
    def sides(self) -> Tensor:
        return _sides(self.grid)

    @property
    def axes(self) -> Tensor:
        """Orthonormal, right-handed axes near the grid's, ``(D, D)`` columns."""
        axes = nearest_axes(self.grid)
        return axes * torch.tensor([1.0] * (self.dims - 1) + [float(torch.linalg.det(axes).sign())])

    def volume(self) -> float:
        """Of what is seen, mm to the power of D."""
        return float((self.values[-1] > 0.5).float().mean() * self.sides.prod())

    def at(self, points: Tensor, turns: Tensor, mode: str = "bilinear") -> tuple[Tensor, Tensor]:
        """
        Args:
            points: indices, ``[N, S, D]`` float32.
            turns: orthonormal axes that the tensor is wanted along, ``[N, D, D]`` columns, world.
            mode: ``"bilinear"`` or ``"nearest"``.

        Returns:
            Channels ``[N, C, S]`` and what is seen, ``[N, S]``, 1 or 0.
        """
        sizes = torch.tensor(self.values.shape[1:], dtype=torch.float32, device=points.device)
        where = (2 * points + 1) / sizes - 1
        found = self._nearest(points) if mode == "nearest" else self._linear(where)
        channels = _to_channels(turns).to(found) @ found[:, :-1]
        inside = (where.abs() <= 1).all(-1)
        return channels, (inside & (found[:, -1] > 0.5)).to(found)

    def _linear(self, where: Tensor) -> Tensor:
        n, dims = len(where), self.dims
        grid = where.flip(-1).view(n, *[1] * (dims - 1), -1, dims)
        maps = self.values.expand(n, *self.values.shape)
        return F.grid_sample(maps, grid, "bilinear", padding_mode="border", align_corners=False).flatten(2)

    def _nearest(self, points: Tensor) -> Tensor:
        # all channels of a place lie together: faster than grid_sample, which goes through the image for each
        place = torch.zeros(points.shape[:-1], dtype=torch.int32, device=points.device)
        for axis, size in enumerate(self.values.shape[1:]):
            place = place.mul_(size).add_(points[..., axis].round().clamp_(0, size - 1).int())
        return self._together.index_select(0, place.flatten()).view(*place.shape, -1).mT

    @cached_property
    def _together(self) -> Tensor:
        return self.values.flatten(1).mT.contiguous()


def _sides(grid: Grid) -> Tensor:
    """Lengths of the field of view, ``[D]`` float64."""
    return torch.tensor([n * s for n, s in zip(grid.shape, grid.spacing, strict=True)], dtype=torch.float64)


def _upper(dims: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(dims) for j in range(i, dims)]


@lru_cache
def _symmetric_basis(dims: int) -> Tensor:
    """Orthonormal symmetric matrices, ``[C, D, D]``, the last a multiple of the identity."""
    basis = []
    for i, j in _upper(dims):
        if i != j:
            one = torch.zeros(dims, dims, dtype=torch.float64)
            one[i, j] = one[j, i] = 0.5**0.5
            basis.append(one)
    for k in range(1, dims):
        diagonal = torch.tensor([1.0] * k + [-float(k)] + [0.0] * (dims - k - 1), dtype=torch.float64)
        basis.append(torch.diag(diagonal / diagonal.norm()))
    basis.append(torch.eye(dims, dtype=torch.float64) / dims**0.5)
    return torch.stack(basis)


def _to_channels(turns: Tensor) -> Tensor:
    """From the upper triangle along world axes to coefficients along ``turns [N, D, D]``: ``[N, C, P]``."""
    dims = turns.shape[-1]
    basis = turns[:, None] @ _symmetric_basis(dims) @ turns[:, None].mT
    return torch.stack([basis[..., i, j] * (1 if i == j else 2) for i, j in _upper(dims)], dim=-1)


def _lattice(axes: Tensor, center: Tensor, shape: tuple[int, ...], step: float) -> Tensor:
    """Lattice indices to world, ``[N, D+1, D+1]``, for axes ``[N, D, D]``."""
    dims = len(shape)
    matrix = torch.eye(dims + 1, dtype=torch.float64).repeat(len(axes), 1, 1)
    matrix[:, :dims, :dims] = axes * step
    middle = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    matrix[:, :dims, dims] = center - matrix[:, :dims, :dims] @ middle
    return matrix


def _on_lattice(maps: _Maps, axes: Tensor, shape: tuple[int, ...], step: float) -> tuple[Tensor, Tensor, Tensor]:
    """The maps on lattices about their middle: mean-free channels ``[N, C, *shape]``, what is seen, and matrices."""
    dims, device = maps.dims, maps.values.device
    world = _lattice(axes, maps.grid.center, shape, step)
    index = (torch.linalg.inv(maps.grid.affine) @ world).to(device, torch.float32)
    ticks = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float32, device=device) for n in shape])
    points = ticks @ index[:, :dims, :dims].mT + index[:, None, :dims, dims]
    # the maps are smooth and their grid is finer than the lattice: the nearest of its points will do
    channels, seen = maps.at(points, axes, "nearest")
    mean = (channels * seen[:, None]).sum(-1, keepdim=True) / seen.sum(-1)[:, None, None].clamp(min=1)
    channels = (channels - mean) * seen[:, None]
    return channels.view(len(axes), -1, *shape), seen.view(len(axes), *shape), world


def _scan(still: _Maps, turned: _Maps, step: float, reach: float | None, scales: list[float]) -> tuple[Tensor, Tensor]:
    """The best translation of each rotation and scale, ``[K, D+1, D+1]`` still world to turned world, and scores."""
    dims, device = still.dims, still.values.device
    # turns of the still lattice onto itself cost a product each and stand for as many rotations of the other
    group = _lattice_rotations(dims) if reach is None else torch.eye(dims, dtype=torch.float64)[None]
    turns = _rotations(dims, reach, (_TURNS if reach is not None else _TURNS_ALL)[dims])
    axes = still.axes
    lengths = still.sides if reach is not None else still.sides.max().expand(dims)
    shape = tuple(math.ceil(float(n)) for n in lengths / step - 1e-6)
    channels, seen, still_world = _on_lattice(still, axes @ group, shape, step)
    found: list[Tensor] = []
    scores: list[Tensor] = []
    for scale in scales:
        wide = step * scale
        boxes = ((turns @ axes).mT @ turned.axes).abs() @ turned.sides / wide
        box = tuple(math.ceil(float(n)) for n in boxes.amax(0) - 1e-6)
        # translations with hardly any overlap may wrap around
        size = [_good_size(a + b - max(1, int(0.15 * min(a, b)))) for a, b in zip(shape, box, strict=True)]
        # overlap and energies hardly change from one translation to the next
        every = [2 if min(a, b) >= _THIN else 1 for a, b in zip(shape, box, strict=True)]
        cells = [n // e for n, e in zip(size, every, strict=True)]
        spectra, energies = _transformed(channels, size), _energies(channels, seen, cells, every)
        low = _low(spectra, size, cells)
        numbers = math.prod(size)
        batch = max(1, _BATCH[device.type == "cuda"] // (spectra.shape[1] * numbers))
        for part in turns.split(batch):
            maps, mask, world = _on_lattice(turned, part @ axes, box, wide)
            other, others = _transformed(maps, size).conj(), _energies(maps, mask, cells, every).conj()
            other_low = _low(other, size, cells)
            some = max(1, _BATCH[device.type == "cuda"] // (3 * len(part) * math.prod(cells)))
            for number in range(0, len(group), some):
                those = slice(number, number + some)
                weight = _weights(energies[those], others, seen[those], mask, cells)
                pairs = _promising(low[those], other_low, weight)
                score, place = _best(spectra[those], other, weight, pairs, size, every)
                shift = place - torch.tensor(size) * (place >= torch.tensor(shape))
                moved = torch.eye(dims + 1, dtype=torch.float64).repeat(len(shift), 1, 1)
                moved[:, :dims, dims] = -shift.double()
                one, two = pairs.cpu()
                found.append(world[one] @ moved @ torch.linalg.inv(still_world[those][two]))
                scores.append(score)
    return torch.cat(found), torch.cat(scores)


def _transformed(maps: Tensor, size: list[int]) -> Tensor:
    """Spectra of maps ``[..., *shape]``, filled up with zeros: ``[..., *half]``."""
    return torch.fft.rfftn(maps, s=size, dim=tuple(range(-len(size), 0)))


def _energies(channels: Tensor, seen: Tensor, cells: list[int], every: list[int]) -> Tensor:
    """Spectra of what is seen and of the channels' square, summed over cells of ``every`` points: ``[N, 2, *half]``."""
    total = F.avg_pool2d if len(cells) == 2 else F.avg_pool3d
    stack = torch.stack([seen, channels.square().sum(1)], dim=1)
    stack = total(stack, every, ceil_mode=True, divisor_override=1)
    # a product of two such sums counts each pair as often as there are points in a cell
    return _transformed(stack, cells) / math.prod(every) ** 0.5


def _weights(still: Tensor, turned: Tensor, still_seen: Tensor, turned_seen: Tensor, cells: list[int]) -> Tensor:
    """What makes a score of a sum of products, for all cells of translations, ``[N, G, *cells]``; 0 for no overlap.

    Args:
        still: spectra ``[G, 2, *half]``, see `_energies`.
        turned: conjugate spectra ``[N, 2, *half]``.
        still_seen: ``[G, *shape]``.
        turned_seen: ``[N, *box]``.
        cells: size of the transforms of the energies.
    """
    axes = tuple(range(-len(cells), 0))
    kinds = [still[None, :, i] * turned[:, None, j] for i, j in ((0, 0), (1, 0), (0, 1))]
    overlap, one, two = (torch.fft.irfftn(kind, s=cells, dim=axes) for kind in kinds)
    least = torch.minimum(still_seen.flatten(1).sum(1)[None], turned_seen.flatten(1).sum(1)[:, None]).clamp(min=1)
    share = overlap.div_(least.view(*least.shape, *[1] * len(cells)))
    squares = one.clamp_(min=1e-3).mul_(two.clamp_(min=1e-3))
    weight = squares.rsqrt_().mul_(share.clamp(min=1e-3).sqrt_().sqrt_())
    return weight.masked_fill_(share <= _LEAST, 0.0)


def _low(spectra: Tensor, size: list[int], cells: list[int]) -> Tensor:
    """What spectra ``[..., *half]`` are on a lattice of ``cells`` in place of ``size`` points."""
    for axis, (n, m) in enumerate(zip(size, cells, strict=True), start=-len(size)):
        if m == n:
            continue
        if axis == -1:
            spectra = spectra.narrow(axis, 0, m // 2 + 1)
        else:
            ends = spectra.narrow(axis, 0, (m + 1) // 2), spectra.narrow(axis, n - m // 2, m // 2)
            spectra = torch.cat(ends, axis)
    return spectra


def _promising(still: Tensor, turned: Tensor, weight: Tensor) -> Tensor:
    """Which turns of the lattice score best by low frequencies, for each of the other image's.

    Args:
        still: spectra ``[G, C, *half]``, see `_low`.
        turned: conjugate spectra ``[N, C, *half]``.
        weight: ``[N, G, *cells]``, see `_weights`.

    Returns:
        Numbers ``[2, J]``: of the other image's turns and of the lattice's.
    """
    n, g, *cells = weight.shape
    count = min(g, _TURNS_KEPT)
    rows = torch.arange(n, device=weight.device).repeat_interleave(count)
    if count == g:
        return torch.stack([rows, torch.arange(g, device=rows.device).repeat(n)])
    # a sum in place: einsum and the product of whole stacks are slower by half
    total = still[None, :, 0] * turned[:, None, 0]
    for channel in range(1, still.shape[1]):
        total.addcmul_(still[None, :, channel], turned[:, None, channel])
    score = torch.fft.irfftn(total, s=cells, dim=tuple(range(-len(cells), 0))).mul_(weight)
    return torch.stack([rows, score.flatten(2).amax(2).topk(count).indices.flatten()])


def _best(
    still: Tensor, turned: Tensor, weight: Tensor, pairs: Tensor, size: list[int], every: list[int]
) -> tuple[Tensor, Tensor]:
    """Best score ``[J]`` float64, and its translation ``[J, D]``, lattice points, both on the CPU.

    Args:
        still: spectra ``[G, C, *half]``.
        turned: conjugate spectra ``[N, C, *half]``.
        weight: ``[N, G, *cells]``, see `_weights`.
        pairs: ``[2, J]``, see `_promising`.
        size: of the transforms.
        every: see `_energies`.
    """
    corners = torch.cartesian_prod(*[torch.arange(e, device=weight.device) for e in every]).view(-1, len(every))
    steps = torch.tensor(every, device=weight.device)
    scores, places = [], []
    for n, g in pairs.mT.tolist():
        total = still[g, 0] * turned[n, 0]
        for channel in range(1, still.shape[1]):
            total.addcmul_(still[g, channel], turned[n, channel])
        common = torch.fft.irfftn(total, s=size)
        highest = common
        for axis, step in enumerate(every):
            if step > 1:
                highest = torch.maximum(*highest.unflatten(axis, (-1, step)).unbind(axis + 1))
        best, place = (highest * weight[n, g]).flatten().max(0)
        scores.append(best)
        # where in the cell
        within = lattice_index(place, weight.shape[2:]) * steps + corners
        places.append(within[common[within.unbind(1)].argmax()])
    return torch.stack(scores).cpu().double(), torch.stack(places).cpu()


def _good_size(least: int) -> int:
    """The next even number without a prime factor above 11: transforms of such sizes are quick."""
    size = least + least % 2
    while pow(2 * 3 * 5 * 7 * 11, 64, size) > 0:
        size += 2
    return size


@lru_cache
def _lattice_rotations(dims: int) -> Tensor:
    """Rotations that take a cubic lattice onto itself, ``[G, D, D]``: 4 in 2D, 24 in 3D; the identity first."""
    axes = torch.eye(dims, dtype=torch.float64)
    signs = [torch.tensor(sign, dtype=torch.float64) for sign in product((1.0, -1.0), repeat=dims)]
    found = torch.stack([axes[list(order)] * sign for order in permutations(range(dims)) for sign in signs])
    return found[torch.linalg.det(found) > 0]


@lru_cache
def _rotations(dims: int, reach: float | None, number: int) -> Tensor:
    """Rotations ``[N, D, D]`` spread evenly up to ``reach`` degrees, the identity first.

    Without a limit, ``number`` of them come with the rotations of the lattice, and only one of each such set is given.
    """
    group = _lattice_rotations(dims) if reach is None else torch.eye(dims, dtype=torch.float64)[None]
    number //= len(group)
    if dims == 2:
        if reach is None:
            angles = torch.arange(number, dtype=torch.float64) * (90.0 / number)
        else:
            steps = max(1, round(number * min(1.0, reach / 180))) | 1
            angles = torch.linspace(-reach, reach, steps, dtype=torch.float64)
            angles = angles[angles.abs().argsort()]
        return rotation_matrices(torch.deg2rad(angles)[:, None])
    generator = torch.Generator().manual_seed(0)
    draws = from_quaternions(F.normalize(torch.randn(100_000, 4, generator=generator, dtype=torch.float64), dim=1))
    least = math.cos(math.radians(reach or 180))
    draws = draws[draws.diagonal(dim1=1, dim2=2).sum(1) >= 1 + 2 * least][:20_000]
    # the farthest from all that those chosen stand for comes next; angles by the trace of the quotient
    chosen = [torch.eye(3, dtype=torch.float64)]
    near = torch.full((len(draws),), -1.0, dtype=torch.float64)
    for _ in range(number - 1):
        near = torch.maximum(near, (draws.flatten(1) @ (chosen[-1] @ group).flatten(1).mT).amax(1))
        chosen.append(draws[near.argmin()])
    return torch.stack(chosen)


def _apart(transforms: Tensor, scores: Tensor, still: _Maps, distance: float, count: int) -> tuple[Tensor, Tensor]:
    """The best of each neighborhood, best first.

    Two are neighbors where they take the corners of a box half as large as the field of view to places that lie, in
    the root mean square, no more than ``distance`` apart.
    """
    dims = still.dims
    signs = torch.cartesian_prod(*[torch.tensor([-0.25, 0.25], dtype=torch.float64)] * dims)
    corners = still.grid.center + (signs * still.sides) @ still.axes.mT
    places = corners @ transforms[:, :dims, :dims].mT + transforms[:, None, :dims, dims]
    left = scores.clone()
    chosen: list[int] = []
    while len(chosen) < count and bool((left > -torch.inf).any()):
        top = int(left.argmax())
        chosen.append(top)
        gap = (places - places[top]).square().sum(-1).mean(-1).sqrt()
        left[gap <= distance] = -torch.inf
    return transforms[chosen], scores[chosen]


def _improve(
    transforms: Tensor, still: _Maps, turned: _Maps, step: float, free: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Shake candidates, each time by less, and keep what scores better."""
    dims, device = still.dims, still.values.device
    generator = torch.Generator().manual_seed(seed)
    # points that the still image shows, on a lattice moved by a random part of a step
    shape = tuple(math.ceil(float(n)) for n in 1.6 * still.sides / step)
    world = _lattice(still.axes[None], still.grid.center, shape, step / 1.6)[0]
    ticks = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in shape])
    points = (ticks + torch.rand(ticks.shape, generator=generator, dtype=torch.float64) - 0.5) @ world[:dims, :dims].mT
    points = points + world[:dims, dims]
    to_index = torch.linalg.inv(still.grid.affine)
    index = points @ to_index[:dims, :dims].mT + to_index[:dims, dims]
    channels, seen = still.at(index[None].to(device, torch.float32), still.axes[None])
    shown = seen[0].cpu().nonzero()[:, 0]
    if len(shown) == 0:
        return transforms, torch.zeros(len(transforms), dtype=torch.float64)
    shown = shown[torch.randperm(len(shown), generator=generator)[:_POINTS]]
    channels, points = channels[0, :, shown.to(device)], points[shown]
    least = min(still.volume(), turned.volume()) / still.volume()

    def score(trials: Tensor) -> Tensor:
        index = torch.linalg.inv(turned.grid.affine) @ trials
        linear = trials[:, :dims, :dims]
        linear = linear / torch.linalg.det(linear).abs()[:, None, None] ** (1 / dims)
        where = points @ index[:, :dims, :dims].mT + index[:, None, :dims, dims]
        results = []
        for some, axes in zip(where.split(64), (linear @ still.axes).split(64), strict=True):
            other, inside = turned.at(some.to(device, torch.float32), axes)
            total = inside.sum(-1)
            weight = (inside / total[:, None].clamp(min=1))[:, None]
            one = channels - (channels * weight).sum(-1, keepdim=True)
            two = other - (other * weight).sum(-1, keepdim=True)
            common, first, second = ((a * b * weight).sum((1, 2)) for a, b in ((one, two), (one, one), (two, two)))
            share = (total / len(points) / least).clamp(max=1.0)
            value = common / (first * second).clamp(min=1e-12).sqrt() * share.clamp(min=1e-3).sqrt().sqrt()
            results.append(torch.where(share > _LEAST, value, -1.0))
        return torch.cat(results).cpu().double()

    scores = score(transforms)
    transforms = transforms.clone()
    for (turn, shift, scale), keep in zip(_ROUNDS, _KEEP, strict=True):
        first = scores.topk(min(keep, len(scores))).indices
        n = len(first) * _TRIALS
        motion = _motions(
            n, dims, math.radians(turn), shift * step, scale if free else 0.0, still.grid.center, generator
        )
        trials = transforms[first].repeat_interleave(_TRIALS, 0) @ motion
        best, which = score(trials).view(-1, _TRIALS).max(1)
        better = best > scores[first]
        transforms[first[better]] = trials.view(-1, _TRIALS, dims + 1, dims + 1)[better, which[better]]
        scores[first[better]] = best[better]
    return transforms, scores


def _motions(
    n: int, dims: int, turn: float, shift: float, scale: float, center: Tensor, generator: torch.Generator
) -> Tensor:
    """Random motions about a point, ``[n, D+1, D+1]``: widths in radians, mm and logarithms."""

    def draw(size: int) -> Tensor:
        return torch.randn(n, size, generator=generator, dtype=torch.float64)

    angles = 1 if dims == 2 else 3
    linear = rotation_matrices(draw(angles) * turn / angles**0.5) * torch.exp(scale * draw(1))[:, :, None]
    result = torch.eye(dims + 1, dtype=torch.float64).repeat(n, 1, 1)
    result[:, :dims, :dims] = linear
    result[:, :dims, dims] = center - linear @ center + shift * draw(dims)
    return result
