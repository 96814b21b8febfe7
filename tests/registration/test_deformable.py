# SPDX-License-Identifier: Apache-2.0
"""The deformable stage against maps that are known, and maps against SciPy and MONAI. SciPy makes the images."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from phantoms import pooled, turn
from scipy import ndimage

import monai_zsreg
from monai_zsreg.app.apply import compose_transforms
from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, apply_affine
from monai_zsreg.registration import deformable
from monai_zsreg.registration.deformable import deform, register_deformable
from monai_zsreg.registration.displacement import Deformation, determinant, least_determinant
from monai_zsreg.registration.separable import blurred, resized


def waves(shape: tuple[int, ...], size: float, length: float, seed: int = 0) -> np.ndarray:
    """A smooth displacement ``[D, *shape]`` of at most ``size``, by noise smoothed over ``length``; voxels."""
    rng = np.random.default_rng(seed)
    field = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), length) for _ in shape])
    return size * field / np.linalg.norm(field, axis=0).max()


def bent(image: MetaTensor, field: np.ndarray) -> MetaTensor:
    """The image that shows at ``x`` what ``image`` shows at ``x + field(x)``."""
    where = np.indices(field.shape[1:]) + field
    values = np.stack([ndimage.map_coordinates(channel, where, order=1) for channel in image.as_tensor().numpy()])
    return MetaTensor(torch.from_numpy(values), affine=image.affine)


def errors(found: Deformation, fixed: MetaTensor, field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance from ``fixed``'s foreground to the truth, mm, of the map and of its affine part alone."""
    grid = Grid.of(fixed)
    index = np.argwhere(fixed.as_tensor()[0].numpy() > 100)
    truth = apply_affine(grid.affine, torch.as_tensor(index + field[(slice(None), *index.T)].T)).numpy()
    points = apply_affine(grid.affine, torch.as_tensor(index, dtype=torch.float64))
    affine = apply_affine(found.affine, points).numpy()
    return np.linalg.norm(found.apply(points.numpy()) - truth, axis=1), np.linalg.norm(affine - truth, axis=1)


def side(image: MetaTensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, Grid, torch.Tensor | None]:
    return image.as_tensor()[0].float(), Grid.of(image), mask


def identity(image: MetaTensor) -> torch.Tensor:
    return torch.eye(image.ndim, dtype=torch.float64)


@pytest.mark.parametrize("contrast", ["t1", "t2", "flair"])
def test_a_known_deformation_of_a_slice_is_found(slices, contrast: str, device: torch.device) -> None:
    moving = getattr(slices, contrast)
    field = waves(moving.shape[1:], 8, 20)
    # the truth takes a point of the fixed image to where the moving one shows it
    fixed = bent(slices.t1, field)
    values = [
        tuple(None if v is None else v.to(device) if hasattr(v, "to") else v for v in side(i)) for i in (fixed, moving)
    ]
    found = deform(*values, identity(moving))
    after, before = errors(Deformation(found.affine, found.displacement.cpu(), found.grid), fixed, field)
    assert np.median(before) > 1.5
    # 0.05 by intensity, 0.27 and 0.30 by descriptors
    assert np.median(after) < (0.1 if contrast == "t1" else 0.35) * np.median(before)
    assert found.folds() == 0


@pytest.mark.parametrize("contrast", ["t1", "flair"])
def test_a_known_deformation_of_a_volume_is_found(volumes, contrast: str) -> None:
    moving = getattr(volumes, contrast)
    field = waves(moving.shape[1:], 2.0, 6)
    fixed = bent(volumes.t1, field)
    after, before = errors(found := deform(side(fixed), side(moving), identity(moving)), fixed, field)
    assert np.median(after) < 0.6 * np.median(before)
    assert found.folds() == 0


def test_noise_adds_little_to_a_smooth_displacement(load_volume) -> None:
    image = pooled(load_volume(modality="t1"), 2)
    field = waves(tuple(image.shape[1:]), 3.0, 8.0)
    clean = bent(image, field)
    fixed, moving = (
        MetaTensor(
            scan.as_tensor() + 20 * torch.randn(scan.shape, generator=torch.Generator().manual_seed(seed)),
            affine=scan.affine,
        )
        for seed, scan in enumerate((clean, image))
    )
    after, before = errors(deform(side(fixed), side(moving), identity(fixed)), clean, field)
    assert np.median(before) > 1.2
    assert np.median(after) < 0.2
    assert np.quantile(after, 0.95) < 0.5


def test_details_are_kept_where_they_are_more_than_noise(load_volume) -> None:
    image = pooled(load_volume(modality="t1"), 2)
    kept = []
    for size, length in ((3.0, 8.0), (1.5, 2.0)):
        clean = bent(image, waves(tuple(image.shape[1:]), size, length))
        scans = [
            scan.as_tensor() + 20 * torch.randn(scan.shape, generator=torch.Generator().manual_seed(seed))
            for seed, scan in enumerate((clean, image))
        ]
        sides = [side(MetaTensor(scan, affine=image.affine)) for scan in scans]
        scene, likeness = deformable._Scene(*sides, identity(image), None), deformable._INTENSITY
        shape = [-(-n // 2) for n in scene.shape]
        pair = deformable._Pair(scene, likeness, 2, shape)
        smooth = 0.8 * scene.step
        shift = deformable._level(pair, likeness, 12, torch.zeros(3, *shape), smooth, None)
        shown = resized(scene.shown, shape) > 0.9
        kept.append(float(deformable._detail(pair, likeness, shift, smooth)[shown].mean()))
    assert kept[0] < 0.1
    assert kept[1] > 0.5


@pytest.mark.parametrize("contrast", ["t1", "t2", "flair"])
def test_a_head_that_only_moved_is_not_deformed(volumes, contrast: str) -> None:
    truth = turn(volumes.t1, 10, (3.0, -2.0, 4.0), shear=0.0)
    # the header moves, so that nothing is interpolated; noise of its own for each scan
    scans = [
        image.as_tensor() + 10 * torch.randn(image.shape, generator=torch.Generator().manual_seed(s))
        for s, image in enumerate((volumes.t1, getattr(volumes, contrast)))
    ]
    moving = MetaTensor(scans[1], affine=torch.as_tensor(truth) @ Grid.of(volumes.t1).affine)
    found = deform(side(MetaTensor(scans[0], affine=volumes.t1.affine)), side(moving), torch.as_tensor(truth))
    foreground = apply_affine(Grid.of(volumes.t1).affine, torch.nonzero(volumes.t1.as_tensor()[0] > 100).double())
    added = np.linalg.norm(
        found.apply(foreground.numpy()) - apply_affine(torch.as_tensor(truth), foreground).numpy(), axis=1
    )
    assert np.quantile(added, 0.95) < 0.1


def test_descriptors_are_those_of_their_definition() -> None:
    image = torch.randn(1, 7, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    rim = torch.nn.functional.pad(image, (3,) * 6, mode="replicate")[0].numpy()
    units = np.eye(3, dtype=int)
    raw = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for s in (-1, 1):
            for t in (-1, 1):
                gap = (np.roll(rim, -s * units[a], (0, 1, 2)) - np.roll(rim, -t * units[b], (0, 1, 2))) ** 2
                for axis in range(3):
                    gap = ndimage.convolve1d(gap, [0.25, 1.0, 0.25], axis)
                raw.append(gap[3:-3, 3:-3, 3:-3])
    above = np.stack(raw) - np.min(raw, axis=0)
    usual = above.mean(0)
    expected = np.exp(-above / usual.clip(1e-3 * usual.mean(), 1e3 * usual.mean()))
    np.testing.assert_allclose(deformable._mind(image).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_look_gives_what_both_show_and_their_derivatives(scale: int) -> None:
    wave = torch.from_numpy(waves((40, 36, 32), 5.0, 5.0)[:1]).float()
    image = MetaTensor(wave - wave.min(), affine=torch.eye(4))
    scene = deformable._Scene(side(image), side(image), torch.eye(4, dtype=torch.float64), None)
    pair = deformable._Pair(scene, deformable._INTENSITY, scale, [-(-n // 2) for n in scene.shape])
    shift = blurred(torch.from_numpy(waves((20, 18, 16), 0.1, 3.0)).float(), [1.0] * 3)
    shift = resized(shift, pair._lattice)
    shape = pair.shape
    whole = resized(shift, shape)
    fixed = pair._fixed.view(shape)
    total = fixed + deformable._pulled(pair._moving, whole)[0]
    twice = [2 * torch.gradient(image, dim=axis)[0] for image in (fixed, pair._moving[0]) for axis in range(3)]
    for axis, slope in enumerate(twice[3:]):
        # the edge of the moving image has none
        slope.index_fill_(axis, torch.tensor([0, shape[axis] - 1]), 0.0)
    moved = deformable._pulled(torch.stack(twice[3:]), whole)
    for number in range(3):
        corner = (0, 7, 3)[number]
        at, _, channels = pair.look(shift, number)
        for one, two, slopes in channels:
            places = torch.unravel_index(at, pair._lattice)
            ticks = [
                ((2 * k + (corner >> axis & 1)).clamp(max=n - 1) if n > m else k)
                for axis, (k, n, m) in enumerate(zip(places, shape, pair._lattice, strict=True))
            ]
            inside = torch.stack([(t > 1) & (t < n - 2) for t, n in zip(ticks, shape, strict=True)]).all(0)
            torch.testing.assert_close(one + two, total[tuple(ticks)], rtol=0, atol=1e-4)
            for axis, slope in enumerate(slopes):
                expected = (twice[axis] + moved[axis])[tuple(t[inside] for t in ticks)]
                torch.testing.assert_close(slope[inside], expected, rtol=0, atol=1e-4)


def test_nothing_folds_however_rough_the_map_is() -> None:
    rng = np.random.default_rng(0)
    one = MetaTensor(torch.from_numpy(ndimage.gaussian_filter(rng.standard_normal((60, 70)), 1.5)).float()[None])
    two = bent(one, waves((60, 70), 8, 3))
    found = deform(side(one), side(two), identity(one), stiffness=0.05)
    assert found.folds() == 0
    assert float(found.displacement.norm(dim=0).max()) > 1.0


def test_of_noise_nothing_is_moved() -> None:
    rng = np.random.default_rng(0)
    one, two = (MetaTensor(torch.from_numpy(rng.random((1, 60, 70), dtype=np.float32))) for _ in range(2))
    found = deform(side(one), side(two), identity(one), stiffness=0.05)
    assert float(found.displacement.norm(dim=0).max()) < 0.1


def test_what_leaves_the_field_of_view_goes_on_as_what_stays(load_volume) -> None:
    # a third of the slab shows nothing that the other does
    image = pooled(load_volume(modality="t1"), 2).as_tensor()[:, 15:-15, 20:-20]
    fixed, moving = (MetaTensor(image[..., n : n + 16].clone(), affine=torch.eye(4)) for n in (28, 34))
    size = deform(side(fixed), side(moving), identity(fixed)).displacement.norm(dim=0)
    assert float(size.median()) == pytest.approx(6, abs=0.5)
    assert float(size.max()) < 7


def test_two_contrasts_are_not_taken_for_one(load_volume) -> None:
    # their coarse features agree, and what is compared does not
    scans = [pooled(load_volume(modality=contrast), 4) for contrast in ("t1", "flair")]
    smooth = [ndimage.gaussian_filter(scan.as_tensor()[0].numpy(), 1) for scan in scans]
    fixed, moving = (
        MetaTensor(torch.from_numpy(values)[None], affine=scan.affine)
        for values, scan in zip(smooth, scans, strict=True)
    )
    found = deform(side(fixed), side(moving), identity(fixed))
    assert float(found.displacement.norm(dim=0).quantile(0.95)) < 0.5


def test_a_hole_is_carried_by_its_surroundings(slices) -> None:
    field = waves(slices.t1.shape[1:], 8, 25, seed=1)
    fixed = bent(slices.t1, field)
    hole = torch.zeros(fixed.shape[1:], dtype=torch.bool)
    middle = [n // 2 for n in hole.shape]
    hole[middle[0] - 12 : middle[0] + 12, middle[1] + 5 : middle[1] + 29] = True
    broken = fixed.as_tensor().clone()
    broken[0, hole] = 1500.0
    broken = MetaTensor(broken, affine=fixed.affine)
    inside = np.zeros(fixed.shape, dtype=np.float32)
    inside[0][hole] = 1000.0
    inside = MetaTensor(torch.from_numpy(inside), affine=fixed.affine)
    masked = deform(side(broken, ~hole), side(slices.t1), identity(fixed))
    naive = deform(side(broken), side(slices.t1), identity(fixed))
    after, before = errors(masked, inside, field)
    assert np.median(after) < 0.4 * np.median(before)
    assert np.median(after) < 0.25 * np.median(errors(naive, inside, field)[0])


def test_a_cavity_that_no_mask_tells_of_is_left_out(load_volume) -> None:
    image = pooled(load_volume(modality="t1"), 2)
    fixed = bent(image, waves(tuple(image.shape[1:]), 1.5, 8.0))
    center = np.argwhere(fixed.as_tensor()[0].numpy() > 100).mean(0)
    away = torch.from_numpy(np.linalg.norm(np.indices(fixed.shape[1:]).T - center, axis=-1).T.copy())
    for radius in (0, 11):
        fixed.as_tensor()[0][away < radius] = 0.0
        scene = deformable._Scene(side(fixed), side(image), identity(image), None)
        shape = [-(-n // 8) for n in scene.shape]
        pair = deformable._Pair(scene, deformable._INTENSITY, 8, shape)
        found = scene.leave_out(pair.strange(torch.zeros(3, *shape)))
        assert found == (radius > 0)
    counts = scene.counts[0]
    assert counts is not None
    inside = tuple(slice(b, b + n) for b, n in zip(scene._begin, scene.shape, strict=True))
    assert counts[0][away[inside] < 6].max() < 0.5
    assert counts[0][away[inside] > 30].min() > 0.9


def test_stiffness_is_smoothness_and_a_length(slices) -> None:
    fixed = bent(slices.t1, waves(slices.t1.shape[1:], 6, 12))
    rough = [
        float(
            torch.stack(
                torch.gradient(
                    deform(side(fixed), side(slices.t1), identity(fixed), stiffness=s).displacement, dim=(1, 2)
                )
            ).std()
        )
        for s in (0.5, 2.0, 8.0)
    ]
    assert rough[0] > rough[1] > rough[2]
    for wrong in (0.0, -1.0, float("nan"), "soft"):
        with pytest.raises(RegistrationError, match="stiffness"):
            deform(side(fixed), side(slices.t1), identity(fixed), stiffness=wrong)


def test_it_goes_on_from_a_result(slices) -> None:
    field = waves(slices.t2.shape[1:], 4, 20)
    fixed = bent(slices.t1, field)
    result = monai_zsreg.register(fixed, slices.t2)
    found = register_deformable(result)
    after, before = errors(found, fixed, field)
    assert np.median(after) < 0.65 * np.median(before)
    np.testing.assert_array_equal(found.affine.numpy(), result.affine)
    found.displacement.requires_grad_()


# ----------------------------------------------------------------------------------------------------------- the map


@pytest.fixture(params=[2, 3])
def bend(request: pytest.FixtureRequest) -> Deformation:
    """A map on an oblique lattice of unequal steps."""
    dims = request.param
    shape = (30, 24, 20)[:dims]
    like = MetaTensor(torch.zeros(1, *shape))
    affine = torch.as_tensor(turn(like, 25, (3.0, -4.0, 2.0)[:dims], shear=0.0)) @ torch.diag(
        torch.tensor([2.0, 3.0, 2.5][:dims] + [1.0], dtype=torch.float64)
    )
    after = torch.as_tensor(turn(like, -15, (5.0, 1.0, -2.0)[:dims], scale=1.1))
    return Deformation(after, torch.from_numpy(waves(shape, 7, 3.5)).float(), Grid(shape, affine))


def inner(bend: Deformation, count: int = 500) -> np.ndarray:
    index = np.random.default_rng(1).uniform(0, np.array(bend.grid.shape) - 1, (count, bend.dims))
    return apply_affine(bend.grid.affine, torch.as_tensor(index)).numpy()


def test_points_go_by_linear_interpolation_then_the_matrix(bend: Deformation) -> None:
    points = inner(bend)
    index = apply_affine(torch.linalg.inv(bend.grid.affine), torch.as_tensor(points)).numpy().T
    shift = np.stack([ndimage.map_coordinates(c.numpy().astype(float), index, order=1) for c in bend.displacement], 1)
    matrix = bend.affine.numpy()
    np.testing.assert_allclose(bend.apply(points), (points + shift) @ matrix[:-1, :-1].T + matrix[:-1, -1], atol=1e-3)
    with pytest.raises(RegistrationError, match="points"):
        bend.apply(points[:, :1])


def test_the_inverse_leads_back(bend: Deformation) -> None:
    points, back = inner(bend), bend.inverse()
    assert bend.folds() == 0
    np.testing.assert_allclose(back.apply(bend.apply(points)), points, atol=1e-3)
    # and by the lattice alone, as images and files go
    alone = Deformation(back.affine, back.displacement, back.grid)
    away = np.linalg.norm(alone.apply(bend.apply(points)) - points, axis=1) / min(bend.grid.spacing)
    assert np.quantile(away, 0.95) < 0.1
    assert back.inverse() is bend


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_images_are_interpolated_once(bend: Deformation, mode: str) -> None:
    dims = bend.dims
    rng = np.random.default_rng(2)
    source = Grid(
        (40, 44, 36)[:dims], bend.affine @ bend.grid.affine @ torch.diag(torch.tensor([0.8] * dims + [1.0])).double()
    )
    target = Grid((33, 27, 31)[:dims], bend.grid.affine @ torch.diag(torch.tensor([0.7] * dims + [1.0])).double())
    values = torch.from_numpy(ndimage.gaussian_filter(rng.random(source.shape), 1.5)).float()[None]
    values = (values * 1000).to(torch.int16) if mode == "nearest" else values
    moved = bend.resample(values, source, target, mode, fill=-5)
    index = np.indices(target.shape).reshape(dims, -1).T
    world = bend.apply(apply_affine(target.affine, torch.as_tensor(index, dtype=torch.float64)).numpy())
    where = apply_affine(torch.linalg.inv(source.affine), torch.as_tensor(world)).numpy().T
    wanted = ndimage.map_coordinates(values[0].numpy(), where, order=int(mode == "bilinear"), mode="constant", cval=-5)
    last = np.array(source.shape)[:, None] - 1
    clear = ((where > 0) & (where < last) & (abs(where % 1 - 0.5) > 0.01)).all(0)
    assert clear.mean() > 0.2
    np.testing.assert_allclose(moved[0].flatten().numpy()[clear], wanted[clear], atol=2e-3)
    outside = ((where < -1) | (where > last + 1)).any(0)
    assert moved.dtype == values.dtype
    assert (moved[0].flatten().numpy()[outside] == -5).all()


@pytest.mark.filterwarnings("ignore:monai.networks.blocks.Warp")
def test_monai_warps_with_its_ddf(bend: Deformation) -> None:
    grid = Grid(
        (26, 28, 22)[: bend.dims], bend.grid.affine @ torch.diag(torch.tensor([1.1] * bend.dims + [1.0])).double()
    )
    bend = Deformation(torch.eye(bend.dims + 1), bend.displacement, bend.grid)
    smooth = ndimage.gaussian_filter(np.random.default_rng(3).random(grid.shape), 2)
    values = torch.from_numpy(smooth).float()[None]
    ddf = bend.ddf(grid)
    warped = Warp(padding_mode="border")(values[None], ddf[None])[0]
    moved = bend.resample(values, grid, grid, fill=0)
    inside = (slice(None), *[slice(6, -6)] * bend.dims)
    torch.testing.assert_close(moved[inside], warped[inside], atol=1e-3, rtol=0)
    again = Deformation.from_ddf(ddf, grid)
    points = apply_affine(grid.affine, torch.cartesian_prod(*[torch.arange(float(n)) for n in grid.shape]).double())
    torch.testing.assert_close(again.apply(points), bend.apply(points), atol=1e-3, rtol=0)


def test_determinants_tell_a_fold() -> None:
    x = torch.arange(12.0)
    stretch = torch.stack(torch.meshgrid(0.5 * x, -0.25 * x, indexing="ij"))
    torch.testing.assert_close(determinant(stretch), torch.full((12, 12), 1.5 * 0.75))
    torch.testing.assert_close(least_determinant(stretch), torch.full((12, 12), 1.5 * 0.75))
    # one point jumps over its neighbor: central differences do not see it there
    stretch[0, 6] += 2.0
    assert float(determinant(stretch)[6].min()) > 0
    assert float(least_determinant(stretch)[6].max()) < 0


def test_a_displacement_of_another_shape_is_refused(bend: Deformation) -> None:
    with pytest.raises(RegistrationError, match="displacement"):
        Deformation(bend.affine, bend.displacement[..., 1:], bend.grid)


@pytest.mark.parametrize("name", ["warp.nii.gz", "warp.h5"])
def test_files_hold_the_whole_map(bend: Deformation, tmp_path: Path, name: str) -> None:
    bend.save(tmp_path / name)
    again = compose_transforms([str(tmp_path / name)])
    assert isinstance(again, Deformation)
    np.testing.assert_allclose(again.apply(inner(bend)), bend.apply(inner(bend)), atol=1e-3)
    if name.endswith("h5"):
        torch.testing.assert_close(again.affine, bend.affine, atol=1e-5, rtol=0)
        judge = sitk.ReadTransform(str(tmp_path / name))
        lps = np.array([-1.0, -1.0, 1.0])[: bend.dims]
        judged = [judge.TransformPoint((point * lps).tolist()) for point in inner(bend)]
        np.testing.assert_allclose(
            np.array([list(point) for point in judged]) * lps, bend.apply(inner(bend)), atol=1e-2
        )


def ramps(folder: Path, lowest: np.ndarray, highest: np.ndarray) -> tuple[list[Path], Grid]:
    """Images whose values are their own world coordinates, mm: moved, they tell from where each voxel was taken."""
    shape = tuple(int(n) for n in (highest - lowest) / 2 + 2)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = lowest
    paths = [folder / f"ramp{axis}.nii.gz" for axis in range(3)]
    for path, index, low in zip(paths, np.indices(shape), lowest, strict=True):
        nib.save(nib.Nifti1Image((2.0 * index + low).astype(np.float32), affine), path)
    return paths, Grid(shape, torch.from_numpy(affine))


def judged_by_ants(fixed: Path, images: list[Path], transforms: list[Path]) -> np.ndarray:
    ants = pytest.importorskip("ants")
    one, names = ants.image_read(str(fixed)), [str(path) for path in transforms]
    return np.stack([ants.apply_transforms(one, ants.image_read(str(p)), names).numpy() for p in images])


@pytest.mark.parametrize("name", ["warp.nii.gz", "warp.h5"])
def test_ants_moves_images_by_our_files(bend: Deformation, tmp_path: Path, name: str) -> None:
    if bend.dims == 2:
        pytest.skip("volumes are enough")
    bend.save(tmp_path / name)
    places = bend.apply(inner(bend))
    images, source = ramps(tmp_path, places.min(0) - 20, places.max(0) + 20)
    target = Grid((20, 16, 14), bend.grid.affine @ torch.tensor(np.diag([1.2, 1.2, 1.2, 1.0])))
    nib.save(nib.Nifti1Image(np.zeros(target.shape, np.float32), target.affine.numpy()), tmp_path / "fixed.nii.gz")
    judged = judged_by_ants(tmp_path / "fixed.nii.gz", images, [tmp_path / name])
    values = torch.from_numpy(np.stack([np.asarray(nib.load(path).dataobj) for path in images]))
    ours = bend.resample(values, source, target)
    np.testing.assert_allclose(ours.numpy(), judged, atol=1e-2)


def test_we_move_images_by_files_of_ants(volumes, tmp_path: Path) -> None:
    ants = pytest.importorskip("ants")
    moving = pooled(volumes.t1, 2)
    fixed = bent(moving, waves(moving.shape[1:], 1.5, 4))
    for name, image in (("fixed", fixed), ("moving", moving)):
        nib.save(
            nib.Nifti1Image(image.as_tensor()[0].float().numpy(), image.affine.numpy()), tmp_path / f"{name}.nii.gz"
        )
    names = tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz"
    pair = [ants.image_read(str(path)) for path in names]
    few = {"aff_iterations": (20, 20), "aff_shrink_factors": (2, 1), "aff_smoothing_sigmas": (1, 0)}
    options = {"type_of_transform": "SyN", "reg_iterations": (8,), "random_seed": 1, "outprefix": f"{tmp_path}/a"}
    field, matrix = map(Path, ants.registration(*pair, **options, **few)["fwdtransforms"])
    whole = Path(ants.registration(*pair, **options, **few, write_composite_transform=True)["fwdtransforms"])
    affine = moving.affine.numpy()
    corners = affine[:3, 3], (affine @ [*[n - 1 for n in fixed.shape[1:]], 1])[:3]
    images, source = ramps(tmp_path, np.minimum(*corners) - 10, np.maximum(*corners) + 10)
    values = torch.from_numpy(np.stack([np.asarray(nib.load(path).dataobj) for path in images]))
    # beyond its edge ITK's field ends and ours goes on
    inside = (slice(None), *[slice(2, -2)] * 3)
    for files in ([field, matrix], [whole]):
        judged = judged_by_ants(names[0], images, files)
        found = compose_transforms([str(path) for path in files])
        assert float(found.displacement.norm(dim=0).max()) > 0.5
        ours = found.resample(values, source, Grid.of(fixed)).numpy()
        np.testing.assert_allclose(ours[inside], judged[inside], atol=1e-2)


# ---------------------------------------------------------------------------------------------------- kind of transform


def test_register_gives_the_map_and_what_it_moves(slices, tmp_path: Path) -> None:
    field = waves(slices.t2.shape[1:], 6, 20)
    fixed = bent(slices.t1, field)
    result = monai_zsreg.register(fixed, slices.t2, transform="deformable", stiffness=3.0)
    assert result.verdict == "PASS" and result.transform == "deformable"
    points = apply_affine(Grid.of(fixed).affine, torch.nonzero(fixed.as_tensor()[0] > 100)[::50].double()).numpy()
    index = np.linalg.inv(Grid.of(fixed).affine.numpy())
    index = points @ index[:2, :2].T + index[:2, 2]
    truth = points + np.stack([ndimage.map_coordinates(f, index.T, order=1) for f in field], 1)
    off = np.linalg.norm(result.apply(points) - truth, axis=1)
    assert np.median(off) < 0.5 * np.median(np.linalg.norm(points - truth, axis=1))
    np.testing.assert_allclose(result.inverse().apply(result.apply(points)), points, atol=1e-3)
    # images by the same map, once
    grid = Grid.of(fixed)
    moved = result.deformation.resample(slices.t2.as_tensor(), Grid.of(slices.t2), grid)
    torch.testing.assert_close(result.moved.as_tensor(), moved)
    torch.testing.assert_close(result.apply(slices.t2).as_tensor(), moved)
    assert result.displacement.shape == (2, *result.jacobian().shape[1:])
    assert float(result.jacobian().min()) > 0
    assert np.isinf(result.uncertainty_at(points)).all() and bool(torch.isinf(result.expected_error()).all())
    result.save_transform(tmp_path / "warp.nii.gz")
    np.testing.assert_allclose(
        Deformation.load(tmp_path / "warp.nii.gz").apply(points), result.apply(points), atol=1e-2
    )
    with pytest.raises(RegistrationError, match="format"):
        result.save_transform(tmp_path / "warp.txt", "text")


def test_only_the_deformable_kind_has_a_displacement(slices) -> None:
    result = monai_zsreg.register(slices.t1, slices.t1, transform="rigid", search="none")
    with pytest.raises(RegistrationError, match="deformable"):
        result.inverse()
    with pytest.raises(RegistrationError, match="transform"):
        monai_zsreg.register(slices.t1, slices.t1, preset="keypoints", transform="deformable")
    with pytest.raises(RegistrationError, match="stiffness"):
        monai_zsreg.register(slices.t1, slices.t1, transform="deformable", stiffness=-1.0)


@pytest.mark.filterwarnings("ignore:registration failed")
@pytest.mark.parametrize("wrong", ["noise", "mirrored", "turned", "another part"])
def test_deforming_makes_no_wrong_pose_right(slices, wrong: str) -> None:
    fixed, values = slices.t1, slices.t2.as_tensor()
    smooth = ndimage.gaussian_filter(np.random.default_rng(4).standard_normal(values.shape[1:]), 3)
    moving = {
        "noise": 1000 * torch.from_numpy(smooth).float()[None] * (values > 0),
        "mirrored": values.flip(1),
        "turned": values.flip(1, 2),
        "another part": values.roll(values.shape[2] // 3, 2),
    }[wrong]
    # the engine may not look for the right pose
    pair = fixed, MetaTensor(moving, affine=fixed.affine)
    before = monai_zsreg.register(*pair, search="none")
    result = monai_zsreg.register(*pair, search="none", transform="deformable", stiffness=0.5)
    assert result.verdict != "PASS" and result.reasons
    ranks = ("PASS", "WARN", "FAIL")
    assert ranks.index(result.verdict) >= ranks.index(before.verdict)
    assert result.score <= before.score


@pytest.mark.filterwarnings("ignore:registration failed")
def test_a_better_look_is_told_to_be_no_evidence(slices) -> None:
    field = waves(slices.t1.shape[1:], 14, 12, seed=5)
    pair = bent(slices.t1, field), slices.t1
    before = monai_zsreg.register(*pair, search="none", initial=turn(slices.t1, 4, (6.0, 0.0)))
    result = monai_zsreg.register(
        *pair, search="none", initial=turn(slices.t1, 4, (6.0, 0.0)), transform="deformable", stiffness=1.0
    )
    assert result.measures["cost"] < before.measures["cost"]
    assert before.verdict != "PASS"
    assert result.verdict == before.verdict
    assert any(reason.startswith("before it was deformed: ") for reason in result.reasons)
