# SPDX-License-Identifier: Apache-2.0
"""Candidates by correlation: found wherever the images lie, in any contrast, and told from what is not there."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from monai_zsreg.geometry import Grid
from monai_zsreg.registration import correlate as module
from monai_zsreg.registration.correlate import Candidates, correlate
from monai_zsreg.registration.side import Level


def level(values: torch.Tensor, affine: torch.Tensor | None = None) -> Level:
    matrix = torch.eye(values.ndim + 1, dtype=torch.float64) if affine is None else affine
    return Level(values, Grid(tuple(values.shape), matrix))


def margin(found: Candidates) -> float:
    """How far the best score stands above the second."""
    return float(found.score[0] - found.score[1]) if len(found.score) > 1 else 1.0


def scene(dims: int, side: int, seed: int = 0) -> torch.Tensor:
    """Smooth blobs of many sizes with edges between them."""
    generator = torch.Generator().manual_seed(seed)
    mode = "bicubic" if dims == 2 else "trilinear"
    total = torch.zeros((side,) * dims)
    for cells in (side // 16, side // 8):
        noise = torch.randn(1, 1, *[cells] * dims, generator=generator)
        total += F.interpolate(noise, size=(side,) * dims, mode=mode, align_corners=False)[0, 0]
    return torch.tanh(total)


def turned(dims: int, degrees: float, shift: list[float], scale: float = 1.0) -> torch.Tensor:
    """A rotation in the plane of the first two axes, with a shift, mm."""
    matrix = torch.eye(dims + 1, dtype=torch.float64)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix[:2, :2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    matrix[:dims, :dims] *= scale
    matrix[:dims, dims] = torch.tensor(shift, dtype=torch.float64)
    return matrix


def view(whole: torch.Tensor, shape: tuple[int, ...], to_whole: torch.Tensor) -> torch.Tensor:
    """A view whose indices ``to_whole`` takes to those of ``whole``."""
    dims = whole.ndim
    index = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in shape])
    index = index @ to_whole[:dims, :dims].mT + to_whole[:dims, dims]
    where = (2 * index + 1) / torch.tensor(whole.shape) - 1
    grid = where.flip(-1).float().view(1, *shape, dims)
    return F.grid_sample(whole[None, None], grid, padding_mode="zeros", align_corners=False)[0, 0]


def error(found: torch.Tensor, truth: torch.Tensor, shape: tuple[int, ...]) -> float:
    """Mean distance of the corners of the middle half of the fixed image."""
    dims = len(shape)
    sides = torch.tensor(shape, dtype=torch.float64)
    corners = torch.cartesian_prod(*[torch.tensor([0.25, 0.75], dtype=torch.float64)] * dims) * sides
    gap = found - truth
    return float((corners @ gap[:dims, :dims].mT + gap[:dims, dims]).norm(dim=1).mean())


def overlapping(dims: int, degrees: float, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two views that share about half of what they show, the second with contrast inverted, and the truth."""
    side = {2: 192, 3: 72}[dims]
    shape = {2: (120, 110), 3: (44, 40, 36)}[dims]
    whole = scene(dims, side)
    first = turned(dims, 0.0, [0.2 * side] + [0.2 * side] * (dims - 1))
    around = torch.tensor([n / 2 for n in shape], dtype=torch.float64)
    # the middle of the second lies 0.3 of a side farther along the first axis
    second = turned(dims, degrees, [0.0] * dims, scale)
    target = first[:dims, dims] + around
    target[0] += 0.3 * shape[0]
    second[:dims, dims] = target - second[:dims, :dims] @ around
    truth = torch.linalg.inv(second) @ first
    return view(whole, shape, first), 1.0 - 0.7 * view(whole, shape, second), truth


@pytest.mark.parametrize("degrees", [0.0, 100.0, -170.0])
def test_finds_overlapping_slices_at_any_rotation_and_scale(degrees: float) -> None:
    fixed, moving, truth = overlapping(2, degrees, scale=1.1)
    found = correlate(level(fixed), level(moving), reach=None, scales=(0.9, 1.0, 1.1))
    assert error(found.transform[0], truth, fixed.shape) < 5.0
    assert margin(found) > 0.1
    assert found.transform.dtype == torch.float64
    assert bool((found.score[:-1] >= found.score[1:]).all())


@pytest.mark.parametrize(("degrees", "reach"), [(-40.0, 45.0), (150.0, None)])
def test_finds_overlapping_volumes(degrees: float, reach: float | None) -> None:
    fixed, moving, truth = overlapping(3, degrees)
    found = correlate(level(fixed), level(moving), reach=reach)
    assert error(found.transform[0], truth, fixed.shape) < 4.0
    assert margin(found) > 0.1


def test_low_frequencies_leave_out_no_place_that_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, moving, _ = overlapping(3, 100.0)
    some = correlate(level(fixed), level(moving), reach=None, count=1)
    monkeypatch.setattr(module, "_TURNS_KEPT", 24)
    every = correlate(level(fixed), level(moving), reach=None, count=1)
    assert error(some.transform[0], every.transform[0], fixed.shape) < 1.0
    assert float(some.score[0]) == pytest.approx(float(every.score[0]), abs=0.02)


def test_headers_and_roles_may_be_any() -> None:
    """A left-handed, anisotropic moving image far away in the world, and the two exchanged."""
    fixed, moving, truth = overlapping(3, 25.0)
    moving = F.avg_pool3d(moving[None, None], (1, 1, 2))[0, 0].flip(0)
    header = torch.diag(torch.tensor([-1.0, 1.0, 2.0, 1.0], dtype=torch.float64))
    header[:3, 3] = torch.tensor([fixed.shape[0] - 1.0, 0.0, 0.5])
    away = turned(3, 0.0, [900.0, -500.0, 70.0])
    found = correlate(level(fixed), level(moving, away @ header)).transform[0]
    assert error(found, away @ truth, fixed.shape) < 4.0
    back = correlate(level(moving, away @ header), level(fixed)).transform[0]
    assert error(torch.linalg.inv(back), away @ truth, fixed.shape) < 4.0


def test_margin_tells_unrelated_images() -> None:
    fixed, moving, _ = overlapping(2, 30.0)
    other = scene(2, 192, seed=5)[:120, :110]
    right = correlate(level(fixed), level(moving), reach=None)
    wrong = correlate(level(fixed), level(other), reach=None)
    assert margin(right) > 0.1 > margin(wrong)
    assert right.score[0] > wrong.score[0] + 0.1


def test_candidates_lie_apart_and_repeat() -> None:
    fixed, moving, _ = overlapping(2, 30.0)
    one, two = (correlate(level(fixed), level(moving), reach=None, count=5, seed=3) for _ in range(2))
    assert torch.equal(one.transform, two.transform)
    assert 1 < len(one.transform) <= 5
    for i in range(len(one.transform)):
        for j in range(i):
            assert error(one.transform[i], one.transform[j], fixed.shape) > 2.0


def test_images_without_structure_give_finite_candidates() -> None:
    flat = torch.full((40, 50), 7.0)
    found = correlate(level(flat), level(flat), reach=None)
    assert bool(found.transform.isfinite().all()) and math.isfinite(margin(found))
    # one slice thick, and hardly more than a voxel
    slab = scene(2, 64)[:, :, None]
    assert bool(correlate(level(slab), level(slab)).transform.isfinite().all())
    tiny = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    assert bool(correlate(level(tiny), level(tiny)).transform.isfinite().all())
