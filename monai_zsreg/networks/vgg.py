# SPDX-License-Identifier: Apache-2.0
"""The paper's feature extractor: the first two convolution layers of VGG-19 (section 2.3)."""

import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_zsreg.errors import RegistrationError, RegistrationWarning, require
from monai_zsreg.io.files import atomic_path

IMAGENET = "imagenet"
UNTRAINED_FOR_CHECKS_ONLY = "UNTRAINED_RANDOM_FILTERS_FOR_TOOL_CHECKS_ONLY"

# of the images that torchvision trained with
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SHAPES = {
    "features.0.weight": (64, 3, 3, 3),
    "features.0.bias": (64,),
    "features.2.weight": (64, 64, 3, 3),
    "features.2.bias": (64,),
}
_BUFFERS = dict(zip(("weight_1", "bias_1", "weight_2", "bias_2"), _SHAPES, strict=True))


class VGG19Features(nn.Module):
    """Feature maps of VGG-19's conv1_1 and conv1_2, each after its ReLU.

    ``forward`` takes gray images ``[B, 1, H, W]`` with intensities in [0, 1] and returns ``[B, 64 L, H, W]`` for L
    layers. The border is replicated by the two pixels that the layers see beyond it: zeros beside a bright border would
    be an edge that the image does not have.

    The weights are buffers that do not persist: no checkpoint of a network around this one holds them. A named file is
    read when the object is made; torchvision's weights wait for the first use, which may have to download them.

    Args:
        weights: None or ``"imagenet"`` for torchvision's ``VGG19_Weights.IMAGENET1K_V1``, or a file with a whole or a
            cut state dict under torchvision's names (``features.0.weight``, ``features.0.bias``,
            ``features.2.weight``, ``features.2.bias``). ``UNTRAINED_FOR_CHECKS_ONLY`` fills in random numbers, so that
            tools which look at shapes alone can run without weights; it warns, and no result of it means anything.
        layers: the layers to return: 1 for conv1_1, 2 for conv1_2.

    Raises:
        RegistrationError: a file that is missing or does not hold the weights; at the first use, no weights to be had.

    References:
        Simonyan and Zisserman, arXiv:1409.1556.
    """

    mean: Tensor
    std: Tensor
    weight_1: Tensor
    bias_1: Tensor
    weight_2: Tensor
    bias_2: Tensor

    def __init__(self, weights: str | os.PathLike | None = None, layers: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        require(len(layers) > 0 and set(layers) <= {1, 2}, "layers", layers, "a non-empty subset of (1, 2)")
        self.first = 1 in layers
        self.second = 2 in layers
        self.loaded = False
        for name, stated in _BUFFERS.items():
            self.register_buffer(name, torch.zeros(_SHAPES[stated]), persistent=False)
        for name, value in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        if weights is not None and str(weights) != IMAGENET:
            self._take(vgg19_filters(weights))

    def forward(self, image: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self.load_weights()
        x = (image.repeat(1, 3, 1, 1) - self.mean) / self.std
        # channels last: the convolutions on a CPU take two thirds of the time
        x = F.pad(x, [2, 2, 2, 2], mode="replicate").contiguous(memory_format=torch.channels_last)
        x = F.relu_(F.conv2d(x, self.weight_1, self.bias_1))
        inner = x[:, :, 1:-1, 1:-1]
        if not self.second:
            return inner
        y = F.relu_(F.conv2d(x, self.weight_2, self.bias_2))
        return torch.cat([inner, y], dim=1) if self.first else y

    @torch.jit.ignore
    def load_weights(self) -> None:
        """Fill in torchvision's weights unless there are some; may download them."""
        if not self.loaded:
            self._take(vgg19_filters())

    @torch.jit.ignore
    def __prepare_scriptable__(self) -> "VGG19Features":
        # called by torch.jit.script: a scripted network cannot fetch its weights later
        self.load_weights()
        return self

    @torch.jit.ignore
    def _take(self, state: dict[str, Tensor]) -> None:
        for name, stated in _BUFFERS.items():
            getattr(self, name).copy_(state[stated])
        self.loaded = True


def bundled_vgg19(bundle_root: str | os.PathLike) -> str | None:
    """The file that MONAI's ``download_large_files`` puts into a bundle's folder, or None where it is not there."""
    path = Path(bundle_root) / "models" / "vgg19-dcbb9e9d.pth"
    return str(path) if path.is_file() else None


def cached_weights_path() -> Path:
    """Where the 155 KB in use are kept after torchvision's download: the folder of torch's own hub checkpoints."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "monai_zsreg_vgg19_imagenet1k_v1_conv1.pt"


def vgg19_filters(weights: str | os.PathLike | None = None) -> dict[str, Tensor]:
    """Weights and biases of VGG-19's first two convolutions under torchvision's names; see `VGG19Features`."""
    if str(weights) == UNTRAINED_FOR_CHECKS_ONLY:
        text = "VGG-19 filters are RANDOM NUMBERS, for checks of shapes and files alone: registrations are meaningless"
        warnings.warn(text, RegistrationWarning, stacklevel=3)
        generator = torch.Generator().manual_seed(0)
        return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in _SHAPES.items()}
    if weights is not None and str(weights) != IMAGENET:
        return _read(Path(weights))
    if cached_weights_path().is_file():
        try:
            return _read(cached_weights_path())
        except RegistrationError as error:
            warnings.warn(f"the cached weights are damaged: {error}", RegistrationWarning, stacklevel=3)
    return _download()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        for name, shape in _SHAPES.items():
            if tuple(state[name].shape) != shape:
                raise ValueError(f"the shape of {name}")
    except Exception as error:  # torch.load raises a dozen kinds; all mean that this file will not do
        expected = f"a VGG-19 state dict with {', '.join(_SHAPES)} ({type(error).__name__}: {error})"
        raise RegistrationError("vgg19_weights", str(path), expected) from error
    return {name: state[name] for name in _SHAPES}


def _download() -> dict[str, Tensor]:
    """Fetch torchvision's weights once, keep what is in use, drop the other 548 MB."""
    from torchvision.models import VGG19_Weights

    published = VGG19_Weights.IMAGENET1K_V1
    kept_by_torchvision = cached_weights_path().parent / os.path.basename(published.url)
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = kept_by_torchvision.parent if kept_by_torchvision.is_file() else folder
            state = published.get_state_dict(model_dir=place, check_hash=True, weights_only=True)
            filters = {name: state[name].clone() for name in _SHAPES}
    except Exception as error:
        allowed = (
            f"VGG-19 weights, but {kept_by_torchvision} does not hold them and the download of {published.url} failed "
            f"({type(error).__name__}: {error}). Either connect once, or fetch that file elsewhere and name it: "
            "vgg19_weights=FILE in Python, --vgg19_weights FILE with the bundle. A cut file with the first two "
            "convolution layers is enough"
        )
        raise RegistrationError("vgg19_weights", IMAGENET, allowed) from error
    try:
        with atomic_path(cached_weights_path()) as partial:
            torch.save(filters, partial)
    except (OSError, RegistrationError) as error:
        warnings.warn(f"VGG-19 weights could not be cached: {error}", RegistrationWarning, stacklevel=4)
    return filters
