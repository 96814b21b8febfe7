# SPDX-License-Identifier: Apache-2.0
"""A demonstration pair with a known transform, made from what nilearn's wheel ships. Nothing is downloaded.

The fixed image is a real average: the MNI152 T1 template (ICBM 2009 nonlinear symmetric, skull-stripped, 1 mm), bent by
some millimeters, because it is its own mirror image and a head is not. The moving image is *simulated*: a contrast like
T2 from that template's tissue maps, with noise and a bias field. Errors measured on this pair show that an installation
works; they are no measure of accuracy on patients.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import AffineParameters, Grid, apply_affine, compose_parameters
from monai_zsreg.io import Image, output_folder, write_image
from monai_zsreg.resample import resample

#: signal of cerebrospinal fluid, gray and white matter in a T2-weighted scan, relative to the brightest tissue
T2_SIGNAL = (1.0, 0.6, 0.35)
_BRIGHTEST = 1000.0  # of the stored integers
_MOVING_SPACING = 1.2  # mm
_MARGIN = 12.0  # mm of background around the moved head, as a scanner's field of view has


class DemoPair(TypedDict):
    """What `demo_pair` made."""

    fixed: Path  # T1 template
    moving: Path  # simulated T2-like image
    truth: np.ndarray  # (D+1, D+1) float64, fixed world to moving world (RAS mm)
    mask: np.ndarray  # bool, foreground on the fixed grid [*spatial]


def demo_pair(
    output_dir: str | os.PathLike,
    spatial_dims: int = 3,
    seed: int = 0,
    rotation_degrees: float = 12.0,
    shift_mm: float = 10.0,
    scale: float = 0.03,
    shear: float = 0.01,
    noise: float = 0.03,
    bias: float = 0.2,
) -> DemoPair:
    """Write a pair of images of different contrast, moved by a known affine transform.

    The moving image is simulated (see the module). It lies on a grid of its own: 1.2 mm voxels, array axes running
    to the left and to the back (LPS), another field of view. Each of its voxels takes the tissue maps by one linear
    interpolation at ``inv(truth)`` of its world position.

    Args:
        output_dir: folder to write ``fixed_t1.nii.gz`` and ``moving_simulated_t2.nii.gz`` to, made if it is missing.
        spatial_dims: 3, or 2 for the middle axial slice with a transform in its plane.
        seed: of the directions of rotation, shift, scale and shear, of the noise and of the bias field.
        rotation_degrees: size of the rotation; in 3D it is shared by three axes, which makes one about an oblique axis.
        shift_mm: length of the displacement of the head's center.
        scale: growth or shrinkage of each axis; 0.03 is 3 %.
        shear: size of each shear.
        noise: standard deviation of the noise (Rician), as a fraction of the brightest tissue.
        bias: largest departure of the smooth multiplicative field from 1.

    Raises:
        RegistrationError: another number of dimensions, or a folder that cannot be written to.
        ImportError: nilearn is not installed.
    """
    if spatial_dims not in (2, 3):
        raise RegistrationError("spatial_dims", spatial_dims, "2 or 3")
    t1, tissues = template_tissues(spatial_dims)
    folder = output_folder(output_dir)
    rng = np.random.default_rng(seed)

    mask = (t1.values[0] * _BRIGHTEST).round() > 0  # as stored
    inside = apply_affine(t1.affine, mask.nonzero().double())
    truth = _transform(inside.mean(0).tolist(), rng, rotation_degrees, shift_mm, scale, shear)
    grid = _moving_grid(apply_affine(torch.from_numpy(truth), inside))
    pull = torch.linalg.inv(torch.from_numpy(truth))
    shares = resample(tissues.values, tissues.grid, grid, pull, fill=0.0).numpy()
    scan = simulated_scan(shares, T2_SIGNAL, rng, noise, bias)
    moving = Image(torch.from_numpy(scan)[None], grid.affine)
    paths = folder / "fixed_t1.nii.gz", folder / "moving_simulated_t2.nii.gz"
    for path, image in zip(paths, (t1, moving), strict=True):
        write_image(path, Image(image.values * _BRIGHTEST, image.affine, {"dtype": "int16"}))
    return DemoPair(fixed=paths[0], moving=paths[1], truth=truth, mask=mask.numpy())


def template_tissues(spatial_dims: int = 3) -> tuple[Image, Image]:
    """The template's T1 in [0, 1], ``[1, *spatial]``, and the fractions of cerebrospinal fluid, gray and white matter
    in its head, ``[3, *spatial]``; both `bent`, on a grid of 1 mm. In 2D the middle axial slice.

    Raises:
        ImportError: nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        told = f'the demonstration pair needs nilearn: pip install "monai-zsreg[demo]" ({error})'
        raise ImportError(told, name="nilearn") from error
    images = [getattr(datasets, f"load_mni152_{name}template")(resolution=1) for name in ("", "gm_", "wm_")]
    t1, gray, white = (bent(image.get_fdata(dtype=np.float32)) for image in images)
    affine = np.asarray(images[0].affine, dtype=np.float64)
    if spatial_dims == 2:
        middle = t1.shape[2] // 2
        t1, gray, white = (array[:, :, middle] for array in (t1, gray, white))
        affine = affine[np.ix_([0, 1, 3], [0, 1, 3])]
    head = t1 > 0
    total = np.maximum(gray + white, 1.0)
    gray, white = head * gray / total, head * white / total
    # what the head holds besides is nearly all fluid
    shares = np.stack([head - gray - white, gray, white])
    world = torch.from_numpy(affine)
    return Image(torch.from_numpy(t1.copy())[None], world), Image(torch.from_numpy(shares), world)


def bent(values: np.ndarray) -> np.ndarray:
    """A volume ``[*spatial]`` without mirror symmetry.

    Its planes across the first axis are shifted along the other two by up to 6 and 4 voxels, on the left otherwise than
    on the right.
    """
    for axis, largest, waves in ((1, 6.0, 2.5), (2, 4.0, 1.5)):
        result = np.empty_like(values)
        for number, x in enumerate(np.linspace(-1, 1, len(values))):
            shift = largest * np.sin(waves * np.pi * x)
            whole, part = int(np.floor(shift)), np.float32(shift - np.floor(shift))
            plane = np.roll(values[number], whole, axis - 1)
            result[number] = (1 - part) * plane + part * np.roll(plane, 1, axis - 1)
        values = result
    return values


def _transform(
    center: list[float], rng: np.random.Generator, rotation: float, shift: float, scale: float, shear: float
) -> np.ndarray:
    """Matrix ``(D+1, D+1)`` of the given sizes about ``center`` (world, mm), in directions drawn from ``rng``."""
    dims = len(center)
    angles = 1 if dims == 2 else 3

    def signs(n: int) -> np.ndarray:
        return rng.choice([-1.0, 1.0], n)

    def oblique(n: int) -> np.ndarray:
        # no component near zero: an error in any axis or sign has to show
        direction = signs(n) * rng.uniform(0.5, 1.0, n)
        return direction / np.linalg.norm(direction)

    return compose_parameters(
        AffineParameters(
            translation=tuple(shift * oblique(dims)),
            rotation_deg=tuple(rotation * oblique(angles)),
            scale=tuple(1.0 + scale * signs(dims)),
            shear=tuple(shear * signs(dims * (dims - 1) // 2)),
            center=tuple(center),
        )
    )


def _moving_grid(points: torch.Tensor) -> Grid:
    """LPS grid around world ``points [N, D]``, voxels of 1.2 mm."""
    low, high = points.amin(0) - _MARGIN, points.amax(0) + _MARGIN
    shape = torch.ceil((high - low) / _MOVING_SPACING).int() + 1
    dims = points.shape[1]
    direction = torch.ones(dims, dtype=torch.float64)
    direction[:2] = -1.0
    affine = torch.eye(dims + 1, dtype=torch.float64)
    affine[:dims, :dims] = torch.diag(direction * _MOVING_SPACING)
    affine[:dims, dims] = torch.where(direction < 0, high, low)
    return Grid(tuple(shape.tolist()), affine)


def simulated_scan(
    shares: np.ndarray, signal: Sequence[float], rng: np.random.Generator, noise: float, bias: float
) -> np.ndarray:
    """A scan of known tissues: their signal, a smooth bias field, Rician noise, and 0 outside the head.

    Args:
        shares: fractions of the tissues in each voxel, ``[T, *spatial]``.
        signal: of each tissue, ``[T]``; the brightest is about 1.
        rng: draws the bias field, then the noise.
        noise, bias: see `demo_pair`.

    Returns:
        ``[*spatial]`` float64.
    """
    shape = shares.shape[1:]
    scan, head = np.zeros(shape), np.zeros(shape)
    for share, weight in zip(shares, signal, strict=True):
        scan += weight * share
        head += share
    scan *= 1.0 + bias * _smooth_field(shape, rng)
    in_phase, quadrature = rng.normal(0.0, noise, (2, *shape))
    # stripped of skull and air, as the template is
    return np.where(head >= 0.5, np.hypot(scan + in_phase, quadrature), 0.0)


def _smooth_field(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random quadratic polynomial on a grid, scaled so that its largest size is 1."""
    axes = np.meshgrid(*[np.linspace(-1.0, 1.0, n) for n in shape], indexing="ij", sparse=True)
    field = np.zeros(shape)
    for i, first in enumerate(axes):
        field += rng.normal() * first
        for second in axes[i:]:
            field += rng.normal() * first * second
    return field / np.abs(field).max()
