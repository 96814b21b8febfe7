# SPDX-License-Identifier: Apache-2.0
"""Resampling against scipy's and torch's own; what must hold of labels, types, edges and voxels that were not seen."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from monai_zsreg import resample as module
from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import AffineParameters, Grid, compose_parameters
from monai_zsreg.resample import outside_value, resample

SHAPES = {2: ((41, 53), (37, 60)), 3: ((29, 35, 23), (31, 22, 27))}


def grid(shape: tuple[int, ...], affine: np.ndarray | None = None) -> Grid:
    return Grid(shape, torch.eye(len(shape) + 1, dtype=torch.float64) if affine is None else torch.as_tensor(affine))


def turn(dims: int, zoom: float = 1.0) -> np.ndarray:
    """Rotation, scale, shear and shift about the middle of the grids above."""
    if dims == 2:
        parameters = AffineParameters((3.3, -2.2), (25.0,), (1.1 * zoom, 0.9 * zoom), (0.1,), (20.0, 26.0))
    else:
        angles, shear = (20.0, -15.0, 30.0), (0.1, -0.05, 0.02)
        parameters = AffineParameters(
            (1.5, -2.2, 0.7), angles, tuple(zoom * s for s in (1.1, 0.9, 1.05)), shear, (14.0, 17.0, 11.0)
        )
    return compose_parameters(parameters)


def noise(shape: tuple[int, ...], channels: int = 1) -> Tensor:
    return torch.as_tensor(np.random.default_rng(0).random((channels, *shape)) * 100 - 20)


def by_scipy(values: Tensor, pull: np.ndarray, shape: tuple[int, ...], order: int, fill: float) -> np.ndarray:
    """Outside of the image lie voxels of the fill value, as far as anybody looks."""
    dims = len(shape)
    arguments = {"output_shape": shape, "order": order, "mode": "grid-constant", "cval": fill}
    return np.stack([ndimage.affine_transform(c, pull[:dims, :dims], pull[:dims, dims], **arguments) for c in values])


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ON_CPU", 2**30 if request.param == "one block" else 700)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("zoom", [1.0, 4.0, 0.2])
def test_interpolates_as_scipy_does(blocks: None, dims: int, zoom: float) -> None:
    source, target = SHAPES[dims]
    values, pull = noise(source, channels=2), turn(dims, zoom)
    expected = by_scipy(values, pull, target, 1, -7.0)
    for dtype, tolerance in ((torch.float64, 2e-3), (torch.float32, 3e-3)):
        moved = resample(values.to(dtype), grid(source), grid(target), pull, fill=-7.0)
        assert moved.dtype == dtype
        np.testing.assert_allclose(moved.numpy(), expected, atol=tolerance)
    assert (expected == -7).any() == (zoom >= 1) and (expected > 10).any()


@pytest.mark.parametrize("dims", [2, 3])
def test_world_matrices_compose(dims: int) -> None:
    """Grids that are oblique, anisotropic and left-handed, and a transform between their worlds."""
    source, target = SHAPES[dims]
    values = noise(source)
    flip = np.diag([-1.5, 0.7, 2.0][:dims] + [1.0])
    one, two = turn(dims) @ flip, np.linalg.inv(turn(dims, 0.8))
    world = turn(dims, 1.2)
    moved = resample(values, grid(source, one), grid(target, two), torch.as_tensor(world), fill=0.0)
    expected = by_scipy(values, np.linalg.inv(one) @ world @ two, target, 1, 0.0)
    np.testing.assert_allclose(moved.numpy(), expected, atol=5e-3)


def test_bicubic_is_that_of_grid_sample(blocks: None) -> None:
    source, target = SHAPES[2]
    values, pull = noise(source), turn(2)
    theta = (grid(source).from_world @ torch.as_tensor(pull) @ torch.linalg.inv(grid(target).from_world))[:2]
    lattice = torch.nn.functional.affine_grid(theta[None], [1, 1, *target], align_corners=False)
    expected = torch.nn.functional.grid_sample(values[None], lattice, mode="bicubic", align_corners=False)[0]
    moved = resample(values, grid(source), grid(target), pull, mode="bicubic", fill=0.0)
    torch.testing.assert_close(moved, expected, atol=5e-3, rtol=0)


def test_coordinates_keep_their_precision_in_large_images() -> None:
    """Of a ramp the value is the coordinate: single precision over the whole image would be 1e-3 off."""
    side = 10_000
    ramp = torch.arange(side, dtype=torch.float64)[None, :, None].expand(1, side, 6)
    shift = np.eye(3)
    shift[0, 2] = -0.3141
    moved = resample(ramp, grid((side, 6)), grid((side, 4)), shift, fill=0.0)[0, 1:]
    expected = torch.arange(1, side, dtype=torch.float64) - 0.3141
    assert float((moved - expected[:, None]).abs().max()) < 5e-5


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.uint8, torch.bool, torch.int32, torch.float32])
def test_labels_are_looked_up_exactly(blocks: None, dims: int, dtype: torch.dtype) -> None:
    source, target = SHAPES[dims]
    wide = {torch.int64: 614454277 + 2**40, torch.float64: 2**52 + 1, torch.int32: 614454277}.get(dtype, 0)
    labels = (noise(source).long() % 5 + wide * (noise(source) > 30)).to(dtype)
    index = torch.arange(labels[0].numel()).reshape(labels.shape).double() + 1
    chosen = by_scipy(index, turn(dims), target, 0, 0.0).astype(np.int64)
    expected = np.where(chosen > 0, labels.flatten().double().numpy()[chosen - 1], 0)
    if dtype == torch.int64:
        expected = np.where(chosen > 0, labels.flatten().numpy()[chosen - 1], 0)
    moved = resample(labels, grid(source), grid(target), turn(dims), mode="nearest")
    assert moved.dtype == dtype
    # scipy counts the last half voxel at each edge as outside or inside as it rounds
    assert (moved.double().numpy() != expected).mean() < 2e-3
    assert set(moved.unique().tolist()) <= set(labels.unique().tolist()) | {0}


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.float16, torch.int8])
def test_rarer_types_pass(dtype: torch.dtype) -> None:
    image = torch.arange(24).reshape(1, 4, 6).to(dtype)
    for mode in ("nearest", "bilinear"):
        moved = resample(image, grid((4, 6)), grid((4, 6)), mode=mode, fill=0)
        assert moved.dtype == dtype and torch.equal(moved.long(), image.long())


# -------------------------------------------------------------------------------------------------- types and outside


def test_whole_numbers_are_rounded_and_clipped() -> None:
    image = torch.tensor([[[0, 0, 0, 0], [0, 32767, 32766, 0], [0, -32768, 32767, 0], [0, 0, 0, 0]]]).to(torch.int16)
    half = np.eye(3)
    half[0, 2] = 0.5
    moved = resample(image, grid((4, 4)), grid((4, 4)), half, fill=0)
    assert moved.dtype == torch.int16
    exact = resample(image.double(), grid((4, 4)), grid((4, 4)), half, fill=0)
    assert torch.equal(moved.double(), exact.round().clamp(-32768, 32767))
    # a cubic overshoots, and must not wrap around
    cubic = resample(image, grid((4, 4)), grid((9, 9)), np.diag([0.4, 0.4, 1.0]), mode="bicubic", fill=0)
    over = resample(image.double(), grid((4, 4)), grid((9, 9)), np.diag([0.4, 0.4, 1.0]), mode="bicubic", fill=0)
    assert float(over.max()) > 32767
    assert torch.equal(cubic.double(), over.round().clamp(-32768, 32767))


def ct(shape: tuple[int, ...]) -> Tensor:
    image = torch.full((1, *shape), -1024, dtype=torch.int16)
    image[(0,) + tuple(slice(n // 4, -n // 4) for n in shape)] = 40
    return image


@pytest.mark.parametrize("dims", [2, 3])
def test_outside_lies_the_background_of_the_image(dims: int) -> None:
    source = SHAPES[dims][0]
    far = np.eye(dims + 1)
    far[0, dims] = 0.6 * source[0]
    moved = resample(ct(source), grid(source), grid(source), far)
    assert moved.dtype == torch.int16 and (moved[0, -5:] == -1024).all()
    both = torch.cat([ct(source), ct(source) + 1024])
    assert torch.equal(resample(both, grid(source), grid(source), far), torch.cat([moved, moved + 1024]))
    for given in (7, 0):
        assert (resample(ct(source), grid(source), grid(source), far, fill=given)[0, -5:] == given).all()
    # an image that is looked up is one of labels, unless it has negative values
    assert (resample(ct(source), grid(source), grid(source), far, mode="nearest")[0, -5:] == -1024).all()
    full = torch.ones(1, *source, dtype=torch.uint8)
    assert (resample(full, grid(source), grid(source), far, mode="nearest")[0, -5:] == 0).all()


def test_background_of_a_large_image_takes_no_more_than_a_sample() -> None:
    large = ct((400, 700))[0]
    assert outside_value(large, "bilinear") == -1024
    assert outside_value(large.float() + 0.25, "bilinear") == pytest.approx(-1023.75)


def test_fill_values_that_the_type_cannot_hold_are_refused() -> None:
    image, place = ct((20, 20)), grid((20, 20))
    for fill in (0.5, 40_000, float("nan")):
        with pytest.raises(RegistrationError, match="^fill_value: .*-32768 to 32767"):
            resample(image, place, place, fill=fill)
    moved = resample(image, place, grid((30, 20)), fill=float("nan"), dtype=torch.float32)
    assert moved.dtype == torch.float32 and moved[0, -5:].isnan().all() and not moved[0, :19].isnan().any()


def test_voxels_that_were_not_seen_stay_where_they_are() -> None:
    image = noise((20, 20, 20)).float()
    hidden = image.clone()
    hidden[0, 8:11, 8:11, 8:11] = float("nan")
    hidden[0, 2, 2, 2] = float("inf")
    place = grid((20, 20, 20))
    assert torch.equal(resample(hidden, place, place, fill=0.0).isfinite(), hidden.isfinite())
    shift = np.eye(4)
    shift[2, 3] = 0.25
    moved, whole = (resample(x, place, place, shift, fill=0.0) for x in (hidden, image))
    unseen = moved.isnan()
    assert int(unseen.sum()) == 27 + 1
    # where nothing is hidden nearby, nothing changed
    far = torch.ones_like(unseen)
    far[0, 7:12, 7:12, 7:12] = far[0, 1:4, 1:4, 1:4] = False
    assert torch.equal(moved[far], whole[far])


def test_a_grid_far_away_is_all_outside() -> None:
    away = np.eye(4)
    away[:3, 3] = 1e6
    assert (resample(noise((6, 7, 8)), grid((6, 7, 8)), grid((5, 5, 5)), away, fill=3.0) == 3).all()


def test_any_memory_layout_gives_the_same() -> None:
    values = noise((20, 21, 22), channels=2).float()
    values[0, 3, 3, 3] = float("nan")
    turned = values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert turned.stride() != values.stride()
    expected = resample(values, grid((20, 21, 22)), grid((18, 18, 18)), turn(3), fill=0.0)
    got = resample(turned, grid((20, 21, 22)), grid((18, 18, 18)), turn(3), fill=0.0)
    torch.testing.assert_close(got, expected, equal_nan=True, atol=1e-6, rtol=0)


def test_devices_agree(device: torch.device) -> None:
    values = noise((30, 31, 32)).float()
    here = resample(values, grid((30, 31, 32)), grid((30, 31, 32)), turn(3))
    there = resample(values.to(device), grid((30, 31, 32)), grid((30, 31, 32)), turn(3))
    assert there.device.type == device.type
    torch.testing.assert_close(there.cpu(), here, atol=1e-3, rtol=0)


def test_user_errors() -> None:
    place = grid((6, 7))
    for argument, call in (
        ("mode", lambda: resample(noise((6, 7)), place, place, mode="linear")),
        ("values", lambda: resample(noise((6, 8)), place, place)),
        ("values", lambda: resample(noise((6, 7)).to(torch.complex64), place, place)),
    ):
        with pytest.raises(RegistrationError, match=f"^{argument}: "):
            call()


@pytest.mark.parametrize("shape", [(300, 280, 260), (5000, 4400)])
def test_memory_is_the_result_and_little_more(shape: tuple[int, ...]) -> None:
    """Measured in a process of its own: the peak above both the image and the result."""
    script = (
        "import resource, sys, torch\n"
        "from monai_zsreg.geometry import Grid\n"
        "from monai_zsreg.resample import resample\n"
        f"shape = {shape}\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "place = lambda s: Grid(s, torch.eye(len(s) + 1, dtype=torch.float64))\n"
        "turn = torch.eye(len(shape) + 1, dtype=torch.float64)\n"
        "turn[0, 1], turn[1, 0] = -0.3, 0.3\n"
        "small = tuple(n // 8 for n in shape)\n"
        "resample(torch.rand(1, *small), place(small), place(small), turn)\n"
        "values = torch.rand(1, *shape)\n"
        "before = peak()\n"
        "moved = resample(values, place(shape), place(shape), turn)\n"
        "print((peak() - before - moved.numel() * 4) / 2**20)\n"
    )
    extra = float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert extra < 100, f"{extra:.0f} MB"


def test_a_constant_part_of_an_image_is_as_the_rest() -> None:
    """Blocks with nothing in them are not interpolated; what lies where is not changed by it."""
    values = torch.zeros(1, 150, 150)
    values[0, 100:, 100:] = torch.rand(50, 50)
    grid = Grid((150, 150), torch.eye(3, dtype=torch.float64))
    transform = torch.tensor([[0.98, -0.2, 10.3], [0.2, 0.98, -5.7], [0.0, 0.0, 1.0]], dtype=torch.float64)
    whole = resample(values, grid, grid, transform, fill=0.0)
    blocks = [Grid((30, 30), grid.affine.clone()) for _ in range(25)]
    for number, block in enumerate(blocks):
        block.affine[:2, 2] = torch.tensor([30.0 * (number // 5), 30.0 * (number % 5)], dtype=torch.float64)
        rows, columns = (slice(30 * n, 30 * n + 30) for n in divmod(number, 5))
        part = resample(values, grid, block, transform, fill=0.0)
        assert torch.allclose(part, whole[:, rows, columns], atol=2e-5)
    assert float(whole.max()) > 0.5
