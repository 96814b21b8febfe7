# SPDX-License-Identifier: Apache-2.0
"""Cases of all rows: the same in every run, and their truth puts the images together."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from monai_zsreg.benchmark import anatomies, pairs
from monai_zsreg.benchmark.brains import ROWS, STRESS, brain_cases
from monai_zsreg.benchmark.cases import Row
from monai_zsreg.benchmark.volumes import Volume, background_value, moved, transformed

from .conftest import AFFINE, RESIDUAL, head

SMALL = {"slices": 2, "min_side": 30}


@pytest.fixture(scope="module")
def found(subjects: Path) -> list[pairs.Pair]:
    return pairs.with_residuals(pairs.find_pairs(subjects, [("t1", "t2")])[0], subjects / "residuals.csv")


def row_of(name: str) -> Row:
    return next(row for row in (*ROWS, *anatomies.ROWS) if row.name == name)


def test_rows_have_names_of_their_own() -> None:
    rows = [*ROWS, *anatomies.ROWS]
    assert len({row.name for row in rows}) == len(rows)
    assert {"paper-2d-real", "stack-3d-real", "anatomies-any-rigid", "slices-p30", "retina"} <= {r.name for r in rows}


@pytest.mark.parametrize("name", ["paper-2d-real", "so3-3d-real", "mild-3d-exact"])
def test_first_cases_are_the_same_however_many_are_drawn(found: list[pairs.Pair], name: str) -> None:
    few, many = (brain_cases(row_of(name), found, count, 1, **SMALL) for count in (4, 15))
    assert many[:4] == few and len({case.name for case in many}) == 15
    # subjects take turns, both directions occur
    assert [case.subject for case in many[:3]] == ["a", "b", "c"]
    assert len({case.notes["fixed_modality"] for case in many}) == 2
    assert brain_cases(row_of(name), found, 15, 2, **SMALL) != many


def test_the_same_case_comes_out_twice(found: list[pairs.Pair]) -> None:
    case = brain_cases(row_of("noise-3d-real"), found, 2, 3)[1]
    one, two = case.build(), case.build()
    assert np.array_equal(one.fixed.values, two.fixed.values) and np.array_equal(one.moving.values, two.moving.values)
    assert np.array_equal(one.truth, two.truth)
    assert not np.allclose(brain_cases(row_of("noise-3d-real"), found, 2, 4)[1].build().truth, one.truth)


@pytest.mark.parametrize("name", ["mild-3d-real", "so3-3d-real", "paper-2d-real"])
def test_truth_with_residual_aligns_the_images_and_without_does_not(found: list[pairs.Pair], name: str) -> None:
    """t1 and t2 have one contrast here, so the sign and axis of the residual show in the difference image."""
    known = [pair for pair in found if pair.residual is not None]
    for case in brain_cases(row_of(name), known, 4, 0, **SMALL):
        sample = case.build()
        fixed = sample.fixed
        assert sample.truth is not None and sample.corrected is not None
        inside = ndimage.binary_erosion(fixed.values != background_value(fixed.values))
        shown = [moved(sample.moving, fixed.shape, fixed.affine, m, 1) for m in (sample.truth, sample.corrected)]
        gaps = [np.abs(image.values - fixed.values)[inside].mean() for image in shown]
        # a slice cannot follow the part of the residual that leaves its plane
        assert gaps[1] < (0.45 if fixed.dims == 3 else 0.8) * gaps[0], case.name
        if fixed.dims == 3:
            off = np.linalg.norm(transformed(sample.truth - sample.corrected, sample.points), axis=1)
            assert off.mean() == pytest.approx(np.linalg.norm(RESIDUAL), rel=0.12)


def test_exact_pairs_differ_in_contrast_and_agree_in_place(found: list[pairs.Pair]) -> None:
    for case in brain_cases(row_of("mild-3d-exact"), found, 2, 0):
        sample = case.build()
        assert sample.truth is not None and np.array_equal(sample.truth, sample.corrected)
        shown = moved(sample.moving, sample.fixed.shape, sample.fixed.affine, sample.truth, 1).values
        inside = (sample.fixed.values != 0) & (shown != 0)
        assert np.corrcoef(sample.fixed.values[inside], shown[inside])[0, 1] < -0.4
        # the header does not give the transform away
        assert np.array_equal(sample.fixed.affine, sample.moving.affine)


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.protocol in STRESS and row.protocol != "skull"])
def test_stress_rows_build(found: list[pairs.Pair], name: str) -> None:
    sample = brain_cases(row_of(name), found, 1, 0, **SMALL)[0].build()
    assert np.isfinite(sample.fixed.values).all() and np.isfinite(sample.moving.values).all()
    if name.startswith("cut"):
        assert sample.moving.shape != sample.fixed.shape
    if name.startswith("thick"):
        assert sample.moving.spacing[2] == pytest.approx(5.0)
    if name.startswith("stack"):
        assert sample.moving.spacing[2] == pytest.approx(4.0) and 4 <= sample.moving.shape[2] <= 12
        # where the truth puts the stack, the fixed image shows the same
        assert sample.corrected is not None
        back = moved(sample.fixed, sample.moving.shape, sample.moving.affine, np.linalg.inv(sample.corrected), 1)
        assert np.corrcoef(back.values.ravel(), sample.moving.values.ravel())[0, 1] > 0.9


def test_skull_row_needs_a_mask_and_strips_one_image(found: list[pairs.Pair], tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    outside = ndimage.distance_transform_edt(head() == 0)
    scalp = np.where((outside > 0) & (outside < 3), 80, 0)
    for name in ("t1", "t2"):
        nib.save(nib.Nifti1Image((head() + scalp).astype(np.float32), AFFINE), tmp_path / "s" / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image((head() > 0).astype(np.uint8), AFFINE), tmp_path / "s" / "mask.nii.gz")
    row = row_of("skull-3d-real")
    assert brain_cases(row, found, 2, 0) == []
    cases = brain_cases(row, pairs.find_pairs(tmp_path, [("t1", "t2")])[0], 2, 0)
    for case, stripped in zip(cases, ("moving", "fixed"), strict=True):
        sample = case.build()
        full = {"fixed": (sample.fixed.values > 1).sum(), "moving": (sample.moving.values > 1).sum()}
        assert full[stripped] < 0.8 * full["fixed" if stripped == "moving" else "moving"]


def test_photographs() -> None:
    sample = brain_cases(row_of("natural-2d-natural"), pairs.photographs(), 1, 0)[0].build()
    assert sample.truth is not None
    shown = moved(sample.moving, sample.fixed.shape, sample.fixed.affine, sample.truth, 1).values
    inside = tuple(sample.points.astype(int).T)
    assert np.corrcoef(sample.fixed.values[inside], shown[inside])[0, 1] > 0.5


def test_retina_pairs_overlap_in_part_and_their_truth_is_exact() -> None:
    for k in range(2):
        fixed, moving, truth, points = anatomies.retina_pair(np.random.default_rng(k), any_rotation=k == 0)
        # 270 pixels of radius
        assert 0.3 < len(points) / (np.pi * 270**2) < 0.9
        shown = moved(moving, fixed.shape, fixed.affine, truth, 1).values
        # vessels are dark in one and bright in the other
        both = [image - ndimage.gaussian_filter(image, 12) for image in (fixed.values, shown)]
        inner = tuple(points[np.linalg.norm(points - 279.5, axis=1) < 250].astype(int).T)
        assert np.corrcoef(both[0][inner], both[1][inner])[0, 1] < -0.5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pairs on grids of their own that their headers put together."""
    image = Volume(head(), AFFINE)
    other = np.diag([2.4, 2.2, 3.0, 1.0])
    other[:3, 3] = transformed(AFFINE, (np.array(head().shape) - 1) / 2) - other[:3, :3] @ [18, 20, 14]
    nib.save(nib.Nifti1Image(image.values, AFFINE), tmp_path / "f.nii.gz")
    nib.save(nib.Nifti1Image(moved(image, (37, 41, 29), other, np.eye(4)).values, other), tmp_path / "m.nii.gz")
    lines = ["pair,fixed,moving,kind,truth,tolerance_mm"]
    kinds = (("x_1", "head T1 - PET", "header"), ("x_2", "head T1 - T2", "consensus"), ("y", "CT", "header"))
    lines += [f"{pair},f.nii.gz,m.nii.gz,{kind},{truth},3" for pair, kind, truth in kinds]
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_anatomies_move_the_header_alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert anatomies.is_anatomies(folder) and not anatomies.is_anatomies(tmp_path_factory.mktemp("none"))
    for pose, angles in (
        ("given", (0, 0)),
        ("p10", (10, 10)),
        ("p30", (30, 30)),
        ("any", (90, 180)),
        ("cut", (10, 10)),
    ):
        case = anatomies.anatomy_cases(row_of(f"anatomies-{pose}-rigid"), folder, 3, 0)[0]
        sample = case.build()
        assert angles[0] <= sample.info["rotation_deg"] <= angles[1] and sample.tolerance == 3
        assert sample.truth is not None and case.notes["group"] == "anatomies: x"
        fixed = sample.fixed
        shown = moved(sample.moving, fixed.shape, fixed.affine, sample.truth, 1).values
        inside = tuple(np.rint(transformed(np.linalg.inv(fixed.affine), sample.points)).astype(int).T)
        assert np.corrcoef(fixed.values[inside], shown[inside])[0, 1] > 0.9
        if pose == "cut":
            assert sorted(sample.moving.shape) == sorted((37, round(41 * 2 / 3), 29))


def test_a_consensus_pair_is_judged_by_its_own_answer_at_the_pose_as_given(folder: Path) -> None:
    given, turned = (
        anatomies.anatomy_cases(row_of(f"anatomies-{p}-affine"), folder, 3, 0)[1] for p in ("given", "p30")
    )
    assert given.build().truth is None and turned.build().reference == given.name


def test_slices_of_functional_images(folder: Path) -> None:
    cases = anatomies.anatomy_cases(row_of("slices-p30"), folder, 10, 0)
    assert [case.images for case in cases] == ["x_1:0", "x_1:1", "x_1:2"]
    sample = cases[1].build()
    assert sample.fixed.dims == 2 and sample.truth is not None
    shown = moved(sample.moving, sample.fixed.shape, sample.fixed.affine, sample.truth, 1).values
    assert np.corrcoef(sample.fixed.values.ravel(), shown.ravel())[0, 1] > 0.9
    assert anatomies.anatomy_cases(row_of("slices-p30"), None, 10, 0) == []
