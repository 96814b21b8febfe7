# SPDX-License-Identifier: Apache-2.0
"""Tests of the pages: whole, offline, escaped, in the right order."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from scipy import ndimage

import monai_zsreg
from monai_zsreg.app.report import save_html_report, save_index, save_interactive
from monai_zsreg.errors import RegistrationWarning
from monai_zsreg.io import Image
from monai_zsreg.registration import RegistrationResult

VOID = {"meta", "img", "input", "link", "br"}


class Page(HTMLParser):
    """Tags, text and what the page refers to; closing tags must match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.classes: list[str] = []
        self.text = ""
        self.rows: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.classes += [value or "" for name, value in attrs if name == "class"]
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


def pair(dims: int, unit: str = "mm") -> tuple[Image, Image]:
    """An object with texture, and the same one shifted by its header."""
    rng = np.random.default_rng(0)
    shape = (48, 44, 20)[:dims]
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    waves = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    values = (sum(a**2 for a in axes) < 0.6) * (1 + 0.4 * waves / waves.std())
    affine = torch.diag(torch.tensor([*(1.0, 1.2, 3.0)[:dims], 1.0], dtype=torch.float64))
    other = affine.clone()
    other[0, dims] = 4.0
    image = torch.as_tensor(values[None]).float()
    return Image(image, affine, {"unit": unit}), Image(image, other, {"unit": unit})


@pytest.fixture(scope="module", params=[2, 3])
def result(request: pytest.FixtureRequest) -> RegistrationResult:
    return monai_zsreg.register(*pair(request.param))


METRICS = {
    "region": "foreground",
    "dice_of": "foregrounds",
    "before": {"nmi": 0.1, "mi": 0.2, "dice": 0.8, "ssim": 0.5, "mse": 0.1},
    "after": {"nmi": 0.3, "mi": 0.4, "dice": 0.9, "ssim": 0.4, "mse": 0.05},
}


def test_report_stands_alone_and_says_what_a_reader_needs(result: RegistrationResult, tmp_path: Path) -> None:
    name = 'a <script>alert("x")</script> & b'
    report = {"input": {"fixed": "<img src=http://example.org>.nii"}, "metrics": METRICS, "versions": {"torch": "2"}}
    save_html_report(result, tmp_path / "r.html", name, report)
    page = Page(tmp_path / "r.html")
    assert page.tags.count("script") == 1 and "img src=http" in page.text and name in page.text
    planes = len(result.affine) - 1 if len(result.affine) == 4 else 1
    # a swipe for each plane
    assert page.tags.count("input") == planes and page.classes.count("over") == planes
    for told in (result.verdict, "Expected error", "robust", "rotation 1, degrees", "seconds", "SSIM became worse"):
        assert told in page.text
    assert "the mean squared difference became" not in page.text
    for number in result.affine.ravel():
        assert f"{number:.6f}" in page.text
    # limits beside each measure
    assert f"overlap{result.measures['overlap']:.4g}0.50.2\n" in page.rows
    assert page.classes.count("left") == page.tags.count("figure")
    for link in page.links:
        kind, content = link.split(",")
        assert kind == "data:image/jpeg;base64"
        assert np.asarray(Pillow.open(io.BytesIO(base64.b64decode(content)))).std() > 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_pixels_have_no_sides_and_no_mm(tmp_path: Path) -> None:
    save_html_report(monai_zsreg.register(*pair(2, "pixel")), tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert "pixels" in page.text and "mm" not in page.text.replace("symm", "")
    assert "left" not in page.classes and "Letters stand" not in page.text


def test_failed_registration_gets_a_report_that_says_so(tmp_path: Path) -> None:
    fixed, _ = pair(2)
    noise = torch.rand(fixed.values.shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RegistrationWarning):
        failed = monai_zsreg.register(fixed, Image(noise, fixed.affine))
    save_html_report(failed, tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert failed.verdict == "FAIL" and "FAIL" in page.text and failed.reasons[0] in page.text


def test_keypoints_are_drawn_where_the_preset_has_them(result: RegistrationResult, tmp_path: Path) -> None:
    dims = len(result.affine) - 1
    points = np.random.default_rng(0).uniform(5, 15, (6, dims))
    result.keypoints = {"fixed": points, "moving": points + 1.0}
    save_html_report(result, tmp_path / "r.html")
    result.keypoints = {}
    page = Page(tmp_path / "r.html")
    assert "Keypoints of fixed" in page.text
    # six in each plane, before and after
    assert page.tags.count("circle") == 6 * 2 * (3 if dims == 3 else 1)


def test_index_keeps_the_order_and_is_escaped(tmp_path: Path) -> None:
    rows = [
        {"name": "a:b <i>", "verdict": "FAIL", "reasons": "overlap <41 %>", "score": None, "link": 'x:"y/r.html'},
        {"name": "worse", "verdict": "WARN", "reasons": "", "score": -0.9},
        {"name": "doubtful", "verdict": "WARN", "reasons": "", "score": -0.1, "thumbnail": "d/overview.png"},
        {"name": "fine", "verdict": "PASS", "reasons": "", "score": 0.4, "link": "fine/report.html"},
    ]
    save_index(rows, tmp_path / "index.html", "A & B")
    page = Page(tmp_path / "index.html")
    found = [next(name for name in ("fine", "a:b", "worse", "doubtful") if name in row) for row in page.rows[1:]]
    assert found == ["a:b", "worse", "doubtful", "fine"]
    assert "i" not in page.tags and "a:b <i>" in page.text and "overlap <41 %>" in page.text
    assert "4 pairs: 1 FAIL, 2 WARN, 1 PASS" in page.text
    assert all(re.match(r"\./[\w./%]+$", link) for link in page.links) and len(page.links) == 3


@pytest.mark.parametrize("dims", [2, 3])
def test_interactive_page_holds_library_and_images(dims: int, tmp_path: Path) -> None:
    fixed, moving = pair(dims, "pixel" if dims == 2 else "mm")
    library = tmp_path / "niivue.umd.js"
    library.write_text("const told='</script>';", encoding="utf-8")
    save_interactive(fixed, moving, tmp_path / "i.html", "a & b", library)
    text = (tmp_path / "i.html").read_text(encoding="utf-8")
    assert Page(tmp_path / "i.html").text.count("a & b") == 2 and "const told='<\\/script>'" in text
    assert f"isOrientationTextVisible:{'true' if dims == 3 else 'false'}" in text
    for name, image in (("fixed", fixed), ("moved", moving)):
        found = re.search(rf'\["{name}", "([^"]+)"\]', text)
        assert found is not None
        (tmp_path / "i.nii.gz").write_bytes(base64.b64decode(found[1]))
        back = monai_zsreg.io.load_image(tmp_path / "i.nii.gz")
        assert back.values.dtype == torch.uint8 and back.grid.same_as(fixed.grid) and int(back.values.max()) == 255
        assert np.corrcoef(back.values.flatten(), image.values.flatten())[0, 1] > 0.98
