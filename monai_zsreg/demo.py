# SPDX-License-Identifier: Apache-2.0
"""A demonstration pair with a known transform, made from what nilearn's wheel ships. Nothing is downloaded.

The fixed image is a real average: the MNI152 T1 template (ICBM 2009 nonlinear symmetric, skull-stripped, 1 mm). The
moving image is *simulated*: a contrast like T2 from that template's tissue maps, with noise and a bias field. Errors
measured on this pair show that an installation works; they are no measure of accuracy on patients.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TypedDict

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import AffineParameters, Grid, apply_affine, compose_parameters, moved_header
from monai_zsreg.io.files import atomic_path, output_folder

__all__ = ["DemoPair", "demo_pair"]

logger = logging.getLogger(__name__)

# signal relative to the brightest tissue, in the order of a T2-weighted scan
_SIGNAL = {"csf": 1.0, "gm": 0.6, "wm": 0.35}
_BRIGHTEST = 1000.0  # of the stored integers
_MOVING_SPACING = 1.2  # mm
_MARGIN = 12.0  # mm of background around the moved head, as a scanner's field of view has


class DemoPair(TypedDict):
    """What `demo_pair` made.

    Keys:
        fixed: NIfTI file, T1 template, int16.
        moving: NIfTI file, simulated T2-like image, int16.
        truth: ``(D+1, D+1)`` float64, fixed world to moving world (RAS mm).
        mask: bool, foreground on the fixed grid ``[*spatial]``.
    """

    fixed: Path
    moving: Path
    truth: np.ndarray
    mask: np.ndarray


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
        noise: standard deviation of the noise (Rician), as a share of the brightest tissue.
        bias: largest departure of the smooth multiplicative field from 1.

    Returns:
        The two files, the true matrix and the fixed foreground.

    Raises:
        RegistrationError: nilearn is not installed, another number of dimensions, or a folder that cannot be written.
    """
    if spatial_dims not in (2, 3):
        raise RegistrationError("spatial_dims", spatial_dims, "2 or 3")
    tissues = _tissues(spatial_dims)
    folder = output_folder(output_dir)
    rng = np.random.default_rng(seed)

    fixed = tissues["t1"]
    grid = Grid.of(fixed, "fixed")
    mask = fixed[0].numpy() > 0
    inside = apply_affine(grid.affine, torch.from_numpy(np.argwhere(mask)).double())
    truth = _transform(inside.mean(0).tolist(), rng, rotation_degrees, shift_mm, scale, shear)
    moving_grid = _moving_grid(apply_affine(torch.from_numpy(truth), inside))
    moving = _acquire(tissues, truth, moving_grid, rng, noise, bias)

    pair = DemoPair(
        fixed=folder / "fixed_t1.nii.gz", moving=folder / "moving_simulated_t2.nii.gz", truth=truth, mask=mask
    )
    _write(pair["fixed"], fixed[0].numpy() * _BRIGHTEST, grid)
    _write(pair["moving"], moving * _BRIGHTEST, moving_grid)
    logger.info(
        "Demonstration pair: %s is the MNI152 T1 template; %s is SIMULATED from the template's tissue maps and moved "
        "by a known transform. It is no patient's image.",
        pair["fixed"],
        pair["moving"],
    )
    return pair


def _tissues(spatial_dims: int) -> dict[str, MetaTensor]:
    """T1 and shares of CSF, gray and white matter in [0, 1], each ``[1, *spatial]``, on the template's 1 mm grid."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise RegistrationError(
            "nilearn",
            "a package that cannot be imported",
            f'it to be installed, for the demonstration pair: pip install "monai-zsreg[demo]" ({error})',
        ) from error
    images = {
        "t1": datasets.load_mni152_template(resolution=1),
        "gm": datasets.load_mni152_gm_template(resolution=1),
        "wm": datasets.load_mni152_wm_template(resolution=1),
    }
    arrays = {name: image.get_fdata(dtype=np.float32) for name, image in images.items()}
    affine = np.asarray(images["t1"].affine, dtype=np.float64)
    if spatial_dims == 2:
        middle = arrays["t1"].shape[2] // 2
        arrays = {name: array[:, :, middle] for name, array in arrays.items()}
        affine = affine[np.ix_([0, 1, 3], [0, 1, 3])]
    # what the head holds besides gray and white matter is nearly all CSF
    head = arrays["t1"] > 0
    total = np.maximum(arrays["gm"] + arrays["wm"], 1.0)
    arrays["gm"], arrays["wm"] = head * arrays["gm"] / total, head * arrays["wm"] / total
    arrays["csf"] = head - arrays["gm"] - arrays["wm"]
    return {
        name: MetaTensor(
            torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None], affine=torch.from_numpy(affine)
        )
        for name, array in arrays.items()
    }


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


def _acquire(
    tissues: dict[str, MetaTensor],
    truth: np.ndarray,
    grid: Grid,
    rng: np.random.Generator,
    noise: float,
    bias: float,
) -> np.ndarray:
    """Simulated scan of the moved tissues on ``grid``: signal, bias field, noise; brightest tissue about 1."""
    pull = torch.linalg.inv(torch.from_numpy(truth))
    resample = SpatialResample(mode="bilinear", padding_mode="zeros")
    signal = np.zeros(grid.shape)
    head = np.zeros(grid.shape)
    for name, weight in _SIGNAL.items():
        # the header says where the moved head lies, so this is the one interpolation
        there = MetaTensor(tissues[name].as_tensor(), affine=moved_header(tissues[name].affine, pull))
        share = resample(there, dst_affine=grid.affine, spatial_size=grid.shape)[0].numpy()
        signal += weight * share
        head += share
    signal *= 1.0 + bias * _smooth_field(grid.shape, rng)
    in_phase, quadrature = rng.normal(0.0, noise, (2, *grid.shape))
    scan = np.hypot(signal + in_phase, quadrature)
    return np.where(head >= 0.5, scan, 0.0)  # stripped of skull and air, as the fixed image is


def _smooth_field(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random quadratic polynomial on a grid, scaled so that its largest size is 1."""
    axes = np.meshgrid(*[np.linspace(-1.0, 1.0, n) for n in shape], indexing="ij", sparse=True)
    field = np.zeros(shape)
    for i, first in enumerate(axes):
        field += rng.normal() * first
        for second in axes[i:]:
            field += rng.normal() * first * second
    return field / np.abs(field).max()


def _write(path: Path, data: np.ndarray, grid: Grid) -> None:
    affine = np.eye(4)
    axes = [*range(grid.dims), 3]
    affine[np.ix_(axes, axes)] = grid.affine.numpy()
    image = nib.Nifti1Image(np.rint(data).astype(np.int16), affine)
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as partial:
        nib.save(image, partial)
