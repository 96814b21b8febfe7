# SPDX-License-Identifier: Apache-2.0
"""What the model zoo asks of a bundle before it is merged: files, sizes, keys, pins."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monai.bundle import ConfigParser, ckpt_export, load
from packaging.requirements import Requirement
from packaging.version import Version

from monai_zsreg.networks import UNTRAINED_FOR_CHECKS_ONLY, ZeroShotAffineNet, bundled_vgg19

BUNDLE = Path(__file__).parents[2] / "bundles" / "zero_shot_affine_registration"
METADATA = json.loads((BUNDLE / "configs" / "metadata.json").read_text(encoding="utf-8"))


def config(name: str) -> dict[str, Any]:
    return json.loads((BUNDLE / "configs" / name).read_text(encoding="utf-8"))


def test_files() -> None:
    for name in ("LICENSE", "configs/inference.json", "configs/train.json", "models/model.pt", "docs/README.md"):
        assert (BUNDLE / name).is_file()
    license_of_data = (BUNDLE / "docs" / "data_license.txt").read_text(encoding="utf-8")
    assert all(name in license_of_data for name in ("VGG-19", "ImageNet", "MNI152"))
    assert max(path.stat().st_size for path in BUNDLE.rglob("*") if path.name != "vgg19-dcbb9e9d.pth") < 25e6
    (large,) = yaml.safe_load((BUNDLE / "large_files.yml").read_text())["large_files"]
    assert not Path(large["path"]).is_absolute() and large["url"].startswith("https://")


def test_keys() -> None:
    inference, train = config("inference.json"), config("train.json")
    assert {"bundle_root", "device", "network_def", "inferer", "output_dir"} <= set(inference)
    assert {"bundle_root", "device", "dataset_dir", "output_dir", "val_interval"} <= set(train)
    assert {"trainer", "dataset", "handlers", "inferer", "key_metric"} <= set(train["train"])
    assert {"evaluator", "dataset", "handlers", "inferer", "key_metric"} <= set(train["validate"])
    assert "max_epochs" in train["train"]["trainer"]
    intervals = [h["interval"] for h in train["train"]["handlers"] if h["_target_"] == "ValidationHandler"]
    assert intervals == ["@val_interval"]
    assert inference["bundle_root"] == train["bundle_root"] == "."  # nobody's own folder
    assert METADATA["version"] in METADATA["changelog"] and METADATA["eval_metrics"]


def test_pins_are_releases_within_the_packages_bounds() -> None:
    """pip's own resolution of them needs an index: ``.ci/release`` does it."""
    import tomllib

    project = tomllib.loads((BUNDLE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {name: METADATA[f"{key}_version"] for name, key in (("monai", "monai"), ("torch", "pytorch"))}
    pins |= {"numpy": METADATA["numpy_version"]} | METADATA["required_packages_version"]
    wanted = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["demo"])]
    for requirement in wanted:
        assert Version(pins[requirement.name.lower()]) in requirement.specifier, requirement
    assert Version(pins["numpy"]) < Version("2.3")  # the last that has wheels for Python 3.10
    # torchvision 0.N+15 belongs to torch 2.N
    assert Version(pins["torchvision"]).minor == Version(pins["torch"]).minor + 15


test_pins_are_releases_within_the_packages_bounds = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="tomllib is new in Python 3.11"
)(test_pins_are_releases_within_the_packages_bounds)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy that is a folder of the zoo, with VGG-19 as ``download_large_files`` leaves it."""
    return Path(shutil.copytree(BUNDLE, tmp_path / "models" / BUNDLE.name))


@pytest.mark.parametrize("workflow", ["train", "infer"])
def test_load_gives_the_network_that_the_metadata_describe(bundle: Path, workflow: str) -> None:
    name = "inference" if workflow == "infer" else workflow
    network = load(bundle.name, bundle_dir=bundle.parent, workflow_type=name)
    shipped = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert isinstance(network, ZeroShotAffineNet)
    assert all(torch.equal(value.float(), network.state_dict()[key].float()) for key, value in shipped.items())


def test_weights_in_the_bundle_are_used_and_export(bundle: Path, vgg19_weights: Path) -> None:
    assert bundled_vgg19(bundle) is None
    shutil.copy(vgg19_weights, bundle / "models" / "vgg19-dcbb9e9d.pth")
    configs = bundle / "configs"
    for name in ("inference.json", "train.json"):
        parser = ConfigParser(ConfigParser.load_config_file(configs / name) | {"bundle_root": str(bundle)})
        assert parser.get_parsed_content("vgg19_weights") == bundled_vgg19(bundle) is not None
    exported = bundle / "models" / "model.ts"
    ckpt_export(
        "network_def",
        filepath=str(exported),
        ckpt_file=str(bundle / "models" / "model.pt"),
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        bundle_root=str(bundle),
    )
    assert torch.jit.load(exported)(torch.rand(1, 2, 32, 32)).shape == (1, 1, 32, 32)


def test_results_go_to_the_bundle_unless_told_otherwise() -> None:
    given = {"bundle_root": "here", "vgg19_weights": UNTRAINED_FOR_CHECKS_ONLY}
    parser = ConfigParser(config("inference.json") | given)
    assert parser.get_parsed_content("output_dir") == "here/eval"
