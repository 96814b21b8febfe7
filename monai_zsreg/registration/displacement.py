# SPDX-License-Identifier: Apache-2.0
"""A smooth, invertible map: a displacement on a lattice of its own, then an affine matrix."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, apply_affine, checked_matrix, lattice_index
from monai_zsreg.io.displacement import read_composite, read_displacement, write_composite, write_displacement
from monai_zsreg.resample import resample

# points that are worked on at a time: what fits a core's cache
_BLOCK = 2**17
# lattice steps within which an inverse counts as found, and how long it is looked for
_CLOSE, _LONGEST = 1e-4, 60


@dataclass(eq=False)
class Deformation:
    """The map ``x -> affine (x + displacement(x))`` from the fixed world to the moving world, RAS mm.

    Between the points of the lattice the displacement is interpolated linearly; beyond its edge it goes on as it is
    there. Files of ITK and ANTs with this lattice mean the same map.

    Attributes:
        affine: ``(D+1, D+1)`` float64 on the CPU.
        displacement: ``[D, *lattice]`` float32, mm along the axes of the fixed world.
        grid: the lattice, in the fixed world.
    """

    affine: Tensor
    displacement: Tensor = field(repr=False)
    grid: Grid
    _forward: Deformation | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        dims = self.grid.dims
        self.affine = checked_matrix(self.affine, dims, "affine")
        if tuple(self.displacement.shape) != (dims, *self.grid.shape):
            raise RegistrationError(
                "displacement", tuple(self.displacement.shape), f"{(dims, *self.grid.shape)}, as its lattice has it"
            )

    @property
    def dims(self) -> int:
        """Number of spatial dimensions, D."""
        return self.grid.dims

    def apply(self, points: Any) -> Any:
        """Where points of the fixed world are in the moving world.

        Args:
            points: ``[N, D]``, RAS mm, an array or a tensor.

        Returns:
            ``[N, D]`` float64, an array or a tensor as ``points``.

        Raises:
            RegistrationError: points of another shape.
        """
        given = torch.as_tensor(points, dtype=torch.float64)
        if given.ndim != 2 or given.shape[1] != self.dims:
            raise RegistrationError("points", tuple(given.shape), f"[N, {self.dims}]")
        places = given.cpu()
        if self._forward is None:
            found = apply_affine(self.affine, places + self._at(places))
        else:
            # an inverse knows its map, so that points need not go by what lies between the lattice
            found = self._forward._solve(apply_affine(self.affine, places))
        return found.numpy() if isinstance(points, np.ndarray) else found.to(given.device)

    def inverse(self) -> Deformation:
        """The map from the moving world to the fixed world, of the same kind.

        Its lattice is this one as ``affine`` lays it into the moving world. There it is exact to 1e-4 lattice steps,
        and so it is for points that are given to `apply`.
        """
        if self._forward is not None:
            return self._forward
        back = torch.linalg.inv(self.affine)
        found = torch.empty_like(self.displacement)
        flat = found.flatten(1)
        count = flat.shape[1]
        for start in range(0, count, _BLOCK):
            numbers = torch.arange(start, min(start + _BLOCK, count))
            index = lattice_index(numbers, self.grid.shape).double()
            points = apply_affine(self.grid.affine, index)
            # the displacement of the inverse comes first too: of points of the moving world, along its axes
            moved = (self._solve(points) - points) @ self.affine[: self.dims, : self.dims].mT
            flat[:, start : start + len(numbers)] = moved.mT.to(flat)
        return Deformation(back, found, replace(self.grid, affine=self.affine @ self.grid.affine), self)

    def jacobian(self) -> Tensor:
        """How the displacement changes volumes: the Jacobian determinant of ``x + displacement(x)``, ``[1, *lattice]``.

        By central differences; above 1 the moving image's tissue is larger, beside what ``affine`` does.
        """
        return determinant(self._steps())[None]

    def folds(self) -> int:
        """Number of points of the lattice where any one-sided Jacobian determinant is 0 or less."""
        return int((least_determinant(self._steps()) <= 0).sum())

    def resample(
        self,
        values: Tensor,
        source: Grid,
        target: Grid,
        mode: str = "bilinear",
        fill: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """An image of the moving world on a grid of the fixed world, interpolated once.

        Args:
            values: ``[C, *spatial]``, any real type.
            source: lattice of ``values``.
            target: lattice of the result.
            mode: see `monai_zsreg.resample.resample`, as the next two.
            fill: value outside.
            dtype: of the result.

        Returns:
            ``[C, *target.shape]`` on the device of ``values``.
        """
        to_lattice = target.index_pull(torch.eye(self.dims + 1, dtype=torch.float64), self.grid)
        # the displacement as indices of the moving image
        linear = (torch.linalg.inv(source.affine) @ self.affine)[: self.dims, : self.dims]
        steps = torch.einsum("ij,j...->i...", linear.to(self.displacement), self.displacement).to(values.device)

        def shifts(index: Tensor) -> Tensor:
            return _sample(steps, apply_affine(to_lattice, index).to(values.device, torch.float32))

        return resample(values, source, target, self.affine, mode, fill, dtype, shifts)

    def save(self, path: str | os.PathLike, grid: Grid | None = None) -> None:
        """Write the whole map, ``affine`` included, for ITK and ``antsApplyTransforms -t``.

        Args:
            path: ends in ``.nii`` or ``.nii.gz``, a displacement field; or in ``.h5``, a composite transform in which
                the matrix is apart.
            grid: where to state it, in the world that the map starts from; None for its own lattice, which loses
                nothing. An inverse has no lattice with orthogonal axes: give it the grid of the moving image.

        Raises:
            RegistrationError: another suffix, or a lattice that such a file cannot hold.
        """
        if os.fspath(path).lower().endswith(".h5"):
            bent = self if grid is None else sampled(self.apply, grid, self.affine)
            write_composite(path, bent.displacement, bent.grid, bent.affine)
            return
        grid = self.grid if grid is None else grid
        write_displacement(path, sampled(self.apply, grid).displacement, grid)

    @classmethod
    def load(cls, path: str | os.PathLike, affine: Any = None) -> Deformation:
        """Read a displacement field (``1Warp.nii.gz``) or a composite transform (``Composite.h5``) of ITK or ANTs.

        Args:
            path: a NIfTI file, or one that ends in ``.h5`` or ``.hdf5``.
            affine: ``(D+1, D+1)``, what is to be the affine part of the map in the file; None for the identity, or
                what the composite has.

        Raises:
            RegistrationError: the file is missing, or holds no displacement field.
        """
        single = os.fspath(path).lower().endswith((".nii", ".nii.gz"))
        whole: Any = None
        for part in [read_displacement(path)] if single else read_composite(path):
            known = cls(torch.eye(part[1].dims + 1, dtype=torch.float64), *part) if isinstance(part, tuple) else part
            whole = known if whole is None else compose(whole, known)
        if not isinstance(whole, cls):
            raise RegistrationError("path", str(path), "a displacement field")
        grid = whole.grid
        return whole if affine is None else sampled(whole.apply, grid, checked_matrix(affine, grid.dims, "affine"))

    def ddf(self, fixed: Grid, moving: Grid | None = None) -> Tensor:
        """As MONAI's networks and ``monai.networks.blocks.Warp`` have it: a displacement of every voxel, in voxels.

        Args:
            fixed: the grid of the fixed image.
            moving: the grid of the moving image. ``Warp`` takes images of the fixed grid's shape only.
                None for ``fixed``, which is right for a moving image that was put there by its header.

        Returns:
            ``[D, *fixed.shape]`` float32: ``Warp()(moving[None], ddf[None])`` is the moved image.
        """
        moving = fixed if moving is None else moving
        dims = self.dims
        back = torch.linalg.inv(moving.affine)
        index = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in fixed.shape]).view(-1, dims)
        between = (apply_affine(back @ fixed.affine, index) - index).float().mT.view(dims, *fixed.shape)
        return between + torch.einsum(
            "ij,j...->i...", back[:dims, :dims].float(), sampled(self.apply, fixed).displacement
        )

    @classmethod
    def from_ddf(cls, ddf: Tensor, fixed: Grid, moving: Grid | None = None) -> Deformation:
        """Inverse of `ddf`, with the identity as its affine part: of what a network predicted.

        Args:
            ddf: ``[D, *fixed.shape]``, in voxels. For a velocity field take ``DVF2DDF`` first.
            fixed: see `ddf`.
            moving: likewise.
        """
        moving = fixed if moving is None else moving
        dims = fixed.dims
        between = moving.affine @ torch.linalg.inv(fixed.affine)
        # x -> moving.affine (index + ddf), of which the affine part is what no displacement does
        linear = fixed.affine[:dims, :dims].to(ddf)
        return cls(between, torch.einsum("ij,j...->i...", linear, ddf.detach().float()), fixed)

    def _steps(self) -> Tensor:
        """The displacement in lattice steps."""
        dims = self.dims
        linear = torch.linalg.inv(self.grid.affine[:dims, :dims]).to(self.displacement)
        return torch.einsum("ij,j...->i...", linear, self.displacement)

    def _at(self, points: Tensor) -> Tensor:
        """The displacement at points ``[N, D]`` of the fixed world, mm, likewise."""
        index = apply_affine(torch.linalg.inv(self.grid.affine), points.double().cpu())
        return _sample(self.displacement, index.to(self.displacement)).to(points)

    def _solve(self, points: Tensor) -> Tensor:
        """The points ``[N, D]`` of the fixed world that the displacement takes to ``points``.

        First the map is followed backward, which ends where it contracts; Newton's method finds the rest.
        """
        dims = self.dims
        to_index = torch.linalg.inv(self.grid.affine)
        steps = self._steps()
        wanted = apply_affine(to_index, points).to(steps.device)
        found, left = wanted.clone(), torch.arange(len(wanted), device=wanted.device)
        half = 0.5 * torch.eye(dims, dtype=wanted.dtype, device=wanted.device)
        for number in range(_LONGEST):
            place = found[left]
            gap = place + _sample(steps, place) - wanted[left]
            far = gap.norm(dim=1) > _CLOSE
            left, gap, place = left[far], gap[far], place[far]
            if not len(left):
                break
            if number >= 4:
                slopes = [_sample(steps, place + h) - _sample(steps, place - h) for h in half]
                slope = torch.stack(slopes, -1) + 2 * half
                gap = torch.linalg.solve(slope, gap.unsqueeze(-1)).squeeze(-1)
            # half the way now and then, for points between which Newton's method would jump to and fro
            reach = 0.5 if number % 8 == 7 else 1.0
            found[left] = place - reach * gap / gap.norm(dim=1, keepdim=True).clamp(min=1.0)
        return apply_affine(self.grid.affine, found.cpu().double()).to(points)


#: what takes points of the fixed world to the moving world: a matrix ``(D+1, D+1)``, or a map that bends
Transform = Tensor | Deformation


def map_points(transform: Transform, points: Tensor) -> Tensor:
    """Where points ``[N, D]`` of the fixed world are in the moving world."""
    if isinstance(transform, Deformation):
        return transform.apply(points)
    return apply_affine(transform, points)


def move(transform: Transform, values: Tensor, source: Grid, target: Grid, **options: Any) -> Tensor:
    """`monai_zsreg.resample.resample`, or `Deformation.resample`, whose ``options`` are the same."""
    if isinstance(transform, Deformation):
        return transform.resample(values, source, target, **options)
    return resample(values, source, target, transform, **options)


def sampled(where: Callable[[Tensor], Tensor], grid: Grid, affine: Tensor | None = None) -> Deformation:
    """A map with an affine part, from what it does at the points of a lattice.

    Args:
        where: points ``[N, D]`` of the fixed world to the moving world.
        grid: the lattice, in the fixed world.
        affine: its affine part; None for the identity.
    """
    affine = torch.eye(grid.dims + 1, dtype=torch.float64) if affine is None else affine
    back = torch.linalg.inv(affine)
    index = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in grid.shape]).view(-1, grid.dims)
    result = torch.empty(grid.dims, len(index))
    for start in range(0, len(index), _BLOCK):
        points = apply_affine(grid.affine, index[start : start + _BLOCK])
        result[:, start : start + len(points)] = (apply_affine(back, where(points)) - points).mT
    return Deformation(affine, result.view(grid.dims, *grid.shape), grid)


def compose(first: Transform, second: Transform) -> Transform:
    """``second`` after ``first``: exact, but where both bend, which gives a map on the lattice of the first."""
    if not isinstance(second, Deformation):
        if isinstance(first, Deformation):
            return Deformation(second @ first.affine, first.displacement, first.grid)
        return second @ first
    if isinstance(first, Deformation):
        return sampled(lambda points: second.apply(first.apply(points)), first.grid, second.affine @ first.affine)
    dims, back = second.dims, torch.linalg.inv(first)
    field_ = torch.einsum("ij,j...->i...", back[:dims, :dims].to(second.displacement), second.displacement)
    return Deformation(second.affine @ first, field_, replace(second.grid, affine=back @ second.grid.affine))


def _sample(field_: Tensor, index: Tensor) -> Tensor:
    """A field ``[D, *lattice]`` at indices ``[N, D]``, interpolated linearly; beyond the edge it goes on."""
    dims = index.shape[-1]
    size = torch.tensor(field_.shape[1:], dtype=index.dtype, device=index.device)
    where = ((2 * index + 1) / size - 1).flip(-1).to(field_)
    found = F.grid_sample(
        field_[None], where.view(1, *[1] * (dims - 1), -1, dims), padding_mode="border", align_corners=False
    )
    return found.view(len(field_), -1).mT.to(index)


def determinant(steps: Tensor) -> Tensor:
    """Jacobian determinant of ``index + steps(index)`` by central differences, one-sided at the edge, ``[*lattice]``.

    Args:
        steps: ``[D, *lattice]``, in lattice steps.
    """
    slopes = [torch.gradient(steps, dim=axis + 1)[0] for axis in range(len(steps))]
    return _determinant(slopes)


def least_determinant(steps: Tensor) -> Tensor:
    """The smallest of the determinants that forward and backward differences along the axes give, ``[*lattice]``.

    Where it is positive at all corners of a cell, linear interpolation does not fold there for all that is known.
    """
    dims = len(steps)
    ahead, behind = [], []
    for axis in range(dims):
        change = steps.diff(dim=axis + 1)
        first, last = (change.narrow(axis + 1, at, 1) for at in (0, change.shape[axis + 1] - 1))
        ahead.append(torch.cat([change, last], axis + 1))
        behind.append(torch.cat([first, change], axis + 1))
    least = torch.full_like(steps[0], torch.inf)
    for sides in product((0, 1), repeat=dims):
        found = _determinant([(ahead, behind)[side][axis] for axis, side in enumerate(sides)])
        least = torch.minimum(least, found)
    return least


def _determinant(slopes: list[Tensor]) -> Tensor:
    """Of the identity plus ``slopes``: for each axis the derivative ``[D, *lattice]`` along it."""
    rows = [[slope[i] + float(i == axis) for i in range(len(slopes))] for axis, slope in enumerate(slopes)]
    if len(rows) == 2:
        return rows[0][0] * rows[1][1] - rows[0][1] * rows[1][0]
    (a, b, c), (d, e, f), (g, h, i) = rows
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
