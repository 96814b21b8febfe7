# SPDX-License-Identifier: Apache-2.0
"""MONAI's own tools on the bundle: metadata against the schema, the network's shapes, export to TorchScript."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ckpt_export, verify_metadata, verify_net_in_out

import monai_zsreg
from monai_zsreg import RegistrationWarning
from monai_zsreg.app.bundle import PairInferer
from monai_zsreg.app.settings import Settings
from monai_zsreg.io import load_image
from monai_zsreg.networks import UNTRAINED_FOR_CHECKS_ONLY, ZeroShotAffineNet
from monai_zsreg.registration import Prepared

BUNDLE = Path(__file__).parents[2] / "bundles" / "zero_shot_affine_registration"
METADATA, INFERENCE = (str(BUNDLE / "configs" / name) for name in ("metadata.json", "inference.json"))
MODEL = BUNDLE / "models" / "model.pt"
SCHEMA = Path(__file__).parents[1] / "fixtures" / "meta_schema_20240725.json"


def facts() -> dict:
    return json.loads(Path(METADATA).read_text())


def test_metadata_fits_the_schema(tmp_path: Path) -> None:
    schema = shutil.copy(SCHEMA, tmp_path)  # a file that is there is not downloaded
    verify_metadata(meta_file=METADATA, filepath=schema)
    assert facts()["schema"].endswith(f"/schema/{SCHEMA.name}")

    # the check can fail
    wrong = facts()
    del wrong["network_data_format"]["outputs"]["pred"]["dtype"]
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(meta_file=str(tmp_path / "wrong.json"), filepath=schema)


def test_metadata_names_this_version() -> None:
    assert facts()["version"] == monai_zsreg.__version__
    assert facts()["version"] in facts()["changelog"]
    assert facts()["required_packages_version"]["monai-zsreg"] == monai_zsreg.__version__


@pytest.mark.filterwarnings("ignore:some pairs could not be registered:UserWarning")  # they are random numbers
@pytest.mark.parametrize("size", [1, 64])
def test_network_shapes(size: int) -> None:
    """Also on a machine without weights, where the option that says what it does gives random filters."""
    with pytest.warns(RegistrationWarning, match="RANDOM"):
        verify_net_in_out(
            "network_def",
            meta_file=METADATA,
            config_file=INFERENCE,
            device="cpu",
            any=size,
            vgg19_weights=UNTRAINED_FOR_CHECKS_ONLY,
            seed=size,  # another seed, another network: the warning comes each time
        )


def test_shipped_weights_belong_to_the_network() -> None:
    network = ZeroShotAffineNet()  # constructs without VGG-19
    state = torch.load(MODEL, weights_only=True)
    network.load_state_dict(state)  # strictly
    assert all(name.startswith("regressor.") for name in state)


# that the paper's preset finds nothing there is no matter of the export
@pytest.mark.filterwarnings("ignore::monai_zsreg.errors.RegistrationWarning")
def test_export_and_load(vgg19_weights: Path, tmp_path: Path, load_slice) -> None:
    exported = tmp_path / "model.ts"
    ckpt_export(
        "network_def",
        filepath=str(exported),
        ckpt_file=str(MODEL),
        meta_file=METADATA,
        config_file=INFERENCE,
        vgg19_weights=str(vgg19_weights),
    )
    extra = {"metadata.json": "", "inference.json": ""}
    scripted = torch.jit.load(exported, _extra_files=extra)
    assert json.loads(extra["metadata.json"])["version"] == monai_zsreg.__version__
    image = load_slice()[:, 20:116, 40:148].as_tensor()
    pair = torch.stack([image.roll((5, -4), (1, 2)), image], dim=1).float()
    eager = ZeroShotAffineNet(vgg19_weights=vgg19_weights)
    eager.load_state_dict(torch.load(MODEL, weights_only=True))
    eager.eval().features.load_weights()
    with torch.inference_mode():
        expected, matrix = eager(pair), eager.estimate(pair).matrix
        assert bool(torch.isfinite(matrix).all())
        torch.testing.assert_close(scripted(pair), expected, rtol=1e-4, atol=1e-4 * float(pair.max()))
        torch.testing.assert_close(scripted.estimate(pair).matrix, matrix, rtol=1e-4, atol=1e-5)

    # the exported network in the place of the preset's own, on a pair of images
    moving, fixed = (load_image(pair[0, i][None]) for i in (0, 1))
    inferer = PairInferer(Settings(preset="paper", vgg19_weights=str(vgg19_weights)))
    results = [inferer({"prepared": Prepared(fixed), "moving": moving}, network) for network in (scripted, eager, None)]
    for result in results[1:]:
        np.testing.assert_allclose(results[0].affine, result.affine, rtol=1e-4, atol=1e-3)


def test_large_files() -> None:
    (entry,) = yaml.safe_load((BUNDLE / "large_files.yml").read_text())["large_files"]
    from torchvision.models import VGG19_Weights

    assert entry["url"] == VGG19_Weights.IMAGENET1K_V1.url
    assert "hash_val" not in entry  # MONAI compares whole digests, and only a prefix is published
