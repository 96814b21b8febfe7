# SPDX-License-Identifier: Apache-2.0
"""The paper's feature extractor: the first two convolution layers of VGG-19 (section 2.3)."""

import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.io.files import atomic_path, exists

__all__ = ["IMAGENET", "UNTRAINED_FOR_CHECKS_ONLY", "VGG19Features", "VGG19Patches", "cached_weights_path"]

IMAGENET = "imagenet"
UNTRAINED_FOR_CHECKS_ONLY = "UNTRAINED_RANDOM_FILTERS_FOR_TOOL_CHECKS_ONLY"

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_SHAPES = {
    "features.0.weight": (64, 3, 3, 3),
    "features.0.bias": (64,),
    "features.2.weight": (64, 64, 3, 3),
    "features.2.bias": (64,),
}


def cached_weights_path() -> Path:
    """Where the 155 KB in use are kept after torchvision's download: the folder of torch's own hub checkpoints."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "monai_zsreg_vgg19_imagenet1k_v1_conv1.pt"


class VGG19Features(nn.Module):
    """Feature maps of VGG-19's conv1_1 and conv1_2, each after its ReLU.

    ``forward`` takes one-channel images ``[B, 1, H, W]`` with intensities in [0, 1] and returns ``[B, 64 L, H, W]``
    for L layers. Gray is repeated to three channels and normalized as the weights were trained. The border
    is replicated by the two pixels that the layers see beyond it, because zeros beside a bright border would be an edge
    that the image does not have.

    The weights are buffers that do not persist: no checkpoint of a network around this one holds them. They are read
    from a named file or from the cache when the object is made; torchvision's download waits for the first use.

    Args:
        weights: ``"imagenet"`` for torchvision's ``VGG19_Weights.IMAGENET1K_V1``, or a file with a whole or a cut
            state dict under torchvision's names (``features.0.weight``, ``features.0.bias``, ``features.2.weight``,
            ``features.2.bias``). ``UNTRAINED_FOR_CHECKS_ONLY`` fills in random numbers, so that tools which only
            look at shapes can run on a machine without weights; it warns, and no result of it means anything.
        layers: the layers to return: 1 for conv1_1, 2 for conv1_2.

    Raises:
        RegistrationError: unknown layer, or a file that is missing or does not hold the weights; in ``forward``, no
            weights could be had.

    References:
        Kori and Krishnamurthi, section 2.3. Simonyan and Zisserman, arXiv:1409.1556.

    Example::

        features = VGG19Features(weights="vgg19-dcbb9e9d.pth")
        maps = features(torch.rand(1, 1, 240, 240))  # [1, 128, 240, 240]
    """

    mean: Tensor
    std: Tensor
    weight_0: Tensor
    bias_0: Tensor
    weight_2: Tensor
    bias_2: Tensor

    def __init__(self, weights: str | os.PathLike = IMAGENET, layers: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        if not layers or any(layer not in (1, 2) for layer in layers):
            raise RegistrationError("layers", layers, "a non-empty subset of (1, 2)")
        self.first = 1 in layers
        self.second = 2 in layers
        self.out_channels = 64 * (int(self.first) + int(self.second))
        self.source = str(weights)
        self.loaded = False
        for name, shape in _SHAPES.items():
            self.register_buffer(_buffer_name(name), torch.zeros(shape), persistent=False)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        if self.source == UNTRAINED_FOR_CHECKS_ONLY:
            warnings.warn(
                "VGG-19 filters are RANDOM NUMBERS: this network only serves checks of shapes and files, "
                "its registrations are meaningless.",
                RegistrationWarning,
                stacklevel=2,
            )
            generator = torch.Generator().manual_seed(0)
            self._take({name: 0.1 * torch.randn(shape, generator=generator) for name, shape in _SHAPES.items()})
        elif self.source != IMAGENET:
            self._take(_read(Path(weights)))
        elif cached_weights_path().is_file():
            try:
                self._take(_read(cached_weights_path()))
            except RegistrationError as error:
                # ours to mend: the first use fetches them again and writes the file anew
                warnings.warn(f"the cached weights are damaged: {error}", RegistrationWarning, stacklevel=2)

    def forward(self, image: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self.load_weights()
        if not self.loaded:
            raise RuntimeError("this scripted network was exported without VGG-19 weights")
        # channels last: the convolutions on a CPU take two thirds of the time
        x = (image.repeat(1, 3, 1, 1) - self.mean) / self.std
        x = F.pad(x, [2, 2, 2, 2], mode="replicate").contiguous(memory_format=torch.channels_last)
        x = F.relu_(F.conv2d(x, self.weight_0, self.bias_0))
        inner = x[:, :, 1:-1, 1:-1]
        if not self.second:
            return inner
        y = F.relu_(F.conv2d(x, self.weight_2, self.bias_2))
        return torch.cat([inner, y], dim=1) if self.first else y

    @torch.jit.ignore
    def load_weights(self) -> None:
        """Fill in the weights unless they are there, by torchvision's download if need be.

        Raises:
            RegistrationError: no weights can be had; the message says what was tried and the ways to get them.
        """
        if not self.loaded:
            self._take(_download())

    @torch.jit.ignore
    def __prepare_scriptable__(self) -> "VGG19Features":
        # called by torch.jit.script: a scripted network cannot fetch its weights later
        self.load_weights()
        return self

    @torch.jit.ignore
    def _take(self, state: dict[str, Tensor]) -> None:
        for name in _SHAPES:
            buffer = getattr(self, _buffer_name(name))
            buffer.copy_(state[name].to(buffer.dtype))
        self.loaded = True


class VGG19Patches(nn.Module):
    """Dense descriptors from VGG-19's conv1_2, in place of `MINDSSC`.

    The responses to an image and to its negative are added, so that inverted contrast makes no difference, and every
    point's vector is centered and scaled to one length, so that brightness makes little. In 3D the filters run over
    the slices across each of the three axes, a third of the filters for each.

    Args:
        spatial_dims: 2 or 3.
        weights: see `VGG19Features`.
    """

    #: lattice steps that are lost on each side
    margin = 2
    #: mean squared difference between unrelated places
    worst = 0.15

    def __init__(self, spatial_dims: int, weights: str | os.PathLike = IMAGENET) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.features = VGG19Features(weights, layers=(2,))

    def forward(self, patches: Tensor) -> Tensor:
        """Describe the inner points of patches ``[Q, *n]`` in about [0, 1]: ``[Q, C, *(n - 2 margin)]``."""
        image = patches.clamp(0, 1)
        if self.spatial_dims == 2:
            maps = self._both(image)
        else:
            parts = []
            for axis in range(3):
                slices = image.movedim(axis + 1, 1)[:, self.margin : -self.margin]
                q, s = slices.shape[:2]
                found = self._both(slices.flatten(0, 1))[:, axis::3]
                parts.append(found.unflatten(0, (q, s)).movedim(1, axis + 2))
            maps = torch.cat(parts, dim=1)
        maps = maps - maps.mean(1, keepdim=True)
        # two random unit vectors are apart by the root of two
        length = maps.norm(dim=1, keepdim=True) + 0.1
        return maps * ((self.worst * maps.shape[1] / 2) ** 0.5 / length)

    def _both(self, image: Tensor) -> Tensor:
        both = self.features(image[:, None]) + self.features(1 - image[:, None])
        return both[:, :, self.margin : -self.margin, self.margin : -self.margin]


def _buffer_name(name: str) -> str:
    _, layer, kind = name.split(".")
    return f"{kind}_{layer}"


def _read(path: Path) -> dict[str, Tensor]:
    """The four tensors in use from a state dict file, whole or cut."""
    if not exists(path) or not path.is_file():
        raise RegistrationError("vgg19_weights", str(path), 'an existing file, or "imagenet"')
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        found = {name: state[name] for name in _SHAPES}
        complete = all(tuple(found[name].shape) == shape for name, shape in _SHAPES.items())
    except Exception as error:  # torch.load raises a dozen kinds; all mean that this file will not do
        raise RegistrationError(
            "vgg19_weights",
            str(path),
            f"a VGG-19 state dict with {', '.join(_SHAPES)} ({type(error).__name__}: {error})",
        ) from error
    if not complete:
        raise RegistrationError("vgg19_weights", str(path), f"tensors of the shapes {_SHAPES}")
    return found


def _download() -> dict[str, Tensor]:
    """Fetch torchvision's weights once, keep what is in use, drop the other 548 MB."""
    from torchvision.models import VGG19_Weights

    url = VGG19_Weights.IMAGENET1K_V1.url
    kept_by_torchvision = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(url)
    try:
        if kept_by_torchvision.is_file():
            state = _read(kept_by_torchvision)
        else:
            with tempfile.TemporaryDirectory() as folder:
                torch.hub.load_state_dict_from_url(url, model_dir=folder, check_hash=True, weights_only=True)
                state = _read(Path(folder) / os.path.basename(url))
    except Exception as error:
        raise RegistrationError(
            "vgg19_weights",
            IMAGENET,
            f"VGG-19 weights, but {kept_by_torchvision} does not hold them and the download of {url} failed "
            f"({type(error).__name__}: {error}). Either connect once, or fetch that file elsewhere and name it: "
            "vgg19_weights=FILE in Python, --vgg19_weights FILE with the bundle. A cut file with the first two "
            "convolution layers is enough",
        ) from error
    try:
        with atomic_path(cached_weights_path()) as partial:
            torch.save({name: tensor.clone() for name, tensor in state.items()}, partial)
    except (OSError, RegistrationError) as error:
        warnings.warn(f"VGG-19 weights could not be cached: {error}", RegistrationWarning, stacklevel=3)
    return state
