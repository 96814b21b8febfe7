# SPDX-License-Identifier: Apache-2.0
"""Tests of the default method as a module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from monai.data import MetaTensor
from phantoms import moved_by, pooled, turn

from monai_zsreg import RegistrationError, RegistrationWarning, register
from monai_zsreg.registration import AffineRegistration


@pytest.fixture(scope="module")
def pairs(slices: SimpleNamespace) -> torch.Tensor:
    """``[3, 2, H, W]`` at 2 mm, the moving images at several angles."""
    one, two = (pooled(MetaTensor(image.as_tensor(), affine=torch.eye(3)), 2) for image in (slices.t1, slices.t2))
    moving = [moved_by(two, turn(one, angle, (angle / 9, 4.0))) for angle in (0.0, 75.0, 160.0)]
    return torch.stack([torch.cat([m.as_tensor(), one.as_tensor()]) for m in moving])


def test_a_batch_gives_what_single_pairs_give(pairs: torch.Tensor) -> None:
    module = AffineRegistration(2)
    together = module(pairs)
    assert together.shape == (3, 1, *pairs.shape[2:]) and together.dtype == pairs.dtype
    for pair, moved in zip(pairs, together, strict=True):
        assert torch.equal(module(pair[None])[0], moved)
        alone = register(pair[1:], pair[:1]).moved.as_tensor()
        torch.testing.assert_close(moved, alone, atol=0.01 * float(alone.max()), rtol=0)


def test_voxels_of_another_size_are_another_picture_of_the_same(pairs: torch.Tensor) -> None:
    small, large = (AffineRegistration(2)(pairs[1:2], spacing=spacing) for spacing in (1.0, (2.5, 2.5)))
    torch.testing.assert_close(small, large, atol=0.02 * float(small.max()), rtol=0)


def test_noise_warns(pairs: torch.Tensor) -> None:
    noise = torch.rand(pairs[:1, :1].shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RegistrationWarning, match="registration failed"):
        AffineRegistration(2)(torch.cat([noise, pairs[:1, 1:]], 1))


@pytest.mark.parametrize(
    ("name", "options"),
    [("spatial_dims", {"spatial_dims": 4}), ("transform", {"transform": "elastic"}), ("options", {"colour": 1})],
)
def test_refuses_options(name: str, options: dict) -> None:
    with pytest.raises(RegistrationError) as caught:
        AffineRegistration(**{"spatial_dims": 2} | options)
    assert caught.value.argument == name


def test_refuses_images(pairs: torch.Tensor) -> None:
    for image in (pairs[0], pairs[:, :1], pairs[..., None]):
        with pytest.raises(RegistrationError, match="^image: "):
            AffineRegistration(2)(image)
    for spacing in (0.0, (1.0, 2.0, 3.0), float("nan")):
        with pytest.raises(RegistrationError, match="^spacing: "):
            AffineRegistration(2)(pairs, spacing=spacing)
