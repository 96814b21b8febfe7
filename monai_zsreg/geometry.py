# SPDX-License-Identifier: Apache-2.0
"""Coordinate systems, and the only code that converts between them (those of `monai_zsreg.networks` apart).

A point of an image has these coordinates, all in array axis order unless said otherwise:

========  =====================================================================================
index     voxel indices (i, j, k), voxel centers at whole numbers
world     millimeters, RAS, as ``MetaTensor.affine`` maps them from indices (pixels without spacing)
grid      normalized to [-1, 1] per axis with ``align_corners=False``, *reversed* axis order, as
          ``torch.nn.functional.affine_grid`` and ``grid_sample`` want them
ITK       millimeters, LPS: the first two world axes negated; files only
FSL       indices times voxel size, the first axis reversed in right-handed images; files only
========  =====================================================================================

Transforms are pull matrices: they map a point of the fixed image to the point of the moving image that shows the
same anatomy. A matrix is either homogeneous, ``(D+1, D+1)``, or without its last row, ``(D, D+1)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_zsreg.errors import RegistrationError, require


def homogeneous(matrix: Tensor) -> Tensor:
    """Append the row (0, ..., 0, 1) to ``[..., D, D+1]`` matrices."""
    last = torch.zeros_like(matrix[..., :1, :])
    last[..., 0, -1] = 1.0
    return torch.cat([matrix, last], dim=-2)


def apply_affine(matrix: Tensor, points: Tensor) -> Tensor:
    """Map points ``[..., N, D]`` by matrices ``[..., D, D+1]`` or ``[..., D+1, D+1]``."""
    dims = points.shape[-1]
    return points @ matrix[..., :dims, :dims].transpose(-1, -2) + matrix[..., :dims, dims].unsqueeze(-2)


# mm; squares and cubes of lengths must fit single precision
_FARTHEST = 1e12


@dataclass(frozen=True, eq=False)
class Grid:
    """The lattice of an image: spatial shape, and the matrix from indices to world coordinates.

    Args:
        shape: D spatial sizes.
        affine: ``(D+1, D+1)`` float64 on the CPU, index to world (RAS mm).
    """

    shape: tuple[int, ...]
    affine: Tensor

    @classmethod
    def of(cls, image: Tensor, name: str = "image") -> Grid:
        """Grid of a channel-first image ``[C, *spatial]``; a tensor without an affine has the identity.

        Raises:
            RegistrationError: not 2 or 3 spatial dimensions, or an affine that `checked_affine` refuses.
        """
        dims = image.ndim - 1
        require(dims in (2, 3), name, tuple(image.shape), "a channel-first image with 2 or 3 spatial dimensions")
        return cls(tuple(int(n) for n in image.shape[1:]), checked_affine(getattr(image, "affine", None), dims, name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self.shape == other.shape and torch.equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, *self.affine.flatten().tolist()))

    @property
    def dims(self) -> int:
        """Number of spatial dimensions, D."""
        return len(self.shape)

    @cached_property
    def spacing(self) -> tuple[float, ...]:
        """Distance between neighboring voxels along each array axis, mm."""
        return tuple(self.affine[: self.dims, : self.dims].norm(dim=0).tolist())

    @cached_property
    def center(self) -> Tensor:
        """World coordinates of the center of the field of view, ``(D,)``."""
        middle = torch.tensor([(n - 1) / 2 for n in self.shape], dtype=torch.float64)
        return apply_affine(self.affine, middle.unsqueeze(0))[0]

    @cached_property
    def extent(self) -> Tensor:
        """Size of the axis-aligned world box that holds all voxels, ``(D,)`` in mm."""
        sides = torch.tensor(self.shape, dtype=torch.float64)
        return self.affine[: self.dims, : self.dims].abs() @ sides

    @cached_property
    def from_world(self) -> Tensor:
        """World coordinates to the normalized ones of ``grid_sample``, ``(D+1, D+1)`` float64 on the CPU."""
        axes = range(self.dims)
        rows = [[2.0 / n * (a == b) for b in axes] + [1.0 / n - 1.0] for a, n in enumerate(self.shape)]
        from_index = torch.tensor([*reversed(rows), [0.0] * self.dims + [1.0]], dtype=torch.float64)
        return from_index @ torch.linalg.inv(self.affine)

    def same_as(self, other: Grid, tolerance: float = 1e-3) -> bool:
        """True where both have one shape and their affines agree within ``tolerance`` mm at every corner."""
        if self.shape != other.shape:
            return False
        corners = torch.cartesian_prod(*[torch.tensor([0.0, n - 1.0], dtype=torch.float64) for n in self.shape])
        gap = apply_affine(self.affine, corners) - apply_affine(other.affine, corners)
        return bool(gap.norm(dim=-1).max() <= tolerance)

    def index_pull(self, transform: Tensor, moving: Grid) -> Tensor:
        """World pull matrix to an index pull matrix from this (fixed) grid to ``moving``, ``(D+1, D+1)``."""
        return torch.linalg.inv(moving.affine) @ transform @ self.affine


def lattice_index(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """Points of a lattice by their numbers ``[...]``, the last axis running fastest, as indices ``[..., D]``.

    As `torch.unravel_index`, which on its first call imports SymPy: half a second.
    """
    index = []
    for size in reversed(shape):
        index.append(numbers % size)
        numbers = numbers // size
    return torch.stack(index[::-1], dim=-1)


def checked_affine(affine: Any, dims: int, name: str) -> Tensor:
    """An index to world matrix ``(dims+1, dims+1)``, float64 on the CPU, from what the image ``name`` carries: a matrix
    of this or of a higher dimension, which loses its further axes, or None for the identity.

    Raises:
        RegistrationError: singular, not finite, or so large that single precision cannot compute with it.
    """
    if affine is None:
        return torch.eye(dims + 1, dtype=torch.float64)
    # a MetaTensor's own matrix may be one too
    given = torch.as_tensor(affine).as_subclass(Tensor).detach().to("cpu", torch.float64)
    square = given.ndim == 2 and given.shape[0] == given.shape[1] and len(given) > dims
    require(square, f"{name}.affine", tuple(given.shape), f"a {dims + 1}x{dims + 1} matrix")
    keep = [*range(dims), len(given) - 1]
    matrix = given[keep][:, keep].clone()
    linear = matrix[:dims, :dims]
    # relative to the voxel size, which may be in meters or in micrometers
    lengths = linear.norm(dim=0)
    usable = bool(torch.isfinite(matrix).all()) and bool((lengths > 0).all())
    usable = usable and abs(float(torch.linalg.det(linear / lengths))) >= 1e-6
    require(usable, f"{name}.affine", matrix.tolist(), "a finite, invertible matrix")
    near = float(matrix.abs().max()) <= _FARTHEST
    require(near, f"{name}.affine", matrix.tolist(), f"a matrix in mm, no entry beyond {_FARTHEST:g}")
    return matrix


def checked_matrix(matrix: Any, dims: int, name: str) -> Tensor:
    """A pull matrix from what a user gave as the argument ``name``, in any array type: ``(dims+1, dims+1)`` float64 on
    the CPU, its last row exactly ``(0, ..., 0, 1)``. A RegistrationError unless it is a finite, invertible affine
    matrix."""
    try:
        found = torch.as_tensor(matrix, dtype=torch.float64).as_subclass(Tensor).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise RegistrationError(name, matrix, f"a {dims + 1}x{dims + 1} matrix or a transform file") from error
    size = f"a {dims + 1}x{dims + 1} matrix for {dims}D images"
    require(found.shape == (dims + 1, dims + 1), name, tuple(found.shape), size)
    last_row = torch.eye(dims + 1, dtype=torch.float64)[dims]
    usable = bool(torch.isfinite(found).all()) and torch.allclose(found[dims], last_row)
    usable = usable and int(torch.linalg.matrix_rank(found[:dims, :dims])) == dims
    require(usable, name, found.tolist(), f"a finite, invertible matrix with last row {last_row.tolist()}")
    found = found.clone()
    found[dims] = last_row
    return found


def fraction_inside(grid: Grid, other: Grid, transform: Tensor) -> float:
    """Fraction of the voxels of ``grid`` that a world transform takes into the field of view of ``other``."""
    steps = [torch.linspace(0, n - 1, 12, dtype=torch.float64) for n in grid.shape]
    index = apply_affine(grid.index_pull(transform, other), torch.cartesian_prod(*steps))
    last = torch.tensor([n - 0.5 for n in other.shape], dtype=torch.float64)
    return float(((index >= -0.5) & (index <= last)).all(dim=1).double().mean())


def nearest_axes(grid: Grid) -> Tensor:
    """The orthonormal axes nearest to those of a grid, whose header may be sheared, ``(D, D)``, one a column."""
    linear = grid.affine[: grid.dims, : grid.dims]
    u, _, vt = torch.linalg.svd(linear / torch.tensor(grid.spacing, dtype=torch.float64))
    return u @ vt


def pooled_grid(grid: Grid, factors: Sequence[int]) -> Grid:
    """Lattice of an image of which blocks of ``factors`` voxels were averaged; an incomplete last block is dropped."""
    rows = [[f * float(i == j) for j in range(grid.dims)] + [(f - 1) / 2] for i, f in enumerate(factors)]
    blocks = torch.tensor([*rows, [0.0] * grid.dims + [1.0]], dtype=torch.float64)
    return Grid(tuple(n // f for n, f in zip(grid.shape, factors, strict=True)), grid.affine @ blocks)


def moved_header(affine: Tensor, transform: Tensor) -> Tensor:
    """Header of the moving image after registration: where its voxels lie in the fixed image's world.

    Args:
        affine: index to world of the moving image, ``(r+1, r+1)``; MONAI keeps r = 3 for 2D images too.
        transform: ``(D+1, D+1)``, fixed world to moving world, D <= r.
    """
    inverse = torch.linalg.inv(torch.as_tensor(transform, dtype=torch.float64)).to(affine.device)
    return widened(inverse, affine.shape[-1] - 1) @ affine.double()


def widened(matrix: Tensor, dims: int = 3) -> Tensor:
    """A matrix ``(D+1, D+1)`` as one of ``dims`` dimensions, D or more, whose further axes stay as they are: float64.

    MONAI and NIfTI have a 4x4 affine for 2D images too.
    """
    keep = torch.tensor([*range(len(matrix) - 1), dims])
    full = torch.eye(dims + 1, dtype=torch.float64, device=matrix.device)
    full[keep[:, None], keep] = matrix.double()
    return full


# ---------------------------------------------------------------------------------------------- files of other tools


def lps_from_ras(dims: int) -> np.ndarray:
    """World coordinates RAS to LPS, ``(D+1, D+1)``; its own inverse."""
    return np.diag([-1.0, -1.0, *[1.0] * (dims - 1)])


def ras_to_lps(transform: np.ndarray) -> np.ndarray:
    """World-to-world matrix ``(D+1, D+1)`` from RAS to LPS coordinates on both sides, or back: its own inverse."""
    return flip_points(flip_points(transform).T).T


lps_to_ras = ras_to_lps


def itk_lattice(grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spacing ``(D,)``, origin ``(D,)`` and direction ``(D, D)`` of an ITK image (LPS) on a grid with orthogonal axes.

    ITK's index order is our array axis order; ``itk.image_from_array`` reverses the axes of an array, so give it the
    transpose.
    """
    affine, spacing = grid.affine.numpy(), np.asarray(grid.spacing)
    return spacing, flip_points(affine[:-1, -1]), flip_points(affine[:-1, :-1].T).T / spacing


def world_from_itk(spacing: np.ndarray, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Index to world (RAS), ``(D+1, D+1)``, of an ITK image: the inverse of `itk_lattice`."""
    dims = len(spacing)
    matrix = np.eye(dims + 1)
    matrix[:dims, :dims], matrix[:dims, dims] = np.asarray(direction) * spacing, origin
    matrix[:2] *= -1.0
    return matrix


def plane_of_slice(place: np.ndarray) -> np.ndarray:
    """The lattice ``(3, 3)`` in its own plane of a slice whose index ``(i, j, 0)`` ``place`` ``(4, 4)`` maps to world.

    The world axes of the plane are the two RAS axes nearest to it. An oblique slice is turned onto them by the
    smallest rotation, so distances stay what they are.
    """
    normal = np.cross(place[:3, 0], place[:3, 1])
    normal = normal / np.linalg.norm(normal)
    axis = int(np.abs(normal).argmax())
    target = np.eye(3)[axis] * np.sign(normal[axis])
    x, y, z = np.cross(normal, target)
    turn = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    rotation = np.eye(3) + turn + turn @ turn / (1.0 + normal @ target)
    plane = np.eye(3)
    plane[:2] = np.delete(rotation @ place[:3, [0, 1, 3]], axis, axis=0)
    return plane


def without_obliquity(affine: np.ndarray) -> np.ndarray:
    """Index to world ``(4, 4)`` of an image with every axis snapped to the nearest of the world's, the origin kept.

    This is how AFNI's programs see an oblique image.
    """
    linear = affine[:3, :3]
    nearest = np.abs(linear) == np.abs(linear).max(axis=0)
    snapped = affine.copy()
    snapped[:3, :3] = np.where(nearest, np.sign(linear) * np.linalg.norm(linear, axis=0), 0.0)
    return snapped


def flip_points(points: np.ndarray) -> np.ndarray:
    """Points ``[..., D]`` in mm from RAS to LPS or from LPS to RAS (its own inverse)."""
    flip = np.ones(np.shape(points)[-1])
    flip[:2] = -1.0
    return np.asarray(points, dtype=np.float64) * flip


def fsl_from_world(grid: Grid, spacing: Sequence[float]) -> np.ndarray:
    """World coordinates of a 3D image to FSL's scaled voxels, ``(4, 4)``.

    These are indices times the voxel sizes that the header states (``pixdim``), whatever the direction of the axes.
    Where the determinant of the affine is positive (FSL: neurological), the first axis is counted from its other end,
    so that the system is always left-handed.
    """
    matrix = np.diag([*spacing, 1.0])
    if torch.linalg.det(grid.affine) > 0:
        matrix[0, 0] = -spacing[0]
        matrix[0, 3] = spacing[0] * (grid.shape[0] - 1)
    return matrix @ np.linalg.inv(grid.affine.numpy())


def freesurfer_volume(grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How FreeSurfer states a 3D lattice: voxel sizes ``(3,)``; directions of the array axes ``(3, 3)``, one a column
    (``xras``, ``yras``, ``zras``); and the world point at index ``shape / 2`` (``cras``), half a voxel past the center.
    """
    affine = grid.affine.numpy()
    sizes = np.asarray(grid.spacing)
    return sizes, affine[:3, :3] / sizes, affine[:3, :3] @ (np.asarray(grid.shape) / 2) + affine[:3, 3]


def freesurfer_grid(
    shape: Sequence[int], sizes: Sequence[float], directions: np.ndarray, center: Sequence[float]
) -> Grid:
    """Inverse of `freesurfer_volume`."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(directions, dtype=np.float64) * np.asarray(sizes, dtype=np.float64)
    affine[:3, 3] = np.asarray(center, dtype=np.float64) - affine[:3, :3] @ (np.asarray(shape) / 2)
    return Grid(tuple(int(n) for n in shape), torch.as_tensor(affine))


# -------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class AffineParameters:
    """An affine transform in the terms people read.

    The transform is ``x -> center + translation + R diag(scale) K (x - center)`` with R a rotation (3D: about the
    first, then second, then third axis as ``Rx Ry Rz``) and K upper triangular with ones on its diagonal.

    Args:
        translation: displacement of ``center``, mm.
        rotation_deg: one angle in 2D, three in 3D, degrees.
        scale: one factor an axis.
        shear: entries of K above the diagonal, row by row.
        center: the point that rotation, scale and shear leave in place, world coordinates.
    """

    translation: tuple[float, ...]
    rotation_deg: tuple[float, ...]
    scale: tuple[float, ...]
    shear: tuple[float, ...]
    center: tuple[float, ...]

    @property
    def angle_deg(self) -> float:
        """The whole angle of the rotation, degrees, from 0 to 180."""
        if len(self.rotation_deg) == 1:
            return abs(self.rotation_deg[0])
        return math.degrees(_rotation(self.rotation_deg).magnitude())

    def as_dict(self) -> dict[str, Any]:
        """All fields and ``angle_deg``, ready for JSON."""
        return asdict(self) | {"angle_deg": self.angle_deg}


def _rotation(degrees: Sequence[float]) -> Any:
    """SciPy's rotation by one angle (2D, about the third axis) or by three (3D: ``Rx Ry Rz``)."""
    from scipy.spatial.transform import Rotation

    return (
        Rotation.from_rotvec([0, 0, *degrees], True) if len(degrees) == 1 else Rotation.from_euler("XYZ", degrees, True)
    )


def decompose_affine(transform: np.ndarray | Tensor, center: Sequence[float] | None = None) -> AffineParameters:
    """Split a world transform ``(D+1, D+1)`` into translation (at ``center``, or the world's origin), rotation, scale
    and shear; a RegistrationError where its determinant is not positive."""
    matrix = np.asarray(transform, dtype=np.float64)
    dims = len(matrix) - 1
    linear = matrix[:dims, :dims]
    positive = bool(np.isfinite(linear).all()) and np.linalg.det(linear) > 0
    require(positive, "transform", matrix.tolist(), "a matrix with positive determinant")
    rotation, upper = np.linalg.qr(linear)
    sign = np.where(np.diag(upper) < 0, -1.0, 1.0)
    rotation, upper = rotation * sign, upper * sign[:, None]
    scale = np.diag(upper)
    shear = (upper / scale[:, None])[np.triu_indices(dims, 1)]
    # by hand: SciPy warns at a quarter turn, and to silence it would change the filters of all threads
    if dims == 2:
        angles = [math.atan2(rotation[1, 0], rotation[0, 0])]
    else:
        across = math.hypot(rotation[0, 0], rotation[0, 1])
        # a quarter turn about the second axis leaves only the sum of the other two: all of it goes to the first
        locked = across < 1e-9
        angles = [
            math.atan2(rotation[2, 1], rotation[1, 1]) if locked else math.atan2(-rotation[1, 2], rotation[2, 2]),
            math.atan2(rotation[0, 2], across),
            0.0 if locked else math.atan2(-rotation[0, 1], rotation[0, 0]),
        ]
    middle = np.zeros(dims) if center is None else np.asarray(center, dtype=np.float64)
    translation = linear @ middle + matrix[:dims, dims] - middle
    return AffineParameters(
        translation=tuple(translation.tolist()),
        rotation_deg=tuple(math.degrees(a) for a in angles),
        scale=tuple(scale.tolist()),
        shear=tuple(shear.tolist()),
        center=tuple(middle.tolist()),
    )


def compose_parameters(parameters: AffineParameters) -> np.ndarray:
    """The matrix ``(D+1, D+1)`` of `AffineParameters`; the inverse of `decompose_affine`."""
    dims = len(parameters.scale)
    rotation = _rotation(parameters.rotation_deg)
    shear = np.eye(dims)
    shear[np.triu_indices(dims, 1)] = parameters.shear
    center = np.asarray(parameters.center)
    matrix = np.eye(dims + 1)
    matrix[:dims, :dims] = rotation.as_matrix()[:dims, :dims] @ np.diag(parameters.scale) @ shear
    matrix[:dims, dims] = center + np.asarray(parameters.translation) - matrix[:dims, :dims] @ center
    return matrix
