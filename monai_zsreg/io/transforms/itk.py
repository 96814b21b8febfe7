# SPDX-License-Identifier: Apache-2.0
"""ITK's transform files: ``.tfm`` and ``.txt`` (text), ``.mat`` (Matlab 4), ``.h5`` and ``.hdf5`` (HDF5).

ITK, SimpleITK, ANTs, Convert3D and 3D Slicer write them. Such a transform maps points of the fixed image to points of
the moving image, as ours does, but in LPS coordinates. They are read and written here, because ITK takes more than ten
seconds to import what does, and its Python does not know every class.

The world of a file without orientation, such as PNG, is not the same to every reader: MONAI's ``PILReader`` calls the
pixel axes RAS and ITK calls them LPS. A transform between such images is right in ITK only if they were loaded as here,
or with MONAI's ``ITKReader``.
"""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import numpy as np

from monai_zsreg.geometry import flip_points, lps_from_ras
from monai_zsreg.io.transforms.images import Images
from monai_zsreg.io.transforms.text import spelled

_TEXT = b"#Insight Transform File"
_COMPOSITE = "CompositeTransform"
_HDF5 = (".h5", ".hdf5")


def sniff(content: bytes) -> bool:
    if content.startswith(b"\x89HDF"):
        return b"TransformType" in content
    # Matlab 4 begins with whole numbers of four bytes, small ones, so there are zeros among them
    return content.startswith(_TEXT) or b"\0" in content[:20] and not content.startswith(b"MATLAB")


def world(images: Images, name: str, dims: int) -> np.ndarray:
    return lps_from_ras(dims)


def read(path: Path, images: Images) -> np.ndarray:
    return reduce(np.matmul, (centered_matrix(*one) for one in parts(path)))


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    dims = len(matrix) - 1
    known = images.known("fixed")
    center = flip_points(known.grid.center.numpy()) if known and known.grid.dims == dims else np.zeros(dims)
    linear = matrix[:dims, :dims]
    parameters = np.array([*linear.ravel(), *(matrix[:dims, dims] + linear @ center - center)])
    kind = f"AffineTransform_double_{dims}_{dims}"
    if path.suffix.lower() in _HDF5:
        write_hdf5(path, [(kind, parameters, center)])
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


def parts(path: Path) -> Stated:
    """The transform of a file, or those that its composite consists of, of which the last one acts first."""
    if path.suffix.lower() in _HDF5:
        stated = _parse_hdf5(path)
    else:
        content = path.read_bytes()
        stated = _parse_text(content.decode()) if content.startswith(_TEXT) else _parse_matlab(path)
    found = [one for one in stated if not one[0].startswith(_COMPOSITE)]
    if not found or len(found) > 1 and len(found) == len(stated):
        raise ValueError(f"{len(found)} transforms instead of one")
    return found


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


def _parse_hdf5(path: Path) -> Stated:
    import h5py

    found = []
    try:
        with h5py.File(path, "r") as file:
            group = file["TransformGroup"]
            for number in sorted(group, key=int):
                node = group[number]
                # "Tranform" is how ITK 4 spells it; a composite has neither
                given = [node.get(f"Transform{n}", node.get(f"Tranform{n}")) for n in ("Parameters", "FixedParameters")]
                numbers = [np.zeros(0) if some is None else np.array(some, dtype=np.float64) for some in given]
                found.append((node["TransformType"].asstr()[0], *numbers))
    except Exception as error:  # it raises many things for what is none
        raise ValueError(f"it is no HDF5 file of ITK ({error})") from error
    return found


def write_hdf5(path: Path, transforms: Stated) -> None:
    """Write an HDF5 file. A composite comes before its parts, of which the last one acts first."""
    import h5py

    with h5py.File(path, "w") as file:
        for number, (kind, parameters, fixed) in enumerate(transforms):
            node = file.create_group(f"TransformGroup/{number}")
            node.create_dataset("TransformType", data=[kind], dtype=h5py.string_dtype("ascii"))
            if not kind.startswith(_COMPOSITE):
                node["TransformParameters"], node["TransformFixedParameters"] = parameters, fixed
