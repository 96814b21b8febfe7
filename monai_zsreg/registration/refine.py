# SPDX-License-Identifier: Apache-2.0
"""The fine stage: Gauss-Newton on local descriptors, sampled in blocks of both images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_zsreg.geometry import apply_affine
from monai_zsreg.networks.mind import MINDSSC
from monai_zsreg.networks.vgg import VGG19Patches
from monai_zsreg.registration.pyramid import Frame, Level

__all__ = ["Evidence", "Refinement", "Refiner", "generators"]


@cache
def generators(transform: str, dims: int) -> Tensor:
    """A basis of the motions that a kind of transform allows, ``[P, D+1, D+1]`` float64.

    Args:
        transform: ``"rigid"``, ``"similarity"`` or ``"affine"``.
        dims: 2 or 3.
    """
    basis = []

    def unit(row: int, column: int) -> Tensor:
        matrix = torch.zeros(dims + 1, dims + 1, dtype=torch.float64)
        matrix[row, column] = 1.0
        return matrix

    if transform == "affine":
        basis += [unit(i, j) for i in range(dims) for j in range(dims)]
    else:
        basis += [unit(i, j) - unit(j, i) for i in range(dims) for j in range(i)]
        if transform == "similarity":
            basis.append(sum((unit(i, i) for i in range(dims)), torch.zeros(dims + 1, dims + 1, dtype=torch.float64)))
    basis += [unit(i, dims) for i in range(dims)]
    return torch.stack(basis)


@dataclass
class Evidence:
    """How well images determine the transform between them, for a motion of the fixed frame ``[N, P]``.

    Attributes:
        covariance: ``[N, P, P]`` of the motion, by the sandwich of the blocks' equations.
        agreement: ``[N]`` how alike the slopes of the two images' descriptors are: 1 for the same image, about a half
            for two contrasts of one brain, near 0 where nothing corresponds.
        basis: ``[P, D+1, D+1]``, the motions.
    """

    covariance: Tensor
    agreement: Tensor
    basis: Tensor


@dataclass
class Refinement:
    """
    Attributes:
        transform: ``[N, D+1, D+1]`` float64, fixed frame to moving frame.
        cost: ``[N]`` mean clipped descriptor difference; lower is better.
        overlap: ``[N]`` part of the sampled points that lie in the other image's field of view.
        evidence: on demand.
    """

    transform: Tensor
    cost: Tensor
    overlap: Tensor
    evidence: Evidence | None = None


class _Memory:
    """Anderson's acceleration with a memory of one step.

    The gradients of two modalities agree in part, so that each Gauss-Newton update closes about the same part of what
    is left, in vivo half of it. How much the last update has changed by the last step tells the rest.
    """

    def __init__(self) -> None:
        self.update: Tensor | None = None
        self.step: Tensor | None = None

    def __call__(self, update: Tensor) -> Tensor:
        """The step to take, ``[N, K, P]``, where Gauss-Newton says ``update``."""
        step = update
        if self.update is not None and self.step is not None:
            change = update - self.update
            part = (update * change).sum(-1, keepdim=True) / change.square().sum(-1, keepdim=True).clamp(min=1e-30)
            step = update - part.clamp(-_FARTHEST, 0.0) * (self.step + change)
        self.update, self.step = update, step
        return step

    def pick(self, which: Tensor) -> None:
        """Go on with starts number ``which [N, J]``."""
        if self.update is not None and self.step is not None:
            index = which[..., None].expand(-1, -1, self.update.shape[-1])
            self.update, self.step = torch.gather(self.update, 1, index), torch.gather(self.step, 1, index)


# how much farther than Gauss-Newton a step may go, in steps
_FARTHEST = 2.0


@dataclass
class _Blocks:
    """Blocks of both images and how to look the other image up at them: those of the moving images follow in the batch
    on those of the fixed ones, ``M = 2 N``, so that one set of operations does for both."""

    corners: Tensor  # [M, B, D] first inner points, own frame
    step: float
    coordinates: Tensor  # [M, D + 1, B * P] inner points, own frame, homogeneous
    products: Tensor  # [M, (D + 1)(D + 2) / 2, B * P] products of the above
    weight: Tensor  # [M, B * P] of the inner points
    features: Tensor  # [M, B, C, P]
    gradient: Tensor  # [D, M, B, C, P]
    tensor: Tensor  # [M, D(D + 1) / 2, B * P] products of the gradient, summed over the channels
    others: tuple[Level, Level]  # moving images, fixed images
    other_to_grid: Tensor  # [M, D+1, D+1] other frame to grid_sample's coordinates


@dataclass(frozen=True)
class _Place:
    """Where blocks can be laid: images, the frame of their blocks, and how much places count."""

    image: Level
    frame: Frame
    weight: Level


class Refiner:
    """Improves transforms of one pair, or of a batch of pairs that share their grids, at one level of resolution.

    Both images are sampled in cubic blocks, laid out along their own voxel axes with a common step. For a block of
    the fixed image the moving image is sampled where the current transform takes the block's points, for a block of
    the moving image the fixed one where the inverse takes them, so both images are treated alike. Descriptors are
    made of the samples, hence always in the block's own orientation. The update is Gauss-Newton with the gradients
    of the blocks' own descriptors, which are made once (Baker and Matthews 2004: inverse composition), points
    weighted by how well they agree. Of several starts the worse half is given up after each iteration.

    Args:
        describe: module from patches ``[Q, *n]`` to ``[Q, C, *(n - 2 margin)]``, with attributes ``margin`` and
            ``worst``.
        transform: kind of transform.
        block: inner points of a block along each axis.
        blocks: number of blocks in each image.
        iterations: largest number of iterations.
        tolerance: stop when no update moves a point by more than this, lattice steps.
        robustness: a point whose squared difference is this many times the median counts a quarter.
    """

    def __init__(
        self,
        describe: MINDSSC | VGG19Patches,
        transform: str = "affine",
        block: int = 8,
        blocks: int = 128,
        iterations: int = 10,
        tolerance: float = 0.06,
        robustness: float = 4.0,
    ) -> None:
        self.describe = describe
        self.transform = transform
        self.block = block
        self.blocks = blocks
        self.iterations = iterations
        self.tolerance = tolerance
        self.robustness = robustness

    def __call__(
        self,
        transforms: Tensor,
        fixed: Level,
        moving: Level,
        fixed_frame: Frame,
        moving_frame: Frame,
        fixed_weight: Level,
        moving_weight: Level,
        step: float,
        seed: int,
        weigh: bool = False,
    ) -> Refinement:
        """
        Args:
            transforms: ``[N, K, D+1, D+1]`` float64, fixed frame to moving frame; K starts for each pair.
            fixed: images.
            moving: images.
            fixed_frame: of the fixed images.
            moving_frame: of the moving images.
            fixed_weight: how much places count, at least 0.
            moving_weight: likewise.
            step: distance of lattice points, frame units.
            seed: of the choice of blocks.
            weigh: whether to gather the evidence.
        """
        dims = fixed.grid.dims
        n = len(transforms)
        places = (
            _Place(fixed, fixed_frame, fixed_weight),
            _Place(moving, moving_frame, moving_weight),
        )
        blocks = self._lay(places, step, seed)
        basis = generators(self.transform, dims)
        identity = torch.eye(len(basis), dtype=torch.float64)
        current = kept = transforms
        best = torch.full(transforms.shape[:2], torch.inf, dtype=torch.float64)
        kept_overlap = torch.zeros_like(best)
        memory = _Memory()
        for number in range(self.iterations):
            if number > 0 and current.shape[1] > 1:
                order = best.topk((best.shape[1] + 1) // 2, dim=1, largest=False).indices
                current, kept = _pick(current, order), _pick(kept, order)
                best, kept_overlap = torch.gather(best, 1, order), torch.gather(kept_overlap, 1, order)
                memory.pick(order)
            inverse, singular = torch.linalg.inv_ex(current)
            if bool(singular.any()):  # images without sense led there: back to the best, which has an inverse
                current = torch.where(singular[..., None, None] > 0, kept, current)
                inverse = torch.linalg.inv(current)
            full, right, cost, overlap = self._equations(blocks, torch.cat([current, inverse]))
            jacobian = _motions(basis, current, inverse)[..., :dims, :].flatten(-2)
            normal = (jacobian @ full @ jacobian.mT).unflatten(0, (2, n)).sum(0)
            right = (jacobian @ right.unsqueeze(-1)).squeeze(-1).unflatten(0, (2, n)).sum(0)
            cost, overlap = (part.unflatten(0, (2, n)).mean(0) for part in (cost, overlap))
            better = cost < best
            best = torch.where(better, cost, best)
            kept = torch.where(better[..., None, None], current, kept)
            kept_overlap = torch.where(better, overlap, kept_overlap)
            damping = 1e-6 * normal.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-12)
            update = memory(torch.linalg.solve(normal + damping[..., None, None] * identity, right))
            motion = (update @ basis.flatten(1)).unflatten(-1, basis.shape[1:])
            # no farther than the descriptors can see
            reach = motion[..., :dims, :].square().sum((-1, -2)).sqrt() / step
            motion = motion * (4.0 / reach.clamp(min=4.0))[..., None, None]
            current = current @ torch.linalg.matrix_exp(motion)
            if float(reach.max()) < self.tolerance:
                break
        # a last update this small needs no trial
        trusted = better & (reach < 0.5)
        kept = torch.where(trusted[..., None, None], current, kept)
        first = best.argmin(1, keepdim=True)
        final = _pick(kept, first)
        evidence = self._weigh(blocks, final, basis) if weigh else None
        return Refinement(final[:, 0], best.amin(1), torch.gather(kept_overlap, 1, first)[:, 0], evidence)

    def _lay(self, places: tuple[_Place, _Place], step: float, seed: int) -> _Blocks:
        dims = places[0].image.grid.dims
        margin = self.describe.margin
        chosen = [self._corners(place, step, torch.Generator().manual_seed(seed)) for place in places]
        # as many in one as in the other; those that fill up do not count
        count = max(corners.shape[1] for corners, _ in chosen)
        corners = torch.cat([F.pad(part, (0, 0, 0, count - part.shape[1])) for part, _ in chosen])
        counts = torch.cat([F.pad(part, (0, count - part.shape[1])) for _, part in chosen])
        m = len(corners)

        def to_grid(images: tuple[Level, ...], frames: tuple[Frame, ...]) -> Tensor:
            return torch.cat([frame.to_grid(image.grid) for image, frame in zip(images, frames, strict=True)])

        fixed, moving = places
        images, frames = (fixed.image, moving.image), (fixed.frame, moving.frame)
        # one more for the gradient
        where = _placed(corners, self._lattice(corners, step, margin + 1), to_grid(images, frames))
        patches = _looked_up(images, where)
        maps = self.describe(patches.view(m * count, *[self.block + 2 * margin + 2] * dims))
        features, slopes = _with_gradient(maps, step)
        features = features.view(m, count, *features.shape[1:])
        gradient = torch.stack([slope.view(features.shape) for slope in slopes])
        inner = self._lattice(corners, step, 0)
        weights = (fixed.weight, moving.weight)
        seen = _looked_up(weights, _placed(corners, inner, to_grid(weights, frames)))
        coordinates = (corners[:, :, None] + inner).flatten(1, 2)
        coordinates = torch.cat([coordinates.mT, torch.ones_like(coordinates[:, None, :, 0])], dim=1)
        return _Blocks(
            corners=corners,
            step=step,
            coordinates=coordinates,
            products=_products(coordinates, 1),
            weight=(seen.view(m, count, -1) * counts[..., None]).flatten(1),
            features=features,
            gradient=gradient,
            tensor=_tensor(gradient),
            others=images[::-1],
            other_to_grid=to_grid(images[::-1], frames[::-1]),
        )

    def _corners(self, place: _Place, step: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """First inner points of the blocks, ``[N, B, D]`` in the own frame, and 1 or 0 ``[N, B]`` for those to count.

        The blocks stand side by side over the field of view, shifted by a random part of a step, so that their points
        fall between the voxels as those of the other image do. Where there are more than needed, a random choice.
        """
        own, frame, weight = place.image, place.frame, place.weight
        dims, device = own.grid.dims, own.values.device
        width = self.block * step
        unit = float(frame.to_world[0, :dims, :dims].norm(dim=0).mean())
        sides = [m * s / unit for m, s in zip(own.grid.shape, own.grid.spacing, strict=True)]
        cells = [max(1, int(-(-side // width))) for side in sides]
        axes = [(torch.arange(c) - c / 2) * width for c in cells]
        middle = apply_affine(torch.linalg.inv(frame.to_world), own.grid.center.expand(len(frame.to_world), 1, dims))
        jitter = torch.rand(dims, generator=generator)
        corners = torch.cartesian_prod(*axes).view(-1, dims) + (jitter + 0.5) * step
        corners = corners[None] + middle.to(own.values.dtype)
        # how much of the block is foreground, from a few points of it
        probe = torch.cartesian_prod(*[torch.tensor([1 / 4, 3 / 4]) * width] * dims)
        corners = corners.to(device)
        part = _sample(weight.values, _placed(corners, probe.to(corners), frame.to_grid(weight.grid)))
        part = part.view(len(corners), -1, len(probe)).mean(-1)
        part = torch.where(part > 0.1, part, torch.zeros_like(part))
        wanted = min(self.blocks, max(1, int((part > 0).sum(1).max())))
        # weighted choice without replacement (Efraimidis and Spirakis 2006)
        draw = torch.rand(corners.shape[1], generator=generator).clamp(min=1e-6).to(device)
        key = torch.where(part > 0, draw.log() / part.clamp(min=1e-6), torch.full_like(part, -torch.inf))
        chosen = key.topk(wanted, dim=1).indices.sort(dim=1).values
        picked = torch.gather(corners, 1, chosen[..., None].expand(-1, -1, dims))
        return picked, (torch.gather(part, 1, chosen) > 0).to(part.dtype)

    def _compare(self, blocks: _Blocks, pull: Tensor, around: int) -> tuple[Tensor, Tensor, Tensor]:
        """The other images at the blocks.

        Args:
            blocks: of both images.
            pull: ``[M, K, D+1, D+1]``, own frame to other frame.
            around: further lattice points on each side of a block.

        Returns:
            Their descriptors ``[M, K, B, C, *n]`` with ``n = block + 2 around``; the weight of the inner points
            ``[M, K, B * P]``, 0 outside the other's field of view; and the weight's sum on the own side, ``[M, 1]``.
        """
        m, k, dims = pull.shape[0], pull.shape[1], pull.shape[-1] - 1
        margin = self.describe.margin + around
        width = self.block + 2 * margin
        lattice = self._lattice(blocks.corners, blocks.step, margin)
        to_grid = blocks.other_to_grid[:, None] @ pull
        where = _placed(blocks.corners[:, None], lattice, to_grid)
        maps = self.describe(_looked_up(blocks.others, where).view(-1, *[width] * dims))
        maps = maps.view(m, k, -1, *maps.shape[1:])
        inner = to_grid[..., :-1, :].to(blocks.coordinates) @ blocks.coordinates[:, None]
        inside = inner.abs_().amax(2) <= 1
        return maps, blocks.weight[:, None] * inside, blocks.weight.sum(1).clamp(min=1e-6)[:, None]

    def _robust(self, weight: Tensor, square: Tensor) -> Tensor:
        """Less weight for points that disagree more than others: Geman and McClure's function."""
        # the median over a part of the points is as good; an odd step meets all columns of the blocks
        thin = (square.shape[2] // _MEDIAN_OF) | 1
        flat = torch.where(weight[..., ::thin] > 0, square[..., ::thin], torch.nan)
        median = flat.nanmedian(-1, keepdim=True).values.nan_to_num(1.0).clamp(min=1e-6)
        return weight / (1 + square / (self.robustness * median)).square_()

    def _equations(self, blocks: _Blocks, pull: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normal matrix ``[M, K, D(D+1), D(D+1)]`` and right-hand side of all blocks, cost and overlap."""
        m, k, dims = pull.shape[0], pull.shape[1], pull.shape[-1] - 1
        features, weight, total = self._compare(blocks, pull, 0)
        residual = blocks.features[:, None] - features.flatten(4)
        square = residual.square().mean(3).flatten(2)
        worst = self.describe.worst
        cost = ((square.clamp(max=worst) - worst) * weight).sum(2) / total + worst
        overlap = weight.sum(2) / total
        weight = self._robust(weight, square)
        force = torch.stack([(slope[:, None] * residual).sum(3).flatten(2) for slope in blocks.gradient], dim=2)
        moments = (blocks.tensor[:, None] * weight[:, :, None]).flatten(1, 2) @ blocks.products.mT
        right = (force * weight[:, :, None]).flatten(1, 2) @ blocks.coordinates.mT
        # spread the unique entries over the whole matrix
        pair = _square_index(dims, pull.device)
        full = self._spread(moments.view(m, k, -1, moments.shape[-1])[..., pair, :], dims)
        parts = (full, right.view(m, k, dims * (dims + 1)), cost, overlap)
        full, right, cost, overlap = (part.cpu().double() for part in parts)
        return full, right, cost, overlap

    def _spread(self, moments: Tensor, dims: int) -> Tensor:
        """``[..., D, D, products]`` to ``[..., D(D+1), D(D+1)]``."""
        product = _square_index(dims + 1, moments.device)
        full = moments[..., product]  # [..., i, j, e, f]
        size = dims * (dims + 1)
        return full.transpose(-3, -2).reshape(*full.shape[:-4], size, size)

    def _weigh(self, blocks: _Blocks, final: Tensor, basis: Tensor) -> Evidence:
        """The evidence at the final transforms ``[N, 1, D+1, D+1]``.

        The estimate solves sum of g_b = 0 over the blocks of both images. With J the derivative of that sum, whose
        slopes are those of the one image on the left and of the other on the right, its covariance is
        J^-1 (sum of g_b g_b^T) J^-T (Huber 1967), whatever the noise is, as long as blocks err independently.
        """
        n, dims = len(final), final.shape[-1] - 1
        m, size, parameters = 2 * n, dims * (dims + 1), len(basis)
        inverse = torch.linalg.inv(final)
        maps, weight, _ = self._compare(blocks, torch.cat([final, inverse]), 1)
        features, slopes = _with_gradient(maps[:, 0].flatten(0, 1), blocks.step)
        residual = blocks.features - features.view(blocks.features.shape)
        weight = self._robust(weight, residual.square().mean(2).flatten(1)[:, None])[:, 0]
        other = torch.stack([slope.view(blocks.features.shape) for slope in slopes])
        tensor = torch.stack(
            [
                torch.stack([(one * two).sum(2).flatten(1) for two in other], dim=1)  # [M, D, B * P]
                for one in blocks.gradient
            ],
            dim=1,
        )
        cross = (tensor * weight[:, None, None]).flatten(1, 2) @ blocks.products.mT
        cross = self._spread(cross.view(m, dims, dims, -1), dims).cpu().double()
        force = torch.stack([(slope * residual).sum(2) for slope in blocks.gradient], dim=2)  # [M, B, D, P]
        count, points = force.shape[1], force.shape[3]
        coordinates = blocks.coordinates.view(m, dims + 1, count, points).permute(0, 2, 3, 1)
        each = (force * weight.view(m, count, 1, points)) @ coordinates
        change = _motions(basis, final, inverse)[:, 0, :, :dims].flatten(-2)  # [M, P, D(D+1)]
        each = each.reshape(m, count, size).cpu().double() @ change.mT
        jacobian = (change @ cross @ change.mT).view(2, n, parameters, parameters).sum(0)
        scatter = (each.mT @ each).view(2, n, parameters, parameters).sum(0)
        used = (each.abs().amax(-1) > 0).sum(-1).view(2, n).sum(0).double()
        squares = (
            tensor.diagonal(dim1=1, dim2=2).sum(-1),
            _lengths(blocks.tensor, dims),
            _lengths(_tensor(other), dims),
        )
        common, own, others = ((square * weight).sum(-1).cpu().double().view(2, n).sum(0) for square in squares)
        agreement = common / (own * others).sqrt().clamp(min=1e-12)
        # as many equations as blocks: what the parameters use up makes residuals look small
        scatter = scatter * (used / (used - parameters).clamp(min=1))[:, None, None]
        solved = torch.linalg.pinv(jacobian.nan_to_num())
        covariance = solved @ scatter.nan_to_num() @ solved.mT
        known = (jacobian.isfinite() & scatter.isfinite()).flatten(1).all(1)
        return Evidence(covariance.where(known[:, None, None], torch.inf), agreement.nan_to_num(), basis)

    def _lattice(self, corners: Tensor, step: float, around: int) -> Tensor:
        """From a block's first inner point to its points, and ``around`` of them on each side, ``[L, D]``."""
        return _ticks(self.block, around, corners.shape[-1], corners.dtype, corners.device) * step


@lru_cache(maxsize=64)
def _ticks(block: int, around: int, dims: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    ticks = torch.arange(-around, block + around, dtype=dtype, device=device)
    return torch.cartesian_prod(*[ticks] * dims)


# points of a start that the median of the differences is taken of, about
_MEDIAN_OF = 1000


def _with_gradient(maps: Tensor, step: float) -> tuple[Tensor, list[Tensor]]:
    """Maps ``[Q, C, *n]`` without their outermost points, ``[Q, C, P]``, and their slope along each axis there."""
    dims = maps.ndim - 2

    def crop(values: Tensor, axes: list[int]) -> Tensor:
        for axis in axes:
            values = values.narrow(axis + 2, 1, maps.shape[axis + 2] - 2)
        return values

    slopes = []
    for axis in range(dims):
        part = crop(maps, [other for other in range(dims) if other != axis])
        n = maps.shape[axis + 2] - 2
        slopes.append((part.narrow(axis + 2, 2, n) - part.narrow(axis + 2, 0, n)).flatten(2) * (0.5 / step))
    return crop(maps, list(range(dims))).flatten(2), slopes


def _tensor(gradient: Tensor) -> Tensor:
    """Products of slopes ``[D, M, B, C, P]`` along two axes, summed over the channels, ``[M, D(D + 1) / 2, B * P]``."""
    return _products(gradient, 0).sum(3).flatten(2).transpose(0, 1)


def _lengths(products: Tensor, dims: int) -> Tensor:
    """Squared length of the vectors of which these are the products, ``[M, D(D + 1) / 2, S]`` to ``[M, S]``."""
    return products[:, _square_index(dims, products.device).diagonal()].sum(1)


def _motions(basis: Tensor, current: Tensor, inverse: Tensor) -> Tensor:
    """Motions of the fixed frame, then the same as the moving frame sees them, ``[M, K, P, D+1, D+1]``."""
    seen = -(current.unsqueeze(2) @ basis @ inverse.unsqueeze(2))
    return torch.cat([basis.expand(seen.shape), seen])


def _pick(transforms: Tensor, which: Tensor) -> Tensor:
    """Transforms ``[N, K, D+1, D+1]`` number ``which [N, J]``."""
    side = transforms.shape[-1]
    return torch.gather(transforms, 1, which[..., None, None].expand(-1, -1, side, side))


@lru_cache(maxsize=16)
def _square_index(dims: int, device: torch.device) -> Tensor:
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


def _placed(corners: Tensor, lattice: Tensor, to_grid: Tensor) -> Tensor:
    """Where a matrix takes the points of blocks.

    Args:
        corners: ``[..., B, D]``.
        lattice: ``[L, D]``, the same for all blocks.
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
    repeat = _repeat(corners.shape[-1], len(lattice), corners.dtype, corners.device).expand(len(flat), -1, -1)
    return torch.baddbmm(lanes.view(len(flat), 1, -1), flat, repeat).view(*begin.shape[:-1], *lattice.shape)


@lru_cache(maxsize=64)
def _repeat(dims: int, times: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(dims, dtype=dtype, device=device).repeat(1, times)


def _looked_up(images: tuple[Level, ...], where: Tensor) -> Tensor:
    """Values of one image after the other, in its window, at its equal part of the points ``[M, ..., D]``."""
    parts = zip(images, where.chunk(len(images)), strict=True)
    return torch.cat([image.scaled(_sample(image.values, part)) for image, part in parts])


def _sample(values: Tensor, where: Tensor) -> Tensor:
    """Linear interpolation of ``[N, 1, *spatial]`` at ``[N, ..., D]``, ``[N, S]``; outside its border goes on."""
    n, dims = len(values), where.shape[-1]
    where = where.view(n, *[1] * (dims - 1), -1, dims)
    return F.grid_sample(values, where, mode="bilinear", padding_mode="border", align_corners=False).view(n, -1)
