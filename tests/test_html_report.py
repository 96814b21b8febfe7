# SPDX-License-Identifier: Apache-2.0
"""Tests of the HTML reports: whole, offline, escaped, in the right order."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

import monai_zsreg
from monai_zsreg.errors import RegistrationWarning
from monai_zsreg.registration import RegistrationResult

pytest.importorskip("matplotlib")

from monai_zsreg.html_report import save_html_report, save_index  # noqa: E402
from monai_zsreg.report import cut, planes_of  # noqa: E402

VOID = {"meta", "img", "input", "link", "br"}


class Page(HTMLParser):
    """Tags, text and what the page refers to; closing tags must match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.rows: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
            if self.rows:
                self.rows[-1] += data


def pair(dims: int, spacing: tuple[float, ...]) -> tuple[MetaTensor, MetaTensor]:
    """An object with texture, and the same one shifted by its header."""
    rng = np.random.default_rng(0)
    shape = (48, 44, 20)[:dims]
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    waves = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    values = (sum(a**2 for a in axes) < 0.6) * (1 + 0.4 * waves / waves.std())
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    other = affine.clone()
    other[0, dims] = 4.0
    image = torch.as_tensor(values[None]).float()
    return MetaTensor(image, affine=affine), MetaTensor(image.clone(), affine=other)


@pytest.fixture(scope="module", params=[2, 3])
def result(request) -> RegistrationResult:
    return monai_zsreg.register(*pair(request.param, (1.0, 1.2, 3.0)[: request.param]))


def test_report_stands_alone_and_says_what_a_reader_needs(result: RegistrationResult, tmp_path: Path) -> None:
    name = 'a <script>alert("x")</script> & b'
    save_html_report(result, tmp_path / "r.html", name, {"fixed": "<img src=http://example.org>.nii"})
    page = Page(tmp_path / "r.html")
    assert page.tags.count("script") == 1 and "img src=http" in page.text and name in page.text
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    for told in (
        result.quality.verdict,
        "Expected error",
        "preset",
        "robust",
        "rotation 1, degrees",
        "torch",
        "seconds",
    ):
        assert told in page.text
    for number in result.affine.ravel():
        assert f"{number:.6f}" in page.text
    assert (tmp_path / "r.png").stat().st_size > 5000
    # pictures show something
    from matplotlib.image import imread

    for link in page.links:
        assert imread(io.BytesIO(base64.b64decode(link.split(",")[1]))).std() > 0.01


def test_failed_registration_gets_a_report_that_says_so(tmp_path: Path) -> None:
    fixed, _ = pair(2, (1.0, 1.0))
    noise = torch.rand(fixed.shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RegistrationWarning):
        failed = monai_zsreg.register(fixed, MetaTensor(noise))
    save_html_report(failed, tmp_path / "r.html", picture=False)
    page = Page(tmp_path / "r.html")
    assert "FAIL" in page.text and failed.warnings[0] in page.text and "No transform was found" in page.text
    assert not (tmp_path / "r.png").exists() and "Expected error" not in page.text


def test_keypoints_are_drawn_where_the_preset_has_them(result: RegistrationResult, tmp_path: Path) -> None:
    dims = len(result.affine) - 1
    points = np.random.default_rng(0).uniform(5, 15, (6, dims))
    result.keypoints = {"fixed": points, "moving": points + 1.0}
    save_html_report(result, tmp_path / "r.html")
    assert "Keypoints of fixed" in Page(tmp_path / "r.html").text
    result.keypoints = {}


@pytest.mark.parametrize("dims", [2, 3])
def test_position_of_a_point_is_where_its_voxel_is_drawn(dims: int) -> None:
    volume = np.zeros((7, 9, 11)[:dims])
    point = np.array([[2, 5, 8][:dims]])
    volume[tuple(point[0])] = 1.0
    for plane in planes_of(volume, (1.0, 2.0, 3.0)[:dims]):
        picture = cut(volume, plane)
        assert picture.shape == plane.shape
        column, row = plane.position(point.astype(float))[0]
        assert picture[int(row), int(column)] == 1.0
        assert plane.width == picture.shape[1] * plane.in_plane[0]


def test_index_is_sorted_worst_first_and_escaped(tmp_path: Path) -> None:
    rows = [
        {"name": "fine", "verdict": "PASS", "reasons": "", "score": 0.4, "link": "fine/report.html"},
        {"name": "a:b <i>", "verdict": "FAIL", "reasons": "overlap <41 %>", "score": None, "link": 'x:"y/r.html'},
        {"name": "worse", "verdict": "WARN", "reasons": "", "score": -0.9},
        {"name": "doubtful", "verdict": "WARN", "reasons": "", "score": -0.1, "thumbnail": "d/overview.png"},
    ]
    save_index(rows, tmp_path / "index.html", "A & B")
    page = Page(tmp_path / "index.html")
    found = [next(name for name in ("fine", "a:b", "worse", "doubtful") if name in row) for row in page.rows[1:]]
    assert found == ["a:b", "worse", "doubtful", "fine"]
    assert "i" not in page.tags and "a:b <i>" in page.text and "overlap <41 %>" in page.text
    assert "4 pairs: 1 FAIL, 2 WARN, 1 PASS" in page.text
    assert all(re.match(r"\./[\w./%]+$", link) for link in page.links) and len(page.links) == 3
