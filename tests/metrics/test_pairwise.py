# SPDX-License-Identifier: Apache-2.0
"""The similarity measures as MONAI metrics."""

from __future__ import annotations

import pytest
import torch
from monai.metrics import MSEMetric, RMSEMetric, SSIMMetric

from monai_zsreg.errors import RegistrationError
from monai_zsreg.metrics import SimilarityMetric, foreground_mask, similarity
from monai_zsreg.metrics.similarity import MEASURES


def images(count: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    out = torch.rand(count, 1, *shape, generator=torch.Generator().manual_seed(seed))
    out[:, :, : shape[0] // 3] *= 0.1
    return out


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("region", ["foreground", "image"])
def test_value_of_each_pair_is_that_of_the_function(name: str, region: str) -> None:
    metric = SimilarityMetric(name, region)
    moved = [images(1, (20, 24))[0], images(1, (16, 14, 12))[0]]
    fixed = [images(1, (20, 24), 5)[0], images(1, (16, 14, 12), 6)[0]]
    rows = metric(moved, fixed)
    expected = [similarity(f, m, region)[name] for f, m in zip(fixed, moved, strict=True)]
    assert rows.shape == (2, 1)
    assert rows[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    metric(moved[:1], fixed[:1])
    assert float(metric.aggregate()) == pytest.approx((2 * expected[0] + expected[1]) / 3, rel=1e-6)
    metric.reset()
    metric(moved[1:], fixed[1:])
    assert float(metric.aggregate()) == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize(
    "ours, monais",
    [
        ("mse", MSEMetric()),
        ("rmse", RMSEMetric()),
        ("ssim", SSIMMetric(spatial_dims=2)),
    ],
)
def test_unscaled_whole_images_give_monais_values(ours: str, monais) -> None:
    moved, fixed = images(3, (20, 24)), images(3, (20, 24), 9)
    assert torch.allclose(SimilarityMetric(ours, "image", scale=False)(moved, fixed), monais(moved, fixed), atol=1e-6)


def test_number_of_bins() -> None:
    moved, fixed = images(1, (40, 40)), images(1, (40, 40), 3)
    few, many = (float(SimilarityMetric("mi", "image", bins=bins)(moved, fixed)) for bins in (4, 64))
    # a count overestimates by about (bins - 1)^2 / (2 voxels)
    assert few < 0.5 * many
    assert many == pytest.approx(similarity(fixed[0], moved[0], "image")["mi"], rel=1e-6)


def test_masks_are_passed_in_the_order_of_their_names() -> None:
    moved, fixed = images(2, (20, 20)), images(2, (20, 20), 4)
    half, most = torch.zeros(2, 1, 20, 20), torch.zeros(2, 1, 20, 20)
    half[..., :10], most[..., 5:] = 1, 1
    dice = SimilarityMetric("dice")(moved, fixed, moving_mask=half, fixed_mask=most)
    assert dice[:, 0].tolist() == pytest.approx([2 * 5 / (10 + 15)] * 2)
    mse = SimilarityMetric("mse")(list(moved), list(fixed), moving_mask=list(half), fixed_mask=list(half))
    expected = [
        similarity(f, m, fixed_mask=h, moving_mask=h)["mse"] for f, m, h in zip(fixed, moved, half, strict=True)
    ]
    assert mse[:, 0].tolist() == pytest.approx(expected)


def test_one_mask_alone_belongs_to_its_image() -> None:
    moved, fixed = images(1, (20, 20)), images(1, (20, 20), 4)
    half = torch.zeros(1, 1, 20, 20)
    half[..., :10] = 1
    for name in ("moving_mask", "fixed_mask"):
        dice = SimilarityMetric("dice")(moved, fixed, **{name: half})
        assert float(dice) == pytest.approx(similarity(fixed[0], moved[0], **{name: half[0]})["dice"])
        seen = foreground_mask((fixed if name == "moving_mask" else moved)[0])
        both = float((seen & (half[0] > 0)).sum())
        assert float(dice) == pytest.approx(2 * both / float(seen.sum() + half.sum()))
    with pytest.raises(TypeError, match="mask_moving"):
        SimilarityMetric("dice")(moved, fixed, mask_moving=half)


def test_user_errors() -> None:
    moved, fixed = images(2, (20, 20)), images(2, (20, 20), 4)
    with pytest.raises(RegistrationError, match="region"):
        SimilarityMetric("mse", region="brain")
    with pytest.raises(RegistrationError, match="^measure: "):
        SimilarityMetric("ncc")
    with pytest.raises(RegistrationError, match="y:"):
        SimilarityMetric("mse")(list(moved), list(fixed[:1]))
    with pytest.raises(RegistrationError, match="^moving_mask: "):
        SimilarityMetric("mse")(moved, fixed, moving_mask=fixed[:1])
