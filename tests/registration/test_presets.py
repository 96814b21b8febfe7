# SPDX-License-Identifier: Apache-2.0
"""Tests of the presets."""

from __future__ import annotations

import pytest

from monai_zsreg.errors import RegistrationError
from monai_zsreg.networks import UNTRAINED_FOR_CHECKS_ONLY, ZeroShotAffineNet
from monai_zsreg.registration import DEFAULT_PRESET, PRESETS
from monai_zsreg.registration.presets import ROBUST, preset_options


def test_names():
    assert {"paper", "keypoints", "robust"} == set(PRESETS)
    assert DEFAULT_PRESET == ROBUST == "robust"


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {ROBUST}))
@pytest.mark.filterwarnings("ignore:VGG-19 filters are RANDOM")
def test_every_preset_builds_a_network(preset, dims):
    network = ZeroShotAffineNet(dims, vgg19_weights=UNTRAINED_FOR_CHECKS_ONLY, **preset_options(preset))
    assert network.spatial_dims == dims


@pytest.mark.filterwarnings("ignore:VGG-19 filters are RANDOM")
def test_paper_is_the_paper():
    network = ZeroShotAffineNet(vgg19_weights=UNTRAINED_FOR_CHECKS_ONLY, **preset_options("paper"))
    assert (network.num_points, network.num_sets, network.replacement) == (64, 10, True)
    assert network.keypoints.center_of_mass.threshold == 0.95
    assert network.features.out_channels == 128
    assert not network.keypoints.symmetric and not network.consensus


def test_options_are_a_copy():
    preset_options("keypoints")["estimator"] = "mlp"
    assert preset_options("keypoints")["estimator"] == "consensus"


@pytest.mark.parametrize("preset", ["Paper", "", None, 3, ["paper"]])
def test_unknown(preset):
    with pytest.raises(RegistrationError) as caught:
        preset_options(preset)
    assert caught.value.argument == "preset"
    assert "'paper'" in str(caught.value) and "'keypoints'" in str(caught.value)
