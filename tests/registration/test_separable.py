# SPDX-License-Identifier: Apache-2.0
"""Smoothing and resizing along each axis, held against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_zsreg.registration.separable import blurred, flattened, kernel, resized

SHAPES = {2: (23, 1), 3: (9, 14, 2)}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("widths", [(0.5, 1.2, 3.0), (0.1, 40.0, 0.8)])
def test_with_zeros_outside_it_smooths_as_scipy_does(dims: int, widths: tuple[float, ...]) -> None:
    values = np.random.default_rng(dims).standard_normal((2, *SHAPES[dims]))
    # a width below 0.3 is none
    used = [0.0, *[width if width >= 0.3 else 0.0 for width in widths[:dims]]]
    expected = ndimage.gaussian_filter(values, used, mode="constant", truncate=7.0)
    found = blurred(torch.from_numpy(values), widths[:dims], zeros=True)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_the_same_everywhere_stays(dims: int) -> None:
    values = torch.ones(1, *SHAPES[dims])
    torch.testing.assert_close(blurred(values, [2.5] * dims), values)
    for shape in ([5] * dims, [31] * dims):
        torch.testing.assert_close(resized(values, shape), torch.ones(1, *shape))


def test_a_ramp_is_interpolated() -> None:
    ramp = torch.arange(8, dtype=torch.float64)[None, :, None].repeat(1, 1, 3)
    fine = resized(ramp, (16, 3))[0, 1:-1, 0]
    torch.testing.assert_close(fine, torch.arange(0.25, 7.0, 0.5, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("zeros", [False, True])
def test_no_subnormal_numbers(zeros: bool) -> None:
    rows = kernel(200, 200, 1.3, zeros)
    assert rows is not None
    assert not ((rows > 0) & (rows < torch.finfo(torch.float32).tiny)).any()


def test_flattened_is_a_gaussian_and_what_it_takes_away_smoothed_again() -> None:
    values = np.random.default_rng(0).random((2, 40, 30))
    for axis, width in ((1, 2.0), (2, 3.0)):
        once = ndimage.gaussian_filter1d(values, width, axis, truncate=8)
        values = once + ndimage.gaussian_filter1d(values - once, width, axis, truncate=8)
    given = torch.from_numpy(np.random.default_rng(0).random((2, 40, 30)))
    inside = (slice(None), slice(12, -12), slice(14, -14))
    found = flattened(given, [2.0, 3.0]).numpy()
    np.testing.assert_allclose(found[inside], values[inside], atol=1e-3)
    # long waves pass
    wave = torch.cos(torch.arange(200.0) * 2 * torch.pi / 40)[None, :, None].expand(1, 200, 8)
    assert (
        float(flattened(wave, [2.0, 0.0])[0, 80:121].max())
        > 0.99
        > 0.96
        > float(blurred(wave, [2.0, 0.0])[0, 80:121].max())
    )
