# SPDX-License-Identifier: Apache-2.0
"""Transforms of the deformable stage in MONAI's chains."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor, decollate_batch
from monai.transforms import Compose, Invertd, SpatialPadd
from phantoms import padded
from scipy import ndimage

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid
from monai_zsreg.registration.displacement import Deformation
from monai_zsreg.transforms import ApplyAffineRegistration, RegisterAffine, RegisterDeformable, RegisterDeformabled


@pytest.fixture(scope="module")
def item(load_slice) -> dict[str, MetaTensor]:
    """A slice, the same bent with the contrast of T2, and the label of its fluid in each."""
    fixed, moving = (padded(load_slice(modality=name), 10) for name in ("t1", "t2"))
    rng = np.random.default_rng(0)
    shape = fixed.shape[1:]
    field = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), 20) for _ in shape])
    where = np.indices(shape) + 6 * field / np.abs(field).max()

    def bent(image: torch.Tensor, order: int) -> MetaTensor:
        values = ndimage.map_coordinates(image[0].numpy(), where, order=order)
        return MetaTensor(torch.from_numpy(values)[None], affine=fixed.affine)

    label = (moving.as_tensor() > 800).to(torch.uint8)
    return {
        "fixed": bent(fixed.as_tensor(), 1),
        "fixed_label": bent(label, 0),
        "moving": moving,
        "label": MetaTensor(label, affine=moving.affine),
    }


def dice(one: torch.Tensor, two: torch.Tensor) -> float:
    return 2 * float(((one > 0) & (two > 0)).sum()) / float((one > 0).sum() + (two > 0).sum())


def chain(**options) -> RegisterDeformabled:
    return RegisterDeformabled("moving", "fixed", followers={"label": "moving"}, search="local", **options)


def test_images_and_followers_are_moved_and_come_back(item) -> None:
    transform = chain()
    moved = transform(item)
    assert moved["label"].dtype == torch.uint8
    before, after = (dice(label, item["fixed_label"]) for label in (item["label"], moved["label"]))
    assert after > before + 0.1
    known = Deformation(
        moved["affine_moving"], moved["displacement_moving"].as_tensor(), Grid.of(moved["displacement_moving"])
    )
    again = known.resample(item["moving"].as_tensor(), Grid.of(item["moving"]), Grid.of(item["fixed"]))
    torch.testing.assert_close(moved["moving"].as_tensor(), again)
    back = transform.inverse(moved)
    assert back["label"].shape == item["label"].shape
    assert dice(back["label"], item["label"]) > 0.9
    torch.testing.assert_close(back["moving"].affine, item["moving"].affine)
    assert not back["moving"].applied_operations
    assert moved["moving"].meta["registration_verdict"] == back["moving"].meta["registration_verdict"] == "PASS"
    assert "registration_affine" not in back["moving"].meta
    inside = item["moving"].as_tensor() > 100
    off = (back["moving"].as_tensor() - item["moving"].as_tensor())[inside].abs()
    assert float(off.median()) < 40


def test_lazy_execution_carries_out_what_is_pending_first(item) -> None:
    pipeline = Compose([SpatialPadd("moving", (260, 280)), chain(), SpatialPadd("moving", (300, 300))])
    eager, lazy = pipeline(item), Compose(pipeline.transforms, lazy=True)(item)
    torch.testing.assert_close(lazy["moving"].as_tensor(), eager["moving"].as_tensor(), atol=2.0, rtol=0)
    torch.testing.assert_close(lazy["label"], eager["label"])


def test_a_known_deformation_is_applied_by_the_transform_that_applies_matrices(item) -> None:
    moved = chain()(item)
    known = Deformation(
        moved["affine_moving"], moved["displacement_moving"].as_tensor(), Grid.of(moved["displacement_moving"])
    )
    again = ApplyAffineRegistration()(item["moving"], known, item["fixed"])
    torch.testing.assert_close(again.as_tensor(), moved["moving"].as_tensor())
    with pytest.raises(RegistrationError, match="with a deformation"):
        ApplyAffineRegistration(padding_mode="border")(item["moving"], known, item["fixed"])


def test_in_a_cache_and_workers_it_inverts(item) -> None:
    pipeline = Compose([SpatialPadd("moving", (260, 280)), pickle.loads(pickle.dumps(chain()))])
    data = CacheDataset([item, item], pipeline, num_workers=0, progress=False)
    batch = next(iter(DataLoader(data, batch_size=2, num_workers=1)))
    assert batch["moving"].shape == (2, *item["fixed"].shape)
    batch["pred"] = batch["moving"]
    inverter = Invertd("pred", pipeline, orig_keys="moving", nearest_interp=False)
    back = inverter(decollate_batch(batch)[0])["pred"]
    assert back.shape == item["moving"].shape


def test_wrong_arguments_are_refused(item) -> None:
    with pytest.raises(RegistrationError, match="transform"):
        RegisterAffine(transform="deformable")
    with pytest.raises(RegistrationError, match="stiffness"):
        RegisterDeformable(stiffness=0)
    with pytest.raises(RegistrationError, match="mode"):
        RegisterDeformable(mode="cubic")
    with pytest.raises(RegistrationError, match="^transform: got 'rigid', expected one of 'deformable'$"):
        RegisterDeformabled("moving", "fixed", transform="rigid")
    with pytest.raises(RegistrationError, match="followers"):
        RegisterDeformabled("moving", "fixed", followers={"moving": "moving"})
    with pytest.raises(RegistrationError, match="fixed_key"):
        RegisterDeformabled("moving", "moving")
    with pytest.raises(RegistrationError, match="fixed_key"):
        chain()({"moving": item["moving"], "label": item["label"]})
    with pytest.raises(KeyError, match="label"):
        chain()({"moving": item["moving"], "fixed": item["fixed"]})
