# SPDX-License-Identifier: Apache-2.0
"""Array transforms with a known matrix, judged by ITK, and the real registration on real slices."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate, set_track_meta
from monai.transforms import Compose, RandAffine, SpatialPad

from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.io import read_transform, write_transform
from monai_zsreg.transforms import ApplyAffineRegistration, RegisterAffine, SaveAffine
from monai_zsreg.transforms.array import evaluate_pending


def assert_same_header(first: MetaTensor, second: MetaTensor) -> None:
    assert torch.equal(first.affine, second.affine)
    assert first.affine.dtype == second.affine.dtype
    assert first.meta.keys() == second.meta.keys()
    for key, value in first.meta.items():
        assert type(value) is type(second.meta[key]), key
        np.testing.assert_array_equal(np.asarray(value), np.asarray(second.meta[key]), err_msg=key)


def snapshot(image: MetaTensor) -> MetaTensor:
    """A copy with metadata of its own; ``deepcopy`` of a MetaTensor shares the arrays in them."""
    return MetaTensor(image.as_tensor().clone(), meta=deepcopy(image.meta))


def test_moves_as_itk_does(known_pair, itk_resample) -> None:
    moved = ApplyAffineRegistration()(known_pair.moving, known_pair.affine, known_pair.fixed)
    expected = itk_resample(known_pair.moving, known_pair.fixed, known_pair.affine)
    assert (expected > 0.1).mean() > 0.2
    np.testing.assert_allclose(moved.numpy(), expected, atol=1e-3)


def test_moves_labels_as_itk_does_and_keeps_their_type(known_pair, itk_resample) -> None:
    moved = ApplyAffineRegistration(mode="nearest")(known_pair.labels, known_pair.affine, known_pair.fixed)
    expected = itk_resample(known_pair.labels, known_pair.fixed, known_pair.affine, nearest=True)
    assert moved.dtype == torch.int16
    np.testing.assert_array_equal(moved.numpy(), expected)
    assert len(np.unique(expected)) > 4


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_nearest_keeps_whole_number_types(known_pair, dtype: torch.dtype) -> None:
    moved = ApplyAffineRegistration(mode="nearest")(known_pair.labels.to(dtype), known_pair.affine, known_pair.fixed)
    assert moved.dtype == dtype
    assert set(moved.unique().tolist()) <= set(known_pair.labels.to(dtype).unique().tolist())


def test_header_comes_from_fixed_and_name_from_moving(known_pair) -> None:
    before = snapshot(known_pair.moving), snapshot(known_pair.fixed)
    moved = ApplyAffineRegistration()(known_pair.moving, known_pair.affine, known_pair.fixed)
    assert torch.equal(moved.affine, known_pair.fixed.affine)
    assert moved.affine is not known_pair.fixed.affine
    assert moved.shape[1:] == known_pair.fixed.shape[1:]
    assert moved.meta["filename_or_obj"] == known_pair.moving.meta["filename_or_obj"]
    assert torch.equal(moved.meta["original_affine"], known_pair.fixed.meta["original_affine"])
    np.testing.assert_array_equal(moved.meta["registration_affine"].numpy(), known_pair.affine)
    # neither input changed, not even through arrays that their metadata share
    for old, new in zip(before, (known_pair.moving, known_pair.fixed), strict=True):
        assert torch.equal(old.as_tensor(), new.as_tensor())
        assert_same_header(new, old)
        assert not new.applied_operations


def test_inverse_restores_grid_header_and_voxels_as_itk_does(known_pair, itk_resample) -> None:
    transform = ApplyAffineRegistration()
    moved = transform(known_pair.moving, known_pair.affine, known_pair.fixed)
    expected = itk_resample(moved, known_pair.moving, np.linalg.inv(known_pair.affine))
    back = transform.inverse(moved)
    assert back.shape == known_pair.moving.shape
    assert_same_header(back, known_pair.moving)
    assert not back.applied_operations
    # inside: a rim of the fixed grid mixes with what lies outside, where ITK repeats the last voxel
    inside = itk_resample(eroded(known_pair.fixed), known_pair.moving, np.linalg.inv(known_pair.affine))[:1] == 1
    assert inside.mean() > 0.1
    inside = np.repeat(inside, 2, axis=0)
    np.testing.assert_allclose(back.numpy()[inside], expected[inside], atol=1e-3)


def eroded(image: MetaTensor) -> MetaTensor:
    """Ones on the grid of ``image`` but for its rim."""
    ones = torch.zeros_like(image.as_tensor()[:1])
    ones[(slice(None),) + (slice(2, -2),) * (image.ndim - 1)] = 1.0
    return MetaTensor(ones, affine=image.affine.clone())


def test_inverse_does_not_depend_on_what_became_of_the_image(known_pair) -> None:
    transform = ApplyAffineRegistration()
    before = snapshot(known_pair.moving)
    moved = transform(known_pair.moving, known_pair.affine, known_pair.fixed)
    known_pair.moving.meta["pixdim"][1:4] = 9.0  # in place, as MONAI's Spacing does
    moved.meta["pixdim"][1:4] = 9.0
    assert_same_header(transform.inverse(moved), before)
    assert known_pair.fixed.meta["pixdim"][1] == 1.0


def test_inverse_is_eager_where_the_object_is_lazy(known_pair) -> None:
    transform = ApplyAffineRegistration(lazy=True)
    moved = evaluate_pending(transform(known_pair.moving, known_pair.affine, known_pair.fixed))
    back = transform.inverse(moved)
    assert back.shape == known_pair.moving.shape
    assert not back.pending_operations
    assert_same_header(back, known_pair.moving)


def test_two_registrations_compose_and_invert(known_pair) -> None:
    """Moving to fixed and on to the moving image's own grid by the inverse: the identity, away from the border."""
    there, back = ApplyAffineRegistration(), ApplyAffineRegistration()
    moved = there(known_pair.moving, known_pair.affine, known_pair.fixed)
    returned = back(moved, np.linalg.inv(known_pair.affine), known_pair.moving)
    assert torch.equal(returned.affine, known_pair.moving.affine)
    assert [op["class"] for op in returned.applied_operations] == ["ApplyAffineRegistration"] * 2
    again = there.inverse(back.inverse(returned))
    assert_same_header(again, known_pair.moving)


@pytest.mark.parametrize("lazy", [False, True])
def test_affine_of_rank_three_in_2d(pair_of, itk_resample, lazy: bool) -> None:
    pair = pair_of(2, header_rank=3)
    transform = ApplyAffineRegistration()
    moved = evaluate_pending(transform(pair.moving, pair.affine, pair.fixed, lazy=lazy))
    np.testing.assert_allclose(moved.numpy(), itk_resample(pair.moving, pair.fixed, pair.affine), atol=1e-3)
    assert_same_header(transform.inverse(moved), pair.moving)


def test_lazy_equals_eager(known_pair) -> None:
    transform = ApplyAffineRegistration()
    eager = transform(known_pair.moving, known_pair.affine, known_pair.fixed)
    pending = transform(known_pair.moving, known_pair.affine, known_pair.fixed, lazy=True)
    assert len(pending.pending_operations) == 1
    assert torch.equal(pending.as_tensor(), known_pair.moving.as_tensor())
    assert pending.peek_pending_shape() == tuple(known_pair.fixed.shape[1:])
    torch.testing.assert_close(pending.peek_pending_affine(), known_pair.fixed.affine, atol=1e-9, rtol=0)
    lazy = evaluate_pending(pending)
    torch.testing.assert_close(lazy.as_tensor(), eager.as_tensor(), atol=1e-5, rtol=0)
    torch.testing.assert_close(lazy.affine, eager.affine, atol=1e-9, rtol=0)
    assert lazy.meta.keys() == eager.meta.keys()


def test_eager_call_carries_out_what_is_pending_first(known_pair) -> None:
    pad = SpatialPad([50] * (known_pair.moving.ndim - 1), lazy=True)
    transform = ApplyAffineRegistration()
    pending = pad(known_pair.moving)
    moved = transform(pending, known_pair.affine, known_pair.fixed)
    expected = transform(known_pair.moving, known_pair.affine, known_pair.fixed)
    torch.testing.assert_close(moved.as_tensor(), expected.as_tensor(), atol=1e-5, rtol=0)
    assert len(pending.pending_operations) == 1
    back = transform.inverse(moved)
    assert tuple(back.shape[1:]) == (50,) * (known_pair.moving.ndim - 1)


def test_fill_value_lies_outside_only(known_pair) -> None:
    transform = ApplyAffineRegistration(fill_value=-1024.0)
    moved = transform(known_pair.moving, known_pair.affine, known_pair.fixed)
    plain = ApplyAffineRegistration()(known_pair.moving, known_pair.affine, known_pair.fixed)
    ones = known_pair.moving * 0 + 1
    inside = ApplyAffineRegistration(fill_value=0)(ones, known_pair.affine, known_pair.fixed)
    covered, empty = inside.as_tensor() > 1 - 1e-6, inside.as_tensor() == 0
    assert covered.any() and empty.any()
    torch.testing.assert_close(moved.as_tensor()[covered], plain.as_tensor()[covered], atol=1e-3, rtol=0)
    assert (moved.as_tensor()[empty] == -1024).all()
    # lazily asked for, it is still there
    lazy = evaluate_pending(transform(known_pair.moving, known_pair.affine, known_pair.fixed, lazy=True))
    torch.testing.assert_close(lazy.as_tensor(), moved.as_tensor(), atol=1e-3, rtol=0)
    assert_same_header(transform.inverse(moved), known_pair.moving)


@pytest.mark.parametrize("lazy", [False, True])
def test_outside_lies_the_background_unless_told_otherwise(known_pair, lazy: bool) -> None:
    """CT: -1024 outside, also where execution is lazy, and whole numbers stay what they are."""
    values = (known_pair.moving.as_tensor() * 1000).to(torch.int16) - 1024
    scan = MetaTensor(values, affine=known_pair.moving.affine)
    away = known_pair.affine.copy()
    away[:-1, -1] += 7
    transform = ApplyAffineRegistration(lazy=lazy)
    moved = transform(scan, away, known_pair.fixed)
    assert moved.dtype == torch.int16 and not moved.pending_operations
    plain = ApplyAffineRegistration(fill_value=0)(scan.float() + 1024, away, known_pair.fixed) - 1024
    assert (moved == -1024).float().mean() > 0.2 and (moved > -500).any()
    assert float((moved - plain).abs().max()) < 0.51
    back = transform.inverse(moved)
    assert back.dtype == torch.int16 and int(back.min()) == -1024 and int(back.max()) < 1000
    zero = evaluate_pending(transform(scan, away, known_pair.fixed, fill_value=0))
    assert (zero == 0).float().mean() > 0.1
    # near 0 the background does not stand in the way of lazy execution
    pending = transform(known_pair.moving, away, known_pair.fixed)
    assert bool(pending.pending_operations) == lazy


def test_labels_beyond_single_precision_arrive_as_they_are(known_pair, itk_resample) -> None:
    labels = known_pair.labels.long() * 1_000_003 + 614454277 * (known_pair.labels > 0)
    transform = ApplyAffineRegistration(mode="nearest")
    moved = transform(labels, known_pair.affine, known_pair.fixed)
    plain = itk_resample(known_pair.labels, known_pair.fixed, known_pair.affine, nearest=True).astype(np.int64)
    np.testing.assert_array_equal(moved.numpy(), plain * 1_000_003 + 614454277 * (plain > 0))
    assert set(transform.inverse(moved).unique().tolist()) <= set(labels.unique().tolist())


@pytest.mark.parametrize(
    "options", [{"mode": 1}, {"mode": 3}, {"padding_mode": "border"}, {"mode": "bicubic"}], ids=str
)
def test_other_interpolations_and_paddings(known_pair, options: dict) -> None:
    """What MONAI or torch computes: not far from linear interpolation of a smooth image, and invertible."""
    transform = ApplyAffineRegistration(**options)
    if options == {"mode": "bicubic"} and known_pair.fixed.ndim == 4:
        with pytest.raises(RegistrationError, match="^mode: got 'bicubic'.*because the images are 3D"):
            transform(known_pair.moving, known_pair.affine, known_pair.fixed)
        return
    moved = transform(known_pair.moving, known_pair.affine, known_pair.fixed)
    linear = ApplyAffineRegistration()(known_pair.moving, known_pair.affine, known_pair.fixed)
    assert float((moved - linear).abs().mean()) < 0.03
    assert_same_header(transform.inverse(moved), known_pair.moving)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("t.tfm", "itk"),
        ("0GenericAffine.mat", "itk"),
        ("t.txt", "text"),
        ("t.json", "json"),
        ("t.mat", "fsl"),
        ("t.lta", "lta"),
    ],
)
def test_reads_the_matrix_from_a_file(known_pair, tmp_path: Path, name: str, form: str) -> None:
    images = {"fixed": known_pair.fixed, "moving": known_pair.moving}
    if form in ("fsl", "lta") and known_pair.fixed.ndim == 3:
        pytest.skip("a format for volumes")
    write_transform(tmp_path / name, known_pair.affine, **images, format=form)
    from_file = ApplyAffineRegistration()(known_pair.moving, tmp_path / name, known_pair.fixed)
    from_array = ApplyAffineRegistration()(known_pair.moving, torch.as_tensor(known_pair.affine), known_pair.fixed)
    torch.testing.assert_close(from_file.as_tensor(), from_array.as_tensor(), atol=1e-6, rtol=0)


def test_tracing_off_still_moves(known_pair) -> None:
    transform = ApplyAffineRegistration()
    expected = transform(known_pair.moving, known_pair.affine, known_pair.fixed)
    with transform.trace_transform(False):
        moved = transform(known_pair.moving, known_pair.affine, known_pair.fixed, lazy=True)
    assert torch.equal(moved.as_tensor(), expected.as_tensor())
    assert not moved.applied_operations and not moved.pending_operations


def test_results_collate_and_come_apart(pair_of) -> None:
    transform = ApplyAffineRegistration()
    pairs = [pair_of(3, seed) for seed in range(2)]
    moved = [transform(p.moving, p.affine, pairs[0].fixed) for p in pairs]
    batch = list_data_collate([{"image": m} for m in moved])["image"]
    assert batch.meta["registration_affine"].shape == (2, 4, 4)
    for item, pair in zip(decollate_batch(batch), pairs, strict=True):
        assert_same_header(transform.inverse(item), pair.moving)


def test_pickles_with_its_trace(known_pair) -> None:
    transform = ApplyAffineRegistration(fill_value=3.0, mode="nearest")
    copy = pickle.loads(pickle.dumps(transform))
    assert pickle.dumps(copy) == pickle.dumps(transform)
    moved = copy(known_pair.labels, known_pair.affine, known_pair.fixed)
    moved = pickle.loads(pickle.dumps(moved))
    assert_same_header(copy.inverse(moved), known_pair.labels)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def no_tracking():
    set_track_meta(False)
    yield
    set_track_meta(True)


def test_images_without_an_affine_lie_along_the_world_axes(known_pair) -> None:
    """What MONAI's own spatial transforms accept; the affine is the identity, which a warning says."""
    expected = ApplyAffineRegistration()(
        MetaTensor(known_pair.moving.as_tensor()), known_pair.affine, MetaTensor(known_pair.fixed.as_tensor())
    )
    for convert in (MetaTensor.as_tensor, MetaTensor.numpy):
        with pytest.warns(RegistrationWarning, match=r"(img|fixed) has no affine.* shape \(2, .*track_meta=True"):
            moved = ApplyAffineRegistration()(convert(known_pair.moving), known_pair.affine, convert(known_pair.fixed))
        assert torch.equal(moved.as_tensor(), expected.as_tensor())
    with pytest.raises(RegistrationError, match="^fixed: got 'str'"):
        ApplyAffineRegistration()(known_pair.moving, known_pair.affine, "t1.nii.gz")


def test_refuses_while_metadata_is_not_tracked(known_pair, no_tracking) -> None:
    with pytest.raises(RegistrationError, match="set_track_meta.False. has switched off"):
        ApplyAffineRegistration()(known_pair.moving, known_pair.affine, known_pair.fixed)


def test_refuses_images_that_do_not_fit(pair_of) -> None:
    flat, solid = pair_of(2), pair_of(3)
    transform = ApplyAffineRegistration()
    with pytest.raises(RegistrationError, match="^img: got '2D image.*3 spatial dimensions"):
        transform(flat.moving, flat.affine, solid.fixed)
    with pytest.raises(RegistrationError, match="^img: .*decollate_batch"):
        transform(list_data_collate([flat.moving, flat.moving]), flat.affine, flat.fixed)
    lps = deepcopy(flat.moving)
    lps.meta["space"] = "LPS"
    with pytest.raises(RegistrationError, match="^img: .*RAS"):
        transform(lps, flat.affine, flat.fixed)
    singular = MetaTensor(flat.moving.as_tensor(), affine=torch.zeros(3, 3))
    with pytest.raises(RegistrationError, match="^img.affine: "):
        transform(singular, flat.affine, flat.fixed)


@pytest.mark.parametrize(
    "affine",
    [np.eye(3), np.eye(4)[None], np.zeros((4, 4)), np.full((4, 4), np.nan), np.ones((4, 4)), [[1, 2], [3]], None],
    ids=["2d", "batched", "zero", "nan", "last row", "ragged", "none"],
)
def test_refuses_matrices(pair_of, affine) -> None:
    pair = pair_of(3)
    with pytest.raises(RegistrationError, match="^affine: "):
        ApplyAffineRegistration()(pair.moving, affine, pair.fixed)


def test_refuses_wrong_options(known_pair) -> None:
    for options in ({"mode": "linear"}, {"mode": 9}, {"mode": True}, {"padding_mode": "black"}, {"fill_value": "x"}):
        with pytest.raises(RegistrationError, match=f"^{next(iter(options))}: "):
            ApplyAffineRegistration(**options)
        with pytest.raises(RegistrationError, match=f"^{next(iter(options))}: "):
            ApplyAffineRegistration()(known_pair.moving, known_pair.affine, known_pair.fixed, **options)
    for options in (
        {"on_failure": "shrug"}, {"preset": "robst"}, {"device": "cpuu"}, {"transform": "affin"}, {"search": "locl"},
        {"seed": -1}, {"spacing": -1}, {"vgg19_weights": "nowhere.pth"},
    ):  # fmt: skip
        with pytest.raises(RegistrationError, match=f"^{next(iter(options))}: "):
            RegisterAffine(**options)
    with pytest.raises(RegistrationError, match="'rigd', expected one of 'rigid', 'similarity', 'affine'$"):
        RegisterAffine(transform="rigd")  # 'deformable' is another transform's
    with pytest.raises(RegistrationError, match="'spacng', expected one of .*seed.*did you mean 'spacing'"):
        RegisterAffine(spacng=2)


# ---------------------------------------------------------------------------------------------------------- SaveAffine


@pytest.mark.parametrize("suffix", [".tfm", ".h5"])
def test_saves_the_matrix_under_the_name_of_the_image(known_pair, tmp_path: Path, suffix: str) -> None:
    moved = ApplyAffineRegistration()(known_pair.moving, known_pair.affine, known_pair.fixed)
    # the matrix is about worlds, so what happens to the grid later does not change it
    later = Compose([SpatialPad([60] * (moved.ndim - 1)), RandAffine(prob=1.0, rotate_range=0.3)])(moved)
    assert SaveAffine(tmp_path, output_ext=suffix)(later) is later
    saved = read_transform(tmp_path / "moving0" / f"moving0_affine{suffix}", format="itk")
    np.testing.assert_allclose(saved, known_pair.affine, atol=1e-12)
    SaveAffine(tmp_path, output_postfix="to_t1", output_ext=suffix, separate_folder=False)(moved)
    assert (tmp_path / f"moving0_to_t1{suffix}").is_file()


def test_save_refuses_images_that_are_not_registered(known_pair, tmp_path: Path) -> None:
    with pytest.raises(RegistrationError, match="^img: .*registration_affine"):
        SaveAffine(tmp_path)(known_pair.moving)
    with pytest.raises(RegistrationError, match="^output_ext: "):
        SaveAffine(tmp_path, output_ext=".nii")
    moved = ApplyAffineRegistration()(known_pair.moving, known_pair.affine, known_pair.fixed)
    with pytest.raises(RegistrationError, match="decollate_batch"):
        SaveAffine(tmp_path)(list_data_collate([moved, moved]))
    assert not list(tmp_path.iterdir())
