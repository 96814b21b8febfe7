# SPDX-License-Identifier: Apache-2.0
"""Tests of what a registration gives back."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from monai.data import MetaTensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import compose_parameters
from monai_zsreg.io import load_image, read_transform
from monai_zsreg.registration import RegistrationResult

LAS = torch.tensor([[-2.0, 0, 0, 30], [0, 1.5, 0, -20], [0, 0, 1.0, 5], [0, 0, 0, 1]], dtype=torch.float64)
OBLIQUE = torch.tensor(
    [[1.2, 0.2, 0.1, 3.0], [-0.15, 1.4, -0.2, -20.0], [0.1, 0.25, 0.9, 7.0], [0, 0, 0, 1]], dtype=torch.float64
)


def result_of(dims: int = 3, channels: int = 1) -> RegistrationResult:
    """A result with a given matrix, so that nothing is estimated."""
    rng = np.random.default_rng(0)
    affine = np.eye(dims + 1)
    affine[:dims] += rng.uniform(-0.1, 0.1, (dims, dims + 1))
    affine[:dims, dims] += [3.0, -2.0, 1.0][:dims]
    keep = [*range(dims), 3]
    shapes = ((14, 18, 22)[:dims], (20, 16, 18)[:dims])
    fixed, moving = (
        MetaTensor(
            torch.as_tensor(scipy.ndimage.gaussian_filter(rng.random((count, *shape)), 1.5)).float(),
            affine=header[keep][:, keep],
        )
        for count, shape, header in zip((1, channels), shapes, (LAS, OBLIQUE), strict=True)
    )
    return RegistrationResult(
        affine, "PASS", [], {}, 1.0, 0.1, "robust", "affine", load_image(fixed), load_image(moving)
    )


def by_scipy(result: RegistrationResult, values: np.ndarray, order: int, fill: float = 0.0) -> np.ndarray:
    dims = values.ndim
    keep = [*range(dims), 3]
    fixed, moving = LAS[keep][:, keep].numpy(), OBLIQUE[keep][:, keep].numpy()
    pull = np.linalg.inv(moving) @ result.affine @ fixed
    shape = tuple(result.fixed.shape[1:])
    mode = "grid-constant"
    return scipy.ndimage.affine_transform(values, pull, output_shape=shape, order=order, mode=mode, cval=fill)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("fill", [0.0, -1024.0])
def test_what_is_carried_along_lies_on_the_fixed_grid(dims: int, fill: float) -> None:
    result = result_of(dims, channels=2)
    moved = result.apply(result.moving, fill_value=fill)
    assert isinstance(moved, MetaTensor) and moved.shape == (2, *result.fixed.shape[1:])
    torch.testing.assert_close(moved.affine, result.fixed.affine)
    inside = by_scipy(result, np.ones(result.moving.shape[1:]), 1) > 0.999
    for c in range(2):
        expected = by_scipy(result, result.moving.as_tensor()[c].double().numpy(), 1, fill)
        # single precision beside a fill value of a thousand
        np.testing.assert_allclose(moved.as_tensor()[c].numpy()[inside], expected[inside], atol=1e-3)
    beyond = by_scipy(result, np.ones(result.moving.shape[1:]), 1) < 1e-6
    assert beyond.any() and (moved.as_tensor()[:, torch.from_numpy(beyond)] == fill).all()


def test_moved_is_made_once_with_the_images_own_background() -> None:
    result = result_of()
    values = 100.0 * result.moving_image.values - 1024.0
    values[:, :3] = values[:, -3:] = values[:, :, :3] = values[:, :, -3:] = -1024.0
    values[..., :3] = values[..., -3:] = -1024.0
    result.moving_image = replace(result.moving_image, values=values)
    assert result.moved is result.moved and float(result.moved.min()) == pytest.approx(-1024.0)
    assert result.resampled().values.shape == result.moved.shape
    assert result.resampled().grid == result.fixed_image.grid


def test_labels_keep_their_values():
    result = result_of()
    labels = (result.moving > result.moving.median()).to(torch.int32) * 7
    labels.affine = result.moving.affine
    moved = result.apply(labels, mode="nearest")
    assert set(moved.unique().tolist()) == {0, 7}
    assert moved.dtype == torch.int32
    expected = by_scipy(result, labels.as_tensor()[0].double().numpy(), order=0)
    assert (moved.as_tensor()[0].numpy() == expected).mean() > 0.999


def test_arrays_and_tensors_lie_on_the_moving_grid():
    result = result_of()
    for data in (result.moving.as_tensor(), result.moving.as_tensor()[0].numpy()):
        torch.testing.assert_close(result.apply(data).as_tensor(), result.moved.as_tensor())


def test_an_image_on_another_grid_of_the_moving_world():
    result = result_of()
    # every second voxel of a linear ramp is the ramp again
    ramp = torch.arange(20.0).view(1, 20, 1, 1).expand(1, 20, 16, 18)
    coarse_affine = result.moving.affine.clone()
    coarse_affine[:, 0] *= 2
    coarse = result.apply(MetaTensor(ramp[:, ::2].clone(), affine=coarse_affine))
    full = result.apply(MetaTensor(ramp.clone(), affine=result.moving.affine))
    inside = result.apply(MetaTensor(torch.ones(1, 10, 16, 18), affine=coarse_affine), fill_value=0.0) > 0.999
    torch.testing.assert_close(coarse[inside].as_tensor(), full[inside].as_tensor(), atol=1e-3, rtol=0)
    assert inside.sum() > 100


@pytest.mark.parametrize("dims", [2, 3])
def test_points_go_from_fixed_to_moving_world(dims):
    result = result_of(dims)
    points = np.random.default_rng(1).uniform(-20, 20, (7, dims))
    expected = points @ result.affine[:dims, :dims].T + result.affine[:dims, dims]
    got = result.apply(points)
    assert isinstance(got, np.ndarray) and got.dtype == np.float64
    np.testing.assert_allclose(got, expected)
    tensors = result.apply(torch.as_tensor(points).float())
    assert isinstance(tensors, torch.Tensor) and tensors.dtype == torch.float64
    np.testing.assert_allclose(tensors, expected, atol=1e-4)
    assert result.apply(np.zeros((0, dims))).shape == (0, dims)


def test_points_and_image_agree():
    # a blob around a point of the moving world comes to where the inverse takes that point
    result = result_of()
    place = np.array([9.0, 8.0, 9.0])
    distance = np.sqrt(sum((axis - p) ** 2 for axis, p in zip(np.indices((20, 16, 18)), place, strict=True)))
    blob = result.apply(np.exp(-0.5 * (distance / 2.0) ** 2))
    weight = blob.as_tensor()[0].numpy()
    center = np.array(scipy.ndimage.center_of_mass(weight))
    fixed_world = result.fixed.affine.numpy() @ [*center, 1]
    moving_world = (result.moving.affine.numpy() @ [*place, 1])[:3]
    np.testing.assert_allclose(result.apply(fixed_world[None, :3])[0], moving_world, atol=0.1)


@pytest.mark.parametrize(
    "data", [np.zeros((9, 9, 9)), torch.zeros(1, 9, 9, 9), "nowhere.nii.gz", [[1.0, 2.0, 3.0]], None]
)
def test_apply_refuses(data):
    with pytest.raises(RegistrationError) as caught:
        result_of().apply(data)
    assert caught.value.argument == "data"


def test_apply_refuses_a_mode():
    with pytest.raises(RegistrationError, match="mode"):
        result_of().apply(result_of().moving, mode="cubical")


@pytest.mark.parametrize("dims", [2, 3])
def test_parameters_compose_to_the_matrix(dims):
    result = result_of(dims)
    np.testing.assert_allclose(compose_parameters(result.parameters), result.affine, atol=1e-9)


@pytest.mark.parametrize(("name", "format"), [("t.tfm", None), ("t.txt", "text"), ("t.mat", "fsl")])
def test_a_saved_transform_is_the_matrix(tmp_path, name: str, format: str | None) -> None:
    result = result_of()
    result.save_transform(tmp_path / name, format)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    found = read_transform(tmp_path / name, result.fixed_image, result.moving_image, format)
    np.testing.assert_allclose(found, result.affine, atol=1e-6)


def test_text_does_not_print_voxels():
    assert len(repr(result_of())) < 600


@pytest.mark.parametrize("equal", [True, False])
def test_results_can_be_compared(equal: bool) -> None:
    one = result_of()
    assert (one == (one if equal else result_of())) is equal
    assert one in [result_of(), one] and len({one, result_of()}) == 2


def test_a_result_survives_pickle() -> None:
    result = result_of(2, channels=2)
    other = pickle.loads(pickle.dumps(result))
    np.testing.assert_array_equal(other.affine, result.affine)
    assert torch.equal(other.moving_image.values, result.moving_image.values)
    assert other.fixed_image.grid == result.fixed_image.grid and other.verdict == "PASS" and other.success


@pytest.mark.parametrize(("verdict", "success"), [("PASS", True), ("WARN", True), ("FAIL", False)])
def test_success_is_a_verdict_that_is_not_fail(verdict: str, success: bool) -> None:
    assert replace(result_of(), verdict=verdict).success is success
