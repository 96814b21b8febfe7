# SPDX-License-Identifier: Apache-2.0
"""The fine stage: Gauss-Newton on local descriptors, sampled in blocks of both images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from monai_zsreg.geometry import apply_affine
from monai_zsreg.registration.blocks import Blocks, square_index

# how much farther than Gauss-Newton a step may go, in steps
_FARTHEST = 2.0
# displacements of the object that each rigid motion is tried at, lattice steps
_TRIED = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# what tells a displaced place from the answer: the part of its likeness that is lost, and standard errors of that
_LOST, _ERRORS = 0.07, 2.0
# where structure is displaced half as far it loses at most this part
_GROWS = 0.5
# distance of blocks that may move together, block widths; what they have in common of how far they move, as measured on
# brains that were bent smoothly by 0.5 to 2 voxels
_NEAR, _COMMON = 2.0, 0.6
# how far interpolation alone moves neighboring blocks together, lattice steps, at most
_SLIGHT = 0.15
# standard deviation of a motion that is not told from none up to here, before calibration
_PART = 0.25
# places at random that an answer is held against: their number, standard deviations of rotation (radians) and shift
# (object radii), and the part of them that may fit as well
_PLACES, _TURNED, _SHIFTED, _SHARE = 24, 0.4, 0.25, 0.1
# transforms that are looked at together: more do not fit the cache
_TOGETHER = 6
# what it costs to stretch more than at the start, beside the points' own equations, by number of dimensions: a slab
# hardly tells how it is stretched across
_STIFF = {2: 5e3, 3: 5e4}


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
class Refinement:
    """
    Attributes:
        transform: ``[J, D+1, D+1]`` float64, fixed frame to moving frame, best first.
        cost: ``[J]`` mean clipped descriptor difference; lower is better.
        origin: ``[J]`` which start each came from.
    """

    transform: Tensor
    cost: Tensor
    origin: Tensor


@dataclass
class Evidence:
    """How well images determine the transform between them, for a motion of the fixed frame.

    Attributes:
        covariance: ``[P, P]`` of the motion, by the sandwich of the blocks' equations.
        agreement: how alike the slopes of the two images' descriptors are: 1 for the same image, about a half for two
            contrasts of one brain, near 0 where nothing corresponds.
        beyond: root mean square of how far neighboring blocks would move together from where the transform takes
            them, frame units; 0 where they do not agree on it by more than chance and interpolation.
        basis: ``[P, D+1, D+1]``, the motions.
        update: ``[P]``, the motion that would solve the blocks' equations.
    """

    covariance: Tensor
    agreement: float
    beyond: float
    basis: Tensor
    update: Tensor

    @property
    def spread(self) -> float:
        """Root mean square of the error over the object, frame units; see `distance`."""
        dims = self.basis.shape[-1] - 1
        linear, shift = self.basis[:, :dims, :dims].flatten(1), self.basis[:, :dims, dims]
        square = float((self.covariance * (linear @ linear.mT / dims + shift @ shift.mT)).sum())
        return math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.inf


class _Memory:
    """Anderson's acceleration with a memory of one step.

    The gradients of two modalities agree in part, so that each Gauss-Newton update closes about the same fraction of
    what is left, in vivo half of it. How much the last update has changed by the last step tells the rest.
    """

    def __init__(self) -> None:
        self.update: Tensor | None = None
        self.step: Tensor | None = None

    def __call__(self, update: Tensor) -> Tensor:
        """The step to take, ``[K, P]``, where Gauss-Newton says ``update``."""
        step = update
        if self.update is not None and self.step is not None:
            change = update - self.update
            part = (update * change).sum(-1, keepdim=True) / change.square().sum(-1, keepdim=True).clamp(min=1e-30)
            step = update - part.clamp(-_FARTHEST, 0.0) * (self.step + change)
        self.update, self.step = update, step
        return step

    def pick(self, which: Tensor) -> None:
        """Go on with starts number ``which [J]``."""
        if self.update is not None and self.step is not None:
            self.update, self.step = self.update[which], self.step[which]


def refine(
    blocks: Blocks,
    starts: Tensor,
    transform: str = "affine",
    iterations: int = 10,
    results: int = 1,
    tolerance: float = 0.06,
) -> Refinement:
    """Improve transforms at one level of resolution.

    For a block of the fixed image the moving image is sampled where the current transform takes the block's points,
    for a block of the moving image the fixed one where the inverse takes them, so both images are treated alike. The
    update is Gauss-Newton with the gradients of the blocks' own descriptors, which are made once (Baker and Matthews
    2004: inverse composition), points weighted by how well they agree. Of several starts the worse half is given up
    after each iteration.

    Args:
        blocks: of both images.
        starts: ``[K, D+1, D+1]`` float64, fixed frame to moving frame.
        transform: kind of transform.
        iterations: largest number of iterations.
        results: number of starts that are never given up.
        tolerance: stop when no update moves a point by more than this, lattice steps.
    """
    dims = blocks.dims
    basis = generators(transform, dims)
    identity = torch.eye(len(basis), dtype=torch.float64)
    current = kept = starts
    best = torch.full((len(starts),), torch.inf, dtype=torch.float64)
    origin = torch.arange(len(starts))
    memory = _Memory()
    stretch = 0.5 * (basis + basis.mT)[:, :dims, :dims]
    stiff, strain = torch.einsum("pij,qij->pq", stretch, stretch), _strain(starts)
    for number in range(iterations):
        going = max(results, (len(current) + 1) // 2)
        if number > 0 and going < len(current):
            order = best.topk(going, largest=False).indices
            current, kept, best = current[order], kept[order], best[order]
            origin, strain = origin[order], strain[order]
            memory.pick(order)
        inverse, singular = torch.linalg.inv_ex(current)
        if bool(singular.any()):  # images without sense led there: back to the best, which has an inverse
            current = torch.where(singular[:, None, None] > 0, kept, current)
            inverse = torch.linalg.inv(current)
        some = [blocks.equations(part) for part in torch.stack([current, inverse]).split(_TOGETHER, 1)]
        full, right, costs = (torch.cat(part, 1) for part in zip(*some, strict=True))
        jacobian = _motions(basis, current, inverse)[..., :dims, :].flatten(-2)
        normal = (jacobian @ full @ jacobian.mT).sum(0)
        right = (jacobian @ right.unsqueeze(-1)).squeeze(-1).sum(0)
        cost = costs.mean(0)
        weight = _STIFF[dims] * cost
        normal = normal + weight[:, None, None] * stiff
        right = right - weight[:, None] * torch.einsum("kij,pij->kp", _strain(current) - strain, stretch)
        better = cost < best
        best = torch.where(better, cost, best)
        kept = torch.where(better[:, None, None], current, kept)
        damping = 1e-6 * normal.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-12)
        update = memory(torch.linalg.solve(normal + damping[:, None, None] * identity, right))
        motion = (update @ basis.flatten(1)).unflatten(-1, basis.shape[1:])
        # no farther than the descriptors can see
        reach = motion[..., :dims, :].square().sum((-1, -2)).sqrt() / blocks.step
        motion = motion * (4.0 / reach.clamp(min=4.0))[:, None, None]
        current = current @ torch.linalg.matrix_exp(motion)
        if float(reach.max()) < tolerance:
            break
    # a last update this small needs no trial
    kept = torch.where((better & (reach < 0.5))[:, None, None], current, kept)
    order = best.topk(min(results, len(best)), largest=False).indices
    return Refinement(kept[order], best[order], origin[order])


def lead_of(blocks: Blocks, transforms: Tensor) -> tuple[Tensor, Tensor]:
    """How much better the first of several transforms fits than each of the others, on the same points.

    Args:
        blocks: of both images.
        transforms: ``[K, D+1, D+1]``, fixed frame to moving frame.

    Returns:
        Mean difference of the costs, ``[K]``, and the same in standard errors, from how it varies between the blocks;
        positive where the first is better.
    """
    pull = torch.stack([transforms, torch.linalg.inv(transforms)])
    sums, weight = zip(*[blocks.differences(part) for part in pull.split(_TOGETHER, 1)], strict=True)
    return _ahead(torch.cat(sums), weight[0])


def _ahead(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `lead_of`, of what `Blocks.differences` says."""
    total = weight.sum().clamp(min=1e-9)
    gap = sums - sums[:1]
    mean = gap.sum(1) / total
    used = (weight > 0).sum().clamp(min=2)
    scatter = (gap - mean[:, None] * weight).square().sum(1) * used / (used - 1)
    return mean, mean / (scatter.sqrt() / total).clamp(min=1e-12)


def standing(blocks: Blocks, final: Tensor) -> float:
    """How clearly a transform ``(D+1, D+1)`` fits better than nine of ten places at random around it, standard errors.

    Two contrasts may have little in common, but what they have they have at one place alone.
    """
    basis = generators("rigid", blocks.dims)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(_PLACES, len(basis), generator=generator, dtype=torch.float64)
    motion = torch.einsum("kp,pij->kij", draw, basis)
    motion[:, :-1, :-1] *= _TURNED
    motion[:, :-1, -1] *= _SHIFTED
    ahead = lead_of(blocks, torch.cat([final[None], final @ torch.linalg.matrix_exp(motion)]))[1]
    return float(ahead[1:].quantile(_SHARE))


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Root mean square distance of where transforms ``[..., D+1, D+1]`` take the object, frame units, ``[...]``.

    The object has a root mean square radius of one unit about the fixed frame's origin.
    """
    change = (one - other)[..., :-1, :]
    dims = change.shape[-2]
    return (change[..., :-1].square().sum((-1, -2)) / dims + change[..., -1].square().sum(-1)).sqrt()


def weigh(blocks: Blocks, final: Tensor, transform: str = "affine") -> Evidence:
    """The evidence at the final transform ``(D+1, D+1)``.

    The estimate solves sum of g_b = 0 over the blocks of both images. With J the derivative of that sum, whose slopes
    are those of the one image on the left and of the other on the right, its covariance is J^-1 (sum of g_b g_b^T) J^-T
    (Huber 1967), whatever the noise is, as long as blocks err independently.
    """
    dims = blocks.dims
    basis = generators(transform, dims)
    inverse = torch.linalg.inv(final)
    residual, other, weight = blocks.other_slopes(torch.stack([final, inverse]))
    tensor = torch.stack(
        [torch.stack([(one * two).sum(2).flatten(1) for two in other], dim=1) for one in blocks.gradient], dim=1
    )  # [2, D, D, B * P]
    cross = (tensor * weight[:, None, None]).flatten(1, 2) @ blocks.products.mT
    cross = blocks.spread(cross.view(2, dims, dims, -1)).cpu().double()
    force = torch.stack([(slope * residual).sum(2) for slope in blocks.gradient], dim=2)  # [2, B, D, P]
    count, points = force.shape[1], force.shape[3]
    coordinates = blocks.coordinates.view(2, dims + 1, count, points).permute(0, 2, 3, 1)
    each = (force * weight.view(2, count, 1, points)) @ coordinates
    change = _motions(basis, final[None], inverse[None])[:, 0, :, :dims].flatten(-2)  # [2, P, D(D+1)]
    each = each.reshape(2, count, dims * (dims + 1)).cpu().double() @ change.mT
    jacobian = (change @ cross @ change.mT).sum(0)
    scatter = (each.mT @ each).sum(0)
    used = float((each.abs().amax(-1) > 0).sum())
    own = blocks.tensor[:, square_index(dims, tensor.device).diagonal()].sum(1)
    squares = (tensor.diagonal(dim1=1, dim2=2).sum(-1), own, other.square().sum(3).flatten(2).sum(0))
    common, left, right = (float((square * weight).sum().cpu().double()) for square in squares)
    agreement = common / max((left * right) ** 0.5, 1e-12)
    # as many equations as blocks: what the parameters use up makes residuals look small
    scatter = scatter * (used / max(used - len(basis), 1.0))
    if not bool(jacobian.isfinite().all() and scatter.isfinite().all()):
        return Evidence(torch.full_like(jacobian, torch.inf), 0.0, 0.0, basis, torch.zeros_like(scatter[0]))
    solved = torch.linalg.pinv(jacobian)
    covariance, agreement = solved @ scatter @ solved.mT, agreement if agreement == agreement else 0.0
    shift = (force * weight.view(2, count, 1, points)).sum(-1).cpu().double()
    stiff = (tensor.diagonal(dim1=1, dim2=2).mean(-1) * weight).view(2, count, points).sum(-1).cpu().double()
    beyond = _beyond(shift, stiff, blocks.apart())
    beyond = beyond if beyond > _SLIGHT * blocks.step else 0.0
    return Evidence(covariance, agreement, beyond, basis, solved @ each.sum((0, 1)))


def settled(transform: Tensor, evidence: list[Evidence]) -> Tensor:
    """What several levels say together of one transform ``(D+1, D+1)``, each weighed by its covariance.

    Which lattice shows most is known afterwards only: voxels may be finer than what an image shows.
    """
    known = [torch.linalg.pinv(one.covariance.nan_to_num(posinf=0.0)) for one in evidence]
    right = torch.stack([matrix @ one.update for matrix, one in zip(known, evidence, strict=True)])
    update = torch.linalg.pinv(torch.stack(known).sum(0)) @ right.sum(0)
    return transform @ torch.linalg.matrix_exp(torch.tensordot(update, evidence[0].basis, 1))


def _beyond(shift: Tensor, stiff: Tensor, apart: Tensor) -> float:
    """See `Evidence`. What blocks have in common with their neighbors is no noise.

    Args:
        shift: ``[2, B, D]``, the sums of the slopes times the residuals.
        stiff: ``[2, B]``, the slopes squared along one axis, which such a sum is the shift times of.
        apart: ``[2, B, B, D]``, distance of the blocks, block widths.
    """
    near = (1 - apart / _NEAR).clamp(min=0).prod(-1)
    near.diagonal(dim1=1, dim2=2).zero_()
    squares = shift.square().sum(-1)
    common, chance, scale = (
        float((one.mT @ matrix @ one).diagonal(dim1=1, dim2=2).sum())
        for one, matrix in ((shift, near), (squares[..., None], near.square()), (stiff[..., None], near))
    )
    sure = common > _ERRORS * (2 * chance / shift.shape[-1]) ** 0.5 and scale > 0
    return (common / scale) ** 0.5 / _COMMON if sure else 0.0


def loose(lattices: Sequence[Blocks], final: Tensor, evidence: Evidence, points: Tensor) -> Tensor:
    """What the covariance ``[P, P]`` lacks of motions that the images do not tell from none: of a disc, along a tube.

    Slopes say how a cost begins to rise, and edges of single voxels or noise have slopes too. Here the object is
    displaced, about and along its principal axes, farther and farther until the images are seen to differ more, at one
    of several resolutions: voxels may be finer than what an image shows.

    Args:
        lattices: blocks of both images, coarse to fine.
        final: ``(D+1, D+1)``, fixed frame to moving frame.
        evidence: of the level that is surest.
        points: ``[N, D]``, the object in the fixed frame.
    """
    own = torch.eye(points.shape[1] + 1, dtype=torch.float64)
    own[:-1, -1] = points.mean(0)
    centered = points - points.mean(0)
    own[:-1, :-1] = torch.linalg.eigh(centered.mT @ centered).eigenvectors
    step = lattices[-1].step
    motions = own @ generators("rigid", lattices[-1].dims) @ torch.linalg.inv(own)
    size = apply_affine(motions, points).square().sum(2).mean(1).sqrt()
    motions = motions * (step / size.clamp(min=step))[:, None, None]
    parts = torch.linalg.lstsq(evidence.basis.flatten(1).mT, motions.flatten(1).mT).solution
    along = torch.linalg.pinv(parts)
    known = (along @ evidence.covariance @ along.mT).diagonal()

    some, every = _Displaced(lattices[-1].half(), final), [_Displaced(blocks, final) for blocks in lattices]
    going, tried = torch.arange(len(motions)), []
    for reach in _TRIED:
        told = torch.full((2, len(motions)), torch.nan, dtype=torch.float64)
        told[:, going] = some.told(reach * motions[going])
        tried.append(told)
        # what is told twice as clearly as it must be on one side is told on the other
        going = going[~(told[:, going].amin(0) >= 2.0)]
        if len(going):
            told[:, going] = torch.minimum(told[:, going], some.told(-reach * motions[going]))
            going = going[~(told[:, going].amin(0) >= 1.0)]
        if not len(going):
            break
    lost, errors = torch.stack(tried, dim=1)  # [tried, P] each
    # edges of voxels and noise cost at once what they cost, structure the more the farther it is displaced
    grows = ~(lost[:-1] > _GROWS * lost[1:]).any(0)
    grows[going] = False  # nothing was told at all
    untold = ~((errors >= 1.0) & ((lost >= 1.0) | grows)) & ~lost.isnan()
    # what would widen the bound is asked of all blocks, first of coarse ones, which are fewer
    for number, reach in reversed(list(enumerate(_TRIED[: len(tried)]))):
        doubtful = untold[number] & ~untold[number + 1 :].any(0) & ~((_PART * reach) ** 2 <= known)
        for one in every:
            asked = doubtful.nonzero().flatten()
            for sign in (1, -1):
                if len(asked):
                    asked = asked[one.told(sign * reach * motions[asked]).amin(0) >= 1.0]
            doubtful[asked], untold[number, asked] = False, False
    free = _PART * (untold * torch.tensor(_TRIED[: len(tried)], dtype=torch.float64)[:, None]).amax(0)
    return (parts * (free.square() - known).clamp(min=0.0)) @ parts.mT


class _Displaced:
    """How clearly blocks tell a transform ``(D+1, D+1)`` from displaced ones."""

    def __init__(self, blocks: Blocks, final: Tensor) -> None:
        self.blocks, self.final = blocks, final

    @cached_property
    def _there(self) -> tuple[Tensor, Tensor]:
        return self._differences(self.final[None])

    def _differences(self, transforms: Tensor) -> tuple[Tensor, Tensor]:
        return self.blocks.differences(torch.stack([transforms, torch.linalg.inv(transforms)]))

    def told(self, motions: Tensor) -> Tensor:
        """Likeness that motions ``[K, D+1, D+1]`` lose, and its standard errors, ``[2, K]``; 1 where just told."""
        there, weight = self._there
        likeness = self.blocks.chance - float(there.sum() / weight.sum().clamp(min=1e-9))
        sums, _ = self._differences(self.final @ torch.linalg.matrix_exp(motions))
        lost, errors = _ahead(torch.cat([there, sums]), weight)
        return torch.stack([lost[1:] / max(_LOST * likeness, 1e-12), errors[1:] / _ERRORS])


def _strain(transforms: Tensor) -> Tensor:
    """Logarithm of how transforms ``[K, D+1, D+1]`` stretch, ``[K, D, D]``, symmetric."""
    linear = transforms[:, :-1, :-1]
    values, vectors = torch.linalg.eigh(linear.mT @ linear)
    return (vectors * (0.5 * values.clamp(min=1e-12).log())[:, None]) @ vectors.mT


def _motions(basis: Tensor, current: Tensor, inverse: Tensor) -> Tensor:
    """Motions of the fixed frame, then the same as the moving frame sees them, ``[2, K, P, D+1, D+1]``."""
    seen = -(current.unsqueeze(1) @ basis @ inverse.unsqueeze(1))
    return torch.stack([basis.expand(seen.shape), seen])
