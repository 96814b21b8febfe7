# SPDX-License-Identifier: Apache-2.0
"""The bundle's training configurations, run as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import monai.bundle
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

from monai_zsreg.errors import RegistrationError
from monai_zsreg.networks import AffineRegressor, ZeroShotAffineNet
from monai_zsreg.networks.coordinates import map_points

CONFIGS = Path(__file__).parents[2] / "bundles" / "zero_shot_affine_registration" / "configs"
SMALL = {
    "epoch_length": 20,
    "batch_size": 64,
    "val_batches": 2,
    "num_points": 16,
    "hidden": [256, 64],
    "checkpoint_interval": 1,
    "learning_rate": 0.003,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _global_state_stays():
    """Training seeds the global generators and asks for deterministic algorithms; other tests should not notice."""
    state = torch.random.get_rng_state()
    yield
    set_determinism(seed=None)
    torch.random.set_rng_state(state)


def train(folder: Path, **options) -> None:
    """Train in this process, as the command does."""
    options = SMALL | {"output_dir": str(folder), "logging_file": False} | options
    monai.bundle.run(config_file=str(CONFIGS / "train.json"), **options)


def command(launcher: list[str], files: str, options: dict, cwd: Path) -> str:
    """Train with the command that the README names, and give what it printed."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    # so that the package is found from another folder also where it is not installed
    root = str(CONFIGS.parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "monai.bundle", "run", "--config_file", files, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def facts(folder: Path) -> dict:
    return json.loads((folder / "model.json").read_text())


@pytest.mark.parametrize("files", [["train.json"], ["train.json", "multi_gpu_train.json"]])
def test_properties(files, tmp_path, monkeypatch):
    if len(files) == 2:  # a group of one process, so that the configuration can be resolved
        monkeypatch.setenv("LOCAL_RANK", "0")
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        workflow = ConfigWorkflow(
            [str(CONFIGS / name) for name in files],
            workflow_type="train",
            logging_file=False,
            output_dir=str(tmp_path / "out"),
            device="$torch.device('cpu')",
        )
        workflow.initialize()
        assert workflow.check_properties() == []
        assert workflow.max_epochs > 0
    finally:
        if len(files) == 2:
            torch.distributed.destroy_process_group()


def test_command_learns_and_resumes(tmp_path):
    printed = command([], str(CONFIGS / "train.json"), SMALL | {"output_dir": "out", "max_epochs": 2}, tmp_path)
    assert "loss=" in printed  # the progress bar
    folder = tmp_path / "out"
    first = facts(folder)
    assert first["epoch"] == 2
    assert list((folder / "tensorboard").iterdir())
    checkpoint = torch.load(folder / "checkpoint_epoch=2.pt", weights_only=True)
    assert checkpoint["data"]["position"] == 40

    train(folder, max_epochs=10, resume=True)
    second = facts(folder)
    assert second["epoch"] > 2
    assert second["mean_absolute_error"] < 0.9 * first["mean_absolute_error"]
    assert second["training_seconds"] > first["training_seconds"]
    checkpoint = torch.load(folder / "checkpoint_epoch=10.pt", weights_only=True)
    assert checkpoint["data"]["position"] == 200  # no point set came twice
    assert checkpoint["trainer"]["iteration"] == 200

    state = torch.load(folder / "model.pt", weights_only=True)
    assert all(name.startswith("regressor.") for name in state)
    network = AffineRegressor.from_state_dict(state)
    assert network.hidden == (256, 64)
    # half precision loses nothing to speak of
    generator = torch.Generator().manual_seed(0)
    matrix, fixed = 2 * torch.rand(500, 2, 3, generator=generator) - 1, torch.rand(500, 16, 2, generator=generator)
    with torch.no_grad():
        error = float((network(fixed, map_points(matrix, fixed)) - matrix).abs().mean())
    assert error == pytest.approx(second["mean_absolute_error"], rel=0.1)


def test_resumed_training_equals_one_without_a_stop(tmp_path):
    train(tmp_path / "whole", max_epochs=4, epoch_length=5)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed" / "checkpoint_epoch=4.pt").unlink()
    train(tmp_path / "resumed", max_epochs=4, epoch_length=5, resume=True)
    whole, resumed = (
        torch.load(tmp_path / name / "checkpoint_epoch=4.pt", weights_only=True)["network"]
        for name in ("whole", "resumed")
    )
    for key in whole:
        torch.testing.assert_close(resumed[key], whole[key])


def test_same_seed_same_network(tmp_path):
    networks = []
    for name, seed in (("one", 4), ("two", 4), ("three", 5)):
        train(tmp_path / name, max_epochs=1, epoch_length=5, seed=seed, transform="rigid", spatial_dims=3)
        networks.append(torch.load(tmp_path / name / "model.pt", weights_only=True))
    one, two, three = networks
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], three[key]) for key in one)
    network = AffineRegressor.from_state_dict(one)
    assert (network.spatial_dims, network.transform) == (3, "rigid")


def test_resume_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(RuntimeError) as error:
        train(tmp_path / "none", resume=True)
    causes = [error.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert any(isinstance(cause, RegistrationError) and cause.argument == "output_dir" for cause in causes)


def test_bundle_load_gives_the_network_of_the_metadata():
    """Whatever configuration it is loaded from, with the shipped weights in it."""
    bundle = CONFIGS.parent
    network = monai.bundle.load(bundle.name, bundle_dir=bundle.parent, source="github", device="cpu")
    assert isinstance(network, ZeroShotAffineNet)
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert set(network.state_dict()) == set(state)
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].float())


@pytest.mark.slow
def test_two_processes(tmp_path):
    files = f"['{CONFIGS / 'train.json'}','{CONFIGS / 'multi_gpu_train.json'}']"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = {name: value for name, value in SMALL.items() if name != "device"}
    command(launcher, files, options | {"output_dir": "out", "max_epochs": 1}, tmp_path)
    assert facts(tmp_path / "out")["batch_size"] == 128
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert not any("module." in name for name in state)
