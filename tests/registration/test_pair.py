# SPDX-License-Identifier: Apache-2.0
"""Tests of registering a pair: every kind of input, every kind of wrong input, and what a result holds."""

from __future__ import annotations

import gc
import math
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Flip
from phantoms import diagonal, error, moved_by, pooled, turn

import monai_zsreg
from monai_zsreg import Prepared, RegistrationError, RegistrationWarning, register
from monai_zsreg.geometry import Grid
from monai_zsreg.io import Image, write_transform
from monai_zsreg.registration import pair as pair_module
from monai_zsreg.registration import prepared as prepared_module
from monai_zsreg.registration import resolve_device
from monai_zsreg.registration.side import Side


@pytest.fixture(scope="module")
def pair(load_slice) -> SimpleNamespace:
    """Slices of two contrasts at 2 mm, the moving one turned by 35 degrees."""
    fixed, still = (pooled(load_slice(modality=modality), 2) for modality in ("t1", "t2"))
    truth = turn(fixed, 35.0, (6.0, 10.0))
    moving = moved_by(still, truth)
    return SimpleNamespace(fixed=fixed, moving=moving, truth=truth, result=register(fixed, moving))


def reheadered(image: MetaTensor, affine: torch.Tensor) -> MetaTensor:
    return MetaTensor(image.as_tensor(), affine=affine)


# ------------------------------------------------------------------------------------------------------ what it gives


def test_a_result_says_what_was_done(pair: SimpleNamespace) -> None:
    result = pair.result
    assert error(result.affine, pair.truth, pair.fixed) < 0.3
    assert (result.verdict, result.reasons, result.success) == ("PASS", [], True)
    assert (result.preset, result.transform, result.device) == ("robust", "affine", "cpu")
    assert result.affine.dtype == np.float64 and result.affine.shape == (3, 3)
    assert result.seconds > 0 and result.score > 0 and {"agreement", "cost", "overlap"} <= result.measures.keys()
    again = register(
        result.fixed_image, result.moving_image, preset=result.preset, transform=result.transform, **result.options
    )
    np.testing.assert_array_equal(again.affine, result.affine)


@pytest.mark.parametrize("transform", ["rigid", "affine"])
def test_the_last_row_is_exact(pair: SimpleNamespace, transform: str) -> None:
    start = pair.truth.copy()
    start[2, 0] = 1e-12  # as products of matrices leave it
    for options in ({}, {"initial": start, "search": "none"}):
        affine = register(pair.fixed, pair.moving, transform=transform, **options).affine
        assert affine[-1].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_whole_numbers_of_numpy_are_whole_numbers(pair: SimpleNamespace, kind: type) -> None:
    result = register(pair.fixed, pair.moving, seed=kind(0), fixed_channel=kind(0), moving_channel=kind(0))
    np.testing.assert_array_equal(result.affine, pair.result.affine)


def test_micrometers(load_volume) -> None:
    """Voxels of a tenth of a micrometer, in mm as everything else."""
    image = pooled(load_volume(), 6)
    tiny = diagonal(1e-4, 1e-4, 1e-4) / 6
    tiny[3, 3] = 1
    fixed, moving = (reheadered(image, tiny @ image.affine @ diagonal(*scale)) for scale in ((1, 1, 1), (1, 1, 1)))
    moving.affine[0, 3] += 20 * 1e-4
    expected = np.eye(4)
    expected[0, 3] = 20 * 1e-4
    assert error(register(fixed, moving).affine, expected, fixed) < 0.05 * 1e-4


def test_a_result_holds_the_images_and_nothing_of_the_engine(pair: SimpleNamespace) -> None:
    seen, queue, voxels = set(), [pair.result], 0
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        assert not isinstance(item, (Prepared, Side, torch.nn.Module)), type(item)
        if isinstance(item, torch.Tensor):
            voxels += item.numel()
            continue
        queue += [
            part
            for part in gc.get_referents(item)
            if type(part).__module__ != "builtins" or isinstance(part, (dict, list, tuple))
        ]
    # no pyramid, no weights: two images, and a few matrices
    assert voxels < pair.fixed.numel() + pair.moving.numel() + 1000


@pytest.mark.gpu
def test_results_keep_no_memory_of_the_device(pair: SimpleNamespace) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    register(pair.fixed, pair.moving, device="cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    results = [register(pair.fixed.cuda(), pair.moving, device="cuda") for _ in range(3)]
    gc.collect()
    assert torch.cuda.memory_allocated() <= before and len(results) == 3


# -------------------------------------------------------------------------------------------------------------- inputs


def test_paths_arrays_and_tensors_give_the_same(pair: SimpleNamespace, tmp_path) -> None:
    for name in ("fixed", "moving"):
        image = getattr(pair, name)
        header = np.diag([2.0, 2.0, 1.0, 1.0])
        header[:2, 3] = Grid.of(image).affine[:2, 2]
        nib.save(nib.Nifti1Image(image.as_tensor()[0].numpy()[..., None], header), tmp_path / f"{name}.nii.gz")
    before = sorted(tmp_path.iterdir())
    files = register(str(tmp_path / "fixed.nii.gz"), tmp_path / "moving.nii.gz")
    np.testing.assert_allclose(files.affine, pair.result.affine, atol=1e-4)
    assert sorted(tmp_path.iterdir()) == before
    # without a spacing, in pixels
    arrays = register(*[getattr(pair, name).as_tensor()[0].numpy() for name in ("fixed", "moving")])
    to_pixels = torch.linalg.inv(Grid.of(pair.fixed).affine).numpy()
    expected = to_pixels @ pair.result.affine @ np.linalg.inv(to_pixels)
    pixels = MetaTensor(pair.fixed.as_tensor(), affine=torch.eye(3))
    assert error(arrays.affine, expected, pixels) < 0.05
    tensors = register(pair.fixed.as_tensor(), pair.moving.as_tensor())
    np.testing.assert_array_equal(tensors.affine, arrays.affine)
    images = register(
        *[Image(getattr(pair, n).as_tensor(), Grid.of(getattr(pair, n)).affine) for n in ("fixed", "moving")]
    )
    np.testing.assert_array_equal(images.affine, pair.result.affine)


def test_inputs_stay_as_they_are(pair: SimpleNamespace) -> None:
    copies = [pair.fixed.clone(), pair.moving.clone()]
    register(pair.fixed, pair.moving).moved.sum()
    for image, copy in zip((pair.fixed, pair.moving), copies, strict=True):
        assert torch.equal(image.as_tensor(), copy.as_tensor()) and torch.equal(image.affine, copy.affine)
        assert image.applied_operations == copy.applied_operations


def test_one_fixed_image_for_many(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(Side):
        def __init__(self, *arguments, **options) -> None:
            made.append(arguments)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(prepared_module, "Side", Counted)
    fixed = Prepared(pair.fixed)
    for _ in range(3):
        np.testing.assert_array_equal(register(fixed, pair.moving).affine, pair.result.affine)
    assert len(made) == 4  # the fixed side once
    back = register(pair.moving, fixed).affine
    assert error(back @ pair.result.affine, np.eye(3), pair.fixed) < 0.05
    np.testing.assert_array_equal(register(fixed, Prepared(pair.moving)).affine, pair.result.affine)


def test_a_prepared_image_has_its_mask_and_channel(pair: SimpleNamespace) -> None:
    mask = (pair.fixed.as_tensor()[0] > 0.05 * pair.fixed.max()).float().numpy()
    two = MetaTensor(torch.cat([pair.fixed.as_tensor().flip(1), pair.fixed.as_tensor()]), affine=pair.fixed.affine)
    prepared = Prepared(two, channel=1, mask=mask)
    np.testing.assert_array_equal(
        register(prepared, pair.moving).affine, register(pair.fixed, pair.moving, fixed_mask=mask).affine
    )
    for name, value in (("fixed_mask", mask), ("fixed_channel", -2)):
        with pytest.raises(RegistrationError) as caught:
            register(prepared, pair.moving, **{name: value})
        assert caught.value.argument == name


def test_4d_moving_takes_one_volume_and_moves_all(pair: SimpleNamespace) -> None:
    moving = pair.moving.as_tensor()
    many = MetaTensor(torch.cat([moving.flip(1), moving, 2 * moving]), affine=pair.moving.affine)
    for channel in (1, -2):
        got = register(pair.fixed, many, moving_channel=channel)
        np.testing.assert_array_equal(got.affine, pair.result.affine)
    assert got.moved.shape == (3, *pair.fixed.shape[1:])
    torch.testing.assert_close(got.moved[1].as_tensor(), pair.result.moved[0].as_tensor())
    torch.testing.assert_close(got.moved[2].as_tensor(), 2 * got.moved[1].as_tensor())


def test_a_start_from_a_file(pair: SimpleNamespace, tmp_path) -> None:
    start = turn(pair.fixed, 30.0, (6.0, 10.0))
    write_transform(tmp_path / "start.tfm", start)
    given, read = (
        register(pair.fixed, pair.moving, initial=initial, search="none").affine
        for initial in (start, tmp_path / "start.tfm")
    )
    np.testing.assert_allclose(given, read, atol=1e-6)
    assert error(given, pair.truth, pair.fixed) < 0.3


def test_spacing_sets_the_finest_level(pair: SimpleNamespace) -> None:
    coarse = register(pair.fixed, pair.moving, spacing=4.0)
    assert coarse.measures["step"] == 4.0 and pair.result.measures["step"] == 2.0
    assert error(coarse.affine, pair.truth, pair.fixed) < 1.0


def test_device_of_the_fixed_image(pair: SimpleNamespace, device: torch.device) -> None:
    for result in (register(pair.fixed.to(device), pair.moving), register(pair.fixed, pair.moving, device=device)):
        assert isinstance(result.affine, np.ndarray) and result.device.startswith(device.type)
        assert error(result.affine, pair.result.affine, pair.fixed) < 0.02
        assert result.fixed_image.values.device.type == result.moving_image.values.device.type == "cpu"
        assert result.moved.device.type == "cpu" or result.moved.device.type == device.type


# ------------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize("name", ["fixed", "moving"])
def test_a_header_may_lie_anywhere(pair: SimpleNamespace, name: str) -> None:
    motion = torch.eye(3, dtype=torch.float64)
    motion[:2, 2] = torch.tensor([1234.5, -678.25])
    images = {"fixed": pair.fixed, "moving": pair.moving}
    images[name] = reheadered(images[name], motion @ Grid.of(images[name]).affine)
    found = register(**images).affine
    back = motion.numpy()
    back = found @ back if name == "fixed" else np.linalg.inv(back) @ found
    assert error(back, pair.result.affine, pair.fixed) < 1e-3


def test_both_headers_turned_turn_the_answer(pair: SimpleNamespace) -> None:
    angle = math.radians(20)
    motion = torch.eye(3, dtype=torch.float64)
    motion[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turned = [reheadered(image, motion @ Grid.of(image).affine) for image in (pair.fixed, pair.moving)]
    found = np.linalg.inv(motion.numpy()) @ register(*turned).affine @ motion.numpy()
    assert error(found, pair.truth, pair.fixed) < 0.3


@pytest.mark.parametrize("transform", ["rigid", "affine"])
def test_columns_of_a_header_need_no_right_angles(load_volume, transform: str) -> None:
    """Slices that a header shifts far against one another."""
    volume = pooled(load_volume(), 2, 2, 8)
    header = Grid.of(volume).affine.clone()
    header[:3, 2] = torch.tensor([30.0, 30.0, 32.0])
    fixed = reheadered(volume, header)
    truth = turn(fixed, 8.0, (0.0, 0.0, 0.0), shear=0.0)
    found = register(fixed, reheadered(volume, torch.from_numpy(truth) @ header), transform=transform)
    assert found.verdict == "PASS" and error(found.affine, truth, fixed) < 0.01


@pytest.mark.parametrize("axis", [0, 1])
def test_flipped_storage_of_one_image_does_not_matter(pair: SimpleNamespace, axis: int) -> None:
    flipped = Flip(axis)(reheadered(pair.moving, Grid.of(pair.moving).affine))
    assert Grid.of(flipped).affine[axis, axis] < 0
    assert error(register(pair.fixed, flipped).affine, pair.truth, pair.fixed) < 0.3


def test_other_size_and_spacing(pair: SimpleNamespace, load_slice) -> None:
    fine = moved_by(load_slice(modality="t2"), pair.truth)
    result = register(pair.fixed, fine)
    assert error(result.affine, pair.truth, pair.fixed) < 0.4
    assert result.resampled().grid == result.fixed_image.grid


# --------------------------------------------------------------------------------------------------------- wrong input


BAD_VALUES = {
    "fixed missing": ("fixed", {"fixed": "nowhere/a.nii.gz"}),
    "moving missing": ("moving", {"moving": "nowhere/a.nii.gz"}),
    "fixed empty": ("fixed", {"fixed": np.zeros((0, 9))}),
    "moving constant": ("moving", {"moving": torch.ones(1, 20, 20)}),
    "fixed constant": ("fixed", {"fixed": np.ones((20, 20))}),
    "nothing finite": ("moving", {"moving": torch.full((1, 20, 20), math.nan)}),
    "3D with 2D": ("moving", {"moving": np.random.default_rng(0).random((9, 9, 9))}),
    "preset": ("preset", {"preset": "best"}),
    "preset type": ("preset", {"preset": ["paper"]}),
    "transform": ("transform", {"transform": "b-spline"}),
    "device": ("device", {"device": "gpu"}),
    "device that is not there": ("device", {"device": "cuda:63"}),
    "device without numbers": ("device", {"device": "meta"}),
    "spacing": ("spacing", {"spacing": -2.0}),
    "spacing type": ("spacing", {"spacing": True}),
    "coarse spacing": ("spacing", {"spacing": 1e6}),
    "fine spacing": ("spacing", {"spacing": 1e-4}),
    "fixed channel": ("fixed_channel", {"fixed_channel": 1}),
    "moving channel": ("moving_channel", {"moving_channel": "0"}),
    "channel by truth": ("moving_channel", {"moving_channel": False}),
    "seed": ("seed", {"seed": 1.5}),
    "negative seed": ("seed", {"seed": -1}),
    "large seed": ("seed", {"seed": 2**63}),
    "weights type": ("vgg19_weights", {"vgg19_weights": 3}),
    "singular start": ("initial", {"initial": np.zeros((3, 3))}),
    "start of another size": ("initial", {"initial": np.eye(4)}),
    "start that is no file": ("initial", {"initial": "nowhere.tfm"}),
    "mask of another shape": ("fixed_mask", {"fixed_mask": np.ones((5, 5))}),
    "empty mask": ("moving_mask", {"moving_mask": np.zeros((98, 116), dtype=np.float32)}),
    "mask for a preset without": ("fixed_mask", {"preset": "keypoints", "fixed_mask": np.ones((98, 116))}),
    "unknown option": ("options", {"no_such_thing": 1}),
    "search": ("search", {"search": "everywhere"}),
}


@pytest.mark.parametrize("case", list(BAD_VALUES))
def test_wrong_input_names_the_argument(pair: SimpleNamespace, tmp_path, monkeypatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    argument, changes = BAD_VALUES[case]
    with pytest.raises(RegistrationError) as caught:
        register(**{"fixed": pair.fixed, "moving": pair.moving} | changes)
    assert caught.value.argument.split(".")[0] in (argument, "path") and caught.value.allowed
    assert str(caught.value).startswith(f"{caught.value.argument}: got ")
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_is_nearly_right_is_suggested(pair: SimpleNamespace) -> None:
    with pytest.raises(RegistrationError, match="did you mean 'rotations'"):
        register(pair.fixed, pair.moving, rotation=40)


def test_noise_warns_and_the_matrix_is_still_the_best_found(pair: SimpleNamespace) -> None:
    noise = torch.rand(pair.fixed.shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RegistrationWarning, match="registration failed") as caught:
        result = register(pair.fixed, MetaTensor(noise, affine=pair.fixed.affine))
    assert caught[0].filename == __file__  # the caller's line
    assert result.verdict == "FAIL" and result.reasons and np.linalg.det(result.affine) > 0
    assert all(reason in str(caught[0].message) for reason in result.reasons)


def test_a_device_without_memory_says_what_to_set(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(pair_module, "find", full)
    with pytest.raises(torch.OutOfMemoryError, match="too little free memory.*spacing.*cpu"):
        register(pair.fixed, pair.moving)


def test_resolve_device() -> None:
    assert resolve_device(None).type == "cpu" and resolve_device("cpu", "cuda").type == "cpu"
    for wrong in ("nope", 1.5, "meta", "cuda:99"):
        with pytest.raises(RegistrationError) as caught:
            resolve_device(wrong)
        assert caught.value.argument == "device"


def test_public_names() -> None:
    assert all(hasattr(monai_zsreg, name) for name in monai_zsreg.__all__)
    assert set(monai_zsreg.__all__) <= set(dir(monai_zsreg))
    with pytest.raises(AttributeError, match="no attribute 'regster'"):
        monai_zsreg.regster  # noqa: B018
