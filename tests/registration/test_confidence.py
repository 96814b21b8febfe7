# SPDX-License-Identifier: Apache-2.0
"""Tests of the covariance's honesty, the quantiles and the verdict."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor

import monai_zsreg
from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import AffineParameters, Grid, apply_affine, compose_parameters
from monai_zsreg.registration.confidence import (
    CALIBRATION,
    FAIL,
    LIMITS,
    PASS,
    WARN,
    Calibration,
    error_quantile,
    honest_covariance,
    judge,
    spread_at,
)
from monai_zsreg.transforms import ApplyAffineRegistration


@pytest.mark.parametrize("dims", [2, 3])
def test_spread_is_that_of_drawn_matrices(dims: int) -> None:
    rng = np.random.default_rng(0)
    size = dims * (dims + 1)
    root = rng.normal(size=(size, size)) * 0.1
    points = rng.uniform(-50, 50, (7, dims))
    rows = (rng.normal(size=(40000, size)) @ root.T).reshape(-1, dims, dims + 1)
    errors = rows[..., :dims] @ points.T + rows[..., dims:]
    drawn = np.sqrt(np.square(errors).sum(1).mean(0))
    np.testing.assert_allclose(spread_at(root @ root.T, points), drawn, rtol=0.02)


def test_calibration_inflates_and_leaves_a_floor() -> None:
    constants = CALIBRATION[3]
    covariance = np.diag(np.arange(1.0, 13.0))
    places = np.array([[0.0, 0, 0], [10, -20, 30]])
    raw = spread_at(covariance, places)
    honest = spread_at(honest_covariance(covariance, 2.0), places)
    np.testing.assert_allclose(honest, np.hypot(constants.inflation * raw, 2.0 * constants.floor))
    nothing = spread_at(honest_covariance(np.zeros((12, 12)), 2.0), places)
    np.testing.assert_allclose(nothing, 2.0 * constants.floor)


@pytest.mark.parametrize("shape", [1.2, 2.0])
def test_quantiles_are_those_of_the_distribution(shape: float) -> None:
    constants = Calibration(1.0, 0.0, shape)
    errors = np.random.default_rng(1).weibull(shape, 200000)
    spread = np.sqrt(np.square(errors).mean())
    for level in (0.5, 0.9, 0.95):
        assert np.mean(errors <= error_quantile(spread, level, constants)) == pytest.approx(level, abs=0.005)
    for level in (0.0, 1.0, -1, 7):
        with pytest.raises(RegistrationError, match="level"):
            error_quantile(spread, level, constants)


def good(dims: int) -> dict[str, float]:
    return {
        "agreement": 0.6, "cost": 0.04, "overlap": 0.97, "scale": 1.02, "stretch": 1.03, "error": 0.1
    }  # fmt: skip


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["agreement", "cost", "overlap", "scale", "stretch", "error"])
def test_each_limit_warns_and_fails(name: str, dims: int) -> None:
    assert judge(good(dims), dims).verdict == PASS and not judge(good(dims), dims).reasons
    warn, fail = getattr(LIMITS[dims], name)
    middle = judge(good(dims) | {name: (warn + fail) / 2}, dims)
    assert middle.verdict == WARN and middle.score < 0 and len(middle.reasons) == 1
    beyond = judge(good(dims) | {name: fail + 0.1 * (fail - warn)}, dims)
    assert beyond.verdict == FAIL and beyond.score < middle.score < judge(good(dims), dims).score
    assert judge(good(dims) | {name: float("nan")}, dims).verdict == FAIL


def test_reasons_say_how_much() -> None:
    assert judge(good(2) | {"overlap": 0.41}, 2).reasons == ["overlap of the foregrounds 41 %"]
    assert "60 %" in judge(good(2) | {"scale": 1.6}, 2).reasons[0]


@pytest.fixture(scope="module")
def slices(load_slice) -> SimpleNamespace:
    t1, t2 = (
        MetaTensor(F.pad(load_slice(modality=m).as_tensor(), [30] * 4), affine=torch.eye(3).double())
        for m in ("t1", "t2")
    )
    truth = compose_parameters(
        AffineParameters((6.0, -9.0), (40.0,), (1.0, 1.0), (0.0,), tuple(Grid.of(t1).center.tolist()))
    )
    apply = ApplyAffineRegistration(padding_mode="zeros")
    apply.tracing = False
    moving = MetaTensor(apply(t2, np.linalg.inv(truth), t2).as_tensor(), affine=t2.affine)
    return SimpleNamespace(t1=t1, t2=moving, truth=truth)


def test_good_pair_passes_and_its_error_is_as_expected(slices: SimpleNamespace) -> None:
    result = monai_zsreg.register(slices.t1, slices.t2)
    assert result.quality.verdict == PASS and result.quality.measures["agreement"] > 0.3
    points = np.array([[110.0, 120.0], [60.0, 150.0], [200.0, 100.0]])
    error = np.linalg.norm(
        (apply_affine(torch.as_tensor(result.affine), torch.as_tensor(points))
        - apply_affine(torch.as_tensor(slices.truth), torch.as_tensor(points))).numpy(), axis=1
    )  # fmt: skip
    spread = result.uncertainty_at(points)
    # real contrasts carry a residual of their own
    assert (spread < 0.6).all() and (error < 4 * spread + 0.5).all()
    assert (result.uncertainty_at(points, 0.95) > spread).all() and (result.uncertainty_at(points, 0.3) < spread).all()
    values = result.uncertainty_map()
    assert values.shape == slices.t1.shape
    grid = Grid.of(slices.t1)
    index = torch.tensor([[17, 120], [110, 60]])
    world = apply_affine(grid.affine, index.double()).numpy()
    np.testing.assert_allclose(values[0, index[:, 0], index[:, 1]], result.uncertainty_at(world), rtol=1e-5)


def test_uncertainty_grows_with_noise_and_away_from_the_middle(slices: SimpleNamespace) -> None:
    noise = torch.randn(slices.t2.shape, generator=torch.Generator().manual_seed(0))
    clean = monai_zsreg.register(slices.t1, slices.t2)
    noisy = monai_zsreg.register(slices.t1, MetaTensor(slices.t2 + 0.1 * slices.t2.max() * noise))
    center = Grid.of(slices.t1).center.numpy()[None]
    assert noisy.uncertainty_at(center)[0] > 1.3 * clean.uncertainty_at(center)[0]
    assert clean.uncertainty_at(center + 100.0)[0] > 1.5 * clean.uncertainty_at(center)[0]


def test_mirrored_and_unrelated_images_do_not_pass(slices: SimpleNamespace) -> None:
    mirrored = monai_zsreg.register(slices.t1, MetaTensor(slices.t2.as_tensor().flip(2), affine=slices.t2.affine))
    assert mirrored.quality.verdict != PASS and mirrored.quality.reasons
    noise = torch.rand(slices.t2.shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RegistrationWarning):
        failed = monai_zsreg.register(slices.t1, MetaTensor(noise))
    assert failed.quality.verdict == FAIL and failed.quality.reasons == failed.warnings
    assert np.isinf(failed.uncertainty_at(np.zeros((2, 2)))).all() and failed.uncertainty_map().isinf().all()
    with pytest.raises(RegistrationError, match="points"):
        failed.uncertainty_at(np.zeros(2))
