# SPDX-License-Identifier: Apache-2.0
"""Images that the tests register, motions of a known size, and how far a matrix is from the truth.

The head is nilearn's MNI152 template, which its wheel ships, bent, because the template is its own mirror image and no
head is. T2 and FLAIR are simulated from the tissue maps beside it as the demonstration pair is, so all contrasts lie
exactly on one another. SciPy moves images here, so that the package is not its own judge.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from scipy import ndimage

from monai_zsreg.app.demo import T2_SIGNAL, simulated_scan, template_tissues
from monai_zsreg.geometry import AffineParameters, Grid, apply_affine, compose_parameters

__all__ = [
    "blobs",
    "diagonal",
    "error",
    "moved_by",
    "padded",
    "pooled",
    "simulated",
    "sitk_affine",
    "sitk_image",
    "sitk_moved",
    "template",
    "tissue_shares",
    "turn",
]

# signal of cerebrospinal fluid, gray and white matter
_SIGNAL = {"t1": (0.2, 0.6, 0.9), "t2": T2_SIGNAL, "flair": (0.1, 0.9, 0.7)}
_BRIGHTEST = 1000.0


def blobs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random smooth float32 image; its rim of zeros makes all ways to treat the border the same."""
    noise = torch.as_tensor(np.random.default_rng(seed).random((1, 1, *[n // 3 for n in shape]), dtype=np.float32))
    image = F.interpolate(noise, size=shape)[0, 0].numpy()
    inside = np.zeros(shape, dtype=np.float32)
    inside[(slice(3, -3),) * len(shape)] = 1.0
    return image * inside


_tissues = lru_cache(maxsize=1)(template_tissues)


def tissue_shares() -> tuple[np.ndarray, np.ndarray]:
    """Shares of cerebrospinal fluid, gray and white matter in the head ``[3, I, J, K]``, and index to world."""
    shares = _tissues()[1]
    return shares.values.numpy(), shares.affine.numpy()


@lru_cache(maxsize=3)
def template(modality: str = "t1") -> MetaTensor:
    """The head ``[1, 197, 233, 189]`` at 1 mm: ``"t1"`` as it is, ``"t2"`` and ``"flair"`` simulated."""
    t1, shares = _tissues()
    values = t1.values[0].numpy() if modality == "t1" else simulated(shares.values.numpy(), modality)
    return MetaTensor(torch.from_numpy(_BRIGHTEST * values)[None], affine=t1.affine)


def simulated(shares: np.ndarray, modality: str, noise: float = 0.02, bias: float = 0.1, seed: int = 0) -> np.ndarray:
    """A scan of the template's tissue shares ``[3, *spatial]``, float32; see `simulated_scan`."""
    return simulated_scan(shares, _SIGNAL[modality], np.random.default_rng(seed), noise, bias).astype(np.float32)


def diagonal(*spacing: float) -> torch.Tensor:
    """An affine with this spacing and its origin at zero."""
    return torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))


def pooled(image: MetaTensor, *factors: int) -> MetaTensor:
    """Blocks of voxels averaged; the result lies where the image did."""
    dims = image.ndim - 1
    factors = factors * dims if len(factors) == 1 else factors
    average = F.avg_pool2d if dims == 2 else F.avg_pool3d
    blocks = diagonal(*factors)
    blocks[:dims, dims] = (torch.tensor(factors, dtype=torch.float64) - 1) / 2
    return MetaTensor(average(image.as_tensor()[None].float(), factors)[0], affine=Grid.of(image).affine @ blocks)


def padded(image: MetaTensor, width: int) -> MetaTensor:
    """With ``width`` voxels of zeros on every side, where it was."""
    dims = image.ndim - 1
    shift = torch.eye(dims + 1, dtype=torch.float64)
    shift[:dims, dims] = -width
    return MetaTensor(F.pad(image.as_tensor(), [width] * (2 * dims)), affine=Grid.of(image).affine @ shift)


def turn(
    image: MetaTensor, degrees: float, shift: tuple[float, ...], scale: float = 1.0, shear: float = 0.02
) -> np.ndarray:
    """A motion about the middle of an image; in 3D about an oblique axis."""
    dims = image.ndim - 1
    angles = (degrees,) if dims == 2 else (0.3 * degrees, -0.4 * degrees, degrees)
    shears = (shear,) * (dims * (dims - 1) // 2)
    center = tuple(Grid.of(image).center.tolist())
    return compose_parameters(AffineParameters(shift, angles, (scale,) * dims, shears, center))


def moved_by(image: MetaTensor, truth: np.ndarray, like: MetaTensor | None = None) -> MetaTensor:
    """What a scanner sees after the head has moved by ``truth`` (fixed world to moving world).

    Args:
        image: ``[C, *spatial]``, the head before.
        truth: ``(D+1, D+1)``.
        like: whose grid the scan has; that of ``image`` if None.
    """
    source, target = Grid.of(image), Grid.of(image if like is None else like)
    pull = np.linalg.inv(source.affine.numpy()) @ np.linalg.inv(truth) @ target.affine.numpy()
    moved = [
        ndimage.affine_transform(channel.numpy(), pull, output_shape=target.shape, order=1)
        for channel in image.as_tensor().float()
    ]
    return MetaTensor(torch.from_numpy(np.stack(moved)), affine=target.affine)


def error(matrix: np.ndarray, truth: np.ndarray, fixed: MetaTensor) -> float:
    """Mean distance between where two matrices take the foreground of an image, mm."""
    values = fixed.as_tensor()[0].float()
    points = apply_affine(Grid.of(fixed).affine, (values > 0.05 * values.max()).nonzero()[::7].double()).numpy()
    gap = np.asarray(matrix) - truth
    return float(np.linalg.norm(points @ gap[:-1, :-1].T + gap[:-1, -1], axis=1).mean())


def _sides(dims: int) -> np.ndarray:
    """RAS to LPS; by hand, because ITK as judge must not use our conversion."""
    return np.array([-1.0, -1.0, 1.0])[:dims]


def sitk_image(image: MetaTensor, channel: int = 0) -> Any:
    """One channel as SimpleITK's image, which starts in a hundredth of the time that ITK's own Python takes."""
    import SimpleITK as sitk

    dims = image.ndim - 1
    affine = Grid.of(image).affine.numpy()
    axes = _sides(dims)[:, None] * affine[:dims, :dims]
    made = sitk.GetImageFromArray(image.as_tensor()[channel].float().numpy().T)
    made.SetSpacing(np.linalg.norm(axes, axis=0).tolist())
    made.SetOrigin((_sides(dims) * affine[:dims, dims]).tolist())
    made.SetDirection((axes / np.linalg.norm(axes, axis=0)).ravel().tolist())
    return made


def sitk_affine(matrix: np.ndarray) -> Any:
    """A pull matrix ``(D+1, D+1)`` as SimpleITK's transform."""
    import SimpleITK as sitk

    dims = len(matrix) - 1
    transform = sitk.AffineTransform(dims)
    transform.SetMatrix((np.outer(_sides(dims), _sides(dims)) * matrix[:dims, :dims]).ravel().tolist())
    transform.SetTranslation((_sides(dims) * matrix[:dims, dims]).tolist())
    return transform


def sitk_moved(moving: Any, fixed: Any, transform: Any, nearest: bool = False) -> np.ndarray:
    """What ITK makes of a moving image on the grid of a fixed one, ``[*spatial]``; 0 outside."""
    import SimpleITK as sitk

    how = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    return sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, how, 0.0)).T
