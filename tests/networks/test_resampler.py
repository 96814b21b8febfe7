# SPDX-License-Identifier: Apache-2.0
"""Tests of the affine resampler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.ndimage
import torch

from monai_zsreg.geometry import Grid
from monai_zsreg.networks import AffineResampler
from monai_zsreg.networks.coordinates import theta_from_unit

SHAPES = [(12, 17), (9, 7, 8)]


def image_of(shape: tuple[int, ...], channels: int = 2) -> torch.Tensor:
    return torch.rand(1, channels, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pull_of(dims: int) -> torch.Tensor:
    """Fixed indices to moving indices: a little of everything."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.eye(dims + 1, dtype=torch.float64)
    matrix[:dims] += 0.3 * (torch.rand(dims, dims + 1, generator=generator, dtype=torch.float64) - 0.5)
    matrix[:dims, dims] += torch.tensor([1.3, -0.8, 0.6])[:dims]
    return matrix


def theta_from_index(matrix: torch.Tensor, fixed: Sequence[int], moving: Sequence[int]) -> torch.Tensor:
    one, two = (Grid(tuple(size), torch.eye(len(size) + 1, dtype=torch.float64)) for size in (fixed, moving))
    return (two.from_world @ matrix @ torch.linalg.inv(one.from_world))[: one.dims]


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_copies(shape, device):
    image = image_of(shape).float().to(device)
    theta = theta_from_unit(torch.eye(len(shape), len(shape) + 1), list(shape))[None].to(device)
    torch.testing.assert_close(AffineResampler()(image, theta, list(shape)), image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_against_scipy_on_another_grid(shape):
    image, pull = image_of(shape), pull_of(len(shape))
    size = [n + 3 for n in shape]
    theta = theta_from_index(pull, size, shape)[None]
    got = AffineResampler()(image, theta, size)[0]
    index = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij")).reshape(len(shape), -1)
    source = pull[:-1, :-1].numpy() @ index + pull[:-1, -1:].numpy()
    for c in range(2):
        expected = scipy.ndimage.map_coordinates(image[0, c].numpy(), source, order=1, mode="grid-constant")
        np.testing.assert_allclose(got[c].numpy().ravel(), expected, atol=1e-9)


def test_zeros_outside():
    image = torch.ones(1, 1, 6, 6)
    pull = torch.eye(3, dtype=torch.float64)
    pull[0, 2] = 3.0
    theta = theta_from_index(pull, (6, 6), (6, 6))[None]
    moved = AffineResampler()(image, theta, [6, 6])
    torch.testing.assert_close(moved[0, 0, :3], torch.ones(3, 6))
    assert (moved[0, 0, 3:].abs() < 1e-5).all()


def test_a_batch_has_a_matrix_each():
    image = image_of((8, 8)).repeat(2, 1, 1, 1)
    still = theta_from_index(torch.eye(3, dtype=torch.float64), (8, 8), (8, 8))
    pull = torch.eye(3, dtype=torch.float64)
    pull[1, 2] = 2.0
    moved = AffineResampler()(image, torch.stack([still, theta_from_index(pull, (8, 8), (8, 8))]), [8, 8])
    torch.testing.assert_close(moved[0], image[0])
    torch.testing.assert_close(moved[1, :, :, :6], image[1, :, :, 2:])


def test_image_and_matrix_have_gradients():
    image = image_of((6, 7)).requires_grad_()
    theta = theta_from_index(pull_of(2), (6, 7), (6, 7))[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: AffineResampler()(i, t, [6, 7]), (image, theta))


@pytest.mark.parametrize("shape", SHAPES)
def test_scripts(shape):
    image, theta = image_of(shape), theta_from_index(pull_of(len(shape)), shape, shape)[None]
    resampler = AffineResampler()
    torch.testing.assert_close(
        torch.jit.script(resampler)(image, theta, list(shape)), resampler(image, theta, list(shape))
    )
