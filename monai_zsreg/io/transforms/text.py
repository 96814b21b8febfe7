# SPDX-License-Identifier: Apache-2.0
"""The rows of a matrix as text, as ours, greedy's, Convert3D's, NiftyReg's and MRtrix's files have them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from monai_zsreg.io.transforms.images import Images


def matrix_rows(path: Path) -> list[list[float]]:
    """The numbers of every line that has any; ``#`` starts a comment."""
    return _parse(path.read_bytes())


def rows_of(content: bytes) -> list[list[float]]:
    """The same of a file's content; empty where that is anything else."""
    try:
        return _parse(content)
    except ValueError:
        return []


def spelled(values: Iterable[float]) -> str:
    """Each number as the shortest text that reads back as the same one."""
    return " ".join(repr(float(value)) for value in values)


def sniff(content: bytes) -> bool:
    return bool(rows_of(content))


def sniff_greedy(content: bytes) -> bool:
    # FLIRT leaves two blanks behind every number, also the last of a line
    lines = [line for line in content.rstrip(b"\r\n").splitlines() if line.strip()]
    flirt = len(lines) == 4 and all(line.endswith(b"  ") and line.count(b"  ") == 4 for line in lines)
    return sniff(content) and not flirt


def read(path: Path, images: Images) -> np.ndarray:
    return _square(matrix_rows(path))


def read_mrtrix(path: Path, images: Images) -> np.ndarray:
    rows = matrix_rows(path)
    return _square([*rows, [0.0, 0.0, 0.0, 1.0]] if [len(row) for row in rows] == [4] * 3 else rows)


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    path.write_text("".join(spelled(row) + "\n" for row in matrix), encoding="utf-8")


def _parse(content: bytes) -> list[list[float]]:
    lines = [line.partition("#")[0].split() for line in content.decode("utf-8-sig").splitlines()]
    return [[float(word) for word in line] for line in lines if line]


def _square(rows: list[list[float]]) -> np.ndarray:
    if len(rows) not in (3, 4) or any(len(row) != len(rows) for row in rows):
        raise ValueError("it does not hold four rows of four numbers, or in 2D three of three")
    return np.array(rows)
