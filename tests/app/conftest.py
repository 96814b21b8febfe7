# SPDX-License-Identifier: Apache-2.0
"""Images on disk that the tests of the application share."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch.nn.functional as F
from monai.data import MetaTensor

SHIFT = (5.0, -4.0)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, load_slice: Callable[..., MetaTensor]) -> SimpleNamespace:
    """A T1 and a T2 slice of 2 mm, the second one shifted by its header; one that is no image; noise; labels."""
    folder = tmp_path_factory.mktemp("images")
    header = np.diag([2.0, 2.0, 1.0, 1.0])
    shifted = header.copy()
    shifted[:2, 3] = SHIFT
    for name, affine in (("t1", header), ("t2", shifted)):
        values = F.avg_pool2d(load_slice(modality=name).as_tensor().float(), 2)[0].numpy()
        nib.save(nib.Nifti1Image(values, affine), folder / f"{name}.nii.gz")
        labels = np.digitize(values, [values.mean(), 2 * values.mean()]).astype(np.int16)
        nib.save(nib.Nifti1Image(labels, affine), folder / f"{name}_labels.nii.gz")
    noise = np.random.default_rng(0).random(values.shape).astype(np.float32)
    nib.save(nib.Nifti1Image(noise, header), folder / "noise.nii.gz")
    (folder / "text.nii.gz").write_text("no image")
    return SimpleNamespace(
        folder=folder, shift=SHIFT, **{name: folder / f"{name}.nii.gz" for name in ("t1", "t2", "noise", "text")}
    )
