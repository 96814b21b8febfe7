# SPDX-License-Identifier: Apache-2.0
"""Tests of the precision that a registration computes in, and of what the caller finds afterwards."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from monai_zsreg import register
from monai_zsreg.registration.precision import full_precision

CPU = torch.device("cpu")


def precision() -> list[str]:
    """What torch computes matrix products in: "ieee" or "highest" is full."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    # before torch 2.9 one setting for all
    new = [backend.fp32_precision for backend in backends if hasattr(backend, "fp32_precision")]
    return new or [torch.get_float32_matmul_precision()]


@pytest.fixture(params=["highest", "high", "medium"])
def callers(request: pytest.FixtureRequest):
    """A precision that the caller has chosen for matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_inside_it_is_full_and_afterwards_as_before(callers: str) -> None:
    before = precision()
    with full_precision(CPU), torch.autocast("cpu", dtype=torch.bfloat16), full_precision(CPU):
        assert set(precision()) <= {"ieee", "highest"}
        assert not torch.is_autocast_enabled("cpu")
    assert precision() == before
    with pytest.raises(ZeroDivisionError), full_precision(CPU):
        raise ZeroDivisionError
    assert precision() == before and torch.get_float32_matmul_precision() == callers


def test_blocks_that_overlap_in_time_do_not_take_each_others_setting_for_the_callers(callers: str) -> None:
    before, entered, leave, seen = precision(), threading.Event(), threading.Event(), []

    def first() -> None:
        with full_precision(CPU):
            entered.set()
            leave.wait(10)

    def second() -> None:
        entered.wait(10)
        with full_precision(CPU):
            leave.set()
            one.join(10)  # the first ends while this one still computes
            seen.extend(precision())

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    for thread in (one, two):
        thread.start()
    for thread in (one, two):
        thread.join(20)
    assert seen and set(seen) <= {"ieee", "highest"}
    assert precision() == before and torch.get_float32_matmul_precision() == callers


def test_registrations_in_threads(callers: str) -> None:
    rng = np.random.default_rng(0)
    ramp = np.hypot(*np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1.4, 40)))
    images = [np.where(ramp < 0.8, ramp + 0.1 * rng.random(ramp.shape), 0).astype(np.float32) for _ in range(4)]
    before = precision()
    alone = [register(images[0], image).affine for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: register(images[0], image).affine, images))
    assert precision() == before and torch.get_float32_matmul_precision() == callers
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
