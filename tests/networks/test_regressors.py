# SPDX-License-Identifier: Apache-2.0
"""Tests of the paper's regressor."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch

from monai_zsreg.errors import RegistrationError
from monai_zsreg.networks import regressors
from monai_zsreg.networks.coordinates import map_points
from monai_zsreg.networks.least_squares import TRANSFORMS
from monai_zsreg.networks.regressors import AffineRegressor, load_regressor, number_of_outputs, shipped_weights

KINDS = [(dims, transform) for dims in (2, 3) for transform in TRANSFORMS]


def make(dims: int, transform: str, **options) -> AffineRegressor:
    torch.manual_seed(1)
    options = {"num_points": 8, "hidden": (32, 16)} | options
    network = AffineRegressor(spatial_dims=dims, transform=transform, **options)
    with torch.no_grad():  # a fresh network hardly reacts to its input; a trained one does
        network.layers[-1].weight.mul_(3)
    return network


@pytest.mark.parametrize(("dims", "transform"), KINDS)
def test_shape_and_kind(dims, transform):
    network = make(dims, transform)
    matrix = network(torch.rand(5, 8, dims), torch.rand(5, 8, dims))
    assert matrix.shape == (5, dims, dims + 1)
    assert matrix.dtype == torch.float32
    assert matrix.requires_grad
    assert not torch.allclose(matrix[0], matrix[1])
    if transform == "affine":
        return
    linear = matrix[..., :dims]
    scale = torch.linalg.det(linear).abs() ** (1 / dims)
    torch.testing.assert_close(
        linear.transpose(1, 2) @ linear, (scale**2)[:, None, None] * torch.eye(dims).expand(5, -1, -1)
    )
    assert (torch.linalg.det(linear) > 0).all()
    if transform == "rigid":
        torch.testing.assert_close(scale, torch.ones(5))
    else:
        assert not torch.allclose(scale[0], scale[1])


@pytest.mark.parametrize("transform", ["similarity", "rigid"])
@pytest.mark.parametrize("dims", [2, 3])
def test_rotation_of_undefined_directions(dims, transform):
    network = make(dims, transform)
    with torch.no_grad():  # all raw numbers 0: no direction at all
        network.layers[-1].weight.zero_()
        network.layers[-1].bias.zero_()
    points = torch.rand(2, 8, dims)
    linear = network(points, points)[..., :dims]
    torch.testing.assert_close(linear.transpose(1, 2) @ linear, torch.eye(dims).expand(2, -1, -1))
    torch.testing.assert_close(torch.linalg.det(linear), torch.ones(2))
    if dims == 3:  # two parallel directions
        with torch.no_grad():
            network.layers[-1].bias[:6] = torch.tensor([1.0, 2.0, 3.0, 2.0, 4.0, 6.0])
        linear = network(points, points)[..., :dims]
        torch.testing.assert_close(linear.transpose(1, 2) @ linear, torch.eye(dims).expand(2, -1, -1))
        torch.testing.assert_close(torch.linalg.det(linear), torch.ones(2))


def test_scale_stays_finite():
    network = make(2, "similarity")
    with torch.no_grad():
        network.layers[-1].bias[2] = 1e6
    points = torch.rand(1, 8, 2)
    assert torch.isfinite(network(points, points)).all()


@pytest.mark.parametrize(("dims", "transform"), KINDS)
def test_script_gives_the_same(dims, transform):
    network = make(dims, transform)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(network)
    fixed, moving = torch.rand(4, 8, dims), torch.rand(4, 8, dims)
    torch.testing.assert_close(scripted(fixed, moving), network(fixed, moving))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_are_finite(transform):
    network = make(3, transform)
    points = torch.rand(3, 8, 3, requires_grad=True)
    network(points, points).square().sum().backward()
    assert torch.isfinite(points.grad).all() and points.grad.abs().sum() > 0


def test_start_treats_all_pairs_alike():
    network = make(2, "affine")
    fixed, moving = torch.rand(3, 8, 2), torch.rand(3, 8, 2)
    order = torch.randperm(8)
    torch.testing.assert_close(network(fixed[:, order], moving[:, order]), network(fixed, moving))


@pytest.mark.parametrize(("dims", "transform"), KINDS)
def test_normalized_network_follows_a_change_of_frame(dims, transform):
    network = make(dims, transform)
    fixed, moving = torch.rand(4, 8, dims), torch.rand(4, 8, dims)
    shift = torch.rand(2, dims)
    matrix = network(fixed, moving)
    other = network(3 * fixed + shift[0], 3 * moving + shift[1])
    torch.testing.assert_close(other[..., :dims], matrix[..., :dims], atol=1e-4, rtol=1e-4)
    points = torch.rand(4, 5, dims)
    expected = 3 * map_points(matrix, points) + shift[1]
    torch.testing.assert_close(map_points(other, 3 * points + shift[0]), expected, atol=1e-3, rtol=1e-4)


def test_points_as_they_come():
    normal, literal = make(2, "affine"), make(2, "affine", normalize=False)
    literal.load_state_dict(normal.state_dict())
    fixed, moving = torch.rand(4, 8, 2), torch.rand(4, 8, 2)
    assert not torch.allclose(normal(fixed, moving), literal(fixed, moving))
    assert not torch.allclose(literal(fixed, moving + 1)[..., :2], literal(fixed, moving)[..., :2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(literal)
    torch.testing.assert_close(scripted(fixed, moving), literal(fixed, moving))


@pytest.mark.parametrize("normalize", [True, False])
def test_coinciding_points_give_finite_numbers(normalize):
    network = make(2, "affine", normalize=normalize)
    points = torch.full((2, 8, 2), 0.4, requires_grad=True)
    matrix = network(points, points)
    matrix.sum().backward()
    assert torch.isfinite(matrix).all() and torch.isfinite(points.grad).all()


def test_narrow_first_layer_and_one_layer_work():
    points = torch.rand(2, 8, 2)
    assert make(2, "affine", hidden=(4,))(points, points).shape == (2, 2, 3)
    assert make(2, "affine", hidden=[19])(points, points).shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("spatial_dims", {"spatial_dims": 4}),
        ("transform", {"transform": "bspline"}),
        ("num_points", {"num_points": 2}),
        ("num_points", {"num_points": 6.0}),
        ("hidden", {"hidden": ()}),
        ("hidden", {"hidden": (32, 0)}),
        ("hidden", {"hidden": "32"}),
    ],
)
def test_wrong_constructor_argument(argument, options):
    with pytest.raises(RegistrationError) as error:
        AffineRegressor(**options)
    assert error.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "fixed", "moving"),
    [
        ("fixed_points", torch.rand(2, 7, 2), torch.rand(2, 8, 2)),
        ("moving_points", torch.rand(2, 8, 2), torch.rand(2, 8, 3)),
        ("moving_points", torch.rand(2, 8, 2), torch.rand(3, 8, 2)),
        ("fixed_points", torch.rand(8, 2), torch.rand(8, 2)),
        ("fixed_points", torch.zeros(2, 8, 2, dtype=torch.int64), torch.rand(2, 8, 2)),
    ],
)
def test_wrong_points(argument, fixed, moving):
    with pytest.raises(RegistrationError) as error:
        make(2, "affine")(fixed, moving)
    assert error.value.argument == argument


@pytest.mark.parametrize("prefix", ["", "regressor."])
@pytest.mark.parametrize(("dims", "transform"), KINDS)
def test_from_state_dict(dims, transform, prefix):
    network = make(dims, transform)
    state = {prefix + name: value for name, value in network.state_dict().items()}
    same = AffineRegressor.from_state_dict(state)
    assert (same.spatial_dims, same.transform, same.num_points) == (dims, transform, 8)
    assert same.hidden == network.hidden
    points = torch.rand(2, 8, dims)
    torch.testing.assert_close(same(points, 1 - points), network(points, 1 - points))


def test_from_foreign_state_dict():
    with pytest.raises(RegistrationError):
        AffineRegressor.from_state_dict(torch.nn.Conv2d(1, 1, 3).state_dict())
    state = make(2, "affine").state_dict()
    state["layers.9.bias"] = torch.zeros(1)
    with pytest.raises(RegistrationError):
        AffineRegressor.from_state_dict(state)


def test_every_kind_has_its_own_number_of_outputs():
    counts = [number_of_outputs(transform, dims) for dims, transform in KINDS]
    assert len(set(counts)) == len(counts)


# ------------------------------------------------------------------------------------------------- weights on disk


@pytest.mark.parametrize("dims", [2, 3])
def test_shipped_weights(dims):
    path = shipped_weights(dims)
    state = torch.load(path, weights_only=True)
    assert all(name.startswith("regressor.layers.") for name in state)
    assert all(value.isfinite().all() for value in state.values())
    network = load_regressor(path)
    assert (network.spatial_dims, network.transform) == (dims, "affine")
    assert len(state) == len(network.state_dict())  # a plain file for one network: no optimizer, no VGG-19
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    generator = torch.Generator().manual_seed(20240725)
    fixed = torch.rand(2000, 64, dims, generator=generator)
    matrix = torch.rand(2000, dims, dims + 1, generator=generator) * 2 - 1
    with torch.no_grad():
        error = (network(fixed, map_points(matrix, fixed)) - matrix).abs().mean().item()
    assert math.isfinite(error) and error <= 0.05
    assert path.stat().st_size < 3e6


CHECKOUT = "../bundles/zero_shot_affine_registration/models"


@pytest.mark.parametrize("places", [("pretrained_models", CHECKOUT), (CHECKOUT,)])
def test_installed_package_comes_before_the_checkout(tmp_path, monkeypatch, places):
    package = tmp_path / "site" / "monai_zsreg"
    for place in places:
        (package / place).mkdir(parents=True)
        (package / place / "model.pt").touch()
    monkeypatch.setattr(regressors, "__file__", str(package / "networks" / "regressors.py"))
    assert shipped_weights(2).samefile(package / places[0] / "model.pt")
    with pytest.raises(RegistrationError, match="model_3d.pt") as caught:
        shipped_weights(3)
    assert caught.value.argument == "regressor_weights"


@pytest.mark.parametrize("normalize", [True, False])
def test_file_knows_how_it_was_trained(tmp_path, normalize):
    network = AffineRegressor(num_points=4, hidden=(8,), normalize=normalize)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps({"normalize": normalize}))
    points = torch.rand(2, 4, 2)
    torch.testing.assert_close(load_regressor(str(tmp_path / "model.pt"))(points, points), network(points, points))


@pytest.mark.parametrize("case", ["missing", "folder", "empty", "text", "list", "nested", "module", "other"])
def test_file_that_will_not_do(tmp_path, case):
    path = tmp_path / "s.pt"
    content = {
        "list": [torch.ones(2)],
        "nested": {"state_dict": {"a": torch.ones(2)}},
        "module": torch.nn.Linear(2, 2),
        "other": torch.nn.Linear(2, 2).state_dict(),
    }
    if case == "folder":
        path.mkdir()
    elif case in content:
        torch.save(content[case], path)
    elif case != "missing":
        path.write_text("weights" if case == "text" else "")
    with pytest.raises(RegistrationError) as caught:
        load_regressor(path, "some_argument")
    assert caught.value.argument == "some_argument"
    assert str(path) in str(caught.value)
