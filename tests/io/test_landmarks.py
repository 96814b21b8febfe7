# SPDX-License-Identifier: Apache-2.0
"""Landmark files as 3D Slicer writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import flip_points, ras_to_lps
from monai_zsreg.io.landmarks import Landmarks, pair_landmarks, read_landmarks
from monai_zsreg.metrics import landmark_tre

RAS = np.array([[12.5, -3.25, 40.0], [0.0, 7.0, -1.5]])
FCSV = """# Markups fiducial file version = {version}
# CoordinateSystem = {system}
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID
1,{a},0,0,0,1,1,1,0,"tip, left",,vtkMRMLScalarVolumeNode1
2,{b},0,0,0,1,1,1,0,F-2,,
"""


def fcsv(version: str, system: str, points: np.ndarray) -> str:
    a, b = (",".join(str(x) for x in point) for point in points)
    return FCSV.format(version=version, system=system, a=a, b=b)


def markups(points: np.ndarray, **changes) -> str:
    controls = [
        {"id": str(i), "label": f"F-{i}", "position": point.tolist(), "positionStatus": "defined"}
        for i, point in enumerate(points, start=1)
    ]
    markup = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": controls}
    return json.dumps({"markups": [markup | changes]})


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.csv", "x,y,z\n12.5,-3.25,40\n0,7,-1.5\n"),
        ("p.CSV", "label, Z, X, Y\nF-1,40,12.5,-3.25\nF-2,-1.5,0,7\n"),
        ("bom.csv", "\ufeffx,y,z\r\n12.5,-3.25,40\r\n0,7,-1.5\r\n"),
        ("old.fcsv", fcsv("4.6", "0", RAS)),
        ("new.fcsv", fcsv("4.11", "LPS", RAS * [-1, -1, 1])),
        ("code.fcsv", fcsv("4.11", "1", RAS * [-1, -1, 1])),
        ("ras.fcsv", fcsv("4.11", "RAS", RAS)),
        ("unstated.fcsv", "1,12.5,-3.25,40,0,0,0,1,1,1,0,F-1,,\n2,0,7,-1.5,0,0,0,1,1,1,0,F-2,,\n"),
        ("a.mrk.json", markups(RAS * [-1, -1, 1])),
        ("b.mrk.json", markups(RAS, coordinateSystem="RAS")),
    ],
)
def test_every_format_gives_ras(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    got = read_landmarks(file)
    np.testing.assert_array_equal(got.points, RAS)
    assert len(got.labels) == 2


def test_labels_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.fcsv").write_text(fcsv("4.11", "LPS", RAS))
    (tmp_path / "b.mrk.json").write_text(markups(RAS))
    assert read_landmarks(tmp_path / "a.fcsv").labels == ("tip, left", "F-2")
    assert read_landmarks(tmp_path / "b.mrk.json").labels == ("F-1", "F-2")


def test_2d_csv(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("x,y\n1,2\n")
    assert read_landmarks(tmp_path / "p.csv").points.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "x,y,z\n1,2,3\n"),
        ("p.csv", "1,2,3\n4,5,6\n"),
        ("p.csv", "x,y,z\n1,2\n"),
        ("p.csv", "x,y,z\n1,2,nan\n"),
        ("p.csv", "x,y,z\n"),
        ("p.csv", ""),
        ("p.fcsv", fcsv("4.11", "IJK", RAS)),
        ("p.mrk.json", markups(RAS, coordinateSystem="IJK")),
        ("p.mrk.json", markups(RAS, coordinateUnits="um")),
        ("p.mrk.json", markups(RAS, controlPoints=[{"label": "F-1", "positionStatus": "undefined", "position": []}])),
        ("p.mrk.json", markups(RAS, controlPoints=[])),
        ("p.mrk.json", "{"),
        ("p.mrk.json", "[]"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RegistrationError, match="mrk.json"):
        read_landmarks(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RegistrationError, match="nothing.csv"):
        read_landmarks(tmp_path / "nothing.csv")


def test_pairs_by_label_or_by_row() -> None:
    fixed = Landmarks(RAS, ("a", "b"))
    one, two = pair_landmarks(fixed, Landmarks(RAS[::-1], ("b", "a")))
    np.testing.assert_array_equal(one, two)
    for labels in (("", ""), ("M-1", "M-2")):
        np.testing.assert_array_equal(pair_landmarks(fixed, Landmarks(RAS[::-1], labels))[1], RAS[::-1])
    with pytest.raises(RegistrationError, match="labels"):
        pair_landmarks(fixed, Landmarks(RAS, ("a", "c")))
    with pytest.raises(RegistrationError, match="as many"):
        pair_landmarks(fixed, Landmarks(RAS[:1], ("a",)))


def test_error_between_two_files(tmp_path: Path) -> None:
    (tmp_path / "fixed.csv").write_text("label,x,y,z\nF-2,0,7,-1.5\nF-1,12.5,-3.25,40\n")
    (tmp_path / "moving.mrk.json").write_text(markups((RAS + [0, 3, 4]) * [-1, -1, 1]))
    pair = pair_landmarks(read_landmarks(tmp_path / "fixed.csv"), read_landmarks(tmp_path / "moving.mrk.json"))
    assert landmark_tre(np.eye(4), *pair).tolist() == pytest.approx([5.0, 5.0])


@pytest.mark.parametrize("dims", [2, 3])
def test_flipped_points_agree_with_the_flipped_matrix(dims: int) -> None:
    rng = np.random.default_rng(0)
    matrix, points = np.eye(dims + 1), rng.normal(size=(5, dims))
    matrix[:dims] = rng.normal(size=(dims, dims + 1))
    moved = points @ matrix[:dims, :dims].T + matrix[:dims, dims]
    lps = ras_to_lps(matrix)
    other = flip_points(points) @ lps[:dims, :dims].T + lps[:dims, dims]
    np.testing.assert_allclose(flip_points(other), moved, atol=1e-12)


def test_landmarks_can_be_compared(tmp_path):
    (tmp_path / "a.csv").write_text("x,y,z\n1,2,3\n4,5,6\n")
    one, other = (read_landmarks(tmp_path / "a.csv") for _ in range(2))
    assert one == one and one != other and one in [other, one]
