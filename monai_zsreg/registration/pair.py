# SPDX-License-Identifier: Apache-2.0
"""Registering a pair of images: read, prepare both sides, estimate, judge."""

from __future__ import annotations

import difflib
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import Grid, checked_matrix
from monai_zsreg.io import read_transform
from monai_zsreg.io.images import Image, ImageLike
from monai_zsreg.registration.confidence import FAIL, PASS, WARN, Judgement, honest_covariance, judge
from monai_zsreg.registration.deformable import DEFORMABLE, check_stiffness, deform_prepared
from monai_zsreg.registration.displacement import Deformation
from monai_zsreg.registration.engine import EFFORTS, TRANSFORMS, Found, Settings, find
from monai_zsreg.registration.estimate import Estimate
from monai_zsreg.registration.precision import full_precision
from monai_zsreg.registration.prepared import Prepared, is_number, resolve_device, whole_number
from monai_zsreg.registration.result import RegistrationResult
from monai_zsreg.registration.side import Pair, finest_step, longest_extent

DEFAULT_PRESET = "robust"
#: where the other presets live: modules with ``estimate`` and ``check_settings``, imported when one is asked for
_ELSEWHERE = {"paper": "monai_zsreg.paper", "keypoints": "monai_zsreg.paper"}
PRESETS = (DEFAULT_PRESET, *_ELSEWHERE)

# arguments that mean nothing without the images
_OF_THE_PAIR = ("regressor_weights", "fixed_channel", "moving_channel", "fixed_mask", "moving_mask", "initial")
# voxels along the longest side that a working spacing may make
_SPACING_LIMITS = {2: (8, 2048), 3: (8, 512)}


def register(
    fixed: ImageLike | Prepared,
    moving: ImageLike | Prepared,
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
    warn: bool = True,
    **options: Any,
) -> RegistrationResult:
    """Find the transform that takes every point of the fixed image to the same anatomy in the moving image.

    The images may differ in size, spacing, orientation and field of view. Unless told otherwise the whole range of
    rotations is searched, so it does not matter where the images lie in the world.

    Args:
        fixed: path, ``MetaTensor`` or tensor ``[C, *spatial]``, or numpy array ``[*spatial]``; 2D or 3D. Or a
            `Prepared` image, where several moving images are registered to it.
        moving: likewise, of the same dimension.
        preset: ``"robust"``, global search and refinement, which needs no weights; ``"paper"``, Kori and Krishnamurthi
            as written; or ``"keypoints"``, the same mended so that it works across modalities.
        transform: ``"rigid"``, ``"similarity"``, ``"affine"``, or ``"deformable"``: affine, then a smooth map that can
            be inverted (preset ``"robust"`` only).
        device: where to compute; None takes the device of ``fixed`` if it is a tensor, else the CPU.
        vgg19_weights: VGG-19 state dict file, whole or cut, for what uses VGG-19; None for torchvision's, downloaded
            once.
        regressor_weights: state dict file of the MLP, for preset ``"paper"``; None for the shipped one (affine).
        seed: of all random draws.
        spacing: finest voxel size to work at, mm; None for the finest spacing of the images, but no more than 512 (3D:
            256) voxels along the longest side (presets of the paper: see `monai_zsreg.paper`).
        fixed_channel, moving_channel: channel (or volume of a 4D file) to estimate on; ``apply`` and ``moved`` take
            all.
        fixed_mask, moving_mask: where to look in each image, above 0: an image on any grid in its world, or an array on
            its own; None for its foreground. Preset ``"robust"`` only, as ``initial``.
        initial: where to start, ``(D+1, D+1)``, fixed world to moving world, RAS mm, or the path of a transform file;
            None for what the headers say. The global search tries it beside all others.
        warn: whether a result with the verdict FAIL warns.
        options: further parameters: for ``"robust"`` those of `monai_zsreg.registration.engine.Settings`, such as
            ``search="local"``; for the others, those of `monai_zsreg.networks.ZeroShotAffineNet`.

    Returns:
        The result; see `RegistrationResult`.

    Raises:
        RegistrationError: input that is wrong; the message names the argument, what it was and what is allowed.
        torch.OutOfMemoryError: a device with too little memory.

    Example::

        result = monai_zsreg.register("t1.nii.gz", "flair.nii.gz")
        result.moved        # FLAIR on the T1 grid
        result.affine       # 4x4, fixed world to moving world, RAS mm
        result.verdict      # "PASS", "WARN" or "FAIL"
    """
    seed = check_options(preset, transform, seed, vgg19_weights=vgg19_weights, **options)
    one = _prepared(fixed, fixed_channel, fixed_mask, "fixed")
    two = _prepared(moving, moving_channel, moving_mask, "moving")
    dims = one.image.dims
    if two.image.dims != dims:
        raise RegistrationError("moving", f"{two.image.dims}D image", f"a {dims}D image, because fixed is one")
    where = resolve_device(device, one.image.values.device)
    _check_spacing(spacing, one.image.grid, two.image.grid)
    common = {"vgg19_weights": vgg19_weights, "seed": seed, **options}

    deformation: Deformation | None = None
    before: Estimate | None = None
    start = time.perf_counter()
    try:
        if preset == DEFAULT_PRESET:
            begin = None if initial is None else _matrix(initial, one.image, two.image)
            settings = Settings("affine" if transform == DEFORMABLE else transform, **common)
            with full_precision(where), torch.inference_mode():
                estimate = _estimate(one, two, begin, spacing, where, settings)
                if transform == DEFORMABLE and not estimate.failed:
                    before = replace(estimate, reasons=list(estimate.reasons))
                    deformation = deform_prepared(one, two, estimate.affine, spacing, settings.stiffness, where)
                    estimate = _judged_anew(estimate, one, two, deformation, spacing, where, settings)
        else:
            for name, value in (("fixed_mask", one.mask), ("moving_mask", two.mask), ("initial", initial)):
                if value is not None:
                    allowed = f"nothing with preset {preset!r}; preset {DEFAULT_PRESET!r} can use it"
                    raise RegistrationError(name, "given", allowed)
            estimate = import_module(_ELSEWHERE[preset]).estimate(
                one.image,
                two.image,
                preset=preset,
                transform=transform,
                device=where,
                spacing=spacing,
                fixed_channel=one.channel,
                moving_channel=two.channel,
                regressor_weights=regressor_weights,
                **common,
            )
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{where} has too little free memory for these images; a coarser `spacing`, or device='cpu', needs less"
        ) from error
    seconds = time.perf_counter() - start

    features = options.get("features", "mind") if preset == DEFAULT_PRESET else None
    notes = [note for side in (one, two) for note in side.image.meta.get("notes", ())]
    told = (one.image.grid, two.image.grid, notes, features, one.image.length_unit)
    judgement = judge(estimate, *told)
    if before is not None:
        judgement = _no_better(judgement, judge(before, *told))
    if warn and judgement.verdict == FAIL:
        warnings.warn(f"registration failed: {'; '.join(judgement.reasons)}", RegistrationWarning, stacklevel=2)
    given = {"regressor_weights": regressor_weights, "spacing": spacing, "initial": initial, **common}
    given |= {"fixed_channel": one.channel, "moving_channel": two.channel}
    return RegistrationResult(
        affine=estimate.affine.numpy(),
        verdict=judgement.verdict,
        reasons=judgement.reasons,
        measures=judgement.measures,
        score=judgement.score,
        seconds=seconds,
        preset=preset,
        transform=transform,
        fixed_image=one.image.to("cpu"),
        moving_image=two.image.to("cpu"),
        covariance=estimate.covariance,
        keypoints=estimate.keypoints,
        options={name: value for name, value in given.items() if value is not None},
        device=str(where),
        masks=(_on_cpu(one.mask), _on_cpu(two.mask)),
        deformation=deformation,
        repeat=_blackening,
    )


def _blackening(result: RegistrationResult) -> Any:
    """What a result's ``uncertainty`` is made by, whatever its preset."""
    return import_module(_ELSEWHERE["paper"]).blackening(result)


def _no_better(deformed: Judgement, before: Judgement) -> Judgement:
    """A verdict on a deformed pair that is no better than the one on its matrix.

    Any two images can be bent until they look alike: that they then do says nothing about the matrix.
    """
    ranks = (PASS, WARN, FAIL)
    reasons = list(deformed.reasons)
    if ranks.index(before.verdict) > ranks.index(deformed.verdict):
        reasons += [f"before it was deformed: {reason}" for reason in before.reasons if reason not in reasons]
    verdict = max(deformed.verdict, before.verdict, key=ranks.index)
    return replace(deformed, verdict=verdict, reasons=reasons, score=min(deformed.score, before.score))


def _judged_anew(
    estimate: Estimate,
    fixed: Prepared,
    moving: Prepared,
    deformation: Deformation,
    spacing: float | None,
    device: torch.device,
    settings: Settings,
) -> Estimate:
    """How alike the images are once the moving one is deformed, in the figures of a pair that needs no more motion."""
    grid = fixed.image.grid
    values = deformation.resample(moving.values.to(device), moving.image.grid, grid)
    moved = Prepared(Image(values, grid.affine), name="moving")
    if moving.mask is not None:
        mask = deformation.resample(moving.mask.to(device, torch.uint8), moving.image.grid, grid, "nearest", 0)
        moved.mask = mask > 0 if bool(mask.any()) else None
    identity = torch.eye(grid.dims + 1, dtype=torch.float64)
    again = _estimate(fixed, moved, identity, spacing, device, replace(settings, search="none"))
    measures = again.measures | {"least_determinant": float(deformation.jacobian().min())}
    # what is known of the matrix says nothing of the map
    return replace(estimate, measures=measures, covariance=None)


def _estimate(
    fixed: Prepared,
    moving: Prepared,
    initial: Tensor | None,
    spacing: float | None,
    device: torch.device,
    settings: Settings,
) -> Estimate:
    """The default method: one attempt, and more for pairs that do not look alike at what it finds."""
    grids = (fixed.image.grid, moving.image.grid)
    base, coarse = finest_step(*grids, spacing)
    keypoints: dict[str, Any] = {}
    if settings.coarse == "keypoints":
        initial, keypoints = import_module(_ELSEWHERE["keypoints"]).keypoint_start(
            fixed.image,
            moving.image,
            transform=settings.transform,
            device=device,
            seed=settings.seed,
            vgg19_weights=settings.vgg19_weights,
            fixed_channel=fixed.channel,
            moving_channel=moving.channel,
        )
    found: Found | None = None
    efforts = EFFORTS[grids[0].dims]
    single = settings.coarse == "keypoints" or settings.search != "global"
    for number, effort in enumerate((*efforts, efforts[-1])):
        if found is not None and found.beyond_reach(effort):
            continue
        # chance decides which points are compared: where the answer is one of chance, others are drawn
        drawn = replace(settings, seed=settings.seed + number // len(efforts))
        one, two = (side.side(base, coarse, effort.faint, device) for side in (fixed, moving))
        again = find(Pair(one, two, initial), drawn, effort, found, single or number >= len(efforts) - 1)
        enough = found is not None and again.suffices(found, effort)
        if found is None or again.supersedes(found):
            found = again
        if single or found.convincing or enough:
            break
        if number == len(efforts) - 1 and (found.lead is None or found.lead >= 0):
            break
    assert found is not None
    affine, reasons, measures = found.affine(), [], found.measures()
    if not found.sound:
        reasons = ["no matrix could be computed from these images; it is what the headers say"]
        affine = torch.eye(len(affine), dtype=torch.float64)
    return Estimate(
        affine=affine.clone(),
        failed=bool(reasons),
        reasons=reasons,
        covariance=honest_covariance(found.covariance().numpy(), base, measures["beyond"]),
        measures=measures,
        keypoints=keypoints,
    )


def check_options(
    preset: Any, transform: Any = "affine", seed: Any = 0, spacing: float | None = None, **options: Any
) -> int:
    """Check what does not depend on the images, before there are any; what does may be there too, and is left alone.

    Returns:
        ``seed`` as an int.

    Raises:
        RegistrationError: an argument that is out of its range, or unknown.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RegistrationError("preset", preset, "one of " + ", ".join(repr(name) for name in PRESETS))
    kinds = (*TRANSFORMS, DEFORMABLE) if preset == DEFAULT_PRESET else TRANSFORMS
    if transform not in kinds:
        raise RegistrationError("transform", transform, f"one of {kinds} with preset {preset!r}")
    check_stiffness(options.get("stiffness"))
    number = whole_number(seed)
    if number is None or not 0 <= number < 2**63:
        raise RegistrationError("seed", seed, "a whole number from 0 to 2**63 - 1")
    if spacing is not None and not (is_number(spacing) and spacing > 0):
        raise RegistrationError("spacing", spacing, "a voxel size in mm, or None")
    options = {name: value for name, value in options.items() if name not in _OF_THE_PAIR}
    file = options.get("vgg19_weights")
    if file is not None and not isinstance(file, (str, os.PathLike)):
        raise RegistrationError("vgg19_weights", file, "a path, or None")
    if preset != DEFAULT_PRESET:
        import_module(_ELSEWHERE[preset]).check_settings(preset, options)
        return number
    known = [item.name for item in fields(Settings)]
    refuse_unknown(options, known, [*signature(register).parameters][2:-1])
    Settings("affine" if transform == DEFORMABLE else transform, **options)
    return number


def refuse_unknown(options: dict[str, Any], known: list[str], beside: Sequence[str] = ()) -> None:
    """
    Args:
        options: by name.
        known: names that may be among them.
        beside: names of arguments that are given otherwise, for the message.

    Raises:
        RegistrationError: an option that is not among those known; the message names the nearest.
    """
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *beside], 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise RegistrationError("options", name, f"one of {', '.join(sorted({*known, *beside}))}{hint}")


def _prepared(source: ImageLike | Prepared, channel: int, mask: ImageLike | None, name: str) -> Prepared:
    if not isinstance(source, Prepared):
        return Prepared(source, channel, mask, name)
    if mask is not None or whole_number(channel) not in (0, source.channel):
        raise RegistrationError(
            f"{name}_mask" if mask is not None else f"{name}_channel", "given", "it in Prepared(...)"
        )
    return source


def _on_cpu(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.cpu()


def _check_spacing(wanted: Any, fixed: Grid, moving: Grid) -> None:
    if wanted is None:
        return
    extent, (least, most) = longest_extent(fixed, moving), _SPACING_LIMITS[fixed.dims]
    if not is_number(wanted) or not extent / most <= wanted <= extent / least:
        allowed = f"a voxel size from {extent / most:.3g} to {extent / least:.3g} mm for these images"
        raise RegistrationError("spacing", wanted, allowed)


def _matrix(initial: Any, fixed: Image, moving: Image) -> Tensor:
    if isinstance(initial, (str, os.PathLike)):
        initial = read_transform(initial, fixed, moving)
    return checked_matrix(initial, fixed.dims, "initial")
