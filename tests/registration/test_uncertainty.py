# SPDX-License-Identifier: Apache-2.0
"""Tests of the uncertainty by blackening."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor

import monai_zsreg
from monai_zsreg.errors import RegistrationError
from monai_zsreg.registration.uncertainty import BlackeningUncertainty, Uncertainty, blacken

OBLIQUE = torch.tensor([[-1.5, 0.3, 40.0], [0.2, 2.0, -30.0], [0, 0, 1]], dtype=torch.float64)


def spread_of(count: int, scale: float = 0.02, shape: tuple[int, int] = (12, 9)) -> Uncertainty:
    rng = np.random.default_rng(0)
    matrices = np.tile(np.eye(3), (count, 1, 1))
    matrices[:, :2] += scale * rng.normal(size=(count, 2, 3))
    image = MetaTensor(torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)), affine=OBLIQUE)
    return Uncertainty(matrices, count, matrices[:, :2].var(axis=0, ddof=1), image, image)


@pytest.fixture(scope="module")
def result(load_slice, vgg19_weights):
    values = F.avg_pool2d(load_slice().as_tensor()[None], 2)[0]
    affine = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    fixed = MetaTensor(F.pad(values, [0, 5, 0, 3]), affine=affine)
    moving = MetaTensor(F.pad(values, [5, 0, 3, 0]), affine=affine)
    return monai_zsreg.register(
        fixed, moving, preset="keypoints", vgg19_weights=vgg19_weights, scales=(1,), iterations=1
    )


def test_of_a_real_pair(result):
    uncertainty = result.uncertainty
    assert result.uncertainty is uncertainty
    assert uncertainty.repeats == 10 and 2 <= len(uncertainty.matrices) <= 10
    assert uncertainty.variance.shape == (2, 3)
    assert np.isfinite(uncertainty.variance).all() and (uncertainty.variance >= 0).all()
    assert uncertainty.variance.max() > 0
    assert len({matrix.tobytes() for matrix in uncertainty.matrices}) > 1
    # repeats of a good answer stay near it, mm
    assert np.median(np.abs(uncertainty.matrices - result.affine)[:, :2, 2]) < 4.0


def test_a_large_part_blackened_is_less_certain(result):
    small, large = (
        BlackeningUncertainty(
            result._uncertainty.estimate, result._uncertainty.values, result.fixed, result.moving, part, 4
        ).run(result.affine)
        for part in (0.001, 0.3)
    )
    middle = np.array([[90.0, 110.0]])
    assert large.at(middle)[0] > small.at(middle)[0]


@pytest.mark.parametrize("count", [2, 7])
def test_maps_and_points_agree(count):
    uncertainty = spread_of(count)
    displacement = uncertainty.displacement_map()
    assert displacement.shape == (1, 12, 9) and displacement.dtype == torch.float32
    torch.testing.assert_close(displacement.affine[:2, :2], OBLIQUE[:2, :2])
    index = np.array([[0, 0], [11, 8], [5, 2]])
    world = index @ OBLIQUE[:2, :2].numpy().T + OBLIQUE[:2, 2].numpy()
    at = uncertainty.at(world)
    np.testing.assert_allclose([displacement[0, i, j] for i, j in index], at, rtol=1e-4)
    # from the definition
    mapped = np.einsum("nij,pj->npi", uncertainty.matrices, np.c_[world, np.ones(3)])[..., :2]
    np.testing.assert_allclose(at, np.sqrt(mapped.var(axis=0, ddof=1).sum(axis=-1)), rtol=1e-9)


def test_no_spread_is_no_uncertainty():
    uncertainty = spread_of(5, scale=0.0)
    assert uncertainty.displacement_map().max() < 1e-4
    assert uncertainty.intensity_map().max() < 1e-8
    assert uncertainty.at(np.zeros((1, 2)))[0] < 1e-6


def test_intensity_map_is_the_variance_of_the_moved_images():
    uncertainty = spread_of(6)
    from monai_zsreg.resample import ApplyAffineRegistration

    moved = [ApplyAffineRegistration()(uncertainty.moving, m, uncertainty.fixed) for m in uncertainty.matrices]
    expected = torch.stack([image.as_tensor() for image in moved]).double().var(dim=0)
    got = uncertainty.intensity_map()
    assert got.shape == (1, 12, 9)
    torch.testing.assert_close(got.as_tensor().double(), expected, atol=1e-6, rtol=1e-4)
    assert got.max() > 0


@pytest.mark.parametrize("succeeded", [0, 1])
def test_too_few_repeats_are_no_certainty(succeeded):
    image = MetaTensor(torch.rand(1, 12, 9, generator=torch.Generator().manual_seed(0)), affine=OBLIQUE)
    calls = []

    def estimate(copies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        good = torch.zeros(len(copies), dtype=torch.bool)
        good[0] = len(calls) < succeeded
        calls.append(len(copies))
        return torch.eye(3, dtype=torch.float64).expand(len(copies), 3, 3), good

    uncertainty = BlackeningUncertainty(estimate, image.as_tensor(), image, image, repeats=5, batch=2).run(np.eye(3))
    assert calls == [2, 2, 1]
    assert uncertainty.repeats == 5
    assert np.isinf(uncertainty.variance).all()
    assert np.isinf(uncertainty.at(np.zeros((2, 2)))).all()
    assert torch.isinf(uncertainty.displacement_map()).all()
    assert uncertainty.as_dict()["repeats"] == 5


def test_as_dict_is_plain():
    numbers = spread_of(5).as_dict()
    assert numbers["repeats"] == numbers["succeeded"] == 5
    assert np.shape(numbers["variance"]) == (2, 3)
    assert isinstance(numbers["std_mm_at_center"], float)


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_blacken(fraction):
    values = torch.zeros(1, 40, 40) - 3.0
    values[0, 10:30, 5:35] = 10.0 + torch.rand(20, 30, generator=torch.Generator().manual_seed(0))
    copy = blacken(values, fraction, torch.Generator().manual_seed(1))
    changed = copy != values
    assert int(changed.sum()) == round(fraction * 600)
    assert (copy[changed] == -3.0).all() and (values[changed] > 9).all()
    assert torch.equal(copy, blacken(values, fraction, torch.Generator().manual_seed(1)))
    assert not torch.equal(copy, blacken(values, fraction, torch.Generator().manual_seed(2)))
    assert values.max() > 10 and (values == -3.0).sum() == 1000  # the original stays


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"fraction": 0.0}, "fraction"), ({"fraction": 1.0}, "fraction"), ({"repeats": 1}, "repeats")],
)
def test_refuses(options, argument):
    image = MetaTensor(torch.rand(1, 8, 8))
    with pytest.raises(RegistrationError) as caught:
        BlackeningUncertainty(lambda copies: (copies, copies), image, image, image, **options)
    assert caught.value.argument == argument
