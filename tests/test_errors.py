# SPDX-License-Identifier: Apache-2.0
"""Tests of the error classes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import monai_zsreg
from monai_zsreg.errors import RegistrationError, RegistrationFailure, RegistrationWarning


class Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        raise RegistrationError("fixed", index, "something else")


def test_message_names_argument_value_and_what_is_allowed():
    error = RegistrationError("spacing", -1.5, "a positive number")
    assert str(error) == "spacing: got -1.5, expected a positive number"
    assert (error.argument, error.value, error.allowed) == ("spacing", -1.5, "a positive number")


def test_long_values_are_shortened():
    text = str(RegistrationError("points", list(range(10000)), "three of them"))
    assert len(text) < 300
    assert "..." in text and text.endswith("expected three of them")
    exact = "x" * 198  # with its quotes as long as is shown
    assert exact in str(RegistrationError("name", exact, "y"))
    assert "x" * 199 not in str(RegistrationError("name", exact + "x", "y"))


@pytest.mark.parametrize("value", [None, "text", (1, 2), np.float64(2.0), float("nan")])
def test_pickle_and_copy_keep_everything(value):
    error = RegistrationError("argument", value, "anything else")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is RegistrationError
        assert str(other) == str(error)
        assert other.argument == "argument" and other.allowed == "anything else"


def test_crosses_a_data_loaders_process_border():
    with pytest.raises(RegistrationError, match="fixed: got 0, expected something else"):
        next(iter(DataLoader(Broken(), num_workers=1)))


def test_kinds():
    assert issubclass(RegistrationError, ValueError)
    assert issubclass(RegistrationFailure, RuntimeError) and not issubclass(RegistrationFailure, RegistrationError)
    assert issubclass(RegistrationWarning, UserWarning)
    for name in ("RegistrationError", "RegistrationFailure", "RegistrationWarning"):
        assert name in monai_zsreg.__all__
