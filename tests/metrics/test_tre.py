# SPDX-License-Identifier: Apache-2.0
"""Target registration error against hand-computed values and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.metrics import TREMetric, foreground_tre, landmark_tre, target_registration_error

STATISTICS = ("mean", "median", "p95", "max", "rms")


def translation(*shift: float) -> np.ndarray:
    matrix = np.eye(len(shift) + 1)
    matrix[:-1, -1] = shift
    return matrix


def oblique_affine(seed: int = 0, dims: int = 3) -> torch.Tensor:
    """Rotated, anisotropic and left-handed."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(dims, dims)))[0]
    matrix = np.eye(dims + 1)
    matrix[:dims, :dims] = rotation @ np.diag(np.array([-0.7, 1.3, 2.5])[:dims])
    matrix[:dims, dims] = rng.normal(0, 40, dims)
    return torch.tensor(matrix)


def nearby(seed: int, dims: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    matrix = np.eye(dims + 1)
    matrix[:dims] += rng.normal(0, 0.05, (dims, dims + 1))
    return matrix


def test_hand_computed_3d() -> None:
    quarter = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    # (3, 4, 9) turns to (-4, 3, 9): 7 and 1 apart
    errors = target_registration_error(quarter, np.eye(4), [[3.0, 4.0, 9.0], [0, 0, 5]])
    assert errors.tolist() == pytest.approx([np.sqrt(50), 0])
    assert target_registration_error(translation(1, 2, 2), translation(0, 0, 0), [[7.0, 8, 9]])[0] == pytest.approx(3)


def test_hand_computed_2d() -> None:
    double = np.diag([2.0, 2.0, 1.0])
    assert target_registration_error(double, np.eye(3), [[3.0, 4.0]]).tolist() == [5.0]


def test_landmarks() -> None:
    fixed = np.array([[0.0, 0, 0], [10, 0, 0]])
    moving = fixed + [0, 3, 4]
    assert landmark_tre(np.eye(4), fixed, moving).tolist() == [5.0, 5.0]
    assert landmark_tre(translation(0, 3, 4), fixed, moving).tolist() == [0.0, 0.0]


def test_foreground_of_two_voxels_on_an_anisotropic_grid() -> None:
    mask = torch.zeros(1, 4, 4, 4)
    mask[0, 0, 0, 0] = mask[0, 3, 0, 0] = 1
    image = MetaTensor(torch.rand(1, 4, 4, 4), affine=torch.diag(torch.tensor([2.0, 1, 1, 1])))
    stretch = np.diag([1.5, 1, 1, 1])
    # the voxels lie at x = 0 and x = 6 mm; the error is half of x
    got = foreground_tre(stretch, np.eye(4), image, mask=mask)
    assert got == pytest.approx({"mean": 1.5, "median": 1.5, "p95": 2.85, "max": 3.0, "rms": np.sqrt(4.5)})


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), dims=st.sampled_from([2, 3]))
def test_foreground_statistics_are_those_of_every_voxel(seed: int, dims: int) -> None:
    shape = (13, 9, 11)[:dims]
    rng = np.random.default_rng(seed)
    mask = torch.tensor(rng.random((1, *shape)) < 0.2)
    mask[(0,) * (dims + 1)] = True
    affine = oblique_affine(seed, dims)
    got = foreground_tre(nearby(seed, dims), nearby(seed + 1, dims), MetaTensor(mask.float(), affine=affine), mask)
    index = np.argwhere(mask[0].numpy())
    world = index @ affine[:dims, :dims].numpy().T + affine[:dims, dims].numpy()
    difference = nearby(seed, dims) - nearby(seed + 1, dims)
    errors = np.linalg.norm(world @ difference[:dims, :dims].T + difference[:dims, dims], axis=1)
    expected = [errors.mean(), np.median(errors), np.percentile(errors, 95), errors.max(), np.sqrt((errors**2).mean())]
    assert list(got.values()) == pytest.approx(expected, rel=1e-9)


def test_subsample_is_close_to_every_voxel_and_its_maximum_exact() -> None:
    side = 64
    image = MetaTensor(torch.ones(1, side, side, side), affine=oblique_affine())
    mask = torch.zeros(1, side, side, side, dtype=torch.bool)
    mask[:, 4:-2, 3:-6, 5:-7] = True
    got = foreground_tre(nearby(3), np.eye(4), image, mask)
    assert got == foreground_tre(nearby(3), np.eye(4), image, mask)
    index = np.argwhere(mask[0].numpy())
    world = index @ oblique_affine()[:3, :3].numpy().T + oblique_affine()[:3, 3].numpy()
    errors = target_registration_error(nearby(3), np.eye(4), world)
    assert got["max"] == pytest.approx(errors.max(), rel=1e-12)
    assert got["mean"] == pytest.approx(errors.mean(), rel=5e-3)
    assert got["p95"] == pytest.approx(np.percentile(errors, 95), rel=5e-3)


def test_foreground_that_is_detected_and_images_without_contrast() -> None:
    image = torch.zeros(1, 20, 20)
    image[0, 5:10, 5:10] = 100.0
    stretch = np.diag([2.0, 1.0, 1.0])
    assert foreground_tre(stretch, np.eye(3), MetaTensor(image))["max"] == 9.0
    assert foreground_tre(stretch, np.eye(3), MetaTensor(torch.ones(1, 20, 20)))["max"] == 19.0


def test_a_transform_that_is_not_finite_is_infinitely_wrong() -> None:
    broken = np.full((4, 4), np.nan)
    assert target_registration_error(broken, np.eye(4), [[1.0, 2, 3]]).tolist() == [np.inf]
    image = MetaTensor(torch.rand(1, 6, 6, 6))
    assert set(foreground_tre(broken, np.eye(4), image).values()) == {np.inf}
    metric = TREMetric()
    metric([broken, np.eye(4)], [np.eye(4), np.eye(4)], fixed=[image, image])
    assert float(metric.aggregate()) == np.inf


def test_metric_takes_pairs_of_different_shapes_and_each_statistic() -> None:
    fixed = [MetaTensor(torch.rand(1, 8, 9, 10), affine=oblique_affine()), MetaTensor(torch.rand(1, 12, 6, 7))]
    estimates, truths = [nearby(0), nearby(1)], [nearby(2), np.eye(4)]
    for statistic in STATISTICS:
        metric = TREMetric(statistic)
        rows = metric(estimates, truths, fixed=fixed)
        expected = [foreground_tre(a, t, f)[statistic] for a, t, f in zip(estimates, truths, fixed, strict=True)]
        assert rows[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
        assert float(metric.aggregate()) == pytest.approx(np.mean(expected), rel=1e-6)


def test_metric_takes_a_collated_batch() -> None:
    batch = torch.utils.data.default_collate([torch.tensor(nearby(0)), torch.tensor(nearby(1))])
    fixed = [MetaTensor(torch.rand(1, 8, 9, 10), affine=oblique_affine(i)) for i in range(2)]
    assert TREMetric()(batch, torch.eye(4).expand(2, 4, 4), fixed=fixed).shape == (2, 1)


def test_user_errors() -> None:
    image = MetaTensor(torch.rand(1, 6, 6, 6))
    cases = [
        ("affine", lambda: target_registration_error(np.eye(3), np.eye(4), [[1.0, 2, 3]])),
        ("truth", lambda: target_registration_error(np.eye(4), np.full((4, 4), np.nan), [[1.0, 2, 3]])),
        ("points", lambda: target_registration_error(np.eye(4), np.eye(4), np.zeros((0, 3)))),
        ("moving_points", lambda: landmark_tre(np.eye(4), np.zeros((2, 3)), np.zeros((3, 3)))),
        ("mask", lambda: foreground_tre(np.eye(4), np.eye(4), image, torch.zeros(1, 6, 6, 6))),
        ("mask", lambda: foreground_tre(np.eye(4), np.eye(4), image, torch.ones(1, 5, 6, 6))),
        ("fixed", lambda: TREMetric()([np.eye(4)], [np.eye(4)])),
        ("statistic", lambda: TREMetric("mode")),
        ("metric", lambda: TREMetric().aggregate()),
    ]
    for name, call in cases:
        with pytest.raises(RegistrationError) as caught:
            call()
        assert caught.value.argument == name
