# SPDX-License-Identifier: Apache-2.0
"""Tests of the coarse stage."""

from __future__ import annotations

import math

import pytest
import torch

from monai_zsreg.registration.search import _apart, even_rotations, rotation_matrices


@pytest.mark.parametrize("dims", [2, 3])
def test_rotations_are_rotations(dims: int) -> None:
    turns = even_rotations(500, dims)
    torch.testing.assert_close(turns @ turns.mT, torch.eye(dims, dtype=torch.float64).expand(500, -1, -1))
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(500, dtype=torch.float64))


def test_no_rotation_is_far_from_the_spiral() -> None:
    turns = even_rotations(4000, 3).flatten(1)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    anywhere = rotation_matrices(vectors * math.pi / vectors.norm(dim=1, keepdim=True) * torch.rand(400, 1))
    nearest = ((anywhere.flatten(1) @ turns.T).amax(1) - 1) / 2
    assert math.degrees(math.acos(float(nearest.min()))) < 18


@pytest.mark.parametrize("angle", [0.1, 1.0, 3.0])
def test_rotation_vectors(angle: float) -> None:
    flat = rotation_matrices(torch.tensor([[angle]], dtype=torch.float64))[0]
    solid = rotation_matrices(torch.tensor([[0.0, 0.0, angle]], dtype=torch.float64))[0]
    torch.testing.assert_close(solid[:2, :2], flat)
    assert float(flat[0, 0]) == pytest.approx(math.cos(angle)) and float(flat[1, 0]) == pytest.approx(math.sin(angle))


def test_candidates_are_apart_and_best_first() -> None:
    angles = torch.tensor([[0.0], [3.0], [30.0], [33.0], [90.0]], dtype=torch.float64) / 180 * math.pi
    transforms = torch.eye(3, dtype=torch.float64).repeat(1, 5, 1, 1)
    transforms[0, :, :2, :2] = 1.3 * rotation_matrices(angles)  # scale does not count
    values = torch.tensor([[1.0, 5.0, 3.0, 2.0, 4.0]], dtype=torch.float64)
    kept, scores = _apart(transforms, values, 3)
    assert scores[0].tolist() == [5.0, 4.0, 3.0]
    torch.testing.assert_close(kept[0], transforms[0, [1, 4, 2]])
    assert _apart(transforms, values, 4)[1][0].tolist() == [5.0, 4.0, 3.0, 5.0]  # no fourth: the best once more
