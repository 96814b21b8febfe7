# SPDX-License-Identifier: Apache-2.0
"""Transforms that exist already: compose, invert, convert, and move images and points by them."""

from __future__ import annotations

import argparse
import csv
import io
import os
from collections.abc import Sequence
from typing import Any

import torch

from monai_zsreg.errors import RegistrationError
from monai_zsreg.io import (
    Image,
    Landmarks,
    atomic_path,
    load_image,
    read_landmarks,
    read_transform,
    write_image,
    write_transform,
)
from monai_zsreg.io.displacement import bends
from monai_zsreg.registration.displacement import Deformation, Transform, compose, map_points, move


def compose_transforms(
    paths: Sequence[str | os.PathLike],
    fixed: Any = None,
    moving: Any = None,
    via: Sequence[Any] = (),
    invert: bool = False,
    format: str | None = None,
) -> Transform:
    """Read transform files and make one transform of them.

    Args:
        paths: the files, matrices, displacement fields (``.nii``, ``.nii.gz``) or composites of both (``.h5``); the
            first acts first on points of the fixed image.
        fixed, moving: see `monai_zsreg.io.read_transform`; needed only by formats that depend on the images.
        via: the images between the transforms, one fewer than ``paths``, where the formats depend on them.
        invert: whether to invert the composition. The files then lead from ``moving`` to ``fixed``.
        format: of all files, see `monai_zsreg.io.read_transform`.

    Returns:
        Fixed world to moving world, RAS mm: ``(D+1, D+1)`` float64, or a `Deformation` where a file holds one.

    Raises:
        RegistrationError: a file or image that cannot be used, or transforms of unequal dimension.
    """
    if not paths:
        raise RegistrationError("transform", list(paths), "at least one transform file")
    if via and len(via) != len(paths) - 1:
        raise RegistrationError("via", [str(v) for v in via], f"{len(paths) - 1} images, one between two transforms")
    start, end = (moving, fixed) if invert else (fixed, moving)
    images = [start, *(via or [None] * (len(paths) - 1)), end]
    total: Any = None
    for path, one, two in zip(paths, images, images[1:], strict=False):
        if bends(path):
            found: Transform = Deformation.load(path)
        else:
            found = torch.as_tensor(read_transform(path, one, two, format))
        if total is not None and _dims(found) != _dims(total):
            allowed = f"a {_dims(total)}D transform, as the first one is"
            raise RegistrationError("transform", f"{_dims(found)}D transform {os.fspath(path)}", allowed)
        total = found if total is None else compose(total, found)
    if invert:
        total = total.inverse() if isinstance(total, Deformation) else torch.linalg.inv(total)
    return total


def _dims(transform: Transform) -> int:
    return transform.dims if isinstance(transform, Deformation) else len(transform) - 1


def move_points(points: Landmarks, transform: Transform) -> Landmarks:
    """Points of the fixed image, in the moving image's world.

    Raises:
        RegistrationError: points and transform are of unequal dimension.
    """
    dims = _dims(transform)
    if points.points.shape[1] != dims:
        raise RegistrationError("points", f"{points.points.shape[1]}D points", f"{dims}D points, as the transform")
    return Landmarks(map_points(transform, torch.as_tensor(points.points)).numpy(), points.labels)


def apply_files(args: argparse.Namespace) -> None:
    """What ``zsreg apply`` does; its help says what the arguments mean.

    Raises:
        RegistrationError: a file that cannot be used; nothing is written then.
    """
    fixed, moving = (
        None if path is None else load_image(path, name)
        for path, name in ((args.fixed, "fixed"), (args.moving, "moving"))
    )
    pull = compose_transforms(args.transform, fixed, moving, args.via, args.invert, args.format)
    dims = _dims(pull)
    landmarks = move_points(read_landmarks(args.points), pull) if args.points else None
    moved = None
    if args.output and fixed is not None and moving is not None:
        for name, image in (("fixed", fixed), ("moving", moving)):
            if image.dims != dims:
                raise RegistrationError(name, f"{image.dims}D image", f"a {dims}D image, as the transform")
        mode, fill = ("nearest", 0.0) if args.labels else ("bilinear", None)
        fill = fill if args.fill_value is None else args.fill_value
        values = move(pull, moving.values, moving.grid, fixed.grid, mode=mode, fill=fill)
        moved = Image(values, fixed.affine, {key: fixed.meta[key] for key in ("place", "unit") if key in fixed.meta})
    # all of the input was fine: only now write
    if args.save_transform and isinstance(pull, Deformation):
        if args.save_format not in (None, "itk"):
            raise RegistrationError("save-format", args.save_format, "itk, for what bends: a field, .nii.gz")
        pull.save(args.save_transform, None if fixed is None else fixed.grid)
    elif args.save_transform:
        write_transform(args.save_transform, torch.as_tensor(pull), fixed, moving, args.save_format)
    if moved is not None:
        write_image(args.output, moved, like=moving, labels=args.labels)
    if landmarks is not None and args.save_points:
        with atomic_path(args.save_points) as partial:
            partial.write_text(_csv(landmarks), encoding="utf-8")
    elif landmarks is not None:
        print(_csv(landmarks), end="")


def _csv(landmarks: Landmarks) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    named = any(landmarks.labels)
    writer.writerow([*(["label"] if named else []), *"xyz"[: landmarks.points.shape[1]]])
    for label, point in zip(landmarks.labels, landmarks.points.tolist(), strict=True):
        writer.writerow([*([label] if named else []), *point])
    return text.getvalue()
