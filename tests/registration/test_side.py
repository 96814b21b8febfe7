# SPDX-License-Identifier: Apache-2.0
"""Tests of what is known of one image of a pair, and of the frames of two."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from phantoms import diagonal

from monai_zsreg.geometry import AffineParameters, Grid, apply_affine, compose_parameters
from monai_zsreg.registration.side import Frame, Level, Pair, Side, finest_step, longest_extent, pool

OBLIQUE = {
    2: torch.from_numpy(compose_parameters(AffineParameters((9.0, -4.0), (25.0,), (0.8, 1.6), (0.0,), (0.0, 0.0)))),
    3: torch.from_numpy(
        compose_parameters(
            AffineParameters((9.0, -4.0, 2.0), (25.0, -50.0, 10.0), (0.8, 1.6, 3.0), (0.0,) * 3, (0.0,) * 3)
        )
    ),
}


def ramp(grid: Grid) -> torch.Tensor:
    """A linear function of the world."""
    index = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in grid.shape])
    slope = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64)[: grid.dims]
    return (apply_affine(grid.affine, index) @ slope).view(grid.shape)


def disc(dims: int, radius: float, side: int = 60, spacing: float = 1.0) -> tuple[torch.Tensor, Grid]:
    """A ball of ones and the grid it lies on, off the middle."""
    grid = Grid((side,) * dims, diagonal(*[spacing] * dims))
    index = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in grid.shape])
    middle = spacing * torch.tensor([0.55, 0.45, 0.5], dtype=torch.float64)[:dims] * side
    return ((index * spacing - middle).norm(dim=1) <= radius).float().view(grid.shape), grid


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("spacing", [1.0, 3.1, 6.5])
def test_pooling_leaves_everything_where_it_was(dims: int, spacing: float) -> None:
    grid = Grid((24, 17, 13)[:dims], OBLIQUE[dims])
    level = pool(Level(ramp(grid), grid), spacing)
    assert tuple(level.values.shape) == level.grid.shape
    torch.testing.assert_close(level.values, ramp(level.grid))
    for before, after in zip(grid.spacing, level.grid.spacing, strict=True):
        # no whole number of voxels comes nearer
        assert after == pytest.approx(before) if before > spacing else abs(after - spacing) <= before / 2 + 1e-9


def test_a_level_is_sampled_linearly_in_its_window() -> None:
    grid = Grid((9, 12), OBLIQUE[2])
    values = ramp(grid)
    level = Level(values, grid, (torch.tensor(2.0), torch.tensor(4.0)))
    index = torch.tensor([[0.0, 0.0], [3.5, 7.25], [8.0, 11.0]], dtype=torch.float64)
    where = apply_affine(grid.from_world, apply_affine(grid.affine, index))
    expected = (
        ramp(grid)[0, 0] + index @ torch.stack([values[1, 0] - values[0, 0], values[0, 1] - values[0, 0]]) - 2
    ) / 4
    torch.testing.assert_close(level.sample(where), expected)
    # outside, the border goes on
    beyond = apply_affine(grid.from_world, apply_affine(grid.affine, torch.tensor([[-20.0, 0.0]]).double()))
    assert float(level.sample(beyond)) == pytest.approx(float(expected[0]))


def test_single_voxels_thousands_of_times_as_bright_are_cut_off() -> None:
    values, grid = disc(2, 10.0)
    window = (torch.tensor(0.0), torch.tensor(1.0))
    assert Level(values, grid, window).clipped().values is values
    values[0, 0], values[1, 1] = 1e12, -1e12
    clipped = Level(values, grid, window).clipped().values
    assert float(clipped.abs().max()) == 1000.0 and values[0, 0] == 1e12
    torch.testing.assert_close(clipped[2:, 2:], values[2:, 2:])


@pytest.mark.parametrize("dims", [2, 3])
def test_center_radius_and_size_are_those_of_a_ball(dims: int) -> None:
    radius, spacing = 18.0, 1.5
    values, grid = disc(dims, radius, 40, spacing)
    side = Side(values, grid, spacing, spacing)
    torch.testing.assert_close(
        side.center.double(), spacing * 40 * torch.tensor([0.55, 0.45, 0.5]).double()[:dims], atol=0.3, rtol=0
    )
    assert side.radius == pytest.approx(radius * math.sqrt(dims / (dims + 2)), rel=0.03)
    assert side.size == pytest.approx(math.pi * radius**2 if dims == 2 else 4 / 3 * math.pi * radius**3, rel=0.03)
    torch.testing.assert_close(side.weight.values, values)


def test_a_mask_is_taken_at_its_word_and_what_was_not_seen_does_not_count() -> None:
    values, grid = disc(2, 18.0)
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[5:20, 5:50] = True
    seen = torch.ones_like(mask)
    seen[:, 30:] = False
    assert torch.equal(Side(values, grid, 1.0, 1.0, mask=mask).weight.values, mask.float())
    assert torch.equal(Side(values, grid, 1.0, 1.0, seen=seen).weight.values, values * seen)
    assert torch.equal(Side(values, grid, 1.0, 1.0, mask=mask, seen=seen).weight.values, (mask & seen).float())
    # also where levels are averaged: a block that was seen in part does not count
    coarse = Side(values, grid, 1.0, 4.0, seen=seen)
    assert coarse.weight.grid.shape == coarse.coarse.grid.shape
    assert float(coarse.weight.values[:, 7:].max()) == 0.0 < float(coarse.weight.values[:, :7].max())


def test_levels_are_made_once() -> None:
    values, grid = disc(2, 18.0, 64)
    side = Side(values, grid, 1.0, 4.0)
    assert side.at(2.0) is side.at(2.0) and side.at(4.0) is side.coarse
    assert [round(side.at(step).grid.spacing[0], 6) for step in (1.0, 2.0, 4.0)] == [1.0, 2.0, 4.0]
    assert all(side.at(step).window == side.coarse.window for step in (1.0, 2.0))


def test_a_frame_has_its_origin_in_the_object_and_no_shear() -> None:
    grid = Grid((24, 17, 13), OBLIQUE[3])
    frame = Frame.of(grid, torch.tensor([3.0, -2.0, 7.0]), 20.0)
    linear = frame.to_world[:3, :3] / 20.0
    torch.testing.assert_close(linear @ linear.mT, torch.eye(3).double())
    assert frame.to_world[:3, 3].tolist() == [3.0, -2.0, 7.0]
    point = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
    world = apply_affine(frame.to_world, point)
    torch.testing.assert_close(
        apply_affine(frame.to_index(grid), point), apply_affine(torch.linalg.inv(grid.affine), world)
    )
    torch.testing.assert_close(apply_affine(frame.to_grid(grid), point), apply_affine(grid.from_world, world))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_pair_starts_where_it_is_told(dims: int) -> None:
    values, grid = disc(dims, 14.0, 40)
    other = Grid(grid.shape, OBLIQUE[dims])
    fixed, moving = Side(values, grid, 1.0, 2.0), Side(values, other, 1.0, 2.0)
    initial = torch.from_numpy(np.linalg.inv(OBLIQUE[dims].numpy()))
    pair = Pair(fixed, moving, initial)
    torch.testing.assert_close(pair.to_world(pair.start), initial)
    torch.testing.assert_close(pair.to_frames(pair.to_world(pair.start)), pair.start)
    torch.testing.assert_close(Pair(fixed, moving).to_world(Pair(fixed, moving).start), torch.eye(dims + 1).double())
    # centers on one another, in frames: the origin
    centered = pair.to_world(pair.centered)
    torch.testing.assert_close(centered[:dims, :dims], torch.eye(dims).double())
    torch.testing.assert_close(apply_affine(centered, fixed.center.double()[None])[0], moving.center.double())
    assert float(pair.centered[:dims, dims].abs().max()) < 1e-5


@pytest.mark.parametrize("dims", [2, 3])
def test_overlap_is_of_what_both_show(dims: int) -> None:
    values, grid = disc(dims, 14.0, 40)
    part = values[:20].contiguous()
    fixed, moving = Side(values, grid, 1.0, 1.0), Side(part, Grid(part.shape, grid.affine), 1.0, 1.0)
    pair = Pair(fixed, moving)
    shown = float((part > 0.1).sum() / (values > 0.1).sum())
    assert pair.overlap(pair.start) == pytest.approx((1 + shown) / 2, abs=0.02) and shown < 0.6
    away = torch.eye(dims + 1, dtype=torch.float64)
    away[0, -1] = 100.0
    assert pair.overlap(pair.to_frames(away)) == 0.0


def test_steps_go_by_the_finer_image_but_not_without_end() -> None:
    fine, coarse = Grid((100, 90, 80), diagonal(1.0, 1.0, 1.2)), Grid((40, 40, 40), diagonal(3.0, 3.0, 3.0))
    assert longest_extent(fine, coarse) == 120.0
    assert finest_step(fine, coarse) == (1.0, 3.0)
    assert finest_step(fine, coarse, 2.0) == (2.0, 3.0) and finest_step(fine, coarse, 5.0) == (5.0, 5.0)
    # micrometers: steps along the longest side are what costs
    microscope = Grid((4096, 4096), diagonal(0.0005, 0.0005))
    assert finest_step(microscope, microscope)[0] == pytest.approx(0.0005 * 4096 / 512)
