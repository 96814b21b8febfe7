# SPDX-License-Identifier: Apache-2.0
"""Transforms that register by a smooth map: an image, and in a dictionary several images with what follows them.

They are never lazy: a map is no matrix that could be merged with what is pending, so that is carried out first.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform
from monai.utils import MetaKeys, TraceKeys, ensure_tuple_rep

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid
from monai_zsreg.io.images import Image
from monai_zsreg.registration.deformable import DEFORMABLE
from monai_zsreg.registration.displacement import Deformation
from monai_zsreg.registration.prepared import Prepared
from monai_zsreg.resample import MODES
from monai_zsreg.transforms.array import (
    AFFINE_KEY,
    NATIVE_META,
    REASONS_KEY,
    VERDICT_KEY,
    RegisterAffine,
    Traced,
    as_image,
    check_pair,
    evaluate_pending,
)
from monai_zsreg.transforms.dictionary import (
    check_followers,
    check_keys,
    fixed_image,
    led_followers,
    present_followers,
)

__all__ = [
    "ApplyDeformation",
    "RegisterDeformable",
    "RegisterDeformableD",
    "RegisterDeformableDict",
    "RegisterDeformabled",
]


class ApplyDeformation(Traced):
    """Put an image on the fixed image's grid with a known map, in one interpolation. Inversion works.

    Args:
        mode: ``"bilinear"``, ``"nearest"`` (labels) or ``"bicubic"``.
        fill_value: value outside of the moving image; None for its own background.

    Raises:
        RegistrationError: an unknown mode.
    """

    def __init__(self, mode: str = "bilinear", fill_value: float | None = None) -> None:
        if mode not in MODES:
            raise RegistrationError("mode", mode, f"one of {', '.join(MODES)}")
        self.mode = mode
        self.fill_value = fill_value

    def __call__(  # type: ignore[override]
        self,
        img: Any,
        deformation: Deformation,
        fixed: Any,
        mode: str | None = None,
        fill_value: float | None = None,
    ) -> MetaTensor:
        """
        Args:
            img: moving image or labels, ``[C, *spatial]``, on any grid in the moving world.
            deformation: fixed world to moving world.
            fixed: image on the grid to move to, ``[C, *spatial]``; its voxels do not matter.
            mode: overrides the constructor's.
            fill_value: overrides the constructor's.

        Returns:
            ``[C, *fixed spatial]`` in the type of ``img``, with the fixed image's metadata and the moving image's name.

        Raises:
            RegistrationError: images of unequal dimension, or an unknown mode.
        """
        img, fixed = (evaluate_pending(as_image(image, name)) for image, name in ((img, "img"), (fixed, "fixed")))
        check_pair(img, fixed, "img")
        mode = self.mode if mode is None else mode
        fill = self.fill_value if fill_value is None else fill_value
        source, target = Grid.of(img, "img"), Grid.of(fixed, "fixed")
        values = deformation.resample(img.as_tensor(), source, target, mode, fill)
        moved = MetaTensor(values, meta=deepcopy(fixed.meta), applied_operations=list(img.applied_operations))
        name = img.meta.get("filename_or_obj")
        moved.meta |= {AFFINE_KEY: deformation.affine.clone()} | ({} if name is None else {"filename_or_obj": name})
        extra = {
            "mode": mode,
            # as pairs: MONAI rewrites keys such as "id" in every dictionary that it finds in the trace
            NATIVE_META: list((deepcopy(dict(img.meta)) | {MetaKeys.AFFINE: img.affine.clone()}).items()),
            "map": (deformation.affine, deformation.displacement, deformation.grid.affine),
        }
        self.push_transform(moved, orig_size=tuple(img.shape[1:]), extra_info=extra)
        return moved

    def inverse(self, data: Any) -> MetaTensor:
        """Voxels on the fixed grid back to the moving image's native grid and header, by the inverse map.

        Raises:
            RegistrationError: ``data`` has lost its metadata.
        """
        extra, shape, native = self.popped(data)
        affine, displacement, lattice = extra["map"]
        back = Deformation(affine, displacement, Grid(tuple(displacement.shape[1:]), lattice)).inverse()
        like = MetaTensor(torch.empty(1, *shape), affine=native[MetaKeys.AFFINE])
        values = back.resample(data.as_tensor(), Grid.of(data, "data"), Grid.of(like), extra["mode"])
        return MetaTensor(values, meta=native, applied_operations=data.applied_operations)


class _Registrar(RegisterAffine):
    """Estimates only; `ApplyDeformation` moves."""

    deforms = True


class RegisterDeformable(ApplyDeformation):
    """Register a moving image to a fixed one by a smooth map and put it on the fixed grid. Inversion works.

    ``meta`` has the affine part as ``registration_affine``, ``registration_verdict`` and ``registration_reasons``.

    Args:
        stiffness: see `monai_zsreg.registration.deformable.register_deformable`.
        mode: see `ApplyDeformation`.
        fill_value: see `ApplyDeformation`.
        device: see `RegisterAffine`.
        seed: see `RegisterAffine`.
        on_failure: see `RegisterAffine`.
        options: further arguments of `monai_zsreg.register`.

    Raises:
        RegistrationError: a wrong argument.
    """

    def __init__(
        self,
        stiffness: float | None = None,
        mode: str = "bilinear",
        fill_value: float | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
        on_failure: str = "raise",
        **options: Any,
    ) -> None:
        super().__init__(mode, fill_value)
        self.registrar = _Registrar(
            transform=DEFORMABLE, device=device, seed=seed, on_failure=on_failure, stiffness=stiffness, **options
        )

    def __call__(  # type: ignore[override]
        self,
        moving: Any,
        fixed: Any,
        mode: str | None = None,
        fill_value: float | None = None,
        prepared: Prepared | None = None,
    ) -> MetaTensor:
        """
        Args:
            moving: image to register, ``[C, *spatial]``.
            fixed: image to register it to, ``[C, *spatial]``.
            mode: overrides the constructor's.
            fill_value: overrides the constructor's.
            prepared: what `prepare` made of ``fixed``, where several images are registered to it.

        Returns:
            The moving image on the fixed grid.

        Raises:
            RegistrationError: an image that cannot be used.
            RegistrationFailure: the verdict is FAIL, and ``on_failure`` is ``"raise"``.
        """
        moving, fixed = (evaluate_pending(as_image(i, name)) for i, name in ((moving, "moving"), (fixed, "fixed")))
        check_pair(moving, fixed, "moving")
        result = self.registrar.estimate(moving, fixed if prepared is None else prepared)
        deformation = result.deformation
        if deformation is None:
            # nothing could be computed, and the user wants to go on
            grid = Grid.of(fixed, "fixed")
            one = Grid((1,) * grid.dims, grid.affine)
            deformation = Deformation(torch.as_tensor(result.affine), torch.zeros(grid.dims, *one.shape), one)
        moved = super().__call__(moving, deformation, fixed, mode, fill_value)
        moved.meta |= {VERDICT_KEY: result.verdict, REASONS_KEY: "; ".join(result.reasons)}
        return moved

    def prepare(self, fixed: MetaTensor) -> Prepared:
        """The fixed side of a registration, to be used with several moving images."""
        return self.registrar.prepare(fixed)


class RegisterDeformabled(MapTransform, InvertibleTransform):
    """Dictionary form of `RegisterDeformable`: brings several moving images, and what follows each, to a fixed one.

    Each image of ``keys`` is replaced by itself on the fixed grid. ``displacement_<key>`` gets what deforms it, a
    ``MetaTensor [D, *lattice]``, mm along the axes of the fixed world; ``affine_<key>`` the matrix that acts after it.

    .. code-block:: python

        RegisterDeformabled(keys="t2", fixed_key="t1", followers={"t2_label": "t2"})

    Args:
        keys: the moving images, ``[C, *spatial]``.
        fixed_key: the fixed image, ``[C, *spatial]``.
        stiffness: see `RegisterDeformable`.
        mode: interpolation, one for all ``keys`` or one each.
        fill_value: value outside the moving image, one for all ``keys`` or one each.
        followers: key of what follows to the key that it follows.
        follower_mode: interpolation of followers, one for all or one each.
        follower_fill_value: one for all followers or one each.
        device: see `RegisterAffine`.
        seed: see `RegisterAffine`.
        on_failure: see `RegisterAffine`.
        allow_missing_keys: whether images of ``keys``, and followers, may be missing.
        options: further arguments of `monai_zsreg.register`.

    Raises:
        RegistrationError: a wrong argument.
    """

    def __init__(
        self,
        keys: KeysCollection,
        fixed_key: Hashable,
        stiffness: float | None = None,
        mode: str | Sequence[str] = "bilinear",
        fill_value: float | None | Sequence[float | None] = None,
        followers: Mapping[Hashable, Hashable] | None = None,
        follower_mode: str | Sequence[str] = "nearest",
        follower_fill_value: float | None | Sequence[float | None] = None,
        device: str | torch.device | None = None,
        seed: int = 0,
        on_failure: str = "raise",
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.fixed_key = fixed_key
        self.followers = dict(followers or {})
        check_keys(self.keys, fixed_key)
        check_followers(self.followers, self.keys, fixed_key)
        self.mode, self.fill_value = (ensure_tuple_rep(value, len(self.keys)) for value in (mode, fill_value))
        count = len(self.followers)
        self.follower_mode, self.follower_fill_value = (
            ensure_tuple_rep(value, count) if count else () for value in (follower_mode, follower_fill_value)
        )
        self.follower_appliers = {
            key: ApplyDeformation(*row)
            for key, *row in zip(self.followers, self.follower_mode, self.follower_fill_value, strict=True)
        }
        self.registrar = RegisterDeformable(stiffness, device=device, seed=seed, on_failure=on_failure, **options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Args:
            data: dictionary with the images.

        Returns:
            A new dictionary: moved images and followers, and a displacement and a matrix for each image.

        Raises:
            KeyError: an image or follower is missing and ``allow_missing_keys`` is False.
            RegistrationError: the fixed image or a follower's leader is missing, or an image cannot be used.
            RegistrationFailure: see `RegisterAffine`.
        """
        d = dict(data)
        fixed = fixed_image(d, self.fixed_key)
        followers = led_followers(self.followers, d, self.allow_missing_keys)
        prepared = self.registrar.prepare(fixed)
        maps: dict[Hashable, Deformation] = {}
        for key, mode, fill in self.key_iterator(d, self.mode, self.fill_value):
            d[key] = self.registrar(d[key], fixed, mode, fill, prepared)
            affine, displacement, lattice = d[key].applied_operations[-1][TraceKeys.EXTRA_INFO]["map"]
            maps[key] = Deformation(affine, displacement, Grid(tuple(displacement.shape[1:]), lattice))
            d[f"displacement_{key}"] = Image(displacement.clone(), lattice, {"unit": "mm"}).to_metatensor()
            d[f"affine_{key}"] = affine.clone()
        for follower in followers:
            applier = self.follower_appliers[follower]
            d[follower] = applier(d[follower], maps[self.followers[follower]], fixed)
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Images and followers back on their native grids with their native headers; the maps stay."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.registrar.inverse(d[key])
        for follower in present_followers(self.followers, d, self.allow_missing_keys):
            d[follower] = self.follower_appliers[follower].inverse(d[follower])
        return d


RegisterDeformableD = RegisterDeformableDict = RegisterDeformabled
