# SPDX-License-Identifier: Apache-2.0
"""Each peer's transform, converted to our convention, lands where the peer itself says and where the truth is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from monai_zsreg.benchmark.peers import SIFT, ANTs, Elastix, Identity, Options, SimpleElastix, make_methods
from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid, itk_lattice

OPTIONS = Options(threads=1)
# mm; the peers end 0.1 to 1.5 mm off on this small scene, a flipped axis or an inverse at least 6
WRONG_SIGN_WOULD_EXCEED = 3.0


def _scene(points: np.ndarray) -> np.ndarray:
    """A smooth pattern of world coordinates, asymmetric in every axis."""
    total = np.zeros(points.shape[:-1])
    rng = np.random.default_rng(3)
    dims = points.shape[-1]
    for _ in range(40):
        center, width = rng.uniform(-28, 28, dims), rng.uniform(4, 8)
        total += rng.uniform(0.4, 1.0) * np.exp(-(((points - center) / width) ** 2).sum(-1) / 2)
    return total * (np.linalg.norm(points, axis=-1) < 48)


def _grid(dims: int, angle: float, spacing: tuple[float, ...], flip: bool) -> Grid:
    """Oblique, anisotropic and (with ``flip``) left-handed lattice over 110 mm around the world's origin."""
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.eye(dims)
    rotation[:2, :2] = [[cos, -sin], [sin, cos]]
    if dims == 3:
        rotation = rotation @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    if flip:
        rotation[:, 0] *= -1
    shape = tuple(int(110 / s) for s in spacing)
    affine = np.eye(dims + 1)
    affine[:dims, :dims] = rotation @ np.diag(spacing)
    affine[:dims, dims] = -affine[:dims, :dims] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, torch.from_numpy(affine))


def _image(grid: Grid, pull_back: np.ndarray | None = None) -> MetaTensor:
    """The scene on a grid, sampled at ``pull_back(world)``."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), -1).astype(float)
    dims = grid.dims
    world = index @ grid.affine[:dims, :dims].numpy().T + grid.affine[:dims, dims].numpy()
    if pull_back is not None:
        world = world @ pull_back[:dims, :dims].T + pull_back[:dims, dims]
    affine = torch.eye(4, dtype=torch.float64)
    affine[:dims, :dims] = grid.affine[:dims, :dims]
    affine[:dims, 3] = grid.affine[:dims, dims]
    return MetaTensor(torch.from_numpy(_scene(world).astype(np.float32) * 100)[None], affine=affine)


def _case(dims: int) -> tuple[MetaTensor, MetaTensor, np.ndarray]:
    truth = np.eye(dims + 1)
    angle = math.radians(4)
    truth[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    truth[:dims, dims] = [5.0, -3.0, 2.0][:dims]
    fixed = _image(_grid(dims, 0.15, (1.0, 1.4) if dims == 2 else (2.0, 2.4, 3.0), flip=True))
    moving = _image(_grid(dims, -0.1, (1.2, 1.0) if dims == 2 else (2.2, 2.0, 2.7), flip=False), np.linalg.inv(truth))
    return fixed, moving, truth


def _error(matrix: np.ndarray, truth: np.ndarray) -> float:
    dims = len(truth) - 1
    points = np.random.default_rng(0).uniform(-35, 35, (200, dims))
    gap = (matrix - truth)[:dims]
    return float(np.linalg.norm(points @ gap[:, :dims].T + gap[:, dims], axis=1).max())


def _flip(point: np.ndarray) -> np.ndarray:
    return np.concatenate([-point[:2], point[2:]])


@pytest.mark.slow  # loading elastix takes most of it
@pytest.mark.parametrize("dims", [2, 3])
def test_elastix_matrix_is_its_own_transform(dims: int) -> None:
    itk = pytest.importorskip("itk")
    pytest.importorskip("itk.elxParameterObjectPython")
    fixed, moving, truth = _case(dims)
    method = Elastix(OPTIONS, "default")
    images = method.prepare(fixed, moving)
    done = method.align(images)
    matrix = method.convert(done)
    assert _error(matrix, truth) < WRONG_SIGN_WOULD_EXCEED
    own = done.ConvertToItkTransform(done.GetCombinationTransform())
    for point in np.random.default_rng(1).uniform(-30, 30, (5, dims)):
        theirs = np.array(own.TransformPoint(itk.Point[itk.D, dims](_flip(point).tolist())))
        assert np.allclose(_flip(theirs), matrix[:dims, :dims] @ point + matrix[:dims, dims], atol=1e-3)


@pytest.mark.parametrize("dims", [2, 3])
def test_ants_matrix_is_its_own_transform(dims: int) -> None:
    pytest.importorskip("ants")
    fixed, moving, truth = _case(dims)
    method = ANTs(OPTIONS, "default")
    images = method.prepare(fixed, moving)
    own = method.align(images)
    matrix = method.convert(own)
    assert _error(matrix, truth) < WRONG_SIGN_WOULD_EXCEED
    for point in np.random.default_rng(1).uniform(-30, 30, (5, dims)):
        theirs = np.array(own.apply_to_point(_flip(point).tolist()))
        assert np.allclose(_flip(theirs), matrix[:dims, :dims] @ point + matrix[:dims, dims], atol=1e-3)


@pytest.mark.parametrize("dims", [2, 3])
def test_simpleelastix_matrix_is_its_own_transform(dims: int) -> None:
    if make_methods(["simpleelastix"], OPTIONS)[1]:
        pytest.skip("SimpleITK-SimpleElastix is not installed")
    fixed, moving, truth = _case(dims)
    method = SimpleElastix(OPTIONS, "mass")
    points = np.random.default_rng(1).uniform(-30, 30, (5, dims))
    method.points = [_flip(point).tolist() for point in points]
    try:
        matrix, seconds = method.timed(method.prepare(fixed, moving))
    finally:
        method.close()
    assert seconds > 0
    assert _error(matrix, truth) < WRONG_SIGN_WOULD_EXCEED
    theirs = np.stack([_flip(np.array(p)) for p in method.mapped])
    assert np.allclose(theirs, points @ matrix[:dims, :dims].T + matrix[:dims, dims], atol=1e-3)


def test_sift_on_a_textured_pair() -> None:
    pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    texture = ndimage.gaussian_filter(rng.normal(size=(260, 240)), 2.0)
    truth = np.array([[math.cos(0.3), -math.sin(0.3), 12.0], [math.sin(0.3), math.cos(0.3), -7.0], [0, 0, 1]])
    grid = Grid(texture.shape, torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)))
    # indices of this grid are half its millimeters
    pull = np.linalg.inv(np.linalg.inv(grid.affine.numpy()) @ truth @ grid.affine.numpy())
    moved = ndimage.affine_transform(texture, pull[:2, :2], pull[:2, 2], order=3)
    affine = torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    fixed, moving = (MetaTensor(torch.from_numpy(a.astype(np.float32))[None], affine=affine) for a in (texture, moved))
    assert _error(SIFT(OPTIONS).run((fixed, moving)), truth) < 1.0
    blank = MetaTensor(torch.zeros(fixed.shape), affine=affine)
    with pytest.raises(RuntimeError, match="keypoints"):
        SIFT(OPTIONS).run((fixed, blank))


def test_none_is_the_identity() -> None:
    fixed, moving, _ = _case(3)
    assert np.array_equal(Identity(OPTIONS).timed((fixed, moving))[0], np.eye(4))


def test_lattice_agrees_with_itk() -> None:
    itk = pytest.importorskip("itk")
    from monai_zsreg.benchmark.peers import _itk_image

    image = _case(3)[0]
    grid = Grid.of(image)
    made = _itk_image(image)
    index = [3, 7, 11]
    physical = np.array(made.TransformIndexToPhysicalPoint(index))
    world = grid.affine.numpy() @ [*index, 1]
    assert np.allclose(_flip(physical), world[:3], atol=1e-6)
    assert made.GetPixel(index) == pytest.approx(float(image[0, 3, 7, 11]))
    assert itk.size(made)[0] == grid.shape[0]
    assert np.allclose(itk_lattice(grid)[0], grid.spacing)


def test_unknown_method() -> None:
    with pytest.raises(RegistrationError, match="methods"):
        make_methods(["flirt"], OPTIONS)
    with pytest.raises(RegistrationError, match="methods"):
        make_methods(["elastix/nowhere"], OPTIONS)
    with pytest.raises(RegistrationError, match="methods"):
        make_methods(["ours"], OPTIONS)
    methods, _ = make_methods(["none", "ours:paper"], OPTIONS)
    assert [m.name for m in methods] == ["none", "ours:paper"]
