# SPDX-License-Identifier: Apache-2.0
"""Heads of three contrasts, small enough for many registrations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from phantoms import padded, pooled


@pytest.fixture(scope="session")
def slices(load_slice) -> SimpleNamespace:
    """Slices of the template's three contrasts at 1 mm, padded so that nothing leaves the frame."""
    return SimpleNamespace(**{name: padded(load_slice(modality=name), 30) for name in ("t1", "t2", "flair")})


@pytest.fixture(scope="session")
def volumes(load_volume) -> SimpleNamespace:
    """The same in 3D at 4 mm."""
    return SimpleNamespace(**{name: padded(pooled(load_volume(modality=name), 4), 6) for name in ("t1", "t2", "flair")})
