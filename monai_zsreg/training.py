# SPDX-License-Identifier: Apache-2.0
"""Training data for the regressor, the pieces of its training, and its evaluation.

Section 2.5 of the paper: points X ~ U(0, 1), a matrix M ~ U(-1, 1), Y = M X; the network learns M from (X, Y). No image
is involved. The bundle's ``configs/train.json`` puts the pieces together. ``python -m monai_zsreg.training`` prints how
far a trained network is off, beside the closed form.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from monai_zsreg.errors import RegistrationError, require
from monai_zsreg.io.files import atomic_path, write_json
from monai_zsreg.networks.coordinates import map_points
from monai_zsreg.networks.least_squares import LeastSquaresAffine, check_kind
from monai_zsreg.networks.regressors import AffineRegressor, load_regressor, training_facts

# the image of section 2.8 and the frame that is left when it is padded by 50 pixels on every side, pixels
_IMAGE_SIDE, _PADDED_SIDE = 240, 340


def _uniform(size: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(*size, generator=generator) * (high - low) + low


def _rotations(angle: Tensor, axis: Tensor | None) -> Tensor:
    """Rotations ``[B, D, D]`` by angles ``[B]``; in 3D about axes ``[B, 3]``, in 2D without."""
    plane = axis is None
    direction = torch.tensor([[0.0, 0.0, 1.0]]) if axis is None else nn.functional.normalize(axis, dim=1)
    matrix = Rotation.from_rotvec((angle[:, None] * direction).numpy()).as_matrix()
    return torch.from_numpy(matrix[:, :2, :2] if plane else matrix).float()


def random_matrices(
    count: int, spatial_dims: int = 2, transform: str = "affine", generator: torch.Generator | None = None
) -> Tensor:
    """Draw the matrices of section 2.5, ``[B, D, D+1]`` in unit coordinates, from ``generator`` (a new one if None).

    affine: every entry ~ U(-1, 1), so half of them are reflections. similarity: any rotation, scale ~ U(0.5, 2),
    translation ~ U(-1, 1). rigid: the same with scale 1. A RegistrationError for another kind.
    """
    check_kind(transform, spatial_dims)
    generator = generator or torch.Generator().manual_seed(0)
    if transform == "affine":
        return _uniform([count, spatial_dims, spatial_dims + 1], -1, 1, generator)
    if spatial_dims == 2:
        linear = _rotations(_uniform([count], -math.pi, math.pi, generator), None)
    else:  # normal quaternions have no preferred rotation
        quaternions = torch.randn(count, 4, generator=generator)
        linear = torch.from_numpy(Rotation.from_quat(quaternions.numpy()).as_matrix()).float()
    if transform == "similarity":
        linear = linear * _uniform([count, 1, 1], 0.5, 2, generator)
    return torch.cat([linear, _uniform([count, spatial_dims, 1], -1, 1, generator)], dim=-1)


def random_points(
    count: int, num_points: int = 64, spatial_dims: int = 2, generator: torch.Generator | None = None, spread: float = 0
) -> Tensor:
    """Draw fixed points ``[B, N, D]``: U(0, 1), or N(0.5, ``spread``) cut off at 0 and 1, as real keypoints cluster."""
    generator = generator or torch.Generator().manual_seed(0)
    if spread > 0:
        return (0.5 + spread * torch.randn(count, num_points, spatial_dims, generator=generator)).clamp(0, 1)
    return torch.rand(count, num_points, spatial_dims, generator=generator)


def perturbation_matrices(
    count: int, spatial_dims: int = 2, transform: str = "affine", generator: torch.Generator | None = None
) -> Tensor:
    """Draw the test perturbation of section 2.8, about the center of the image: ``[B, D, D+1]``, unit coordinates of a
    240-pixel image padded to 340 pixels.

    Translation up to 50 pixels an axis, rotation up to 0.3 rad (3D: about any axis), shear up to 0.03. "similarity" and
    "rigid": without the shear.
    """
    check_kind(transform, spatial_dims)
    generator = generator or torch.Generator().manual_seed(0)
    angle = _uniform([count], -0.3, 0.3, generator)
    linear = _rotations(angle, torch.randn(count, 3, generator=generator) if spatial_dims == 3 else None)
    if transform == "affine":
        shear = _uniform([count, spatial_dims, spatial_dims], -0.03, 0.03, generator)
        linear = linear @ (torch.eye(spatial_dims) + shear.triu(1))
    shift = _uniform([count, spatial_dims], -50, 50, generator) / _PADDED_SIDE
    translation = shift + 0.5 - 0.5 * linear.sum(dim=2)
    return torch.cat([linear, translation[..., None]], dim=-1)


@dataclass(eq=False)
class RandomPointPairs(IterableDataset):
    """Batches of random point pairs, made on the fly (section 2.5).

    One pass gives ``num_batches`` batches, each a dictionary: "image" the fixed points ``[B, N, D]``, "moving" the
    moving points ``[B, N, D]``, "label" the matrices ``[B, D, D+1]``. The names are those that MONAI's engines look
    for. The content of a batch depends only on ``seed``, ``rank``, ``world_size`` and its position in the stream. Use
    it with ``DataLoader(dataset, batch_size=None)``; it is fast enough to need no worker process.

    Args:
        spatial_dims: D, 2 or 3.
        num_points: N.
        kind: of the matrices: "affine", "similarity" or "rigid". (Not named "transform": in a bundle, a data set's
            "transform" is its preprocessing.)
        batch_size: B.
        num_batches: batches a pass.
        seed: of the stream.
        fresh: True: every pass goes on in the stream, so no points come twice. False: every pass gives the same, for
            validation.
        rank, world_size: of this process among those that train together; each gets points of its own.
    """

    spatial_dims: int = 2
    num_points: int = 64
    kind: str = "affine"
    batch_size: int = 512
    num_batches: int = 250
    seed: int = 0
    fresh: bool = True
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_kind(self.kind, self.spatial_dims)
        for name in ("num_points", "batch_size", "num_batches"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        last = self.world_size - 1
        require(0 <= self.rank <= last, "rank", self.rank, f"0 to {last} (world_size - 1)")
        self.position = 0

    def __len__(self) -> int:
        return self.num_batches

    def batch(self, position: int) -> dict[str, Tensor]:
        """The batch at a position of this process's stream."""
        index = position * self.world_size + self.rank
        # seeds far apart for neighboring indices, and no index of one seed in common with those of the next seed
        mixed = (self.seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        fixed = random_points(self.batch_size, self.num_points, self.spatial_dims, generator)
        matrix = random_matrices(self.batch_size, self.spatial_dims, self.kind, generator)
        return {"image": fixed, "moving": map_points(matrix, fixed), "label": matrix}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        alone = get_worker_info() is None
        require(alone, "num_workers", "1 or more", "0: every worker would make the same points")
        start = self.position if self.fresh else 0
        for position in range(start, start + self.num_batches):
            if self.fresh:
                self.position = position + 1
            yield self.batch(position)

    def state_dict(self) -> dict[str, int]:
        """How far the stream has been used, for a checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was taken."""
        self.position = int(state["position"])


def compact(tensor: Tensor) -> Tensor:
    """A parameter in half precision, in large matrices rounded to steps of 1/32 to 1/64 of their standard deviation: an
    archive of the shipped networks has half of the size, and their errors are the same within 0.3 %."""
    values = tensor.cpu().float()
    if values.numel() >= 2**18:
        step = 2.0 ** math.floor(math.log2(float(values.std()) / 32))
        values = (values / step).round() * step
    return values.half()


class BestModelSaver:
    """Ignite handler for the evaluator: keeps the network with the least ``val_mean_absolute_error`` so far as a plain
    state dict, with a JSON beside it.

    MONAI's ``CheckpointSaver`` forgets its best value when a training is resumed, and then replaces a better file. This
    handler belongs in the checkpoint (it has ``state_dict`` and ``load_state_dict``), so it remembers.

    The file is `compact`; loading it into a network makes single precision of it again.

    Args:
        path: the file, such as ``model.pt``. The JSON beside it has the error, the epoch and the training time in
            seconds, sessions before a resume included.
        network: what to save.
        details: more for the JSON, such as the settings.
    """

    def __init__(self, path: str, network: nn.Module, details: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.network = network
        self.details = dict(details or {})
        self.best = math.inf
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return time.monotonic() - self._start

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        value = float(engine.state.metrics["val_mean_absolute_error"])
        if not value < self.best:
            return
        self.best = value
        with atomic_path(self.path) as partial:
            torch.save({name: compact(tensor) for name, tensor in self.network.state_dict().items()}, partial)
        facts = {"mean_absolute_error": value, "epoch": engine.state.epoch, "training_seconds": round(self.seconds, 1)}
        write_json(self.path.with_suffix(".json"), facts | {"torch": torch.__version__} | self.details)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint has to remember."""
        return {"best": self.best, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from ``state``."""
        self.best = float(state["best"])
        self._start = time.monotonic() - float(state["seconds"])


def latest_checkpoint(folder: str | Path) -> str:
    """The checkpoint of the highest epoch in ``folder``, or a RegistrationError; one that was cut short while it was
    written is passed over."""
    found = [path for path in Path(folder).glob("*epoch=*.pt") if zipfile.is_zipfile(path)]
    require(len(found) > 0, "output_dir", str(folder), "a folder with a checkpoint (*epoch=N.pt) to resume from")
    return str(max(found, key=lambda path: int(path.stem.rsplit("=", 1)[1])))


def begin_distributed() -> None:
    """Join the processes that ``torchrun`` started, unless that has been done."""
    # its functions have the group as their default argument: imported later, they would hold it forever
    import torch.distributed.nn  # noqa: F401

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def end_distributed(network: nn.Module) -> None:
    """Leave the process group of a ``DistributedDataParallel``, which is of no use afterwards.

    The group's threads end with the last reference to it. Threads that are still at work when the interpreter ends take
    the whole process down with SIGABRT.
    """
    for name in ("reducer", "logger", "process_group"):
        setattr(network, name, None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _pixel_error(estimate: Tensor, truth: Tensor) -> float:
    """Mean distance in pixels between where two sets of matrices put the pixels of the image in the padded frame."""
    dims = truth.shape[1]
    margin = (_PADDED_SIDE - _IMAGE_SIDE) / 2
    # the centers of equal cells that fill the image
    count = 16 if dims == 2 else 8
    axis = (margin + (torch.arange(count, device=truth.device) + 0.5) / count * _IMAGE_SIDE) / _PADDED_SIDE
    points = torch.cartesian_prod(*[axis] * dims)
    return float((map_points(estimate, points) - map_points(truth, points)).norm(dim=-1).mean()) * _PADDED_SIDE


@torch.no_grad()
def evaluation_table(network: AffineRegressor, num_sets: int = 4096, seed: int = 2**31) -> list[dict[str, Any]]:
    """Measure a trained network and the closed form on fresh random points, ``num_sets`` a row, drawn from ``seed``.

    Returns:
        One dictionary a row: "points" and "matrices" (what was drawn), "noise" (standard deviation added to the moving
        points, as a fraction of the frame's side), and for both methods the mean absolute error per matrix entry and
        the mean displacement error in pixels of the 340-pixel frame.
    """
    dims, count, transform = network.spatial_dims, network.num_points, network.transform
    methods = {"mlp": network.eval(), "closed_form": LeastSquaresAffine(dims, transform)}
    drawn = {"section 2.5": random_matrices, "section 2.8": perturbation_matrices}
    rows = []
    for points_name, spread in (("uniform", 0.0), ("clustered", 0.15)):
        for matrices_name, draw in drawn.items():
            for noise in (0.0, 0.01, 0.05):
                generator = torch.Generator().manual_seed(seed)
                matrix = draw(num_sets, dims, transform, generator)
                fixed = random_points(num_sets, count, dims, generator, spread)
                moving = map_points(matrix, fixed)
                moving = moving + noise * torch.randn(moving.shape, generator=generator)
                row: dict[str, Any] = {"points": points_name, "matrices": matrices_name, "noise": noise}
                for name, method in methods.items():
                    estimate = method(fixed, moving)
                    row[f"{name}_error"] = float((estimate - matrix).abs().mean())
                    row[f"{name}_pixels"] = _pixel_error(estimate, matrix)
                rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: print the table of one trained network. Returns the exit code: 0, or 2 for unusable input."""
    parser = argparse.ArgumentParser(prog="python -m monai_zsreg.training", description=main.__doc__)
    parser.add_argument("--weights", required=True, help="state dict of the network, such as models/model.pt")
    parser.add_argument("--num_sets", type=int, default=4096, help="point sets a row (default: 4096)")
    parser.add_argument("--seed", type=int, default=2**31, help="of the points (default: 2**31)")
    options = parser.parse_args(arguments)
    try:
        network = load_regressor(options.weights, "weights")
    except RegistrationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{network.spatial_dims}D {network.transform}, {network.num_points} pairs, hidden layers {network.hidden}, "
          f"{parameters:,} parameters")  # fmt: skip
    facts = training_facts(options.weights)
    if "training_seconds" in facts:
        print(f"training time: {facts['training_seconds'] / 60:.1f} minutes")
    print(
        "| points | matrices | noise | MLP: error per parameter | pixels | closed form: error per parameter | pixels |"
    )
    print("|---" * 7 + "|")
    for row in evaluation_table(network, options.num_sets, options.seed):
        print("| {} | {} | {:.0%} | {:.4f} | {:.2f} | {:.4f} | {:.2f} |".format(*row.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
