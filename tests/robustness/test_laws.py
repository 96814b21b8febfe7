# SPDX-License-Identifier: Apache-2.0
"""Laws that the default preset must obey, on real slices and volumes, with drawn motions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from monai.data import DataLoader, Dataset, MetaTensor
from phantoms import padded, pooled

import monai_zsreg
from monai_zsreg.geometry import AffineParameters, Grid, apply_affine, compose_parameters
from monai_zsreg.registration.descriptors import MINDSSC
from monai_zsreg.registration.engine import EFFORTS, Settings, find
from monai_zsreg.registration.precision import full_precision
from monai_zsreg.registration.side import Pair, Side, finest_step
from monai_zsreg.transforms import RegisterAffined

# no shrinking: every example is a registration or two, and each says enough
few = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def images(load_volume) -> dict[int, SimpleNamespace]:
    """T1, T2 and FLAIR of one brain: a slice at 2 mm and a volume at 5 mm, in the middle of a larger field."""
    made: dict[int, dict[str, MetaTensor]] = {2: {}, 3: {}}
    for modality in ("t1", "t2", "flair"):
        volume = load_volume(modality=modality)
        made[2][modality] = padded(pooled(MetaTensor(volume.as_tensor()[..., 94]), 2), 6)
        made[3][modality] = padded(pooled(volume, 5), 6)
    return {dims: SimpleNamespace(**part) for dims, part in made.items()}


@pytest.fixture(scope="module")
def before(images: dict[int, SimpleNamespace]) -> dict[int, np.ndarray]:
    """What T1 and T2 give as they are."""
    return {dims: matrix(part.t1, part.t2) for dims, part in images.items()}


def gap(one: np.ndarray, other: np.ndarray, image: MetaTensor) -> float:
    """Largest distance in the foreground, mm."""
    points = torch.nonzero(image[0] > 0).double()
    points = apply_affine(Grid.of(image).affine, points)
    difference = torch.as_tensor(one - other)
    dims = len(difference) - 1
    return float((points @ difference[:dims, :dims].T + difference[:dims, dims]).norm(dim=1).max())


def matrix(fixed: MetaTensor, moving: MetaTensor, **options) -> np.ndarray:
    result = monai_zsreg.register(fixed, moving, **options)
    assert result.success
    return result.affine


def motions(dims: int) -> st.SearchStrategy[np.ndarray]:
    angle = st.floats(-180, 180)
    count = 1 if dims == 2 else 3
    return st.builds(
        lambda shift, angles, scale: compose_parameters(
            AffineParameters(
                tuple(shift), tuple(angles), (scale,) * dims, (0.0,) * (dims * (dims - 1) // 2), (0.0,) * dims
            )
        ),
        st.lists(st.floats(-300, 300), min_size=dims, max_size=dims),
        st.lists(angle, min_size=count, max_size=count),
        st.floats(0.8, 1.25),
    )


def reheadered(image: MetaTensor, motion: np.ndarray) -> MetaTensor:
    return MetaTensor(image.as_tensor(), affine=torch.as_tensor(motion) @ image.affine)


def stored(image: MetaTensor, order: tuple[int, ...], flips: tuple[bool, ...]) -> MetaTensor:
    """The same image in the same place, its voxels in another order in memory."""
    dims = image.ndim - 1
    swap = np.zeros((dims + 1, dims + 1))
    swap[dims, dims] = 1
    for new, old in enumerate(order):
        swap[old, new] = -1 if flips[new] else 1
        if flips[new]:
            swap[old, dims] = image.shape[1 + old] - 1
    values = image.as_tensor().permute(0, *[1 + axis for axis in order])
    values = values.flip([1 + axis for axis in range(dims) if flips[axis]])
    return MetaTensor(values, affine=image.affine @ torch.as_tensor(swap))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("modality", ["t1", "flair"])
def test_identity_is_found(images: dict, dims: int, modality: str) -> None:
    image = getattr(images[dims], modality)
    assert gap(matrix(image, image), np.eye(dims + 1), image) < 0.005 * image.affine[0, 0]


@pytest.mark.parametrize("dims", [2, 3])
@few
@given(data=st.data())
def test_moving_a_header_moves_the_answer(images: dict, before: dict, dims: int, data: st.DataObject) -> None:
    one, two = images[dims].t1, images[dims].t2
    motion, other = data.draw(motions(dims)), data.draw(motions(dims))
    # similar shapes on the lattice: a scaled header is the same picture in other units
    after = matrix(reheadered(one, other), reheadered(two, motion))
    expected = motion @ before[dims] @ np.linalg.inv(other)
    size = float(one.affine[0, 0])
    tolerance = 0.25 * size * np.linalg.norm(motion[:dims, :dims], 2)
    assert gap(after @ other, expected @ other, one) < tolerance


@pytest.mark.parametrize("dims", [2, 3])
@few
@given(data=st.data())
def test_order_of_voxels_does_not_matter(images: dict, before: dict, dims: int, data: st.DataObject) -> None:
    one, two = images[dims].t1, images[dims].t2
    order = tuple(data.draw(st.permutations(range(dims))))
    flips = tuple(data.draw(st.lists(st.booleans(), min_size=dims, max_size=dims)))
    again = stored(two, order, flips)
    assert gap(before[dims], matrix(one, again), one) < 0.15 * float(one.affine[0, 0])


@pytest.mark.parametrize("dims", [2, 3])
@few
@given(data=st.data())
def test_there_and_back(images: dict, dims: int, data: st.DataObject) -> None:
    one = images[dims].t1
    two = reheadered(images[dims].flair, data.draw(motions(dims)))
    round_trip = matrix(two, one) @ matrix(one, two)
    # both ways end within the tolerance of the iterations
    assert gap(round_trip, np.eye(dims + 1), one) < 0.25 * float(one.affine[0, 0])


@pytest.mark.parametrize("dims", [2, 3])
def test_by_way_of_a_third_image(images: dict, dims: int) -> None:
    part = images[dims]
    direct, around = matrix(part.t1, part.flair), matrix(part.t2, part.flair) @ matrix(part.t1, part.t2)
    assert gap(direct, around, part.t1) < 0.5 * float(part.t1.affine[0, 0])


@pytest.mark.parametrize("dims", [2, 3])
@few
@given(factor=st.floats(1e-6, 1e6), offset=st.floats(-1e3, 1e3), sign=st.sampled_from([1, -1]))
def test_units_of_intensity_do_not_matter(
    images: dict, before: dict, dims: int, factor: float, offset: float, sign: int
) -> None:
    one, two = images[dims].t1, images[dims].t2
    scaled = MetaTensor(sign * factor * two.as_tensor() + factor * offset, affine=two.affine)
    assert gap(before[dims], matrix(one, scaled), one) < 0.1 * float(one.affine[0, 0])


@pytest.mark.parametrize("dims", [2, 3])
@few
@given(power=st.floats(0.5, 2.0))
def test_monotonic_change_of_intensity_matters_little(images: dict, before: dict, dims: int, power: float) -> None:
    one, two = images[dims].t1, images[dims].t2
    curved = MetaTensor((two.as_tensor() / two.as_tensor().max()).clamp(min=0) ** power, affine=two.affine)
    assert gap(before[dims], matrix(one, curved), one) < 0.5 * float(one.affine[0, 0])


@pytest.mark.parametrize(
    ("dims", "kind"),
    [(2, kind) for kind in ("int16", "uint8", "float64", "float16", "bfloat16", "strided", "autocast")]
    + [(3, kind) for kind in ("uint8", "strided", "autocast")],
)
def test_type_and_layout_do_not_matter(images: dict, dims: int, kind: str) -> None:
    one, two = images[dims].t1, images[dims].t2
    levels = (two.as_tensor() / two.as_tensor().max() * 250).round().clamp(min=0)
    before = matrix(one, MetaTensor(levels, affine=two.affine))
    if kind == "strided":
        twice = torch.stack([levels, levels], -1)[..., 1]
        assert not twice.is_contiguous()
        after = matrix(one, MetaTensor(twice, affine=two.affine))
    elif kind == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            after = matrix(one, MetaTensor(levels, affine=two.affine))
    else:
        after = matrix(one, MetaTensor(levels.to(getattr(torch, kind)), affine=two.affine))
    # every level fits bfloat16's eight bits
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("dims", [2, 3])
def test_descriptors_in_single_precision(dims: int) -> None:
    patches = torch.rand(6, *[14] * dims, dtype=torch.float64)
    describe = MINDSSC(dims)
    torch.testing.assert_close(describe(patches.float()).double(), describe(patches), atol=1e-5, rtol=0)


def attempt(one: MetaTensor, two: MetaTensor, dtype: torch.dtype, device: torch.device) -> np.ndarray:
    """One attempt of the default method, computed in a type."""
    grids = Grid.of(one), Grid.of(two)
    sides = [
        Side(image.as_tensor()[0].to(device, dtype), grid, *finest_step(*grids))
        for image, grid in zip((one, two), grids, strict=True)
    ]
    with full_precision(device), torch.inference_mode():
        found = find(Pair(*sides), Settings(), EFFORTS[grids[0].dims][0])
    return found.affine().numpy()


@pytest.mark.parametrize(("dims", "precision"), [(2, "highest"), (2, "medium"), (3, "high")])
def test_single_precision_against_double(images: dict, dims: int, precision: str, device: torch.device) -> None:
    """Also where the caller allows matrix products in TF32 or bfloat16, which coordinates do not bear."""
    one, two = images[dims].t1, images[dims].t2
    reference = attempt(one, two, torch.float64, device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        single = attempt(one, two, torch.float32, device)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert gap(single, reference, one) < 0.05 * float(one.affine[0, 0])


@pytest.mark.slow
def test_same_bytes_in_every_process(images: dict, tmp_path: Path) -> None:
    pairs = {d: [(image.as_tensor(), image.affine) for image in (p.t1, p.flair)] for d, p in images.items()}
    torch.save(pairs, tmp_path / "pairs.pt")
    script = (
        "import sys, json, torch, monai_zsreg\n"
        "from monai_zsreg.io import Image\n"
        "pairs = torch.load(sys.argv[1], weights_only=True)\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "found = [monai_zsreg.register(*[Image(*image) for image in pairs[d]]) for d in (2, 3)]\n"
        "print(json.dumps([result.affine.tolist() for result in found]))"
    )

    def elsewhere(threads: int) -> list:
        command = [sys.executable, "-c", script, str(tmp_path / "pairs.pt"), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    first, two = elsewhere(1), elsewhere(2)
    assert first == [matrix(images[d].t1, images[d].flair).tolist() for d in (2, 3)]
    for dims, one, other in zip((2, 3), first, two, strict=True):
        assert gap(np.array(one), np.array(other), images[dims].t1) < 0.01

    # a loader's worker has one thread
    items = [{"t1": images[d].t1, "flair": images[d].flair} for d in (2, 3)]
    loader = DataLoader(Dataset(items, RegisterAffined("flair", "t1")), batch_size=1, num_workers=1)
    for batch, one in zip(loader, first, strict=True):
        np.testing.assert_array_equal(batch["affine_flair"][0].numpy(), np.array(one))
