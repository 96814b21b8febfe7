# SPDX-License-Identifier: Apache-2.0
"""Tests of the networks' coordinates: against the definitions, and compiled."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_zsreg.networks import coordinates
from monai_zsreg.networks.coordinates import compose, index_to_unit, map_points, shrunk_to_index, theta_from_unit

SIZES = [[4, 9], [5, 7, 6]]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dims", [2, 3])
def test_points_and_composition_against_numpy(dims):
    outer, inner, points = random(3, dims, dims + 1), random(3, dims, dims + 1, seed=1), random(3, 5, dims, seed=2)
    expected = np.einsum("bij,bnj->bni", inner[..., :dims], points) + inner[:, None, :, dims].numpy()
    np.testing.assert_allclose(map_points(inner, points), expected)
    torch.testing.assert_close(map_points(compose(outer, inner), points), map_points(outer, map_points(inner, points)))


def test_unit_coordinates_begin_at_the_corner():
    assert index_to_unit(torch.tensor([-0.5, 9.5]), 10.0).tolist() == [0.0, 1.0]


def test_centers_of_blocks():
    positions = torch.arange(12.0)
    blocks = positions.view(4, 3).mean(dim=1)
    torch.testing.assert_close(shrunk_to_index(torch.arange(4.0), 3.0), blocks)


@pytest.mark.parametrize("dims", [2, 3])
def test_padding_is_taken_back(dims):
    margin, longest = 3.0, 10.0
    matrix, index = random(dims, dims + 1), 10 * random(6, dims, seed=1)
    padded = index_to_unit(index + margin, longest + 2 * margin)
    points, without = coordinates.without_padding(padded, matrix, margin, longest)
    torch.testing.assert_close(points, index_to_unit(index, longest))
    mapped = map_points(matrix, padded) * (longest + 2 * margin) - 0.5 - margin
    torch.testing.assert_close(map_points(without, points), index_to_unit(mapped, longest))


@pytest.mark.parametrize("size", SIZES)
def test_theta_makes_grid_sample_look_where_the_matrix_says(size):
    dims = len(size)
    matrix = torch.eye(dims, dims + 1, dtype=torch.float64) + 0.2 * (random(dims, dims + 1) - 0.5)
    theta = theta_from_unit(matrix[None], size)
    grid = F.affine_grid(theta, [1, 1, *size], align_corners=False)[0].flip(-1)  # (x, y) to array order
    sides = torch.tensor(size, dtype=torch.float64)
    looked_at = ((grid + 1) * sides - 1) / 2
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij"), dim=-1).double()
    longest = float(max(size))
    expected = map_points(matrix, index_to_unit(index.reshape(-1, dims), longest)) * longest - 0.5
    torch.testing.assert_close(looked_at.reshape(-1, dims), expected)


@pytest.mark.parametrize("name", [name for name, _ in inspect.getmembers(coordinates, inspect.isfunction)])
def test_scripts(name):
    matrix, points = random(2, 2, 3), random(2, 4, 2, seed=1)
    arguments = {
        "compose": (matrix, matrix),
        "index_to_unit": (points, 7.0),
        "map_points": (matrix, points),
        "shrunk_to_index": (points, 3.0),
        "theta_from_unit": (matrix, [4, 9]),
        "without_padding": (points, matrix, 3.0, 10.0),
    }[name]
    function = getattr(coordinates, name)
    torch.testing.assert_close(torch.jit.script(function)(*arguments), function(*arguments))
