# SPDX-License-Identifier: Apache-2.0
"""Tests of the VGG-19 features and of where their weights come from."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models import Weights, WeightsEnum

from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.networks import UNTRAINED_FOR_CHECKS_ONLY, VGG19Features, ZeroShotAffineNet
from monai_zsreg.networks.vgg import cached_weights_path

NAMES = ["features.0.weight", "features.0.bias", "features.2.weight", "features.2.bias"]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A cache of torch's hub that is empty, whatever this machine has downloaded."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub"


def serve(monkeypatch, url: str) -> None:
    """Let torchvision name another address; the download itself stays torch's own."""

    class Served(WeightsEnum):
        IMAGENET1K_V1 = Weights(url=url, transforms=None, meta={})

    monkeypatch.setattr(torchvision.models, "VGG19_Weights", Served)


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(64, 3, 3, 3), (64,), (64, 64, 3, 3), (64,)]
    return {name: torch.randn(shape, generator=generator) for name, shape in zip(NAMES, shapes, strict=True)}


def published(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """A file named by its digest, as torch's hub checks it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "vgg19.pth")
    digest = hashlib.sha256((folder / "vgg19.pth").read_bytes()).hexdigest()[:8]
    return (folder / "vgg19.pth").rename(folder / f"vgg19-{digest}.pth")


def image_of(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def torchvision_maps(state: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    # the first two convolutions of configuration E, which is VGG-19, each with its ReLU
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"][:2], batch_norm=False)
    layers.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        x = normalize(image.repeat(1, 3, 1, 1))
        first = layers[1](layers[0](x))
        return torch.cat([first, layers[3](layers[2](first.clone()))], dim=1)


# --------------------------------------------------------------------------------------------------------------------
# what it computes
# --------------------------------------------------------------------------------------------------------------------


def test_torchvisions_layers_are_the_judge(vgg19_weights, load_slice, device):
    image = load_slice().as_tensor()[None, :, 60:124, 60:131]
    image = image / image.max()
    features = VGG19Features(vgg19_weights).to(device)
    maps = features(image.to(device)).cpu()
    expected = torchvision_maps(torch.load(vgg19_weights, weights_only=True), image)
    assert maps.shape == (1, 128, 64, 71)
    torch.testing.assert_close(maps[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-3, rtol=1e-4)
    # torchvision's zeros are seen at the border
    assert (maps - expected).abs().max() > 0.1


def test_border_of_a_constant_image_is_no_feature(vgg19_weights):
    maps = VGG19Features(vgg19_weights)(torch.full((1, 1, 9, 11), 0.7))
    torch.testing.assert_close(maps, maps[..., 4:5, 5:6].expand_as(maps), atol=1e-4, rtol=1e-4)


def test_layers(tmp_path):
    torch.save(random_state(), tmp_path / "w.pt")
    image = image_of(2, 1, 12, 10)
    both = VGG19Features(tmp_path / "w.pt")
    for layer, part in ((1, slice(0, 64)), (2, slice(64, 128))):
        one = VGG19Features(tmp_path / "w.pt", layers=(layer,))
        torch.testing.assert_close(one(image), both(image)[:, part])


def test_no_other_layer_is_built(vgg19_weights):
    features = VGG19Features(vgg19_weights)
    count = sum(tensor.numel() for tensor in [*features.parameters(), *features.buffers()])
    assert count == 64 * 3 * 9 + 64 + 64 * 64 * 9 + 64 + 6


@pytest.mark.parametrize("layers", [(), (3,), (0, 1)])
def test_unknown_layers(layers):
    with pytest.raises(RegistrationError, match="layers"):
        VGG19Features(UNTRAINED_FOR_CHECKS_ONLY, layers)


def test_no_checkpoint_holds_the_weights(vgg19_weights):
    assert VGG19Features(vgg19_weights).state_dict() == {}
    network = ZeroShotAffineNet(vgg19_weights=vgg19_weights, num_points=8, hidden=(8,))
    assert all(name.startswith("regressor.") for name in network.state_dict())


def test_copies_and_devices_keep_the_weights(vgg19_weights, device):
    features = VGG19Features(vgg19_weights)
    image = image_of(1, 1, 8, 8)
    expected = features(image)
    moved = copy.deepcopy(features).to(device)
    torch.testing.assert_close(moved(image.to(device)).cpu(), expected, atol=1e-4, rtol=1e-4)
    assert moved.double()(image.double().to(device)).dtype == torch.float64


# --------------------------------------------------------------------------------------------------------------------
# files
# --------------------------------------------------------------------------------------------------------------------


def test_whole_and_cut_files_are_the_same(tmp_path):
    state = random_state()
    torch.save(state, tmp_path / "cut.pt")
    torch.save(state | {"features.5.weight": torch.ones(3), "classifier.6.bias": torch.ones(9)}, tmp_path / "whole.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pt")
    image = image_of(1, 1, 9, 9)
    expected = torchvision_maps(state, image)[..., 2:-2, 2:-2]
    for file in ("cut.pt", "whole.pth", "wrapped.pt"):
        got = VGG19Features(str(tmp_path / file))(image)[..., 2:-2, 2:-2]
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def damaged(folder: Path, case: str) -> Path:
    path = folder / "weights.pt"
    state = random_state()
    if case == "missing":
        return path
    if case == "folder":
        path.mkdir()
        return path
    if case == "empty":
        path.touch()
    elif case == "text":
        path.write_text("not weights")
    elif case == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif case == "incomplete":
        torch.save({name: state[name] for name in NAMES[:3]}, path)
    elif case == "shape":
        torch.save(state | {NAMES[0]: torch.ones(64, 1, 3, 3)}, path)
    elif case == "list":
        torch.save(list(state.values()), path)
    elif case == "number":
        torch.save(state | {NAMES[0]: 1.0}, path)
    elif case == "code":
        torch.save(torch.nn.Linear(2, 2), path)  # a pickled object, which weights_only refuses
    return path


DAMAGES = ["missing", "folder", "empty", "text", "truncated", "incomplete", "shape", "list", "number", "code"]


@pytest.mark.parametrize("case", DAMAGES)
def test_file_that_will_not_do(tmp_path, case):
    path = damaged(tmp_path, case)
    with pytest.raises(RegistrationError) as caught:
        VGG19Features(path)
    assert caught.value.argument == "vgg19_weights"
    assert str(path) in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# torchvision's download
# --------------------------------------------------------------------------------------------------------------------


def test_no_weights_to_be_had(hub, tmp_path, monkeypatch):
    url = (tmp_path / "nobody" / "vgg19-00000000.pth").as_uri()
    serve(monkeypatch, url)
    features = VGG19Features()
    assert not features.loaded
    with pytest.raises(RegistrationError) as caught:
        features(image_of(1, 1, 8, 8))
    message = str(caught.value)
    assert caught.value.argument == "vgg19_weights"
    # what was tried, and the ways out
    for text in (url, str(hub / "checkpoints" / "vgg19-00000000.pth"), "vgg19_weights=FILE", "--vgg19_weights FILE"):
        assert text in message
    assert list(tmp_path.rglob("*.pt*")) == []


def test_first_use_downloads_and_the_cache_keeps_what_is_in_use(hub, tmp_path, monkeypatch):
    state = random_state(4)
    file = published(tmp_path / "server", state | {"classifier.0.weight": torch.zeros(512, 1024)})
    serve(monkeypatch, file.as_uri())
    image = image_of(1, 1, 9, 9)
    features = VGG19Features()
    assert not cached_weights_path().exists()
    maps = features(image)
    torch.testing.assert_close(
        maps[..., 2:-2, 2:-2], torchvision_maps(state, image)[..., 2:-2, 2:-2], atol=1e-3, rtol=1e-4
    )
    assert cached_weights_path().is_relative_to(hub)
    kept = torch.load(cached_weights_path(), weights_only=True)
    assert set(kept) == set(NAMES)
    assert cached_weights_path().stat().st_size < 170_000
    assert [path for path in hub.rglob("*") if path.is_file()] == [cached_weights_path()]
    # from now on nothing is fetched
    file.unlink()
    torch.testing.assert_close(VGG19Features()(image), maps)


def test_what_torchvision_downloaded_before_is_used(hub, tmp_path, monkeypatch):
    file = published(hub / "checkpoints", random_state(5))
    serve(monkeypatch, f"file:///nowhere/{file.name}")
    assert VGG19Features()(image_of(1, 1, 8, 8)).shape == (1, 128, 8, 8)
    assert file.exists()


def test_download_that_does_not_match_its_digest(hub, tmp_path, monkeypatch):
    file = published(tmp_path / "server", random_state()).rename(tmp_path / "server" / "vgg19-0badc0de.pth")
    serve(monkeypatch, file.as_uri())
    with pytest.raises(RegistrationError, match="vgg19_weights"):
        VGG19Features()(image_of(1, 1, 8, 8))
    assert not cached_weights_path().exists()


def test_damaged_cache_is_replaced(hub, tmp_path, monkeypatch):
    serve(monkeypatch, published(tmp_path / "server", random_state(6)).as_uri())
    cached_weights_path().parent.mkdir(parents=True)
    cached_weights_path().write_bytes(b"half of a file")
    with pytest.warns(RegistrationWarning, match="damaged"):
        VGG19Features()(image_of(1, 1, 8, 8))
    # no warning, which would be an error here
    VGG19Features()(image_of(1, 1, 8, 8))


def test_cache_that_cannot_be_written_is_a_warning(hub, tmp_path, monkeypatch):
    serve(monkeypatch, published(tmp_path / "server", random_state(7)).as_uri())
    hub.write_text("a file where the folder should be")
    with pytest.warns(RegistrationWarning, match="could not be cached"):
        assert VGG19Features()(image_of(1, 1, 8, 8)).shape == (1, 128, 8, 8)


# --------------------------------------------------------------------------------------------------------------------
# TorchScript, and the filters for checks
# --------------------------------------------------------------------------------------------------------------------


def test_scripted_module_keeps_the_weights(vgg19_weights, tmp_path):
    features = VGG19Features(vgg19_weights)
    image = image_of(1, 1, 10, 9)
    torch.jit.save(torch.jit.script(features), tmp_path / "s.ts")
    torch.testing.assert_close(torch.jit.load(tmp_path / "s.ts")(image), features(image))


def test_scripting_without_weights_is_refused(hub, tmp_path, monkeypatch):
    serve(monkeypatch, (tmp_path / "nobody" / "vgg19-00000000.pth").as_uri())
    with pytest.raises(RegistrationError, match="vgg19_weights"):
        torch.jit.script(VGG19Features())


def test_random_filters_only_by_their_loud_name(hub):
    with pytest.warns(RegistrationWarning, match="RANDOM"):
        features = VGG19Features(UNTRAINED_FOR_CHECKS_ONLY)
    with pytest.warns(RegistrationWarning):
        again = VGG19Features(UNTRAINED_FOR_CHECKS_ONLY)
    image = image_of(1, 1, 8, 8)
    maps = features(image)
    assert maps.shape == (1, 128, 8, 8)
    assert torch.equal(maps, again(image))
    assert maps.std() > 0
    assert not cached_weights_path().exists()


def test_gradient_reaches_the_image(vgg19_weights):
    image = image_of(1, 1, 8, 8).requires_grad_()
    VGG19Features(vgg19_weights)(image).sum().backward()
    assert image.grad.abs().max() > 0
    assert F.relu(VGG19Features(vgg19_weights)(image)).min() >= 0
