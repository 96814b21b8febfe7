# SPDX-License-Identifier: Apache-2.0
"""Fixtures that the tests share: real images, the VGG-19 weights, devices."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage

_ROOT = Path(__file__).resolve().parents[1]

# the suite is many small problems; more threads than this cost more than they save
torch.set_num_threads(min(2, torch.get_num_threads()))


def _from_environment(variable: str, fallback: Path) -> Path:
    """The path that ``variable`` names or ``fallback``; skips the test where there is nothing at it."""
    named = os.environ.get(variable)
    path = Path(named) if named else fallback
    if not path.exists():
        pytest.skip(f"{variable} names no real data" if not named else f"{variable}={named} does not exist")
    return path


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Folder of real images."""
    return _from_environment("ZSREG_TEST_DATA", _ROOT.parent / "shared" / "realdata")


@pytest.fixture(scope="session")
def vgg19_weights() -> Path:
    """File with the weights of at least the first two convolution layers of torchvision's VGG-19."""
    return _from_environment("ZSREG_TEST_VGG19", _ROOT.parent / "shared" / "weights" / "vgg19_first_two_conv.pt")


@pytest.fixture(scope="session")
def load_volume(realdata: Path) -> Callable[..., MetaTensor]:
    """``load_volume(subject, modality) -> MetaTensor [1, I, J, K]`` with the file's affine."""

    def load(subject: str = "open_ms_mni/patient07", modality: str = "t1") -> MetaTensor:
        path = realdata / subject / f"{modality}.nii.gz"
        if not path.exists():
            pytest.skip(f"the real images hold no {subject}/{modality}.nii.gz")
        return LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True, dtype=np.float32)(path)

    return load


@pytest.fixture(scope="session")
def load_slice(load_volume: Callable[..., MetaTensor]) -> Callable[..., MetaTensor]:
    """``load_slice(subject, modality, axis, index) -> MetaTensor [1, H, W]``.

    Spatial axes are the volume's two other array axes, in order. The affine is 3x3: their spacing, and an origin of
    zero, so that slices of two modalities of one subject lie in one frame. ``index`` is the middle unless given.
    """

    def load(
        subject: str = "open_ms_mni/patient07", modality: str = "t1", axis: int = 2, index: int | None = None
    ) -> MetaTensor:
        volume = load_volume(subject, modality)
        position = volume.shape[1 + axis] // 2 if index is None else index
        spacing = [float(s) for s in volume.pixdim]
        del spacing[axis]
        affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
        return MetaTensor(volume.as_tensor().select(1 + axis, position).clone(), affine=affine)

    return load


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; skips CUDA where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
