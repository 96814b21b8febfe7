# SPDX-License-Identifier: Apache-2.0
"""The demonstration pair: its truth, its grids, its files. The truth is checked with ITK's and nibabel's own code."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from phantoms import sitk_affine

from monai_zsreg.app import demo
from monai_zsreg.app.demo import DemoPair, demo_pair
from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import decompose_affine

pytest.importorskip("nilearn")


@pytest.fixture(scope="module", params=[2, 3])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DemoPair:
    return demo_pair(tmp_path_factory.mktemp("demo"), spatial_dims=request.param)


def _world(path: Path, inside: np.ndarray) -> np.ndarray:
    """World coordinates (RAS mm) ``[N, D]`` of the voxels ``inside``, by nibabel."""
    index = np.argwhere(inside)
    padded = np.pad(index, ((0, 0), (0, 3 - index.shape[1])))
    return nib.affines.apply_affine(nib.load(path).affine, padded)[:, : index.shape[1]]


def _head(pair: DemoPair) -> np.ndarray:
    return nib.load(pair["fixed"]).get_fdata() > 0


def _map(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:-1, :-1].T + matrix[:-1, -1]


def _resample_by_itk(pair: DemoPair, pull: np.ndarray, step: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The fixed image, every ``step``-th voxel, and the moving image there, through ITK, whose world is LPS."""
    fixed, moving = (sitk.ReadImage(str(pair[key]), sitk.sitkFloat32) for key in ("fixed", "moving"))
    fixed = sitk.Shrink(fixed, [step] * (len(pull) - 1))
    resampled = sitk.Resample(moving, fixed, sitk_affine(pull))
    return sitk.GetArrayFromImage(fixed), sitk.GetArrayFromImage(resampled)


def _correlation(pair: DemoPair, pull: np.ndarray) -> float:
    fixed, moved = _resample_by_itk(pair, pull, step=4 if len(pull) == 4 else 1)
    return float(np.corrcoef(fixed[fixed > 0], moved[fixed > 0])[0, 1])


def test_truth_aligns_the_pair_in_itk(pair: DemoPair) -> None:
    truth = pair["truth"]
    aligned = _correlation(pair, truth)
    assert aligned < -0.7  # bright where the T1 is dark
    for wrong in (np.eye(len(truth)), np.linalg.inv(truth)):
        assert _correlation(pair, wrong) > aligned + 0.3
    for axis in range(len(truth) - 1):
        for step in (-1.0, 1.0):  # mm
            shifted = truth.copy()
            shifted[axis, -1] += step
            assert _correlation(pair, shifted) > aligned + 0.005


def test_truth_maps_the_foreground_onto_the_moved_foreground(pair: DemoPair) -> None:
    there = _world(pair["moving"], np.asarray(nib.load(pair["moving"]).dataobj) > 0)
    mapped = _map(pair["truth"], _world(pair["fixed"], _head(pair)))
    assert np.linalg.norm(there.mean(0) - mapped.mean(0)) < 0.3
    np.testing.assert_allclose(np.cov(there.T), np.cov(mapped.T), atol=0.01 * np.cov(mapped.T).max())


def test_transform_has_the_stated_sizes(pair: DemoPair) -> None:
    center = _world(pair["fixed"], _head(pair)).mean(0)
    parts = decompose_affine(pair["truth"], center)
    assert parts.angle_deg == pytest.approx(12.0, abs=0.5)
    assert np.linalg.norm(parts.translation) == pytest.approx(10.0)
    np.testing.assert_allclose(np.abs(np.array(parts.scale) - 1.0), 0.03, atol=1e-9)
    np.testing.assert_allclose(np.abs(parts.shear), 0.01, atol=1e-9)
    assert all(abs(angle) > 2.0 for angle in parts.rotation_deg)


def test_grids_differ(pair: DemoPair) -> None:
    fixed, moving = nib.load(pair["fixed"]), nib.load(pair["moving"])
    dims = len(pair["truth"]) - 1
    assert nib.aff2axcodes(fixed.affine) == ("R", "A", "S")
    assert nib.aff2axcodes(moving.affine) == ("L", "P", "S")
    np.testing.assert_allclose(fixed.header.get_zooms(), [1.0] * dims)
    np.testing.assert_allclose(moving.header.get_zooms(), [1.2] * dims, rtol=1e-6)
    assert fixed.shape != moving.shape


def test_moving_head_lies_inside_its_field_of_view(pair: DemoPair) -> None:
    head = nib.load(pair["moving"]).get_fdata() > 0
    for axis in range(head.ndim):
        assert not np.take(head, [0, 1, -2, -1], axis=axis).any()


@pytest.mark.parametrize("key", ["fixed", "moving"])
def test_itk_and_nibabel_read_the_same(pair: DemoPair, key: str) -> None:
    by_nibabel, by_itk = nib.load(pair[key]), sitk.ReadImage(str(pair[key]))
    assert by_nibabel.get_data_dtype() == np.int16
    np.testing.assert_array_equal(sitk.GetArrayFromImage(by_itk).T, np.asarray(by_nibabel.dataobj))
    dims = len(pair["truth"]) - 1
    flip = np.array([-1.0, -1.0, 1.0])[:dims]
    last = np.array(by_nibabel.shape) - 1
    corner = np.array(by_itk.TransformIndexToPhysicalPoint(last.tolist())) * flip
    expected = nib.affines.apply_affine(by_nibabel.affine, np.pad(last, (0, 3 - dims)))[:dims]
    np.testing.assert_allclose(corner, expected, atol=1e-3)


@pytest.fixture
def one_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pairs of one head, which is read and bent once."""
    monkeypatch.setattr(demo, "template_tissues", lru_cache(demo.template_tissues))


def test_contrast_is_that_of_t2(tmp_path: Path) -> None:
    clean = demo_pair(tmp_path, spatial_dims=2, noise=0.0, bias=0.0)
    moving = nib.load(clean["moving"]).get_fdata()
    inside = moving[moving > 0]
    assert inside.min() >= 349 and inside.max() == 1000  # white matter, CSF
    fixed, moved = _resample_by_itk(clean, clean["truth"])
    assert np.median(moved[fixed > 800]) < 420


def test_noise_and_bias_have_the_stated_sizes(tmp_path: Path, one_template: None) -> None:
    def moving(name: str, noise: float, bias: float) -> np.ndarray:
        return nib.load(demo_pair(tmp_path / name, 2, noise=noise, bias=bias)["moving"]).get_fdata()

    clean = moving("clean", 0.0, 0.0)
    head = clean > 0
    assert np.std((moving("noisy", 0.03, 0.0) - clean)[head]) == pytest.approx(30.0, rel=0.05)
    field = moving("biased", 0.0, 0.2)[head] / clean[head]
    assert 0.1 < np.abs(field - 1.0).max() < 0.205


def test_seed_decides(tmp_path: Path, one_template: None) -> None:
    first, again, other = (demo_pair(tmp_path / name, 2, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    np.testing.assert_array_equal(first["truth"], again["truth"])
    assert first["moving"].read_bytes() == again["moving"].read_bytes()
    assert np.abs(first["truth"] - other["truth"]).max() > 0.01
    assert first["fixed"].read_bytes() == other["fixed"].read_bytes()


def test_missing_nilearn_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nilearn", None)  # Python's own way to make an import fail
    with pytest.raises(ImportError, match=r'pip install "monai-zsreg\[demo\]"'):
        demo_pair(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(RegistrationError, match="spatial_dims"):
        demo_pair(tmp_path, spatial_dims=4)
    blocked = tmp_path / "file"
    blocked.write_text("here")
    with pytest.raises(RegistrationError, match="output_dir"):
        demo_pair(blocked, spatial_dims=2)
