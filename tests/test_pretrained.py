# SPDX-License-Identifier: Apache-2.0
"""Tests of finding and reading the regressor's shipped weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import monai_zsreg.pretrained
from monai_zsreg.errors import RegistrationError
from monai_zsreg.networks import AffineRegressor
from monai_zsreg.pretrained import load_state_dict, regressor_weights_path


@pytest.mark.parametrize("dims", [2, 3])
def test_shipped_weights_are_those_of_an_affine_regressor(dims):
    state = load_state_dict(regressor_weights_path(dims))
    network = AffineRegressor.from_state_dict(state)
    assert (network.spatial_dims, network.transform) == (dims, "affine")
    assert all(torch.isfinite(value).all() for value in state.values())
    # a plain file for one network: no optimizer, no VGG-19
    assert len(state) == len(network.state_dict())


def install(folder: Path, monkeypatch, *places: str) -> Path:
    """A package folder as pip (``pretrained_models``) or a checkout (``bundles``) lays it out."""
    package = folder / "site" / "monai_zsreg"
    package.mkdir(parents=True)
    for place in places:
        (package / place).mkdir(parents=True)
        torch.save({}, package / place / "model.pt")
    monkeypatch.setattr(monai_zsreg.pretrained, "__file__", str(package / "pretrained.py"))
    return package


CHECKOUT = "../bundles/zero_shot_affine_registration/models"


def test_installed_package_comes_before_the_checkout(tmp_path, monkeypatch):
    package = install(tmp_path, monkeypatch, "pretrained_models", CHECKOUT)
    assert regressor_weights_path(2) == package / "pretrained_models" / "model.pt"


def test_checkout(tmp_path, monkeypatch):
    package = install(tmp_path, monkeypatch, CHECKOUT)
    assert regressor_weights_path(2).samefile(package / CHECKOUT / "model.pt")


def test_neither(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "pretrained_models")
    with pytest.raises(RegistrationError, match="model_3d.pt") as caught:
        regressor_weights_path(3)
    assert caught.value.argument == "regressor_weights"


def test_round_trip(tmp_path):
    state = {"layers.0.weight": torch.rand(3, 2)}
    torch.save(state, tmp_path / "s.pt")
    assert torch.equal(load_state_dict(tmp_path / "s.pt")["layers.0.weight"], state["layers.0.weight"])
    assert torch.equal(load_state_dict(str(tmp_path / "s.pt"))["layers.0.weight"], state["layers.0.weight"])


@pytest.mark.parametrize("case", ["missing", "folder", "empty", "text", "list", "nested", "module"])
def test_file_that_will_not_do(tmp_path, case):
    path = tmp_path / "s.pt"
    if case == "folder":
        path.mkdir()
    elif case == "empty":
        path.touch()
    elif case == "text":
        path.write_text("weights")
    elif case == "list":
        torch.save([torch.ones(2)], path)
    elif case == "nested":
        torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    elif case == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(RegistrationError) as caught:
        load_state_dict(path, "some_argument")
    assert caught.value.argument == "some_argument"
    assert str(path) in str(caught.value)
