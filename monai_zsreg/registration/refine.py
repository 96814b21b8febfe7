# SPDX-License-Identifier: Apache-2.0
"""The fine stage: Gauss-Newton on local descriptors, sampled in blocks of both images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_zsreg.geometry import apply_affine
from monai_zsreg.networks.mind import MINDSSC
from monai_zsreg.networks.vgg import VGG19Patches
from monai_zsreg.registration.pyramid import Frame, Level

__all__ = ["Refinement", "Refiner", "generators"]


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
class Refinement:
    """
    Attributes:
        transform: ``[N, K, D+1, D+1]`` float64, fixed frame to moving frame.
        cost: ``[N, K]`` mean clipped descriptor difference; lower is better.
        overlap: ``[N, K]`` part of the sampled points that lie in the other image's field of view.
    """

    transform: Tensor
    cost: Tensor
    overlap: Tensor


@dataclass
class _Side:
    """One image's blocks, and how to look the other image up at them."""

    points: Tensor  # [N, B * L, D + 1] all lattice points, own frame, homogeneous
    coordinates: Tensor  # [N, B, P, D + 1] inner points likewise
    products: Tensor  # [N, B, P, (D + 1)(D + 2) / 2] products of the above
    weight: Tensor  # [N, B, P] of the inner points
    features: Tensor  # [N, B, C, P]
    gradient: Tensor  # [N, B, C, D, P]
    other: Tensor  # other image [N, 1, *spatial]
    other_to_grid: Tensor  # [N, D+1, D+1] other frame to grid_sample's coordinates


class Refiner:
    """Improves transforms of one pair, or of a batch of pairs that share their grids, at one level of resolution.

    Both images are sampled in cubic blocks, laid out along their own voxel axes with a common step. For a block of
    the fixed image the moving image is sampled where the current transform takes the block's points, for a block of
    the moving image the fixed one where the inverse takes them, so both images are treated alike. Descriptors are
    made of the samples, hence always in the block's own orientation. The update is Gauss-Newton with the mean of the
    two gradients (Malis 2004: efficient second-order minimization), points weighted by how well they agree.

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
        tolerance: float = 0.01,
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
        """
        n, k, dims = transforms.shape[0], transforms.shape[1], fixed.grid.dims
        device = fixed.values.device
        sides = [
            self._side(fixed, moving, fixed_frame, moving_frame, fixed_weight, step, seed),
            self._side(moving, fixed, moving_frame, fixed_frame, moving_weight, step, seed),
        ]
        basis = generators(self.transform, dims)
        current = kept = transforms
        best = torch.full((n, k), torch.inf, dtype=torch.float64)
        kept_overlap = torch.zeros(n, k, dtype=torch.float64)
        for _ in range(self.iterations):
            inverse = torch.linalg.inv(current)
            cost = torch.zeros(n, k, dtype=torch.float64)
            overlap = torch.zeros(n, k, dtype=torch.float64)
            total = torch.zeros(n, k, len(basis), len(basis), dtype=torch.float64)
            right_side = torch.zeros(n, k, len(basis), dtype=torch.float64)
            # a motion of the fixed frame, and the same as the moving frame sees it
            motions = (basis.expand(n, k, -1, -1, -1), -(current.unsqueeze(2) @ basis @ inverse.unsqueeze(2)))
            for side, pull, moved in zip(sides, (current, inverse), motions, strict=True):
                normal, right, side_cost, side_overlap = self._equations(side, pull.to(device), step)
                jacobian = moved[..., :dims, :].flatten(-2)
                total += jacobian @ normal @ jacobian.mT
                right_side += (jacobian @ right.unsqueeze(-1)).squeeze(-1)
                cost += side_cost / 2
                overlap += side_overlap / 2
            better = cost < best
            best = torch.where(better, cost, best)
            kept = torch.where(better[..., None, None], current, kept)
            kept_overlap = torch.where(better, overlap, kept_overlap)
            damping = 1e-6 * total.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-12)
            total = total + damping[..., None, None] * torch.eye(len(basis), dtype=torch.float64)
            update = torch.linalg.solve(total, right_side)
            motion = torch.einsum("nkp,pij->nkij", update, basis)
            # no farther than the descriptors can see
            reach = motion[..., :dims, :].square().sum((-1, -2)).sqrt() / step
            motion = motion * (4.0 / reach.clamp(min=4.0))[..., None, None]
            current = current @ torch.linalg.matrix_exp(motion)
            if float(reach.max()) < self.tolerance:
                break
        return Refinement(kept, best, kept_overlap)

    def _side(
        self, own: Level, other: Level, own_frame: Frame, other_frame: Frame, weight: Level, step: float, seed: int
    ) -> _Side:
        device, dims = own.values.device, own.grid.dims
        n = len(own.values)
        margin = self.describe.margin + 1  # one more for the gradient
        generator = torch.Generator().manual_seed(seed)
        corners, block_weight = self._corners(own, own_frame, weight, step, generator)
        count = corners.shape[1]
        side = self.block + 2 * margin
        ticks = (torch.arange(side, dtype=torch.float32, device=device) - margin) * step
        lattice = torch.cartesian_prod(*[ticks] * dims)
        points = _with_one(corners[:, :, None] + lattice)
        inner_ticks = ticks[margin : side - margin]
        coordinates = _with_one(corners[:, :, None] + torch.cartesian_prod(*[inner_ticks] * dims))
        to_grid = own_frame.to_grid(own.grid)
        patches = _look_up(own.values, to_grid, points.flatten(1, 2)).view(n * count, *[side] * dims)
        features, gradient = self._describe(patches, step)
        weights = _look_up(weight.values, own_frame.to_grid(weight.grid), coordinates.flatten(1, 2)).view(n, count, -1)
        rows, columns = torch.triu_indices(dims + 1, dims + 1)
        return _Side(
            points=points.flatten(1, 2),
            coordinates=coordinates,
            products=coordinates[..., rows] * coordinates[..., columns],
            weight=weights * block_weight[..., None],
            features=features.view(n, count, *features.shape[1:]),
            gradient=gradient.view(n, count, *gradient.shape[1:]),
            other=other.values,
            other_to_grid=other_frame.to_grid(other.grid),
        )

    def _corners(
        self, own: Level, frame: Frame, weight: Level, step: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """First inner points of the blocks, ``[N, B, D]`` in the own frame, and 1 or 0 ``[N, B]`` for those to count.

        The blocks stand side by side over the field of view, shifted by a random part of a step, so that their points
        fall between the voxels as those of the other image do. Where there are more than needed, a random choice.
        """
        dims, device = own.grid.dims, own.values.device
        width = self.block * step
        sides = torch.tensor([m * s for m, s in zip(own.grid.shape, own.grid.spacing, strict=True)])
        unit = float(frame.to_world[0, :dims, :dims].norm(dim=0).mean())
        cells = [max(1, int(-(-float(s) / unit // width))) for s in sides]
        axes = [(torch.arange(c) - c / 2) * width for c in cells]
        middle = apply_affine(torch.linalg.inv(frame.to_world), own.grid.center.expand(len(frame.to_world), 1, dims))
        jitter = torch.rand(dims, generator=generator)
        corners = (torch.cartesian_prod(*axes).view(-1, dims) + (jitter + 0.5) * step)[None] + middle.float()
        # how much of the block is foreground, from a few points of it
        probe = torch.cartesian_prod(*[torch.tensor([1 / 8, 3 / 8, 5 / 8, 7 / 8]) * width] * dims)
        where = _with_one(corners[:, :, None] + probe).to(device)
        part = _look_up(weight.values, frame.to_grid(weight.grid), where.flatten(1, 2))
        part = part.view(len(corners), -1, len(probe)).mean(-1)
        part = torch.where(part > 0.1, part, torch.zeros_like(part))
        corners = corners.to(device)
        wanted = min(self.blocks, max(1, int((part > 0).sum(1).max())))
        # weighted choice without replacement (Efraimidis and Spirakis 2006)
        draw = torch.rand(corners.shape[1], generator=generator).clamp(min=1e-6).to(device)
        key = torch.where(part > 0, draw.log() / part.clamp(min=1e-6), torch.full_like(part, -torch.inf))
        chosen = key.topk(wanted, dim=1).indices.sort(dim=1).values
        picked = torch.gather(corners, 1, chosen[..., None].expand(-1, -1, dims))
        return picked, (torch.gather(part, 1, chosen) > 0).float()

    def _describe(self, patches: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Descriptors ``[Q, C, P]`` of the inner points, and their gradient ``[Q, C, D, P]`` per frame unit."""
        maps = self.describe(patches)
        dims = maps.ndim - 2
        inner = maps
        for axis in range(dims):
            inner = inner.narrow(axis + 2, 1, maps.shape[axis + 2] - 2)
        slopes = []
        for axis in range(dims):
            part = maps
            for other in range(dims):
                if other != axis:
                    part = part.narrow(other + 2, 1, maps.shape[other + 2] - 2)
            n = maps.shape[axis + 2] - 2
            slopes.append((part.narrow(axis + 2, 2, n) - part.narrow(axis + 2, 0, n)).flatten(2))
        return inner.flatten(2), torch.stack(slopes, dim=2) * (0.5 / step)

    def _equations(self, side: _Side, pull: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normal matrix ``[N, K, D(D+1), D(D+1)]`` and right-hand side of all blocks, cost and overlap."""
        n, k, dims = pull.shape[0], pull.shape[1], pull.shape[-1] - 1
        count, points = side.features.shape[1], side.coordinates.shape[2]
        width = self.block + 2 * (self.describe.margin + 1)
        to_grid = side.other_to_grid.to(pull.device)[:, None] @ pull
        patches = _look_up(side.other, to_grid, side.points)
        features, gradient = self._describe(patches.view(n * k * count, *[width] * dims), step)
        features = features.view(n, k, count, -1, points)
        gradient = gradient.view(n, k, count, -1, dims, points)
        residual = side.features[:, None] - features
        slope = (gradient + side.gradient[:, None]) / 2
        where = side.coordinates.flatten(1, 2)[:, None] @ to_grid[..., :dims, :].float().mT
        inside = (where.abs() <= 1).all(-1).view(n, k, count, points)
        weight = side.weight[:, None] * inside
        square = residual.square().mean(3)
        weight_sum = side.weight.sum((1, 2)).clamp(min=1e-6)[:, None]
        cost = ((square.clamp(max=self.describe.worst) - self.describe.worst) * weight).sum(
            (2, 3)
        ) / weight_sum + self.describe.worst
        overlap = weight.sum((2, 3)) / weight_sum
        # the median over a part of the points is as good
        thin = 1 + square[0, 0].numel() // 20000
        flat, use = square.flatten(2)[..., ::thin], weight.flatten(2)[..., ::thin] > 0
        median = torch.where(use, flat, torch.full_like(flat, torch.nan)).nanmedian(-1).values.nan_to_num(1.0)
        weight = weight / (1 + square / (self.robustness * median.clamp(min=1e-6))[..., None, None]).square()
        rows, columns = torch.triu_indices(dims, dims)
        tensor = torch.stack(
            [(slope[:, :, :, :, i] * slope[:, :, :, :, j]).sum(3) for i, j in zip(rows, columns, strict=True)], dim=3
        )
        force = torch.stack([(slope[:, :, :, :, i] * residual).sum(3) for i in range(dims)], dim=3)
        weight = weight[:, :, :, None]
        moments = ((tensor * weight) @ side.products[:, None]).double().sum(2)
        right = ((force * weight) @ side.coordinates[:, None]).double().sum(2)
        # spread the unique entries over the whole matrix
        pair, product = _square_index(dims, pull.device), _square_index(dims + 1, pull.device)
        full = moments[..., pair[:, :, None, None], product[None, None]]  # [..., i, j, e, f]
        size = dims * (dims + 1)
        full = full.permute(0, 1, 2, 4, 3, 5).reshape(n, k, size, size)
        return full.cpu(), right.reshape(n, k, size).cpu(), cost.cpu().double(), overlap.cpu().double()


def _square_index(dims: int, device: torch.device) -> Tensor:
    """Position of entry (i, j) of a symmetric matrix among its upper triangle's, ``[dims, dims]``."""
    index = torch.zeros(dims, dims, dtype=torch.long, device=device)
    rows, columns = torch.triu_indices(dims, dims, device=device)
    number = torch.arange(len(rows), device=device)
    index[rows, columns] = number
    index[columns, rows] = number
    return index


def _with_one(points: Tensor) -> Tensor:
    return torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)


def _look_up(values: Tensor, to_grid: Tensor, points: Tensor) -> Tensor:
    """Linear interpolation at points; outside the image its border goes on.

    Args:
        values: ``[N, 1, *spatial]``.
        to_grid: ``[N, D+1, D+1]`` or, for K transforms at once, ``[N, K, D+1, D+1]``.
        points: ``[N, S, D+1]``, the last coordinate 1.

    Returns:
        ``[N, S]`` or ``[N, K, S]``.
    """
    matrix = to_grid.to(values.device, torch.float32)
    dims = matrix.shape[-1] - 1
    spread = points if matrix.ndim == 3 else points[:, None]
    where = spread @ matrix[..., :dims, :].mT
    shape = where.shape[:-1]
    where = where.reshape(len(values), *[1] * (dims - 1), -1, dims)
    found = F.grid_sample(values, where, mode="bilinear", padding_mode="border", align_corners=False)
    return found.view(shape)
