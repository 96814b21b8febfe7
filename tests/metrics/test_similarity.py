# SPDX-License-Identifier: Apache-2.0
"""Similarity measures against scikit-image, scikit-learn, MONAI and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.metrics import compute_ssim_and_cs
from skimage.metrics import structural_similarity as skimage_ssim
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.metrics import (
    foreground_mask,
    label_dice,
    mutual_information,
    scale_intensity,
    similarity,
    structural_similarity,
)


def blob_pair(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright ellipsoid on a dark ground, and another contrast of it, off by a little."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    images = []
    for shift, sign in ((0.0, 1.0), (0.1, -1.0)):
        radius = np.sqrt(sum((a - shift) ** 2 for a in axes))
        texture = np.sin(7 * axes[0]) * np.cos(5 * axes[-1])
        image = np.where(radius < 0.6, 100 + sign * 30 * texture, 5) + rng.normal(0, 2, shape)
        images.append(torch.tensor(image[None], dtype=torch.float32))
    return images[0], images[1]


# ---------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("shape", [(64, 48), (24, 20, 18)])
def test_every_measure_over_the_foreground_against_other_implementations(shape: tuple[int, ...]) -> None:
    fixed, moving = blob_pair(shape)
    got = similarity(fixed, moving)

    scaled = []
    for image in (fixed, moving):
        low, high = np.percentile(image.numpy(), [0.5, 99.5])
        scaled.append(np.clip((image.numpy()[0] - low) / (high - low), 0, 1).astype(np.float32))
    masks = [foreground_mask(image)[0].numpy() for image in (fixed, moving)]
    assert all(0.05 < mask.mean() < 0.6 for mask in masks)
    union = masks[0] | masks[1]

    assert got["dice"] == pytest.approx(2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()), abs=1e-6)
    assert got["mse"] == pytest.approx(((scaled[0] - scaled[1])[union] ** 2).mean(), rel=1e-4)
    assert got["rmse"] == pytest.approx(got["mse"] ** 0.5)
    bins = [np.clip(np.floor(image * 64), 0, 63).astype(int)[union] for image in scaled]
    assert got["mi"] == pytest.approx(mutual_info_score(*bins), abs=1e-3)
    assert got["nmi"] == pytest.approx(normalized_mutual_info_score(*bins), abs=1e-3)
    full = skimage_ssim(
        *scaled, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )[1]
    inner = (slice(5, -5),) * len(shape)
    assert got["ssim"] == pytest.approx(full[inner][union[inner]].mean(), abs=1e-4)


@pytest.mark.parametrize("shape", [(64, 48), (24, 20, 18)])
def test_every_measure_over_the_whole_image(shape: tuple[int, ...]) -> None:
    fixed, moving = (scale_intensity(image) for image in blob_pair(shape))
    got = similarity(fixed, moving, region="image", scale=False)
    assert got["mse"] == pytest.approx(float(((fixed - moving) ** 2).mean()), rel=1e-5)
    bins = [np.clip(np.floor(image.numpy() * 64), 0, 63).astype(int).ravel() for image in (fixed, moving)]
    assert got["mi"] == pytest.approx(mutual_info_score(*bins), abs=1e-6)
    expected = skimage_ssim(
        fixed[0].numpy(), moving[0].numpy(), data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert got["ssim"] == pytest.approx(expected, abs=1e-5)
    assert got["dice"] == similarity(fixed, moving, scale=False)["dice"]


@pytest.mark.parametrize(
    "shape, window", [((12, 40), (11, 11)), ((10, 40), (9, 11)), ((30, 20, 5), (11, 11, 5)), ((4, 1, 2), (3, 1, 1))]
)
def test_ssim_shrinks_its_window_to_short_axes(shape: tuple[int, ...], window: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, *shape, generator=rng), torch.rand(2, *shape, generator=rng)
    sigma = (1.5,) * len(shape)
    expected = compute_ssim_and_cs(x[None], y[None], len(shape), window, sigma)[0].mean()
    # single precision: over three voxels either side is up to 1e-5 from the value in double precision
    assert structural_similarity(x, y) == pytest.approx(float(expected), abs=2e-5)


def test_ssim_without_a_window_in_the_mask_uses_all_windows() -> None:
    x, y = torch.rand(1, 20, 20), torch.rand(1, 20, 20)
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[0, 0] = True
    assert structural_similarity(x, y, mask) == structural_similarity(x, y)


def test_identical_images() -> None:
    image = blob_pair((40, 40))[0]
    got = similarity(image, image)
    assert got["dice"] == 1 and got["ssim"] == pytest.approx(1, abs=1e-6) and got["mse"] == 0 and got["rmse"] == 0
    assert got["nmi"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("region", ["foreground", "image"])
@pytest.mark.parametrize("blank", ["fixed", "moving", "both"])
def test_constant_images_give_zero_information_and_no_nan(region: str, blank: str) -> None:
    constant = torch.full((1, 30, 30), 7.0)
    textured = blob_pair((30, 30))[0]
    fixed = textured if blank == "moving" else constant
    moving = textured if blank == "fixed" else constant
    got = similarity(fixed, moving, region=region)
    assert np.isfinite(list(got.values())).all()
    assert got["mi"] == 0 and got["nmi"] == 0
    assert got["dice"] == (1 if blank == "both" else 0)


def test_masks_replace_the_foreground_and_define_the_region() -> None:
    fixed, moving = blob_pair((32, 32))
    one, two = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
    one[:, 4:20, 4:20] = 3  # a label, not only 1
    two[:, 12:28, 4:20] = 1
    got = similarity(fixed, moving, fixed_mask=one, moving_mask=two, scale=False)
    assert got["dice"] == pytest.approx(2 * 8 * 16 / (256 + 256))
    union = (one + two > 0)[0]
    assert got["mse"] == pytest.approx(float(((fixed - moving)[0, union] ** 2).mean()), rel=1e-5)


def test_channels_are_compared_one_by_one() -> None:
    a, b = blob_pair((30, 30), 0)
    c, d = blob_pair((30, 30), 1)
    got = similarity(torch.cat([a, c]), torch.cat([b, d]), region="image")
    single = [similarity(x, y, region="image") for x, y in ((a, b), (c, d))]
    for name in ("ssim", "mi", "nmi", "mse"):
        assert got[name] == pytest.approx(np.mean([s[name] for s in single]), rel=1e-5)


def test_autocast_changes_nothing() -> None:
    fixed, moving = blob_pair((32, 32))
    plain = similarity(fixed, moving)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert similarity(fixed, moving) == plain


def test_devices_agree(device: torch.device) -> None:
    fixed, moving = blob_pair((40, 36, 30))
    here, there = similarity(fixed, moving), similarity(fixed.to(device), moving.to(device))
    for name, value in here.items():
        assert there[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_numpy_and_integers_are_taken() -> None:
    fixed, moving = (image.round().to(torch.int16) for image in blob_pair((30, 30)))
    assert similarity(fixed.numpy(), moving.numpy()) == similarity(fixed.float(), moving.float())


def test_user_errors_name_the_argument() -> None:
    fixed, moving = blob_pair((30, 30))
    with pytest.raises(RegistrationError, match="resample") as caught:
        similarity(fixed, moving[:, :20])
    assert caught.value.argument == "moving"
    for kwargs, name in (({"region": "brain"}, "region"), ({"fixed_mask": fixed[:, :5]}, "fixed_mask")):
        with pytest.raises(RegistrationError) as caught:
            similarity(fixed, moving, **kwargs)
        assert caught.value.argument == name
    with pytest.raises(RegistrationError, match="^measures: got .'ncc'"):
        similarity(fixed, moving, measures=("mi", "ncc"))
    with pytest.raises(RegistrationError, match="finite"):
        similarity(fixed, moving * float("nan"))
    with pytest.raises(RegistrationError, match="bins"):
        mutual_information(fixed, fixed, bins=1)


def test_what_was_not_seen_does_not_count() -> None:
    fixed, moving = blob_pair((32, 32))
    hidden, patched = moving.clone(), moving.clone()
    hidden[:, :, 20:], patched[:, :, 20:] = float("nan"), 0
    hidden[:, 0, 0] = float("inf")
    seen = torch.ones(1, 32, 32)
    seen[:, :, 20:] = seen[:, 0, 0] = 0
    for region in ("foreground", "image"):
        got = similarity(fixed, hidden, region=region, scale=False)
        assert np.isfinite(list(got.values())).all()
        where = (
            seen[0] > 0 if region == "image" else (foreground_mask(fixed) | foreground_mask(patched))[0] & (seen[0] > 0)
        )
        assert got["mse"] == pytest.approx(float(((fixed - moving)[:, where] ** 2).mean()), rel=0.02)


def test_only_what_is_asked_for() -> None:
    fixed, moving = blob_pair((30, 30))
    whole = similarity(fixed, moving)
    assert similarity(fixed, moving, measures=("rmse", "nmi")) == {name: whole[name] for name in ("rmse", "nmi")}


def test_dice_of_labels() -> None:
    fixed, moved = torch.zeros(1, 4, 6, dtype=torch.int64), torch.zeros(1, 4, 6, dtype=torch.int64)
    fixed[0, 0, :4], fixed[0, 1, :4] = 614454277, 7
    moved[0, 0, 2:6] = 614454277
    # half of the first label's voxels, none of the second's; a third one is not in the fixed image
    moved[0, 3] = 9
    assert label_dice(fixed, moved) == pytest.approx((0.5 + 0.0) / 2)
    assert label_dice(fixed, fixed) == 1.0
    with pytest.raises(RegistrationError, match="^fixed: got 'only zeros'"):
        label_dice(fixed * 0, moved)
    with pytest.raises(RegistrationError, match="^moved: "):
        label_dice(fixed, moved[:, 1:])


def test_different_affines_warn() -> None:
    fixed, moving = blob_pair((30, 30))
    shifted = torch.eye(3, dtype=torch.float64)
    shifted[0, 2] = 5
    with pytest.warns(RegistrationWarning, match="resample"):
        similarity(MetaTensor(fixed), MetaTensor(moving, affine=shifted))


# ---------------------------------------------------------------------------------------------------- laws


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(20, 33), (14, 12, 16)]))
def test_exchange_of_the_images_changes_nothing(seed: int, shape: tuple[int, ...]) -> None:
    fixed, moving = blob_pair(shape, seed)
    forward, backward = similarity(fixed, moving), similarity(moving, fixed)
    for name, value in forward.items():
        assert backward[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), gain=st.floats(0.01, 100), offset=st.floats(-500, 500))
def test_linear_intensity_changes_do_not_matter(seed: int, gain: float, offset: float) -> None:
    fixed, moving = (image.double() for image in blob_pair((24, 28), seed))
    plain, changed = similarity(fixed, moving), similarity(fixed, gain * moving + offset)
    for name, value in plain.items():
        # rounding may carry a voxel over the edge of a bin
        assert changed[name] == pytest.approx(value, abs=0.02 if name in ("mi", "nmi", "dice") else 1e-4), name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bins=st.integers(2, 80))
def test_information_stays_in_its_bounds(seed: int, bins: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.rand(1, 25, 17, generator=rng), torch.rand(1, 25, 17, generator=rng)
    mi, nmi = mutual_information(a, b, bins=bins)
    assert 0 <= mi <= np.log(bins) and 0 <= nmi <= 1
    own, one = mutual_information(a, a, bins=bins)
    assert mi <= own + 1e-12 and one == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------- real images


@pytest.mark.parametrize("modality", ["t2", "flair"])
def test_slices_alike_by_contrast_and_by_alignment(load_slice, modality: str) -> None:
    fixed, moving = load_slice(modality="t1"), load_slice(modality=modality)
    aligned = similarity(fixed, moving)
    shifted = similarity(fixed, torch.roll(moving.as_tensor(), 12, dims=1))
    for name in ("mi", "nmi", "dice"):
        assert aligned[name] > shifted[name], name
    # T2 is close to the negative of T1: there SSIM prefers the wrong place, as the docstring warns
    assert (aligned["ssim"] > shifted["ssim"]) == (modality != "t2")
