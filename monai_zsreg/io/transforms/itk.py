# SPDX-License-Identifier: Apache-2.0
"""ITK's transform files: ``.tfm`` and ``.txt`` (text), ``.mat`` (Matlab 4), ``.h5`` and ``.hdf5`` (HDF5).

ITK, SimpleITK, ANTs, Convert3D and 3D Slicer write them. Such a transform maps points of the fixed image to points of
the moving image, as ours does, but in LPS coordinates. Text and Matlab files are read and written here, because
importing ITK takes seconds; HDF5 goes through ITK.

The world of a file without orientation, such as PNG, is not the same to every reader: MONAI's ``PILReader`` calls the
pixel axes RAS and ITK calls them LPS. A transform between such images is right in ITK only if they were loaded as here,
or with MONAI's ``ITKReader``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from monai_zsreg.geometry import flip_points, lps_to_ras, ras_to_lps
from monai_zsreg.io.transforms.images import Images

__all__ = ["KINDS", "centered_matrix", "linear_matrix", "read", "read_hdf5", "sniff", "write", "write_hdf5"]

_TEXT = b"#Insight Transform File"
_HDF5 = (".h5", ".hdf5")

# linear part, translation, and the center (None: the fixed parameters state it)
Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def sniff(content: bytes) -> bool:
    if content.startswith(b"\x89HDF"):
        return b"TransformType" in content
    # Matlab 4 begins with whole numbers of four bytes, small ones, so there are zeros among them
    return content.startswith(_TEXT) or b"\0" in content[:20] and not content.startswith(b"MATLAB")


def read(path: Path, images: Images) -> np.ndarray:
    if path.suffix.lower() in _HDF5:
        return lps_to_ras(reduce(lambda total, one: one @ total, map(linear_matrix, read_hdf5(path))))
    content = path.read_bytes()
    stated = _parse_text(content.decode()) if content.startswith(_TEXT) else _parse_matlab(content)
    matrices = [
        centered_matrix(kind, parameters, fixed)
        for kind, parameters, fixed in stated
        if not kind.startswith("CompositeTransform")
    ]
    composite = len(stated) > 1 and stated[0][0].startswith("CompositeTransform")
    if not matrices or len(matrices) > 1 and not composite:
        raise ValueError(f"{len(matrices)} transforms instead of one")
    total = np.eye(len(matrices[0]))
    # of a composite the last one acts first
    for matrix in matrices:
        total = total @ matrix
    return lps_to_ras(total)


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    dims = len(matrix) - 1
    known = images.known_fixed
    center = flip_points(known.grid.center.numpy()) if known and known.grid.dims == dims else np.zeros(dims)
    lps = ras_to_lps(matrix)
    linear = lps[:dims, :dims]
    parameters = [*linear.ravel(), *(lps[:dims, dims] + linear @ center - center)]
    kind = f"AffineTransform_double_{dims}_{dims}"
    if path.suffix.lower() in _HDF5:
        write_hdf5(path, lps, center)
    elif path.suffix.lower() == ".mat":
        path.write_bytes(_matlab_array(kind, parameters) + _matlab_array("fixed", center))
    else:
        lines = [_TEXT.decode() + " V1.0", "#Transform 0", f"Transform: {kind}"]
        for key, values in (("Parameters", parameters), ("FixedParameters", center)):
            lines.append(f"{key}: " + " ".join(repr(float(value)) for value in values))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ kinds of transforms


def centered_matrix(kind: str, parameters: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """The matrix ``(D+1, D+1)``, LPS, of an ITK transform.

    Args:
        kind: name of its class with precision and dimension, such as ``Euler3DTransform_double_3_3``.
        parameters: as its file states them.
        fixed: its fixed parameters; the center comes first.
    """
    found = re.fullmatch(r"(\w+?)_(?:double|float)_([23])_\2", kind)
    if found is None or found[1] not in KINDS:
        raise ValueError(f"a linear 2D or 3D transform is needed, it holds {kind}")
    dims = int(found[2])
    linear, translation, center = KINDS[found[1]](parameters, fixed, dims)
    if center is None:
        center = fixed[:dims] if len(fixed) >= dims else np.zeros(dims)
    matrix = np.eye(dims + 1)
    matrix[:dims, :dims] = linear
    matrix[:dims, dims] = translation + center - linear @ center
    return matrix


def _versor(vector: np.ndarray) -> np.ndarray:
    """Rotation of a unit quaternion, ``(x, y, z)`` or ``(x, y, z, w)``."""
    from scipy.spatial.transform import Rotation

    w = vector[3] if len(vector) == 4 else np.sqrt(max(0.0, 1.0 - vector @ vector))
    return np.asarray(Rotation.from_quat([*vector[:3], w]).as_matrix())


def _euler(p: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    # a fourth fixed parameter tells in which order
    order = (2, 1, 0) if len(fixed) > 3 and fixed[3] else (2, 0, 1)
    return np.asarray(Rotation.from_euler("".join("XYZ"[axis] for axis in order), p[[*order]]).as_matrix())


def _affine(p: np.ndarray, fixed: np.ndarray, dims: int) -> Parts:
    return p[: dims * dims].reshape(dims, dims), _last(p, dims * dims, dims), None


def _centered_affine(p: np.ndarray, fixed: np.ndarray, dims: int) -> Parts:
    start = dims * dims
    return p[:start].reshape(dims, dims), _last(p, start + dims, dims), p[start : start + dims]


def _planar(scaled: bool, centered: bool) -> Callable[[np.ndarray, np.ndarray, int], Parts]:
    """Rotation in 2D, with a scale before the angle, and a center behind it."""

    def parts(p: np.ndarray, fixed: np.ndarray, dims: int) -> Parts:
        scale, angle = (p[0], p[1]) if scaled else (1.0, p[0])
        start = 2 if scaled else 1
        center = p[start : start + 2] if centered else None
        linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return linear, _last(p, start + 2 * centered, 2), center

    return parts


def _scale_skew(p: np.ndarray, fixed: np.ndarray, dims: int) -> Parts:
    # ITK adds scales and skews to the rotation's entries, it does not multiply with them
    linear = _versor(p[:3]) + np.diag(p[6:9] - 1.0)
    if len(p) == 15:
        linear[[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]] += p[9:15]
    return linear, p[3:6], None


def _compose_scale_skew(p: np.ndarray, fixed: np.ndarray, dims: int) -> Parts:
    skew = np.eye(3)
    skew[[0, 0, 1], [1, 2, 2]] = _last(p, 9, 3)
    return _versor(p[:3]) @ np.diag(p[6:9]) @ skew, p[3:6], None


def _last(p: np.ndarray, start: int, count: int) -> np.ndarray:
    if len(p) != start + count:
        raise ValueError(f"{len(p)} parameters instead of {start + count}")
    return p[start:]


#: class of ITK to what its parameters mean
KINDS: dict[str, Callable[[np.ndarray, np.ndarray, int], Parts]] = {
    "AffineTransform": _affine,
    "MatrixOffsetTransformBase": _affine,
    "Rigid3DTransform": _affine,
    "ScalableAffineTransform": _affine,
    "FixedCenterOfRotationAffineTransform": _affine,
    "CenteredAffineTransform": _centered_affine,
    "Euler2DTransform": _planar(scaled=False, centered=False),
    "Rigid2DTransform": _planar(scaled=False, centered=False),
    "CenteredRigid2DTransform": _planar(scaled=False, centered=True),
    "Similarity2DTransform": _planar(scaled=True, centered=False),
    "CenteredSimilarity2DTransform": _planar(scaled=True, centered=True),
    "Euler3DTransform": lambda p, fixed, dims: (_euler(p, fixed), _last(p, 3, 3), None),
    "CenteredEuler3DTransform": lambda p, fixed, dims: (_euler(p, fixed), _last(p, 6, 3), p[3:6]),
    "VersorTransform": lambda p, fixed, dims: (_versor(_last(p, 0, 3)), np.zeros(3), None),
    "VersorRigid3DTransform": lambda p, fixed, dims: (_versor(p[:3]), _last(p, 3, 3), None),
    "QuaternionRigidTransform": lambda p, fixed, dims: (_versor(p[:4]), _last(p, 4, 3), None),
    "Similarity3DTransform": lambda p, fixed, dims: (_last(p, 6, 1) * _versor(p[:3]), p[3:6], None),
    "ScaleVersor3DTransform": _scale_skew,
    "ScaleSkewVersor3DTransform": _scale_skew,
    "ComposeScaleSkewVersor3DTransform": _compose_scale_skew,
    "ScaleTransform": lambda p, fixed, dims: (np.diag(_last(p, 0, dims)), np.zeros(dims), None),
    "ScaleLogarithmicTransform": lambda p, fixed, dims: (np.diag(np.exp(_last(p, 0, dims))), np.zeros(dims), None),
    "TranslationTransform": lambda p, fixed, dims: (np.eye(dims), _last(p, 0, dims), np.zeros(dims)),
    "IdentityTransform": lambda p, fixed, dims: (np.eye(dims), np.zeros(dims), np.zeros(dims)),
}

# ------------------------------------------------------------------------------------------------------------- files

Stated = list[tuple[str, np.ndarray, np.ndarray]]


def _parse_text(content: str) -> Stated:
    found: list[dict[str, str]] = []
    for line in content.splitlines():
        key, separator, value = line.partition(":")
        if line.startswith("#") or not separator:
            continue
        if key == "Transform":
            found.append({})
        found[-1][key] = value.strip()

    def numbers(text: str) -> np.ndarray:
        return np.array(text.split(), dtype=np.float64)

    return [
        (one["Transform"], numbers(one.get("Parameters", "")), numbers(one.get("FixedParameters", ""))) for one in found
    ]


def _parse_matlab(content: bytes) -> Stated:
    arrays: list[tuple[str, np.ndarray]] = []
    at = 0
    while at < len(content):
        kind, rows, columns, _, length = struct.unpack_from("<5i", content, at)
        order = "<"
        if not 0 <= kind < 100:
            order = ">"
            kind, rows, columns, _, length = struct.unpack_from(">5i", content, at)
        types = {0: "f8", 10: "f4"}
        if kind % 1000 not in types or not 0 < length < 200:
            raise ValueError("it is no Matlab 4 file of real matrices")
        at += 20
        name = content[at : at + length].rstrip(b"\0").decode("ascii")
        at += length
        values = np.frombuffer(content, f"{order}{types[kind % 1000]}", rows * columns, at)
        at += values.nbytes
        arrays.append((name, values.astype(np.float64)))
    if len(arrays) % 2 or any(name != "fixed" for name, _ in arrays[1::2]):
        raise ValueError("it does not hold parameters and fixed parameters in turn")
    return [(name, values, fixed) for (name, values), (_, fixed) in zip(arrays[::2], arrays[1::2], strict=True)]


def _matlab_array(name: str, values: Sequence[float] | np.ndarray) -> bytes:
    data = np.asarray(values, dtype="<f8")
    return struct.pack("<5i", 0, len(data), 1, 0, len(name) + 1) + name.encode() + b"\0" + data.tobytes()


def read_hdf5(path: Path) -> list[Any]:
    """The transforms of a file, ITK's, as they act on points of the fixed image one after another."""
    import itk

    try:
        transforms = itk.transformread(str(path))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if "ERROR" in line]
        reason = lines[0].split("): ", 1)[-1] if lines else str(error)
        raise ValueError(f"ITK cannot read it: {reason}") from error
    if len(transforms) != 1:
        raise ValueError(f"{len(transforms)} transforms instead of one")
    whole = transforms[0]
    if not hasattr(whole, "GetNthTransform"):
        return [whole]
    # of a composite the last one acts first
    return [itk.down_cast(whole.GetNthTransform(n)) for n in reversed(range(whole.GetNumberOfTransforms()))]


def linear_matrix(transform: Any) -> np.ndarray:
    """The matrix, LPS, of a linear transform of ITK."""
    dims = int(transform.GetInputSpaceDimension())
    if dims not in (2, 3) or not transform.IsLinear():
        raise ValueError(f"a linear 2D or 3D transform is needed, it holds {type(transform).__name__}")
    # by the points it maps: every linear transform of ITK has TransformPoint, not every one has GetMatrix
    matrix = np.eye(dims + 1)
    matrix[:dims, dims] = transform.TransformPoint([0.0] * dims)
    for axis in range(dims):
        moved = np.array(transform.TransformPoint(np.eye(dims)[axis].tolist()))
        matrix[:dims, axis] = moved - matrix[:dims, dims]
    return matrix


def write_hdf5(path: Path, matrix: np.ndarray, center: np.ndarray | None = None, first: Any = None) -> None:
    """A matrix, LPS; composed with what acts ``first``, a transform of ITK."""
    import itk

    dims = len(matrix) - 1
    kind = itk.D if first is None else itk.F
    transform: Any = itk.AffineTransform[kind, dims].New()
    transform.SetCenter([0.0] * dims if center is None else center.tolist())
    transform.SetMatrix(
        itk.Matrix[kind, dims, dims](
            itk.GetVnlMatrixFromArray(np.ascontiguousarray(matrix[:dims, :dims], dtype="f8" if first is None else "f4"))
        )
    )
    transform.SetOffset(matrix[:dims, dims].tolist())
    if first is not None:
        composite = itk.CompositeTransform[kind, dims].New()
        composite.AddTransform(transform)
        composite.AddTransform(first)
        transform = composite
    itk.transformwrite(transform, str(path))
