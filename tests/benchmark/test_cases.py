# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_zsreg.benchmark import cases, data
from monai_zsreg.benchmark.cases import ROWS, Row, build, draw_cases, select_rows
from monai_zsreg.benchmark.run import warp
from monai_zsreg.geometry import Grid
from monai_zsreg.metrics import foreground_tre

from .conftest import RESIDUAL, head


@pytest.fixture(scope="module")
def pairs(subjects: Path) -> list[data.Pair]:
    found, _ = data.find_pairs(subjects, [("t1", "t2")])
    return data.attach_residuals(found + data.t1_pairs(subjects), data.read_residuals(subjects / "residuals.csv"))


def _row(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def test_select_rows() -> None:
    assert {row.protocol for row in select_rows(["stress"], [2])} == set(cases.STRESS) - {"thick", "skull"}
    assert [row.name for row in select_rows(["mild"], [2, 3])] == ["mild-3d-exact", "mild-3d-real"]
    assert select_rows(None, [2, 3]) == list(ROWS)
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("name", ["paper-2d-real", "so3-3d-real", "mild-3d-exact"])
def test_first_cases_are_the_same_however_many_are_drawn(pairs: list[data.Pair], name: str) -> None:
    few = draw_cases(_row(name), pairs, 4, seed=1, min_side=30)
    many = draw_cases(_row(name), pairs, 15, seed=1, min_side=30)
    assert many[:4] == few
    assert len({case.name for case in many}) == 15
    # subjects take turns, both directions occur
    assert [case.pair.subject for case in many[:3]] == ["a", "b", "c"]
    assert {case.pair.fixed_modality for case in many} >= {"t1"} and len(
        {case.pair.fixed_modality for case in many}
    ) == 2
    assert draw_cases(_row(name), pairs, 15, seed=2, min_side=30) != many


def test_the_same_case_comes_out_twice(pairs: list[data.Pair]) -> None:
    case = draw_cases(_row("noise-3d-real"), pairs, 2, seed=3)[1]
    one, two = build(case), build(case)
    assert torch.equal(one.fixed, two.fixed) and torch.equal(one.moving, two.moving)
    assert torch.equal(one.truth, two.truth)
    other = build(draw_cases(_row("noise-3d-real"), pairs, 2, seed=4)[1])
    assert not torch.allclose(one.truth, other.truth)


@pytest.mark.parametrize("name", ["mild-3d-real", "so3-3d-real", "paper-2d-real"])
def test_truth_with_residual_aligns_the_images_and_without_does_not(pairs: list[data.Pair], name: str) -> None:
    """t1 and t2 have one contrast here, so the sign and axis of the residual show in the difference image."""
    known = [p for p in pairs if p.residual is not None]
    for case in draw_cases(_row(name), known, 6, seed=0, slices=2, min_side=30):
        sample = build(case)
        inside = torch.from_numpy(ndimage.binary_erosion(sample.mask[0].numpy()))[None]
        assert sample.truth is not None and sample.corrected is not None
        gaps = [
            float((warp(sample.moving, truth.numpy(), sample.fixed) - sample.fixed.as_tensor())[inside].abs().mean())
            for truth in (sample.truth, sample.corrected)
        ]
        # a slice cannot follow the part of the residual that leaves its plane
        assert gaps[1] < (0.45 if case.row.dims == 3 else 0.8) * gaps[0], case.name
        expected = np.linalg.norm(RESIDUAL)
        if case.row.dims == 3:
            tre = foreground_tre(sample.truth, sample.corrected, sample.fixed, sample.mask)["mean"]
            assert tre == pytest.approx(expected, rel=0.12)


def test_exact_pairs_differ_in_contrast_and_agree_in_place(pairs: list[data.Pair]) -> None:
    for case in draw_cases(_row("mild-3d-exact"), pairs, 4, seed=0):
        sample = build(case)
        assert torch.equal(sample.truth, sample.corrected)
        moved = warp(sample.moving, sample.truth.numpy(), sample.fixed)
        inside = sample.mask & (moved != 0)
        assert np.corrcoef(sample.fixed[inside].numpy(), moved[inside].numpy())[0, 1] < -0.4


def test_header_does_not_give_the_transform_away(pairs: list[data.Pair]) -> None:
    sample = build(draw_cases(_row("mild-3d-real"), pairs, 1, seed=0)[0])
    assert Grid.of(sample.fixed).same_as(Grid.of(sample.moving))
    flat = build(draw_cases(_row("paper-2d-real"), pairs, 1, seed=0, min_side=30)[0])
    assert flat.fixed.affine.shape == (4, 4) and torch.equal(flat.fixed.affine, flat.moving.affine)


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.protocol in cases.STRESS and row.protocol != "skull"])
def test_stress_rows_build(pairs: list[data.Pair], name: str) -> None:
    real = [p for p in pairs if p.simulated is None]
    sample = build(draw_cases(_row(name), real, 1, seed=0, min_side=30)[0])
    assert torch.isfinite(sample.fixed).all() and torch.isfinite(sample.moving).all()
    assert sample.fixed.shape[1:] == sample.mask.shape[1:]
    if name.startswith("cut"):
        assert sample.moving.shape != sample.fixed.shape
    if name.startswith("thick"):
        assert Grid.of(sample.moving).spacing[2] == pytest.approx(5.0)


def test_skull_row_needs_a_mask_and_strips_one_image(subjects: Path, tmp_path: Path) -> None:
    import nibabel as nib

    from .conftest import AFFINE

    (tmp_path / "s").mkdir()
    scalp = np.where(
        (ndimage.distance_transform_edt(head() == 0) > 0) & (ndimage.distance_transform_edt(head() == 0) < 3), 80, 0
    )
    for name in ("t1", "t2"):
        nib.save(nib.Nifti1Image((head() + scalp).astype(np.float32), AFFINE), tmp_path / "s" / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image((head() > 0).astype(np.uint8), AFFINE), tmp_path / "s" / "mask.nii.gz")
    row = _row("skull-3d-real")
    assert draw_cases(row, data.find_pairs(subjects, [("t1", "t2")])[0], 2, 0) == []
    drawn = draw_cases(row, data.find_pairs(tmp_path, [("t1", "t2")])[0], 2, 0)
    for case, stripped in zip(drawn, ("moving", "fixed"), strict=True):
        sample = build(case)
        full = {role: float((getattr(sample, role) > 1).sum()) for role in ("fixed", "moving")}
        other = "fixed" if stripped == "moving" else "moving"
        assert full[stripped] < 0.8 * full[other]


def test_natural_images() -> None:
    pytest.importorskip("skimage")
    drawn = draw_cases(_row("natural-2d-natural"), cases.natural_pairs(), 2, 0)
    sample = build(drawn[0])
    assert sample.fixed.shape[0] == 1 and torch.equal(sample.truth, sample.corrected)
    moved = warp(sample.moving, sample.truth.numpy(), sample.fixed)
    assert np.corrcoef(sample.fixed[sample.mask].numpy(), moved[sample.mask].numpy())[0, 1] > 0.5
