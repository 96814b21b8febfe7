# SPDX-License-Identifier: Apache-2.0
"""Laws that coordinate conversions must obey, and other tools as judges: torch, NumPy, nibabel and ITK."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from nibabel.affines import apply_affine as nibabel_apply
from nibabel.affines import voxel_sizes
from phantoms import diagonal, sitk_affine, sitk_image, sitk_moved

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import (
    AffineParameters,
    Grid,
    apply_affine,
    checked_affine,
    checked_matrix,
    compose_parameters,
    decompose_affine,
    flip_points,
    fraction_inside,
    homogeneous,
    lattice_index,
    lps_to_ras,
    moved_header,
    nearest_axes,
    pooled_grid,
    ras_to_lps,
)

DIMS = st.sampled_from([2, 3])
quick = settings(max_examples=40, deadline=None)


def numbers(low: float, high: float, count: int) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(*[st.floats(low, high)] * count)


@st.composite
def parameters(draw: st.DrawFn, dims: int | None = None, widest: float = 85.0) -> AffineParameters:
    """Any rotation within ``widest`` degrees an axis, scales from a half to two, some shear."""
    dims = draw(DIMS) if dims is None else dims
    count = dims * (dims - 1) // 2
    return AffineParameters(
        translation=draw(numbers(-100, 100, dims)),
        rotation_deg=draw(numbers(-widest, widest, count)),
        scale=draw(numbers(0.5, 2.0, dims)),
        shear=draw(numbers(-0.5, 0.5, count)),
        center=draw(numbers(-100, 100, dims)),
    )


@st.composite
def transforms(draw: st.DrawFn, dims: int) -> torch.Tensor:
    return torch.as_tensor(compose_parameters(draw(parameters(dims))))


@st.composite
def grids(draw: st.DrawFn, dims: int) -> Grid:
    """Oblique, sheared, anisotropic; half of them left-handed."""
    affine = draw(transforms(dims))
    affine[:dims, 0] *= draw(st.sampled_from([-1.0, 1.0]))
    return Grid(tuple(draw(st.tuples(*[st.integers(2, 40)] * dims))), affine)


def some_points(dims: int, count: int = 7) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(dims).uniform(-50, 50, (count, dims)))


# ------------------------------------------------------------------------------------------------------------ matrices


@quick
@given(st.data(), DIMS)
def test_apply_agrees_with_nibabel_and_matrix_products(data: st.DataObject, dims: int) -> None:
    outer, inner = data.draw(transforms(dims)), data.draw(transforms(dims))
    points = some_points(dims)
    for matrix in (outer, outer[:dims]):
        np.testing.assert_allclose(
            apply_affine(matrix, points), nibabel_apply(outer.numpy(), points.numpy()), atol=1e-9
        )
    composed = homogeneous(outer[:dims]) @ homogeneous(inner[:dims])
    np.testing.assert_allclose(
        apply_affine(composed, points), apply_affine(outer, apply_affine(inner, points)), atol=1e-8
    )
    inverse = torch.linalg.inv(inner)
    np.testing.assert_allclose(apply_affine(inverse, apply_affine(inner, points)), points, atol=1e-8)


def test_batches() -> None:
    matrices = torch.stack([torch.as_tensor(compose_parameters(p)) for p in PARAMETERS[3]])
    points = torch.stack([some_points(3) + i for i in range(len(matrices))])
    together = apply_affine(matrices[:, :3], points)
    for matrix, few, mapped in zip(matrices, points, together, strict=True):
        torch.testing.assert_close(mapped, apply_affine(matrix, few))
    assert homogeneous(matrices[:, :3]).equal(matrices)


PARAMETERS = {
    2: [
        AffineParameters((3.0, -2.0), (14.0,), (1.05, 0.93), (0.06,), (5.0, -4.0)),
        AffineParameters((-30.0, 20.0), (-150.0,), (0.6, 1.9), (-0.4,), (50.0, 40.0)),
    ],
    3: [
        AffineParameters(
            (3.0, -2.0, 4.0), (10.0, -14.0, 8.0), (1.05, 0.93, 1.02), (0.06, -0.03, 0.02), (5.0, -4.0, 9.0)
        ),
        AffineParameters((0.0, 1.0, 2.0), (170.0, 60.0, -100.0), (0.6, 1.9, 1.0), (0.3, -0.4, 0.2), (0.0, 0.0, 0.0)),
    ],
}


# --------------------------------------------------------------------------------------------------------------- grids


@quick
@given(st.data(), DIMS)
def test_grid_agrees_with_nibabel(data: st.DataObject, dims: int) -> None:
    grid = data.draw(grids(dims))
    np.testing.assert_allclose(grid.spacing, voxel_sizes(grid.affine.numpy()), rtol=1e-9)
    middle = nibabel_apply(grid.affine.numpy(), [(n - 1) / 2 for n in grid.shape])
    np.testing.assert_allclose(grid.center, middle, atol=1e-9)
    corners = np.stack(np.meshgrid(*[[-0.5, n - 0.5] for n in grid.shape]), -1).reshape(-1, dims)
    np.testing.assert_allclose(grid.extent, np.ptp(nibabel_apply(grid.affine.numpy(), corners), axis=0), rtol=1e-9)
    assert grid.same_as(grid)
    shifted = grid.affine.clone()
    shifted[0, dims] += 0.01
    assert not grid.same_as(Grid(grid.shape, shifted))
    assert grid.same_as(Grid(grid.shape, shifted), tolerance=0.02)
    assert not grid.same_as(Grid((grid.shape[0] + 1, *grid.shape[1:]), grid.affine))


def test_grid_of_images() -> None:
    affine = torch.as_tensor(compose_parameters(PARAMETERS[3][0]))
    assert Grid.of(MetaTensor(torch.zeros(2, 3, 4, 5), affine=affine)).shape == (3, 4, 5)
    assert Grid.of(MetaTensor(torch.zeros(2, 3, 4, 5), affine=affine)).affine.equal(affine)
    flat = Grid.of(MetaTensor(torch.zeros(1, 3, 4), affine=torch.diag(torch.tensor([2.0, 3.0, 9.0, 1.0]))))
    assert flat.affine.equal(torch.diag(torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64)))
    assert Grid.of(torch.zeros(1, 3, 4)).affine.equal(torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 4),
        torch.zeros(1, 1, 3, 4, 5),
        MetaTensor(torch.zeros(1, 3, 4, 5), affine=torch.zeros(4, 4)),
        MetaTensor(torch.zeros(1, 3, 4, 5), affine=torch.full((4, 4), math.nan)),
        MetaTensor(torch.zeros(1, 3, 4, 5), affine=torch.diag(torch.tensor([1e29, 1.0, 1.0, 1.0]))),
    ],
    ids=["no channel", "batch", "singular", "nan", "huge"],
)
def test_grid_refuses(image: torch.Tensor) -> None:
    with pytest.raises(RegistrationError, match="^scan"):
        Grid.of(image, "scan")


@quick
@given(st.data(), DIMS)
def test_an_index_pull_makes_grid_sample_look_where_it_says(data: st.DataObject, dims: int) -> None:
    """An image of its own voxel indices, sampled, shows the index that each fixed voxel was sent to."""
    fixed, moving = data.draw(grids(dims)), data.draw(grids(dims))
    # to somewhere in the moving image
    linear = 0.2 * torch.as_tensor(compose_parameters(data.draw(parameters(dims))))
    linear[:dims, dims] = torch.tensor(moving.shape) / 2.0
    linear[dims] = torch.eye(dims + 1)[dims]
    transform = moving.affine @ linear @ torch.linalg.inv(fixed.affine)
    index = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in fixed.shape])
    moved_world = nibabel_apply(transform.numpy(), nibabel_apply(fixed.affine.numpy(), index.numpy()))
    expected = nibabel_apply(np.linalg.inv(moving.affine.numpy()), moved_world)
    pulled = apply_affine(fixed.index_pull(transform, moving), index)
    np.testing.assert_allclose(pulled, expected, rtol=1e-7, atol=1e-6)
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in moving.shape], indexing="ij")
    where = apply_affine(moving.from_world, torch.as_tensor(moved_world))
    sampled = torch.nn.functional.grid_sample(
        torch.stack(axes)[None],
        where.view(1, *[1] * (dims - 1), -1, dims),
        padding_mode="border",
        align_corners=False,
    ).view(dims, -1)
    limits = np.array(moving.shape)[:, None] - 1.0
    np.testing.assert_allclose(sampled, expected.T.clip(0, limits), atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 4), (3, 1, 7)])
def test_numbers_of_lattice_points(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    index = lattice_index(numbers, shape)
    assert index.shape == (*shape, len(shape))
    assert torch.equal(numbers[tuple(index.movedim(-1, 0))], numbers)


@quick
@given(st.data(), DIMS)
def test_a_pooled_grid_lies_where_its_blocks_do(data: st.DataObject, dims: int) -> None:
    grid = data.draw(grids(dims))
    factors = [min(n, f) for n, f in zip(grid.shape, data.draw(st.tuples(*[st.integers(1, 4)] * dims)), strict=True)]
    pooled = pooled_grid(grid, factors)
    assert pooled.shape == tuple(n // f for n, f in zip(grid.shape, factors, strict=True))
    # the mean of the first block's voxels, and the last whole one's
    for block in ([0] * dims, [n - 1 for n in pooled.shape]):
        inside = np.stack(np.meshgrid(*[b * f + np.arange(f) for b, f in zip(block, factors, strict=True)]), -1)
        mean = nibabel_apply(grid.affine.numpy(), inside.reshape(-1, dims)).mean(0)
        np.testing.assert_allclose(nibabel_apply(pooled.affine.numpy(), block), mean, atol=1e-8)


@quick
@given(st.data(), DIMS)
def test_nearest_axes_are_orthonormal_and_those_of_a_grid_without_shear(data: st.DataObject, dims: int) -> None:
    grid = data.draw(grids(dims))
    axes = nearest_axes(grid)
    torch.testing.assert_close(axes @ axes.mT, torch.eye(dims).double())
    assert torch.linalg.det(axes) * torch.linalg.det(grid.affine) > 0
    straight = torch.eye(dims + 1, dtype=torch.float64)
    straight[:dims, :dims] = axes * torch.tensor([0.5, 2.0, 3.0][:dims])
    torch.testing.assert_close(nearest_axes(Grid(grid.shape, straight)), axes)


def test_fraction_inside() -> None:
    one, half = Grid((40, 40), torch.eye(3).double()), Grid((20, 40), torch.eye(3).double())
    eye = torch.eye(3, dtype=torch.float64)
    assert fraction_inside(one, one, eye) == 1.0 == fraction_inside(half, one, eye)
    assert fraction_inside(one, half, eye) == pytest.approx(0.5, abs=0.05)
    away = eye.clone()
    away[1, 2] = 100.0
    assert fraction_inside(one, one, away) == 0.0


def test_grids_can_be_compared() -> None:
    affine = torch.as_tensor(compose_parameters(PARAMETERS[3][0]))
    one, same = Grid((3, 4, 5), affine), Grid((3, 4, 5), affine.clone())
    assert one == same and hash(one) == hash(same) and one in [same] and len({one, same}) == 1
    assert one != Grid((3, 4, 6), affine) and one != Grid((3, 4, 5), 2 * affine) and one != "a grid"


@pytest.mark.parametrize("size", [1e-7, 1e-4, 1.0, 1e6])
def test_voxels_of_any_size_are_no_singular_matrix(size: float) -> None:
    affine = torch.diag(torch.tensor([size, size, 3 * size, 1.0], dtype=torch.float64))
    assert checked_affine(affine, 3, "scan").equal(affine)
    with pytest.raises(RegistrationError, match="^scan.affine"):
        flat = affine.clone()
        flat[:, 1] = affine[:, 0]
        checked_affine(flat, 3, "scan")


def test_matrices_of_users() -> None:
    matrix = compose_parameters(PARAMETERS[3][0])
    for given_matrix in (matrix, matrix.tolist(), torch.as_tensor(matrix), matrix.astype(np.float32)):
        np.testing.assert_allclose(checked_matrix(given_matrix, 3, "initial"), matrix, rtol=1e-6)
    matrix[3, 0] = 1e-13
    found = checked_matrix(matrix, 3, "initial")
    assert found[3].tolist() == [0.0, 0.0, 0.0, 1.0] and matrix[3, 0] == 1e-13
    for wrong in (np.eye(3), np.zeros((4, 4)), np.full((4, 4), np.nan), np.ones((4, 4)), "a file", None):
        with pytest.raises(RegistrationError, match="^initial: "):
            checked_matrix(wrong, 3, "initial")


# ---------------------------------------------------------------------------------------------------------------- files


@quick
@given(st.data(), DIMS)
def test_moved_header_shows_each_voxel_where_the_inverse_puts_it(data: st.DataObject, dims: int) -> None:
    grid, transform = data.draw(grids(dims)), data.draw(transforms(dims))
    index = some_points(dims)
    header = moved_header(grid.affine, transform)
    placed = nibabel_apply(header.numpy(), index.numpy())
    np.testing.assert_allclose(
        nibabel_apply(transform.numpy(), placed),
        nibabel_apply(grid.affine.numpy(), index.numpy()),
        rtol=1e-7,
        atol=1e-6,
    )
    if dims == 2:
        full = torch.eye(4, dtype=torch.float64)
        full[:2, :2], full[:2, 3] = grid.affine[:2, :2], grid.affine[:2, 2]
        moved = moved_header(full, transform)
        torch.testing.assert_close(moved[[0, 1, 3]][:, [0, 1, 3]], header)
        assert moved[2].tolist() == [0.0, 0.0, 1.0, 0.0] and moved[:2, 2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("case", [0, 1])
def test_itk_puts_the_moved_header_where_it_puts_the_transform(dims: int, case: int) -> None:
    """Two ways for ITK: resample through the transform, or through nothing an image with the moved header."""
    shape = (17, 12, 9)[:dims]
    affine = torch.as_tensor(compose_parameters(PARAMETERS[dims][1 - case]))
    affine[:dims, 0] *= -1
    affine[:dims, dims] = -affine[:dims, :dims] @ torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    transform = torch.as_tensor(compose_parameters(PARAMETERS[dims][case]))
    transform[:dims, dims] = torch.tensor([1.0, -2.0, 0.5])[:dims]
    voxels = torch.zeros(1, *shape)
    voxels[(slice(None),) + (slice(2, -2),) * dims] = torch.rand(1, *[n - 4 for n in shape])
    fixed = sitk_image(MetaTensor(torch.zeros(1, *[20] * dims), affine=diagonal(*[0.8] * dims)))

    def resample(header: torch.Tensor, matrix: np.ndarray) -> np.ndarray:
        return sitk_moved(sitk_image(MetaTensor(voxels, affine=header)), fixed, sitk_affine(matrix))

    through_transform = resample(affine, transform.numpy())
    through_header = resample(moved_header(affine, transform), np.eye(dims + 1))
    assert (through_transform > 0).mean() > 0.02
    np.testing.assert_allclose(through_header, through_transform, atol=1e-3)


@quick
@given(st.data(), DIMS)
def test_lps(data: st.DataObject, dims: int) -> None:
    transform, points = data.draw(transforms(dims)).numpy(), some_points(dims).numpy()
    lps = ras_to_lps(transform)
    np.testing.assert_array_equal(lps_to_ras(lps), transform)
    np.testing.assert_array_equal(flip_points(flip_points(points)), points)
    np.testing.assert_allclose(
        nibabel_apply(lps, flip_points(points)), flip_points(nibabel_apply(transform, points)), atol=1e-9
    )


def test_flip_points_goes_from_nibabel_to_itk(tmp_path) -> None:
    affine = compose_parameters(PARAMETERS[3][0])
    affine[:3, :3] = affine[:3, :3] @ np.linalg.inv(np.linalg.cholesky(affine[:3, :3].T @ affine[:3, :3]).T)
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), affine), tmp_path / "i.nii")
    image = sitk.ReadImage(str(tmp_path / "i.nii"))
    itk_point = np.array(image.TransformIndexToPhysicalPoint([3, 1, 5]))
    np.testing.assert_allclose(flip_points(nibabel_apply(affine, [[3, 1, 5]]))[0], itk_point, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- parameters


@quick
@given(parameters())
def test_parameters_survive_a_round_trip(given_parameters: AffineParameters) -> None:
    matrix = compose_parameters(given_parameters)
    found = decompose_affine(matrix, given_parameters.center)
    for name in ("translation", "rotation_deg", "scale", "shear", "center"):
        np.testing.assert_allclose(getattr(found, name), getattr(given_parameters, name), atol=1e-6, err_msg=name)


@quick
@given(st.data(), DIMS)
def test_every_matrix_of_positive_determinant_survives_a_round_trip(data: st.DataObject, dims: int) -> None:
    numbers = st.floats(-3, 3, allow_subnormal=False)  # NumPy's determinant warns of the others
    entries = data.draw(st.lists(numbers, min_size=dims * (dims + 1), max_size=dims * (dims + 1)))
    matrix = np.eye(dims + 1)
    matrix[:dims] = np.reshape(entries, (dims, dims + 1))
    matrix[0] *= np.sign(np.linalg.det(matrix)) or 1.0
    assume(np.linalg.det(matrix) > 1e-3)
    found = decompose_affine(matrix, (4.0, -5.0, 6.0)[:dims])
    assert min(found.scale) > 0
    np.testing.assert_allclose(compose_parameters(found), matrix, atol=1e-7)
    np.testing.assert_allclose(compose_parameters(decompose_affine(torch.as_tensor(matrix))), matrix, atol=1e-7)


@quick
@given(parameters(widest=179.0))
def test_angle_is_that_of_the_rotation(given_parameters: AffineParameters) -> None:
    dims = len(given_parameters.scale)
    rigid = AffineParameters(
        (0.0,) * dims, given_parameters.rotation_deg, (1.0,) * dims, (0.0,) * len(given_parameters.shear), (0.0,) * dims
    )
    rotation = compose_parameters(rigid)[:dims, :dims]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(dims), atol=1e-12)
    # the eigenvalues of a rotation are exp(i angle), its conjugate, and in 3D 1
    angle = np.degrees(np.abs(np.angle(np.linalg.eigvals(rotation))).max())
    np.testing.assert_allclose(given_parameters.angle_deg, angle, atol=1e-5)
    np.testing.assert_allclose(rigid.as_dict()["angle_deg"], angle, atol=1e-5)


def test_parameters_by_hand() -> None:
    quarter = compose_parameters(AffineParameters((1.0, 2.0), (90.0,), (2.0, 3.0), (0.0,), (10.0, 0.0)))
    # the center goes to the center plus the translation; one step along x from it becomes two along y
    np.testing.assert_allclose(quarter @ [10, 0, 1], [11, 2, 1], atol=1e-12)
    np.testing.assert_allclose(quarter @ [11, 0, 1], [11, 4, 1], atol=1e-12)
    np.testing.assert_allclose(quarter @ [10, 1, 1], [8, 2, 1], atol=1e-12)


@pytest.mark.parametrize("linear", [np.diag([-1.0, 1.0, 1.0]), np.diag([0.0, 1.0, 1.0]), np.full((3, 3), np.nan)])
def test_mirror_images_are_refused(linear: np.ndarray) -> None:
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    with pytest.raises(RegistrationError, match="^transform: .*positive determinant"):
        decompose_affine(matrix)
