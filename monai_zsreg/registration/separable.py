# SPDX-License-Identifier: Apache-2.0
"""What is done along one axis after another: smoothing and changing the size, as products with matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def along(values: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Multiply ``[C, *n]`` with a matrix ``[m, n]`` along each axis; None leaves it."""
    for axis, matrix in enumerate(matrices, start=1):
        if matrix is None:
            continue
        matrix = matrix.to(values)
        if axis == values.ndim - 1:
            values = values @ matrix.mT
        else:
            shape = values.shape
            flat = torch.matmul(matrix, values.reshape(*shape[: axis + 1], -1))
            values = flat.view(*shape[:axis], len(matrix), *shape[axis + 1 :])
    return values


def blurred(values: Tensor, widths: Sequence[float], zeros: bool = False) -> Tensor:
    """``[C, *n]`` smoothed by a Gaussian of so many points along each axis; with zeros outside, or by itself alone."""
    return along(values, [kernel(n, n, round(w, 4), zeros) for n, w in zip(values.shape[1:], widths, strict=True)])


def flattened(values: Tensor, widths: Sequence[float]) -> Tensor:
    """As `blurred`, but long waves pass: what a Gaussian takes away is smoothed once more and given back."""
    return along(values, [_flat(n, round(w, 4)) for n, w in zip(values.shape[1:], widths, strict=True)])


def resized(values: Tensor, shape: Sequence[int]) -> Tensor:
    """``[C, *n]`` on as many points over the same extent: averaged where there are fewer, interpolated where more."""
    return along(values, [kernel(n, m, 0.0) for n, m in zip(values.shape[1:], shape, strict=True)])


@lru_cache(maxsize=256)
def kernel(n: int, m: int, width: float, zeros: bool = False) -> Tensor | None:
    """From ``n`` to ``m`` points, ``[m, n]``; None where nothing changes.

    Args:
        n: points before.
        m: points after, over the same extent.
        width: standard deviation of a Gaussian that smooths, points before.
        zeros: whether the Gaussian meets zeros outside, so that rows near the ends sum to less than 1.
    """
    factor = n / m
    at = (torch.arange(m, dtype=torch.float64) + 0.5) * factor - 0.5
    distance = at[:, None].clamp(0, n - 1) - torch.arange(n, dtype=torch.float64)
    if m > n and width == 0.0:
        rows = (1 - distance.abs()).clamp(min=0)
        total = rows.sum(1, keepdim=True)
    else:
        # as wide as the average over a point of the result
        variance = width**2 + max(0.0, factor**2 - 1) / 12
        if variance < 0.09:
            if m == n:
                return None
            variance = 0.09
        reach = math.ceil(6 * variance**0.5)
        rows = torch.exp(-0.5 * distance.square() / variance)
        whole = torch.exp(-0.5 * torch.arange(-reach, reach + 1, dtype=torch.float64).square() / variance)
        total = whole.sum() if zeros else rows.sum(1, keepdim=True)
    rows = rows / total
    # far tails would be subnormal numbers, which products take fifteen times as long for
    return torch.where(rows < 1e-9, 0.0, rows).float()


@lru_cache(maxsize=64)
def _flat(n: int, width: float) -> Tensor | None:
    once = kernel(n, n, width)
    if once is None:
        return None
    rows = 2 * once.double() - once.double() @ once.double()
    return torch.where(rows.abs() < 1e-9, 0.0, rows).float()
