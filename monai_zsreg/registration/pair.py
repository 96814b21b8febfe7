# SPDX-License-Identifier: Apache-2.0
"""Registering a pair of images: read, check, estimate, report."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import Grid, apply_affine
from monai_zsreg.networks import IMAGENET, TRANSFORMS, AffineRegressor, Status, ZeroShotAffineNet
from monai_zsreg.pretrained import load_state_dict, regressor_weights_path
from monai_zsreg.registration.confidence import FAIL, PASS, WARN, Quality, honest_covariance, judge, spread_at
from monai_zsreg.registration.estimators import KeypointEstimator, RobustEstimator
from monai_zsreg.registration.images import ImageLike, channel, read_image, working_spacing
from monai_zsreg.registration.presets import DEFAULT_PRESET, ROBUST, preset_options
from monai_zsreg.registration.result import RegistrationResult
from monai_zsreg.registration.robust import COARSE, RobustEngine, RobustEstimate
from monai_zsreg.registration.uncertainty import BlackeningUncertainty
from monai_zsreg.resample import by_header, read_matrix

__all__ = [
    "Method",
    "build_method",
    "build_network",
    "check_options",
    "make_network",
    "register",
    "register_with",
    "resolve_device",
]

#: makes an estimator from the fixed values, the two grids and the options of the pair
Method = Callable[..., KeypointEstimator | RobustEstimator]

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
    fixed_mask: ImageLike | None = None,
    moving_mask: ImageLike | None = None,
    initial: Any = None,
    **options: Any,
) -> RegistrationResult:
    """Find the transform that takes every point of the fixed image to the same anatomy in the moving image.

    The images may differ in size, spacing, orientation and field of view. Unless told otherwise the whole range of
    rotations is searched, so it does not matter where the images lie in the world.

    Args:
        fixed: path, ``MetaTensor`` or tensor ``[C, *spatial]``, or numpy array ``[*spatial]``; 2D or 3D.
        moving: likewise, of the same dimension.
        preset: ``"robust"``, global search and refinement, which needs no weights; ``"paper"``, Kori and Krishnamurthi
            as written; or ``"keypoints"``, the same mended so that it works across modalities.
        transform: ``"rigid"``, ``"similarity"`` or ``"affine"``.
        device: where to compute; None takes the device of ``fixed`` if it is a tensor, else the CPU.
        vgg19_weights: VGG-19 state dict file, whole or cut, for what uses VGG-19; None for torchvision's, downloaded
            once.
        regressor_weights: state dict file of the MLP, for preset ``"paper"``; None for the shipped one (affine).
        seed: of all random draws.
        spacing: finest voxel size to work at, mm; see `RobustEngine.estimate` and `working_spacing` for the default.
        fixed_channel: channel (or volume of a 4D file) to estimate on; ``apply`` and ``moved`` take all.
        moving_channel: likewise.
        fixed_mask: where to look in the fixed image, above 0: an image on any grid in its world, or an array on its
            own; None for its foreground. Preset ``"robust"`` only, as the next two.
        moving_mask: likewise for the moving image.
        initial: where to start, ``(D+1, D+1)``, fixed world to moving world, RAS mm, or the path of a transform file;
            None for what the headers say. The global search tries it beside all others.
        options: further parameters, in place of the preset's. For ``"robust"``: ``search`` (``"global"``, ``"local"``
            around the start, ``"none"``), ``coarse`` (``"search"``, or ``"keypoints"``: those of VGG-19 take the place
            of the search) and those of `RobustEngine`; for the others, those of `ZeroShotAffineNet`.

    Returns:
        The result; see `RegistrationResult`. One that could not be estimated has ``success`` False and warns.

    Raises:
        RegistrationError: input that is wrong; the message names the argument, what it was and what is allowed.

    Example::

        result = monai_zsreg.register("t1.nii.gz", "flair.nii.gz")
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
    pair_options: dict[str, Any] = {"fixed_mask": fixed_mask, "moving_mask": moving_mask, "initial": initial}
    check_pair_options(preset, pair_options)
    method = build_method(
        preset, fixed_image.ndim - 1, transform, vgg19_weights, regressor_weights, seed, where, **settings
    )
    return register_with(
        method,
        fixed_image,
        moving_image,
        preset=preset,
        transform=transform,
        device=where,
        seed=seed,
        spacing=spacing,
        fixed_channel=fixed_channel,
        moving_channel=moving_channel,
        **pair_options,
    )


def check_pair_options(preset: str, options: dict[str, Any]) -> None:
    """
    Raises:
        RegistrationError: ``options`` has a mask or a start, and the preset cannot use it.
    """
    for name in ("fixed_mask", "moving_mask", "initial"):
        if preset != ROBUST and options.get(name) is not None:
            raise RegistrationError(name, "given", f"nothing with preset {preset!r}; preset {ROBUST!r} can use it")


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
    method: Method,
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
    fixed_mask: ImageLike | None = None,
    moving_mask: ImageLike | None = None,
    initial: Any = None,
) -> RegistrationResult:
    """`register` with a method that is there already.

    Args:
        method: as `build_method` gives it, for the images' dimension.
        fixed: ``[C, *spatial]``, as `read_image` gives it.
        moving: likewise.
        preset: name of the method, for the result.
        transform: kind of transform, for the result.
        device: where the method is.
        seed: of the blackened pixels of the uncertainty.
        spacing: see `register`.
        fixed_channel: see `register`.
        moving_channel: see `register`.
        fixed_mask: see `register`.
        moving_mask: see `register`.
        initial: see `register`.

    Raises:
        RegistrationError: images that cannot be registered, or a wrong ``spacing``, mask or start.
    """
    _check_dimensions(fixed, moving)
    fixed_values = channel(fixed, fixed_channel, "fixed").to(device)
    moving_values = channel(moving, moving_channel, "moving").to(device)
    fixed_grid, moving_grid = Grid.of(fixed), Grid.of(moving)
    if spacing is not None:
        working_spacing(fixed_grid, moving_grid, spacing)
    options: dict[str, Any] = {"spacing": spacing}
    for name, mask, image in (("fixed_mask", fixed_mask, fixed), ("moving_mask", moving_mask, moving)):
        if mask is not None:
            options[name] = _mask_on(mask, image, name).to(device)[None]
    if initial is not None:
        options["initial"] = read_matrix(initial, fixed.ndim - 1, "initial", fixed, moving)[None]

    start = time.perf_counter()
    estimator = method(fixed_values, fixed_grid, moving_grid, **options)
    try:
        matrices, estimate = estimator(moving_values[None])
    except torch.OutOfMemoryError as error:
        free = "more free memory on it; a coarser `spacing`, or device='cpu', needs less"
        raise RegistrationError("device", str(device), free) from error
    seconds = time.perf_counter() - start

    status = Status(int(estimate.status[0]))
    notes = [] if status == Status.OK else [status.reason]
    affine = matrices[0]
    if not notes:
        notes = _overlap_notes(affine, fixed_grid, moving_grid)
    success = not notes
    covariance = None
    if success and isinstance(estimate, RobustEstimate):
        covariance = honest_covariance(estimate.covariance[0].numpy(), float(estimate.step[0]))
    quality = (
        _quality(affine, estimate, covariance, fixed_grid) if success else Quality(FAIL, list(notes), {}, -math.inf)
    )
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
        quality=quality,
        covariance=covariance,
        keypoints=estimator.world_keypoints(estimate),  # type: ignore[arg-type]
        _uncertainty=BlackeningUncertainty(estimator.repeat, moving_values, fixed, moving, seed=seed),
    )


def _quality(affine: Tensor, estimate: Any, covariance: np.ndarray | None, fixed: Grid) -> Quality:
    """The verdict on a registration that was not given up."""
    dims = len(affine) - 1
    stretches = torch.linalg.svdvals(affine[:dims, :dims])
    size = float(stretches.log().mean().exp())
    measures = {"scale": max(size, 1 / size), "stretch": float(stretches[0] / stretches[-1])}
    if covariance is None:
        found = judge(measures, dims)
        if found.verdict != PASS:
            return found
        return Quality(WARN, ["this preset does not measure how well the images agree"], measures, -0.5)
    center = fixed.center.numpy()
    # in the middle and half way to the ends of the field of view
    reach = [[0.0] * dims] + [[sign * 0.25 * (a == b) for b in range(dims)] for a in range(dims) for sign in (-1, 1)]
    ends = torch.tensor(fixed.shape, dtype=torch.float64) * torch.tensor(reach, dtype=torch.float64)
    places = center + (ends @ fixed.affine[:dims, :dims].mT).numpy()
    spread = spread_at(covariance, places)
    return judge(
        measures
        | {
            "agreement": float(estimate.agreement[0]),
            "cost": float(estimate.cost[0, -1]),
            "coarse_cost": float(estimate.cost[0, 0]),
            "overlap": float(estimate.overlap[0]),
            "error": float(np.sqrt(np.square(spread).mean())) / float(estimate.step[0]),
        },
        dims,
    )


def _mask_on(mask: ImageLike, image: MetaTensor, name: str) -> Tensor:
    """A mask on the grid of its image, ``[1, *spatial]`` float32."""
    read = read_image(mask, name)
    if not isinstance(mask, (str, os.PathLike, MetaTensor)):
        if read.shape[1:] != image.shape[1:]:
            raise RegistrationError(name, tuple(read.shape), f"the shape of its image, {tuple(image.shape[1:])}")
        values = read.as_tensor()[:1].float()
    else:
        if read.ndim != image.ndim:
            raise RegistrationError(name, f"{read.ndim - 1}D image", f"a {image.ndim - 1}D image, as its image is")
        # a header that only says where it lies
        plain = MetaTensor((read.as_tensor()[:1] > 0).float().cpu(), affine=read.affine.cpu())
        grid = MetaTensor(image.as_tensor().cpu(), affine=image.affine.cpu())
        values = by_header(plain, grid, mode="nearest").as_tensor()
    if not bool((values > 0).any()):
        raise RegistrationError(name, "no voxel above 0 within its image", "a mask that shows where to look")
    return values


def _check_dimensions(fixed: MetaTensor, moving: MetaTensor) -> None:
    if fixed.ndim != moving.ndim:
        raise RegistrationError(
            "moving", f"{moving.ndim - 1}D image", f"a {fixed.ndim - 1}D image, because fixed is one"
        )


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


def build_method(
    preset: str,
    spatial_dims: int,
    transform: str = "affine",
    vgg19_weights: str | os.PathLike | None = None,
    regressor_weights: str | os.PathLike | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Method:
    """What `register_with` runs, with its weights if it has any.

    Args:
        preset: name of the method.
        spatial_dims: 2 or 3.
        transform: kind of transform.
        vgg19_weights: see `register`.
        regressor_weights: see `register`.
        seed: see `register`.
        device: where to.
        settings: all parameters of the preset.

    Raises:
        RegistrationError: an unknown parameter, or weights that cannot be had or do not fit.
    """
    weights = (vgg19_weights, regressor_weights)
    if preset != ROBUST:
        network = build_network(spatial_dims, transform, *weights, seed, device, **settings)
        return partial(KeypointEstimator, network)
    coarse = settings.pop("coarse", COARSE[0])
    if coarse not in COARSE:
        raise RegistrationError("coarse", coarse, f"one of {COARSE}")
    start: ZeroShotAffineNet | None = None
    if coarse == "keypoints":
        start = build_network(spatial_dims, transform, *weights, seed, device, **preset_options("keypoints"))
    source = _path(vgg19_weights, "vgg19_weights") or IMAGENET
    try:
        engine = RobustEngine(spatial_dims, transform, seed=seed, vgg19_weights=source, **settings)
    except TypeError as error:
        raise RegistrationError("options", sorted(settings), f"parameters of RobustEngine ({error})") from error
    return partial(RobustEstimator, engine.to(device).eval(), coarse=start)


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
    weights = _path(vgg19_weights, "vgg19_weights") or IMAGENET
    regressor = _path(regressor_weights, "regressor_weights")
    try:
        hash(frozen)
    except TypeError as error:
        raise RegistrationError("options", settings, f"numbers, strings, or lists of numbers ({error})") from error
    stamps = (_stamp(weights), _stamp(regressor))
    return _build(spatial_dims, transform, weights, regressor, seed, str(device), frozen, stamps)


def _path(file: Any, argument: str) -> str | None:
    if file is not None and not isinstance(file, (str, os.PathLike)):
        raise RegistrationError(argument, file, "a path, or None")
    return None if file is None else os.fspath(file)


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
