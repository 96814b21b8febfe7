# SPDX-License-Identifier: Apache-2.0
"""Landmark files: CSV, and the two point formats of 3D Slicer."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_zsreg.errors import RegistrationError, require
from monai_zsreg.geometry import flip_points

_FORMATS = "a readable .csv (header x,y,z, RAS mm), .fcsv or .mrk.json file with finite points"


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Points of one image.

    Args:
        points: ``[N, D]`` float64, world coordinates, RAS mm.
        labels: one name a point; empty strings where the file has none.
    """

    points: np.ndarray
    labels: tuple[str, ...]


def read_landmarks(path: str | os.PathLike) -> Landmarks:
    """Read points, whatever coordinate system the file states, as RAS mm.

    Args:
        path: ``.csv`` with the header ``x,y,z`` (or ``x,y``; a column ``label`` or ``name`` is kept), in RAS mm;
            ``.fcsv`` or ``.mrk.json`` of 3D Slicer in RAS or LPS.

    Raises:
        RegistrationError: the file cannot be read, has another format or coordinate system, or holds a point without
            a position.
    """
    file = Path(path)
    name = file.name.lower()
    readers = {".csv": _read_csv, ".fcsv": _read_fcsv, ".mrk.json": _read_markups}
    reader = next((r for suffix, r in readers.items() if name.endswith(suffix)), None)
    if reader is None:
        raise RegistrationError("path", str(path), _FORMATS)
    try:
        points, labels = reader(file.read_text(encoding="utf-8-sig"))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RegistrationError("path", str(path), f"{_FORMATS} ({type(error).__name__}: {error})") from error
    usable = points.ndim == 2 and points.shape[1] in (2, 3) and bool(np.isfinite(points).all())
    require(usable, "path", str(path), _FORMATS)
    return Landmarks(points, tuple(labels))


def pair_landmarks(fixed: Landmarks, moving: Landmarks) -> tuple[np.ndarray, np.ndarray]:
    """Bring the points of two images into one order.

    By label where both have the same labels, each once; by row where no label occurs in both (Slicer numbers points
    by list name).

    Returns:
        Fixed and moving points, ``[N, D]`` each.

    Raises:
        RegistrationError: the numbers of points or of coordinates differ, or the labels agree only in part.
    """
    shape = fixed.points.shape
    require(moving.points.shape == shape, "moving", moving.points.shape, f"as many landmarks as fixed, {shape}")
    one, two = set(fixed.labels) - {""}, set(moving.labels) - {""}
    if fixed.labels == moving.labels or not one & two:
        return fixed.points, moving.points
    each_once = one == two and len(one) == len(fixed.labels)
    require(each_once, "moving", moving.labels, f"the labels of fixed, each once: {fixed.labels}")
    return fixed.points, moving.points[[moving.labels.index(label) for label in fixed.labels]]


def _read_csv(text: str) -> tuple[np.ndarray, list[str]]:
    header, *rows = _rows(text) or [[]]
    if any(len(row) != len(header) for row in rows):
        raise ValueError("a row has another number of columns than the header")
    return _table([column.strip().lower() for column in header], rows)


def _read_fcsv(text: str) -> tuple[np.ndarray, list[str]]:
    comments = (line.lstrip("# ").partition("=") for line in text.splitlines() if line.startswith("#"))
    stated = {key.strip().lower(): value.strip() for key, separator, value in comments if separator}
    columns = stated.get("columns", "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID").split(",")
    points, labels = _table([column.strip() for column in columns], _rows(text))
    # Slicer up to 4.10 writes RAS as 0, later versions write the name
    system = stated.get("coordinatesystem", "RAS").upper()
    return _to_ras(points, {"0": "RAS", "1": "LPS"}.get(system, system)), labels


def _rows(text: str) -> list[list[str]]:
    return list(csv.reader(line for line in text.splitlines() if line.strip() and not line.startswith("#")))


def _table(columns: list[str], rows: list[list[str]]) -> tuple[np.ndarray, list[str]]:
    """Points and labels of rows with named columns; a row may end before its label."""
    if not {"x", "y"} <= set(columns):
        raise ValueError("the header has no columns x and y")
    axes = [columns.index(axis) for axis in ("x", "y", "z") if axis in columns]
    label = next((columns.index(column) for column in ("label", "name") if column in columns), len(columns))
    points = np.array([[float(row[axis]) for axis in axes] for row in rows])
    return points, [row[label].strip() if label < len(row) else "" for row in rows]


def _read_markups(text: str) -> tuple[np.ndarray, list[str]]:
    parts: list[np.ndarray] = []
    labels: list[str] = []
    for markup in json.loads(text)["markups"]:
        unit: Any = markup.get("coordinateUnits", "mm")
        if (unit[0] if isinstance(unit, list) else unit) != "mm":
            raise ValueError(f"coordinateUnits {unit} instead of mm")
        points = markup.get("controlPoints", [])
        for number, point in enumerate(points, start=1):
            if point.get("positionStatus", "defined") != "defined":
                raise ValueError(f"point {point.get('label', number)!r} has no defined position")
        if points:
            # the format's own default is LPS
            system = str(markup.get("coordinateSystem", "LPS")).upper()
            parts.append(_to_ras(np.array([point["position"] for point in points], dtype=np.float64), system))
            labels += [str(point.get("label", "")) for point in points]
    return np.concatenate(parts) if parts else np.zeros((0, 0)), labels


def _to_ras(points: np.ndarray, system: str) -> np.ndarray:
    if system not in ("RAS", "LPS"):
        raise ValueError(f"coordinate system {system} instead of RAS or LPS")
    return flip_points(points) if system == "LPS" else points
