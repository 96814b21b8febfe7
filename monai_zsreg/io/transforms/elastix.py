# SPDX-License-Identifier: Apache-2.0
"""elastix' ``TransformParameters``: fixed to moving, LPS, with the transforms that it starts from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from monai_zsreg.geometry import itk_lattice
from monai_zsreg.io.transforms.images import Images
from monai_zsreg.io.transforms.itk import centered_matrix

_KINDS = {
    "TranslationTransform": "TranslationTransform",
    "EulerTransform": "Euler{}DTransform",
    "SimilarityTransform": "Similarity{}DTransform",
    "AffineTransform": "AffineTransform",
}
_INITIAL = ("InitialTransformParameterFileName", "InitialTransformParametersFileName")
_LONGEST_CHAIN = 20


def sniff(content: bytes) -> bool:
    return re.search(rb"^\s*\(Transform\s", content, re.MULTILINE) is not None


def read(path: Path, images: Images, chain: int = _LONGEST_CHAIN) -> np.ndarray:
    content = re.sub(r"//.*", "", path.read_text(encoding="utf-8-sig"))
    words = {
        key: [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', values)]
        for key, values in re.findall(r"\(\s*(\w+)([^)]*)\)", content)
    }
    kind, dims = words["Transform"][0], int(words["FixedImageDimension"][0])
    if kind not in _KINDS:
        raise ValueError(f"a transform of kind {kind} instead of one of {', '.join(_KINDS)}")
    if words.get("UseDirectionCosines", ["true"])[0] == "false":
        raise ValueError("it was made without the directions of the images (UseDirectionCosines false)")
    parameters = np.array(words["TransformParameters"], dtype=np.float64)
    fixed = np.array(words.get("CenterOfRotationPoint", [0.0] * dims), dtype=np.float64)
    if words.get("ComputeZYX", ["false"])[0] == "true":
        fixed = np.append(fixed, 1.0)
    matrix = centered_matrix(f"{_KINDS[kind].format(dims)}_double_{dims}_{dims}", parameters, fixed)
    start = next((words[key][0] for key in _INITIAL if key in words), "NoInitialTransform")
    if start == "NoInitialTransform":
        return matrix
    if chain == 0:
        raise ValueError("the transforms that it starts from do not end")
    # the stated folder may be another machine's
    beside = path.parent / Path(start.replace("\\", "/")).name
    initial = read(Path(start) if Path(start).is_file() else beside, images, chain - 1)
    if words.get("HowToCombineTransforms", ["Compose"])[0] == "Add":
        return matrix + initial - np.eye(dims + 1)
    return matrix @ initial


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    dims = len(matrix) - 1
    grid = images.need("fixed", dims).grid
    spacing, origin, direction = itk_lattice(grid)
    parameters = [*matrix[:dims, :dims].ravel(), *matrix[:dims, dims]]
    fields: dict[str, list] = {
        "Transform": ["AffineTransform"],
        "NumberOfParameters": [len(parameters)],
        "TransformParameters": parameters,
        "InitialTransformParameterFileName": ["NoInitialTransform"],
        "HowToCombineTransforms": ["Compose"],
        "FixedImageDimension": [dims],
        "MovingImageDimension": [dims],
        "FixedInternalImagePixelType": ["float"],
        "MovingInternalImagePixelType": ["float"],
        "Size": list(grid.shape),
        "Index": [0] * dims,
        "Spacing": list(spacing),
        "Origin": list(origin),
        # column by column
        "Direction": list(direction.T.ravel()),
        "UseDirectionCosines": ["true"],
        "CenterOfRotationPoint": [0.0] * dims,
        "ResampleInterpolator": ["FinalLinearInterpolator"],
        "Resampler": ["DefaultResampler"],
        "DefaultPixelValue": [0],
        "ResultImageFormat": ["nii.gz"],
        "ResultImagePixelType": ["float"],
    }
    # words in quotation marks, numbers without
    lines = [f"({key} {' '.join(map(json.dumps, values))})" for key, values in fields.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
