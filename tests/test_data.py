# SPDX-License-Identifier: Apache-2.0
"""Tests of the tests' own images: what is named must be there, and what is simulated must be what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from phantoms import diagonal, error, moved_by, padded, pooled, template, tissue_shares, turn
from scipy import ndimage

from monai_zsreg.geometry import Grid, apply_affine


@pytest.mark.parametrize("variable", ["ZSREG_TEST_DATA", "ZSREG_TEST_VGG19"])
def test_data_that_are_named_must_be_there(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    (named_path,) = {p.named_path for p in pytestconfig.pluginmanager.get_plugins() if hasattr(p, "named_path")}
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(pytest.UsageError, match=variable):
        named_path(variable, tmp_path)
    monkeypatch.setenv(variable, str(tmp_path))
    assert named_path(variable, tmp_path / "other") == tmp_path
    # where nothing is named, tests that need it skip
    monkeypatch.delenv(variable)
    assert named_path(variable, tmp_path / "nowhere") is None and named_path(variable, tmp_path) == tmp_path


def test_contrasts_of_the_template() -> None:
    shares = tissue_shares()[0]
    assert shares.min() > -1e-6 and np.abs(shares.sum(0) - (template("t1")[0].numpy() > 0)).max() < 1e-5
    # from bright to dark: T1 white, gray; T2 fluid, gray, white; FLAIR gray, white, fluid
    fluid, gray, white = (shares[number] > 0.9 for number in range(3))
    for modality, order in (("t1", (white, gray)), ("t2", (fluid, gray, white)), ("flair", (gray, white, fluid))):
        values = template(modality)[0].numpy()
        means = [float(values[tissue].mean()) for tissue in order]
        assert means == sorted(means, reverse=True) and means[0] > 1.15 * means[1], modality


@pytest.mark.parametrize("dims", [2, 3])
def test_a_moved_head_is_where_it_was_moved_to(dims: int) -> None:
    image = padded(pooled(template(), 4), 6)
    image = image if dims == 3 else type(image)(image.as_tensor()[..., 20], affine=diagonal(4.0, 4.0))
    truth = turn(image, 30.0, (8.0, -4.0, 12.0)[:dims], 1.1)
    moved = moved_by(image, truth)
    before, after = (
        apply_affine(Grid.of(i).affine, torch.tensor([ndimage.center_of_mass(i[0].numpy())]).double())
        for i in (image, moved)
    )
    np.testing.assert_allclose(apply_affine(torch.from_numpy(truth), before), after, atol=0.3)
    shift = np.eye(dims + 1)
    shift[0, dims] = 2.5
    assert error(shift @ truth, truth, image) == pytest.approx(2.5)
