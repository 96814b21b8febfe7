# SPDX-License-Identifier: Apache-2.0
"""Tests of registering a pair: real slices and volumes, every kind of input, every kind of wrong input."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Flip, Orientation

import monai_zsreg
from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import Grid, apply_affine
from monai_zsreg.registration.pair import build_network, resolve_device

FAST = {"scales": (1,), "iterations": 1}


def diagonal(*entries: float) -> torch.Tensor:
    return torch.diag(torch.tensor([*entries, 1.0], dtype=torch.float64))


@pytest.fixture(scope="module")
def run(vgg19_weights):
    def register(fixed, moving, **options):
        return monai_zsreg.register(
            fixed, moving, **{"preset": "keypoints", "vgg19_weights": vgg19_weights} | FAST | options
        )

    return register


@pytest.fixture(scope="module")
def pair(load_slice):
    """A real slice at 2 mm and the same cut otherwise: moving index = fixed index - (3, 5), so 6 and 10 mm."""
    values = F.avg_pool2d(load_slice().as_tensor()[None], 2)[0]
    fixed = MetaTensor(F.pad(values, [0, 5, 0, 3]), affine=diagonal(2.0, 2.0))
    moving = MetaTensor(F.pad(values, [5, 0, 3, 0]), affine=diagonal(2.0, 2.0))
    return fixed, moving


TRUE = torch.tensor([[1.0, 0.0, 6.0], [0.0, 1.0, 10.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.fixture(scope="module")
def result(run, pair):
    return run(*pair)


@pytest.fixture(scope="module")
def volumes(load_volume):
    """A real volume at 7 mm, and the same cut otherwise: moving world = fixed world + (0, 14, -7) mm."""
    values = F.avg_pool3d(load_volume().as_tensor()[None], 7)[0]
    fixed = MetaTensor(F.pad(values, [1, 0, 0, 2, 0, 0]), affine=diagonal(7.0, 7.0, 7.0))
    moving = MetaTensor(F.pad(values, [0, 1, 2, 0, 0, 0]), affine=diagonal(7.0, 7.0, 7.0))
    return fixed, moving


SHIFT_3D = torch.eye(4, dtype=torch.float64)
SHIFT_3D[:3, 3] = torch.tensor([0.0, 14.0, -7.0])


def error_mm(affine: np.ndarray, true: torch.Tensor, fixed: MetaTensor) -> float:
    index = (fixed.as_tensor()[0] > 0.05 * fixed.max()).nonzero().double()
    points = apply_affine(Grid.of(fixed).affine, index)
    gap = apply_affine(torch.as_tensor(affine), points) - apply_affine(true, points)
    return float(gap.norm(dim=1).mean())


# --------------------------------------------------------------------------------------------------------------------
# what it finds
# --------------------------------------------------------------------------------------------------------------------


def test_known_shift(result, pair):
    assert result.success and result.warnings == []
    assert result.affine.dtype == np.float64 and result.affine.shape == (3, 3)
    assert result.affine[2].tolist() == [0.0, 0.0, 1.0]
    assert error_mm(result.affine, TRUE, pair[0]) < 0.5  # pixels of 2 mm
    assert result.seconds > 0
    assert (result.preset, result.transform) == ("keypoints", "affine")


def test_known_shift_of_a_volume(run, volumes):
    result = run(*volumes, spacing=7.0)
    assert result.affine.shape == (4, 4)
    assert error_mm(result.affine, SHIFT_3D, volumes[0]) < 3.0
    assert result.moved.shape == volumes[0].shape


def test_same_image_is_the_identity_in_2d_and_3d(run, pair, volumes):
    np.testing.assert_allclose(run(pair[0], pair[0]).affine, np.eye(3), atol=1e-2)
    np.testing.assert_allclose(run(volumes[0], volumes[0], spacing=12.0).affine, np.eye(4), atol=1e-2)


@pytest.mark.parametrize("transform", ["rigid", "similarity"])
def test_kind_of_transform(run, pair, transform):
    affine = run(*pair, transform=transform).affine
    linear = affine[:2, :2]
    scale = math.sqrt(np.linalg.det(linear))
    np.testing.assert_allclose(linear @ linear.T, scale**2 * np.eye(2), atol=1e-5)
    if transform == "rigid":
        assert scale == pytest.approx(1.0, abs=1e-5)
    assert error_mm(affine, TRUE, pair[0]) < 0.5


def test_paths_arrays_and_tensors_give_the_same(run, pair, result, tmp_path):
    for name, image in zip(("fixed", "moving"), pair, strict=True):
        header = np.diag([2.0, 2.0, 1.0, 1.0])
        nib.save(nib.Nifti1Image(image.as_tensor()[0].numpy()[..., None], header), tmp_path / f"{name}.nii.gz")
    before = sorted(tmp_path.iterdir())
    files = run(str(tmp_path / "fixed.nii.gz"), tmp_path / "moving.nii.gz")
    np.testing.assert_allclose(files.affine, result.affine, atol=1e-6)
    assert sorted(tmp_path.iterdir()) == before
    # without a spacing, in pixels
    pixels = np.diag([0.5, 0.5, 1.0]) @ result.affine @ np.diag([2.0, 2.0, 1.0])
    arrays = run(*[image.as_tensor()[0].numpy() for image in pair])
    np.testing.assert_allclose(arrays.affine[:2, :2], pixels[:2, :2], atol=1e-4)
    np.testing.assert_allclose(arrays.affine[:2, 2] - pixels[:2, 2], 0.0, atol=1e-2)
    tensors = run(*[image.as_tensor() for image in pair])
    np.testing.assert_array_equal(tensors.affine, arrays.affine)


def test_inputs_stay_as_they_are(run, pair):
    copies = [image.clone() for image in pair]
    run(*pair).moved.sum()
    for image, copy in zip(pair, copies, strict=True):
        assert torch.equal(image.as_tensor(), copy.as_tensor())
        assert torch.equal(image.affine, copy.affine)
        assert image.applied_operations == copy.applied_operations


def test_same_answer_every_time(run, pair, result):
    np.testing.assert_array_equal(run(*pair).affine, result.affine)
    np.testing.assert_array_equal(run(*pair, seed=0).affine, result.affine)


# --------------------------------------------------------------------------------------------------------------------
# headers
# --------------------------------------------------------------------------------------------------------------------


def with_header(image: MetaTensor, affine: torch.Tensor) -> MetaTensor:
    return MetaTensor(image.as_tensor(), affine=affine)


def test_moving_header_may_lie_anywhere(run, pair, result):
    motion = torch.eye(3, dtype=torch.float64)
    motion[:2, 2] = torch.tensor([1234.5, -678.25])
    moved = run(pair[0], with_header(pair[1], motion @ Grid.of(pair[1]).affine))
    np.testing.assert_allclose(moved.affine, motion.numpy() @ result.affine, atol=1e-3)
    torch.testing.assert_close(moved.moved.as_tensor(), result.moved.as_tensor(), atol=0.5, rtol=1e-3)


def test_fixed_header_may_lie_anywhere(run, pair, result):
    motion = torch.eye(3, dtype=torch.float64)
    motion[:2, 2] = torch.tensor([-400.0, 310.0])
    moved = run(with_header(pair[0], motion @ Grid.of(pair[0]).affine), pair[1])
    np.testing.assert_allclose(moved.affine, result.affine @ np.linalg.inv(motion.numpy()), atol=1e-3)


def test_both_headers_turned_turn_the_answer(run, pair):
    angle = math.radians(20)
    turn = torch.eye(3, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turned = [with_header(image, turn @ Grid.of(image).affine) for image in pair]
    result = run(*turned)
    assert error_mm(result.affine, turn @ TRUE @ torch.linalg.inv(turn), turned[0]) < 2.0


@pytest.mark.parametrize("axis", [0, 1])
def test_flipped_storage_of_one_image_does_not_matter(run, pair, axis):
    flipped = Flip(axis)(with_header(pair[1], Grid.of(pair[1]).affine))
    assert Grid.of(flipped).affine[axis, axis] < 0
    assert error_mm(run(pair[0], flipped).affine, TRUE, pair[0]) < 0.6


def test_orientations_of_a_volume_do_not_matter(run, volumes):
    fixed, moving = volumes
    # axes in another order, two of them flipped
    stored = Orientation("PIR", labels=(("L", "R"), ("P", "A"), ("I", "S")))(moving.clone())
    result = run(fixed, stored, spacing=7.0)
    assert error_mm(result.affine, SHIFT_3D, fixed) < 3.5
    assert result.moved.shape == fixed.shape


def test_other_size_and_spacing(run, pair, load_slice):
    # the moving image at 1 mm, where the fixed one has 2 mm
    fine = MetaTensor(F.pad(load_slice().as_tensor(), [10, 0, 6, 0]), affine=diagonal(1.0, 1.0))
    true = TRUE.clone()
    true[:2, 2] += 0.5  # centers of 2 mm pixels lie between those of 1 mm
    result = run(pair[0], fine, spacing=2.0)
    assert error_mm(result.affine, true, pair[0]) < 3.0  # a pixel and a half
    assert result.moved.shape == pair[0].shape


def test_4d_moving_takes_one_volume_and_moves_all(run, pair, result):
    many = MetaTensor(torch.cat([pair[1].as_tensor().flip(1), pair[1].as_tensor(), 2 * pair[1].as_tensor()]))
    many.affine = Grid.of(pair[1]).affine
    got = run(pair[0], many, moving_channel=1)
    np.testing.assert_array_equal(got.affine, result.affine)
    assert got.moved.shape == (3, *pair[0].shape[1:])
    torch.testing.assert_close(got.moved[1].as_tensor(), result.moved[0].as_tensor())
    torch.testing.assert_close(got.moved[2].as_tensor(), 2 * got.moved[1].as_tensor())


def test_device_of_the_fixed_image(run, pair, result, device):
    got = run(pair[0].to(device), pair[1])
    assert isinstance(got.affine, np.ndarray)
    np.testing.assert_allclose(got.affine, result.affine, atol=0.5)
    assert run(*pair, device=str(device)).success


# --------------------------------------------------------------------------------------------------------------------
# preset "paper"
# --------------------------------------------------------------------------------------------------------------------


def test_paper_runs_and_takes_other_weights(pair, vgg19_weights, tmp_path):
    options = {"preset": "paper", "vgg19_weights": vgg19_weights}
    first = monai_zsreg.register(*pair, **options)
    assert first.preset == "paper" and np.isfinite(first.affine).all()
    network = build_network(2, vgg19_weights=vgg19_weights)
    # the regressor alone, and as a part of the whole network
    torch.save(network.regressor.state_dict(), tmp_path / "alone.pt")
    torch.save(network.state_dict(), tmp_path / "whole.pt")
    for name in ("alone.pt", "whole.pt"):
        again = monai_zsreg.register(*pair, **options, regressor_weights=tmp_path / name)
        np.testing.assert_array_equal(again.affine, first.affine)


def test_network_is_kept_until_its_file_changes(vgg19_weights, tmp_path):
    state = torch.load(vgg19_weights, weights_only=True)
    torch.save(state, tmp_path / "w.pt")
    options = {"vgg19_weights": tmp_path / "w.pt", "estimator": "consensus"}
    first = build_network(2, **options)
    assert build_network(2, **options) is first
    torch.save({name: 2 * value.double() for name, value in state.items()}, tmp_path / "w.pt")
    assert build_network(2, **options) is not first


def test_regressor_of_another_kind(pair, vgg19_weights, tmp_path):
    network = monai_zsreg.networks.AffineRegressor(2, 8, "rigid", (8,))
    torch.save(network.state_dict(), tmp_path / "rigid.pt")
    options = {"preset": "paper", "vgg19_weights": vgg19_weights, "regressor_weights": tmp_path / "rigid.pt"}
    with pytest.raises(RegistrationError, match="regressor_weights.*rigid"):
        monai_zsreg.register(*pair, **options)
    assert monai_zsreg.register(*pair, **options, transform="rigid").transform == "rigid"


# --------------------------------------------------------------------------------------------------------------------
# wrong input
# --------------------------------------------------------------------------------------------------------------------


def failing(image: MetaTensor) -> dict:
    bad = image.clone()
    bad[0, 3, 3] = float("nan")
    return {
        "fixed missing": ("fixed", {"fixed": "nowhere/a.nii.gz"}),
        "moving missing": ("moving", {"moving": "nowhere/a.nii.gz"}),
        "fixed empty": ("fixed", {"fixed": np.zeros((0, 9))}),
        "moving constant": ("moving", {"moving": torch.ones_like(image)}),
        "fixed constant": ("fixed", {"fixed": np.ones((20, 20))}),
        "moving nan": ("moving", {"moving": bad}),
        "3D with 2D": ("moving", {"moving": np.random.default_rng(0).random((9, 9, 9))}),
        "preset": ("preset", {"preset": "best"}),
        "preset type": ("preset", {"preset": ["paper"]}),
        "transform": ("transform", {"transform": "b-spline"}),
        "device": ("device", {"device": "gpu"}),
        "device that is not there": ("device", {"device": "cuda:63"}),
        "device without numbers": ("device", {"device": "meta"}),
        "spacing": ("spacing", {"spacing": -2.0}),
        "coarse spacing": ("spacing", {"spacing": 1e6}),
        "fine spacing": ("spacing", {"spacing": 1e-4}),
        "fixed channel": ("fixed_channel", {"fixed_channel": 1}),
        "moving channel": ("moving_channel", {"moving_channel": "0"}),
        "seed": ("seed", {"seed": 1.5}),
        "negative seed": ("seed", {"seed": -1}),
        "weights": ("vgg19_weights", {"preset": "keypoints", "vgg19_weights": "nowhere.pth"}),
        "weights type": ("vgg19_weights", {"vgg19_weights": 3}),
        "regressor": ("regressor_weights", {"preset": "paper", "regressor_weights": "nowhere.pt"}),
        "shipped regressor": ("transform", {"preset": "paper", "transform": "rigid"}),
        "unknown option": ("options", {"no_such_thing": 1}),
        "option that makes no key": ("options", {"preset": "keypoints", "scales": {"a": 1}}),
        "option that images decide": ("spatial_dims", {"spatial_dims": 3}),
        "option of the network": ("num_points", {"preset": "keypoints", "num_points": 1}),
        "option that does not fit": ("options", {"preset": "paper", "num_points": 32}),
    }


@pytest.mark.parametrize("case", list(failing(MetaTensor(torch.zeros(1, 8, 8)))))
def test_wrong_input_names_the_argument(pair, vgg19_weights, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    argument, changes = failing(pair[1])[case]
    options = {"fixed": pair[0], "moving": pair[1], "vgg19_weights": vgg19_weights} | changes
    with pytest.raises(RegistrationError) as caught:
        monai_zsreg.register(**options)
    assert caught.value.argument == argument
    assert caught.value.allowed
    assert str(caught.value).startswith(f"{argument}: got ")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_the_regressor_as_vgg_and_the_other_way_round(pair, vgg19_weights):
    with pytest.raises(RegistrationError) as caught:
        monai_zsreg.register(*pair, preset="paper", vgg19_weights=vgg19_weights, regressor_weights=vgg19_weights)
    assert caught.value.argument == "regressor_weights"


def test_failure_is_reported_and_the_identity(run):
    stripes = np.tile(np.random.default_rng(0).random(48), (48, 1))
    with pytest.warns(RegistrationWarning, match="registration failed"):
        result = run(stripes, stripes, padding=0.0)
    assert not result.success
    assert "one line" in result.warnings[0]
    np.testing.assert_array_equal(result.affine, np.eye(3))
    assert result.uncertainty is None
    assert result.moved.shape == (1, 48, 48)


def test_resolve_device():
    assert resolve_device(None).type == "cpu"
    assert resolve_device("cpu", "cuda").type == "cpu"
    for wrong in ("nope", 1.5, "meta", "cuda:99"):
        with pytest.raises(RegistrationError) as caught:
            resolve_device(wrong)
        assert caught.value.argument == "device"
