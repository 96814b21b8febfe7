# SPDX-License-Identifier: Apache-2.0
"""Affine transforms in ITK's files: ``.tfm`` and ``.txt`` (text), ``.h5`` and ``.hdf5`` (HDF5), ``.mat`` (Matlab 4).

ITK, SimpleITK, ANTs, elastix and 3D Slicer read them. Such a transform maps points of the fixed image to points of
the moving image, as ours does, but in LPS coordinates.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import itk
import numpy as np
from torch import Tensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import flip_points, lps_to_ras, ras_to_lps
from monai_zsreg.io.files import atomic_path, exists

__all__ = ["ITK_SUFFIXES", "read_itk_transform", "write_itk_transform"]

ITK_SUFFIXES = (".tfm", ".txt", ".h5", ".hdf5", ".mat")


def write_itk_transform(
    path: str | os.PathLike,
    affine: np.ndarray | Tensor | Sequence[Sequence[float]],
    center: Sequence[float] | None = None,
) -> None:
    """Write a pull matrix as an ITK ``AffineTransform`` in double precision.

    The world of a file without orientation, such as PNG, is not the same to every reader: MONAI's ``PILReader`` calls
    the pixel axes RAS and ITK calls them LPS. A transform between such images is right in ITK only if they were
    loaded with MONAI's ``ITKReader``.

    Args:
        path: the file; its suffix, one of `ITK_SUFFIXES`, chooses the format.
        affine: ``(D+1, D+1)``, fixed world to moving world, RAS mm, D = 2 or 3.
        center: fixed point of the linear part to state in the file, D numbers, RAS mm; the origin if None. It changes
            how the translation is written, never where points go.

    Raises:
        RegistrationError: the matrix, center or suffix cannot be written, or the folder cannot be written to.
    """
    _check_suffix(path)
    try:
        matrix = np.asarray(affine.detach().cpu().numpy() if isinstance(affine, Tensor) else affine, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RegistrationError("affine", affine, "a 3x3 or 4x4 matrix of numbers") from error
    if matrix.shape not in ((3, 3), (4, 4)):
        raise RegistrationError("affine", matrix.shape, "a 3x3 or 4x4 matrix")
    dims = len(matrix) - 1
    last_row = np.eye(dims + 1)[dims]
    if not np.isfinite(matrix).all() or not np.allclose(matrix[dims], last_row) or np.linalg.det(matrix) == 0:
        raise RegistrationError(
            "affine", matrix.tolist(), f"a finite, invertible matrix with last row {last_row.tolist()}"
        )
    lps = ras_to_lps(matrix)

    transform = itk.AffineTransform[itk.D, dims].New()
    if center is not None:
        middle = np.asarray(center, dtype=np.float64)
        if middle.shape != (dims,) or not np.isfinite(middle).all():
            raise RegistrationError("center", center, f"{dims} finite numbers")
        transform.SetCenter(flip_points(middle).tolist())
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(lps[:dims, :dims])))
    transform.SetOffset(lps[:dims, dims].tolist())
    with atomic_path(path) as partial:
        itk.transformwrite(transform, str(partial))


def read_itk_transform(path: str | os.PathLike) -> np.ndarray:
    """Read an affine transform, or any other linear one (rigid, similarity, translation, a composite of such).

    Args:
        path: a file in one of ITK's transform formats.

    Returns:
        ``(D+1, D+1)`` float64, fixed world to moving world, RAS mm, D = 2 or 3.

    Raises:
        RegistrationError: the file is missing or cannot be read, or holds something else than one linear transform
            in 2D or 3D.
    """
    _check_suffix(path)
    if not exists(path) or not Path(path).is_file():
        raise RegistrationError("path", str(path), "a file that exists")
    try:
        transforms = itk.transformread(str(path))
    except RuntimeError as error:
        raise RegistrationError("path", str(path), f"a transform file that ITK can read ({_reason(error)})") from error
    if len(transforms) != 1:
        raise RegistrationError("path", str(path), f"a file with one transform (it has {len(transforms)})")
    transform = transforms[0]
    dims = int(transform.GetInputSpaceDimension())
    if dims not in (2, 3) or not transform.IsLinear():
        raise RegistrationError("path", str(path), f"a linear 2D or 3D transform (it holds {type(transform).__name__})")
    return lps_to_ras(_matrix_of(transform, dims))


def _matrix_of(transform: Any, dims: int) -> np.ndarray:
    # by the points it maps: every linear transform of ITK has TransformPoint, not every one has GetMatrix
    matrix = np.eye(dims + 1)
    matrix[:dims, dims] = transform.TransformPoint([0.0] * dims)
    for axis in range(dims):
        point = [0.0] * dims
        point[axis] = 1.0
        matrix[:dims, axis] = np.asarray(transform.TransformPoint(point)) - matrix[:dims, dims]
    return matrix


def _check_suffix(path: str | os.PathLike) -> None:
    if Path(path).suffix not in ITK_SUFFIXES:
        raise RegistrationError("path", str(path), "a name that ends in one of " + ", ".join(ITK_SUFFIXES))


def _reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "ERROR" in line]
    return lines[0].split("): ", 1)[-1] if lines else str(error)
