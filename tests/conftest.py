# SPDX-License-Identifier: Apache-2.0
"""Fixtures that the tests share: images, the VGG-19 weights, devices.

Images are nilearn's template (see `phantoms`), so that whoever installs the extra ``test`` can run the tests. Real
images, where there are any, add to it: tests with the fixture ``subject`` run once more for each. A variable that
names data which are not there is an error, so that nothing is skipped unnoticed.
"""

from __future__ import annotations

import os

# one thread a process, and as many processes as there are cores: the suite is many small problems, and waiting threads
# cost more than they save. Before the libraries that read it, and for the commands that tests start
for _library in ("OMP", "MKL", "OPENBLAS"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"
os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from monai.data import MetaTensor
from monai.transforms import LoadImage
from phantoms import diagonal, template

_ROOT = Path(__file__).resolve().parents[1]
_DATA = ("ZSREG_TEST_DATA", _ROOT.parent / "shared" / "realdata")
_VGG19 = ("ZSREG_TEST_VGG19", _ROOT.parent / "shared" / "weights" / "vgg19_first_two_conv.pt")
_REAL_SUBJECT = "open_ms_mni/patient07"

torch.set_num_threads(1)

# the same examples in every run, so that a failure belongs to a change; --hypothesis-profile=default draws new ones
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


def named_path(variable: str, fallback: Path) -> Path | None:
    """What an environment variable names, or ``fallback``; None where there is neither.

    Raises:
        pytest.UsageError: the variable names something that is not there.
    """
    named = os.environ.get(variable)
    if named and not Path(named).exists():
        raise pytest.UsageError(f"{variable}={named} does not exist")
    path = Path(named) if named else fallback
    return path if path.exists() else None


def pytest_configure() -> None:
    for variable, fallback in (_DATA, _VGG19):
        named_path(variable, fallback)


def _found(variable: str, fallback: Path) -> Path:
    path = named_path(variable, fallback)
    if path is None:
        pytest.skip(f"{variable} names nothing")
    return path


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Folder of real images."""
    return _found(*_DATA)


@pytest.fixture(scope="session")
def vgg19_weights() -> Path:
    """File with the weights of at least the first two convolution layers of torchvision's VGG-19."""
    return _found(*_VGG19)


def _subjects() -> list[str]:
    variable, fallback = _DATA
    folder = Path(os.environ.get(variable) or fallback)
    return ["template", *([_REAL_SUBJECT] if (folder / _REAL_SUBJECT).is_dir() else [])]


@pytest.fixture(scope="session", params=_subjects())
def subject(request: pytest.FixtureRequest) -> str:
    """For `load_volume` and `load_slice`: the template, then the real head where there is one."""
    return request.param


@pytest.fixture(scope="session")
def load_volume() -> Callable[..., MetaTensor]:
    """``load_volume(subject, modality) -> MetaTensor [1, I, J, K]`` at 1 mm; ``"t1"``, ``"t2"`` or ``"flair"``."""

    @lru_cache(maxsize=3)
    def real(path: Path) -> MetaTensor:
        return LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True, dtype=np.float32)(path)

    def load(subject: str = "template", modality: str = "t1") -> MetaTensor:
        if subject == "template":
            return template(modality).clone()
        path = _found(*_DATA) / subject / f"{modality}.nii.gz"
        if not path.exists():
            pytest.fail(f"the real images hold no {subject}/{modality}.nii.gz")
        return real(path).clone()

    return load


@pytest.fixture(scope="session")
def load_slice(load_volume: Callable[..., MetaTensor]) -> Callable[..., MetaTensor]:
    """``load_slice(subject, modality, axis, index) -> MetaTensor [1, H, W]``.

    Spatial axes are the volume's two other array axes, in order. The affine is 3x3: their spacing, and an origin of
    zero, so that slices of two modalities of one subject lie in one frame. ``index`` is the middle unless given.
    """

    def load(subject: str = "template", modality: str = "t1", axis: int = 2, index: int | None = None) -> MetaTensor:
        volume = load_volume(subject, modality)
        position = volume.shape[1 + axis] // 2 if index is None else index
        spacing = [float(s) for s in volume.pixdim]
        del spacing[axis]
        return MetaTensor(volume.as_tensor().select(1 + axis, position).clone(), affine=diagonal(*spacing))

    return load


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; skips CUDA where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
