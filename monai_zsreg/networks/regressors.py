# SPDX-License-Identifier: Apache-2.0
"""The network that turns pairs of keypoints into an affine matrix (paper, section 2.5 and figure 2).

``AffineRegressor`` is a multi-layer perceptron over the flattened pairs. It never sees an image, so one trained network
serves every modality; the training data are random points, see :mod:`monai_zsreg.training`.
"""

# no "from __future__ import annotations" here: torch.jit.script reads the annotations of this module
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_zsreg.errors import RegistrationError
from monai_zsreg.networks.least_squares import TRANSFORMS

__all__ = ["AffineRegressor", "number_of_outputs"]


def number_of_outputs(transform: str, spatial_dims: int) -> int:
    """How many raw numbers the last layer gives for a transform.

    affine: the D x (D+1) matrix entries. rigid: rotation (2 numbers in 2D, 6 in 3D) and D translations. similarity: one
    more, the logarithm of the scale.

    Raises:
        RegistrationError: unknown ``transform`` or ``spatial_dims``.
    """
    if spatial_dims not in (2, 3):
        raise RegistrationError("spatial_dims", spatial_dims, "2 or 3")
    if transform not in TRANSFORMS:
        raise RegistrationError("transform", transform, "one of " + ", ".join(TRANSFORMS))
    if transform == "affine":
        return spatial_dims * (spatial_dims + 1)
    rotation = 2 if spatial_dims == 2 else 6
    return rotation + spatial_dims + (1 if transform == "similarity" else 0)


def _direction(vector: Tensor, fallback: Tensor) -> Tensor:
    """``vector`` ``[..., D]`` scaled to length 1, or ``fallback`` where it has no direction."""
    shortest = 1e-8
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return torch.where(length > shortest, vector / length.clamp(min=shortest), fallback)


def _rotation_2d(raw: Tensor) -> Tensor:
    """Rotation ``[B, 2, 2]`` from (cosine, sine) up to a common positive factor, ``[B, 2]``."""
    fallback = torch.zeros_like(raw)
    fallback[:, 0] = 1.0
    unit = _direction(raw, fallback)
    cosine, sine = unit[:, 0], unit[:, 1]
    return torch.stack([cosine, -sine, sine, cosine], dim=-1).reshape(-1, 2, 2)


def _rotation_3d(raw: Tensor) -> Tensor:
    """Rotation ``[B, 3, 3]`` from two directions ``[B, 6]`` by Gram-Schmidt: continuous, unlike angles or quaternions.

    Zhou et al., On the Continuity of Rotation Representations in Neural Networks, CVPR 2019.
    """
    fallback = torch.zeros_like(raw[:, :3])
    fallback[:, 0] = 1.0
    first = _direction(raw[:, :3], fallback)
    # should the second direction be parallel to the first, any direction at a right angle to it will do
    axis = F.one_hot(first.abs().argmin(dim=-1), 3).to(raw.dtype)
    perpendicular = _direction(torch.linalg.cross(first, axis, dim=-1), axis)
    second = raw[:, 3:]
    second = second - (first * second).sum(dim=-1, keepdim=True) * first
    second = _direction(second, perpendicular)
    # once more: after a cancellation the first pass leaves a remainder along ``first``
    second = _direction(second - (first * second).sum(dim=-1, keepdim=True) * first, perpendicular)
    third = torch.linalg.cross(first, second, dim=-1)
    return torch.stack([first, second, third], dim=-1)


class AffineRegressor(nn.Module):
    """The paper's transformation network: an MLP with ReLU and a linear last layer (section 2.5, figure 2).

    Every pair enters as (x, y, x', y'), in 3D (x, y, z, x', y', z'), the pairs one after the other. Point coordinates
    are "unit" coordinates (array axis order, divided by the longest side, so within [0, 1]) for the fixed points.

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

    Raises:
        RegistrationError: an argument out of range.

    Example::

        >>> import torch
        >>> from monai_zsreg.networks import AffineRegressor
        >>> network = AffineRegressor(spatial_dims=2, transform="rigid")
        >>> points = torch.rand(8, 64, 2)
        >>> network(points, points).shape
        torch.Size([8, 2, 3])
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
        if isinstance(num_points, bool) or not isinstance(num_points, int) or num_points <= spatial_dims:
            raise RegistrationError("num_points", num_points, f"a whole number of at least {spatial_dims + 1}")
        if isinstance(hidden, str) or not isinstance(hidden, Sequence) or len(hidden) == 0:
            raise RegistrationError("hidden", hidden, "a sequence of one or more layer widths")
        if any(isinstance(width, bool) or not isinstance(width, int) or width < 1 for width in hidden):
            raise RegistrationError("hidden", hidden, "layer widths that are whole numbers of at least 1")
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
        pair = 2 * self.spatial_dims
        units = first.out_features // self.num_points
        if units == 0:  # too narrow for units of its own for every pair
            return
        shared = units * self.num_points
        weight = torch.randn(units, pair) / math.sqrt(self.spatial_dims)
        bias = torch.rand(units) * 2 - 1
        first.weight[:shared] = torch.block_diag(*[weight] * self.num_points)
        first.bias[:shared] = bias.repeat(self.num_points)
        # a mean over the pairs varies less than one pair; the factor 2 makes up for a part of that
        weight = torch.randn(second.out_features, units) * math.sqrt(2 / units) * 2 / self.num_points
        second.weight[:, :shared] = weight.repeat(1, self.num_points)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], prefix: str | None = None, normalize: bool = True
    ) -> "AffineRegressor":
        """Build the network that a state dict belongs to, and load it strictly.

        The shapes tell all constructor arguments: every pair of ``transform`` and ``spatial_dims`` has its own number
        of outputs.

        Args:
            state: parameters by name.
            prefix: what the names begin with, as "regressor." in the bundle's ``model.pt``. None: found out.
            normalize: as the network was trained.

        Returns:
            The network, in evaluation mode.

        Raises:
            RegistrationError: these are not the parameters of an ``AffineRegressor``.
        """
        wanted = "layers.0.weight"
        if prefix is None:
            starts = [name[: -len(wanted)] for name in state if name.endswith(wanted)]
            prefix = starts[0] if len(starts) == 1 else ""
        own = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        weights = [value for name, value in own.items() if name.endswith(".weight") and value.ndim == 2]
        outputs = weights[-1].shape[0] if weights else 0
        for transform in TRANSFORMS:
            for spatial_dims in (2, 3):
                if outputs == number_of_outputs(transform, spatial_dims) and wanted in own:
                    network = cls(
                        spatial_dims=spatial_dims,
                        num_points=weights[0].shape[1] // (2 * spatial_dims),
                        transform=transform,
                        hidden=[weight.shape[0] for weight in weights[:-1]],
                        normalize=normalize,
                    )
                    try:
                        network.load_state_dict(own)
                    except RuntimeError as error:
                        raise RegistrationError(
                            "state", list(state), f"parameters of an AffineRegressor ({error})"
                        ) from error
                    return network.eval()
        raise RegistrationError("state", list(state), f"parameters of an AffineRegressor, with a {wanted!r}")

    @torch.jit.unused
    def _check(self, fixed_points: Tensor, moving_points: Tensor) -> None:
        wanted = f"a [B, {self.num_points}, {self.spatial_dims}] tensor of floats"
        for name, points in (("fixed_points", fixed_points), ("moving_points", moving_points)):
            if not isinstance(points, Tensor) or not points.is_floating_point():
                raise RegistrationError(name, points, wanted)
            if points.ndim != 3 or tuple(points.shape[1:]) != (self.num_points, self.spatial_dims):
                raise RegistrationError(name, tuple(points.shape), wanted)
        if len(fixed_points) != len(moving_points):
            raise RegistrationError("moving_points", tuple(moving_points.shape), f"{len(fixed_points)} sets, as fixed")

    def forward(self, fixed_points: Tensor, moving_points: Tensor) -> Tensor:
        """Estimate one matrix for each set of pairs.

        Args:
            fixed_points: ``[B, N, D]``, unit coordinates.
            moving_points: ``[B, N, D]``, unit coordinates; point n belongs to point n of ``fixed_points``.

        Returns:
            ``[B, D, D+1]``: maps fixed to moving unit coordinates.

        Raises:
            RegistrationError: wrong shape or type (not checked in a scripted network).
        """
        if not torch.jit.is_scripting():
            self._check(fixed_points, moving_points)
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
        raw = self.layers(torch.cat([fixed, moving], dim=-1).flatten(1))
        linear, translation = self._matrix(raw)
        if self.normalize:  # back to the frame of the points
            translation = spread * translation + moving_center - fixed_center @ linear.transpose(1, 2)
        return torch.cat([linear, translation.transpose(1, 2)], dim=-1)

    def _matrix(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The linear part ``[B, D, D]`` and the translation ``[B, 1, D]`` from the raw outputs ``[B, ...]``."""
        dims = self.spatial_dims
        if self.transform == "affine":
            matrix = raw.reshape(-1, dims, dims + 1)
            return matrix[..., :dims], matrix[..., dims].unsqueeze(1)
        linear = _rotation_2d(raw[:, :2]) if dims == 2 else _rotation_3d(raw[:, :6])
        if self.transform == "similarity":
            # within bounds, so that the scale is always positive and finite
            linear = linear * raw[:, -dims - 1].clamp(-5.0, 5.0).exp()[:, None, None]
        return linear, raw[:, -dims:].unsqueeze(1)
