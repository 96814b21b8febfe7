# SPDX-License-Identifier: Apache-2.0
"""MINC's ``.xfm``, which FreeSurfer uses for its ``talairach.xfm`` too: moving to fixed, RAS."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from monai_zsreg.io.transforms.images import Images
from monai_zsreg.io.transforms.text import spelled

_FIRST_LINE = "MNI Transform File"


def sniff(content: bytes) -> bool:
    return content.startswith(_FIRST_LINE.encode())


def read(path: Path, images: Images) -> np.ndarray:
    content = re.sub(r"%.*", "", path.read_text(encoding="utf-8-sig"))
    if not content.startswith(_FIRST_LINE):
        raise ValueError(f"its first line is not {_FIRST_LINE!r}")
    total, inverse, found = np.eye(4), False, False
    for key, value in re.findall(r"(\w+)\s*=\s*([^;]*?)\s*;", content):
        if key == "Transform_Type":
            if value != "Linear":
                raise ValueError(f"a transform of type {value} instead of Linear")
            inverse = False
        elif key == "Invert_Flag":
            inverse = value == "True"
        elif key == "Linear_Transform":
            one = np.vstack([np.array(value.split(), dtype=np.float64).reshape(3, 4), [0.0, 0.0, 0.0, 1.0]])
            total, found = (np.linalg.inv(one) if inverse else one) @ total, True
    if not found:
        raise ValueError("it holds no Linear_Transform")
    return total


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    lines = [_FIRST_LINE, "", "Transform_Type = Linear;", "Linear_Transform =", *map(spelled, matrix[:3])]
    path.write_text("\n".join(lines) + ";\n", encoding="utf-8")
