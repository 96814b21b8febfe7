# SPDX-License-Identifier: Apache-2.0
"""Pictures show the right things the right way round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_zsreg.errors import RegistrationError
from monai_zsreg.registration import RegistrationResult
from monai_zsreg.report import save_overview

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
