# SPDX-License-Identifier: Apache-2.0
"""The option ``uncertainty``: maps, picture and numbers of section 2.7 of the paper."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor

from monai_zsreg.app.cohort import finish_pair
from monai_zsreg.app.run import read_pair, register_pair
from monai_zsreg.app.settings import Settings

FILES = ("uncertainty_displacement.nii.gz", "uncertainty_intensity.nii.gz", "uncertainty.png")


def run_pair(entry: dict, settings: Settings) -> dict:
    pair = read_pair(entry, settings)
    return finish_pair(pair, register_pair(pair, settings), settings, isolate=False)


def test_maps_picture_and_numbers(load_slice: Callable[..., MetaTensor], tmp_path: Path) -> None:
    values = load_slice()[0, ::2, ::2].numpy().astype(np.float32)
    header = np.array([[-1.98, 0.2, 0, 90.0], [0.25, 1.98, 0, -110.0], [0, 0, 1, 0], [0, 0, 0, 1]])
    shift = np.eye(4)
    shift[:2, 3] = 6.0, -5.0
    for name, affine in (("fixed", header), ("moving", shift @ header)):
        nib.save(nib.Nifti1Image(values, affine), tmp_path / f"{name}.nii.gz")
    entry = {"fixed": str(tmp_path / "fixed.nii.gz"), "moving": str(tmp_path / "moving.nii.gz"), "name": "p"}
    numbers = run_pair(entry, Settings(tmp_path, uncertainty=True))["uncertainty"]
    assert numbers["repeats"] == 10 and 2 <= numbers["succeeded"] <= 10 and numbers["seconds"] > 0
    variance = np.array(numbers["variance"])
    assert variance.shape == (2, 3) and (variance >= 0).all() and variance.max() > 0
    for name in FILES[:2]:
        image = nib.load(tmp_path / "p" / name)
        assert image.shape[:2] == values.shape
        np.testing.assert_allclose(image.affine[:2, [0, 1, 3]], header[:2, [0, 1, 3]], atol=1e-4)
        found = np.asarray(image.dataobj).squeeze()
        assert np.isfinite(found).all() and (found >= 0).all() and found.max() > 0
    displacement = np.asarray(nib.load(tmp_path / "p" / FILES[0]).dataobj).squeeze()
    middle = displacement[tuple(slice((n - 1) // 2, n // 2 + 1) for n in displacement.shape)].mean()
    assert middle == pytest.approx(numbers["std_mm_at_center"], rel=0.02)
    assert (tmp_path / "p" / FILES[2]).stat().st_size > 5000

    # another run without it leaves nothing behind that is not its own
    report = run_pair(entry, Settings(tmp_path))
    assert "uncertainty" not in report and not set(report["output"]) & {"uncertainty", "uncertainty_displacement"}
    assert not [name for name in FILES if (tmp_path / "p" / name).exists()]
    json.loads((tmp_path / "p" / "report.json").read_text())
