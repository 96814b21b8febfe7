# SPDX-License-Identifier: Apache-2.0
"""Pictures show the right things the right way round."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from scipy import ndimage

from monai_zsreg.app.report import Views, save_overview, save_spread
from monai_zsreg.app.report.pictures import blend, checkerboard, edges, planes_of
from monai_zsreg.io import Image

# voxels along right, front and head
SHAPE = (24, 30, 20)


def oriented(order: tuple[int, ...], signs: tuple[int, ...], spacing: float = 2.0) -> Image:
    """An image whose values say where a voxel lies: 1 towards the patient's right, 10 front, 100 head."""
    dims = len(order)
    affine = torch.zeros(dims + 1, dims + 1, dtype=torch.float64)
    affine[dims, dims] = 1.0
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, axis] = sign * spacing
    shape = [SHAPE[world] for world in order]
    index = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"), -1)
    centered = index - (torch.tensor(shape) - 1.0) / 2
    places = centered @ affine[:dims, :dims].float().mT
    return Image(sum(10.0**k * places[..., k] for k in range(dims))[None], affine, {"unit": "mm"})


@pytest.mark.parametrize("order", [*itertools.permutations(range(3)), (0, 1), (1, 0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_pictures_run_as_radiologists_look(order: tuple[int, ...], signs: tuple[int, ...]) -> None:
    image = oriented(order, signs[: len(order)])
    planes = planes_of(image)
    assert len(planes) == (3 if len(order) == 3 else 1)
    for plane, (across, down) in zip(planes, ((0, 1), (0, 2), (1, 2)), strict=False):
        views = Views(image, image, np.eye(len(order) + 1))
        picture = views.fixed[planes.index(plane)]
        assert picture.shape == (SHAPE[down], SHAPE[across])
        assert plane.size == (2.0 * SHAPE[across], 2.0 * SHAPE[down])
        assert plane.sides == ("RAS"[across], "LPI"[across], "RAS"[down], "LPI"[down])
        # from the patient's right (front) and from above, values fall
        slope_down, slope_across = np.gradient(picture[4:-4, 4:-4])
        assert (slope_across <= 1e-6).all() and (slope_down <= 1e-6).all() and slope_down.min() < 0
    if len(order) == 3:
        assert [plane.name for plane in planes] == ["axial", "coronal", "sagittal"]


def test_position_of_a_point_is_where_its_voxel_is_drawn() -> None:
    image = oriented((2, 0, 1), (1, -1, 1))
    index = torch.tensor([5.0, 7.0, 9.0], dtype=torch.float64)
    world = (image.affine[:3, :3] @ index + image.affine[:3, 3])[None].numpy()
    image.values.zero_()
    image.values[0, 4:7, 6:9, 8:11] = 1.0
    for plane, picture in zip(planes_of(image), Views(image, image, np.eye(4)).fixed, strict=True):
        across, down = plane.position(world)[0] * picture.shape[::-1]
        assert picture[int(down), int(across)] == 1.0


def test_slices_in_space_and_pixels() -> None:
    plain = oriented((0, 1), (-1, -1))
    coronal = Image(plain.values, plain.affine, {"unit": "mm", "place": np.eye(4)[[0, 2, 1, 3]].tolist()})
    (plane,) = planes_of(coronal)
    assert plane.name == "coronal" and plane.sides == ("R", "L", "S", "I")
    for meta in ({"unit": "pixel"}, {"unit": "mm", "notes": ["the orientation is not known"]}):
        (plane,) = planes_of(Image(plain.values, plain.affine, meta))
        assert plane.sides is None


def test_before_and_after_go_through_the_right_transform() -> None:
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.random(SHAPE), 2)
    fixed = Image(torch.from_numpy(smooth)[None], torch.eye(4, dtype=torch.float64), {"unit": "mm"})
    affine = torch.eye(4, dtype=torch.float64)
    affine[0, 3] = 3.0
    moving = Image(fixed.values, affine, {"unit": "mm"})
    views = Views(fixed, moving, affine.numpy())
    for one, after in zip(views.fixed, views.after, strict=True):
        np.testing.assert_allclose(after, one, atol=1e-3)
    assert np.abs(views.before[0] - views.fixed[0]).mean() > 0.05


def test_large_slices_are_thinned() -> None:
    image = Image(torch.rand(1, 3000, 1500), torch.eye(3, dtype=torch.float64), {"unit": "mm"})
    views = Views(image, image, np.eye(3))
    assert max(views.fixed[0].shape) <= 700 and views.planes[0].size == pytest.approx((3000, 1500), rel=0.01)


def test_checkerboard_edges_and_blend() -> None:
    image = oriented((0, 1), (1, 1))
    (plane,) = planes_of(image)
    board = checkerboard(np.zeros((30, 24)), np.ones((30, 24)), plane)
    assert board.mean() == pytest.approx(0.5, abs=0.1) and (board[:3, :3] == 0).all()
    disk = (np.hypot(*np.indices((40, 40)) - 19.5) < 12).astype(float)
    drawn = edges(disk, np.zeros((40, 40)))
    on = drawn[..., 0] > 0.9
    radius = np.hypot(*(np.argwhere(on) - 19.5).T)
    assert 40 < on.sum() < 200 and np.abs(radius - 12).max() < 2.0
    assert not np.any(edges(np.zeros((9, 9)), np.zeros((9, 9)))[..., 0] > 0.9)
    # the contrast does not matter, only the order of the values
    colors = blend(disk * np.linspace(1, 2, 40), disk * np.linspace(1, 2, 40) ** 3)
    np.testing.assert_allclose(colors[..., 0], colors[..., 1])


def _box(along: int, dims: int = 3) -> tuple[Image, torch.Tensor]:
    """A bright box, and a map that grows along one axis (RAS)."""
    shape = SHAPE[:dims]
    box = torch.zeros(1, *shape)
    box[(0, *(slice(3, n - 3) for n in shape))] = 1.0
    ramp = torch.linspace(0.5, 2.5, shape[along]).view([-1 if a == along else 1 for a in range(dims)])
    return Image(box, torch.eye(dims + 1, dtype=torch.float64), {"unit": "mm"}), ramp.expand(shape).clone()[None]


@pytest.mark.parametrize("along", [0, 1])
def test_spread_is_red_where_it_is_high(along: int, tmp_path: Path) -> None:
    save_spread(*_box(along, 2), tmp_path / "a.png")
    colors = np.asarray(Pillow.open(tmp_path / "a.png").convert("RGB")).astype(int)
    red, blue = (np.argwhere(colors[..., one] - colors[..., 2 - one] > 60) for one in (0, 2))
    assert len(red) > 500 and len(blue) > 500
    # the patient's right is left, the front is above
    column = 1 - along
    assert np.median(red[:, column]) < np.median(blue[:, column]) - 20
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_spread_that_is_the_same_everywhere(tmp_path: Path) -> None:
    fixed, spread = _box(0)
    save_spread(fixed, spread * 0, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 2000


@pytest.mark.parametrize("dims", [2, 3])
def test_overview_has_a_row_a_plane(dims: int, tmp_path: Path) -> None:
    fixed, _ = _box(0, dims)
    save_overview(Views(fixed, fixed, np.eye(dims + 1)), tmp_path / "sub" / "a.png")
    picture = np.asarray(Pillow.open(tmp_path / "sub" / "a.png").convert("L"))
    assert picture.std() > 20 and (picture.shape[0] > picture.shape[1] / 2.5) == (dims == 3)
