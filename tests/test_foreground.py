# SPDX-License-Identifier: Apache-2.0
"""Tests of what is foreground, what is background, and how bright tissue is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.foreground import (
    appearance,
    background_value,
    foreground_mask,
    quantiles,
    scale_intensity,
    seen_region,
)


def ball(dims: int, air: float, tissue: float, noise: float = 0.0, side: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """A textured ball in air, and where it is."""
    rng = np.random.default_rng(0)
    place = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * dims, indexing="ij"))
    inside = np.linalg.norm(place, axis=0) < 0.6
    values = np.where(inside, tissue + 0.2 * (tissue - air) * place[0], air) + noise * rng.normal(size=inside.shape)
    return torch.from_numpy(values).float(), torch.from_numpy(inside)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("air", "tissue", "noise"),
    [(0.0, 100.0, 0.0), (0.0, 100.0, 1.5), (-1024.0, 40.0, 8.0), (255.0, 30.0, 0.0), (5.0, -5.0, 0.1)],
    ids=["stripped", "noisy", "CT", "dark on bright", "negative"],
)
def test_tissue_stands_out_from_air(dims: int, air: float, tissue: float, noise: float) -> None:
    values, inside = ball(dims, air, tissue, noise)
    found = appearance(values)
    assert float((found.foreground == inside).float().mean()) > 0.995
    assert float(found.background) == pytest.approx(air, abs=0.5 * noise + 1e-3) == background_value(values)
    assert 0.9 * abs(tissue - air) < float(found.scale) < 1.2 * abs(tissue - air) + 4 * noise


@pytest.mark.parametrize("dims", [2, 3])
def test_padding_is_background_wherever_it_lies_in_the_range(dims: int) -> None:
    # as where a brain without its skull was scaled to mean 0 and deviation 1, and 0 put around it
    values, inside = ball(dims, 0.0, 10.0, 0.0)
    values = torch.where(inside, (values - 10.0) * 2 + 0.01, 0.0)
    found = appearance(values)
    assert float(found.background) == 0 and not bool(found.foreground[~inside].any())
    assert float(found.foreground[inside].float().mean()) > 0.8


def test_units_do_not_matter() -> None:
    values, _ = ball(2, 0.0, 1.0, 0.01)
    found = appearance(values)
    for factor, offset in ((1e-6, 0.0), (1e6, 0.0), (-3.0, 7.0), (250.0, -1024.0)):
        other = appearance(factor * values + offset)
        assert torch.equal(other.foreground, found.foreground)
        assert float(other.scale) == pytest.approx(abs(factor) * float(found.scale), rel=1e-3)


def test_of_a_picture_without_a_background_all_but_the_darkest_is_foreground() -> None:
    values = torch.rand(50, 60, generator=torch.Generator().manual_seed(0))
    found = appearance(values)
    assert float(found.background) < 0.02 and float(found.scale) > 0.95
    assert bool(found.foreground[values > 0.1].all()) and not bool(found.foreground[values < 0.04].any())


def test_what_is_faint_counts_when_asked_for() -> None:
    values, inside = ball(2, 0.0, 100.0)
    values[2:6, 2:38] = 3.0
    assert not bool(appearance(values).foreground[3, 10]) and bool(appearance(values, faint=True).foreground[3, 10])
    noisy = values + torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(appearance(noisy, faint=True).foreground, appearance(noisy).foreground)


def test_quantiles_are_numpys() -> None:
    values = torch.randn(90, 100, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(quantiles(values), np.quantile(values.numpy(), [0.005, 0.995]), rtol=1e-4)
    # less than half a per cent shows anything
    dot = torch.zeros(100, 100)
    dot[50, 50] = 7.0
    assert [float(value) for value in quantiles(dot)] == [0.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.float16])
def test_background_of_any_type(dtype: torch.dtype) -> None:
    values, _ = ball(3, -500.0, 40.0)
    assert background_value(values.to(dtype)) == -500.0


def test_background_where_not_all_is_finite() -> None:
    values, _ = ball(2, -1000.0, 40.0)
    values[:3] = math.nan
    values[0, 5] = math.inf
    assert background_value(values) == -1000.0
    assert background_value(torch.full((8, 8), math.nan)) == 0.0


def test_a_mask_shows_foreground_of_any_channel() -> None:
    (one, inside), (other, _) = ball(2, 0.0, 100.0), ball(2, 10.0, 10.0)
    corner = torch.zeros_like(one)
    corner[2:9, 2:9] = 50.0
    mask = foreground_mask(torch.stack([one, other, corner]))
    assert mask.shape == (1, 40, 40) and mask.dtype == torch.bool
    assert torch.equal(mask[0], inside | (corner > 0))
    assert not bool(foreground_mask(torch.full((1, 9, 9), 3)).any())
    assert type(foreground_mask(MetaTensor(one[None]))) is torch.Tensor


def test_scaling_is_to_the_percentiles() -> None:
    values = 1000.0 * torch.randn(2, 80, 90, generator=torch.Generator().manual_seed(0)) - 300.0
    values[1] = 5.0
    scaled = scale_intensity(values)
    low, high = np.quantile(values[0].numpy(), [0.005, 0.995])
    expected = ((values[0].numpy() - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(scaled[0], expected, atol=1e-4)
    assert scaled.dtype == torch.float32 and not bool(scaled[1].any())
    # exact where float32 could not hold the integers
    ids = torch.arange(2**30, 2**30 + 64).view(1, 8, 8)
    assert len(scale_intensity(ids).unique()) > 60


@pytest.mark.parametrize("function", [foreground_mask, scale_intensity])
@pytest.mark.parametrize(
    "image",
    [torch.zeros(8, 8), torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 0, 8), torch.full((1, 8, 8), math.nan)],
    ids=["no channel", "batch", "empty", "nan"],
)
def test_refuses(function, image: torch.Tensor) -> None:
    with pytest.raises(RegistrationError, match="^image: "):
        function(image)


def test_what_a_camera_shows() -> None:
    index = torch.cartesian_prod(torch.arange(80.0), torch.arange(90.0)).view(80, 90, 2)
    radius = (index - torch.tensor([40.0, 45.0])).norm(dim=-1)
    picture = torch.where(radius < 34, 3.0 + torch.rand(80, 90, generator=torch.Generator().manual_seed(0)), 0.0)
    # dark, but within: it stays
    picture[30:36, 40:50] = 0.0
    seen = seen_region(picture)
    assert bool(seen[radius < 30].all())
    assert not bool(seen[radius > 35].any())
    assert not bool(seen[(radius < 34) & (radius > 33.2)].any())
    # no darkness at the rim, or nothing else
    assert bool(seen_region(picture[20:60, 20:60]).all())
    assert bool(seen_region(torch.full((20, 20), 3.0)).all())
