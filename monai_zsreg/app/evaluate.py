# SPDX-License-Identifier: Apache-2.0
"""Figures about a registered pair: what is known about it, how far it was off before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_zsreg.app.settings import Settings
from monai_zsreg.app.tables import WHEN
from monai_zsreg.errors import RegistrationError
from monai_zsreg.foreground import foreground_mask
from monai_zsreg.geometry import Grid
from monai_zsreg.io import Image, load_image, pair_landmarks, read_landmarks, read_transform
from monai_zsreg.metrics.similarity import label_dice, similarity
from monai_zsreg.metrics.tre import foreground_tre, landmark_tre
from monai_zsreg.registration import RegistrationResult
from monai_zsreg.registration.displacement import Transform, move
from monai_zsreg.resample import resample

# what a deformed pair's reader must not take for granted
_NOT_KNOWN = (
    "How far off this map is at a point is not known: there are no error bars. Its verdict is at best that of the "
    "matrix that it started from, because any image that is bent looks more like the other one. Where there is little "
    "contrast, and in what only one of the images has, it follows its surroundings. A small residual is no proof."
)
# voxels above which an inference measures on every second, third, ... one along each axis
_ENOUGH = 2_000_000


def read_known(pair: dict[str, Any]) -> dict[str, Any]:
    """The pair with the content of its files in the place of their paths.

    ``fixed_mask``, ``moving_mask`` and ``fixed_labels`` become `Image` (those of the fixed image on its grid),
    ``fixed_landmarks`` and ``moving_landmarks`` points ``[N, D]``, ``truth`` the matrix ``(D+1, D+1)``, fixed world to
    moving world.

    Raises:
        RegistrationError: a file that cannot be used.
    """
    pair, fixed = dict(pair), pair["fixed"]
    for key in ("fixed_mask", "moving_mask", "fixed_labels"):
        if key in pair:
            image = load_image(pair[key], key)
            if image.dims != fixed.dims or len(image.values) != 1:
                allowed = f"one channel and {fixed.dims} dimensions, as fixed has"
                raise RegistrationError(key, tuple(image.values.shape), allowed)
            if key.startswith("fixed"):
                values = resample(image.values, image.grid, fixed.grid, mode="nearest", fill=0.0)
                image = Image(values, fixed.affine, image.meta)
            if not bool((image.values != 0).any()):
                raise RegistrationError(key, str(pair[key]), "an image that is not 0 everywhere on the image it is of")
            pair[key] = image
    if "truth" in pair and not isinstance(pair["truth"], np.ndarray):
        with _named("truth"):
            pair["truth"] = read_transform(pair["truth"], fixed, pair["moving"])
        if len(pair["truth"]) != fixed.dims + 1:
            raise RegistrationError("truth", f"a {len(pair['truth']) - 1}D transform", f"a {fixed.dims}D one, as fixed")
    if "fixed_landmarks" in pair:
        points = []
        for key in ("fixed_landmarks", "moving_landmarks"):
            with _named(key):
                points.append(read_landmarks(pair[key]))
            if len(points[-1].points) == 0 or points[-1].points.shape[1] != fixed.dims:
                allowed = f"one or more points with {fixed.dims} coordinates"
                raise RegistrationError(key, points[-1].points.shape, allowed)
        with _named("moving_landmarks"):
            pair["fixed_landmarks"], pair["moving_landmarks"] = pair_landmarks(*points)
    return pair


@contextmanager
def _named(argument: str) -> Iterator[None]:
    """Errors of readers that call every file "path" get the name of what was read."""
    try:
        yield
    except RegistrationError as error:
        raise RegistrationError(argument, error.value, error.allowed) from error


def _carried(labels: Image, grid: Grid, transform: Transform) -> Tensor:
    """Labels or a mask on another grid, by nearest neighbor, 0 outside."""
    return move(transform, labels.values, labels.grid, grid, mode="nearest", fill=0.0)


def measure_pair(
    pair: Mapping[str, Any], result: RegistrationResult, moved: Image, background: float, settings: Settings
) -> dict[str, Any]:
    """How alike and how far apart the images are, before (by the headers alone) and after.

    Args:
        pair: as `read_known` gives it.
        result: of the pair.
        moved: the moving image on the fixed grid.
        background: of the moving image.
        settings: of the run; without ``exact`` large images are measured on a part of their voxels.

    Returns:
        ``before`` and ``after``, each with the `MEASURES` that can be had; ``every``, the step in voxels; ``region``,
        ``"masks"`` or ``"foreground"``, where SSIM, mutual information and the squared errors are taken, the union
        over both images; ``dice_of``, what Dice compares: ``"labels"`` (mean over the labels of the fixed image), else
        ``"masks"``, else ``"foregrounds"``. ``tre`` is the mean error against ``truth`` over the foreground (or the
        mask) of the fixed image and ``tre_max`` the largest, ``landmark_tre`` that of the landmarks.
    """
    fixed, moving = pair["fixed"], pair["moving"]
    fixed_mask, moving_mask, labels = (pair.get(key) for key in ("fixed_mask", "moving_mask", "fixed_labels"))
    step = 1 if settings.exact else max(1, math.ceil((math.prod(fixed.grid.shape) / _ENOUGH) ** (1 / fixed.dims)))
    thin = (slice(None), *(slice(None, None, step) for _ in range(fixed.dims)))
    still, channel = torch.eye(fixed.dims + 1, dtype=torch.float64), settings.channel("moving")
    grid = _thinned(fixed.grid, step)
    here = torch.nan_to_num(fixed.channel(settings.channel("fixed"), "fixed")[thin])
    there = moving.channel(channel, "moving")
    images = {
        "before": resample(there, moving.grid, grid, fill=background),
        "after": torch.nan_to_num(moved.values[channel][None].float()[thin]),
    }
    pulls: dict[str, Transform] = {"before": still, "after": result.pull}
    inside = foreground_mask(here) if fixed_mask is None else fixed_mask.values[thin] != 0
    inside = inside if bool(inside.any()) else torch.ones_like(inside)
    metrics: dict[str, Any] = {
        "region": "foreground" if moving_mask is None else "masks",
        "dice_of": "labels" if labels is not None else "foregrounds" if moving_mask is None else "masks",
        "every": step,
    }
    for when in WHEN:
        masks: dict[str, Any] = {}
        if moving_mask is not None:
            masks = {"fixed_mask": inside, "moving_mask": _carried(moving_mask, grid, pulls[when])}
        values = dict(similarity(here, images[when], **masks))
        if labels is not None:
            values["dice"] = label_dice(labels.values[thin], _carried(pair["labels"], grid, pulls[when]))
        if "truth" in pair:
            lattice: Any = SimpleNamespace(ndim=fixed.dims + 1, shape=here.shape, affine=grid.affine)
            error = foreground_tre(pulls[when], pair["truth"], lattice, inside)
            values |= {"tre": error["mean"], "tre_max": error["max"]}
        if "fixed_landmarks" in pair:
            points = pair["fixed_landmarks"], pair["moving_landmarks"]
            values["landmark_tre"] = float(landmark_tre(pulls[when], *points).mean())
        metrics[when] = values
    return metrics


def measure_deformation(result: RegistrationResult, channel: int = 0) -> dict[str, Any]:
    """What transform ``"deformable"`` adds to the matrix, over the foreground of the fixed image.

    Args:
        result: of such a pair.
        channel: of the fixed image.

    Returns:
        ``displacement``, its length: ``median``, ``p95``, ``max``; ``determinant`` of its Jacobian: ``min``, ``p1``,
        ``p99``, ``max``; ``folds``, points of the whole lattice where the map folds; ``lattice``: ``shape`` and
        ``spacing``; ``not_known``, in words.
    """
    found, fixed = result._deformed(), result.fixed_image
    mask = foreground_mask(torch.nan_to_num(fixed.channel(channel, "fixed"))).to(torch.uint8)
    inside = resample(mask, fixed.grid, found.grid, mode="nearest", fill=0.0)[0] > 0
    inside = inside if bool(inside.any()) else torch.ones_like(inside)
    lengths, changes = (values[inside].numpy() for values in (found.displacement.norm(dim=0), found.jacobian()[0]))
    ranks = (("displacement", lengths, (50, 95, 100)), ("determinant", changes, (0, 1, 99, 100)))
    names = {0: "min", 1: "p1", 50: "median", 95: "p95", 99: "p99", 100: "max"}
    told: dict[str, Any] = {
        key: {names[rank]: float(np.percentile(values, rank)) for rank in wanted} for key, values, wanted in ranks
    }
    lattice = {"shape": list(found.grid.shape), "spacing": [float(s) for s in found.grid.spacing]}
    return told | {"folds": found.folds(), "lattice": lattice, "not_known": _NOT_KNOWN}


def _thinned(grid: Grid, step: int) -> Grid:
    affine = grid.affine.clone()
    affine[:-1, :-1] *= step
    return Grid(tuple(-(-n // step) for n in grid.shape), affine)
