# SPDX-License-Identifier: Apache-2.0
"""Known transforms: how far each protocol goes, and how one is drawn.

A perturbation P maps fixed world to moving world. The moving image's voxel at world point y shows what the
co-registered image has at ``P^-1(y)``, by one cubic resampling, and its header says nothing of P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation

from monai_zsreg.benchmark.volumes import Volume, transformed


@dataclass(frozen=True)
class Limits:
    """How far a protocol goes."""

    angle_deg: float  # 180: uniform over all rotations
    shift: float = 0.0  # mm, pixels in 2D
    shift_of_side: float = 0.0  # instead, as a fraction of each side
    per_axis: bool = False  # draw the shift along each axis; otherwise a random direction and a uniform length
    scale: float = 0.0  # largest deviation of the scale of each axis from 1
    shear: float = 0.0
    fixed_scale: float = 0.0  # on top, all axes larger or smaller by this

    def reach(self, volume: Volume) -> np.ndarray:
        """Largest shift along each world axis, mm."""
        sides = np.abs(volume.affine[:-1, :-1]) @ np.array(volume.shape)
        return self.shift_of_side * sides if self.shift_of_side else np.full(volume.dims, self.shift)


# section 2.8 of the paper gives radians; it names no scale
_PAPER = Limits(angle_deg=math.degrees(0.3), shift=50.0, per_axis=True, shear=0.03)
_MILD = Limits(angle_deg=15.0, shift=15.0, scale=0.08, shear=0.05)

PROTOCOLS = {
    ("paper", 2): _PAPER,
    ("so3", 2): Limits(angle_deg=180.0, shift_of_side=1 / 3, per_axis=True),
    ("so3", 3): Limits(angle_deg=180.0, shift=50.0),
    ("mild", 2): _MILD,
    ("mild", 3): _MILD,
}


def limits_of(protocol: str, dims: int) -> Limits:
    """Limits of a protocol; a stress row goes as far as the paper in 2D and as ``mild`` in 3D."""
    limits = PROTOCOLS.get((protocol, dims), _PAPER if dims == 2 else _MILD)
    return replace(limits, scale=0.0, fixed_scale=0.2) if protocol == "scale" else limits


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    """A random direction."""
    vector = rng.normal(size=count)
    return np.asarray(vector / np.linalg.norm(vector))


def turn(angle_deg: float, dims: int, rng: np.random.Generator) -> np.ndarray:
    """A rotation by this angle ``(D, D)``, about a random axis in 3D."""
    axis = unit(rng, 3) if dims == 3 else np.array([0.0, 0.0, 1.0])
    return Rotation.from_rotvec(math.radians(angle_deg) * axis).as_matrix()[:dims, :dims]


def about(center: np.ndarray, linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """``(D+1, D+1)`` matrix of ``linear (x - center) + center + shift``."""
    matrix = np.eye(len(center) + 1)
    matrix[:-1, :-1] = linear
    matrix[:-1, -1] = center + shift - linear @ center
    return matrix


def draw(limits: Limits, volume: Volume, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, float]]:
    """Draw a transform about the center of an image: its matrix, and its angle and shift for the results file."""
    dims = volume.dims
    if dims == 3 and limits.angle_deg >= 180:
        uniform = Rotation.from_quat(unit(rng, 4))
        rotation, angle = uniform.as_matrix(), math.degrees(uniform.magnitude())
    else:
        angle = rng.uniform(0 if dims == 3 else -limits.angle_deg, limits.angle_deg)
        rotation = turn(angle, dims, rng)
    scale = 1 + rng.uniform(-limits.scale, limits.scale, dims)
    if limits.fixed_scale:
        scale = scale * (1 + limits.fixed_scale * rng.choice([-1.0, 1.0]))
    shear = np.eye(dims)
    shear[np.triu_indices(dims, 1)] = rng.uniform(-limits.shear, limits.shear, dims * (dims - 1) // 2)
    direction = rng.uniform(-1, 1, dims) if limits.per_axis else unit(rng, dims) * rng.uniform(0, 1)
    shift = direction * limits.reach(volume)
    info = {"rotation_deg": round(abs(angle), 4), "shift": round(float(np.linalg.norm(shift)), 4)}
    return about(volume.center, rotation @ np.diag(scale) @ shear, shift), info


def padding(volume: Volume, mask: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """What to add on both sides of each axis, so that no transform within ``limits`` moves foreground out of it.

    The amount depends on the protocol and the foreground, not on the transform drawn, and so gives nothing away.

    Returns:
        Voxels to add before and after each axis ``(D,)``, and the affine of the enlarged lattice.
    """
    spacing, middle = volume.spacing, (np.array(volume.shape) - 1) / 2
    offsets = (np.argwhere(mask) - middle) * spacing
    half = np.abs(offsets).max(axis=0)
    thinned = offsets[:: max(1, len(offsets) // 200_000)]
    radius = math.sqrt((thinned**2).sum(axis=1).max()) + spacing.max()
    reach = np.minimum(radius, half + 2 * radius * math.sin(math.radians(limits.angle_deg) / 2))
    reach = reach * (1 + limits.scale) * (1 + limits.fixed_scale) * (1 + limits.shear * (volume.dims - 1))
    shift = limits.reach(volume)
    # a shift of a given length may lie along any voxel axis; drawn per world axis its length can add up
    along = np.abs(np.linalg.inv(volume.affine[:-1, :-1] / spacing)) @ shift if limits.per_axis else shift
    pad = np.maximum(np.ceil((reach + along) / spacing - (middle + 0.5)) + 2, 0).astype(int)
    affine = volume.affine.copy()
    affine[:-1, -1] = transformed(volume.affine, -pad)
    return pad, affine
