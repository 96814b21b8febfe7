# SPDX-License-Identifier: Apache-2.0
"""Pictures show the right things the right way round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.registration import RegistrationResult
from monai_zsreg.report import save_overview, save_uncertainty

image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def _result(dims: int, spacing: float = 1.0) -> RegistrationResult:
    shape = (24, 30, 20)[:dims]
    volume = torch.zeros(1, *shape)
    volume[(0, *(slice(6, n - 6) for n in shape))] = 1.0
    affine = torch.diag(torch.tensor([spacing] * dims + [1.0], dtype=torch.float64))
    fixed = MetaTensor(volume, affine=affine)
    moving = MetaTensor(1.5 - volume, affine=affine)
    return RegistrationResult(np.eye(dims + 1), True, [], 0.1, "keypoints", "affine", fixed, moving)


@pytest.mark.parametrize("dims", [2, 3])
def test_one_row_a_plane_and_no_half_written_file(tmp_path, dims):
    path = tmp_path / "sub" / "overview.png"
    save_overview(_result(dims), path)
    picture = np.asarray(image.open(path).convert("L"))
    assert [p.name for p in path.parent.iterdir()] == ["overview.png"]
    assert picture.shape[1] > 400 and picture.std() > 5
    # three planes stand on one another
    assert (picture.shape[0] > picture.shape[1] / 2) == (dims == 3)


def test_left_of_the_patient_is_right_of_the_picture(tmp_path):
    marked = _result(2)
    marked.fixed.as_tensor().zero_()
    # RAS: the first axis runs to the right of the patient, so its far end belongs at the left of the picture
    marked.fixed.as_tensor()[0, 18:23, 10:20] = 1.0
    save_overview(marked, tmp_path / "a.png")
    picture = np.asarray(image.open(tmp_path / "a.png").convert("L")).astype(float)
    first = picture[int(picture.shape[0] * 0.2) :, : picture.shape[1] // 5]
    half = first.shape[1] // 2
    assert (first[:, :half] > 200).sum() > 5 * (first[:, half:] > 200).sum()


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RegistrationError, match="report"):
        save_overview(_result(2), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def _spread(dims: int, along: int, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> tuple[MetaTensor, MetaTensor]:
    """A bright box, and a map that grows along one axis (RAS)."""
    shape = (24, 30, 20)[:dims]
    box = torch.zeros(1, *shape)
    box[(0, *(slice(3, n - 3) for n in shape))] = 1.0
    ramp = torch.linspace(0.5, 2.5, shape[along]).view([-1 if a == along else 1 for a in range(dims)])
    affine = torch.diag(torch.tensor([*spacing[:dims], 1.0], dtype=torch.float64))
    return MetaTensor(box, affine=affine), MetaTensor(ramp.expand(shape).clone()[None], affine=affine)


def _left_of_the_color_bar(path) -> np.ndarray:
    picture = np.asarray(image.open(path).convert("RGB")).astype(int)
    return picture[:, : int(picture.shape[1] * 0.89)]


def _colored(path, channel: int) -> np.ndarray:
    """Pixels where one of red (0) and blue (2) clearly outweighs the other."""
    picture = _left_of_the_color_bar(path)
    return np.argwhere(picture[..., channel] - picture[..., 2 - channel] > 60)


def test_uncertainty_is_red_where_it_is_high(tmp_path):
    # the map grows to the right of the patient, which is the left of the picture
    save_uncertainty(*_spread(2, along=0), tmp_path / "a.png")
    red, blue = (_colored(tmp_path / "a.png", channel) for channel in (0, 2))
    # the letters are yellow, hence red without blue, but few
    assert len(red) > 1000 and len(blue) > 1000
    assert np.median(red[:, 1]) < np.median(blue[:, 1]) - 20
    # to the front of the patient: up
    save_uncertainty(*_spread(2, along=1), tmp_path / "b.png")
    red, blue = (_colored(tmp_path / "b.png", channel) for channel in (0, 2))
    assert np.median(red[:, 0]) < np.median(blue[:, 0]) - 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_uncertainty_of_a_volume_shows_three_planes_at_their_true_proportions(tmp_path):
    # 24 x 30 x 20 voxels, but 48 x 30 x 80 mm
    save_uncertainty(*_spread(3, along=2, spacing=(2.0, 1.0, 4.0)), tmp_path / "a.png")
    picture = _left_of_the_color_bar(tmp_path / "a.png")
    above = picture[: picture.shape[0] // 2]
    gray = (above.min(axis=2) > 200) & (np.ptp(above, axis=2) < 10)
    # the boxes of the upper row, from left to right: axial, coronal, sagittal
    columns = np.flatnonzero(gray.sum(axis=0) > 10)
    parts = np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1)
    assert len(parts) == 3
    sizes = [(len(part), int((gray[:, part].sum(axis=1) > 3).sum())) for part in parts]
    # mm of the box: 18, 24 and 14 voxels
    for (width, height), expected in zip(sizes, ((36, 24), (36, 56), (24, 56)), strict=True):
        assert width / height == pytest.approx(expected[0] / expected[1], rel=0.08)
    # superior is up, and the map is highest there
    red, blue = (_colored(tmp_path / "a.png", channel) for channel in (0, 2))
    assert np.median(red[:, 0]) < np.median(blue[:, 0])


def test_uncertainty_that_is_the_same_everywhere(tmp_path):
    fixed, spread = _spread(2, along=0)
    save_uncertainty(fixed, spread * 0, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 2000


@pytest.mark.parametrize("wrong", ["shape", "infinite"])
def test_uncertainty_refuses(tmp_path, wrong):
    fixed, spread = _spread(2, along=0)
    spread = spread[:, :5] if wrong == "shape" else spread / 0
    with pytest.raises(RegistrationError) as caught:
        save_uncertainty(fixed, spread, tmp_path / "a.png")
    assert caught.value.argument == "displacement"
    assert not list(tmp_path.iterdir())
