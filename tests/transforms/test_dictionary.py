# SPDX-License-Identifier: Apache-2.0
"""Dictionary transforms in the chains, data sets and loaders that they meet; ITK judges where voxels go."""

from __future__ import annotations

import pickle
import threading
import warnings
from collections.abc import Iterator
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
    pickle_hashing,
)
from monai.transforms import (
    Compose,
    ConcatItemsd,
    CropForegroundd,
    Invertd,
    LoadImaged,
    NormalizeIntensityd,
    RandAffined,
    SaveImage,
    Spacingd,
)
from monai.utils import set_determinism

from monai_zsreg import transforms
from monai_zsreg.errors import RegistrationError, RegistrationFailure, RegistrationWarning
from monai_zsreg.geometry import AffineParameters, compose_parameters, moved_header
from monai_zsreg.io import read_transform, write_transform
from monai_zsreg.transforms import ApplyAffineRegistrationd, RegisterAffined, SaveAffined
from monai_zsreg.transforms.array import REASONS_KEY, VERDICT_KEY


def as_item(pair) -> dict:
    return {"fixed": pair.fixed, "moving": pair.moving, "labels": pair.labels, "matrix": torch.as_tensor(pair.affine)}


def apply_known(**options) -> ApplyAffineRegistrationd:
    return ApplyAffineRegistrationd(
        ["moving", "labels"], "fixed", affine_keys="matrix", mode=["bilinear", "nearest"], **options
    )


@pytest.fixture
def files(pair_of, tmp_path: Path) -> list[dict]:
    """Three 3D pairs as NIfTI files with their matrices as ITK files."""
    items = []
    for seed in range(3):
        pair = pair_of(3, seed)
        save = SaveImage(tmp_path, output_postfix="", separate_folder=False, resample=False, print_log=False)
        for image in (pair.fixed, pair.moving, pair.labels):
            save(image[:1])
        write_transform(tmp_path / f"{seed}.tfm", pair.affine, format="itk")
        names = ("fixed", "moving", "labels")
        items.append(
            {n: str(tmp_path / f"{n}{seed}.nii.gz") for n in names} | {"matrix": str(tmp_path / f"{seed}.tfm")}
        )
    return items


def load_and_apply(**options) -> Compose:
    return Compose([LoadImaged(["fixed", "moving", "labels"], ensure_channel_first=True), apply_known(**options)])


def test_names() -> None:
    for name in ("RegisterAffine", "ApplyAffineRegistration", "SaveAffine"):
        assert getattr(transforms, f"{name}d") is getattr(transforms, f"{name}D") is getattr(transforms, f"{name}Dict")
        assert getattr(transforms, f"{name}d") is not getattr(transforms, name)


def test_each_key_in_its_own_way(known_pair, itk_resample) -> None:
    item = as_item(known_pair)
    moved = apply_known(fill_value=[-5.0, 0.0])(item)
    ones = known_pair.moving[:1] * 0 + 1
    outside = (
        ApplyAffineRegistrationd("x", "fixed", affine=known_pair.affine, fill_value=0)(
            {"x": ones, "fixed": known_pair.fixed}
        )["x"]
        == 0
    )
    assert (moved["moving"][:1][outside] == -5).all()
    expected = itk_resample(known_pair.labels, known_pair.fixed, known_pair.affine, nearest=True)
    np.testing.assert_array_equal(moved["labels"].numpy(), expected)
    assert moved["fixed"] is known_pair.fixed
    assert item["moving"] is known_pair.moving


@pytest.mark.parametrize("as_file", [False, True])
def test_one_matrix_for_all(known_pair, tmp_path: Path, as_file: bool) -> None:
    write_transform(tmp_path / "t.tfm", known_pair.affine, format="itk")
    affine = tmp_path / "t.tfm" if as_file else known_pair.affine.tolist()
    moved = ApplyAffineRegistrationd("moving", "fixed", affine=affine)(as_item(known_pair))["moving"]
    expected = apply_known()(as_item(known_pair))["moving"]
    torch.testing.assert_close(moved.as_tensor(), expected.as_tensor(), atol=1e-6, rtol=0)


def test_lazy_chain_interpolates_once(known_pair, itk_resample) -> None:
    """Spacing, registration and a random transform of the fixed grid equal ITK's one resampling onto the last grid."""
    dims = known_pair.moving.ndim - 1

    def chain(lazy: bool) -> dict:
        keys = ["fixed", "moving", "labels"]
        random = RandAffined(keys, prob=1.0, rotate_range=0.4, translate_range=3.0, padding_mode="zeros")
        steps = [Spacingd(keys, pixdim=(1.4,) * dims, padding_mode="zeros"), apply_known(), random]
        # MONAI's RandAffined forgets its own modes when it is lazy
        overrides = {
            "fixed": {},
            "moving": {"padding_mode": "zeros"},
            "labels": {"mode": "nearest", "padding_mode": "zeros"},
        }
        return Compose(steps, lazy=lazy, overrides=overrides).set_random_state(0)(as_item(known_pair))

    lazy, eager = chain(True), chain(False)
    assert [op["class"] for op in lazy["moving"].applied_operations][:2] == [
        "SpatialResample",
        "ApplyAffineRegistration",
    ]
    assert not lazy["moving"].pending_operations
    torch.testing.assert_close(lazy["moving"].affine, eager["moving"].affine, atol=1e-9, rtol=0)
    torch.testing.assert_close(lazy["moving"].affine, lazy["fixed"].affine, atol=1e-9, rtol=0)
    once = itk_resample(known_pair.moving, lazy["moving"], known_pair.affine)
    assert (once > 0.1).mean() > 0.1
    np.testing.assert_allclose(lazy["moving"].numpy(), once, atol=1e-3)
    labels = itk_resample(known_pair.labels, lazy["moving"], known_pair.affine, nearest=True)
    assert (lazy["labels"].numpy() != labels).mean() < 1e-3
    # three interpolations blur; were they equal, this test could not tell
    assert np.abs(eager["moving"].numpy() - once).max() > 0.02


def test_lazy_chain_inverts_to_the_native_grid(known_pair) -> None:
    keys = ["fixed", "moving"]
    dims = known_pair.moving.ndim - 1
    chain = Compose(
        [Spacingd(keys, pixdim=(1.4,) * dims), apply_known(), RandAffined(keys, prob=1.0, rotate_range=0.2)]
    )
    item = Compose(chain.transforms, lazy=True)(as_item(known_pair))
    back = chain.inverse(item)
    for key, native in (("moving", known_pair.moving), ("labels", known_pair.labels)):
        assert back[key].shape == native.shape
        torch.testing.assert_close(back[key].affine, native.affine, atol=1e-9, rtol=0)
        assert torch.equal(back[key].meta["original_affine"], native.meta["original_affine"])
        assert not back[key].applied_operations


@pytest.mark.parametrize("lazy", [False, True, None])
def test_every_way_to_be_lazy_gives_the_same(known_pair, lazy: bool | None) -> None:
    expected = apply_known()(as_item(known_pair))
    transform = apply_known(lazy=lazy is None)
    moved = Compose([transform], lazy=lazy)(as_item(known_pair))
    for key in ("moving", "labels"):
        torch.testing.assert_close(
            moved[key].as_tensor(), expected[key].as_tensor(), check_dtype=False, atol=1e-3, rtol=0
        )
    transform.lazy = True
    assert transform(as_item(known_pair))["moving"].pending_operations


# ------------------------------------------------------------------------------------------- data sets and loaders


def check_inverted(items: list[dict], transform: Compose, sources: list[dict], itk_resample) -> None:
    """A segmentation made on the fixed grid, inverted, is what ITK makes of it on the native grid."""
    invert = Invertd("pred", transform, orig_keys="moving", nearest_interp=True)
    load = LoadImaged(["fixed", "moving"], ensure_channel_first=True)
    for item, source in zip(items, sources, strict=False):
        native = load(source)
        on_fixed = item["pred"].clone()
        back = invert(item)["pred"]
        inverse = np.linalg.inv(read_transform(source["matrix"], format="itk"))
        np.testing.assert_array_equal(back.numpy(), itk_resample(on_fixed, native["moving"], inverse, nearest=True))
        assert back.any()
        assert torch.equal(back.affine, native["moving"].affine)
        assert back.meta["filename_or_obj"] == native["moving"].meta["filename_or_obj"]


def predict(batch: dict) -> Iterator[dict]:
    batch["pred"] = (batch["moving"] > 0.5).float()
    # away from the border of the grid, where ITK repeats the last voxel and we fill with zeros
    batch["pred"][..., :2, :, :] = batch["pred"][..., :2, :] = batch["pred"][..., :2] = 0
    batch["pred"][..., -2:, :, :] = batch["pred"][..., -2:, :] = batch["pred"][..., -2:] = 0
    yield from decollate_batch(batch)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_and_invertd(files: list[dict], itk_resample, workers: int, lazy: bool) -> None:
    transform = load_and_apply(lazy=lazy)
    loader = DataLoader(Dataset(files, transform), batch_size=2, num_workers=workers)
    items = [item for batch in loader for item in predict(batch)]
    assert len(items) == 3
    check_inverted(items, transform, files, itk_resample)


def test_thread_loader_and_invertd(files: list[dict], itk_resample) -> None:
    transform = load_and_apply()
    loader = ThreadDataLoader(CacheDataset(files, transform, progress=False), batch_size=3, num_workers=0)
    check_inverted([i for b in loader for i in predict(b)], transform, files, itk_resample)


@pytest.mark.slow
def test_spawned_workers_and_invertd(files: list[dict], itk_resample) -> None:
    method = torch.multiprocessing.get_start_method(allow_none=True)
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        transform = load_and_apply()
        loader = DataLoader(Dataset(files[:1], transform), batch_size=1, num_workers=1)
        check_inverted([i for b in loader for i in predict(b)], transform, files, itk_resample)
    finally:
        torch.multiprocessing.set_start_method(method, force=True)


@pytest.mark.parametrize("kind", [CacheDataset, SmartCacheDataset])
def test_caching_data_sets(files: list[dict], itk_resample, kind: type) -> None:
    transform = load_and_apply()
    options = {"replace_rate": 0.5, "cache_num": 2, "shuffle": False} if kind is SmartCacheDataset else {}
    loader = DataLoader(kind(files, transform, progress=False, **options), batch_size=3)
    items = [i for b in loader for i in predict(b)]
    assert len(items) == options.get("cache_num", 3)
    check_inverted(items, transform, files, itk_resample)


def test_persistent_data_set(files: list[dict], itk_resample, tmp_path: Path) -> None:
    def data_set() -> PersistentDataset:
        return PersistentDataset(
            files,
            load_and_apply(),
            cache_dir=tmp_path / "cache",
            hash_transform=pickle_hashing,
            track_meta=True,
            weights_only=False,  # else MONAI refuses the NumPy arrays in the metadata of any NIfTI file
        )

    first = [data_set()[i] for i in range(3)]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(written) == 3
    # a new object of equal arguments has the same hash, and what it reads is the same
    again = data_set()
    second = [again[i] for i in range(3)]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == written
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one["moving"].as_tensor(), two["moving"].as_tensor())
        assert torch.equal(one["moving"].affine, two["moving"].affine)
    batch = next(iter(DataLoader(again, batch_size=3)))
    check_inverted(list(predict(batch)), load_and_apply(), files, itk_resample)


def test_persistent_data_set_that_drops_metadata(files: list[dict], tmp_path: Path) -> None:
    # as MONAI's default is: images come out of the cache without affine, and nobody must overlook that
    load = LoadImaged(["fixed", "moving", "labels"], ensure_channel_first=True)
    PersistentDataset(files, load, cache_dir=tmp_path / "cache")[0]
    cached = PersistentDataset(files, load, cache_dir=tmp_path / "cache")[0]
    with pytest.warns(RegistrationWarning, match="(fixed|img) has no affine.*track_meta=True"):
        apply_known()(cached)


def test_equal_arguments_hash_equally(tmp_path: Path) -> None:
    (tmp_path / "w.pt").touch()

    def make() -> list:
        return [
            RegisterAffined(
                ["b", "a"], "f", followers={"l": "a"}, vgg19_weights=tmp_path / "w.pt", device=torch.device("cpu")
            ),
            ApplyAffineRegistrationd("a", "f", affine=np.eye(4)),
            SaveAffined("a", tmp_path),
        ]

    first, second = make(), make()
    assert pickle.dumps(first) == pickle.dumps(second)
    assert pickle.dumps(first) != pickle.dumps([RegisterAffined(["b", "a"], "f", seed=1), *first[1:]])


@pytest.mark.parametrize("reader", ["NibabelReader", "ITKReader"])
def test_brats_chain(files: list[dict], reader: str) -> None:
    keys = ["t1", "t2", "flair", "t1ce"]
    item = {"t1": files[0]["fixed"]} | {k: f["moving"] for k, f in zip(keys[1:], files, strict=True)}
    item |= {f"{k}_matrix": f["matrix"] for k, f in zip(keys[1:], files, strict=True)}
    chain = Compose(
        [
            LoadImaged(keys, ensure_channel_first=True, reader=reader),
            ApplyAffineRegistrationd(keys[1:], "t1", affine_keys=[f"{k}_matrix" for k in keys[1:]]),
            ConcatItemsd(keys, "image"),
            CropForegroundd("image", "image", allow_smaller=True),
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        ]
    )
    image = chain(item)["image"]
    assert image.shape[0] == 4
    assert torch.isfinite(image).all() and (image.std(dim=(1, 2, 3)) > 0).all()


def test_png(tmp_path: Path, itk_resample) -> None:
    rng = np.random.default_rng(0)
    for name, shape in (("fixed", (3, 40, 30)), ("moving", (3, 28, 36))):
        image = MetaTensor(rng.integers(0, 255, shape).astype(np.float32), meta={"filename_or_obj": name})
        image[:, :2], image[:, -2:], image[:, :, :2], image[:, :, -2:] = 0, 0, 0, 0
        save = SaveImage(tmp_path, "", ".png", separate_folder=False, resample=False, scale=None, print_log=False)
        save(image)
    affine = compose_parameters(AffineParameters((3.0, -2.0), (14.0,), (1.05, 0.93), (0.06,), (15.0, 14.0)))
    load = LoadImaged(["fixed", "moving"], ensure_channel_first=True)
    native = load({n: str(tmp_path / f"{n}.png") for n in ("fixed", "moving")})
    assert native["moving"].shape[0] == 3
    apply = ApplyAffineRegistrationd("moving", "fixed", affine=affine)
    moved = apply(native)
    np.testing.assert_allclose(
        moved["moving"].numpy(), itk_resample(native["moving"], native["fixed"], affine), atol=1e-2
    )
    back = apply.inverse(moved)["moving"]
    assert torch.equal(back.affine, native["moving"].affine) and back.shape == native["moving"].shape


# ---------------------------------------------------------------------------------------------------- missing and wrong


def test_missing_keys(known_pair) -> None:
    item = as_item(known_pair)
    del item["labels"]
    with pytest.raises(KeyError, match="labels"):
        apply_known()(item)
    moved = apply_known(allow_missing_keys=True)(item)
    assert set(moved) == set(item)
    assert apply_known(allow_missing_keys=True)({"other": 1}) == {"other": 1}
    with pytest.raises(RegistrationError, match="^fixed_key: got 'fixed'"):
        apply_known(allow_missing_keys=True)({k: v for k, v in item.items() if k != "fixed"})
    with pytest.raises(RegistrationError, match="^affine_keys: got 'matrix'"):
        apply_known(allow_missing_keys=True)({k: v for k, v in item.items() if k != "matrix"})
    register = RegisterAffined("moving", "fixed", followers={"labels": "moving"})
    with pytest.raises(KeyError, match="labels"):
        register(item)
    register = RegisterAffined("moving", "fixed", followers={"labels": "moving"}, allow_missing_keys=True)
    with pytest.raises(RegistrationError, match="'moving' too, because 'labels' follows it"):
        register({"labels": known_pair.labels, "fixed": known_pair.fixed})
    assert register({"other": 1}) == {"other": 1}


@pytest.mark.parametrize(
    "argument, options",
    [
        ("fixed_key", {"fixed_key": "a"}),
        ("keys", {"keys": ["a", "a"]}),
        ("followers", {"followers": {"l": "c"}}),
        ("followers", {"followers": {"b": "a"}}),
        ("followers", {"followers": {"f": "a"}}),
        ("affine_prefix", {"affine_prefix": ""}),
        ("affine_prefix", {"keys": ["a", "affine_a"]}),
        ("mode", {"mode": "linear"}),
        ("mode", {"mode": ["bilinear"] * 3}),
        ("preset", {"preset": "robsut"}),
        ("transform", {"transform": "deformable"}),
        ("seed", {"seed": -1}),
        ("device", {"device": "cuda:99"}),
        ("device", {"device": "gpu"}),
        ("search", {"search": "everywhere"}),
        ("options", {"serach": "local"}),
        ("padding_mode", {"padding_mode": ["zeros", "ones"]}),
        ("follower_mode", {"followers": {"l": "a"}, "follower_mode": ["nearest"] * 2}),
        ("on_failure", {"on_failure": "shrug"}),
    ],
)
def test_refuses_wrong_arguments(argument: str, options: dict) -> None:
    with pytest.raises(RegistrationError, match=f"^{argument}: "):
        RegisterAffined(**({"keys": ["a", "b"], "fixed_key": "f"} | options))


def test_refuses_two_or_no_matrices() -> None:
    with pytest.raises(RegistrationError, match="^affine_keys: "):
        ApplyAffineRegistrationd("a", "f")
    with pytest.raises(RegistrationError, match="^affine_keys: "):
        ApplyAffineRegistrationd("a", "f", affine_keys="m", affine=np.eye(4))
    with pytest.raises(RegistrationError, match="^affine_keys: "):
        ApplyAffineRegistrationd(["a", "b", "c"], "f", affine_keys=["m", "n"])


# ---------------------------------------------------------------------------------------------------- real registration


@pytest.fixture
def real_item(load_slice) -> dict:
    """A coarse T1 slice, and the same slice turned and shifted, with a header that does not tell."""
    source = load_slice(modality="t1")
    affine = torch.diag(torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64))
    fixed = MetaTensor(source.as_tensor()[:, ::3, ::3].clone(), affine=affine)
    center = tuple(1.5 * n for n in fixed.shape[1:])
    truth = compose_parameters(AffineParameters((6.0, -4.0), (8.0,), (1.0, 1.0), (0.0,), center))
    moved = ApplyAffineRegistrationd("m", "f", affine=np.linalg.inv(truth))({"m": fixed, "f": fixed})["m"].as_tensor()
    moving = MetaTensor(moved, affine=affine, meta={"filename_or_obj": "/scans/m.nii.gz"})
    labels = MetaTensor((moved > moved.mean()).to(torch.uint8), affine=affine)
    return {"fixed": fixed, "moving": moving, "labels": labels, "truth": truth}


def error_px(affine, item: dict) -> float:
    points = np.argwhere(item["fixed"][0].numpy() > item["fixed"].mean().item()) @ item["fixed"].affine[:2, :2].numpy()
    gap = np.asarray(affine) - item["truth"]
    return float(np.linalg.norm(points @ gap[:2, :2].T + gap[:2, 2], axis=1).mean())


@pytest.mark.parametrize("lazy", [False, True])
def test_registers_a_real_pair_with_what_follows(real_item: dict, lazy: bool, tmp_path: Path) -> None:
    register = RegisterAffined("moving", "fixed", followers={"labels": "moving"})
    moved = Compose([register, SaveAffined("moving", tmp_path)], lazy=lazy)(real_item)
    affine = moved["affine_moving"]
    assert affine.dtype == torch.float64 and affine.shape == (3, 3)
    assert error_px(affine, real_item) < 0.3 * error_px(np.eye(3), real_item)
    assert torch.equal(affine, moved["moving"].meta["registration_affine"])
    np.testing.assert_allclose(read_transform(tmp_path / "m" / "m_affine.tfm", format="itk"), affine.numpy(), atol=1e-9)
    assert moved["moving"].meta["registration_verdict"] in ("PASS", "WARN")
    assert isinstance(moved["moving"].meta["registration_reasons"], str)
    expected = ApplyAffineRegistrationd("labels", "fixed", affine=affine, mode="nearest")(real_item)["labels"]
    assert torch.equal(moved["labels"].as_tensor().to(torch.uint8), expected.as_tensor())
    # whatever a batch may hold
    batch = next(iter(DataLoader(Dataset([moved, moved]), batch_size=2)))
    assert batch["affine_moving"].shape == (2, 3, 3)
    back = register.inverse(decollate_batch(batch)[0])
    for key in ("moving", "labels"):
        assert torch.equal(back[key].affine, real_item[key].affine)
        assert back[key].shape == real_item[key].shape
        assert "registration_affine" not in back[key].meta
    for name in (VERDICT_KEY, REASONS_KEY):
        assert back["moving"].meta[name] == moved["moving"].meta[name]


def test_same_result_twice_and_after_pickling(real_item: dict) -> None:
    register = RegisterAffined("moving", "fixed")
    set_determinism(3)
    first = register(real_item)["affine_moving"]
    set_determinism(4)
    second = pickle.loads(pickle.dumps(register))(real_item)["affine_moving"]
    set_determinism(None)
    assert torch.equal(first, second)


def test_lazy_registration_joins_the_interpolation(real_item: dict, itk_resample) -> None:
    register = RegisterAffined("moving", "fixed")
    chain = Compose([Spacingd(["fixed", "moving"], (1.5, 1.5), padding_mode="zeros"), register], lazy=True)
    moved = chain(real_item)
    once = itk_resample(real_item["moving"], moved["moving"], moved["affine_moving"].numpy())
    inner = (slice(None), slice(5, -5), slice(5, -5))
    np.testing.assert_allclose(moved["moving"].numpy()[inner], once[inner], atol=2e-3 * once.max())
    back = chain.inverse(moved)["moving"]
    torch.testing.assert_close(back.affine, real_item["moving"].affine, atol=1e-9, rtol=0)
    assert back.meta[VERDICT_KEY] == moved["moving"].meta[VERDICT_KEY]


def test_a_failed_registration(real_item: dict) -> None:
    noise = torch.rand(real_item["moving"].shape, generator=torch.Generator().manual_seed(0))
    item = real_item | {"moving": MetaTensor(noise, affine=real_item["moving"].affine)}
    with pytest.raises(RegistrationFailure, match="registration of .* failed: .*on_failure='warn'"):
        RegisterAffined("moving", "fixed")(item)
    transform = RegisterAffined("moving", "fixed", on_failure="warn")
    with pytest.warns(RegistrationWarning, match="failed"):
        moved = transform(item)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegistrationWarning)
        RegisterAffined("moving", "fixed", on_failure="ignore")(item)
    for image in (moved["moving"], transform.inverse(moved)["moving"]):
        assert image.meta["registration_verdict"] == "FAIL"
        assert image.meta["registration_reasons"]
    # the best matrix that was found, whatever it is
    assert moved["affine_moving"].shape == (3, 3) and torch.isfinite(moved["affine_moving"]).all()


def test_silence_is_not_the_whole_process(real_item: dict) -> None:
    """Warnings are filtered for all threads at once, so a transform that is silent must not filter them."""
    before, seen = list(warnings.filters), []
    noise = torch.rand(real_item["moving"].shape, generator=torch.Generator().manual_seed(0))
    item = real_item | {"moving": MetaTensor(noise, affine=real_item["moving"].affine)}
    worker = threading.Thread(target=RegisterAffined("moving", "fixed", on_failure="ignore"), args=(item,))
    worker.start()
    while worker.is_alive():
        seen += [entry for entry in warnings.filters if entry not in before and entry[2] is RegistrationWarning]
        worker.join(0.001)
    assert not seen


def test_moved_header_alone_is_the_registration(known_pair, itk_resample) -> None:
    """The header edit needs no resampling: ITK, told nothing but the new header, puts the voxels in the same place."""
    edited = MetaTensor(
        known_pair.moving.as_tensor(), affine=moved_header(known_pair.moving.affine, torch.as_tensor(known_pair.affine))
    )
    expected = itk_resample(edited, known_pair.fixed, np.eye(known_pair.fixed.ndim))
    moved = apply_known()(as_item(known_pair))["moving"]
    np.testing.assert_allclose(moved.numpy(), expected, atol=1e-3)
