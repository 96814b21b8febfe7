# SPDX-License-Identifier: Apache-2.0
"""Where the shipped weights of the regressor are."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from monai_zsreg.errors import RegistrationError

__all__ = ["load_state_dict", "regressor_weights_path"]

_FILES = {2: "model.pt", 3: "model_3d.pt"}


def regressor_weights_path(spatial_dims: int) -> Path:
    """The shipped state dict of the paper's affine regressor for 2 or 3 spatial dimensions.

    An installed package holds the bundle's ``models`` folder as ``monai_zsreg/pretrained_models``; a checkout has it
    in the bundle.

    Raises:
        RegistrationError: it is in neither place.
    """
    package = Path(__file__).parent
    bundle = package.parent / "bundles" / "zero_shot_affine_registration"
    for folder in (package / "pretrained_models", bundle / "models"):
        path = folder / _FILES[spatial_dims]
        if path.is_file():
            return path
    raise RegistrationError(
        "regressor_weights", None, f"a state dict file: this installation lacks the shipped {_FILES[spatial_dims]}"
    )


def load_state_dict(path: str | os.PathLike, argument: str = "regressor_weights") -> dict[str, Tensor]:
    """Read a plain state dict with ``weights_only=True``.

    Args:
        path: the file.
        argument: what to call it in an error.

    Raises:
        RegistrationError: the file is missing or is not a state dict of tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds; all mean that this file will not do
        raise RegistrationError(argument, str(path), f"a state dict file ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RegistrationError(argument, str(path), "a plain state dict, names to tensors")
    return state
