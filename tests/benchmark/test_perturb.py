# SPDX-License-Identifier: Apache-2.0
"""Transforms, grids and damage, against positions of a blob that is known in world coordinates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from monai_zsreg.benchmark import perturb, simulate
from monai_zsreg.benchmark.perturb import PROTOCOLS, draw, pad_to_fit, resample
from monai_zsreg.geometry import Grid, apply_affine

from .conftest import AFFINE, SHAPE, head

GRID = Grid(SHAPE, torch.from_numpy(AFFINE))


def _blob(grid: Grid, index: tuple[float, ...], width: float = 3.0) -> np.ndarray:
    axes = np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")
    gaps = sum(((a - i) * s / (width * 2)) ** 2 for a, i, s in zip(axes, index, grid.spacing, strict=True))
    return np.exp(-gaps).astype(np.float32) * (gaps < 9)


def _center(image: np.ndarray, grid: Grid) -> np.ndarray:
    where = np.argwhere(image > 1e-4)
    weights = image[tuple(where.T)].astype(float)
    return apply_affine(grid.affine, torch.from_numpy((weights[:, None] * where).sum(0) / weights.sum())[None])[
        0
    ].numpy()


@pytest.mark.parametrize("key", PROTOCOLS)
def test_draws_keep_within_the_protocol(key: tuple[str, int]) -> None:
    limits, dims = PROTOCOLS[key], key[1]
    grid = GRID if dims == 3 else Grid((180, 218), torch.eye(3, dtype=torch.float64))
    drawn = [draw(limits, grid, np.random.default_rng(i)) for i in range(300)]
    angles = np.array([d.rotation_deg for d in drawn])
    assert angles.max() <= limits.angle_deg and angles.max() > 0.9 * limits.angle_deg
    reach = (
        np.linalg.norm(grid.extent.numpy() / 3)
        if limits.shift_of_side
        else limits.shift * (dims**0.5 if limits.per_axis else 1)
    )
    shifts = np.array([d.shift for d in drawn])
    assert shifts.max() <= reach and shifts.max() > 0.7 * reach
    for d in drawn:
        assert torch.linalg.det(d.matrix[:dims, :dims]) > 0.5
        moved = apply_affine(d.matrix, grid.center[None])[0] - grid.center
        assert float(moved.norm()) == pytest.approx(d.shift, abs=1e-9)


def test_volume_rotations_are_uniform() -> None:
    drawn = [draw(PROTOCOLS["so3", 3], GRID, np.random.default_rng(i)) for i in range(600)]
    # mean angle of a uniform rotation: pi / 2 + 2 / pi
    assert np.mean([d.rotation_deg for d in drawn]) == pytest.approx(math.degrees(math.pi / 2 + 2 / math.pi), abs=5)
    # each column is uniform on the sphere, so its mean is near 0
    assert np.abs(np.mean([d.matrix[:3, :3].numpy() for d in drawn], axis=0)).max() < 0.08


@pytest.mark.parametrize("key", PROTOCOLS)
def test_nothing_leaves_the_padded_grid(key: tuple[str, int]) -> None:
    limits, dims = PROTOCOLS[key], key[1]
    if dims == 3:
        grid, mask = GRID, head() > 0
    else:
        grid, mask = Grid((90, 120), torch.eye(3, dtype=torch.float64)), np.zeros((90, 120), bool)
        mask[5:80, 30:110] = True
    target, pad = pad_to_fit(grid, mask, limits)
    assert target.shape == tuple(n + sum(p) for n, p in zip(grid.shape, pad, strict=True))
    points = apply_affine(grid.affine, torch.from_numpy(np.argwhere(mask)[::7].astype(float)))
    back = torch.linalg.inv(target.affine)
    for i in range(60):
        index = apply_affine(back, apply_affine(draw(limits, grid, np.random.default_rng(i)).matrix, points))
        assert bool((index >= 0).all()) and bool((index <= torch.tensor(target.shape) - 1).all())
    # padding moves no voxel in the world
    assert torch.allclose(
        apply_affine(target.affine, torch.tensor([[float(p[0]) for p in pad]], dtype=torch.float64)),
        grid.affine[:-1, -1][None],
    )


def test_resampled_blob_lands_where_the_matrix_says() -> None:
    index = (20.0, 27.0, 16.0)
    image = _blob(GRID, index)
    target, _ = pad_to_fit(GRID, image > 0, PROTOCOLS["mild", 3])
    drawn = draw(PROTOCOLS["mild", 3], GRID, np.random.default_rng(5))
    moved = resample(image, GRID, target, drawn.matrix)
    expected = apply_affine(drawn.matrix, apply_affine(GRID.affine, torch.tensor([index], dtype=torch.float64)))[
        0
    ].numpy()
    assert np.allclose(_center(moved, target), expected, atol=0.05)
    assert moved.min() >= image.min() and moved.max() <= image.max()


def test_identity_resampling_copies() -> None:
    image = head()
    assert np.allclose(resample(image, GRID, GRID, torch.eye(4, dtype=torch.float64)), image, atol=1e-3)


def test_thick_slices_keep_world_positions() -> None:
    image = _blob(GRID, (20.0, 27.0, 16.0))
    fine, parts = perturb.thick_grid(GRID, 2, 5.0)
    sampled = resample(image, GRID, fine, torch.eye(4, dtype=torch.float64))
    thick, grid = perturb.average_slices(sampled, fine, 2, parts)
    assert grid.spacing[2] == pytest.approx(5.0) and grid.shape == thick.shape == (44, 48, 18)
    assert np.allclose(_center(thick, grid), _center(image, GRID), atol=0.05)


@pytest.mark.parametrize("top", [True, False])
def test_cut_slices_keep_world_positions(top: bool) -> None:
    image = _blob(GRID, (20.0, 27.0, 24.0 if not top else 10.0), 1.5)
    lone = image.copy()
    # something else to cut off, at the far end
    lone[20, 20, 2 if not top else 33] = 1.0
    cut, grid = perturb.cut_slices(lone, GRID, 2, 1 / 3, top)
    assert cut.shape[2] < SHAPE[2]
    assert np.allclose(_center(cut, grid), _center(image, GRID), atol=0.05)


def test_cavity_is_background_inside_the_foreground() -> None:
    image = head()
    out = perturb.blacken_cavity(image, GRID, image > 5, np.random.default_rng(0))
    gone = (out != image).sum() / (image > 5).sum()
    assert 0.003 < gone < 0.06
    assert (out[out != image] == 0).all()


def test_bias_and_noise_have_the_stated_size() -> None:
    field = simulate.bias_field((60, 50, 40), 0.4, np.random.default_rng(0))
    assert field.shape == (60, 50, 40)
    assert np.abs(field - 1).max() == pytest.approx(0.4, abs=0.02)
    assert np.abs(np.diff(field, axis=0)).max() < 0.08
    image = head()
    noisy = simulate.add_noise(image, image > 5, 0.05, np.random.default_rng(0))
    assert (noisy - image).std() == pytest.approx(0.05 * np.percentile(image[image > 5], 99), rel=0.02)


def test_simulated_contrast_inverts_and_moves_nothing() -> None:
    image = head()
    mask = image > 5
    t2 = simulate.simulated_t2(image, mask)
    assert np.corrcoef(image[mask], t2[mask])[0, 1] < -0.7
    assert (t2[~mask] == 0).mean() > 0.99
    # a contrast that moved along an axis would not commute with turning that axis round
    for axis in range(3):
        turned = simulate.simulated_t2(np.flip(image, axis).copy(), np.flip(mask, axis).copy())
        assert np.allclose(np.flip(turned, axis), t2, atol=1e-4)


def test_tissue_classes_are_used() -> None:
    image = head()
    mask = image > 5
    tissue = np.where(mask, 2, 0)
    tissue[22:30, 20:30, 15:20] = 1
    tissue[10:20, 20:30, 15:20] = 3
    t2 = simulate.simulated_t2(image, mask, tissue)
    assert t2[24:28, 23:27, 16:19].mean() > t2[12:18, 23:27, 16:19].mean() + 0.1
