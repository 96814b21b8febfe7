# SPDX-License-Identifier: Apache-2.0
"""Tests of the coarse stage."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from phantoms import error, moved_by, turn

from monai_zsreg.geometry import Grid
from monai_zsreg.registration.search import PoseSearch, apart, even_rotations, rotation_matrices
from monai_zsreg.registration.side import Pair, Side, finest_step


def pair_of(fixed: MetaTensor, moving: MetaTensor, initial: np.ndarray | None = None) -> Pair:
    grids = Grid.of(fixed), Grid.of(moving)
    steps = finest_step(*grids)
    sides = [Side(image.as_tensor()[0], grid, *steps) for image, grid in zip((fixed, moving), grids, strict=True)]
    return Pair(*sides, None if initial is None else torch.from_numpy(initial))


@pytest.mark.parametrize("dims", [2, 3])
def test_rotations_are_rotations(dims: int) -> None:
    turns = even_rotations(500, dims)
    torch.testing.assert_close(turns @ turns.mT, torch.eye(dims, dtype=torch.float64).expand(500, -1, -1))
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(500, dtype=torch.float64))


def test_no_rotation_is_far_from_the_spiral() -> None:
    turns = even_rotations(4000, 3).flatten(1)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    angles = math.pi * torch.rand(400, 1, generator=generator, dtype=torch.float64)
    anywhere = rotation_matrices(vectors / vectors.norm(dim=1, keepdim=True) * angles)
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
    transforms = torch.eye(3, dtype=torch.float64).repeat(5, 1, 1)
    transforms[:, :2, :2] = 1.3 * rotation_matrices(angles)  # scale does not count
    values = torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0], dtype=torch.float64)
    kept, scores = apart(transforms, values, 3)
    assert scores.tolist() == [5.0, 4.0, 3.0]
    torch.testing.assert_close(kept, transforms[[1, 4, 2]])
    assert apart(transforms, values, 4)[1].tolist() == [5.0, 4.0, 3.0, 5.0]  # no fourth: the best once more


@pytest.fixture(scope="module", params=[2, 3])
def case(request: pytest.FixtureRequest, slices: SimpleNamespace, volumes: SimpleNamespace) -> SimpleNamespace:
    """Two contrasts, the one turned by 140 degrees."""
    images = slices if request.param == 2 else volumes
    truth = turn(images.t1, 140.0, (14.0, -9.0, 6.0)[: request.param], 1.0, 0.0)
    pair = pair_of(images.t1, moved_by(images.t2, truth))
    return SimpleNamespace(truth=truth, pair=pair, t1=images.t1, dims=request.param)


def test_the_true_pose_scores_best(case: SimpleNamespace) -> None:
    search = PoseSearch(case.pair)
    true = case.pair.to_frames(torch.from_numpy(case.truth))
    near = torch.eye(case.dims + 1, dtype=torch.float64).repeat(3, 1, 1)
    near[0, : case.dims, : case.dims] = rotation_matrices(torch.full((1 if case.dims == 2 else 3,), 0.3).double())
    near[1, 0, case.dims] = 0.3
    near[2, : case.dims, : case.dims] *= 1.2
    # so far away that nothing is seen
    far = true.clone()
    far[0, case.dims] += 100.0
    scores = search.score(torch.cat([true[None], true @ near, far[None]]))
    assert scores.dtype == torch.float64 and bool((scores >= 1).all()) and bool((scores <= 2).all())
    assert bool((scores[0] > scores[1:]).all()) and float(scores[-1]) == 1.0
    # for each alone as for all
    torch.testing.assert_close(search.score(true[None])[0], scores[0])


def test_every_rotation_is_tried(case: SimpleNamespace) -> None:
    rotations = 60 if case.dims == 2 else 2000
    found = PoseSearch(case.pair, scaled=False, seed=3).everywhere(rotations, 4)
    assert found.shape == (4, case.dims + 1, case.dims + 1)
    # within a few voxels of the coarse level
    assert error(case.pair.to_world(found[0]).numpy(), case.truth, case.t1) < 3 * case.pair.fixed.step
    linear = found[:, : case.dims, : case.dims]
    torch.testing.assert_close(linear @ linear.mT, torch.eye(case.dims).double().expand_as(linear))
    again = PoseSearch(case.pair, scaled=False, seed=3).everywhere(rotations, 4)
    assert torch.equal(found, again)


def test_around_a_start_stays_there(case: SimpleNamespace) -> None:
    near = turn(case.t1, 133.0, (12.0, -5.0, 3.0)[: case.dims], 1.0, 0.0)
    start = case.pair.to_frames(torch.from_numpy(near))
    found = case.pair.to_world(PoseSearch(case.pair, scaled=False).around(start, 2)[0]).numpy()
    assert error(found, case.truth, case.t1) < min(error(near, case.truth, case.t1), 3 * case.pair.fixed.step)
    elsewhere = case.pair.to_frames(torch.eye(case.dims + 1, dtype=torch.float64))
    lost = case.pair.to_world(PoseSearch(case.pair, scaled=False).around(elsewhere, 2)[0]).numpy()
    assert error(lost, case.truth, case.t1) > 10 * case.pair.fixed.step
