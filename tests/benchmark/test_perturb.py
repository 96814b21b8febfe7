# SPDX-License-Identifier: Apache-2.0
"""Transforms, grids and damage, against positions of a blob that is known in world coordinates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from monai_zsreg.benchmark import damage
from monai_zsreg.benchmark.perturb import PROTOCOLS, draw, padding
from monai_zsreg.benchmark.volumes import Volume, moved, transformed

from .conftest import AFFINE, SHAPE, head

HEAD = Volume(head(), AFFINE)


def _blob(index: tuple[float, ...], width: float = 3.0) -> Volume:
    axes = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")
    gaps = sum(((a - i) * s / (width * 2)) ** 2 for a, i, s in zip(axes, index, HEAD.spacing, strict=True))
    return Volume(np.exp(-gaps).astype(np.float32) * (gaps < 9), AFFINE)


def _center(image: Volume) -> np.ndarray:
    where = np.argwhere(image.values > 1e-4)
    weights = image.values[tuple(where.T)].astype(float)
    return transformed(image.affine, (weights[:, None] * where).sum(0) / weights.sum())


@pytest.mark.parametrize("key", PROTOCOLS)
def test_draws_keep_within_the_protocol(key: tuple[str, int]) -> None:
    limits, dims = PROTOCOLS[key], key[1]
    image = HEAD if dims == 3 else Volume(np.zeros((180, 218)), np.eye(3))
    drawn = [draw(limits, image, np.random.default_rng(i)) for i in range(300)]
    angles, shifts = (np.array([info[name] for _, info in drawn]) for name in ("rotation_deg", "shift"))
    assert 0.9 * limits.angle_deg < angles.max() <= limits.angle_deg
    reach = np.linalg.norm(limits.reach(image)) if limits.per_axis else limits.shift
    assert 0.7 * reach < shifts.max() <= reach
    for matrix, info in drawn:
        assert np.linalg.det(matrix[:dims, :dims]) > 0.5
        assert np.linalg.norm(transformed(matrix, image.center) - image.center) == pytest.approx(
            info["shift"], abs=1e-3
        )


def test_volume_rotations_are_uniform() -> None:
    drawn = [draw(PROTOCOLS["so3", 3], HEAD, np.random.default_rng(i)) for i in range(600)]
    # mean angle of a uniform rotation: pi / 2 + 2 / pi
    expected = math.degrees(math.pi / 2 + 2 / math.pi)
    assert np.mean([info["rotation_deg"] for _, info in drawn]) == pytest.approx(expected, abs=5)
    # each column is uniform on the sphere, so its mean is near 0
    assert np.abs(np.mean([matrix[:3, :3] for matrix, _ in drawn], axis=0)).max() < 0.08


@pytest.mark.parametrize("key", PROTOCOLS)
def test_nothing_leaves_the_padded_grid(key: tuple[str, int]) -> None:
    limits = PROTOCOLS[key]
    image, mask = HEAD, head() > 0
    if key[1] == 2:
        image, mask = Volume(np.zeros((90, 120)), np.eye(3)), np.zeros((90, 120), bool)
        mask[5:80, 30:110] = True
    pad, affine = padding(image, mask, limits)
    points = image.points(mask)[::7]
    for i in range(60):
        matrix, _ = draw(limits, image, np.random.default_rng(i))
        index = transformed(np.linalg.inv(affine), transformed(matrix, points))
        assert (index >= 0).all() and (index <= image.shape + 2 * pad - 1).all()
    # padding moves no voxel in the world
    assert np.allclose(transformed(affine, pad), image.affine[:-1, -1])


def test_resampled_blob_lands_where_the_matrix_says() -> None:
    index = (20.0, 27.0, 16.0)
    image = _blob(index)
    pad, affine = padding(image, image.values > 0, PROTOCOLS["mild", 3])
    matrix, _ = draw(PROTOCOLS["mild", 3], image, np.random.default_rng(5))
    shown = moved(image, tuple(image.shape + 2 * pad), affine, np.linalg.inv(matrix))
    assert np.allclose(_center(shown), transformed(matrix, transformed(AFFINE, np.array(index))), atol=0.05)
    assert shown.values.min() >= image.values.min() and shown.values.max() <= image.values.max()
    assert np.allclose(moved(HEAD, SHAPE, AFFINE, np.eye(4)).values, HEAD.values, atol=1e-3)
    away = np.eye(4)
    away[0, 3] = 1e4
    assert not moved(HEAD, SHAPE, AFFINE, away).values.any()


def test_thick_slices_keep_world_positions() -> None:
    image = _blob((20.0, 27.0, 16.0))
    thick = damage.thick_slices(image, SHAPE, AFFINE, np.eye(4), 2, 5.0)
    assert thick.spacing[2] == pytest.approx(5.0) and thick.shape == (44, 48, 18)
    assert np.allclose(_center(thick), _center(image), atol=0.05)


@pytest.mark.parametrize("top", [True, False])
def test_cut_slices_keep_world_positions(top: bool) -> None:
    image = _blob((20.0, 27.0, 24.0 if not top else 10.0), 1.5)
    values = image.values.copy()
    # something else to cut off, at the far end
    values[20, 20, 2 if not top else 33] = 1.0
    cut = damage.cut_end(Volume(values, AFFINE), 2, 1 / 3, top)
    assert cut.shape[2] < SHAPE[2] and np.allclose(_center(cut), _center(image), atol=0.05)


def test_cavity_is_background_inside_the_foreground() -> None:
    out = damage.blacken_cavity(HEAD, HEAD.values > 5, np.random.default_rng(0)).values
    changed = out != HEAD.values
    assert 0.003 < changed.sum() / (HEAD.values > 5).sum() < 0.06 and (out[changed] == 0).all()


def test_bias_and_noise_have_the_stated_size() -> None:
    field = damage.bias_field((60, 50, 40), 0.4, np.random.default_rng(0))
    assert field.shape == (60, 50, 40) and np.abs(field - 1).max() == pytest.approx(0.4, abs=0.02)
    assert np.abs(np.diff(field, axis=0)).max() < 0.08
    image = HEAD.values
    noisy = damage.add_noise(image, image > 5, 0.05, np.random.default_rng(0))
    assert (noisy - image).std() == pytest.approx(0.05 * np.percentile(image[image > 5], 99), rel=0.02)


def test_simulated_contrast_inverts_and_moves_nothing() -> None:
    image = head()
    mask = image > 5
    t2 = damage.simulated_t2(image, mask)
    assert np.corrcoef(image[mask], t2[mask])[0, 1] < -0.7 and (t2[~mask] == 0).mean() > 0.99
    # a contrast that moved along an axis would not commute with turning that axis round
    for axis in range(3):
        turned = damage.simulated_t2(np.flip(image, axis).copy(), np.flip(mask, axis).copy())
        assert np.allclose(np.flip(turned, axis), t2, atol=1e-4)


def test_tissue_classes_are_used() -> None:
    image = head()
    mask = image > 5
    tissue = np.where(mask, 2, 0)
    tissue[22:30, 20:30, 15:20] = 1
    tissue[10:20, 20:30, 15:20] = 3
    t2 = damage.simulated_t2(image, mask, tissue)
    assert t2[24:28, 23:27, 16:19].mean() > t2[12:18, 23:27, 16:19].mean() + 0.1
