# SPDX-License-Identifier: Apache-2.0
"""The paper's method on a pair of images: what `monai_zsreg.register` runs for the presets "paper" and "keypoints".

Both images are put on cubes of one isotropic voxel size along the world axes, each around the center of its own field
of view; `ZeroShotAffineNet` sees the two cubes as a pair on one grid.

The voxel size is, unless the user gives one: in 2D the finer spacing of the two images, but no more than 512 pixels a
side; in 3D 2 mm, but no finer than the images, and from 48 to 192 voxels a side, so that other units than mm work too.

References:
    Kori and Krishnamurthi, Zero Shot Learning for Multi-Modal Real Time Image Registration (2019).
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_zsreg.errors import RegistrationError, require
from monai_zsreg.foreground import foreground_mask
from monai_zsreg.geometry import Grid, apply_affine, homogeneous
from monai_zsreg.io.images import Image
from monai_zsreg.networks.coordinates import AffineResampler
from monai_zsreg.networks.regressors import load_regressor, shipped_weights
from monai_zsreg.networks.zero_shot import Status, ZeroShotAffineNet, scale_to_unit_range
from monai_zsreg.registration.confidence import spread_at
from monai_zsreg.registration.estimate import Estimate
from monai_zsreg.registration.pair import refuse_unknown, register
from monai_zsreg.registration.precision import full_precision
from monai_zsreg.registration.prepared import Prepared
from monai_zsreg.registration.result import RegistrationResult, spread_map
from monai_zsreg.registration.side import longest_extent
from monai_zsreg.resample import resample

if TYPE_CHECKING:
    from monai.data import MetaTensor

# options beside the parameters of `ZeroShotAffineNet`
_GIVEN = ("network", "regressor_weights", "vgg19_weights")
#: parameters of `ZeroShotAffineNet` by preset
PRESETS: dict[str, dict[str, Any]] = {
    # Kori and Krishnamurthi as written; the bundle's README says which readings were tried
    "paper": {"estimator": "mlp"},
    # the paper mended: contrast-symmetric maps of coarser copies, consensus in place of the regressor
    "keypoints": {
        "estimator": "consensus",
        "symmetric": True,
        "scales": (2, 3, 4),
        "iterations": 7,
        "coarse_passes": 5,
    },
}


def estimate(
    fixed: Image,
    moving: Image,
    *,
    preset: str,
    transform: str = "affine",
    device: str | torch.device = "cpu",
    spacing: float | None = None,
    fixed_channel: int = 0,
    moving_channel: int = 0,
    network: nn.Module | None = None,
    **options: Any,
) -> Estimate:
    """Estimate the transform of a pair.

    Args:
        fixed, moving: 2D or 3D, of one dimension.
        preset: key of `PRESETS`.
        spacing: voxel size of the cubes, mm; None for the one above.
        transform, device, fixed_channel, moving_channel: see `monai_zsreg.register`.
        network: in place of the preset's, such as one exported to TorchScript.
        options: further arguments of `build_network`.

    Raises:
        RegistrationError: a channel, parameter or weights that cannot be used.
    """
    channels = fixed.channel(fixed_channel, "fixed"), moving.channel(moving_channel, "moving")
    if network is None:
        network = build_network(preset, fixed.dims, transform, device=device, **options)
    extent = longest_extent(fixed.grid, moving.grid)
    step = _working_spacing(fixed.grid, moving.grid, extent) if spacing is None else spacing
    side = math.ceil(extent / step - 1e-3)
    with torch.inference_mode(), full_precision(torch.device(device)):
        fixed_cube, from_fixed = _on_cube(channels[0].to(device), fixed.grid, step, side)
        moving_cube, from_moving = _on_cube(channels[1].to(device), moving.grid, step, side)
        found = network.estimate(torch.cat([moving_cube, fixed_cube])[None])  # type: ignore[operator]
    valid = found.valid[0]
    keypoints = {
        "fixed": apply_affine(from_fixed, found.fixed_points[0][valid].cpu().double()).numpy(),
        "moving": apply_affine(from_moving, found.moving_points[0][valid].cpu().double()).numpy(),
    }
    identity = torch.eye(fixed.dims + 1, dtype=torch.float64)
    status = Status(int(found.status[0]))
    if status != Status.OK:
        reasons = [f"{status.reason}; the matrix is what the headers say"]
        return Estimate(identity, failed=True, reasons=reasons, keypoints=keypoints)
    affine = from_moving @ homogeneous(found.matrix[0].cpu().double()) @ torch.linalg.inv(from_fixed)
    affine[-1] = identity[-1]
    return Estimate(affine, keypoints=keypoints)


def keypoint_start(fixed: Image, moving: Image, **options: Any) -> tuple[Tensor | None, dict[str, np.ndarray]]:
    """Where the keypoints put the moving image, a start for the default preset's ``coarse="keypoints"``: fixed world to
    moving world, ``(D+1, D+1)``, None where it could not be estimated; and the keypoints. See `estimate`."""
    found = estimate(fixed, moving, preset="keypoints", **options)
    return None if found.failed else found.affine, found.keypoints


def _working_spacing(fixed: Grid, moving: Grid, extent: float) -> float:
    finest = min(min(fixed.spacing), min(moving.spacing))
    if fixed.dims == 2:
        return max(finest, extent / 512)
    return max(finest, min(max(2.0, extent / 192), extent / 48))


def _on_cube(values: Tensor, grid: Grid, spacing: float, side: int) -> tuple[Tensor, Tensor]:
    """An image on a cube (square in 2D) of isotropic voxels along the world axes, around the center of ``grid``.

    The cube's central voxel lies on a voxel of ``grid``: an image that already lies along the world axes with this
    spacing is copied, not interpolated.

    Returns:
        ``[1, side, ...]`` in [0, 1], with 0 as background and outside; and the matrix ``(D+1, D+1)`` from the cube's
        unit coordinates (see `monai_zsreg.networks.coordinates`) to the world.
    """
    dims = grid.dims
    scaled = scale_to_unit_range(values[None])
    # smooth where voxels become larger, or fine structure turns into noise
    sigma = [0.5 * max((spacing / s) ** 2 - 1.0, 0.0) ** 0.5 for s in grid.spacing]
    if max(sigma) > 0.1:
        from monai.networks.layers import GaussianFilter

        scaled = GaussianFilter(dims, [max(s, 1e-3) for s in sigma]).to(scaled.device)(scaled)
    anchor = apply_affine(grid.affine, torch.tensor([[float(n // 2) for n in grid.shape]], dtype=torch.float64))[0]
    affine = spacing * torch.eye(dims + 1, dtype=torch.float64)
    affine[:dims, dims] = anchor - spacing * (side // 2)
    affine[dims, dims] = 1.0
    cube = Grid((side,) * dims, affine)
    # a unit is the cube's side, and starts at the corner of the first voxel
    from_unit = affine.clone()
    from_unit[:dims, :dims] *= side
    from_unit[:dims, dims] -= 0.5 * spacing
    theta = (grid.from_world @ torch.linalg.inv(cube.from_world))[:dims].to(scaled.device)
    return AffineResampler()(scaled, theta[None], list(cube.shape))[0], from_unit


def check_settings(preset: str, options: Mapping[str, Any]) -> None:
    """Refuse options of `estimate` that are unknown, or neither a number, a string, nor a list of these, before there
    are images."""
    parameters = [*inspect.signature(ZeroShotAffineNet).parameters, *_GIVEN]
    refuse_unknown(dict(options), [name for name in parameters if name not in ("spatial_dims", "transform", "seed")])
    _plain({name: value for name, value in options.items() if name not in _GIVEN})


def build_network(
    preset: str = "paper",
    spatial_dims: int = 2,
    transform: str = "affine",
    *,
    vgg19_weights: str | os.PathLike | None = None,
    regressor_weights: str | os.PathLike | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> ZeroShotAffineNet:
    """The network of a preset with its weights, in evaluation mode.

    Args:
        preset: key of `PRESETS`.
        spatial_dims: 2 or 3.
        transform, vgg19_weights, regressor_weights, seed, device: see `monai_zsreg.register`.
        settings: parameters of `ZeroShotAffineNet`, in place of the preset's.

    Raises:
        RegistrationError: an unknown parameter, or weights that cannot be had or do not fit.
    """
    options = _plain(PRESETS[preset] | settings)
    trained = None
    if options["estimator"] == "mlp":
        weights = regressor_weights
        if weights is None and transform != "affine":
            allowed = (
                '"affine" with the shipped regressor; train one for this transform and name its file as '
                "regressor_weights, or use an estimator other than the MLP"
            )
            raise RegistrationError("transform", transform, allowed)
        weights = os.fspath(weights or shipped_weights(spatial_dims))
        trained = load_regressor(weights)
        kind = f"{trained.spatial_dims}D {trained.transform}"
        if kind != f"{spatial_dims}D {transform}":
            allowed = f"a {spatial_dims}D {transform} regressor; this one is {kind}"
            raise RegistrationError("regressor_weights", weights, allowed)
        for name in ("num_points", "hidden", "normalize"):
            known = getattr(trained, name)
            if options.pop(name, known) != known:
                raise RegistrationError(name, settings[name], f"{known}, as the regressor's weights have it")
        options |= {"num_points": trained.num_points, "hidden": (1,)}
    network = ZeroShotAffineNet(spatial_dims, transform, vgg19_weights=vgg19_weights, seed=seed, **options)
    if trained is not None:
        network.regressor = trained
    network.features.load_weights()
    return network.to(device).eval().requires_grad_(False)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as `ZeroShotAffineNet` takes them; JSON gives lists where there should be tuples."""
    for name, value in settings.items():
        parts = value if isinstance(value, (list, tuple)) else [value]
        if not all(part is None or isinstance(part, (str, Number)) for part in parts):
            raise RegistrationError(name, value, "a number, a string, or a list of these")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


@dataclass(eq=False)
class Uncertainty:
    """Spread of repeated estimates (section 2.7).

    Attributes:
        matrices: ``[n, D+1, D+1]``, the repeated estimates that succeeded, fixed world to moving world.
        repeats: how many were tried.
        fixed: image whose grid the maps live on.
        moving: image that the intensity map warps.
    """

    matrices: np.ndarray
    repeats: int
    fixed: Image = field(repr=False)
    moving: Image = field(repr=False)

    @cached_property
    def covariance(self) -> np.ndarray:
        """``(D(D+1), D(D+1))`` of the first D rows of the matrices, row after row; infinite for fewer than two."""
        dims = self.fixed.dims
        if len(self.matrices) < 2:
            return np.full((dims * (dims + 1),) * 2, np.inf)
        return np.cov(self.matrices[:, :dims].reshape(len(self.matrices), -1), rowvar=False)

    @property
    def variance(self) -> np.ndarray:
        """``(D, D+1)``, variance of each matrix entry (mm^2 in the last column, with the center of the fixed field of
        view as origin, so that it does not depend on where the scanner's origin is)."""
        dims, center = self.fixed.dims, self.fixed.grid.center.numpy()
        if len(self.matrices) < 2:
            return np.full((dims, dims + 1), np.inf)
        rows = self.matrices[:, :dims].copy()
        rows[:, :, dims] += rows[:, :, :dims] @ center
        return rows.var(axis=0, ddof=1)

    def at(self, points: np.ndarray | Tensor) -> np.ndarray:
        """Standard deviation of the displacement, mm, at points ``[N, D]`` of the fixed world."""
        places = np.asarray(points, dtype=np.float64)
        return np.full(len(places), np.inf) if len(self.matrices) < 2 else spread_at(self.covariance, places)

    def displacement_map(self) -> MetaTensor:
        """`at` every voxel of the fixed image: ``[1, *spatial]`` float32."""
        grid = self.fixed.grid
        known = len(self.matrices) > 1
        values = spread_map(self.covariance, grid) if known else torch.full((1, *grid.shape), float("inf"))
        return Image(values, grid.affine).to_metatensor()

    def intensity_map(self, channel: int = 0) -> MetaTensor:
        """Variance of the moved image's intensity over the estimates (what the paper's figure 3 seems to show):
        ``[1, *fixed spatial]`` float32, in squared units of the moving image."""
        values = self.moving.channel(channel, "moving")
        mean = torch.zeros(1, *self.fixed.grid.shape, dtype=torch.float64)
        squares = torch.zeros_like(mean)
        # Welford's update: one image at a time, without cancellation
        for count, matrix in enumerate(self.matrices, start=1):
            moved = resample(values, self.moving.grid, self.fixed.grid, torch.as_tensor(matrix), fill=0.0).double()
            delta = moved - mean
            mean += delta / count
            squares += delta * (moved - mean)
        return Image((squares / max(1, len(self.matrices) - 1)).float(), self.fixed.affine).to_metatensor()

    def as_dict(self) -> dict[str, Any]:
        """Numbers for a report: repeats, successes, variance per entry, spread in the center of the field of view."""
        return {
            "method": "blackening (section 2.7)",
            "repeats": self.repeats,
            "succeeded": len(self.matrices),
            "variance": self.variance.tolist(),
            "std_mm_at_center": float(self.at(self.fixed.grid.center[None])[0]),
        }


def blackening(result: RegistrationResult, fraction: float = 0.05, repeats: int = 10) -> Uncertainty:
    """Register again, as ``result`` (of any preset) was, n = ``repeats`` times, each with another random ``fraction``
    of the moving image's foreground pixels blackened; a RegistrationError for an argument out of its range."""
    require(0.0 < fraction < 1.0, "fraction", fraction, "0 < fraction < 1")
    require(repeats >= 2, "repeats", repeats, "at least 2")
    options = dict(result.options)
    fixed = Prepared(result.fixed_image, options.pop("fixed_channel", 0), result.masks[0])
    values = result.moving_image.channel(options.pop("moving_channel", 0), "moving")
    generator = torch.Generator().manual_seed(int(options.get("seed", 0)))
    options |= {"preset": result.preset, "transform": result.transform, "device": result.device, "warn": False}
    found = []
    for _ in range(repeats):
        copy = replace(result.moving_image, values=blacken(values, fraction, generator))
        again = register(fixed, copy, moving_mask=result.masks[1], **options)
        # blackened pixels alone may look unlike enough for the verdict FAIL; what counts is that there is a matrix
        if again.score > -math.inf:
            found.append(again.affine)
    shape = (-1, *np.shape(result.affine))
    return Uncertainty(np.reshape(found, shape), repeats, result.fixed_image, result.moving_image)


def blacken(values: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """A copy of an image ``[1, *spatial]``, a random fraction of its foreground pixels set to the smallest value."""
    inside = foreground_mask(values).flatten().nonzero()[:, 0]
    count = max(1, round(fraction * len(inside)))
    copy = values.clone()
    copy.view(-1)[inside[torch.randperm(len(inside), generator=generator)[:count]]] = values.min()
    return copy
