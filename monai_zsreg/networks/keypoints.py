# SPDX-License-Identifier: Apache-2.0
"""Keypoints as centers of mass of thresholded feature maps (sections 2.3 and 2.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_zsreg.errors import require
from monai_zsreg.networks.coordinates import shrunk_to_index


class CenterOfMass(nn.Module):
    """One keypoint a map: the center of mass of what exceeds a fraction of the map's maximum.

    The paper's equation 1 sets ``F[F <= threshold * max(F)] = 0``, equation 2 takes the center of mass of the rest.
    Differentiable with respect to the map values that remain.

    Args:
        threshold: the fraction, from 0 (inclusive) to 1 (exclusive).

    Example::

        points, valid = CenterOfMass()(torch.rand(1, 128, 240, 240))  # [1, 128, 2], [1, 128]
    """

    def __init__(self, threshold: float = 0.95) -> None:
        super().__init__()
        require(0.0 <= threshold < 1.0, "threshold", threshold, "0 <= threshold < 1")
        self.threshold = float(threshold)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Keypoints of whole maps ``[B, C, *spatial]`` with any number D of spatial dimensions.

        Returns:
            Points ``[B, C, D]`` in index coordinates, and a mask ``[B, C]``: False where a map has no positive value
            and therefore no keypoint; the point there is 0 and means nothing.
        """
        mass, moment = self.moments(maps, maps.flatten(2).amax(dim=2))
        return self.points(mass, moment)

    def moments(self, maps: Tensor, peak: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mass ``[B, C]`` and first moment ``[B, C, D]`` of maps above ``threshold * peak``.

        They add up over the pieces of a volume, so a volume need not be in memory at once.

        Args:
            maps: ``[B, C, *spatial]``, whole maps or a piece of them.
            peak: ``[B, C]``, maximum of each whole map.
            first: indices of a piece along the first spatial axis; 0, 1, ... if None.
        """
        # a map whose maximum is not positive has no keypoint, so negative values never carry weight
        floor = (self.threshold * peak).clamp(min=0.0).unsqueeze(2)
        flat = maps.flatten(2)
        kept = torch.where(flat > floor, flat, torch.zeros_like(flat)).view(maps.shape)
        moments: list[Tensor] = []
        for axis in range(maps.dim() - 2):
            position = torch.arange(maps.shape[axis + 2], device=maps.device)
            position = first if axis == 0 and first is not None else position
            profile = kept.movedim(axis + 2, 2).flatten(3).sum(dim=3) if maps.dim() > 3 else kept
            moments.append((profile * position.to(maps.dtype)).sum(dim=2))
        return kept.flatten(2).sum(dim=2), torch.stack(moments, dim=2)

    def points(self, mass: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Equation 2 from accumulated moments: points ``[B, C, D]`` and mask ``[B, C]``."""
        valid = mass > 0
        safe = torch.where(valid, mass, torch.ones_like(mass)).unsqueeze(2)
        return torch.where(valid.unsqueeze(2), moment / safe, torch.zeros_like(moment)), valid


class KeypointDetector(nn.Module):
    """Keypoints of an image or a volume: feature maps, threshold, center of mass (sections 2.2 to 2.4).

    Images give one keypoint a feature map. For volumes, whose extension the paper leaves to future work, the 2D
    features run over all slices of the three orthogonal stacks; each stack is one feature volume a map, so a volume
    has three times as many keypoints. The slices stream in two passes, first for the maximum of each map, then for the
    center of mass over those slices alone that hold something above the threshold.

    With ``symmetric`` the response to the image is added to the response to its negative. An edge then answers alike
    whichever side is bright, so that a T1 and a T2 image agree on the strongest place of a map. Image and negative are
    taken inside the foreground alone, and the negative is lifted by 0.3, so that the brightest tissue does not
    vanish in the background. Maps that answer to an empty image as strongly as to anything in the picture then give no
    keypoint: it would be the center of the frame in both images, a vote for "not moved".

    Args:
        features: maps ``[B, 1, H, W]`` in [0, 1] to ``[B, C, H, W]``.
        center_of_mass: the thresholded center of mass.
        symmetric: see above.
        scales: whole factors by which copies of the image are shrunk; the keypoints of all copies are joined.
    """

    slice_batch = 8  # slices of a volume in memory at once

    def __init__(
        self,
        features: nn.Module,
        center_of_mass: CenterOfMass,
        symmetric: bool = False,
        scales: tuple[int, ...] = (1,),
    ) -> None:
        super().__init__()
        whole = len(scales) > 0 and all(int(scale) == scale and scale >= 1 for scale in scales)
        require(whole, "scales", scales, "positive whole numbers")
        self.features = features
        self.center_of_mass = center_of_mass
        self.symmetric = symmetric
        self.level = 0.3  # where ranks of intensities begin, and the negative with them
        self.scales = [int(scale) for scale in scales]

    def forward(self, image: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
        """Detect.

        Args:
            image: ``[B, 1, *spatial]`` with intensities in [0, 1].
            foreground: ``[B, 1, *spatial]``, 1 in the foreground and 0 elsewhere; used where ``symmetric``.

        Returns:
            Points ``[B, K, D]`` in index coordinates, and a mask ``[B, K]``, False where there is no keypoint.
        """
        points: list[Tensor] = []
        valid: list[Tensor] = []
        for scale in self.scales:
            small, inside = image, foreground
            if scale > 1:
                small, inside = _shrink(image, scale), (_shrink(foreground, scale) > 0.5).to(image.dtype)
            if image.dim() == 4:
                maps = self._respond(small, inside)
                found, mask = self._without_empty(self.center_of_mass(maps), maps.amax(dim=(2, 3)))
            else:
                found, mask = self._stacks(small, inside)
            points.append(shrunk_to_index(found, float(scale)))
            valid.append(mask)
        return torch.cat(points, dim=1), torch.cat(valid, dim=1)

    def _respond(self, image: Tensor, foreground: Tensor) -> Tensor:
        if not self.symmetric:
            return self.features(image)
        return self.features(image) + self.features((1.0 + self.level - image) * foreground)

    def _without_empty(self, found: tuple[Tensor, Tensor], peak: Tensor) -> tuple[Tensor, Tensor]:
        """Keypoints less those of maps that respond to an empty image as strongly as to their best place, ``peak``."""
        points, valid = found
        if self.symmetric:
            empty = torch.zeros(1, 1, 3, 3, dtype=peak.dtype, device=peak.device)
            answer = self._respond(empty, empty).amax(dim=(2, 3))
            valid = valid & ~(answer > self.center_of_mass.threshold * peak)
        return points, valid

    @torch.jit.unused
    def _stacks(self, volume: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
        points: list[Tensor] = []
        valid: list[Tensor] = []
        for one, inside in zip(volume[:, 0], foreground[:, 0], strict=True):
            box, start = _content_box(one)
            found = [self._stack(one[box], inside[box], axis) for axis in range(3)]
            points.append(torch.cat([point + start for point, _ in found], dim=1))
            valid.append(torch.cat([mask for _, mask in found], dim=1))
        return torch.cat(points), torch.cat(valid)

    def _stack(self, volume: Tensor, foreground: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Points ``[1, C, 3]`` and mask of one volume, features taken in the planes at right angles to ``axis``."""
        slices, inside = volume.movedim(axis, 0).unsqueeze(1), foreground.movedim(axis, 0).unsqueeze(1)
        parts = torch.arange(len(slices), device=volume.device).split(self.slice_batch)
        peaks = torch.cat([self._respond(slices[part], inside[part]).amax(dim=(2, 3)) for part in parts])
        peak = peaks.amax(dim=0, keepdim=True)
        holds = (peaks > self.center_of_mass.threshold * peak).any(dim=1)
        mass = volume.new_zeros(1, peak.shape[1])
        moment = volume.new_zeros(1, peak.shape[1], 3)
        for part in torch.nonzero(holds).flatten().split(self.slice_batch):
            # one feature volume [1, C, slices, H, W]
            maps = self._respond(slices[part], inside[part]).movedim(0, 1).unsqueeze(0)
            piece_mass, piece_moment = self.center_of_mass.moments(maps, peak, part)
            mass, moment = mass + piece_mass, moment + piece_moment
        points, valid = self._without_empty(self.center_of_mass.points(mass, moment), peak)
        # the slice axis came first; put it where it belongs
        order = [1, 2]
        order.insert(axis, 0)
        return points[..., order], valid


def _content_box(volume: Tensor) -> tuple[tuple[slice, ...], Tensor]:
    """Slices of the box around all that is not background (0), two voxels larger, and its first corner ``[3]``.
    Outside, where most of a padded volume is, the response is that of a constant, which is no feature."""
    box: list[slice] = []
    for axis, size in enumerate(volume.shape):
        used = (volume.movedim(axis, 0).flatten(1).amax(dim=1) > 0).nonzero().flatten().tolist() or [0, size - 1]
        box.append(slice(max(0, used[0] - 2), min(size, used[-1] + 3)))
    return tuple(box), torch.tensor([float(part.start) for part in box], device=volume.device)


def _shrink(image: Tensor, factor: int) -> Tensor:
    return F.avg_pool2d(image, factor) if image.dim() == 4 else F.avg_pool3d(image, factor)
