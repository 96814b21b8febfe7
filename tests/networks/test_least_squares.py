# SPDX-License-Identifier: Apache-2.0
"""Tests of the closed-form transforms and of consensus."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from monai_zsreg.errors import RegistrationError
from monai_zsreg.networks import TRANSFORMS, LeastSquaresAffine
from monai_zsreg.networks.coordinates import map_points

quick = settings(max_examples=25, deadline=None)
KINDS = [(dims, transform) for dims in (2, 3) for transform in TRANSFORMS]
seeds = st.integers(0, 10**6)
kinds = st.sampled_from(KINDS)


def rotation_of(dims: int, rng: np.random.Generator, largest: float = np.pi) -> np.ndarray:
    if dims == 3:
        axis = rng.normal(size=3)
        return Rotation.from_rotvec(rng.uniform(0, largest) * axis / np.linalg.norm(axis)).as_matrix()
    angle = rng.uniform(-largest, largest)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def matrix_of(dims: int, transform: str, seed: int) -> torch.Tensor:
    """``[1, D, D+1]``, a random one of the kind, with a scale between 0.75 and 1.3."""
    rng = np.random.default_rng(seed)
    linear = rotation_of(dims, rng)
    if transform != "rigid":
        linear = linear * rng.uniform(0.75, 1.3)
    if transform == "affine":
        linear = linear @ (np.eye(dims) + rng.uniform(-0.08, 0.08, (dims, dims)))
    return torch.as_tensor(np.concatenate([linear, rng.uniform(-1, 1, (dims, 1))], axis=1))[None]


def points_of(dims: int, seed: int, count: int = 40, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, count, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(kinds, seeds, st.booleans())
def test_recovers_a_transform_exactly(kind, seed, consensus):
    dims, transform = kind
    x, true = points_of(dims, seed), matrix_of(dims, transform, seed)
    solver = LeastSquaresAffine(dims, transform, consensus)
    got = solver(x, map_points(true, x))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, true, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("dims", "transform"), KINDS)
def test_fewest_points_are_enough(dims, transform):
    count = dims + 1 if transform == "affine" else dims
    x, true = points_of(dims, 3, count), matrix_of(dims, transform, 3)
    torch.testing.assert_close(LeastSquaresAffine(dims, transform)(x, map_points(true, x)), true)
    assert LeastSquaresAffine(dims, transform)(x[:, 1:], map_points(true, x)[:, 1:]).isnan().all()


@quick
@given(kinds, seeds)
def test_order_of_the_pairs_does_not_matter(kind, seed):
    dims, transform = kind
    x, y, w = points_of(dims, seed), points_of(dims, seed + 1), points_of(1, seed + 2)[..., 0]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    solver = LeastSquaresAffine(dims, transform)
    torch.testing.assert_close(solver(x[:, order], y[:, order], w[:, order]), solver(x, y, w), atol=1e-8, rtol=1e-8)


@quick
@given(st.sampled_from([2, 3]), seeds)
def test_affine_against_numpy(dims, seed):
    x, y, w = points_of(dims, seed), points_of(dims, seed + 1), points_of(1, seed + 2)[..., 0]
    root = w[0].sqrt().numpy()[:, None]
    design = np.concatenate([x[0].numpy(), np.ones((40, 1))], axis=1)
    expected = np.linalg.lstsq(root * design, root * y[0].numpy(), rcond=None)[0].T
    np.testing.assert_allclose(LeastSquaresAffine(dims)(x, y, w)[0], expected, atol=1e-9)


@quick
@given(seeds)
def test_rigid_against_scipy(seed):
    x, w = points_of(3, seed), points_of(1, seed + 2)[..., 0]
    y = map_points(matrix_of(3, "rigid", seed), x) + 0.05 * points_of(3, seed + 1)
    share = (w / w.sum())[0, :, None]
    x_mean, y_mean = (share * x[0]).sum(dim=0), (share * y[0]).sum(dim=0)
    turn, _ = Rotation.align_vectors((y[0] - y_mean).numpy(), (x[0] - x_mean).numpy(), weights=w[0].numpy())
    got = LeastSquaresAffine(3, "rigid")(x, y, w)[0]
    np.testing.assert_allclose(got[:, :3], turn.as_matrix(), atol=1e-8)
    np.testing.assert_allclose(map_points(got, x_mean[None])[0], y_mean, atol=1e-10)


@quick
@given(kinds, seeds, seeds)
def test_no_other_transform_of_the_kind_fits_better(kind, seed, other):
    dims, transform = kind
    rng = np.random.default_rng(other)
    x = points_of(dims, seed)
    y = map_points(matrix_of(dims, "affine", seed), x) + 0.1 * points_of(dims, seed + 1)
    got = LeastSquaresAffine(dims, transform)(x, y)
    # a neighbor of the same kind
    linear = torch.as_tensor(rotation_of(dims, rng, 0.01)) @ got[0, :, :dims]
    if transform != "rigid":
        linear = linear * rng.uniform(0.99, 1.01)
    if transform == "affine":
        linear = linear + torch.as_tensor(rng.normal(scale=0.01, size=(dims, dims)))
    shift = got[0, :, dims] + torch.as_tensor(rng.normal(scale=0.005, size=dims))
    neighbor = torch.cat([linear, shift[:, None]], dim=1)
    cost = (map_points(got[0], x[0]) - y[0]).square().sum()
    assert cost <= (map_points(neighbor, x[0]) - y[0]).square().sum() + 1e-12


@quick
@given(st.sampled_from([2, 3]), st.sampled_from(["rigid", "similarity"]), seeds, st.booleans())
def test_result_is_of_its_kind_and_never_mirrors(dims, transform, seed, mirror):
    x = points_of(dims, seed)
    y = x.clone() if mirror else points_of(dims, seed + 1)
    if mirror:
        y[..., 0] *= -1.0
    linear = LeastSquaresAffine(dims, transform)(x, y)[0, :, :dims]
    determinant = torch.linalg.det(linear)
    assert determinant > 0
    scale = determinant ** (1 / dims)
    torch.testing.assert_close(linear @ linear.T, scale**2 * torch.eye(dims, dtype=linear.dtype), atol=1e-9, rtol=0)
    if transform == "rigid":
        assert float(scale) == pytest.approx(1.0)


@pytest.mark.parametrize(("dims", "transform"), KINDS)
def test_weights_count_as_repetitions_and_zero_leaves_out(dims, transform):
    x, y = points_of(dims, 5, 12), points_of(dims, 6, 12)
    times = torch.tensor([1, 0, 2, 3, 1, 1, 0, 2, 1, 1, 4, 1])
    solver = LeastSquaresAffine(dims, transform)
    expected = solver(x.repeat_interleave(times, dim=1), y.repeat_interleave(times, dim=1))
    torch.testing.assert_close(solver(x, y, times[None].double()), expected)
    torch.testing.assert_close(solver(x, y, 1e-3 * times[None].double()), expected)


def flat_points(dims: int, case: str) -> torch.Tensor:
    x = points_of(dims, 7)
    if case == "one place":
        return x[:, :1].expand(-1, 40, -1)
    line = torch.linspace(0, 1, 40, dtype=torch.float64)[None, :, None]
    if case == "line":
        return 0.1 + line * torch.tensor([0.3, 0.7, 0.2], dtype=torch.float64)[:dims]
    x[..., 0] = 0.4 * x[..., 1] + 0.1 * x[..., -1]  # a plane in 3D, a line in 2D
    return x


UNDETERMINED = [
    (dims, transform, case)
    for dims, transform in KINDS
    for case in ("one place", "line", "plane", "no weight", "one point")
    # a plane in 3D and a line in 2D do determine a rotation
    if transform == "affine" or not (case == "plane" or (case == "line" and dims == 2))
]


@pytest.mark.parametrize("consensus", [False, True])
@pytest.mark.parametrize(("dims", "transform", "case"), UNDETERMINED)
def test_undetermined_is_nan_and_the_rest_of_the_batch_is_not(dims, transform, case, consensus):
    true = matrix_of(dims, transform, 8)
    good = points_of(dims, 8)
    bad = flat_points(dims, case)
    x = torch.cat([bad, good])
    weights = torch.ones(2, 40, dtype=torch.float64)
    if case == "no weight":
        weights[0] = 0
    if case == "one point":
        weights[0, 1:] = 0
    got = LeastSquaresAffine(dims, transform, consensus)(x, map_points(true, x), weights)
    assert got[0].isnan().all()
    torch.testing.assert_close(got[1:], true, atol=1e-6, rtol=0)


# --------------------------------------------------------------------------------------------------------------------
# consensus
# --------------------------------------------------------------------------------------------------------------------


def spoiled(dims: int, transform: str, seed: int, count: int = 60, share: float = 0.6):
    """Pairs of which ``share`` are random, the true matrix and a mask of the others."""
    x, true = points_of(dims, seed, count), matrix_of(dims, transform, seed)
    y = map_points(true, x)
    random = torch.arange(count) < round(share * count)
    y[:, random] = points_of(dims, seed + 1, int(random.sum())) * 2 - 1
    return x, y, true, ~random


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([k for k in KINDS if k[1] != "affine"]), seeds)
def test_consensus_recovers_with_60_percent_outliers(kind, seed):
    dims, transform = kind
    x, y, true, _ = spoiled(dims, transform, seed)
    plain = LeastSquaresAffine(dims, transform)(x, y)
    got = LeastSquaresAffine(dims, transform, consensus=True)(x, y, threshold=0.02)
    # an outlier may land near its place by accident, so not exactly
    error = (map_points(got, x) - map_points(true, x)).norm(dim=-1).max()
    assert error < 0.01
    assert (map_points(plain, x) - map_points(true, x)).norm(dim=-1).max() > 0.05


@pytest.mark.parametrize("dims", [2, 3])
def test_consensus_on_an_affine_transform(dims):
    for seed in range(3):
        x, y, true, _ = spoiled(dims, "affine", seed, count=90)
        solver = LeastSquaresAffine(dims, "affine", True)
        error = (map_points(solver(x, y, threshold=0.06), x) - map_points(true, x)).norm(dim=-1).max()
        assert error < 0.08, seed


def test_agreement_tells_who_agrees():
    x, y, _, inliers = spoiled(2, "similarity", 4)
    agreed = LeastSquaresAffine(2, "similarity", True).agreement(x, y, torch.ones(1, 60), 0.02)
    assert agreed.shape == (1, 60)
    assert ((agreed >= 0) & (agreed <= 1)).all()
    assert (agreed[0, inliers] > 0.9).all()
    assert (agreed[0, ~inliers] > 0).sum() <= 2


def test_consensus_is_deterministic_and_independent_of_the_batch(device):
    cases = [spoiled(2, "similarity", seed) for seed in range(4)]
    x = torch.cat([case[0] for case in cases]).float().to(device)
    y = torch.cat([case[1] for case in cases]).float().to(device)
    solver = LeastSquaresAffine(2, "affine", consensus=True)
    state = torch.get_rng_state()
    together = solver(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(together, solver(x, y))
    for b in range(4):
        torch.testing.assert_close(solver(x[b : b + 1], y[b : b + 1]), together[b : b + 1], atol=1e-5, rtol=0)


def test_pairs_without_weight_have_no_say():
    x, y, true, inliers = spoiled(2, "similarity", 2, count=30, share=0.8)
    got = LeastSquaresAffine(2, "similarity", True)(x, y, inliers[None].double())
    torch.testing.assert_close(got, true, atol=1e-6, rtol=0)


def test_threshold_tells_who_disagrees():
    x, y, true, _ = spoiled(2, "similarity", 3)
    solver = LeastSquaresAffine(2, "similarity", True)
    assert (solver(x, y, threshold=0.01) - true).abs().max() < 1e-3
    assert (solver(x, y, threshold=100.0) - true).abs().max() > 0.05


def test_consensus_of_too_few_is_none():
    x, y, true, _ = spoiled(2, "similarity", 5)  # 40 % agree
    options = {"transform": "similarity", "consensus": True}
    assert LeastSquaresAffine(**options, least_agreement=0.5)(x, y, threshold=0.02).isnan().all()
    got = LeastSquaresAffine(**options, least_agreement=0.3)(x, y, threshold=0.02)
    torch.testing.assert_close(got, true, atol=1e-2, rtol=0)


def test_a_scale_out_of_range_is_not_believed():
    x = points_of(2, 9)
    true = matrix_of(2, "similarity", 9) * 3.0
    assert LeastSquaresAffine(2, "similarity", True)(x, map_points(true, x)).isnan().all()


# --------------------------------------------------------------------------------------------------------------------
# the rest
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dims", "transform"), KINDS)
def test_gradients(dims, transform):
    x = points_of(dims, 11, 8).requires_grad_()
    y = (map_points(matrix_of(dims, "affine", 11), x.detach()) + 0.1 * points_of(dims, 12, 8)).requires_grad_()
    assert torch.autograd.gradcheck(LeastSquaresAffine(dims, transform), (x, y))


@pytest.mark.parametrize(("dims", "transform"), KINDS)
def test_scripts(dims, transform):
    x, y = points_of(dims, 13, batch=3), points_of(dims, 14, batch=3)
    solver = LeastSquaresAffine(dims, transform)
    torch.testing.assert_close(torch.jit.script(solver)(x, y), solver(x, y))


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_close_and_far_points_in_single_precision(spread):
    x, true = points_of(2, 15), matrix_of(2, "affine", 15)
    y = map_points(true, x)
    near, far = (0.5 + spread * x).float(), (0.5 + spread * y).float()
    got = LeastSquaresAffine(2)(near, far)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[..., :2].double(), true[..., :2], atol=3e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"spatial_dims": 4}, "spatial_dims"),
        ({"transform": "projective"}, "transform"),
    ],
)
def test_constructor_refuses(options, argument):
    with pytest.raises(RegistrationError) as caught:
        LeastSquaresAffine(**options)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("x", "y", "argument"),
    [
        ((1, 5, 3), (1, 5, 3), "fixed_points"),
        ((5, 2), (5, 2), "fixed_points"),
        ((1, 5, 2), (1, 6, 2), "moving_points"),
        ((1, 5, 2), (2, 5, 2), "moving_points"),
    ],
)
def test_forward_refuses(x, y, argument):
    with pytest.raises(RegistrationError) as caught:
        LeastSquaresAffine(2)(torch.rand(x), torch.rand(y))
    assert caught.value.argument == argument
