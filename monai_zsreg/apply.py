# SPDX-License-Identifier: Apache-2.0
"""Apply, compose, invert and convert transforms that exist already, without registering anything.

::

    python -m monai_zsreg.apply --transform flair_to_t1.mat --fixed t1.nii.gz --moving flair.nii.gz \\
        --output moved.nii.gz
    python -m monai_zsreg.apply --transform a.lta --transform b.tfm --fixed t1.nii.gz --moving seg.nii.gz \\
        --labels --output moved_seg.nii.gz
    python -m monai_zsreg.apply --transform t.tfm --points t1_points.csv --save-points flair_points.csv
    python -m monai_zsreg.apply --transform t.tfm --fixed t1.nii.gz --moving flair.nii.gz \\
        --save-transform flair_to_t1.mat --save-format fsl

A transform maps points of the fixed image to points of the moving image, and so brings voxels of the moving image to
the fixed grid. Several are composed in the order given: the first acts first on the fixed image's points. With
``--transform a --transform b``, ``a`` is the transform from the fixed image to another one, ``b`` the one from that
other image to the moving image.

``--invert`` inverts the composition: the files belong to the pair the other way about, ``--moving`` is what they call
fixed and ``--fixed`` what they call moving. An LTA whose geometry tells source from destination needs no ``--invert``.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import apply_affine
from monai_zsreg.inference import write_image, wrong_input_exits
from monai_zsreg.io import TRANSFORM_FORMATS, Landmarks, atomic_path, read_landmarks, read_transform, write_transform
from monai_zsreg.io.transform_files import GridLike
from monai_zsreg.registration.images import read_image
from monai_zsreg.resample import ApplyAffineRegistration, read_matrix

__all__ = ["compose_transforms", "main", "move_points"]

_IMAGES = (".nii", ".nii.gz")


def compose_transforms(
    paths: Sequence[str | os.PathLike],
    fixed: GridLike | None = None,
    moving: GridLike | None = None,
    via: Sequence[GridLike] = (),
    invert: bool = False,
    format: str | None = None,
) -> np.ndarray:
    """Read transform files and make one matrix of them.

    Args:
        paths: the files; the first acts first on points of the fixed image.
        fixed: see `monai_zsreg.io.read_transform`; needed only by formats that depend on the images.
        moving: likewise.
        via: the images between the transforms, one fewer than ``paths``, where the formats depend on them.
        invert: whether to invert the composition. The files then lead from ``moving`` to ``fixed``.
        format: of all files, see `monai_zsreg.io.read_transform`.

    Returns:
        ``(D+1, D+1)`` float64, fixed world to moving world, RAS mm.

    Raises:
        RegistrationError: a file or image that cannot be used, or transforms of unequal dimension.
    """
    if not paths:
        raise RegistrationError("transform", list(paths), "at least one transform file")
    if via and len(via) != len(paths) - 1:
        raise RegistrationError("via", [str(v) for v in via], f"{len(paths) - 1} images, one between two transforms")
    start, end = (moving, fixed) if invert else (fixed, moving)
    between: list[GridLike | None] = list(via) if via else [None] * (len(paths) - 1)
    images = [start, *between, end]
    matrices = [read_transform(path, images[i], images[i + 1], format) for i, path in enumerate(paths)]
    total = matrices[0]
    for path, matrix in zip(paths[1:], matrices[1:], strict=True):
        if matrix.shape != total.shape:
            allowed = f"a {len(total) - 1}D transform, as the first one is"
            raise RegistrationError("transform", f"{len(matrix) - 1}D transform {os.fspath(path)}", allowed)
        total = matrix @ total
    return np.linalg.inv(total) if invert else total


def move_points(points: Landmarks, matrix: np.ndarray | Tensor) -> Landmarks:
    """Points of the fixed image, in the moving image's world.

    Args:
        points: in the fixed image's world.
        matrix: ``(D+1, D+1)``, fixed world to moving world.

    Raises:
        RegistrationError: points and matrix are of unequal dimension.
    """
    dims = len(matrix) - 1
    if points.points.shape[1] != dims:
        raise RegistrationError("points", f"{points.points.shape[1]}D points", f"{dims}D points, as the transform")
    moved = apply_affine(torch.as_tensor(matrix, dtype=torch.float64), torch.as_tensor(points.points))
    return Landmarks(moved.numpy(), points.labels)


def main(argv: Sequence[str] | None = None) -> None:
    """Apply, compose, invert and convert transforms.

    Raises:
        SystemExit: wrong input; status 2, with the reason on stderr.
    """
    args = _arguments(argv)
    with wrong_input_exits():
        _check(args)
        matrix = compose_transforms(args.transform, args.fixed, args.moving, args.via, args.invert, args.format)
        points = move_points(read_landmarks(args.points), matrix) if args.points else None
        moved = None
        if args.output:
            fixed, moving = read_image(args.fixed, "fixed"), read_image(args.moving, "moving")
            pull = read_matrix(matrix, fixed.ndim - 1, "transform")
            moved = ApplyAffineRegistration(mode="nearest" if args.labels else "bilinear")(moving, pull, fixed)
        # all of the input was fine: only now write
        if args.save_transform:
            write_transform(args.save_transform, matrix, args.fixed, args.moving, args.save_format)
        if moved is not None:
            write_image(Path(args.output), moved, labels=args.labels)
        if points is not None and args.save_points:
            with atomic_path(args.save_points) as partial:
                partial.write_text(_csv(points), encoding="utf-8")
        elif points is not None:
            print(_csv(points), end="")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m monai_zsreg.apply",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add: Any = parser.add_argument
    add("--transform", action="append", required=True, metavar="FILE", help="repeat to compose, the first acts first")
    add("--invert", action="store_true", help="invert the (composed) transform")
    add("--format", choices=TRANSFORM_FORMATS, help="of the transform files (default: by name and content)")
    add("--via", action="append", default=[], metavar="IMAGE", help="image between two transforms, for FSL's format")
    add("--fixed", metavar="IMAGE", help="image whose grid to move to")
    add("--moving", metavar="IMAGE", help="image or labels to move")
    add("--output", metavar="IMAGE", help="the moved image, .nii or .nii.gz")
    add("--labels", action="store_true", help="--moving holds labels: nearest neighbor, whole numbers")
    add("--points", metavar="FILE", help="landmarks of the fixed image: .csv (RAS mm), .fcsv or .mrk.json")
    add("--save-points", metavar="CSV", help="where these lie in the moving image (default: print them)")
    add("--save-transform", metavar="FILE", help="the composed, inverted or converted transform")
    add("--save-format", choices=TRANSFORM_FORMATS, help="its format (default: by name)")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    if not (args.output or args.points or args.save_transform):
        raise RegistrationError("output", None, "something to do: --output, --points or --save-transform")
    for option, needs in (("labels", "output"), ("save_points", "points"), ("save_format", "save_transform")):
        if getattr(args, option) and not getattr(args, needs):
            raise RegistrationError(needs, None, f"--{needs.replace('_', '-')}, because --{_dashed(option)} is given")
    if args.output:
        for name in ("fixed", "moving"):
            if not getattr(args, name):
                raise RegistrationError(name, None, f"an image, because --output is given: name it with --{name}")
        if not args.output.lower().endswith(_IMAGES):
            raise RegistrationError("output", args.output, "a name that ends in " + " or ".join(_IMAGES))
    read = {
        os.path.realpath(path) for path in (*args.transform, *args.via, args.fixed, args.moving, args.points) if path
    }
    for option in ("output", "save_points", "save_transform"):
        path = getattr(args, option)
        if path and os.path.realpath(path) in read:
            raise RegistrationError(option, path, "another file than those that are read")


def _dashed(option: str) -> str:
    return option.replace("_", "-")


def _csv(landmarks: Landmarks) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    named = any(landmarks.labels)
    writer.writerow([*(["label"] if named else []), *"xyz"[: landmarks.points.shape[1]]])
    for label, point in zip(landmarks.labels, landmarks.points.tolist(), strict=True):
        writer.writerow([*([label] if named else []), *point])
    return text.getvalue()


if __name__ == "__main__":
    main()
