# SPDX-License-Identifier: Apache-2.0
"""The rows of a matrix as text, as ours, greedy's, Convert3D's, NiftyReg's and MRtrix's files have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_zsreg.io.transforms.images import Images

__all__ = ["matrix_rows", "numbers", "read", "sniff", "sniff_greedy", "write"]


def matrix_rows(content: str) -> list[list[float]]:
    """The numbers of every line that has any; ``#`` starts a comment."""
    lines = [line.partition("#")[0].split() for line in content.splitlines()]
    return [[float(word) for word in line] for line in lines if line]


def numbers(content: bytes) -> list[list[float]] | None:
    """`matrix_rows`, or None where the content is anything else."""
    try:
        return matrix_rows(content.decode("utf-8-sig")) or None
    except ValueError:
        return None


def sniff(content: bytes) -> bool:
    return numbers(content) is not None


def sniff_greedy(content: bytes) -> bool:
    # FLIRT leaves two blanks behind every number, also the last of a line
    lines = [line for line in content.rstrip(b"\r\n").splitlines() if line.strip()]
    flirt = len(lines) == 4 and all(line.endswith(b"  ") and line.count(b"  ") == 4 for line in lines)
    return sniff(content) and not flirt


def read(path: Path, images: Images) -> np.ndarray:
    rows = matrix_rows(path.read_text(encoding="utf-8-sig"))
    if len(rows) == 3 and all(len(row) == 4 for row in rows) and images.format == "mrtrix":
        rows.append([0.0, 0.0, 0.0, 1.0])
    if len(rows) not in (3, 4) or any(len(row) != len(rows) for row in rows):
        raise ValueError("it does not hold four rows of four numbers, or in 2D three of three")
    return np.array(rows)


def write(path: Path, matrix: np.ndarray, images: Images) -> None:
    # repr: the shortest text that reads back as the same number
    lines = [" ".join(repr(float(value)) for value in row) + "\n" for row in matrix]
    path.write_text("".join(lines), encoding="utf-8")
