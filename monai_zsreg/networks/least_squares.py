# SPDX-License-Identifier: Apache-2.0
"""Closed-form transforms from point pairs, alone or by consensus: the alternative to the paper's regressor."""

import torch
from torch import Tensor, nn

from monai_zsreg.errors import require
from monai_zsreg.networks.coordinates import map_points

TRANSFORMS = ("rigid", "similarity", "affine")
_SCALES = (0.6, 1.6)
_SUBSETS = 4096


def check_kind(transform: str, spatial_dims: int) -> None:
    """Raise a RegistrationError for an unknown kind of transform or number of dimensions."""
    require(spatial_dims in (2, 3), "spatial_dims", spatial_dims, "2 or 3")
    require(transform in TRANSFORMS, "transform", transform, f"one of {TRANSFORMS}")


class LeastSquaresAffine(nn.Module):
    """Weighted least squares from fixed to moving points, optionally after finding the pairs that agree.

    The affine solution comes from the normal equations of the centered points, the rigid and the similarity solution
    from Umeyama's closed form, which never mirrors.

    With ``consensus`` (RANSAC with the truncated quadratic score of MSAC), a transform is fitted to each of 4096 random
    subsets of D pairs: a rotation and shift for ``"rigid"``, else a similarity, which needs fewer points and lets fewer
    accidents through than an affine map; scales beyond 0.6 to 1.6 are dropped. The one that most pairs agree with is
    refitted to those, with weights that fall off smoothly with the residual. The subsets are drawn with a fixed seed,
    so one input has one answer, and a pair's answer does not depend on its neighbors in the batch.

    Points that do not determine the transform (fewer than D + 1, or D for rigid and similarity; all on one line, in
    3D on one plane; fewer that agree than ``least_agreement``) give a matrix of NaN: the caller must look.

    Args:
        spatial_dims: D, 2 or 3.
        transform: ``"rigid"``, ``"similarity"`` or ``"affine"``.
        consensus: look for agreeing pairs first.
        least_agreement: fraction of the weight that must agree, from 0 to 1, for the consensus to count.
        seed: seed of the subsets.

    References:
        Umeyama, IEEE TPAMI 13 (1991). Fischler and Bolles, CACM 24 (1981). Torr and Zisserman, MLESAC (2000).
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        transform: str = "affine",
        consensus: bool = False,
        least_agreement: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_kind(transform, spatial_dims)
        self.spatial_dims = spatial_dims
        self.transform = transform
        self.consensus = consensus
        self.least_agreement = float(least_agreement)
        self.seed = int(seed)

    def forward(
        self, fixed_points: Tensor, moving_points: Tensor, weights: Tensor | None = None, threshold: float = 0.03
    ) -> Tensor:
        """Estimate.

        Args:
            fixed_points, moving_points: ``[B, N, D]``, paired by position.
            weights: ``[B, N]``, not negative; 0 leaves a pair out. All 1 if None.
            threshold: residual beyond which a pair disagrees, in the unit of the points.

        Returns:
            ``[B, D, D+1]``, fixed to moving; NaN where the points do not determine it.
        """
        if not torch.jit.is_scripting():
            shapes = f"[B, N, {self.spatial_dims}], fixed and moving alike (fixed: {tuple(fixed_points.shape)})"
            for name, points in (("fixed_points", fixed_points), ("moving_points", moving_points)):
                alike = points.dim() == 3 and points.shape == fixed_points.shape
                require(alike and points.shape[2] == self.spatial_dims, name, tuple(points.shape), shapes)
        if weights is None:
            weights = torch.ones_like(fixed_points[..., 0])
        if self.consensus:
            agreed = weights * self.agreement(fixed_points, moving_points, weights, threshold)
            enough = agreed.sum(dim=1, keepdim=True) >= self.least_agreement * weights.sum(dim=1, keepdim=True)
            weights = agreed * enough.to(agreed.dtype)
        return _fit(fixed_points, moving_points, weights, self.transform)

    @torch.jit.unused
    def agreement(self, fixed_points: Tensor, moving_points: Tensor, weights: Tensor, threshold: float) -> Tensor:
        """Weights ``[B, N]`` in [0, 1] of the pairs that agree on one transform; 0 for those that do not."""
        batch, count, dims = fixed_points.shape
        if count < dims:
            return torch.zeros_like(weights)
        kind = "rigid" if self.transform == "rigid" else "similarity"
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.rand(_SUBSETS, count, generator=generator).to(fixed_points)
        # valid pairs come first, so a subset holds an invalid one only where there are too few
        subset = (order + (weights > 0).to(order).unsqueeze(1)).topk(dims, dim=2).indices.flatten(1)  # [B, H * D]
        picked = subset.unsqueeze(2).expand(-1, -1, dims)
        shape = (batch * _SUBSETS, dims, dims)
        x, y = fixed_points.gather(1, picked).view(shape), moving_points.gather(1, picked).view(shape)
        matrix, scale = _fit_subsets(x, y, kind)
        # a subset with an invalid pair, or of points on one another, gives no transform
        low, high = _SCALES
        valid = (weights.gather(1, subset).view(shape[:2]) > 0).all(dim=1)
        plausible = ((scale >= low) & (scale <= high) & valid).view(batch, -1)
        matrix = torch.where(plausible[..., None, None], matrix.view(batch, -1, dims, dims + 1), 0.0)
        residual = (map_points(matrix, fixed_points.unsqueeze(1)) - moving_points.unsqueeze(1)).norm(dim=-1)
        score = (_falloff(residual, threshold) * weights.unsqueeze(1)).sum(dim=2) * plausible
        best = score.argmax(dim=1)
        rows = torch.arange(batch, device=best.device)
        agreed = _falloff(residual[rows, best], threshold) * plausible[rows, best].unsqueeze(1)
        for _ in range(5):
            refined = _fit(fixed_points, moving_points, weights * agreed, kind)
            residual = (map_points(refined, fixed_points) - moving_points).norm(dim=-1)
            # a refit that is no longer determined keeps the weights it had
            agreed = torch.where(residual.isnan(), agreed, _falloff(residual, threshold))
        return agreed


def _falloff(residual: Tensor, threshold: float) -> Tensor:
    return (1.0 - (residual / threshold) ** 2).clamp(min=0.0)


def _fit_subsets(x: Tensor, y: Tensor, transform: str) -> tuple[Tensor, Tensor]:
    """Rigid or similarity transforms ``[H, D, D+1]`` that lay the frame of D points ``x [H, D, D]`` on that of ``y``:
    exact along their first edge, and without an SVD. And their scales ``[H]``, 0 where they are not determined."""
    size_x, size_y = ((points - points.mean(dim=1, keepdim=True)).flatten(1).norm(dim=1) for points in (x, y))
    scale = size_y / size_x.clamp(min=1e-12)
    linear = _frame(y).transpose(1, 2) @ _frame(x)
    if transform == "similarity":
        linear = linear * scale.view(-1, 1, 1)
    shift = y.mean(dim=1) - (linear @ x.mean(dim=1).unsqueeze(2)).squeeze(2)
    matrix = torch.cat([linear, shift.unsqueeze(2)], dim=2)
    bad = ~matrix.isfinite().flatten(1).all(dim=1) | (size_x < 1e-6)
    return matrix.masked_fill(bad.view(-1, 1, 1), 0.0), scale.masked_fill(bad, 0.0)


def _frame(points: Tensor) -> Tensor:
    """Right-handed orthonormal frames ``[H, D, D]`` (rows) along the edges from the first of D points."""
    first = points[:, 1] - points[:, 0]
    first = first / first.norm(dim=1, keepdim=True)
    if points.shape[2] == 2:
        return torch.stack([first, torch.stack([-first[:, 1], first[:, 0]], dim=1)], dim=1)
    second = points[:, 2] - points[:, 0]
    second = second - (second * first).sum(dim=1, keepdim=True) * first
    second = second / second.norm(dim=1, keepdim=True)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=1)


def _fit(fixed_points: Tensor, moving_points: Tensor, weights: Tensor, transform: str) -> Tensor:
    """Weighted least-squares fit ``[B, D, D+1]``; NaN where the least spread of the fixed points is below 1e-3 of the
    largest."""
    dims = fixed_points.shape[2]
    # single precision loses the small spread of close points
    x, y, w = fixed_points.double(), moving_points.double(), weights.double().unsqueeze(2)
    total = w.sum(dim=1, keepdim=True)
    w = w / torch.where(total > 0, total, torch.ones_like(total))
    x_mean, y_mean = (w * x).sum(dim=1, keepdim=True), (w * y).sum(dim=1, keepdim=True)
    x, y = x - x_mean, y - y_mean
    spread = (w * x).transpose(1, 2) @ x
    cross = (w * y).transpose(1, 2) @ x
    eigenvalues = torch.linalg.eigvalsh(spread)
    # a rotation needs points that span all dimensions but one, an affine map all of them
    smallest = eigenvalues[:, 0 if transform == "affine" else 1]
    determined = (total[:, 0, 0] > 0) & (smallest > 1e-6 * eigenvalues[:, dims - 1]) & (smallest > 1e-20)
    known = determined.view(-1, 1, 1)
    eye = torch.eye(dims, dtype=x.dtype, device=x.device)
    if transform == "affine":
        linear = torch.linalg.solve(torch.where(known, spread, eye), cross.transpose(1, 2)).transpose(1, 2)
    else:
        u, s, vt = torch.linalg.svd(torch.where(known, cross, eye))
        sign = torch.ones_like(s)
        sign[:, dims - 1] = torch.where(torch.linalg.det(u @ vt) < 0, -1.0, 1.0).to(s.dtype)
        linear = (u * sign.unsqueeze(1)) @ vt
        if transform == "similarity":
            variance = eigenvalues.sum(dim=1).clamp(min=1e-20)
            linear = linear * ((s * sign).sum(dim=1) / variance).view(-1, 1, 1)
    shift = y_mean.transpose(1, 2) - linear @ x_mean.transpose(1, 2)
    matrix = torch.cat([linear, shift], dim=2)
    return torch.where(known, matrix, torch.full_like(matrix, float("nan"))).to(fixed_points.dtype)
