# SPDX-License-Identifier: Apache-2.0
"""Pairs of oblique, anisotropic, left-handed images with a known transform, and ITK as judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from phantoms import sitk_affine, sitk_image, sitk_moved

from monai_zsreg.geometry import AffineParameters, compose_parameters


@dataclass
class KnownPair:
    """Images with two channels, labels of the moving one, and the matrix from fixed to moving world."""

    fixed: MetaTensor
    moving: MetaTensor
    labels: MetaTensor
    affine: np.ndarray


def _header(shape: tuple[int, ...], spacing: tuple[float, ...], flips: tuple[float, ...], deg: float) -> torch.Tensor:
    dims = len(shape)
    angles, shear, zero = (deg,) * (1 if dims == 2 else 3), (0.0,) * (dims * (dims - 1) // 2), (0.0,) * dims
    affine = compose_parameters(AffineParameters(zero, angles, spacing, shear, zero))
    affine[:dims, :dims] *= flips
    affine[:dims, dims] = affine[:dims, :dims] @ [(1 - n) / 2 for n in shape] + np.arange(1, dims + 1)
    return torch.as_tensor(affine)


def _smooth(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    # the rim of zeros makes all ways to treat the border the same
    noise = torch.as_tensor(np.random.default_rng(seed).random((1, 2, *[n // 4 for n in shape]), dtype=np.float32))
    inside = torch.zeros(shape)
    inside[(slice(3, -3),) * len(shape)] = 1.0
    return (
        torch.nn.functional.interpolate(noise, size=shape, mode="bilinear" if len(shape) == 2 else "trilinear")[0]
        * inside
    )


def make_pair(dims: int, seed: int = 0, header_rank: int | None = None) -> KnownPair:
    """``header_rank`` 3 gives 2D images the 4x4 affine that MONAI's readers give them."""
    if dims == 2:
        fixed_shape, moving_shape = (26, 31), (37, 24)
        fixed = _header(fixed_shape, (1.2, 0.9), (1.0, -1.0), 20.0)
        moving = _header(moving_shape, (0.8, 1.5), (-1.0, 1.0), -33.0)
        parameters = AffineParameters((3.0, -2.0), (14.0,), (1.05, 0.93), (0.06,), (5.0, -4.0))
    else:
        fixed_shape, moving_shape = (26, 31, 14), (37, 24, 25)
        fixed = _header(fixed_shape, (1.2, 0.9, 2.0), (1.0, -1.0, 1.0), 12.0)
        moving = _header(moving_shape, (0.8, 1.5, 1.1), (-1.0, 1.0, 1.0), -9.0)
        shear, center = (0.06, -0.03, 0.02), (5.0, -4.0, 9.0)
        parameters = AffineParameters((3.0, -2.0, 4.0), (10.0, -14.0, 8.0), (1.05, 0.93, 1.02), shear, center)

    def image(voxels: torch.Tensor, affine: torch.Tensor, name: str) -> MetaTensor:
        if header_rank == 3 and dims == 2:
            full = torch.eye(4, dtype=torch.float64)
            full[:2, :2], full[:2, 3] = affine[:2, :2], affine[:2, 2]
            affine = full
        meta = {"filename_or_obj": f"/scans/{name}.nii.gz", "pixdim": np.ones(8), "original_affine": affine.clone()}
        return MetaTensor(voxels, affine=affine, meta=meta)

    voxels = _smooth(moving_shape, seed)
    labels = (voxels[:1] * 7).to(torch.int16) * 5
    return KnownPair(
        fixed=image(_smooth(fixed_shape, seed + 100), fixed, f"fixed{seed}"),
        moving=image(voxels, moving, f"moving{seed}"),
        labels=image(labels, moving, f"labels{seed}"),
        affine=compose_parameters(parameters),
    )


@pytest.fixture(params=[2, 3], ids=["2d", "3d"])
def known_pair(request: pytest.FixtureRequest) -> KnownPair:
    return make_pair(request.param)


@pytest.fixture
def pair_of() -> Callable[..., KnownPair]:
    """``pair_of(dims, seed=0, header_rank=None)``."""
    return make_pair


@pytest.fixture
def itk_resample() -> Callable[..., np.ndarray]:
    """``itk_resample(image, grid, affine, nearest=False)``: what ITK makes of it, ``[C, *grid spatial]``.

    ``affine`` maps the world of ``grid`` to the world of ``image``.
    """

    def resample(image: MetaTensor, grid: MetaTensor, affine: np.ndarray, nearest: bool = False) -> np.ndarray:
        images = [sitk_image(image, channel) for channel in range(image.shape[0])]
        return np.stack([sitk_moved(one, sitk_image(grid), sitk_affine(affine), nearest) for one in images])

    return resample
