# SPDX-License-Identifier: Apache-2.0
"""ITK's transform files: ``.tfm`` and ``.txt`` (text), ``.mat`` (Matlab 4), ``.h5`` and ``.hdf5`` (HDF5).

ITK, SimpleITK, ANTs, Convert3D and 3D Slicer write them. Such a transform maps points of the fixed image to points of
the moving image, as ours does, but in LPS coordinates. Text and Matlab files are read and written here, because
importing ITK takes seconds, and its Python does not know every class; HDF5 goes through ITK.

The world of a file without orientation, such as PNG, is not the same to every reader: MONAI's ``PILReader`` calls the
pixel axes RAS and ITK calls them LPS. A transform between such images is right in ITK only if they were loaded as here,
or with MONAI's ``ITKReader``.
"""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from monai_zsreg.geometry import flip_points, lps_from_ras
from monai_zsreg.io.transforms.images import Images
from monai_zsreg.io.transforms.text import spelled

_TEXT = b"#Insight Transform File"
_HDF5 = (".h5", ".hdf5")


def sniff(content: bytes) -> bool:
    if content.startswith(b"\x89HDF"):
        return b"TransformType" in content
    # Matlab 4 begins with whole numbers of four bytes, small ones, so there are zeros among them
    return content.startswith(_TEXT) or b"\0" in content[:20] and not content.startswith(b"MATLAB")


def world(images: Images, name: str, dims: int) -> np.ndarray:
    return lps_from_ras(dims)


def read(path: Path, images: Images) -> np.ndarray:
    if path.suffix.lower() in _HDF5:
        return reduce(lambda total, one: one @ total, map(linear_matrix, read_hdf5(path)))
    content = path.read_bytes()
    stated = _parse_text(content.decode()) if content.startswith(_TEXT) else _parse_matlab(path)
    composite = len(stated) > 1 and stated[0][0].startswith("CompositeTransform")
    matrices = [centered_matrix(*one) for one in stated if not one[0].startswith("CompositeTransform")]
    if not matrices or len(matrices) > 1 and not composite:
        raise ValueError(f"{len(matrices)} transforms instead of one")
    # of a composite the last one acts first
    return reduce(np.matmul, matrices)


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    dims = len(matrix) - 1
    known = images.known("fixed")
    center = flip_points(known.grid.center.numpy()) if known and known.grid.dims == dims else np.zeros(dims)
    linear = matrix[:dims, :dims]
    parameters = np.array([*linear.ravel(), *(matrix[:dims, dims] + linear @ center - center)])
    kind = f"AffineTransform_double_{dims}_{dims}"
    if path.suffix.lower() in _HDF5:
        write_hdf5(path, matrix, center)
    elif path.suffix.lower() == ".mat":
        from scipy.io import savemat

        savemat(path, {kind: parameters, "fixed": center}, appendmat=False, format="4", oned_as="column")
    else:
        stated = f"Transform: {kind}\nParameters: {spelled(parameters)}\nFixedParameters: {spelled(center)}\n"
        path.write_text(f"{_TEXT.decode()} V1.0\n#Transform 0\n{stated}", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ kinds of transforms

#: class of ITK to the parts that its parameters consist of, in their order
_PARTS = {
    "AffineTransform": "matrix shift",
    "MatrixOffsetTransformBase": "matrix shift",
    "Rigid3DTransform": "matrix shift",
    "ScalableAffineTransform": "matrix shift",
    "FixedCenterOfRotationAffineTransform": "matrix shift",
    "CenteredAffineTransform": "matrix center shift",
    "Euler2DTransform": "angle shift",
    "Rigid2DTransform": "angle shift",
    "CenteredRigid2DTransform": "angle center shift",
    "Similarity2DTransform": "scale angle shift",
    "CenteredSimilarity2DTransform": "scale angle center shift",
    "Euler3DTransform": "angles shift",
    "CenteredEuler3DTransform": "angles center shift",
    "VersorTransform": "versor",
    "VersorRigid3DTransform": "versor shift",
    "QuaternionRigidTransform": "quaternion shift",
    "Similarity3DTransform": "versor shift scale",
    "ScaleVersor3DTransform": "versor shift sums",
    "ScaleSkewVersor3DTransform": "versor shift sums skews",
    "ComposeScaleSkewVersor3DTransform": "versor shift scales shears",
    "ScaleTransform": "scales",
    "ScaleLogarithmicTransform": "logarithms",
    "TranslationTransform": "shift",
    "IdentityTransform": "",
}
# numbers of a part; of others there are as many as dimensions
_COUNTS = {"angle": 1, "scale": 1, "quaternion": 4, "skews": 6}


def centered_matrix(kind: str, parameters: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """The matrix ``(D+1, D+1)``, LPS, of an ITK transform.

    Args:
        kind: name of its class with precision and dimension, such as ``Euler3DTransform_double_3_3``.
        parameters: as its file states them.
        fixed: its fixed parameters; the center comes first.
    """
    found = re.fullmatch(r"(\w+?)_(?:double|float)_([23])_\2", kind)
    if found is None or found[1] not in _PARTS:
        raise ValueError(f"a linear 2D or 3D transform is needed, it holds {kind}")
    dims, names = int(found[2]), _PARTS[found[1]].split()
    ends = np.cumsum([dims * dims if name == "matrix" else _COUNTS.get(name, dims) for name in names], dtype=int)
    wanted = int(ends[-1]) if names else 0
    if len(parameters) != wanted:
        raise ValueError(f"{len(parameters)} parameters instead of {wanted}")
    parts = dict(zip(names, np.split(parameters, ends[:-1]), strict=True)) if names else {}
    center = parts.get("center", fixed[:dims] if len(fixed) >= dims else np.zeros(dims))
    matrix = np.eye(dims + 1)
    for name, part in parts.items():
        matrix[:dims, :dims] = _linear(name, part, matrix[:dims, :dims], fixed)
    matrix[:dims, dims] = parts.get("shift", np.zeros(dims)) + center - matrix[:dims, :dims] @ center
    return matrix


def _linear(name: str, part: np.ndarray, linear: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """The linear part ``(D, D)`` of a transform when another part of its parameters is taken into account."""
    if name == "matrix":
        return part.reshape(linear.shape)
    if name in ("angle", "angles", "versor", "quaternion"):
        return linear @ _rotation(name, part, fixed)
    if name in ("scale", "scales", "logarithms"):
        return linear * (np.exp(part) if name == "logarithms" else part)
    # ITK adds some scales and skews to the rotation's entries, it does not multiply with them
    if name == "sums":
        return linear + np.diag(part - 1.0)
    if name == "skews":
        added = np.zeros((3, 3))
        added[~np.eye(3, dtype=bool)] = part
        return linear + added
    if name == "shears":
        upper = np.eye(3)
        upper[np.triu_indices(3, 1)] = part
        return linear @ upper
    return linear


def _rotation(name: str, part: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    if name == "angle":
        return np.asarray(Rotation.from_rotvec([0.0, 0.0, part[0]]).as_matrix()[:2, :2])
    if name == "angles":
        # a fourth fixed parameter tells in which order
        order = [2, 1, 0] if len(fixed) > 3 and fixed[3] else [2, 0, 1]
        turn = Rotation.from_euler("".join("XYZ"[axis] for axis in order), part[order])
    else:
        w = [] if name == "quaternion" else [np.sqrt(max(0.0, 1.0 - part @ part))]
        turn = Rotation.from_quat([*part, *w])
    return np.asarray(turn.as_matrix())


# ------------------------------------------------------------------------------------------------------------- files

# kind, parameters and fixed parameters of each transform
Stated = list[tuple[str, np.ndarray, np.ndarray]]


def _parse_text(content: str) -> Stated:
    found: list[dict[str, str]] = []
    for one in content.splitlines():
        key, separator, value = one.partition(":")
        if one.startswith("#") or not separator:
            continue
        if key == "Transform":
            found.append({})
        found[-1][key] = value.strip()

    def numbers(text: str) -> np.ndarray:
        return np.array(text.split(), dtype=np.float64)

    return [
        (one["Transform"], numbers(one.get("Parameters", "")), numbers(one.get("FixedParameters", ""))) for one in found
    ]


def _parse_matlab(path: Path) -> Stated:
    from scipy.io import loadmat, whosmat

    try:
        kinds = [name for name, _, _ in whosmat(path, appendmat=False)]
        arrays = loadmat(path, appendmat=False)
    except Exception as error:  # it raises many things for what is none
        raise ValueError(f"it is no Matlab 4 file of real matrices ({error})") from error
    if len(kinds) != 2 or kinds[1] != "fixed":
        raise ValueError(
            f"it holds {', '.join(kinds)} instead of the parameters and the fixed parameters of one transform"
        )
    parameters, fixed = (np.asarray(arrays[name], dtype=np.float64).ravel() for name in kinds)
    return [(kinds[0], parameters, fixed)]


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
    origin, *units = (transform.TransformPoint(p.tolist()) for p in np.vstack([np.zeros(dims), np.eye(dims)]))
    matrix[:dims, dims] = origin
    matrix[:dims, :dims] = (np.array([list(unit) for unit in units]) - matrix[:dims, dims]).T
    return matrix


def write_hdf5(path: Path, matrix: np.ndarray, center: np.ndarray | None = None, first: Any = None) -> None:
    """A matrix, LPS; composed with what acts ``first``, a transform of ITK in single precision."""
    import itk

    dims = len(matrix) - 1
    kind, dtype = (itk.D, np.float64) if first is None else (itk.F, np.float32)
    transform: Any = itk.AffineTransform[kind, dims].New()
    transform.SetCenter([0.0] * dims if center is None else center.tolist())
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(matrix[:dims, :dims], dtype=dtype)))
    transform.SetOffset(matrix[:dims, dims].tolist())
    if first is not None:
        affine, transform = transform, itk.CompositeTransform[kind, dims].New()
        transform.AddTransform(affine)
        transform.AddTransform(first)
    itk.transformwrite(transform, str(path))
