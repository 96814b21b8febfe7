# SPDX-License-Identifier: Apache-2.0
"""Our own JSON: the matrix with what it maps, and the report of a registration, which holds the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np

from monai_zsreg.errors import RegistrationWarning
from monai_zsreg.io.transforms.images import Images

_MAPS = "points of the fixed image to points of the moving image"


def sniff(content: bytes) -> bool:
    return content.lstrip().startswith(b"{")


def read(path: Path, images: Images) -> np.ndarray:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict) or "matrix" not in content:
        raise ValueError('it has no "matrix"')
    for key, known in (("unit", "mm"), ("space", "RAS")):
        if content.get(key, known) != known:
            raise ValueError(f"{key} {content[key]!r} instead of {known!r}")
    for key in ("maps", "matrix_maps"):
        if not str(content.get(key, _MAPS)).startswith(_MAPS):
            raise ValueError(f"{key} {content[key]!r} instead of {_MAPS!r}")
    if content.get("success") is False or content.get("verdict") == "FAIL":
        warnings.warn(
            f"{path} reports a registration that failed: do not trust its matrix", RegistrationWarning, stacklevel=3
        )
    return np.array(content["matrix"], dtype=np.float64)


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    content = {"matrix": matrix.tolist(), "maps": _MAPS, "unit": "mm", "space": "RAS"}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
