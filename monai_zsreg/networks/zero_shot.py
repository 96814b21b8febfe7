# SPDX-License-Identifier: Apache-2.0
"""The paper's pipeline as one network: features, keypoints, regressor, resampler."""

import os
import warnings
from collections.abc import Sequence
from enum import IntEnum
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_zsreg.errors import require
from monai_zsreg.networks.coordinates import (
    AffineResampler,
    compose,
    index_to_unit,
    map_points,
    theta_from_unit,
    without_padding,
)
from monai_zsreg.networks.keypoints import CenterOfMass, KeypointDetector
from monai_zsreg.networks.least_squares import LeastSquaresAffine
from monai_zsreg.networks.regressors import AffineRegressor
from monai_zsreg.networks.vgg import VGG19Features

ESTIMATORS = ("mlp", "least_squares", "consensus")


class Status(IntEnum):
    """How an estimate ended."""

    OK = 0
    TOO_FEW_POINTS = 1
    FLAT_POINTS = 2
    MIRRORED = 3
    UNDETERMINED = 4

    @property
    def reason(self) -> str:
        """In words."""
        return (
            "estimated",
            "too few feature maps have a keypoint in both images",
            "the keypoints lie on one line (in 3D: on one plane)",
            "the estimated matrix has a determinant of 0 or below (a mirror image or a collapse)",
            "too few keypoints of the two images agree on one transform",
        )[self]


class AffineEstimate(NamedTuple):
    """What `ZeroShotAffineNet.estimate` found for B pairs.

    Attributes:
        matrix: ``[B, D, D+1]``, fixed to moving unit coordinates of the pair's grid; NaN where ``status`` is not 0.
        status: ``[B]``, values of `Status`.
        fixed_points: ``[B, K, D]``, keypoints of the fixed image, unit coordinates.
        moving_points: ``[B, K, D]``, keypoints of the moving image as given (before any iteration), paired by position.
        valid: ``[B, K]``, True where both images have the keypoint.
        iterations: ``[B]``, passes that changed the estimate.
    """

    matrix: Tensor
    status: Tensor
    fixed_points: Tensor
    moving_points: Tensor
    valid: Tensor
    iterations: Tensor


class ZeroShotAffineNet(nn.Module):
    """Registers pairs on one grid by VGG-19 keypoints, with nothing learned from medical images.

    1. Each image is scaled by its percentiles to [0, 1] and padded with the background value (section 2.2).
    2. Keypoints: centers of mass of the thresholded feature maps (2.3, 2.4).
    3. ``num_sets`` draws of ``num_points`` pairs each go through the regressor; the matrices are averaged (2.5).
    4. The moving image is resampled from the original and the steps repeat on it: ``T <- T (I + rate (M - I))``,
       until an update moves no corner of the image by more than ``tolerance`` of its longest side, or for
       ``iterations`` passes (2.8).

    The parameters' defaults are the paper's. A pair that cannot be estimated is reported in the status, its matrix is
    NaN and ``forward`` returns its moving image as it was, with a warning; nothing is made up.

    Args:
        spatial_dims: D, 2 or 3.
        transform: ``"rigid"``, ``"similarity"`` or ``"affine"``.
        estimator: ``"mlp"``, the paper's regressor; ``"least_squares"``, the closed form in its place;
            ``"consensus"``, the closed form over those of all pairs that agree.
        num_points: keypoints in a set.
        num_sets: sets averaged. Not used by ``"consensus"``, which looks at all pairs at once.
        threshold: fraction of a map's maximum below which it is cut (eq. 1).
        symmetric: equalize the histogram of the foreground, and add the response to the negative, see
            `KeypointDetector`.
        scales: factors by which copies of the image are shrunk for more keypoints.
        iterations: largest number of passes.
        rate: learning rate of a pass, above 0 and at most 1.
        tolerance: see step 4.
        coarse_passes: the first so many passes of ``"consensus"`` fit a similarity, because a few wrong pairs that
            agree by accident look like shear far more often than like a rotation.
        padding: added on every side, as a fraction of the longest side.
        consensus_threshold: residual at which a pair stops counting in the first pass, as a fraction of the longest
            padded side. Each later pass halves it, down to 0.009 in 2D and 0.018 in 3D.
        hidden: widths of the regressor's hidden layers; those of the shipped networks if empty.
        normalize: see `AffineRegressor`.
        vgg19_weights: see `VGG19Features`.
        seed: seed of the draws. One object gives one input the same answer every time.

    Example::

        net = ZeroShotAffineNet(vgg19_weights="vgg19-dcbb9e9d.pth")
        net.load_state_dict(torch.load("model.pt", weights_only=True))
        moved = net(torch.stack([moving, fixed], dim=1))  # [B, 2, H, W] to [B, 1, H, W]
    """

    draws: Tensor
    corners: Tensor

    def __init__(
        self,
        spatial_dims: int = 2,
        transform: str = "affine",
        estimator: str = "mlp",
        num_points: int = 64,
        num_sets: int = 10,
        threshold: float = 0.95,
        symmetric: bool = False,
        scales: tuple[int, ...] = (1,),
        iterations: int = 1,
        rate: float = 1.0,
        tolerance: float = 2e-4,
        coarse_passes: int = 0,
        padding: float = 0.25,
        consensus_threshold: float = 0.07,
        hidden: Sequence[int] = (),
        normalize: bool = True,
        vgg19_weights: str | os.PathLike | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, good, allowed in (
            ("spatial_dims", spatial_dims, spatial_dims in (2, 3), "2 or 3"),
            ("estimator", estimator, estimator in ESTIMATORS, f"one of {ESTIMATORS}"),
            ("num_points", num_points, _is_whole(num_points, spatial_dims + 1), "a whole number above spatial_dims"),
            ("num_sets", num_sets, _is_whole(num_sets, 1), "a whole number of at least 1"),
            ("iterations", iterations, _is_whole(iterations, 1), "a whole number of at least 1"),
            ("rate", rate, 0.0 < rate <= 1.0, "0 < rate <= 1"),
            ("padding", padding, 0.0 <= padding <= 2.0, "0 <= padding <= 2"),
            ("consensus_threshold", consensus_threshold, consensus_threshold > 0.0, "a positive number"),
        ):
            require(good, name, value, allowed)
        self.spatial_dims = spatial_dims
        self.consensus = estimator == "consensus"
        self.num_points = num_points
        self.num_sets = num_sets
        self.iterations = iterations
        self.rate = float(rate)
        self.tolerance = float(tolerance)
        # the last pass is never a coarse one
        self.coarse_passes = min(coarse_passes, iterations - 1) if self.consensus and transform == "affine" else 0
        self.padding = float(padding)
        self.consensus_threshold = float(consensus_threshold)
        self.final_threshold = 0.009 if spatial_dims == 2 else 0.018
        # in the last pass, 0.073 and more (3D: 0.16) of the keypoints of real pairs that were registered right agreed;
        # of pairs with nothing to find, or registered wrong, 0.062 and less (3D: 0.065)
        least_agreement = 0.068 if spatial_dims == 2 else 0.1
        self.features = VGG19Features(vgg19_weights)
        self.keypoints = KeypointDetector(self.features, CenterOfMass(threshold), symmetric, scales=scales)
        self.resampler = AffineResampler()
        self.coarse = LeastSquaresAffine(spatial_dims, "similarity", True, seed=seed)
        self.regressor: nn.Module
        if estimator == "mlp":
            widths = {"hidden": tuple(hidden)} if hidden else {}
            self.regressor = AffineRegressor(spatial_dims, num_points, transform, normalize=normalize, **widths)
        else:
            self.regressor = LeastSquaresAffine(
                spatial_dims, transform, self.consensus, least_agreement=least_agreement, seed=seed
            )
        draws = torch.rand(num_sets, num_points, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("draws", draws, persistent=False)
        corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * spatial_dims)
        self.register_buffer("corners", corners, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Put the moving image on the fixed image, 0 outside: ``[B, 1, *spatial]``, from a pair as `estimate` takes."""
        estimate = self.estimate(image)
        failed = estimate.status > 0
        if bool(failed.any()):
            warnings.warn(
                "some pairs could not be registered: their moving images come back as they were", stacklevel=2
            )
        size: list[int] = list(image.shape[2:])
        moved = self.resampler(image[:, :1], theta_from_unit(estimate.matrix.nan_to_num(), size), size)
        return torch.where(failed.view([-1] + [1] * (image.dim() - 1)), image[:, :1], moved)

    @torch.jit.export
    def estimate(self, image: Tensor) -> AffineEstimate:
        """The matrices with how they came about, from ``image`` ``[B, 2, *spatial]``: channel 0 moving, channel 1
        fixed, on one isotropic grid."""
        if not torch.jit.is_scripting():
            axes = ", ".join("HWD"[: self.spatial_dims])
            fits = image.dim() == self.spatial_dims + 2 and image.shape[1] == 2
            require(fits, "image", tuple(image.shape), f"[B, 2, {axes}], channel 0 moving, 1 fixed")
        longest = float(max(list(image.shape[2:])))
        margin = int(self.padding * longest)
        side = longest + 2.0 * margin
        scaled = F.pad(scale_to_unit_range(image.float()), [margin, margin] * self.spatial_dims)
        moving, fixed = scaled[:, :1], scaled[:, 1:]
        moving_foreground, fixed_foreground = foreground(moving), foreground(fixed)
        if self.keypoints.symmetric:
            moving = equalize(moving, moving_foreground, self.keypoints.level)
            fixed = equalize(fixed, fixed_foreground, self.keypoints.level)
        size: list[int] = list(fixed.shape[2:])

        fixed_points, fixed_valid = self._detect(fixed, fixed_foreground, side)
        points, valid = self._detect(moving, moving_foreground, side)
        first_points, both = points, fixed_valid & valid
        batch = image.shape[0]
        identity = torch.eye(self.spatial_dims, self.spatial_dims + 1, device=image.device).expand(batch, -1, -1)
        total = identity
        status = torch.zeros(batch, dtype=torch.long, device=image.device)
        passes = torch.zeros_like(status)
        active = torch.ones(batch, dtype=torch.bool, device=image.device)
        for step in range(self.iterations):
            if step > 0:
                theta = theta_from_unit(total, size)
                warped = self.resampler(moving, theta, size)
                warped_foreground = (self.resampler(moving_foreground, theta, size) > 0.5).to(warped.dtype)
                points, valid = self._detect(warped, warped_foreground, side)
            paired = valid & fixed_valid
            matrix = self._regress(fixed_points, points, paired, step)
            code = _judge(matrix, fixed_points, points, paired)
            status = torch.where(active, code, status)
            active = active & (code == 0)
            update = identity + self.rate * (matrix.nan_to_num() - identity)
            total = torch.where(active.view(-1, 1, 1), compose(total, update), total)
            passes = passes + active.long()
            moved = torch.linalg.vector_norm(map_points(update, self.corners) - self.corners, dim=2).amax(dim=1)
            if step >= self.coarse_passes:
                active = active & (moved > self.tolerance)
            if not bool(active.any()):
                break
        first_points, _ = without_padding(first_points, total, float(margin), longest)
        fixed_points, total = without_padding(fixed_points, total, float(margin), longest)
        total = torch.where((status > 0).view(-1, 1, 1), torch.full_like(total, float("nan")), total)
        return AffineEstimate(total, status, fixed_points, first_points, both, passes)

    def _detect(self, image: Tensor, inside: Tensor, side: float) -> tuple[Tensor, Tensor]:
        points, valid = self.keypoints(image, inside)
        return index_to_unit(points, side), valid

    def _regress(self, fixed_points: Tensor, moving_points: Tensor, valid: Tensor, step: int) -> Tensor:
        """One matrix a pair, ``[B, D, D+1]``, fixed to moving unit coordinates."""
        if self.consensus:
            return self._agree(fixed_points, moving_points, valid, step)
        batch, dims = fixed_points.shape[0], self.spatial_dims
        # the keypoints of each set, drawn with replacement from the valid ones, whatever the other pairs are
        order = valid.int().argsort(dim=1, descending=True, stable=True)
        position = (self.draws.flatten() * valid.sum(dim=1, keepdim=True).clamp(min=1)).long()
        chosen = order.gather(1, position.clamp(max=valid.shape[1] - 1)).unsqueeze(2).expand(-1, -1, dims)
        shape = [batch * self.num_sets, -1, dims]
        x, y = fixed_points.gather(1, chosen).reshape(shape), moving_points.gather(1, chosen).reshape(shape)
        return self.regressor(x, y).reshape(batch, self.num_sets, dims, dims + 1).mean(dim=1)

    @torch.jit.unused
    def _agree(self, fixed_points: Tensor, moving_points: Tensor, valid: Tensor, step: int) -> Tensor:
        threshold = max(self.consensus_threshold * 0.5**step, self.final_threshold)
        estimator = self.coarse if step < self.coarse_passes else self.regressor
        return estimator(fixed_points, moving_points, valid.to(fixed_points.dtype), threshold)


def scale_to_unit_range(image: Tensor) -> Tensor:
    """Scale each channel of images ``[B, C, *spatial]`` by its 0.5 (the background) and 99.5 percentiles to [0, 1] and
    clip (section 2.2); a constant channel becomes 0."""
    flat = image.flatten(2)
    step = 1 + flat.shape[2] // 4000000  # quantiles need no more, and sorting dominates beyond
    ends = torch.tensor([0.005, 0.995], dtype=flat.dtype, device=flat.device)
    values = torch.quantile(flat[:, :, ::step], ends, dim=2)
    bottom, top = values[0].unsqueeze(2), values[1].unsqueeze(2)
    # less than the upper percentile of a mostly empty image may be its background
    narrow = top <= bottom
    bottom = torch.where(narrow, flat.amin(dim=2, keepdim=True), bottom)
    top = torch.where(narrow, flat.amax(dim=2, keepdim=True), top)
    spread = torch.where(top > bottom, top - bottom, torch.ones_like(top))
    return ((flat - bottom) / spread).clamp(0.0, 1.0).view(image.shape)


def equalize(image: Tensor, inside: Tensor, level: float) -> Tensor:
    """Replace intensities in [0, 1] by their rank in the foreground ``inside``, from ``level`` to 1; others become 0.
    Two contrasts of one anatomy that are monotone functions of one another, rising or falling, then differ by no more
    than a negative. Both are ``[B, 1, *spatial]``."""
    index = (image.flatten(1) * 255.0).round().long()
    weight = inside.flatten(1)
    counts = torch.zeros(image.shape[0], 256, dtype=image.dtype, device=image.device).scatter_add(1, index, weight)
    # the middle of a bin's ranks, so that ties keep their place
    rank = (counts.cumsum(dim=1) - 0.5 * counts) / counts.sum(dim=1, keepdim=True).clamp(min=1.0)
    return ((level + (1.0 - level) * rank.gather(1, index)) * weight).view(image.shape)


def foreground(image: Tensor) -> Tensor:
    """1 where a scaled image ``[B, 1, *spatial]`` exceeds 0.05, else 0: what stands out of a dark background.

    `monai_zsreg.foreground.appearance` branches on each image's values, which a batch in TorchScript cannot.
    """
    return (image > 0.05).to(image.dtype)


def _judge(matrix: Tensor, fixed_points: Tensor, moving_points: Tensor, valid: Tensor) -> Tensor:
    """`Status` codes ``[B]`` of one pass."""
    dims = matrix.shape[1]
    finite = matrix.flatten(1).isfinite().all(dim=1)
    mirrored = torch.linalg.det(matrix[:, :, :dims].nan_to_num()) <= 0
    code = torch.where(finite, torch.where(mirrored, 3, 0), 4)
    flat = _is_flat(fixed_points, valid) | _is_flat(moving_points, valid)
    code = torch.where(flat, torch.full_like(code, 2), code)
    return torch.where(valid.sum(dim=1) < dims + 1, torch.full_like(code, 1), code)


def _is_flat(points: Tensor, valid: Tensor) -> Tensor:
    """True ``[B]`` where unit points spread along one direction by less than 1e-3 of another, or than 1e-4: keypoints
    of a constant image all lie at its center but for rounding."""
    weight = valid.to(points.dtype).unsqueeze(2)
    total = weight.sum(dim=1, keepdim=True).clamp(min=1.0)
    centered = ((points - (weight * points).sum(dim=1, keepdim=True) / total) * weight).double()
    spread = torch.linalg.eigvalsh(centered.transpose(1, 2) @ centered)
    return spread[:, 0] <= torch.maximum(1e-6 * spread[:, -1], 1e-8 * total[:, 0, 0].double())


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
