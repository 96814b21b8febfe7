# SPDX-License-Identifier: Apache-2.0
"""Registering a pair of images: read, check, estimate, report."""

from __future__ import annotations

import os
import time
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import Grid, apply_affine, unit_points_to_world, world_from_unit
from monai_zsreg.networks import IMAGENET, TRANSFORMS, AffineEstimate, AffineRegressor, Status, ZeroShotAffineNet
from monai_zsreg.pretrained import load_state_dict, regressor_weights_path
from monai_zsreg.registration.images import ImageLike, channel, on_isotropic_grid, read_image, working_spacing
from monai_zsreg.registration.presets import DEFAULT_PRESET, preset_options
from monai_zsreg.registration.result import RegistrationResult
from monai_zsreg.registration.uncertainty import BlackeningUncertainty

__all__ = [
    "KeypointEstimator",
    "build_network",
    "check_options",
    "make_network",
    "register",
    "register_with",
    "resolve_device",
]

# part of one field of view that must lie in the other; below it there is nothing to compare
_LEAST_OVERLAP = 0.05


def register(
    fixed: ImageLike,
    moving: ImageLike,
    *,
    preset: str = DEFAULT_PRESET,
    transform: str = "affine",
    device: str | torch.device | None = None,
    vgg19_weights: str | os.PathLike | None = None,
    regressor_weights: str | os.PathLike | None = None,
    seed: int = 0,
    spacing: float | None = None,
    fixed_channel: int = 0,
    moving_channel: int = 0,
    **options: Any,
) -> RegistrationResult:
    """Find the transform that takes every point of the fixed image to the same anatomy in the moving image.

    The images may differ in size, spacing, orientation and field of view. Where they lie in the world does not matter
    to these presets: they start with the middles of the fields of view on one another.

    Args:
        fixed: path, ``MetaTensor`` or tensor ``[C, *spatial]``, or numpy array ``[*spatial]``; 2D or 3D.
        moving: likewise, of the same dimension.
        preset: ``"paper"``, Kori and Krishnamurthi as written, or ``"keypoints"``, the same mended so that it works
            across modalities.
        transform: ``"rigid"``, ``"similarity"`` or ``"affine"``.
        device: where to compute; None takes the device of ``fixed`` if it is a tensor, else the CPU.
        vgg19_weights: VGG-19 state dict file, whole or cut; None for torchvision's, downloaded once.
        regressor_weights: state dict file of the MLP, for preset ``"paper"``; None for the shipped one (affine).
        seed: of all random draws.
        spacing: voxel size at which keypoints are looked for, mm; see `working_spacing` for the default.
        fixed_channel: channel (or volume of a 4D file) to estimate on; ``apply`` and ``moved`` take all.
        moving_channel: likewise.
        options: further parameters of `ZeroShotAffineNet`, in place of the preset's.

    Returns:
        The result; see `RegistrationResult`. One that could not be estimated has ``success`` False and warns.

    Raises:
        RegistrationError: input that is wrong; the message names the argument, what it was and what is allowed.

    Example::

        result = monai_zsreg.register("t1.nii.gz", "flair.nii.gz", vgg19_weights="vgg19-dcbb9e9d.pth")
        result.moved        # FLAIR on the T1 grid
        result.affine       # 4x4, fixed world to moving world, RAS mm
    """
    check_options(transform, seed)
    if "spatial_dims" in options:
        raise RegistrationError("spatial_dims", options["spatial_dims"], "nothing: the images decide")
    fixed_image, moving_image = read_image(fixed, "fixed"), read_image(moving, "moving")
    _check_dimensions(fixed_image, moving_image)
    settings = preset_options(preset) | options
    where = resolve_device(device, fixed_image.device)
    # before the network, whose weights may have to be downloaded
    channel(fixed_image, fixed_channel, "fixed")
    channel(moving_image, moving_channel, "moving")
    network = build_network(fixed_image.ndim - 1, transform, vgg19_weights, regressor_weights, seed, where, **settings)
    return register_with(
        network,
        fixed_image,
        moving_image,
        preset=preset,
        transform=transform,
        device=where,
        seed=seed,
        spacing=spacing,
        fixed_channel=fixed_channel,
        moving_channel=moving_channel,
    )


def check_options(transform: Any, seed: Any) -> None:
    """
    Raises:
        RegistrationError: ``transform`` is no kind of transform, or ``seed`` no seed.
    """
    if transform not in TRANSFORMS:
        raise RegistrationError("transform", transform, f"one of {TRANSFORMS}")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise RegistrationError("seed", seed, "a whole number from 0 to 2**63 - 1")


def register_with(
    network: ZeroShotAffineNet,
    fixed: MetaTensor,
    moving: MetaTensor,
    *,
    preset: str,
    transform: str,
    device: str | torch.device = "cpu",
    seed: int = 0,
    spacing: float | None = None,
    fixed_channel: int = 0,
    moving_channel: int = 0,
) -> RegistrationResult:
    """`register` with a network that is there already.

    Args:
        network: on ``device``, in evaluation mode, for the images' dimension; a scripted one will do.
        fixed: ``[C, *spatial]``, as `read_image` gives it.
        moving: likewise.
        preset: name of the method, for the result.
        transform: kind of transform, for the result.
        device: where the network is.
        seed: of the blackened pixels of the uncertainty.
        spacing: see `register`.
        fixed_channel: see `register`.
        moving_channel: see `register`.

    Raises:
        RegistrationError: images that cannot be registered, or a wrong ``spacing``.
    """
    _check_dimensions(fixed, moving)
    fixed_values = channel(fixed, fixed_channel, "fixed").to(device)
    moving_values = channel(moving, moving_channel, "moving").to(device)

    start = time.perf_counter()
    estimator = KeypointEstimator(network, fixed_values, Grid.of(fixed), Grid.of(moving), spacing)
    matrices, estimate = estimator(moving_values[None])
    seconds = time.perf_counter() - start

    status = Status(int(estimate.status[0]))
    notes = [] if status == Status.OK else [status.reason]
    affine = matrices[0]
    if not notes:
        notes = _overlap_notes(affine, Grid.of(fixed), Grid.of(moving))
    success = not notes
    if not success:
        affine = torch.eye(len(affine), dtype=torch.float64)
        warnings.warn(f"registration failed: {notes[0]}; the matrix is the identity", RegistrationWarning, stacklevel=3)

    return RegistrationResult(
        affine=affine.numpy(),
        success=success,
        warnings=notes,
        seconds=seconds,
        preset=preset,
        transform=transform,
        fixed=fixed,
        moving=moving,
        keypoints=estimator.world_keypoints(estimate),
        _uncertainty=BlackeningUncertainty(estimator.repeat, moving_values, fixed, moving, seed=seed),
    )


def _check_dimensions(fixed: MetaTensor, moving: MetaTensor) -> None:
    if fixed.ndim != moving.ndim:
        raise RegistrationError(
            "moving", f"{moving.ndim - 1}D image", f"a {fixed.ndim - 1}D image, because fixed is one"
        )


class KeypointEstimator:
    """Runs `ZeroShotAffineNet` on images that lie on grids of their own.

    Both images are put on cubes of one isotropic voxel size along the world axes, each around the middle of its own
    field of view; the network sees the two cubes as a pair on one grid.

    Args:
        network: on the device of ``fixed_values``.
        fixed_values: ``[1, *spatial]``.
        fixed: grid of the fixed image.
        moving: grid of the moving image.
        spacing: voxel size of the cubes, mm, or None; see `working_spacing`.
    """

    def __init__(
        self, network: ZeroShotAffineNet, fixed_values: Tensor, fixed: Grid, moving: Grid, spacing: float | None = None
    ) -> None:
        self.network = network
        self.moving = moving
        self.spacing = working_spacing(fixed, moving, spacing)
        extent = float(torch.maximum(fixed.extent, moving.extent).max())
        self.side = int(np.ceil(extent / self.spacing - 1e-3))
        self.fixed_cube, self.fixed_grid = on_isotropic_grid(fixed_values, fixed, self.spacing, self.side)
        self.moving_grid = self.fixed_grid

    def __call__(self, moving_values: Tensor) -> tuple[Tensor, AffineEstimate]:
        """Estimate for n versions of the moving image.

        Args:
            moving_values: ``[n, 1, *spatial]``.

        Returns:
            World matrices ``[n, D+1, D+1]`` float64 on the CPU, and the network's own estimate.
        """
        cubes = [on_isotropic_grid(values, self.moving, self.spacing, self.side) for values in moving_values]
        self.moving_grid = cubes[0][1]
        pairs = torch.stack([torch.cat([cube, self.fixed_cube]) for cube, _ in cubes])
        with torch.inference_mode():
            estimate = self.network.estimate(pairs)
        matrices = [world_from_unit(matrix, self.fixed_grid, self.moving_grid) for matrix in estimate.matrix]
        return torch.stack(matrices), estimate

    def repeat(self, moving_values: Tensor) -> tuple[Tensor, Tensor]:
        """As a call, with a mask ``[n]`` of the estimates that succeeded in place of the details."""
        matrices, estimate = self(moving_values)
        return matrices, estimate.status.cpu() == Status.OK

    def world_keypoints(self, estimate: AffineEstimate) -> dict[str, np.ndarray]:
        """Keypoints of the first pair that both images have, ``[K, D]`` each, world mm."""
        valid = estimate.valid[0]
        return {
            "fixed": unit_points_to_world(estimate.fixed_points[0][valid], self.fixed_grid).numpy(),
            "moving": unit_points_to_world(estimate.moving_points[0][valid], self.moving_grid).numpy(),
        }


def resolve_device(device: str | torch.device | None, default: torch.device | str = "cpu") -> torch.device:
    """A usable device.

    Raises:
        RegistrationError: no such device on this machine.
    """
    try:
        found = torch.device(default if device is None else device)
        torch.zeros(1, device=found).item()  # "meta" is a device too, but holds no numbers
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise RegistrationError(
            "device", str(device), f'"cpu", or a device of this machine such as "cuda" ({error})'
        ) from error
    return found


def build_network(
    spatial_dims: int,
    transform: str = "affine",
    vgg19_weights: str | os.PathLike | None = None,
    regressor_weights: str | os.PathLike | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> ZeroShotAffineNet:
    """The network of a preset with its weights, in evaluation mode; kept, so that a series of pairs loads it once.

    Args:
        spatial_dims: 2 or 3.
        transform: kind of transform.
        vgg19_weights: see `register`.
        regressor_weights: see `register`.
        seed: see `register`.
        device: where to.
        settings: further parameters of `ZeroShotAffineNet`.

    Raises:
        RegistrationError: an unknown parameter, or weights that cannot be had or do not fit.
    """
    # tuples, because JSON gives lists and a cache needs keys
    frozen = tuple(
        sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in settings.items())
    )
    files: list[str | None] = []
    for name, file in (("vgg19_weights", vgg19_weights), ("regressor_weights", regressor_weights)):
        if file is not None and not isinstance(file, (str, os.PathLike)):
            raise RegistrationError(name, file, "a path, or None")
        files.append(None if file is None else os.fspath(file))
    try:
        hash(frozen)
    except TypeError as error:
        raise RegistrationError("options", settings, f"numbers, strings, or lists of numbers ({error})") from error
    weights, regressor = files[0] or IMAGENET, files[1]
    stamps = (_stamp(weights), _stamp(regressor))
    return _build(spatial_dims, transform, weights, regressor, seed, str(device), frozen, stamps)


def _stamp(path: str | None) -> tuple[str, int, int] | None:
    # changes when another file takes a path's place: a network that is kept must not outlive its weights
    if path is None or not os.path.isfile(path):
        return None
    state = os.stat(path)
    return os.path.abspath(path), state.st_mtime_ns, state.st_size


@lru_cache(maxsize=8)
def _build(
    spatial_dims: int,
    transform: str,
    vgg19_weights: str,
    regressor_weights: str | None,
    seed: int,
    device: str,
    settings: tuple[tuple[str, Any], ...],
    stamps: tuple[Any, ...],  # a part of the cache's key, not used
) -> ZeroShotAffineNet:
    network = make_network(spatial_dims, transform, vgg19_weights, regressor_weights, seed, dict(settings))
    network.features.load_weights()
    return network.to(device).eval().requires_grad_(False)


def make_network(
    spatial_dims: int,
    transform: str,
    vgg19_weights: str,
    regressor_weights: str | os.PathLike | None,
    seed: int,
    options: dict[str, Any],
) -> ZeroShotAffineNet:
    """A new network with the regressor's weights, if it has a regressor; VGG-19's are not downloaded here.

    Args:
        spatial_dims: see `build_network`.
        transform: see `build_network`.
        vgg19_weights: see `VGG19Features`.
        regressor_weights: see `register`.
        seed: see `register`.
        options: further parameters of `ZeroShotAffineNet`.

    Raises:
        RegistrationError: see `build_network`.
    """
    state: dict[str, Tensor] = {}
    if options.get("estimator", "mlp") == "mlp":
        if regressor_weights is None and transform != "affine":
            raise RegistrationError(
                "transform",
                transform,
                '"affine" with the shipped regressor; train one for this transform and name its file as '
                "regressor_weights, or use an estimator other than the MLP",
            )
        path = regressor_weights or regressor_weights_path(spatial_dims)
        try:
            trained = AffineRegressor.from_state_dict(load_state_dict(path))
        except RegistrationError as error:
            raise RegistrationError("regressor_weights", str(path), error.allowed) from error
        # names without a prefix, whether the file holds the regressor or the whole network
        state = trained.state_dict()
        if (trained.spatial_dims, trained.transform) != (spatial_dims, transform):
            raise RegistrationError(
                "regressor_weights",
                str(path),
                f"a {spatial_dims}D {transform} regressor; this one is {trained.spatial_dims}D {trained.transform}",
            )
        options = {"num_points": trained.num_points, "hidden": trained.hidden} | options
    try:
        network = ZeroShotAffineNet(spatial_dims, transform, vgg19_weights=vgg19_weights, seed=seed, **options)
    except TypeError as error:
        raise RegistrationError("options", sorted(options), f"parameters of ZeroShotAffineNet ({error})") from error
    if state:
        try:
            network.regressor.load_state_dict(state)
        except RuntimeError as error:
            raise RegistrationError(
                "options", sorted(options), f"what fits the regressor's weights ({error})"
            ) from error
    return network


def _overlap_notes(affine: Tensor, fixed: Grid, moving: Grid) -> list[str]:
    if not bool(torch.isfinite(affine).all()):
        return ["the estimated matrix is not finite"]
    share = max(_share_inside(fixed, moving, affine), _share_inside(moving, fixed, torch.linalg.inv(affine)))
    if share < _LEAST_OVERLAP:
        return [f"after registration the fields of view overlap by {100 * share:.0f} % only"]
    return []


def _share_inside(grid: Grid, other: Grid, transform: Tensor) -> float:
    """Part of the voxels of ``grid`` that a world transform takes into the field of view of ``other``."""
    steps = [torch.linspace(0, n - 1, 12, dtype=torch.float64) for n in grid.shape]
    index = apply_affine(grid.index_pull(transform, other), torch.cartesian_prod(*steps))
    last = torch.tensor([n - 0.5 for n in other.shape], dtype=torch.float64)
    return float(((index >= -0.5) & (index <= last)).all(dim=1).double().mean())
