# SPDX-License-Identifier: Apache-2.0
"""Tests of keypoints as centers of mass of thresholded feature maps."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_zsreg.errors import RegistrationError
from monai_zsreg.networks import CenterOfMass, KeypointDetector, VGG19Features
from monai_zsreg.networks.zero_shot import equalize, foreground, scale_to_unit_range

quick = settings(max_examples=30, deadline=None)


def maps_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------------
# CenterOfMass
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40,), (13, 17), (17, 13), (7, 9, 5), (4, 3, 5, 4)])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.95])
def test_equations_1_and_2_against_scipy(shape, threshold):
    maps = maps_of(0, 2, 3, *shape) - 0.2
    points, valid = CenterOfMass(threshold)(maps)
    assert points.shape == (2, 3, len(shape))
    assert valid.all()
    for b in range(2):
        for c in range(3):
            one = maps[b, c].numpy()
            kept = np.where(one > max(0.0, threshold * one.max()), one, 0.0)
            np.testing.assert_allclose(points[b, c], scipy.ndimage.center_of_mass(kept), rtol=1e-10)


def test_what_equals_the_threshold_is_cut():
    points, _ = CenterOfMass(0.5)(torch.tensor([[[1.0, 0.0, 0.5]]]))
    assert points.item() == 0.0


@pytest.mark.parametrize("value", [0.0, -3.0, float("nan")])
def test_map_without_a_positive_value_has_no_keypoint(value):
    maps = maps_of(1, 1, 2, 6, 8)
    maps[:, 0] = value
    points, valid = CenterOfMass()(maps)
    assert valid.tolist() == [[False, True]]
    assert torch.isfinite(points).all()


def test_constant_map_gives_the_middle():
    points, valid = CenterOfMass()(torch.full((1, 1, 5, 8), 2.0))
    assert valid.all()
    assert points[0, 0].tolist() == [2.0, 3.5]


@quick
@given(
    st.integers(0, 10**6),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.3, 0.95]),
    st.sampled_from([2, 3]),
)
def test_points_follow_a_shift(seed, before, after, threshold, dims):
    maps = maps_of(seed, 1, 4, *(5, 7, 4)[:dims])
    com = CenterOfMass(threshold)
    points, _ = com(maps)
    shifted, _ = com(F.pad(maps, [before, after] * dims))
    torch.testing.assert_close(shifted, points + before)


@quick
@given(st.integers(0, 10**6), st.integers(0, 2), st.sampled_from([0.0, 0.5, 0.95]))
def test_points_follow_a_flip(seed, axis, threshold):
    maps = maps_of(seed, 2, 3, 5, 7, 6)
    com = CenterOfMass(threshold)
    expected = com(maps)[0].clone()
    expected[..., axis] = maps.shape[2 + axis] - 1 - expected[..., axis]
    torch.testing.assert_close(com(maps.flip(2 + axis))[0], expected)


@quick
@given(st.integers(0, 10**6), st.permutations([0, 1, 2]))
def test_points_follow_exchanged_axes(seed, order):
    maps = maps_of(seed, 1, 3, 5, 7, 6)
    com = CenterOfMass(0.7)
    torch.testing.assert_close(com(maps.permute(0, 1, *[2 + a for a in order]))[0], com(maps)[0][..., order])


@quick
@given(st.integers(0, 10**6), st.integers(-20, 20))
def test_brightness_of_a_map_does_not_matter(seed, exponent):
    maps = maps_of(seed, 1, 3, 9, 7)
    torch.testing.assert_close(CenterOfMass(0.8)(maps * 2.0**exponent)[0], CenterOfMass(0.8)(maps)[0])


def test_pairs_of_a_batch_do_not_touch_each_other(device):
    maps = maps_of(2, 4, 6, 9, 11).float().to(device)
    maps[2] = 0
    com = CenterOfMass(0.5)
    points, valid = com(maps)
    for b in range(4):
        alone, valid_alone = com(maps[b : b + 1])
        torch.testing.assert_close(points[b : b + 1], alone)
        assert torch.equal(valid[b : b + 1], valid_alone)


def test_gradient_is_that_of_the_values_that_remain():
    maps = maps_of(3, 1, 2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: CenterOfMass(0.3)(m)[0], (maps,), eps=1e-7, atol=1e-5)
    com = CenterOfMass(0.9)
    com(maps)[0].sum().backward()
    below = maps.detach() <= 0.9 * maps.detach().amax(dim=(2, 3), keepdim=True)
    assert (maps.grad[below] == 0).all()


def test_gradient_of_an_empty_map_is_finite():
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 1, 1, 2] = 1.0
    maps.requires_grad_()
    CenterOfMass()(maps)[0].sum().backward()
    assert torch.isfinite(maps.grad).all()


@quick
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_moments_add_up_over_pieces(seed, cut):
    maps = maps_of(seed, 2, 3, 7, 4, 5)
    com = CenterOfMass(0.6)
    peak = maps.flatten(2).amax(dim=2)
    parts = [com.moments(maps[:, :, part], peak, part) for part in torch.arange(7).split(cut)]
    points, valid = com.points(sum(mass for mass, _ in parts), sum(moment for _, moment in parts))
    whole, whole_valid = com(maps)
    torch.testing.assert_close(points, whole)
    assert torch.equal(valid, whole_valid)


def test_scripts():
    maps = maps_of(4, 2, 3, 8, 9).float()
    com = CenterOfMass(0.9)
    for eager, scripted in zip(com(maps), torch.jit.script(com)(maps), strict=True):
        torch.testing.assert_close(scripted, eager)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 2.0, float("nan")])
def test_threshold_out_of_range(threshold):
    with pytest.raises(RegistrationError, match="threshold"):
        CenterOfMass(threshold)


# --------------------------------------------------------------------------------------------------------------------
# KeypointDetector, with the real features
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(vgg19_weights) -> VGG19Features:
    return VGG19Features(vgg19_weights)


@pytest.fixture(scope="module")
def image(load_slice) -> torch.Tensor:
    """A real slice, background 0 all around, ``[1, 1, 91, 109]``."""
    return scale_to_unit_range(F.avg_pool2d(load_slice().as_tensor()[None], 2))


@pytest.fixture(scope="module")
def volume(load_volume) -> torch.Tensor:
    """A real volume at 14 mm with background around, ``[1, 1, 21, 23, 21]``."""
    coarse = F.avg_pool3d(load_volume().as_tensor()[None], 14)
    return F.pad(scale_to_unit_range(coarse), [4, 4] * 3)


def of_the_image(features: VGG19Features, image: torch.Tensor, symmetric: bool = False) -> torch.Tensor:
    """Maps ``[1, C]`` that answer to the content more than to empty background, whose middle is the frame's."""
    factor = 2 if symmetric else 1
    slices = image if image.dim() == 4 else image[0, 0].unsqueeze(1)
    with torch.no_grad():
        empty = factor * features(torch.zeros(1, 1, 8, 8)).amax(dim=(2, 3))
        maps = features(slices)
        if symmetric:
            maps = maps + features((1 - slices) * foreground(slices))
    return empty < 0.94 * maps.amax(dim=(0, 2, 3))


def detect(detector: KeypointDetector, image: torch.Tensor):
    with torch.no_grad():
        return detector(image, foreground(image))


@pytest.mark.parametrize("symmetric", [False, True])
def test_points_of_an_image_follow_a_shift(features, image, symmetric):
    detector = KeypointDetector(features, CenterOfMass(), symmetric)
    points, valid = detect(detector, F.pad(image, [20, 20, 20, 20]))
    moved, moved_valid = detect(detector, F.pad(image, [27, 13, 9, 31]))
    assert points.shape == (1, 128, 2)
    assert torch.equal(valid, moved_valid)
    assert valid.sum() > 100
    expected = points + torch.tensor([9.0 - 20.0, 27.0 - 20.0])
    content = valid & of_the_image(features, image, symmetric)
    assert content.sum() > 100
    torch.testing.assert_close(moved[content], expected[content], atol=1e-3, rtol=0)


def test_symmetric_keypoints_do_not_see_the_contrast(features, image):
    inside = foreground(image)
    detector = KeypointDetector(features, CenterOfMass(), symmetric=True)
    image = equalize(image, inside, detector.level)
    negative = (1.0 + detector.level - image) * inside
    with torch.no_grad():
        points, valid = detector(image * inside, inside)
        others, others_valid = detector(negative, inside)
        plain = KeypointDetector(features, CenterOfMass())
        apart = plain(image * inside, inside)[0] - plain(negative, inside)[0]
    assert torch.equal(valid, others_valid)
    torch.testing.assert_close(points, others, atol=1e-3, rtol=0)
    # without it most keypoints jump
    assert (apart.norm(dim=-1) > 5).float().mean() > 0.5


def test_scales_give_points_in_the_coordinates_of_the_image(features, image):
    doubled = image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    points, valid = detect(KeypointDetector(features, CenterOfMass()), image)
    detector = KeypointDetector(features, CenterOfMass(), scales=(1, 2))
    both, both_valid = detect(detector, doubled)
    assert both.shape == (1, 256, 2)
    assert torch.equal(both_valid[:, 128:], valid)
    # pixel p became pixels 2 p and 2 p + 1
    torch.testing.assert_close(both[:, 128:][valid], 2 * points[valid] + 0.5, atol=1e-3, rtol=0)


def stacked_at_once(features: VGG19Features, volume: torch.Tensor, axis: int):
    """Keypoints of one stack with all of its maps in memory, ``[C, 3]``."""
    slices = volume[0, 0].movedim(axis, 0).unsqueeze(1)
    with torch.no_grad():
        maps = features(slices).movedim(1, 0).movedim(1, 1 + axis)
    return CenterOfMass()(maps.unsqueeze(0))


@pytest.mark.parametrize("slice_batch", [3, 1000])
def test_streaming_a_volume_gives_what_all_maps_at_once_give(features, volume, slice_batch):
    detector = KeypointDetector(features, CenterOfMass())
    detector.slice_batch = slice_batch
    points, valid = detect(detector, volume)
    assert points.shape == (1, 384, 3)
    content = of_the_image(features, volume)
    assert content.sum() > 100
    for axis in range(3):
        expected, expected_valid = stacked_at_once(features, volume, axis)
        part = slice(128 * axis, 128 * (axis + 1))
        assert torch.equal(valid[:, part], expected_valid)
        both = content & expected_valid
        torch.testing.assert_close(points[:, part][both], expected[both], atol=1e-3, rtol=0)


def test_points_of_a_volume_follow_exchanged_axes_and_shifts(features, volume):
    detector = KeypointDetector(features, CenterOfMass(), symmetric=True)
    points, valid = detect(detector, volume)
    moved, _ = detect(detector, F.pad(volume, [4, 0, 2, 1, 0, 5]))
    torch.testing.assert_close(moved[valid], points[valid] + torch.tensor([0.0, 2.0, 4.0]), atol=1e-3, rtol=0)
    # (i, j, k) to (j, i, k): the planes (j, k) at right angles to the first axis are now at right angles to the second
    turned, turned_valid = detect(detector, volume.transpose(2, 3))
    both = valid[:, :128] & turned_valid[:, 128:256]
    assert both.sum() > 100
    torch.testing.assert_close(turned[:, 128:256][both], points[:, :128][both][:, [1, 0, 2]], atol=1e-3, rtol=0)


def test_empty_volume_is_no_error(features):
    points, valid = detect(KeypointDetector(features, CenterOfMass()), torch.zeros(1, 1, 6, 7, 8))
    assert torch.isfinite(points).all()
    assert valid.shape == (1, 384)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (0,)}, "scales"),
        ({"scales": (1.5,)}, "scales"),
    ],
)
def test_detector_refuses(features, options, argument):
    with pytest.raises(RegistrationError) as caught:
        KeypointDetector(features, CenterOfMass(), **options)
    assert caught.value.argument == argument
