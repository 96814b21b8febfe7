# SPDX-License-Identifier: Apache-2.0
"""Tests of the covariance's honesty, the quantiles and the verdict."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from phantoms import diagonal, moved_by, simulated, template, tissue_shares, turn
from scipy import ndimage

from monai_zsreg import RegistrationError, RegistrationWarning, register
from monai_zsreg.geometry import Grid, apply_affine
from monai_zsreg.registration.confidence import (
    CALIBRATION,
    FAIL,
    LIMITS,
    PASS,
    WARN,
    Calibration,
    Judgement,
    error_quantile,
    honest_covariance,
    judge,
    spread_at,
)
from monai_zsreg.registration.estimate import Estimate


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


def verdict_on(dims: int, features: str | None = "mind", notes: tuple[str, ...] = (), **changes) -> Judgement:
    """The verdict on a good registration with one thing wrong."""
    measures = {"agreement": 0.6, "cost": 0.04, "coarse_cost": 0.03, "lead": 12.0, "overlap": 0.97, "step": 1.0}
    grid = Grid((100,) * dims, diagonal(*[1.0] * dims))
    affine = torch.eye(dims + 1, dtype=torch.float64)
    if "scale" in changes:
        affine[:dims, :dims] *= changes.pop("scale")
    if "stretch" in changes:
        affine[0, 0] *= changes.pop("stretch")
    # an even shift in all directions
    covariance = np.zeros((dims * (dims + 1),) * 2)
    ends = [row * (dims + 1) + dims for row in range(dims)]
    covariance[ends, ends] = changes.pop("error", 0.1) ** 2 / dims
    estimate = Estimate(
        affine, covariance=covariance, **{k: changes.pop(k) for k in ("failed", "reasons") if k in changes}
    )
    estimate.measures = measures | changes
    return judge(estimate, grid, grid, list(notes), features)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["agreement", "cost", "lead", "overlap", "scale", "stretch", "error"])
def test_each_limit_warns_and_fails(name: str, dims: int) -> None:
    good = verdict_on(dims)
    assert good.verdict == PASS and not good.reasons and good.score > 0
    warn, fail = getattr(LIMITS["mind"], name)
    middle = verdict_on(dims, **{name: (warn + fail) / 2})
    assert middle.verdict == WARN and middle.score < 0 and len(middle.reasons) == 1
    beyond = verdict_on(dims, **{name: fail + 0.1 * (fail - warn)})
    assert beyond.verdict == FAIL and beyond.score < middle.score < good.score and beyond.reasons


@pytest.mark.parametrize("unlike", [{"agreement": 0.15, "lead": 3.5}, {"cost": 0.2, "second": 1.0}])
def test_one_place_that_stands_out_is_right_however_little_the_contrasts_share(unlike: dict[str, float]) -> None:
    unlike = {"second_distance": 9.0} | unlike
    assert verdict_on(3, **unlike).verdict == WARN and verdict_on(3, **unlike, margin=0.2).verdict == PASS


@pytest.mark.parametrize("unrelated", [{"agreement": 0.06, "lead": 12.0}, {"agreement": 0.2, "lead": 2.2}])
def test_noise_in_the_same_outline_and_a_mirror_image_stand_out_too(unrelated: dict[str, float]) -> None:
    assert verdict_on(2, **unrelated, margin=0.3).verdict == WARN


def test_doubts_that_each_warn_together_fail() -> None:
    weak = {"lead": 2.0, "error": 12.0, "mirror": 1.0}
    each = [verdict_on(2, **{name: value}) for name, value in weak.items()]
    both = verdict_on(2, **weak)
    assert all(one.verdict == WARN and one.score > both.score for one in each) and both.verdict == FAIL
    assert both.reasons == [reason for one in each for reason in one.reasons]


def test_a_mirror_image_that_fits_as_well_does_not_turn_another_doubt_into_a_failure() -> None:
    doubts = {"lead": 1.0, "mirror": 0.0}
    assert verdict_on(2, **doubts).verdict == WARN and len(verdict_on(2, **doubts).reasons) == 2
    # one that fits clearly better does, alone
    assert verdict_on(2, mirror=-4.0).verdict == FAIL


@pytest.mark.parametrize("name", ["agreement", "cost", "lead", "overlap", "error"])
def test_what_is_no_number_fails(name: str) -> None:
    assert verdict_on(2, **{name: float("nan")}).verdict == FAIL


def within(distance: np.ndarray, limit: float) -> np.ndarray:
    return np.clip(limit - distance + 0.5, 0, 1)


@pytest.mark.parametrize("shape, transform, weakest", [
    ("disc", "rigid", "rotation: "),
    ("disc", "affine", "rotation: "),
    ("tube", "rigid", "shift along the y axis: "),
    ("wall", "rigid", "shift along the y axis: "),
    ("cylinder", "rigid", "rotation about the head-foot axis: "),
    ("cylinder", "affine", "rotation about the head-foot axis: "),
    ("plate", "affine", "shift along the front-back axis: "),
])  # fmt: skip
def test_what_the_images_do_not_tell_is_named(shape: str, transform: str, weakest: str) -> None:
    size = (96, 96) if weakest.endswith(("rotation: ", "y axis: ")) else (40, 40, 40)
    rng = np.random.default_rng(0)
    texture = ndimage.gaussian_filter(rng.normal(size=(60, 60)), 2) * 9

    def seen(shift: float) -> np.ndarray:
        place = np.indices(size) - (np.array(size) - 1).reshape(-1, *[1] * len(size)) / 2 - shift
        across, radius = place[0], np.hypot(place[0], place[1])
        values = {
            "disc": lambda: within(radius, 30) + 0.5 * within(radius, 20),
            "tube": lambda: within(abs(across), 15) + 0.5 * within(abs(across - 3), 4),
            "wall": lambda: within(across, 4),
            "cylinder": lambda: (within(radius, 14) + 0.5 * within(radius, 8)) * within(abs(place[2]), 12),
            "plate": lambda: ndimage.map_coordinates(texture, [across + 30, place[-1] + 30]),
        }[shape]()
        return (values + 0.03 * rng.normal(size=size)).astype(np.float32)

    fixed, moving = seen(0.0), seen(0.3)
    result = register(fixed, moving, transform=transform, search="none", warn=False)
    assert result.weakest_direction.startswith(weakest) and result.measures["error"] > 0.5
    if result.measures["error"] > 1:
        assert any(result.weakest_direction in reason for reason in result.reasons)


@pytest.mark.parametrize("blur", [4, 6])
def test_a_smooth_image_is_no_disc(blur: int) -> None:
    """A displacement by one pixel costs it little, but one by two costs four times as much."""
    t1, t2 = (ndimage.gaussian_filter(template(name)[0, ..., 94].numpy(), blur) for name in ("t1", "t2"))
    result = register(t1, t2, transform="rigid")
    places = np.argwhere(t1 > 0.2 * t1.max())
    off = np.linalg.norm(places @ result.affine[:2, :2].T + result.affine[:2, 2] - places, axis=1)
    assert result.verdict == PASS
    assert off.mean() < result.uncertainty_at(places, 0.95).mean() < 1.0


@pytest.mark.parametrize("bend", [0.0, 1.5])
def test_what_no_matrix_follows_widens_the_bound_and_is_told(bend: float) -> None:
    """A T2 bent smoothly by that root mean square, less its affine part."""
    shares = tissue_shares()[0][..., 94]
    inside = np.argwhere(shares.sum(0) > 0.5)
    field = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(2, *shares.shape[1:])), (0, 20, 20))
    places = np.column_stack([inside, np.ones(len(inside))])
    grid = np.indices(shares.shape[1:])
    at = tuple(inside.T)
    affine = np.linalg.lstsq(places, field[:, at[0], at[1]].T, rcond=None)[0]
    field -= np.tensordot(affine[:2], grid, (0, 0)) + affine[2][:, None, None]
    field *= bend / np.sqrt(np.square(field[:, at[0], at[1]]).sum(0).mean())
    t1, t2 = simulated(shares, "t1", 0.04, seed=11), simulated(shares, "t2", 0.05, seed=12)
    bent = ndimage.map_coordinates(t2, grid + field, order=1, mode="nearest")
    result = register(t1.astype(np.float32), bent.astype(np.float32))
    said = [reason for reason in result.reasons if "more than such a transform" in reason]
    assert bool(said) == bool(bend) and result.measures["beyond"] == pytest.approx(bend, rel=0.35, abs=0.3)
    # to first order the inverse of the bend
    gap = inside @ result.affine[:2, :2].T + result.affine[:2, 2] - (inside - field[:, at[0], at[1]].T)
    assert np.mean(np.linalg.norm(gap, axis=1) < result.uncertainty_at(inside, 0.95)) > 0.85


def test_reasons_say_how_much() -> None:
    assert any("41 %" in reason for reason in verdict_on(2, overlap=0.41).reasons)
    assert any("60 %" in reason for reason in verdict_on(2, scale=1.6).reasons)


def test_doubts_about_the_images_are_told_and_warn() -> None:
    doubtful = verdict_on(3, notes=("its orientation is not known",))
    assert doubtful.verdict == WARN and doubtful.reasons == ["its orientation is not known"]
    assert verdict_on(3, notes=("its orientation is not known",), overlap=0.01).verdict == FAIL


def test_what_failed_stays_failed() -> None:
    failed = verdict_on(2, failed=True, reasons=["no structure"])
    assert failed.verdict == FAIL and failed.reasons == ["no structure"] and failed.score == -np.inf


def test_images_that_do_not_meet_fail() -> None:
    grid = Grid((50, 50), diagonal(1.0, 1.0))
    away = torch.eye(3, dtype=torch.float64)
    away[0, 2] = 1000.0
    apart = judge(Estimate(away, measures={"agreement": 0.9, "step": 1.0}), grid, grid, [], "mind")
    assert apart.verdict == FAIL and "overlap by 0 %" in apart.reasons[0]


@pytest.mark.parametrize("features", ["vgg19", None])
@pytest.mark.parametrize("dims", [2, 3])
def test_limits_of_one_descriptor_say_nothing_about_another(features: str | None, dims: int) -> None:
    assert verdict_on(dims).verdict == PASS
    other = verdict_on(dims, features=features)
    assert other.verdict == WARN and len(other.reasons) == 1


@pytest.fixture(scope="module")
def pair(slices: SimpleNamespace) -> SimpleNamespace:
    truth = turn(slices.t1, 40.0, (6.0, -9.0), 1.0, 0.0)
    moving = moved_by(slices.t2, truth)
    return SimpleNamespace(t1=slices.t1, t2=moving, truth=truth, result=register(slices.t1, moving))


def test_a_good_pair_passes_and_its_error_is_as_expected(pair: SimpleNamespace) -> None:
    result = pair.result
    assert result.verdict == PASS and result.measures["agreement"] > 0.3
    points = Grid.of(pair.t1).center.numpy() + np.array([[0.0, 0.0], [-40.0, 30.0], [50.0, -20.0]])
    gap = torch.as_tensor(result.affine - pair.truth)
    error = np.linalg.norm(apply_affine(gap, torch.as_tensor(points)).numpy(), axis=1)
    spread = result.uncertainty_at(points)
    assert (spread < 0.3).all() and (error < 4 * spread).all()
    assert (result.uncertainty_at(points, 0.95) > spread).all() and (result.uncertainty_at(points, 0.3) < spread).all()


def test_the_map_is_what_the_points_say(pair: SimpleNamespace) -> None:
    result = pair.result
    values = result.uncertainty_map()
    assert values.shape == pair.t1.shape
    index = torch.tensor([[17, 120], [110, 60]])
    world = apply_affine(Grid.of(pair.t1).affine, index.double()).numpy()
    np.testing.assert_allclose(values[0, index[:, 0], index[:, 1]], result.uncertainty_at(world), rtol=1e-5)
    # on another grid of the fixed world
    coarse = Grid((5, 7), Grid.of(pair.t1).affine @ diagonal(40.0, 40.0))
    world = apply_affine(coarse.affine, torch.tensor([[2.0, 3.0]]).double()).numpy()
    assert float(result.expected_error(coarse)[0, 2, 3]) == pytest.approx(
        float(result.uncertainty_at(world)[0]), rel=1e-5
    )
    with pytest.raises(RegistrationError, match="points"):
        result.uncertainty_at(np.zeros(2))


def test_uncertainty_grows_with_noise_and_away_from_the_middle(pair: SimpleNamespace) -> None:
    noise = torch.randn(pair.t2.shape, generator=torch.Generator().manual_seed(0))
    noisy = register(pair.t1, MetaTensor(pair.t2 + 0.05 * pair.t2.max() * noise))
    center = Grid.of(pair.t1).center.numpy()[None]
    clean = pair.result
    assert noisy.uncertainty_at(center)[0] > 1.2 * clean.uncertainty_at(center)[0]
    assert clean.uncertainty_at(center + 100.0)[0] > 1.5 * clean.uncertainty_at(center)[0]


def test_noise_in_the_same_outline_is_no_match() -> None:
    """It leads over places at random by its outline, as here measured on a head in 3D."""
    assert verdict_on(3, agreement=0.05, cost=0.12, lead=7.5).verdict == WARN


def test_noise_is_not_a_match(pair: SimpleNamespace) -> None:
    noise = torch.rand(pair.t2.shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RegistrationWarning, match="registration failed"):
        failed = register(pair.t1, MetaTensor(noise, affine=pair.t1.affine))
    assert failed.verdict == FAIL and not failed.success and failed.reasons
    # the best matrix that was found, not the headers' word
    assert np.linalg.det(failed.affine) > 0 and not np.array_equal(failed.affine, np.eye(3))
