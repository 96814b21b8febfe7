# SPDX-License-Identifier: Apache-2.0
"""Tests of the modality independent neighborhood descriptor."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from monai_zsreg.errors import RegistrationError
from monai_zsreg.registration.descriptors import MINDSSC


def plain(image: torch.Tensor, dilation: int) -> torch.Tensor:
    """The definition, channel by channel, on the whole image: ``[1, C, *spatial]``; wrong at the rim."""
    dims = image.ndim - 1
    steps = [tuple(s * dilation if a == axis else 0 for a in range(dims)) for axis in range(dims) for s in (1, -1)]
    average = F.avg_pool2d if dims == 2 else F.avg_pool3d
    channels = []
    for one, other in combinations(steps, 2):
        if all(a == -b for a, b in zip(one, other, strict=True)):
            continue
        axes = list(range(1, dims + 1))
        gap = torch.roll(image, [-s for s in one], axes) - torch.roll(image, [-s for s in other], axes)
        channels.append(average((gap**2)[:, None], 3, 1, 1)[:, 0])
    distance = torch.stack(channels, 1)
    return torch.exp(-(distance - distance.amin(1, keepdim=True)) / (distance.mean(1, keepdim=True) + 1e-10))


@pytest.mark.parametrize(("dims", "channels"), [(2, 4), (3, 12)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_is_what_its_definition_says(dims: int, channels: int, dilation: int) -> None:
    image = torch.rand(2, *[15, 14, 13][:dims], generator=torch.Generator().manual_seed(0))
    descriptor = MINDSSC(dims, dilation)
    found = descriptor(image)
    inner = (slice(None), slice(None), *[slice(descriptor.margin, -descriptor.margin)] * dims)
    expected = plain(image, dilation)[inner]
    assert found.shape == expected.shape == (2, channels, *[n - 2 * descriptor.margin for n in image.shape[1:]])
    # the order of the channels is free
    torch.testing.assert_close(found.sort(1).values, expected.sort(1).values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_does_not_see_brightness_contrast_or_inversion(dims: int) -> None:
    image = torch.rand(1, *[12] * dims, generator=torch.Generator().manual_seed(0))
    found = MINDSSC(dims)(image)
    for changed in (3 * image + 2, 1 - image, -0.5 * image):
        torch.testing.assert_close(MINDSSC(dims)(changed), found, atol=1e-4, rtol=0)
    assert (MINDSSC(dims)(image.flip(1)) - found).abs().mean() > 0.05


def test_nothing_to_see_is_no_division_by_zero() -> None:
    assert MINDSSC(3)(torch.zeros(1, 8, 8, 8)).eq(1).all()


@pytest.mark.parametrize(("name", "arguments"), [("spatial_dims", (4,)), ("dilation", (2, 0)), ("dilation", (2, 1.5))])
def test_wrong_arguments(name: str, arguments: tuple) -> None:
    with pytest.raises(RegistrationError, match=name):
        MINDSSC(*arguments)
