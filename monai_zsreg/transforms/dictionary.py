# SPDX-License-Identifier: Apache-2.0
"""Dictionary transforms, thin shells over `monai_zsreg.transforms.array`; each is also named ...D and ...Dict."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, LazyTransform, MapTransform
from monai.utils import TraceKeys, ensure_tuple, ensure_tuple_rep
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.io import read_transform
from monai_zsreg.io.images import Image
from monai_zsreg.registration import DEFAULT_PRESET
from monai_zsreg.registration.deformable import DEFORMABLE
from monai_zsreg.transforms.array import (
    AFFINE_KEY,
    ApplyAffineRegistration,
    RegisterAffine,
    RegisterDeformable,
    SaveAffine,
    as_image,
    evaluate_pending,
    read_matrix,
    traced_deformation,
)

__all__ = [
    "ApplyAffineRegistrationD",
    "ApplyAffineRegistrationDict",
    "ApplyAffineRegistrationd",
    "RegisterAffineD",
    "RegisterAffineDict",
    "RegisterAffined",
    "RegisterDeformableD",
    "RegisterDeformableDict",
    "RegisterDeformabled",
    "SaveAffineD",
    "SaveAffineDict",
    "SaveAffined",
]


class _OntoFixed(MapTransform, InvertibleTransform, LazyTransform):
    """Puts images on the grid of a fixed one, and back on their own."""

    backend = ApplyAffineRegistration.backend

    def __init__(
        self,
        keys: KeysCollection,
        fixed_key: Hashable,
        mode: Any,
        padding_mode: Any,
        fill_value: Any,
        allow_missing_keys: bool,
        lazy: bool,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        LazyTransform.__init__(self, lazy=lazy)
        if fixed_key in self.keys:
            allowed = f"a key that is not one of the moving images {list(self.keys)}"
            raise RegistrationError("fixed_key", fixed_key, allowed)
        if len(set(self.keys)) != len(self.keys):
            raise RegistrationError("keys", list(self.keys), "keys that differ")
        self.fixed_key = fixed_key
        self.key_options = _options_per_key("", self.keys, mode, padding_mode, fill_value)
        self.applier: ApplyAffineRegistration = ApplyAffineRegistration()

    def _fixed(self, data: Mapping[Hashable, Any]) -> MetaTensor:
        """The fixed image, whose pending operations are carried out once for all keys."""
        if self.fixed_key not in data:
            raise RegistrationError("fixed_key", self.fixed_key, f"a key of the data, which has {list(data)}")
        return evaluate_pending(as_image(data[self.fixed_key], "fixed"))

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Images, and what follows them, back on their native grids with their native headers; matrices stay."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.applier.inverse(d[key])
        return d


class RegisterAffined(_OntoFixed):
    """Dictionary form of `RegisterAffine`: aligns several moving images, and what follows each, to a fixed one.

    Each image of ``keys`` is replaced by itself on the fixed grid, and ``affine_<key>`` gets its matrix (float64
    tensor ``(D+1, D+1)``, fixed world to moving world, RAS mm). The fixed image is left as it is. An image's ``meta``
    has the verdict on its registration, and keeps it through ``inverse``.

    .. code-block:: python

        RegisterAffined(keys=["t2", "flair"], fixed_key="t1", followers={"t2_label": "t2"})

    In a ``PersistentDataset`` give ``track_meta=True, weights_only=False``: without the first the cache drops the
    affine, without the second MONAI 1.6.1 cannot read back the metadata of a NIfTI file, and registers anew each time.
    For lazy chains see `ApplyAffineRegistration`.

    Args:
        keys: the moving images, ``[C, *spatial]``.
        fixed_key: the fixed image, ``[C, *spatial]``.
        preset, transform: see `RegisterAffine`.
        mode, padding_mode, fill_value: see `ApplyAffineRegistration`; one for all ``keys`` or one each.
        followers: key of what follows to the key that it follows, such as ``{"t2_label": "t2"}``. It is moved by the
            same matrix; its own grid may differ from its leader's.
        follower_mode, follower_padding_mode, follower_fill_value: likewise, one for all followers or one each.
        affine_prefix: put before a key for the entry that holds its matrix. (Not after it: MONAI's ``Spacingd`` takes
            every entry whose name begins with ``<key>_`` for a dictionary of metadata.)
        allow_missing_keys: whether images of ``keys``, and followers, may be missing. A follower whose leader is
            missing is an error all the same, because it would stay unaligned.
        lazy: whether to execute lazily by default.
        options: those of `RegisterAffine`: ``device``, ``vgg19_weights``, ``seed``, ``on_failure``, and further
            arguments of `monai_zsreg.register`.

    Raises:
        RegistrationError: a wrong argument.
    """

    _registrar: type[RegisterAffine] = RegisterAffine

    def __init__(
        self,
        keys: KeysCollection,
        fixed_key: Hashable,
        preset: str = DEFAULT_PRESET,
        transform: str = "affine",
        mode: str | int | Sequence[str | int] = "bilinear",
        padding_mode: str | Sequence[str] = "zeros",
        fill_value: float | None | Sequence[float | None] = None,
        followers: Mapping[Hashable, Hashable] | None = None,
        follower_mode: str | int | Sequence[str | int] = "nearest",
        follower_padding_mode: str | Sequence[str] = "zeros",
        follower_fill_value: float | None | Sequence[float | None] = None,
        affine_prefix: str = "affine_",
        allow_missing_keys: bool = False,
        lazy: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(keys, fixed_key, mode, padding_mode, fill_value, allow_missing_keys, lazy)
        self.followers = dict(followers or {})
        self.affine_prefix = affine_prefix
        for follower, leader in self.followers.items():
            if leader not in self.keys:
                allowed = f"a leader among the moving images {list(self.keys)}"
                raise RegistrationError("followers", {follower: leader}, allowed)
            if follower in (*self.keys, fixed_key):
                allowed = "a follower that is not itself registered or fixed"
                raise RegistrationError("followers", {follower: leader}, allowed)
        if not affine_prefix:
            raise RegistrationError("affine_prefix", affine_prefix, "a string that is not empty")
        taken = {fixed_key, *self.keys, *self.followers}
        clash = [key for key in self.keys if f"{affine_prefix}{key}" in taken]
        if clash:
            raise RegistrationError("affine_prefix", affine_prefix, f"one that makes new keys; {clash} do not get one")
        given = follower_mode, follower_padding_mode, follower_fill_value
        per_follower = _options_per_key("follower_", tuple(self.followers), *given)
        self.follower_options = dict(zip(self.followers, per_follower, strict=True))
        self.applier = self.registrar = self._registrar(preset=preset, transform=transform, **options)
        self.follow = ApplyAffineRegistration()

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """A new dictionary: moved images and followers, and a matrix for each image.

        Raises:
            KeyError: an image or follower is missing and ``allow_missing_keys`` is False.
            RegistrationError: the fixed image or a follower's leader is missing, or an image cannot be used.
            RegistrationFailure: see `RegisterAffine`.
        """
        d = dict(data)
        present = self._present(d)
        for follower in present:
            if self.followers[follower] not in d:
                needed = f"the key {self.followers[follower]!r} too, because {follower!r} follows it"
                raise RegistrationError("data", list(d), needed)
        lazy = self.lazy if lazy is None else lazy
        fixed: Any = None
        maps = {}
        for key, options in self.key_iterator(d, self.key_options):
            if fixed is None:
                fixed = self._fixed(d)
                prepared = self.registrar.prepare(fixed)
            d[key] = self.registrar(d[key], fixed, **options, lazy=lazy, prepared=prepared)
            d[f"{self.affine_prefix}{key}"] = d[key].meta[AFFINE_KEY].clone()
            maps[key] = self._map(d, key)
        for follower in present:
            options = self.follower_options[follower]
            d[follower] = self.follow(d[follower], maps[self.followers[follower]], fixed, **options, lazy=lazy)
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = super().inverse(data)
        for follower in self._present(d):
            d[follower] = self.follow.inverse(d[follower])
        return d

    def _present(self, data: Mapping[Hashable, Any]) -> list[Hashable]:
        """The followers that are in the data."""
        missing = [follower for follower in self.followers if follower not in data]
        if missing and not self.allow_missing_keys:
            raise KeyError(f"Key `{missing[0]}` of `followers` was missing in the data and allow_missing_keys==False.")
        return [follower for follower in self.followers if follower in data]

    def _map(self, data: dict[Hashable, Any], key: Hashable) -> Any:
        """What a follower of a registered image is moved with."""
        return data[f"{self.affine_prefix}{key}"]


class RegisterDeformabled(RegisterAffined):
    """Dictionary form of `RegisterDeformable`: brings several moving images, and what follows each, to a fixed one.

    ``displacement_<key>`` gets what deforms an image, a ``MetaTensor [D, *lattice]``, mm along the axes of the fixed
    world; ``affine_<key>`` the matrix that acts after it.

    .. code-block:: python

        RegisterDeformabled(keys="t2", fixed_key="t1", followers={"t2_label": "t2"})

    Args:
        keys, fixed_key: see `RegisterAffined`.
        stiffness: see `RegisterDeformable`.
        displacement_prefix: put before a key for the entry that holds its displacement.
        options: those of `RegisterAffined`.

    Raises:
        RegistrationError: a wrong argument.
    """

    _registrar = RegisterDeformable

    def __init__(
        self,
        keys: KeysCollection,
        fixed_key: Hashable,
        stiffness: float | None = None,
        displacement_prefix: str = "displacement_",
        **options: Any,
    ) -> None:
        super().__init__(keys, fixed_key, **{"transform": DEFORMABLE, "stiffness": stiffness, **options})
        self.displacement_prefix = displacement_prefix

    def _map(self, data: dict[Hashable, Any], key: Hashable) -> Any:
        found = traced_deformation(data[key].applied_operations[-1][TraceKeys.EXTRA_INFO])
        field = Image(found.displacement.clone(), found.grid.affine, {"unit": "mm"})
        data[f"{self.displacement_prefix}{key}"] = field.to_metatensor()
        return found


class ApplyAffineRegistrationd(_OntoFixed):
    """Dictionary form of `ApplyAffineRegistration`.

    Args:
        keys: images or labels to move, ``[C, *spatial]``.
        fixed_key: image on the grid to move to.
        affine_keys: entries of the dictionary with the matrices (or paths of transform files), one for all ``keys`` or
            one each.
        affine: one matrix, or path of a transform file, for all ``keys`` of every item, instead of ``affine_keys``. A
            file is read at once; FLIRT's, which mean nothing without the images, go through ``affine_keys``.
        mode, padding_mode, fill_value: see `ApplyAffineRegistration`; one for all ``keys`` or one each.
        allow_missing_keys: whether ``keys`` may be missing.
        lazy: whether to execute lazily by default.

    Raises:
        RegistrationError: a wrong argument.
    """

    def __init__(
        self,
        keys: KeysCollection,
        fixed_key: Hashable,
        affine_keys: KeysCollection | None = None,
        affine: Tensor | np.ndarray | Sequence[Sequence[float]] | str | os.PathLike | None = None,
        mode: str | int | Sequence[str | int] = "bilinear",
        padding_mode: str | Sequence[str] = "zeros",
        fill_value: float | None | Sequence[float | None] = None,
        allow_missing_keys: bool = False,
        lazy: bool = False,
    ) -> None:
        super().__init__(keys, fixed_key, mode, padding_mode, fill_value, allow_missing_keys, lazy)
        if (affine_keys is None) == (affine is None):
            raise RegistrationError("affine_keys", affine_keys, "either affine_keys or affine, and not both")
        self.affine_keys: tuple = (None,) * len(self.keys)
        if affine_keys is not None:
            self.affine_keys = _one_each("affine_keys", affine_keys, len(self.keys))
        if isinstance(affine, (str, os.PathLike)):
            affine = read_transform(affine)
        # of 2D or 3D, because no image says yet which; as numbers, because a tensor pickles differently every time
        self.affine = None if affine is None else read_matrix(affine, 2 if np.shape(affine) == (3, 3) else 3).tolist()

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """A new dictionary with the images moved.

        Raises:
            KeyError: an image is missing and ``allow_missing_keys`` is False.
            RegistrationError: the fixed image or a matrix is missing or cannot be used.
        """
        d = dict(data)
        fixed: Any = None
        for key, affine_key, options in self.key_iterator(d, self.affine_keys, self.key_options):
            fixed = self._fixed(d) if fixed is None else fixed
            if self.affine is None and affine_key not in d:
                raise RegistrationError("affine_keys", affine_key, f"a key of the data, which has {list(d)}")
            matrix = d[affine_key] if self.affine is None else self.affine
            d[key] = self.applier(d[key], matrix, fixed, **options, lazy=self.lazy if lazy is None else lazy)
        return d


class SaveAffined(MapTransform):
    """Dictionary form of `SaveAffine`.

    Args:
        keys: registered images, whose matrices to write.
        output_dir, output_postfix, output_ext, separate_folder, data_root_dir: see `SaveAffine`.
        allow_missing_keys: whether ``keys`` may be missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | os.PathLike = "./",
        output_postfix: str = "affine",
        output_ext: str = ".tfm",
        separate_folder: bool = True,
        data_root_dir: str | os.PathLike = "",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.saver = SaveAffine(output_dir, output_postfix, output_ext, separate_folder, data_root_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A shallow copy of ``data``, whose registered images have their matrices written."""
        d = dict(data)
        for key in self.key_iterator(d):
            self.saver(d[key])
        return d


def _one_each(name: str, value: Any, count: int) -> tuple:
    values = ensure_tuple(value)
    if len(values) not in (1, count):
        raise RegistrationError(name, value, f"one value, or one for each of {count} keys")
    return ensure_tuple_rep(values[0], count) if len(values) == 1 else values


def _options_per_key(
    prefix: str, keys: Sequence[Hashable], mode: Any, padding_mode: Any, fill_value: Any
) -> list[dict]:
    """Arguments of the array transforms, one dictionary a key; wrong values are refused now, not at the first image."""
    given = {"mode": mode, "padding_mode": padding_mode, "fill_value": fill_value}
    values = [_one_each(prefix + name, value, len(keys)) for name, value in given.items()]
    options = [dict(zip(given, row, strict=True)) for row in zip(*values, strict=True)]
    for row in options:
        ApplyAffineRegistration(**row)
    return options


RegisterAffineD = RegisterAffineDict = RegisterAffined
RegisterDeformableD = RegisterDeformableDict = RegisterDeformabled
ApplyAffineRegistrationD = ApplyAffineRegistrationDict = ApplyAffineRegistrationd
SaveAffineD = SaveAffineDict = SaveAffined
