# SPDX-License-Identifier: Apache-2.0
"""`RegisterAffined` with its default preset in whole preprocessing chains, several images to one at once.

The phantom's images are drawn on their grids from one function of the world, so the transforms are exact. Target
registration error says whether images are aligned, ITK where voxels have to go.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import (
    CacheDataset,
    DataLoader,
    Dataset,
    MetaTensor,
    PersistentDataset,
    SmartCacheDataset,
    ThreadDataLoader,
    decollate_batch,
    list_data_collate,
    pickle_hashing,
)
from monai.networks.nets import SegResNet
from monai.transforms import (
    BorderPad,
    Compose,
    ConcatItemsd,
    CropForegroundd,
    DivisiblePadd,
    EnsureTyped,
    Invertd,
    LoadImaged,
    NormalizeIntensityd,
    RandAffined,
    RandScaleIntensityd,
    SaveImage,
    Spacingd,
)

from monai_zsreg import registration
from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import AffineParameters, compose_parameters
from monai_zsreg.transforms import ApplyAffineRegistrationd, RegisterAffined
from monai_zsreg.transforms.array import REASONS_KEY, VERDICT_KEY

MOVING = ("t2", "flair", "t1ce")
IMAGES = ("t1", *MOVING)
LABELS = ("label_t2", "label_flair")
FOLLOWERS = {"label_t2": "t2", "label_flair": "flair"}

# what is inside 1 to 4 looks like in each image; 0 is air
CONTRAST = {
    "t1": (0, 100, 400, 700, 250),
    "t2": (0, 800, 450, 250, 600),
    "flair": (0, 150, 600, 450, 900),
    "t1ce": (0, 80, 380, 650, 950),
}
# shape, spacing, degrees about every axis, sides turned round, where the middle lies: none like another
GRIDS = {
    "t1": ((46, 52, 34), (3.3, 3.3, 4.5), 12.0, (1, -1, 1), (4.0, -6.0, 9.0)),
    "t2": ((48, 62, 42), (4.0, 3.2, 4.0), -9.0, (-1, 1, 1), (-4.0, 3.0, 18.0)),
    "flair": ((54, 50, 44), (3.4, 4.2, 3.6), 7.0, (1, 1, -1), (15.0, -20.0, 4.0)),
    "t1ce": ((50, 56, 40), (3.6, 3.6, 4.2), 0.0, (-1, -1, 1), (-10.0, 8.0, 6.0)),
    # labels of the FLAIR were drawn on another grid than the FLAIR's
    "label_flair": ((60, 64, 56), (3.0, 3.2, 3.0), -4.0, (1, 1, 1), (13.0, -16.0, 5.0)),
}
PARAMETERS = {
    "t2": ((9.0, -7.0, 12.0), (14.0, -18.0, 10.0), (1.05, 0.95, 1.03), (0.04, -0.02, 0.02)),
    "flair": ((14.0, -16.0, -8.0), (-20.0, 12.0, 25.0), (0.96, 1.02, 1.04), (0.0, 0.03, -0.02)),
    "t1ce": ((-12.0, 10.0, 6.0), (6.0, 22.0, -15.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
}
# among the real data
REAL = "open_ms_mni/patient07"
# mm; voxels are 3 to 4.5 mm, and unregistered images are 15 mm and more off
ALIGNED, MISALIGNED = 1.0, 12.0


# ------------------------------------------------------------------------------------------------------- the phantom


def truth(key: str) -> np.ndarray:
    key = FOLLOWERS.get(key, key)
    return compose_parameters(AffineParameters(*PARAMETERS[key], (0.0, 0.0, 0.0))) if key in PARAMETERS else np.eye(4)


def header(shape: tuple, spacing: tuple, degrees: float, flips: tuple, middle: tuple) -> np.ndarray:
    dims = len(shape)
    zero, angles = (0.0,) * dims, (degrees,) * (1 if dims == 2 else 3)
    affine = compose_parameters(AffineParameters(zero, angles, spacing, (0.0,) * (dims * (dims - 1) // 2), zero))
    affine[:dims, :dims] *= flips
    affine[:dims, dims] = affine[:dims, :dims] @ [(1 - n) / 2 for n in shape] + np.asarray(middle)
    return affine


def transformed(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    dims = len(matrix) - 1
    return points @ matrix[:dims, :dims].T + matrix[:dims, dims]


def voxel_centers(shape: tuple, affine: np.ndarray) -> np.ndarray:
    return transformed(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape)))


def tissue(points: np.ndarray, subject: int) -> np.ndarray:
    """1 to 4 inside a lopsided head, 0 outside."""
    dims = points.shape[1]
    rng = np.random.default_rng(subject)
    radii = np.array((60.0, 72.0, 50.0))[:dims]
    field = np.zeros(len(points))
    for blob in range(70):
        center, width = rng.uniform(-0.9, 0.9, dims) * radii, rng.uniform(7.0, 18.0)
        field += (-1) ** blob * np.exp(-((points - center) ** 2).sum(1) / (2 * width**2))
    unit = points / radii
    inside = (unit**2).sum(1) + 0.25 * unit[:, 0] * unit[:, 1] < 1
    return np.where(inside, 1 + np.digitize(field, (-0.35, 0.1, 0.6)), 0)


@cache
def drawn(key: str, subject: int) -> MetaTensor:
    shape, *rest = GRIDS[key if key in GRIDS else FOLLOWERS[key]]
    affine = header(shape, *rest)
    classes = tissue(transformed(np.linalg.inv(truth(key)), voxel_centers(shape, affine)), subject)
    if key in FOLLOWERS:
        values = classes.astype(np.uint8)
    else:
        noise = np.random.default_rng([subject, *key.encode()]).normal(0, 10, len(classes))
        values = np.where(classes > 0, np.take(CONTRAST[key], classes) + noise, 0).astype(np.float32)
    meta = {"filename_or_obj": f"{key}_{subject}"}
    return MetaTensor(torch.as_tensor(values.reshape(1, *shape)), affine=torch.as_tensor(affine), meta=meta)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Two subjects, four modalities and two labels each, as NIfTI files whose grids all differ."""
    folder = tmp_path_factory.mktemp("subjects")
    items = []
    for subject in range(2):
        items.append({})
        for key in (*IMAGES, *LABELS):
            kind = np.uint8 if key in LABELS else np.float32
            SaveImage(folder, "", ".nii.gz", kind, separate_folder=False, resample=False, print_log=False)(
                drawn(key, subject)
            )
            items[-1][key] = str(folder / f"{key}_{subject}.nii.gz")
    return items


def error_mm(matrix: torch.Tensor, key: str, subject: int = 0) -> float:
    """Mean target registration error in the head."""
    fixed = drawn("t1", subject)
    points = voxel_centers(fixed.shape[1:], fixed.affine.numpy())[(fixed[0] > 0).numpy().ravel()]
    gap = transformed(np.asarray(matrix), points) - transformed(truth(key), points)
    return float(np.linalg.norm(gap, axis=1).mean())


def load(keys: tuple[str, ...] = (*IMAGES, *LABELS), **options) -> LoadImaged:
    return LoadImaged(list(keys), ensure_channel_first=True, **options)


def register_all(**options) -> RegisterAffined:
    return RegisterAffined(list(MOVING), fixed_key="t1", followers=FOLLOWERS, **options)


def register_t2(**options) -> Compose:
    """The shortest chain: one image, its labels, and no more."""
    keys = ("t1", "t2", "label_t2")
    return Compose([load(keys), RegisterAffined("t2", "t1", followers={"label_t2": "t2"}, **options)])


def assert_same_voxels(image: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert np.ptp(expected) > 100 * tolerance
    np.testing.assert_allclose(np.asarray(image), expected, atol=tolerance, rtol=0)


def assert_goes_back(item: dict, chain: Compose, key: str, itk_resample: Callable, native: MetaTensor) -> None:
    """A segmentation predicted in fixed space, inverted, is what ITK makes of it on the native grid of ``key``."""
    predicted = segmentation(item[key])
    inverse = np.linalg.inv(item[f"affine_{key}"].numpy())
    expected = itk_resample(predicted, native, inverse, nearest=True)
    back = Invertd("pred", chain, orig_keys=key, nearest_interp=True)(item | {"pred": predicted})["pred"]
    assert back.shape == native.shape
    np.testing.assert_array_equal(back.numpy(), expected)
    assert (expected > 0).mean() > 0.005
    # and the anatomy is where it was: most of the native image above the threshold is in the segmentation
    mine, theirs = back.numpy() > 0, segmentation(native).numpy() > 0
    assert 2 * (mine & theirs).sum() / (mine.sum() + theirs.sum()) > 0.75
    assert torch.equal(back.affine, native.affine)
    # how the registration went comes along; its matrix would be wrong at home
    assert back.meta.keys() - native.meta.keys() == {VERDICT_KEY, REASONS_KEY}
    for name in (VERDICT_KEY, REASONS_KEY):
        assert back.meta[name] == item[key].meta[name]
    for name, value in native.meta.items():
        np.testing.assert_array_equal(np.asarray(back.meta[name]), np.asarray(value), err_msg=name)


def segmentation(image: MetaTensor) -> MetaTensor:
    return MetaTensor(
        (image.as_tensor() > image.as_tensor().flatten().quantile(0.99) / 2).float(), affine=image.affine.clone()
    )


# ----------------------------------------------------------------------------------------------- many to one at once


@pytest.mark.parametrize("reader", ["NibabelReader", "ITKReader"])
def test_aligns_all_images_and_what_follows(subjects: list[dict], itk_resample, reader: str) -> None:
    native = load(reader=reader)(subjects[0])
    register = register_all(
        mode=["bilinear", "nearest", "bilinear"],
        fill_value=[-1024.0, 7.0, 0.0],
        follower_mode=["nearest", "bilinear"],
        follower_fill_value=[255.0, -1.0],
    )
    moved = register(native)
    fill = dict(zip((*MOVING, *LABELS), (-1024.0, 7.0, 0.0, 255.0, -1.0), strict=True))
    assert torch.equal(moved["t1"].as_tensor(), native["t1"].as_tensor())
    for key in (*MOVING, *LABELS):
        matrix = moved[f"affine_{FOLLOWERS.get(key, key)}"]
        assert error_mm(np.eye(4), key) > MISALIGNED
        assert error_mm(matrix, key) < ALIGNED
        assert isinstance(moved[key], MetaTensor)
        assert torch.equal(moved[key].affine, native["t1"].affine)
        nearest = key in ("flair", "label_t2")
        expected = itk_resample(native[key], native["t1"], matrix.numpy(), nearest=nearest)
        whole = itk_resample(native[key] * 0 + 1, native["t1"], matrix.numpy()) == 1
        # the last voxel fades into the fill value over one voxel
        wide = BorderPad(1)(native[key]) * 0 + 1
        empty = itk_resample(wide, native["t1"], matrix.numpy()) == 0
        rim = inner_rim(native[key], native["t1"], matrix.numpy(), itk_resample)
        assert empty.sum() > 100, "this grid would not show the fill value"
        assert (moved[key].numpy()[empty] == fill[key]).all()
        inside = whole & ~rim
        found, wanted = moved[key].numpy()[inside], expected[inside]
        if nearest:  # only half way between two voxels may rounding decide
            pull = np.linalg.inv(native[key].affine.numpy()) @ matrix.numpy() @ native["t1"].affine.numpy()
            apart = np.argwhere(inside[0])[found != wanted] @ pull[:3, :3].T + pull[:3, 3]
            assert (abs(apart - np.floor(apart) - 0.5).min(axis=1) < 1e-4).all()
        else:
            np.testing.assert_allclose(found, wanted, atol=2e-2)
        assert (expected[inside] > 0).mean() > 0.2


def inner_rim(image: MetaTensor, grid: MetaTensor, matrix: np.ndarray, itk_resample: Callable) -> np.ndarray:
    core = torch.zeros_like(image.as_tensor())
    core[:, 1:-1, 1:-1, 1:-1] = 1
    return itk_resample(MetaTensor(core, affine=image.affine.clone()), grid, matrix) < 1


def test_readers_agree(subjects: list[dict]) -> None:
    keys = ("t1", "t2")
    matrices = [
        RegisterAffined("t2", "t1")(load(keys, reader=reader)(subjects[0]))["affine_t2"]
        for reader in ("NibabelReader", "ITKReader")
    ]
    # ITK's reader hands on other roundings of the header
    torch.testing.assert_close(*matrices, atol=1e-2, rtol=0)


def test_missing_modalities_leave_the_others_aligned(subjects: list[dict], itk_resample) -> None:
    item = {k: v for k, v in subjects[0].items() if k not in ("flair", "label_flair", "label_t2")}
    with pytest.raises(RuntimeError) as caught:
        Compose([load(allow_missing_keys=True), register_all()])(item)
    assert isinstance(caught.value.__cause__, KeyError) and "label" in str(caught.value.__cause__)
    chain = Compose([load(allow_missing_keys=True), register_all(allow_missing_keys=True)])
    moved = chain(item)
    assert set(moved) == set(item) | {"affine_t2", "affine_t1ce"}
    for key in ("t2", "t1ce"):
        assert error_mm(moved[f"affine_{key}"], key) < ALIGNED
        assert_goes_back(moved, chain, key, itk_resample, load((key,))(item)[key])


def test_preparing_the_fixed_image_once_changes_no_matrix(subjects: list[dict], monkeypatch) -> None:
    native = load(IMAGES)(subjects[0])
    made = []
    side = registration.Prepared.side
    monkeypatch.setattr(registration.Prepared, "side", lambda self, *args: made.append(self) or side(self, *args))
    together = RegisterAffined(list(MOVING), "t1")(native)
    # the objects are kept, since an address can be used again
    assert len({id(prepared) for prepared in made}) == 1 + len(MOVING)
    for key in MOVING:
        assert torch.equal(together[f"affine_{key}"], RegisterAffined(key, "t1")(native)[f"affine_{key}"])


# --------------------------------------------------------------------------------------------------------- the end


def brats_chain(lazy: bool = False) -> Compose:
    """As MONAI's BraTS bundle prepares its input, with the registration that its data already had."""
    keys = list(IMAGES)
    return Compose(
        [
            load(IMAGES),
            RegisterAffined(list(MOVING), "t1"),
            CropForegroundd(keys, source_key="t1", margin=2, allow_smaller=False),
            ConcatItemsd(keys, "image"),
            CropForegroundd("image", "image", allow_smaller=True),
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        ],
        lazy=lazy,
    )


@pytest.fixture(scope="module")
def real_subject(realdata: Path, load_volume: Callable, tmp_path_factory) -> dict[str, str]:
    """A real subject at 3 mm as files; all but the T1 lie elsewhere in the world and on grids of their own."""
    folder = tmp_path_factory.mktemp("real")
    paths = {}
    for number, key in enumerate(IMAGES):
        image = load_volume(REAL, key)
        voxels = torch.nn.functional.avg_pool3d(image.as_tensor(), 3)
        coarse = np.diag([3.0, 3.0, 3.0, 1.0])
        coarse[:3, 3] = 1.0
        affine = truth(key) @ image.affine.numpy() @ coarse
        if number:
            # another field of view, stored the other way round
            voxels = torch.nn.functional.pad(voxels, (number, 2, 0, number, 3, 1)).flip(1 + number % 3)
            shift, flip = np.eye(4), np.eye(4)
            shift[:3, 3] = -3, 0, -number
            flip[number % 3, number % 3], flip[number % 3, 3] = -1, voxels.shape[1 + number % 3] - 1
            affine = affine @ shift @ flip
        paths[key] = str(folder / f"{key}.nii.gz")
        SaveImage(folder, "", ".nii.gz", separate_folder=False, resample=False, print_log=False)(
            MetaTensor(voxels, affine=torch.as_tensor(affine), meta={"filename_or_obj": key})
        )
    return paths


def assert_ready_for_the_network(item: dict) -> None:
    image = item["image"]
    assert isinstance(image, MetaTensor)
    assert image.shape[0] == 4
    assert all(a <= b for a, b in zip(image.shape[1:], drawn("t1", 0).shape[1:], strict=True)) or "real" in item
    for values in image.as_tensor():
        values = values[values != 0]
        assert abs(float(values.mean())) < 1e-3 and abs(float(values.std()) - 1) < 1e-3
    batch = list_data_collate([DivisiblePadd("image", k=8)({"image": image})])["image"]
    network = SegResNet(in_channels=4, out_channels=3, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)).eval()
    with torch.no_grad():
        predicted = network(batch)
    assert predicted.shape == (1, 3, *batch.shape[2:]) and torch.isfinite(predicted).all()


@pytest.mark.parametrize("lazy", [False, True])
def test_brats_chain(subjects: list[dict], itk_resample, lazy: bool) -> None:
    chain = brats_chain(lazy)
    item = chain(subjects[1])
    assert_ready_for_the_network(item)
    # every channel shows the same anatomy in the same voxel: each class has nearly one gray value per channel
    classes = tissue(voxel_centers(item["image"].shape[1:], item["image"].affine.numpy()), 1)
    for number, key in enumerate(IMAGES):
        values = item["image"][number].numpy().ravel()
        within = sum(((values[classes == c] - values[classes == c].mean()) ** 2).sum() for c in range(5))
        explained = 1 - within / ((values - values.mean()) ** 2).sum()
        assert explained > 0.5, (key, explained)  # 0.2 where the image was left as it is
        if key != "t1":
            assert error_mm(item[f"affine_{key}"], key, 1) < ALIGNED
    # a segmentation on the cropped grid goes back through the crop and the registration
    for key in ("t2", "t1ce"):
        assert_goes_back(item, chain, key, itk_resample, load((key,))(subjects[1])[key])


def test_brats_chain_on_a_real_subject(real_subject: dict, load_volume, itk_resample) -> None:
    chain = brats_chain()
    item = chain(real_subject)
    assert_ready_for_the_network(item | {"real": True})
    brain = load(("t1",))(real_subject)["t1"]
    points = voxel_centers(brain.shape[1:], brain.affine.numpy())[(brain[0] > 0).numpy().ravel()]
    for number, key in enumerate(IMAGES[1:], start=1):
        gap = transformed(item[f"affine_{key}"].numpy(), points) - transformed(truth(key), points)
        assert np.linalg.norm(gap, axis=1).mean() < 1.5, key
        # what the co-registered original shows in these voxels
        original = itk_resample(load_volume(REAL, key), item["image"], np.eye(4))[0]
        inside = original > 0
        assert np.corrcoef(original[inside], item["image"][number].numpy()[inside])[0, 1] > 0.8, key
        assert_goes_back(item, chain, key, itk_resample, load((key,))(real_subject)[key])


# ----------------------------------------------------------------------------------------------------------- lazily


def test_lazy_chain_interpolates_once(subjects: list[dict], itk_resample) -> None:
    keys = ["t1", "t2", "label_t2"]
    overrides = {
        "t1": {"padding_mode": "zeros"},
        "t2": {"padding_mode": "zeros"},
        "label_t2": {"mode": "nearest", "padding_mode": "zeros"},
    }

    def chain(lazy: bool) -> Compose:
        steps = [
            load(tuple(keys)),
            Spacingd(keys, (3.5, 3.5, 3.5), mode=("bilinear", "bilinear", "nearest"), padding_mode="zeros"),
            RegisterAffined("t2", "t1", followers={"label_t2": "t2"}),
            RandAffined(
                keys,
                prob=1.0,
                rotate_range=0.3,
                translate_range=4.0,
                mode=("bilinear", "bilinear", "nearest"),
                padding_mode="zeros",
            ),
        ]
        return Compose(steps, lazy=lazy, overrides=overrides if lazy else None).set_random_state(0)

    native = load(tuple(keys))(subjects[0])
    lazy_chain = chain(True)
    lazy, eager = lazy_chain(subjects[0]), chain(False)(subjects[0])
    matrix = lazy["affine_t2"]
    assert error_mm(matrix, "t2") < ALIGNED
    torch.testing.assert_close(lazy["t2"].affine, eager["t2"].affine, atol=1e-6, rtol=0)
    assert not any(lazy[key].pending_operations for key in keys)
    # the grid that the augmentation ends on, straight from the file
    for key, pull in (("t1", np.eye(4)), ("t2", matrix.numpy())):
        once = itk_resample(native[key], lazy[key], pull)
        assert_same_voxels(lazy[key], once, 0.1)
        assert np.abs(eager[key].numpy() - once).max() > 30, "more interpolations must show, or this proves nothing"
    labels = itk_resample(native["label_t2"], lazy["t2"], matrix.numpy(), nearest=True)
    # float32 of the combined matrix decides the few voxels that lie halfway
    assert (lazy["label_t2"].numpy() != labels).mean() < 1e-4
    assert (eager["label_t2"].numpy() != labels).mean() > 1e-2
    back = lazy_chain.inverse(lazy)
    for key in keys:
        assert back[key].shape == native[key].shape
        torch.testing.assert_close(back[key].affine, native[key].affine, atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------- data sets and loaders


def assert_all_registered(items: list[dict], chain: Compose, sources: list[dict], itk_resample: Callable) -> None:
    assert len(items) == len(sources)
    for item, source in zip(items, sources, strict=True):
        subject = int(Path(source["t2"]).name.split(".")[0][-1])
        assert item["t2"].meta["filename_or_obj"] == source["t2"]
        assert item["t2"].meta["registration_verdict"] != "FAIL"
        assert error_mm(item["affine_t2"], "t2", subject) < ALIGNED
        native = load(("t2", "label_t2"))(source)
        expected = itk_resample(native["label_t2"], item["t1"], item["affine_t2"].numpy(), nearest=True)
        np.testing.assert_array_equal(item["label_t2"].numpy(), expected)
        assert_goes_back(item, chain, "t2", itk_resample, native["t2"])


def taken_apart(loader: DataLoader) -> list[dict]:
    return [item for batch in loader for item in decollate_batch(batch)]


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_workers(subjects: list[dict], itk_resample, start: str, workers: int) -> None:
    chain = register_t2()
    loader = DataLoader(Dataset(subjects, chain), batch_size=2, num_workers=workers, multiprocessing_context=start)
    assert_all_registered(taken_apart(loader), chain, subjects, itk_resample)


@pytest.mark.parametrize("workers", [0, 2])
def test_thread_loader(subjects: list[dict], itk_resample, workers: int) -> None:
    chain = register_t2()
    loader = ThreadDataLoader(Dataset(subjects, chain), batch_size=1, num_workers=workers, use_thread_workers=True)
    assert_all_registered(taken_apart(loader), chain, subjects, itk_resample)


def test_cache_registers_once_and_gives_the_same(subjects: list[dict], itk_resample) -> None:
    chain = register_t2()
    cached = CacheDataset(subjects, chain, num_workers=2, progress=False)
    first = taken_apart(DataLoader(cached, batch_size=2))
    assert_all_registered(first, chain, subjects, itk_resample)
    # the epoch before inverted its items; the cache must not have noticed
    assert_all_registered(taken_apart(DataLoader(cached, batch_size=2, num_workers=2)), chain, subjects, itk_resample)


def test_smart_cache_replaces(subjects: list[dict], itk_resample) -> None:
    chain = register_t2()
    data = SmartCacheDataset(subjects, chain, replace_rate=1.0, cache_num=1, shuffle=False, progress=False)
    data.start()
    try:
        for epoch in range(3):
            items = taken_apart(DataLoader(data, batch_size=1))
            assert_all_registered(items, chain, [subjects[epoch % 2]], itk_resample)
            data.update_cache()
    finally:
        data.shutdown()


def persistent(subjects: list[dict], folder: Path, chain: Compose | None = None, **options) -> PersistentDataset:
    options = {"hash_transform": pickle_hashing, "track_meta": True, "weights_only": False} | options
    return PersistentDataset(subjects, chain or register_t2(), cache_dir=folder, **options)


def test_persistent_cache(subjects: list[dict], itk_resample, tmp_path: Path) -> None:
    first = [persistent(subjects, tmp_path)[i] for i in range(2)]
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(written) == 2
    chain = register_t2()
    items = taken_apart(DataLoader(persistent(subjects, tmp_path, chain), batch_size=2))
    assert_all_registered(items, chain, subjects, itk_resample)
    # another process, where strings hash otherwise, finds the files by the same names and computes the same numbers
    script = (
        "import json, sys; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1]); import test_chains\n"
        "folders = [Path(sys.argv[3]), Path(sys.argv[4])]\n"
        "data = [test_chains.persistent(json.loads(sys.argv[2]), folder) for folder in folders]\n"
        "numbers = [[one[i]['affine_t2'].tolist() for i in range(2)] for one in data]\n"
        "Path(sys.argv[5]).write_text(json.dumps(numbers))"
    )
    beside = tmp_path.parent / f"{tmp_path.name}_fresh"
    arguments = [str(Path(__file__).parent), json.dumps(subjects), str(tmp_path), str(beside), f"{beside}.json"]
    hashes = {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, env=os.environ | hashes)
    read, fresh = json.loads(Path(f"{beside}.json").read_text())
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    for one, two, three in zip(first, read, fresh, strict=True):
        assert one["affine_t2"].tolist() == two
        np.testing.assert_allclose(one["affine_t2"].tolist(), three, atol=1e-4, rtol=0)
    # other arguments, other files
    persistent(subjects, tmp_path, register_t2(transform="rigid"))[0]
    assert len(list(tmp_path.iterdir())) == 3


def test_persistent_cache_without_metadata_is_not_overlooked(subjects: list[dict], tmp_path: Path) -> None:
    chain = Compose(
        [
            load(("t1", "t2")),
            RandScaleIntensityd(["t1"], factors=0.0, prob=0.0),  # ends what is cached
            RegisterAffined("t2", "t1"),
        ]
    )
    persistent(subjects[:1], tmp_path, chain)[0]
    assert error_mm(persistent(subjects[:1], tmp_path, chain)[0]["affine_t2"], "t2") < ALIGNED
    bare = tmp_path / "bare"
    PersistentDataset(subjects[:1], load(("t1", "t2")), cache_dir=bare)[0]
    with pytest.warns(RegistrationWarning, match="no affine.*track_meta=True"):
        PersistentDataset(subjects[:1], chain, cache_dir=bare)[0]


def test_inverse_without_metadata_is_refused(subjects: list[dict]) -> None:
    chain = register_t2()
    bare = EnsureTyped(["t2", "label_t2"], track_meta=False)(chain(subjects[0]))
    with pytest.raises(RegistrationError, match="track_meta=True"):
        chain.transforms[-1].inverse(bare)


def test_pickled_chain_registers_alike(subjects: list[dict]) -> None:
    chain = register_t2()
    one, two = chain(subjects[0]), pickle.loads(pickle.dumps(chain))(subjects[0])
    for key in ("t2", "label_t2", "affine_t2"):
        assert torch.equal(torch.as_tensor(one[key]), torch.as_tensor(two[key]))


def test_inverse_in_one_thread_leaves_others_their_trace(subjects: list[dict]) -> None:
    """As when a ThreadDataLoader prepares the next batch while the last one is inverted."""
    item = load(("t1", "t2"))(subjects[0])
    apply = ApplyAffineRegistrationd("t2", "t1", affine=truth("t2"))
    moved = apply(item)
    stop = threading.Event()

    def invert() -> None:
        while not stop.is_set():
            apply.inverse({"t2": moved["t2"].clone()})

    thread = threading.Thread(target=invert)
    thread.start()
    try:
        traces = [len(apply(item)["t2"].applied_operations) for _ in range(30)]
    finally:
        stop.set()
        thread.join()
    assert traces == [1] * 30


# ---------------------------------------------------------------------------------------------------------------- 2D


@pytest.fixture
def png_item(tmp_path: Path) -> Iterator[dict]:
    """Two PNG pictures in color and labels of the second, turned and shifted against the first."""
    from PIL import Image

    matrix = compose_parameters(AffineParameters((15.0, 24.0), (25.0,), (1.06, 0.95), (0.04,), (0.0, 0.0)))
    middle = {"fixed": (72, 84), "moving": (80, 92)}
    names = {"fixed": np.eye(3), "moving": matrix, "labels": matrix}
    item: dict = {}
    origin = np.eye(3)
    origin[:2, 2] = middle["fixed"]
    for name, pull in names.items():
        width, height = (2 * n for n in middle.get(name, middle["moving"]))
        # pixels are the world: the head lies in the middle of the fixed picture
        points = transformed(
            np.linalg.inv(origin), transformed(np.linalg.inv(pull), voxel_centers((width, height), np.eye(3)))
        )
        classes = tissue(points, 5).reshape(width, height)
        key = "t1" if name == "fixed" else "t2"
        values = classes if name == "labels" else np.take(CONTRAST[key], classes) / 4
        picture = values.T.astype(np.uint8)
        if name != "labels":
            picture = np.stack([picture, picture // 2, 255 - picture], axis=-1)
        item[name] = str(tmp_path / f"{name}.png")
        Image.fromarray(picture).save(item[name])
    yield item | {"truth": matrix}


def test_png(png_item: dict, itk_resample) -> None:
    truth_px = png_item.pop("truth")
    chain = Compose(
        [
            load(("fixed", "moving", "labels")),
            RegisterAffined("moving", "fixed", followers={"labels": "moving"}, fill_value=9.0),
        ]
    )
    native = load(("fixed", "moving", "labels"))(png_item)
    assert native["moving"].shape == (3, 160, 184)
    item = taken_apart(DataLoader(Dataset([png_item, png_item], chain), batch_size=2))[1]
    points = np.argwhere(native["fixed"][0].numpy() > 0)
    gap = transformed(item["affine_moving"].numpy(), points) - transformed(truth_px, points)
    assert np.linalg.norm(gap, axis=1).mean() < 1.0
    assert np.linalg.norm(transformed(truth_px, points) - points, axis=1).mean() > 15
    expected = itk_resample(native["labels"], native["fixed"], item["affine_moving"].numpy(), nearest=True)
    # half way between two pixels it may be either
    there = transformed(item["affine_moving"].numpy(), np.argwhere(np.ones(expected.shape[1:])))
    sure = (np.abs(there % 1 - 0.5) > 1e-4).all(1).reshape(expected.shape[1:])
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(item["labels"].numpy()[:, sure], expected[:, sure])
    wide = BorderPad(1)(native["moving"]) * 0 + 1
    outside = itk_resample(wide, native["fixed"], item["affine_moving"].numpy()) == 0
    assert outside.sum() > 50 and (item["moving"].numpy()[outside] == 9).all()
    item["moving"] = item["moving"][:1]
    assert_goes_back(item, chain, "moving", itk_resample, native["moving"][:1])
