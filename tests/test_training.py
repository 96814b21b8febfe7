# SPDX-License-Identifier: Apache-2.0
"""Tests of the random points, the training's pieces and the evaluation."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from torch.utils.data import DataLoader

from monai_zsreg.errors import RegistrationError
from monai_zsreg.networks.coordinates import map_points
from monai_zsreg.networks.least_squares import LeastSquaresAffine
from monai_zsreg.networks.regressors import AffineRegressor
from monai_zsreg.training import (
    BestModelSaver,
    RandomPointPairs,
    evaluation_table,
    latest_checkpoint,
    main,
    perturbation_matrices,
    random_matrices,
    random_points,
)


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in ("image", "moving", "label"))


# ---- matrices and points -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_affine_matrices_fill_the_cube(dims):
    matrix = random_matrices(4000, dims)
    assert matrix.shape == (4000, dims, dims + 1)
    assert matrix.abs().max() <= 1
    torch.testing.assert_close(matrix.std(dim=0), torch.full((dims, dims + 1), 1 / math.sqrt(3)), atol=0.03, rtol=0)
    reflections = (torch.linalg.det(matrix[..., :dims]) < 0).float().mean()
    assert 0.45 < reflections < 0.55


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("transform", "low", "high"), [("rigid", 1, 1), ("similarity", 0.5, 2)])
def test_rotations_with_scale(dims, transform, low, high):
    matrix = random_matrices(4000, dims, transform)
    linear = matrix[..., :dims]
    determinant = torch.linalg.det(linear)
    assert (determinant > 0).all()
    scale = determinant ** (1 / dims)
    assert scale.min() > low - 1e-4 and scale.max() < high + 1e-4
    if transform == "similarity":
        assert scale.max() - scale.min() > 1.4
    rotation = linear / scale[:, None, None]
    torch.testing.assert_close(
        rotation @ rotation.transpose(1, 2), torch.eye(dims).expand(4000, -1, -1), atol=1e-4, rtol=0
    )
    # spread evenly over all rotations, the mean of every entry is 0 and that of its square 1 / D
    torch.testing.assert_close(rotation.mean(0), torch.zeros(dims, dims), atol=0.05, rtol=0)
    torch.testing.assert_close(rotation.square().mean(0), torch.full((dims, dims), 1 / dims), atol=0.03, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("transform", ["affine", "rigid"])
def test_perturbations_stay_in_bounds(dims, transform):
    matrix = perturbation_matrices(2000, dims, transform).double()
    linear = matrix[..., :dims]
    # the middle of the frame moves by the translation alone
    shift = (map_points(matrix, torch.full((2000, 1, dims), 0.5, dtype=torch.float64))[:, 0] - 0.5) * 340
    assert 45 < shift.abs().max() < 50.001
    orthogonal, upper = torch.linalg.qr(linear)
    upper = upper * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None]
    shear = (upper - torch.eye(dims, dtype=torch.float64)).abs().amax()
    assert shear < 1e-6 if transform == "rigid" else 0.025 < shear < 0.0301
    orthogonal = linear @ torch.linalg.inv(upper)
    trace = orthogonal.diagonal(dim1=-2, dim2=-1).sum(-1)
    angle = torch.acos(((trace / 2) if dims == 2 else (trace - 1) / 2).clamp(-1, 1))
    assert 0.28 < angle.max() < 0.3001


def test_unknown_kind():
    for draw in (random_matrices, perturbation_matrices):
        with pytest.raises(RegistrationError):
            draw(1, 2, "bspline")
        with pytest.raises(RegistrationError):
            draw(1, 4)


def test_points_cluster():
    wide = random_points(100)
    tight = random_points(100, spread=0.15)
    assert wide.shape == tight.shape == (100, 64, 2)
    assert 0 <= tight.min() and tight.max() <= 1
    assert tight.std() < 0.16 < 0.27 < wide.std() < 0.31


# ---- the stream ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["affine", "similarity", "rigid"])
@pytest.mark.parametrize("dims", [2, 3])
def test_pairs_obey_their_matrix(dims, transform):
    data = RandomPointPairs(dims, 10, transform, batch_size=6, num_batches=2)
    batches = list(DataLoader(data, batch_size=None))
    assert len(batches) == len(data) == 2
    for batch in batches:
        assert batch["image"].shape == batch["moving"].shape == (6, 10, dims)
        assert 0 <= batch["image"].min() and batch["image"].max() <= 1
        torch.testing.assert_close(map_points(batch["label"], batch["image"]), batch["moving"])


def test_stream_is_decided_by_the_seed():
    one, same, other = (RandomPointPairs(batch_size=4, num_batches=3, seed=seed) for seed in (5, 5, 6))
    first = list(one)
    assert all(equal(*pair) for pair in zip(first, same, strict=True))
    assert not any(equal(*pair) for pair in zip(first, other, strict=True))
    state = torch.random.get_rng_state()
    list(one)
    assert torch.equal(state, torch.random.get_rng_state())


def test_passes_are_fresh_unless_told_otherwise():
    data = RandomPointPairs(batch_size=4, num_batches=2)
    first, second = list(data), list(data)
    assert not equal(first[0], second[0]) and not equal(first[0], first[1])
    fixed = RandomPointPairs(batch_size=4, num_batches=2, fresh=False)
    assert all(equal(*pair) for pair in zip(list(fixed), list(fixed), strict=True))


def test_stream_goes_on_after_a_checkpoint():
    whole = RandomPointPairs(batch_size=4, num_batches=2)
    passes = [list(whole), list(whole)]
    begun = RandomPointPairs(batch_size=4, num_batches=2)
    list(begun)
    resumed = RandomPointPairs(batch_size=4, num_batches=2)
    resumed.load_state_dict(begun.state_dict())
    assert all(equal(*pair) for pair in zip(passes[1], resumed, strict=True))


def test_processes_get_different_points():
    streams = [list(RandomPointPairs(batch_size=4, num_batches=3, rank=rank, world_size=2)) for rank in (0, 1)]
    batches = streams[0] + streams[1]
    assert not any(equal(a, b) for i, a in enumerate(batches) for b in batches[:i])


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("spatial_dims", {"spatial_dims": 1}),
        ("transform", {"kind": "bspline"}),
        ("num_points", {"num_points": 0}),
        ("batch_size", {"batch_size": 0}),
        ("num_batches", {"num_batches": -1}),
        ("rank", {"rank": 2, "world_size": 2}),
    ],
)
def test_wrong_stream(argument, options):
    with pytest.raises(RegistrationError) as error:
        RandomPointPairs(**options)
    assert error.value.argument == argument


def test_worker_processes_are_refused():
    data = RandomPointPairs(batch_size=2, num_batches=1)
    with pytest.raises((RegistrationError, RuntimeError), match="num_workers"):  # torch wraps a worker's exception
        list(DataLoader(data, batch_size=None, num_workers=1))


# ---- saving --------------------------------------------------------------------------------------------------------


def test_best_model_is_kept_over_a_resume(tmp_path):
    network = AffineRegressor(num_points=4, hidden=(8,))
    evaluator = Engine(lambda engine, batch: None)

    def evaluate(saver, value):
        with torch.no_grad():
            network.layers[-1].bias.fill_(value)
        evaluator.state.metrics["val_mean_absolute_error"] = value
        saver(evaluator)
        return json.loads((tmp_path / "model.json").read_text())["mean_absolute_error"]

    saver = BestModelSaver(str(tmp_path / "model.pt"), network, details={"seed": 3})
    assert evaluate(saver, 0.5) == 0.5
    assert evaluate(saver, 0.2) == 0.2
    assert evaluate(saver, 0.3) == 0.2
    resumed = BestModelSaver(str(tmp_path / "model.pt"), network)
    resumed.load_state_dict(saver.state_dict())
    assert evaluate(resumed, 0.25) == 0.2
    assert evaluate(resumed, float("nan")) == 0.2
    assert resumed.seconds >= saver.state_dict()["seconds"] - 1
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(state) == set(network.state_dict())
    torch.testing.assert_close(state["layers.2.bias"], torch.full((6,), 0.2, dtype=torch.float16))
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "model.json"}


def test_latest_checkpoint(tmp_path):
    with pytest.raises(RegistrationError, match="output_dir"):
        latest_checkpoint(tmp_path)
    for epoch in (5, 9, 10):
        torch.save({}, tmp_path / f"checkpoint_epoch={epoch}.pt")
    torch.save({}, tmp_path / "model.pt")
    assert latest_checkpoint(tmp_path).endswith("epoch=10.pt")
    whole = (tmp_path / "checkpoint_epoch=10.pt").read_bytes()
    (tmp_path / "checkpoint_epoch=10.pt").write_bytes(whole[: len(whole) // 2])
    assert latest_checkpoint(tmp_path).endswith("epoch=9.pt")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list a process's threads")
def test_no_thread_of_the_process_group_is_left(tmp_path):
    """One that is still at work when the interpreter ends takes the process down with SIGABRT now and then."""
    script = """
import sys, torch
from pathlib import Path
from monai_zsreg.training import begin_distributed, end_distributed

def threads():
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]

begin_distributed()
network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
network(torch.rand(2, 3)).sum().backward()
if not any("gloo" in name for name in threads()):
    sys.exit(77)
end_distributed(network)
assert not any("gloo" in name for name in threads()), threads()
"""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    (tmp_path / "script.py").write_text(script)
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        [sys.executable, *launcher, tmp_path / "script.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "exitcode  : 77 " in done.stderr:
        pytest.skip("this torch does not name its threads")
    assert done.returncode == 0, done.stderr[-3000:]


# ---- evaluation ----------------------------------------------------------------------------------------------------


class Shifted(AffineRegressor):
    """Knows the answer but for 3.4 pixels along the first axis."""

    def forward(self, fixed_points, moving_points):
        matrix = LeastSquaresAffine(self.spatial_dims)(fixed_points, moving_points)
        matrix[:, 0, -1] += 0.01
        return matrix


@pytest.mark.parametrize("dims", [2, 3])
def test_evaluation_measures_a_known_error(dims):
    rows = evaluation_table(Shifted(dims, hidden=(8,)), num_sets=50)
    assert len(rows) == 12
    for row in rows:
        if row["noise"] == 0:
            assert row["mlp_pixels"] == pytest.approx(3.4, abs=0.01)
            assert row["mlp_error"] == pytest.approx(0.01 / (dims * (dims + 1)), abs=1e-4)
            assert row["closed_form_pixels"] < 0.01
    clean, little, much = (row["closed_form_pixels"] for row in rows[:3])
    assert clean < little < much


def test_command_prints_a_table(tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(AffineRegressor(3, 8, "rigid", (16,)).state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps({"training_seconds": 90.0}))
    assert main(["--weights", str(path), "--num_sets", "20"]) == 0
    out = capsys.readouterr().out
    assert "3D rigid, 8 pairs" in out and "1.5 minutes" in out
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 14 and len({line.count("|") for line in table}) == 1
    assert main(["--weights", str(tmp_path / "none.pt")]) == 2
    assert "weights" in capsys.readouterr().err
