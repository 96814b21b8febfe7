# SPDX-License-Identifier: Apache-2.0
"""Tests of the paper's presets on pairs of images, and of the uncertainty by blackening."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import monai_zsreg
from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import apply_affine
from monai_zsreg.io.images import Image
from monai_zsreg.networks import UNTRAINED_FOR_CHECKS_ONLY, AffineRegressor, ZeroShotAffineNet
from monai_zsreg.paper import (
    PRESETS,
    Uncertainty,
    blacken,
    blackening,
    build_network,
    check_settings,
    estimate,
    keypoint_start,
)
from monai_zsreg.resample import resample

FAST = {"scales": (1,), "iterations": 1}
OBLIQUE = torch.tensor([[-1.5, 0.3, 40.0], [0.2, 2.0, -30.0], [0, 0, 1]], dtype=torch.float64)
TRUE = torch.tensor([[1.0, 0.0, 6.0], [0.0, 1.0, 10.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def spacing_of(*sizes: float) -> torch.Tensor:
    return torch.diag(torch.tensor([*sizes, 1.0], dtype=torch.float64))


@pytest.fixture(scope="module")
def pair(load_slice) -> tuple[Image, Image]:
    """A slice at 2 mm and the same cut otherwise: moving index = fixed index - (3, 5), so 6 and 10 mm."""
    values = F.avg_pool2d(load_slice().as_tensor()[None], 2)[0]
    return tuple(Image(F.pad(values, pad), spacing_of(2.0, 2.0)) for pad in ([0, 5, 0, 3], [5, 0, 3, 0]))


@pytest.fixture(scope="module")
def result(pair, vgg19_weights):
    return monai_zsreg.register(*pair, preset="keypoints", vgg19_weights=vgg19_weights, **FAST)


def error_mm(affine: np.ndarray | torch.Tensor, true: torch.Tensor, fixed: Image) -> float:
    index = (fixed.values[0] > 0.05 * fixed.values.max()).nonzero().double()
    points = apply_affine(fixed.affine, index)
    gap = apply_affine(torch.as_tensor(affine), points) - apply_affine(true, points)
    return float(gap.norm(dim=1).mean())


# --------------------------------------------------------------------------------------------------------------------
# presets
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:VGG-19 filters are RANDOM")
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_a_network(preset, dims):
    network = build_network(preset, dims, vgg19_weights=UNTRAINED_FOR_CHECKS_ONLY)
    assert network.spatial_dims == dims and not network.training


@pytest.mark.filterwarnings("ignore:VGG-19 filters are RANDOM")
def test_paper_is_the_paper():
    network = build_network("paper", vgg19_weights=UNTRAINED_FOR_CHECKS_ONLY)
    assert (network.num_points, network.num_sets) == (64, 10)
    assert network.keypoints.center_of_mass.threshold == 0.95
    assert network.features.first and network.features.second
    assert not network.keypoints.symmetric and not network.consensus


def test_known_shift(result, pair):
    assert result.success
    assert error_mm(result.affine, TRUE, pair[0]) < 0.5  # pixels of 2 mm
    assert result.affine[2].tolist() == [0.0, 0.0, 1.0]
    # keypoints are where the image is, and move with it
    fixed, moving = result.keypoints["fixed"], result.keypoints["moving"]
    assert fixed.shape == moving.shape and fixed.shape[0] > 60
    assert np.median(np.abs(moving - fixed - [6.0, 10.0])) < 0.1


def test_known_shift_of_a_volume_that_is_stored_otherwise(load_volume, vgg19_weights):
    values = F.avg_pool3d(load_volume().as_tensor()[None], 7)[0]
    fixed = Image(F.pad(values, [1, 0, 0, 2, 0, 0]), spacing_of(7.0, 7.0, 7.0))
    moving = F.pad(values, [0, 1, 2, 0, 0, 0])
    # axes in another order, the first of them flipped
    stored = moving.permute(0, 3, 1, 2).flip(1)
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[0, 1] = affine[1, 2] = 7.0
    affine[2, 0], affine[2, 3], affine[3, 3] = -7.0, 7.0 * (stored.shape[1] - 1), 1.0
    true = torch.eye(4, dtype=torch.float64)
    true[:3, 3] = torch.tensor([0.0, 14.0, -7.0])
    for image in (Image(moving, fixed.affine), Image(stored, affine)):
        found = estimate(fixed, image, preset="keypoints", spacing=7.0, vgg19_weights=vgg19_weights, **FAST)
        assert not found.failed
        assert error_mm(found.affine, true, fixed) < 3.5


def test_other_size_and_spacing(pair, load_slice, vgg19_weights):
    # the moving image at 1 mm, where the fixed one has 2 mm
    fine = Image(F.pad(load_slice().as_tensor(), [10, 0, 6, 0]), spacing_of(1.0, 1.0))
    true = TRUE.clone()
    true[:2, 2] += 0.5  # centers of 2 mm pixels lie between those of 1 mm
    found = estimate(pair[0], fine, preset="keypoints", spacing=2.0, vgg19_weights=vgg19_weights, **FAST)
    assert error_mm(found.affine, true, pair[0]) < 3.0  # a pixel and a half


def test_start_for_the_default_preset(pair, vgg19_weights):
    start, keypoints = keypoint_start(*pair, vgg19_weights=vgg19_weights)
    assert error_mm(start, TRUE, pair[0]) < 2.0
    assert set(keypoints) == {"fixed", "moving"}
    refined = monai_zsreg.register(*pair, coarse="keypoints", vgg19_weights=vgg19_weights)
    assert error_mm(refined.affine, TRUE, pair[0]) < 0.2
    np.testing.assert_array_equal(refined.keypoints["fixed"], keypoints["fixed"])


def test_failure_has_a_reason_and_the_headers_word(vgg19_weights):
    stripes = np.tile(np.random.default_rng(0).random(48), (48, 1))
    with pytest.warns(RegistrationWarning, match="one line"):
        result = monai_zsreg.register(
            stripes, stripes, preset="keypoints", vgg19_weights=vgg19_weights, padding=0.0, **FAST
        )
    assert not result.success and "one line" in result.reasons[0]
    np.testing.assert_array_equal(result.affine, np.eye(3))
    assert keypoint_start(*[result.fixed_image] * 2, vgg19_weights=vgg19_weights, padding=0.0, **FAST)[0] is None


# --------------------------------------------------------------------------------------------------------------------
# weights
# --------------------------------------------------------------------------------------------------------------------


def test_regressor_alone_or_within_the_network(pair, vgg19_weights, tmp_path):
    first = estimate(*pair, preset="paper", vgg19_weights=vgg19_weights)
    assert first.affine.isfinite().all()
    network = build_network(vgg19_weights=vgg19_weights)
    torch.save(network.regressor.state_dict(), tmp_path / "alone.pt")
    torch.save(network.state_dict(), tmp_path / "whole.pt")
    for name in ("alone.pt", "whole.pt"):
        again = estimate(*pair, preset="paper", vgg19_weights=vgg19_weights, regressor_weights=tmp_path / name)
        assert torch.equal(again.affine, first.affine)


def test_exported_network_in_the_presets_place(pair, vgg19_weights):
    network = build_network(vgg19_weights=vgg19_weights)
    expected = estimate(*pair, preset="paper", vgg19_weights=vgg19_weights)
    found = estimate(*pair, preset="paper", network=torch.jit.script(network))
    torch.testing.assert_close(found.affine, expected.affine, rtol=1e-4, atol=1e-3)


def test_regressor_of_another_kind(pair, vgg19_weights, tmp_path):
    torch.save(AffineRegressor(2, 8, "rigid", (8,)).state_dict(), tmp_path / "rigid.pt")
    options = {"preset": "paper", "vgg19_weights": vgg19_weights, "regressor_weights": tmp_path / "rigid.pt"}
    with pytest.raises(RegistrationError, match="regressor_weights.*rigid"):
        build_network(**options)
    assert build_network(**options, transform="rigid").num_points == 8


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"transform": "rigid"}, "transform"),
        ({"num_points": 32}, "num_points"),
        ({"vgg19_weights": "nowhere.pth"}, "vgg19_weights"),
        ({"regressor_weights": "nowhere.pt"}, "regressor_weights"),
        ({"scales": {"a": 1}}, "scales"),
        ({"preset": "keypoints", "num_points": 1}, "num_points"),
    ],
)
def test_what_cannot_be_built_names_the_argument(options, argument, vgg19_weights):
    with pytest.raises(RegistrationError) as caught:
        build_network(**{"preset": "paper", "vgg19_weights": vgg19_weights} | options)
    assert caught.value.argument == argument


def test_settings_are_checked_before_there_are_images():
    check_settings("keypoints", {"iterations": 3, "scales": [1, 2], "vgg19_weights": None, "network": None})
    for options, words in (
        ({"iteration": 3}, "iterations"),
        ({"spatial_dims": 3}, "options"),
        ({"scales": [[1]]}, "scales"),
    ):
        with pytest.raises(RegistrationError, match=words):
            check_settings("keypoints", options)


def test_checkpoint_of_the_network_of_the_metadata():
    """``model.pt`` fits the network with its default arguments, strictly."""
    network = ZeroShotAffineNet()
    state = torch.load(monai_zsreg.networks.regressors.shipped_weights(2), weights_only=True)
    network.load_state_dict(state)
    assert set(state) == set(network.state_dict())


# --------------------------------------------------------------------------------------------------------------------
# uncertainty
# --------------------------------------------------------------------------------------------------------------------


def spread_of(count: int, scale: float = 0.02, shape: tuple[int, int] = (12, 9)) -> Uncertainty:
    rng = np.random.default_rng(0)
    matrices = np.tile(np.eye(3), (count, 1, 1))
    matrices[:, :2] += scale * rng.normal(size=(count, 2, 3))
    image = Image(torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)), OBLIQUE)
    return Uncertainty(matrices, max(count, 5), image, image)


def test_of_a_pair(result):
    uncertainty = blackening(result)
    assert uncertainty.repeats == 10 and 2 <= len(uncertainty.matrices) <= 10
    assert uncertainty.variance.shape == (2, 3)
    assert np.isfinite(uncertainty.variance).all() and uncertainty.variance.max() > 0
    assert len({matrix.tobytes() for matrix in uncertainty.matrices}) > 1
    # repeats of a good answer stay near it, mm
    assert np.median(np.abs(uncertainty.matrices - result.affine)[:, :2, 2]) < 4.0


def test_a_large_part_blackened_is_less_certain(result):
    small, large = (blackening(result, fraction, repeats=4) for fraction in (0.001, 0.3))
    center = result.fixed_image.grid.center[None]
    assert large.at(center)[0] > small.at(center)[0]


def test_of_the_default_preset_with_its_options(pair):
    mask = (pair[1].values > 0.05 * pair[1].values.max()).float()
    result = monai_zsreg.register(*pair, transform="rigid", search="local", moving_mask=mask)
    uncertainty = blackening(result, repeats=2)
    assert len(uncertainty.matrices) == 2
    for matrix in uncertainty.matrices:
        np.testing.assert_allclose(matrix[:2, :2] @ matrix[:2, :2].T, np.eye(2), atol=1e-6)
        assert error_mm(matrix, TRUE, pair[0]) < 1.0


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
    fixed, moving = uncertainty.fixed, uncertainty.moving
    moved = [resample(moving.values, moving.grid, fixed.grid, matrix, fill=0.0) for matrix in uncertainty.matrices]
    got = uncertainty.intensity_map()
    assert got.shape == (1, 12, 9) and got.max() > 0
    torch.testing.assert_close(got.as_tensor().double(), torch.stack(moved).double().var(dim=0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("succeeded", [0, 1])
def test_too_few_repeats_are_no_certainty(succeeded):
    uncertainty = spread_of(succeeded)
    assert np.isinf(uncertainty.variance).all() and np.isinf(uncertainty.covariance).all()
    assert np.isinf(uncertainty.at(np.zeros((2, 2)))).all()
    assert torch.isinf(uncertainty.displacement_map()).all()
    assert uncertainty.as_dict()["repeats"] == 5 and uncertainty.as_dict()["succeeded"] == succeeded


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
def test_blackening_refuses(result, options, argument):
    with pytest.raises(RegistrationError) as caught:
        blackening(result, **options)
    assert caught.value.argument == argument
