# SPDX-License-Identifier: Apache-2.0
"""Full single precision for coordinates, whatever the caller lets networks compute in."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_before: list[str] = []


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No half precision and no TF32 while the block runs: both are too coarse for coordinates.

    torch keeps these settings for the whole process. They are put back when the last of all blocks that run at the
    same time ends, so that threads do not take each other's settings for the caller's.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _before[:] = _get()
            _set(["ieee"] * len(_before) if _backends() else ["highest"])
        _inside += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _set(_before)


def _backends() -> list[Any]:
    """What has the interface that came with torch 2.9; the two must not be mixed."""
    found = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


def _get() -> list[str]:
    return [backend.fp32_precision for backend in _backends()] or [torch.get_float32_matmul_precision()]


def _set(precisions: Sequence[str]) -> None:
    backends = _backends()
    if not backends:
        torch.set_float32_matmul_precision(precisions[0])
    for backend, precision in zip(backends, precisions, strict=False):
        backend.fp32_precision = precision
