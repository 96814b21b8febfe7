# SPDX-License-Identifier: Apache-2.0
"""The network that turns pairs of keypoints into an affine matrix (section 2.5 and figure 2), and its weights.

It never sees an image, so one trained network serves every modality; the training data are random points, see
:mod:`monai_zsreg.training`.
"""

# no "from __future__ import annotations" here: torch.jit.script reads the annotations of this module
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_zsreg.errors import RegistrationError, require
from monai_zsreg.networks.least_squares import TRANSFORMS, check_kind


def number_of_outputs(transform: str, spatial_dims: int) -> int:
    """How many raw numbers the last layer gives for a transform (a RegistrationError for others); no two give the same.

    affine: the D x (D+1) matrix entries. rigid: rotation (2 numbers in 2D, 6 in 3D) and D translations. similarity: one
    more, the logarithm of the scale.
    """
    check_kind(transform, spatial_dims)
    return spatial_dims**2 + {"affine": spatial_dims, "similarity": 1, "rigid": 0}[transform]


class AffineRegressor(nn.Module):
    """The paper's transformation network: an MLP with ReLU and a linear last layer (section 2.5, figure 2).

    Every pair enters as (x, y, x', y'), in 3D (x, y, z, x', y', z'), the pairs one after the other, in unit
    coordinates (see `monai_zsreg.networks.coordinates`).

    The first layer starts with the same weights for every pair and no weight between pairs, the second with the same
    weights for every pair: at the start the network cannot tell the pairs apart, as the task demands. All weights are
    free and train separately from there. An MLP of this size with an ordinary random start ended at three times
    the error after the same time.

    Args:
        spatial_dims: D, 2 or 3.
        num_points: number of pairs, N (paper: 64).
        transform: "affine", "similarity" (rotation, one positive scale, translation) or "rigid" (no scale). The matrix
            is always exactly of that kind. An affine one may have a determinant of 0 or below: look at it before use.
        hidden: widths of the hidden layers, at least one. ``num_points`` or a multiple suits the first best.
        normalize: shift both point sets of a pair to mean 0 and scale both by one factor (aspect ratio kept) that gives
            the fixed points spread 1; take the matrix back afterwards. Keypoints of real images cluster; without this
            the network meets them outside of its training's range. False: the points as they come, the paper's
            literal reading.

    Example::

        network = AffineRegressor(spatial_dims=2, transform="rigid")
        matrix = network(points, points)  # twice [B, 64, 2] to [B, 2, 3]
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        num_points: int = 64,
        transform: str = "affine",
        hidden: Sequence[int] = (2048, 256, 256, 128),
        normalize: bool = True,
    ) -> None:
        super().__init__()
        outputs = number_of_outputs(transform, spatial_dims)
        enough = type(num_points) is int and num_points > spatial_dims
        require(enough, "num_points", num_points, f"a whole number of at least {spatial_dims + 1}")
        whole = isinstance(hidden, Sequence) and all(type(width) is int and width > 0 for width in hidden)
        require(whole and len(hidden) > 0, "hidden", hidden, "one or more layer widths, whole numbers of at least 1")
        self.spatial_dims = spatial_dims
        self.num_points = num_points
        self.transform = transform
        self.hidden = tuple(hidden)
        self.normalize = bool(normalize)
        # spread of the moving points in training for fixed points of spread 1: M ~ U(-1, 1), Y = M X (section 2.5)
        self.moving_std = math.sqrt(spatial_dims / 3.0)

        widths = [num_points * 2 * spatial_dims, *hidden]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
        self.reset_parameters()

    @torch.jit.unused
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator; see the class for what is special about them."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for layer in linear:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.uniform_(layer.bias, -0.5, 0.5)
        # small outputs at the start: the mean of all targets is near zero
        linear[-1].weight.mul_(0.3)
        linear[-1].bias.zero_()

        first, second = linear[0], linear[1]
        units = first.out_features // self.num_points
        if units == 0:  # too narrow for units of its own for every pair
            return
        shared = units * self.num_points
        weight = torch.randn(units, 2 * self.spatial_dims) / math.sqrt(self.spatial_dims)
        bias = torch.rand(units) * 2 - 1
        first.weight[:shared] = torch.block_diag(*[weight] * self.num_points)
        first.bias[:shared] = bias.repeat(self.num_points)
        # a mean over the pairs varies less than one pair; the factor 2 makes up for a part of that
        weight = torch.randn(second.out_features, units) * math.sqrt(2 / units) * 2 / self.num_points
        second.weight[:, :shared] = weight.repeat(1, self.num_points)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], normalize: bool = True) -> "AffineRegressor":
        """Build the network that a state dict belongs to, load it strictly, and put it in evaluation mode.

        Args:
            state: parameters by name, with or without a prefix such as the "regressor." of a `ZeroShotAffineNet`; their
                shapes tell the arguments. A RegistrationError for those of anything else.
            normalize: as the network was trained.
        """
        own = {name[max(0, name.rfind("layers.")) :]: value for name, value in state.items()}
        weights = [value for name, value in own.items() if name.startswith("layers.") and name.endswith(".weight")]
        kinds = {number_of_outputs(transform, dims): (dims, transform) for dims in (2, 3) for transform in TRANSFORMS}
        try:
            dims, transform = kinds[len(weights[-1])]
            hidden = [len(weight) for weight in weights[:-1]]
            network = cls(dims, weights[0].shape[1] // (2 * dims), transform, hidden, normalize)
            network.load_state_dict(own)
        except (RuntimeError, LookupError, TypeError, RegistrationError) as error:
            allowed = f"an AffineRegressor's parameters, layers.0.weight and so on ({error})"
            raise RegistrationError("state", list(state), allowed) from error
        return network.eval()

    def forward(self, fixed_points: Tensor, moving_points: Tensor) -> Tensor:
        """Estimate one matrix for each set of pairs.

        Args:
            fixed_points, moving_points: ``[B, N, D]``, unit coordinates, paired by position.

        Returns:
            ``[B, D, D+1]``: maps fixed to moving unit coordinates.
        """
        if not torch.jit.is_scripting():
            wanted = f"floats [B, {self.num_points}, {self.spatial_dims}], B alike for fixed and moving"
            for name, points in (("fixed_points", fixed_points), ("moving_points", moving_points)):
                fits = tuple(points.shape) == (len(fixed_points), self.num_points, self.spatial_dims)
                require(fits and points.is_floating_point(), name, f"{tuple(points.shape)} {points.dtype}", wanted)
        fixed_center = torch.full_like(fixed_points[:, :1], 0.5)
        moving_center = torch.zeros_like(fixed_center)
        spread = torch.full_like(fixed_center[..., :1], math.sqrt(1.0 / 12.0))  # of U(0, 1)
        if self.normalize:
            fixed_center = fixed_points.mean(dim=1, keepdim=True)
            moving_center = moving_points.mean(dim=1, keepdim=True)
            # the small number keeps the gradient finite where all points coincide
            spread = ((fixed_points - fixed_center).square().mean(dim=[1, 2], keepdim=True) + 1e-12).sqrt()
        fixed = (fixed_points - fixed_center) / spread
        moving = (moving_points - moving_center) / (spread * self.moving_std)
        linear, translation = self._matrix(self.layers(torch.cat([fixed, moving], dim=-1).flatten(1)))
        if self.normalize:  # back to the frame of the points
            translation = spread * translation + moving_center - fixed_center @ linear.transpose(1, 2)
        return torch.cat([linear, translation.transpose(1, 2)], dim=-1)

    def _matrix(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The linear part ``[B, D, D]`` and the translation ``[B, 1, D]`` from the raw outputs ``[B, ...]``."""
        dims = self.spatial_dims
        if self.transform == "affine":
            matrix = raw.reshape(-1, dims, dims + 1)
            return matrix[..., :dims], matrix[..., dims].unsqueeze(1)
        linear = _rotation(raw[:, : dims * (dims - 1)], dims)
        if self.transform == "similarity":
            # within bounds, so that the scale is always positive and finite
            linear = linear * raw[:, -dims - 1].clamp(-5.0, 5.0).exp()[:, None, None]
        return linear, raw[:, -dims:].unsqueeze(1)


def _direction(vector: Tensor, fallback: Tensor) -> Tensor:
    """``vector`` ``[..., D]`` scaled to length 1, or ``fallback`` where it has no direction."""
    shortest = 1e-8
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return torch.where(length > shortest, vector / length.clamp(min=shortest), fallback)


def _axes(index: Tensor, raw: Tensor, dims: int) -> Tensor:
    """The axes ``[B, D]`` of these numbers ``[B]`` as unit vectors, in the type of ``raw``."""
    return F.one_hot(index, dims).to(raw.dtype)


def _rotation(raw: Tensor, dims: int) -> Tensor:
    """Rotation ``[B, D, D]`` from D - 1 directions ``[B, D (D - 1)]`` by Gram-Schmidt: continuous, unlike angles or
    quaternions (Zhou et al., On the Continuity of Rotation Representations in Neural Networks, CVPR 2019)."""
    first = _direction(raw[:, :dims], _axes(torch.zeros_like(raw[:, 0]).long(), raw, dims))
    if dims == 2:
        return torch.stack([first, torch.stack([-first[:, 1], first[:, 0]], dim=-1)], dim=-1)
    # should the second direction be parallel to the first, any direction at a right angle to it will do
    axis = _axes(first.abs().argmin(dim=-1), raw, dims)
    perpendicular = _direction(torch.linalg.cross(first, axis, dim=-1), axis)
    second = raw[:, dims:]
    for _ in range(2):  # after a cancellation the first pass leaves a remainder along ``first``
        second = _direction(second - (first * second).sum(dim=-1, keepdim=True) * first, perpendicular)
    return torch.stack([first, second, torch.linalg.cross(first, second, dim=-1)], dim=-1)


def shipped_weights(spatial_dims: int) -> Path:
    """The shipped state dict of the affine regressor for 2 or 3 spatial dimensions; a RegistrationError without it.

    An installed package holds the bundle's ``models`` folder as ``monai_zsreg/pretrained_models``; a checkout has it
    in the bundle.
    """
    package = Path(__file__).parents[1]
    bundle = package.parent / "bundles" / "zero_shot_affine_registration"
    file = "model.pt" if spatial_dims == 2 else "model_3d.pt"
    for folder in (package / "pretrained_models", bundle / "models"):
        if (folder / file).is_file():
            return folder / file
    raise RegistrationError("regressor_weights", None, f"a state dict file: this installation lacks the shipped {file}")


def training_facts(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON that training wrote beside a state dict; empty if there is none."""
    beside = Path(path).with_suffix(".json")
    return json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}


def load_regressor(path: str | os.PathLike, argument: str = "regressor_weights") -> AffineRegressor:
    """Load a network from a plain state dict, such as the bundle's ``models/model.pt``; half precision becomes single.

    The shapes of the parameters tell the architecture. Only whether it was trained without ``normalize`` comes from the
    JSON beside the file, if there is one. A RegistrationError that names ``argument`` where this is no such file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return AffineRegressor.from_state_dict(state, bool(training_facts(path).get("normalize", True)))
    except Exception as error:  # torch.load raises a dozen kinds; all mean that this file will not do
        expected = f"a regressor's state dict ({type(error).__name__}: {error})"
        raise RegistrationError(argument, os.fspath(path), expected) from error
