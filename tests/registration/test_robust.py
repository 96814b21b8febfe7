# SPDX-License-Identifier: Apache-2.0
"""Tests of the robust engine on real slices and volumes of two contrasts, moved by known transforms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Orientation

import monai_zsreg
from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import AffineParameters, Grid, compose_parameters
from monai_zsreg.metrics import foreground_tre
from monai_zsreg.registration.robust import RobustEngine
from monai_zsreg.transforms import ApplyAffineRegistration

register = monai_zsreg.register


def moved_by(image: MetaTensor, truth: np.ndarray) -> MetaTensor:
    """The image as seen through ``truth`` (fixed world to moving world), on its own grid, linear interpolation."""
    apply = ApplyAffineRegistration(padding_mode="zeros")
    apply.tracing = False
    moved = apply(image, np.linalg.inv(truth), image)
    return MetaTensor(moved.as_tensor(), affine=image.affine)


def turn(image: MetaTensor, degrees: float, shift: tuple[float, ...], scale: float = 1.0) -> np.ndarray:
    dims = image.ndim - 1
    angles = (degrees,) if dims == 2 else (0.3 * degrees, -0.4 * degrees, degrees)
    shears = (0.02,) * (dims * (dims - 1) // 2)
    return compose_parameters(
        AffineParameters(shift, angles, (scale,) * dims, shears, tuple(Grid.of(image).center.tolist()))
    )


@pytest.fixture(scope="module")
def slices(load_slice) -> SimpleNamespace:
    """T1 and T2 of one brain at 1 mm, padded so that nothing leaves the frame."""
    pad = [30] * 4
    t1, t2 = (
        MetaTensor(F.pad(load_slice(modality=m).as_tensor(), pad), affine=torch.eye(3).double()) for m in ("t1", "t2")
    )
    return SimpleNamespace(t1=t1, t2=t2)


@pytest.fixture(scope="module")
def volumes(load_volume) -> SimpleNamespace:
    """The same in 3D at 3 mm."""
    images = {}
    for modality in ("t1", "t2"):
        values = F.pad(F.avg_pool3d(load_volume(modality=modality).as_tensor()[None], 3)[0], [8] * 6)
        images[modality] = MetaTensor(values, affine=torch.diag(torch.tensor([3.0, 3.0, 3.0, 1.0])).double())
    return SimpleNamespace(**images)


def error(matrix: np.ndarray, truth: np.ndarray, fixed: MetaTensor) -> float:
    return foreground_tre(matrix, truth, fixed)["mean"]


@pytest.mark.parametrize("degrees", [0.0, 25.0, 90.0, 180.0, -135.0])
def test_two_contrasts_at_any_angle(slices: SimpleNamespace, degrees: float) -> None:
    truth = turn(slices.t1, degrees, (21.0, -17.0), 1.06)
    result = register(slices.t1, moved_by(slices.t2, truth))
    assert result.success and result.preset == "robust" and result.warnings == []
    # the pair itself is aligned to about half a pixel
    assert error(result.affine, truth, slices.t1) < 0.7


@pytest.mark.parametrize("degrees", [10.0, 120.0])
def test_volumes_of_two_contrasts(volumes: SimpleNamespace, degrees: float) -> None:
    truth = turn(volumes.t1, degrees, (12.0, -9.0, 15.0), 0.95)
    result = register(volumes.t1, moved_by(volumes.t2, truth))
    assert result.success
    assert error(result.affine, truth, volumes.t1) < 1.0  # a third of a voxel


@pytest.mark.parametrize("dims", [2, 3])
def test_same_image_is_the_identity(slices: SimpleNamespace, volumes: SimpleNamespace, dims: int) -> None:
    image = slices.t1 if dims == 2 else volumes.t1
    assert error(register(image, image).affine, np.eye(dims + 1), image) < 0.01 * Grid.of(image).spacing[0]


@pytest.mark.parametrize("transform", ["rigid", "similarity", "affine"])
def test_kind_of_transform(volumes: SimpleNamespace, transform: str) -> None:
    truth = turn(volumes.t1, 40.0, (5.0, 5.0, 0.0))
    result = register(volumes.t1, moved_by(volumes.t2, truth), transform=transform)
    linear = result.affine[:3, :3]
    scale = np.linalg.det(linear) ** (1 / 3)
    assert error(result.affine, truth, volumes.t1) < (1.0 if transform == "affine" else 2.5)
    if transform != "affine":
        np.testing.assert_allclose(linear @ linear.T, scale**2 * np.eye(3), atol=1e-9)
    if transform == "rigid":
        assert scale == pytest.approx(1.0, abs=1e-9)


def test_swapping_the_images_gives_the_inverse(slices: SimpleNamespace) -> None:
    moving = moved_by(slices.t2, turn(slices.t1, 70.0, (10.0, 5.0)))
    there, back = register(slices.t1, moving).affine, register(moving, slices.t1).affine
    assert error(back @ there, np.eye(3), slices.t1) < 0.05


def test_same_answer_every_time(slices: SimpleNamespace) -> None:
    moving = moved_by(slices.t2, turn(slices.t1, 70.0, (10.0, 5.0)))
    np.testing.assert_array_equal(register(slices.t1, moving).affine, register(slices.t1, moving).affine)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    code=st.sampled_from(["LPS", "RAS", "PIR", "SLA", "ARI"]),
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    shift=st.tuples(*[st.floats(-300, 300)] * 3),
)
def test_answer_follows_the_moving_header(volumes, code, angles, shift) -> None:
    """Where the scanner's origin is, and the order that voxels are stored in, change nothing."""
    truth = turn(volumes.t1, 20.0, (5.0, -5.0, 5.0))
    moving = moved_by(volumes.t2, truth)
    motion = compose_parameters(AffineParameters(shift, angles, (1.0,) * 3, (0.0,) * 3, (0.0,) * 3))
    stored = Orientation(code, labels=(("L", "R"), ("P", "A"), ("I", "S")))(moving)
    elsewhere = MetaTensor(stored.as_tensor(), affine=torch.from_numpy(motion) @ stored.affine)
    here = register(volumes.t1, moving).affine
    there = register(volumes.t1, elsewhere).affine
    assert error(np.linalg.inv(motion) @ there, here, volumes.t1) < 0.3  # a tenth of a voxel: the blocks lie elsewhere


@pytest.mark.parametrize("change", [lambda x: 40 * x + 7, lambda x: x.max() - x, lambda x: x.sqrt()])
def test_intensities_may_be_mapped(slices: SimpleNamespace, change) -> None:
    moving = moved_by(slices.t2, turn(slices.t1, 30.0, (8.0, 3.0)))
    inside = moving.as_tensor() > 0.05 * moving.as_tensor().max()
    values = change(moving.as_tensor().clamp(min=0))
    mapped = MetaTensor(torch.where(inside, values, torch.zeros_like(values)), affine=moving.affine)
    assert error(register(slices.t1, mapped).affine, register(slices.t1, moving).affine, slices.t1) < 0.4


def test_search_settings(slices: SimpleNamespace) -> None:
    truth = turn(slices.t1, 100.0, (9.0, 9.0))
    moving = moved_by(slices.t2, truth)
    near = turn(slices.t1, 97.0, (11.0, 8.0))
    for search in ("none", "local", "global"):
        result = register(slices.t1, moving, initial=near, search=search)
        assert error(result.affine, truth, slices.t1) < 0.7, search
    with pytest.warns(RegistrationWarning):
        blind = register(slices.t1, moving, search="none")
    assert not blind.success


def test_mask_keeps_the_eyes_on_the_brain(slices: SimpleNamespace) -> None:
    truth = turn(slices.t1, 15.0, (9.0, 9.0))
    moving = moved_by(slices.t2, truth)
    values = slices.t1.as_tensor().clone()
    values[:, :60, :60] = values.max()  # something bright that the moving image does not have
    fixed = MetaTensor(values, affine=slices.t1.affine)
    mask = slices.t1.as_tensor() > 0.05 * slices.t1.as_tensor().max()
    mask[:, :60, :60] = False
    masked = register(fixed, moving, fixed_mask=MetaTensor(mask.float(), affine=fixed.affine))
    assert error(masked.affine, truth, slices.t1) < 0.7
    np.testing.assert_array_equal(register(fixed, moving, fixed_mask=mask[0].numpy()).affine, masked.affine)


def test_other_spacing_and_thick_slices(load_volume) -> None:
    t1, t2 = load_volume(modality="t1"), load_volume(modality="t2")
    fine = MetaTensor(
        F.avg_pool3d(t1.as_tensor()[None], 2)[0], affine=torch.diag(torch.tensor([2.0, 2, 2, 1])).double()
    )
    thick = MetaTensor(
        F.avg_pool3d(t2.as_tensor()[None], (3, 2, 5))[0], affine=torch.diag(torch.tensor([3.0, 2, 5, 1])).double()
    )
    # voxel centers of pooled images lie half a block less half a voxel from the first corner
    fine.affine[:3, 3], thick.affine[:3, 3] = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, 0.5, 2.0])
    result = register(fine, thick)
    assert error(result.affine, np.eye(4), fine) < 1.0


def test_noise_is_not_a_match(slices: SimpleNamespace) -> None:
    noise = torch.rand(slices.t1.shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RegistrationWarning, match="do not look alike"):
        result = register(slices.t1, MetaTensor(noise, affine=slices.t1.affine))
    assert not result.success


def test_batch_gives_what_single_pairs_give(slices: SimpleNamespace) -> None:
    moving = [moved_by(slices.t2, turn(slices.t1, angle, (angle / 9, 4.0))) for angle in (0.0, 75.0, 160.0)]
    pairs = torch.stack([torch.cat([m.as_tensor(), slices.t1.as_tensor()]) for m in moving])
    engine = RobustEngine(2)
    grid = Grid.of(slices.t1)
    together = engine.estimate(pairs[:, 1:], pairs[:, :1], grid, grid).matrix
    for index in range(3):
        alone = engine.estimate(pairs[index : index + 1, 1:], pairs[index : index + 1, :1], grid, grid).matrix[0]
        assert error(together[index].numpy(), alone.numpy(), slices.t1) < 0.02
    moved = engine(pairs)
    assert moved.shape == (3, 1, *grid.shape)
    inside = slices.t2.as_tensor() > 0.05 * slices.t2.max()
    for image in moved:
        assert float((image - slices.t2.as_tensor())[inside].abs().mean()) < 0.1 * float(slices.t2[inside].mean())
    # voxels of another size are another picture of the same thing
    torch.testing.assert_close(engine(pairs[1:2], spacing=2.0), moved[1:2], atol=0.02 * float(moved.max()), rtol=0)


@pytest.mark.weights
def test_keypoints_as_coarse_stage_and_vgg_as_descriptor(slices: SimpleNamespace, vgg19_weights) -> None:
    truth = turn(slices.t1, 8.0, (9.0, -12.0))
    moving = moved_by(slices.t2, truth)
    start = register(slices.t1, moving, preset="keypoints", vgg19_weights=vgg19_weights)
    refined = register(slices.t1, moving, coarse="keypoints", vgg19_weights=vgg19_weights)
    assert error(refined.affine, truth, slices.t1) < min(0.7, error(start.affine, truth, slices.t1))
    np.testing.assert_array_equal(refined.keypoints["fixed"], start.keypoints["fixed"])
    dense = register(slices.t1, moving, features="vgg19", vgg19_weights=vgg19_weights)
    assert error(dense.affine, truth, slices.t1) < 1.0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("search", {"search": "everywhere"}),
        ("coarse", {"coarse": "guess"}),
        ("features", {"features": "sift"}),
        ("blocks", {"blocks": 2}),
        ("rotations", {"rotations": 1.5}),
        ("initial", {"initial": np.zeros((3, 3))}),
        ("initial", {"initial": np.eye(4)}),
        ("fixed_mask", {"fixed_mask": np.zeros((5, 5))}),
        ("moving_mask", {"moving_mask": np.zeros((242, 278), dtype=np.float32)}),
        ("options", {"colour": 1}),
        ("fixed_mask", {"preset": "keypoints", "fixed_mask": np.ones((242, 278))}),
    ],
)
def test_wrong_arguments(slices: SimpleNamespace, name: str, options: dict) -> None:
    with pytest.raises(RegistrationError, match=name):
        register(slices.t1, slices.t2, **options)


def test_motion_has_a_positive_determinant(slices: SimpleNamespace) -> None:
    mirrored = MetaTensor(slices.t2.as_tensor().flip(1), affine=slices.t2.affine)
    try:
        affine = register(slices.t1, mirrored).affine
    except RegistrationWarning:
        return
    assert np.linalg.det(affine) > 0 and math.isfinite(affine.sum())
