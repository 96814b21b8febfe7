# SPDX-License-Identifier: Apache-2.0
"""Tests of the composed network: real slices, known transforms, reported failures, TorchScript."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from monai_zsreg.errors import RegistrationError
from monai_zsreg.networks import AffineRegressor, Status, ZeroShotAffineNet
from monai_zsreg.networks.coordinates import map_points
from monai_zsreg.networks.zero_shot import scale_to_unit_range
from monai_zsreg.paper import PRESETS

_SUBJECT = "open_ms_mni/patient07"
KEYPOINTS = PRESETS["keypoints"]
# one pass, so the threshold that the passes of the preset come down to
FAST = KEYPOINTS | {"scales": (1,), "iterations": 1, "consensus_threshold": 0.035}


@pytest.fixture(scope="module")
def make(vgg19_weights):
    def build(**options) -> ZeroShotAffineNet:
        torch.manual_seed(0)
        if options.get("estimator", "mlp") == "mlp":
            options = {"hidden": (16, 16), "num_points": 32, "num_sets": 3} | options
        return ZeroShotAffineNet(vgg19_weights=vgg19_weights, **options).eval()

    return build


@pytest.fixture(scope="module")
def small(load_slice):
    """``small(modality)``: a real slice at 2 mm, neither square nor even, ``[1, 1, 91, 109]``."""
    # the figures below are of this brain; as for VGG-19's weights, strangers skip what needs it
    return lambda modality="t1": F.avg_pool2d(load_slice(_SUBJECT, modality).as_tensor()[None], 2)


@pytest.fixture(scope="module")
def volume(load_volume) -> torch.Tensor:
    """A real volume at 10 mm, ``[1, 1, 18, 21, 18]``."""
    return F.avg_pool3d(load_volume().as_tensor()[None], 10)


def moved_by(image: torch.Tensor, angle: float, shift: tuple[float, float], scale: float = 1.0):
    """The image as it would have been taken after a motion, by SciPy, and the index pull ``[2, 3]`` of its recovery."""
    linear = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    middle = (np.array(image.shape[2:]) - 1) / 2
    offset = middle + np.array(shift) - linear @ middle
    back = np.linalg.inv(linear)
    moving = scipy.ndimage.affine_transform(image[0, 0].numpy(), back, -back @ offset, order=1)
    return torch.as_tensor(moving)[None, None], torch.as_tensor(np.concatenate([linear, offset[:, None]], 1))


def error_px(matrix: torch.Tensor, true: torch.Tensor, image: torch.Tensor) -> float:
    """Mean distance over the foreground, pixels."""
    points = (image[0, 0] > 0.05 * image.max()).nonzero().double()
    longest = max(image.shape[2:])
    got = map_points(matrix.double(), (points + 0.5) / longest) * longest - 0.5
    return float((got - map_points(true, points)).norm(dim=1).mean())


def pair_of(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    return torch.cat([moving, fixed], dim=1)


# --------------------------------------------------------------------------------------------------------------------
# what it finds
# --------------------------------------------------------------------------------------------------------------------


def test_same_image_twice_is_the_identity(make, small, device):
    network = make(**FAST).to(device)
    estimate = network.estimate(pair_of(small(), small()).to(device))
    assert estimate.status.tolist() == [Status.OK]
    torch.testing.assert_close(estimate.matrix[0].cpu(), torch.eye(2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(estimate.fixed_points, estimate.moving_points)


@pytest.mark.parametrize(
    ("angle", "shift", "scale"), [(0.0, (9.0, -14.0), 1.0), (0.3, (0.0, 0.0), 1.0), (-0.2, (15.0, 20.0), 1.05)]
)
def test_keypoints_recover_a_motion_on_a_real_slice(make, load_slice, angle, shift, scale):
    fixed = load_slice().as_tensor()[None]
    moving, true = moved_by(fixed, angle, shift, scale)
    network = make(**KEYPOINTS)
    with torch.inference_mode():
        estimate = network.estimate(pair_of(moving, fixed))
    assert error_px(torch.eye(2, 3), true, fixed) > 8
    # the median over many such motions is 1 pixel, single ones reach 4
    assert error_px(estimate.matrix[0], true, fixed) < 3
    assert 1 <= int(estimate.iterations[0]) <= network.iterations


@pytest.mark.parametrize("transform", ["rigid", "similarity"])
def test_kind_of_transform(make, small, transform):
    moving, true = moved_by(small(), 0.15, (4.0, 3.0))
    matrix = make(**FAST, transform=transform).estimate(pair_of(moving, small())).matrix[0]
    linear = matrix[:, :2]
    scale = torch.linalg.det(linear).sqrt()
    torch.testing.assert_close(linear @ linear.T, scale**2 * torch.eye(2), atol=1e-5, rtol=0)
    if transform == "rigid":
        assert float(scale) == pytest.approx(1.0, abs=1e-5)
    assert error_px(matrix, true, small()) < 0.6 * error_px(torch.eye(2, 3), true, small())


def test_contrast_does_not_matter_to_the_symmetric_keypoints(make, small):
    moving, true = moved_by(small("t2"), 0.1, (6.0, -4.0))
    network = make(**FAST | {"scales": (1, 2), "iterations": 2})
    with torch.inference_mode():
        matrix = network.estimate(pair_of(moving, small("t1"))).matrix[0]
    # pixels of 2 mm
    assert error_px(matrix, true, small()) < 0.75 * error_px(torch.eye(2, 3), true, small())


def test_shift_of_a_volume(make, volume):
    fixed = F.pad(volume, [2, 2] * 3)
    moving = F.pad(volume, [0, 4, 3, 1, 1, 3])  # by (-1, 1, -2) voxels
    network = make(**FAST | {"spatial_dims": 3})
    with torch.inference_mode():
        estimate = network.estimate(pair_of(moving, fixed))
    assert estimate.status.tolist() == [Status.OK]
    assert estimate.fixed_points.shape == (1, 384, 3)
    longest = max(fixed.shape[2:])
    expected = torch.eye(3, 4)
    expected[:, 3] = torch.tensor([-1.0, 1.0, -2.0]) / longest
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    gap = (map_points(estimate.matrix[0], corners) - map_points(expected, corners)).norm(dim=1)
    assert float(gap.max()) * longest < 0.5


def test_forward_resamples_the_moving_image(make, small):
    moving, _ = moved_by(small(), 0.0, (5.0, -3.0))
    with torch.no_grad():
        moved = make(**FAST)(pair_of(moving, small()))
    assert moved.shape == (1, 1, 91, 109)
    before, after = (moving - small()).square().mean(), (moved - small()).square().mean()
    assert after < 0.1 * before
    # five rows and three columns came from outside
    assert moved[0, 0, -3:].abs().max() < 1e-3 * moving.max()


def test_intensity_units_and_type_do_not_matter(make, small):
    pair = pair_of(moved_by(small(), 0.1, (3.0, 2.0))[0], small()).round()
    network = make(**FAST)
    expected = network.estimate(pair).matrix
    torch.testing.assert_close(network.estimate(8.0 * pair).matrix, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(network.estimate(pair.to(torch.int16)).matrix, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(network.estimate(pair.double()).matrix.float(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("estimator", ["consensus", "mlp", "least_squares"])
def test_pairs_of_a_batch_do_not_touch_each_other(make, small, estimator):
    options = FAST | {"estimator": estimator, "iterations": 2, "num_sets": 3}
    network = make(**options)
    fixed = small()
    pairs = [pair_of(moved_by(fixed, a, s)[0], fixed) for a, s in ((0.1, (2.0, 3.0)), (-0.1, (0.0, 7.0)))]
    pairs.insert(1, torch.zeros_like(pairs[0]))
    with torch.inference_mode():
        together = network.estimate(torch.cat(pairs))
        assert together.status.tolist()[1] != Status.OK
        for b in (0, 2):
            alone = network.estimate(pairs[b])
            torch.testing.assert_close(alone.matrix, together.matrix[b : b + 1], atol=1e-3, rtol=0, equal_nan=True)
            assert alone.status[0] == together.status[b]
            assert alone.iterations[0] == together.iterations[b]


def test_same_answer_every_time(make, small):
    pair = pair_of(moved_by(small(), 0.1, (2.0, 3.0))[0], small())
    network = make(**FAST)
    state = torch.get_rng_state()
    first = network.estimate(pair).matrix
    assert torch.equal(first, network.estimate(pair).matrix)
    assert torch.equal(first, make(**FAST).estimate(pair).matrix)
    assert torch.equal(state, torch.get_rng_state())


# --------------------------------------------------------------------------------------------------------------------
# draws
# --------------------------------------------------------------------------------------------------------------------


def regressor_inputs(network: ZeroShotAffineNet, pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    seen = []
    hook = network.regressor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    network.estimate(pair)
    hook.remove()
    return seen[0]


def test_numbers_of_points_and_sets(make, small):
    network = make(num_points=20, num_sets=4)
    pair = pair_of(moved_by(small(), 0.1, (2.0, 3.0))[0], small())
    fixed, moving = regressor_inputs(network, pair)
    assert fixed.shape == moving.shape == (4, 20, 2)
    estimate = network.estimate(pair)
    found = torch.cat([estimate.fixed_points, estimate.moving_points], dim=2)[0][estimate.valid[0]]
    # the regressor's come from the padded frame
    margin = int(0.25 * 109)
    drawn = (torch.cat([fixed, moving], dim=2) * (109 + 2 * margin) - margin) / 109
    gap = torch.cdist(drawn.reshape(-1, 4).double(), found.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert gap.min(dim=1).values.max() < 1e-4
    place = gap.argmin(dim=1).view(4, 20)
    distinct = [len(set(row)) for row in place.tolist()]
    assert min(distinct) < 20  # drawn with replacement
    assert len({tuple(row) for row in place.tolist()}) == 4


def test_seed_decides_the_draw(make, small):
    pair = pair_of(moved_by(small(), 0.1, (2.0, 3.0))[0], small())
    first, second = make().estimate(pair).matrix, make(seed=1).estimate(pair).matrix
    assert (first - second).abs().max() > 1e-6
    assert torch.equal(make(seed=1).estimate(pair).matrix, second)


def test_rate_shrinks_an_update(make, small):
    pair = pair_of(moved_by(small(), 0.1, (4.0, 3.0))[0], small())
    options = {"estimator": "least_squares", "num_points": 100, "padding": 0.0}
    full = make(**options).estimate(pair).matrix[0] - torch.eye(2, 3)
    half = make(**options, rate=0.5).estimate(pair).matrix[0] - torch.eye(2, 3)
    torch.testing.assert_close(half, 0.5 * full, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------------------
# failures
# --------------------------------------------------------------------------------------------------------------------


def check_failure(network: ZeroShotAffineNet, pair: torch.Tensor, status: Status) -> None:
    estimate = network.estimate(pair)
    assert estimate.status.tolist() == [status]
    assert estimate.matrix.isnan().all()
    assert network.estimate(pair).matrix.isnan().all()
    with pytest.warns(UserWarning, match="could not be registered"):
        moved = network(pair)
    torch.testing.assert_close(moved, pair[:, :1], equal_nan=True)
    assert status.reason != Status.OK.reason


@pytest.mark.parametrize("determinant", [-1.0, 0.0])
def test_mirror_image_or_collapse_is_reported(make, small, determinant):
    network = make()
    assert isinstance(network.regressor, AffineRegressor)
    with torch.no_grad():  # a regressor that always says so
        network.regressor.layers[-1].weight.zero_()
        network.regressor.layers[-1].bias.copy_(torch.tensor([determinant, 0.0, 0.3, 0.0, 1.0, 0.1]))
    check_failure(network, pair_of(small(), small()), Status.MIRRORED)


@pytest.mark.parametrize("estimator", ["mlp", "least_squares", "consensus"])
def test_points_on_one_line_are_reported(make, estimator):
    # nothing changes along the first axis, and without padding it has no ends
    profile = torch.rand(48, generator=torch.Generator().manual_seed(0))
    image = profile.expand(1, 1, 32, 48).contiguous()
    check_failure(make(estimator=estimator, padding=0.0), pair_of(image, image), Status.FLAT_POINTS)


@pytest.mark.parametrize("estimator", ["mlp", "consensus"])
def test_image_without_keypoints_is_reported(make, small, estimator):
    check_failure(
        make(estimator=estimator), pair_of(torch.full_like(small(), float("nan")), small()), Status.TOO_FEW_POINTS
    )


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("estimator", ["mlp", "least_squares", "consensus"])
def test_constant_image_is_reported(make, small, which, estimator):
    images = [small(), small()]
    images[which] = torch.full_like(small(), 7.0)
    network = make(estimator=estimator)
    estimate = network.estimate(pair_of(*images))
    assert estimate.status[0] != Status.OK
    assert estimate.matrix.isnan().all()


def test_keypoints_that_do_not_agree_are_reported(make, small):
    # a threshold so small that no more than the drawn pairs themselves agree
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(small().shape, generator=generator)
    network = make(estimator="consensus", consensus_threshold=1e-9)
    estimate = network.estimate(pair_of(noise, small()))
    assert estimate.status.tolist() == [Status.UNDETERMINED]


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 3, 16, 16), (2, 16, 16), (1, 2, 8, 8, 8)])
def test_shape_of_the_pair(make, shape):
    with pytest.raises(RegistrationError, match="image"):
        make(estimator="consensus").estimate(torch.rand(shape))


@pytest.mark.parametrize(
    "options",
    [
        {"spatial_dims": 4},
        {"transform": "warp"},
        {"estimator": "magic"},
        {"num_points": 2},
        {"num_points": 8.0},
        {"num_sets": 0},
        {"threshold": 1.0},
        {"scales": (0,)},
        {"iterations": 0},
        {"rate": 0.0},
        {"rate": 1.5},
        {"padding": -0.1},
        {"consensus_threshold": 0.0},
    ],
)
def test_constructor_names_the_argument(make, options):
    with pytest.raises(RegistrationError) as caught:
        make(**options)
    assert caught.value.argument in options


# --------------------------------------------------------------------------------------------------------------------
# parts and TorchScript
# --------------------------------------------------------------------------------------------------------------------


def test_scale_to_unit_range_against_numpy(load_slice):
    image = load_slice().as_tensor()[None] - 100.0
    scaled = scale_to_unit_range(image)
    low, high = np.percentile(image.numpy(), [0.5, 99.5])
    expected = np.clip((image.numpy() - low) / (high - low), 0, 1)
    np.testing.assert_allclose(scaled, expected, atol=1e-5)
    # a few bright pixels in an empty image are not lost
    sparse = torch.zeros(1, 1, 50, 50)
    sparse[0, 0, 3, 4] = 5.0
    assert scale_to_unit_range(sparse).max() == 1.0
    assert (scale_to_unit_range(torch.full((1, 1, 4, 4), 3.0)) == 0).all()


@pytest.mark.filterwarnings("ignore:some pairs could not be registered:UserWarning")  # one of the options has no luck
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"iterations": 2, "rate": 0.5},
        {"symmetric": True, "scales": (1, 2), "transform": "rigid"},
    ],
)
def test_scripted_network_gives_the_same(make, small, tmp_path, options):
    network = make(**options)
    pair = pair_of(moved_by(small(), 0.1, (2.0, 3.0))[0], small())
    torch.jit.save(torch.jit.script(network), tmp_path / "net.ts")
    scripted = torch.jit.load(tmp_path / "net.ts")
    with torch.no_grad():
        torch.testing.assert_close(scripted.estimate(pair).matrix, network.estimate(pair).matrix, equal_nan=True)
        torch.testing.assert_close(scripted(pair), network(pair), atol=1e-3, rtol=1e-4)


def test_checkpoint_loads_strictly(make, small, tmp_path):
    pair = pair_of(moved_by(small(), 0.1, (2.0, 3.0))[0], small())
    first, other = make(), make(seed=3)
    torch.save(first.state_dict(), tmp_path / "model.pt")
    with torch.no_grad():
        other.regressor.layers[0].weight.mul_(2)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    # the draws belong to the object, not to the checkpoint
    assert not torch.equal(first.draws, other.draws)
    other.draws.copy_(first.draws)
    assert torch.equal(first.estimate(pair).matrix, other.estimate(pair).matrix)
