# SPDX-License-Identifier: Apache-2.0
"""ITK transform files, judged by ITK: the same points and the same resampled voxels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage
from nibabel.affines import apply_affine
from phantoms import blobs, sitk_image, sitk_moved
from scipy import io as scipy_io

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import AffineParameters, Grid, compose_parameters
from monai_zsreg.io import read_transform, write_transform
from monai_zsreg.io.transforms import FORMATS
from monai_zsreg.transforms import ApplyAffineRegistration

AFFINE = {
    2: compose_parameters(AffineParameters((3.0, -2.0), (14.0,), (1.05, 0.93), (0.06,), (5.0, -4.0))),
    3: compose_parameters(
        AffineParameters(
            (3.0, -2.0, 4.0), (10.0, -14.0, 8.0), (1.05, 0.93, 1.02), (0.06, -0.03, 0.02), (5.0, -4.0, 9.0)
        )
    ),
}


def oblique(shape: tuple[int, ...], spacing: tuple[float, ...], flips: tuple[float, ...], deg: float) -> np.ndarray:
    """Header of an oblique, anisotropic image around the world's origin; one negative flip makes it left-handed."""
    dims = len(shape)
    angles, shear, zero = (deg,) * (1 if dims == 2 else 3), (0.0,) * (dims * (dims - 1) // 2), (0.0,) * dims
    affine = compose_parameters(AffineParameters(zero, angles, spacing, shear, zero))
    affine[:dims, :dims] *= flips
    affine[:dims, dims] = affine[:dims, :dims] @ [(1 - n) / 2 for n in shape] + np.arange(1, dims + 1)
    return affine


SHAPES = {2: ((26, 31), (37, 22)), 3: ((26, 31, 14), (37, 22, 25))}
PAIRS = {
    2: (oblique(SHAPES[2][0], (1.2, 0.9), (1.0, -1.0), 20.0), oblique(SHAPES[2][1], (0.8, 1.5), (-1.0, 1.0), -33.0)),
    3: (
        oblique(SHAPES[3][0], (1.2, 0.9, 2.0), (1.0, -1.0, 1.0), 12.0),
        oblique(SHAPES[3][1], (0.8, 1.5, 1.1), (-1.0, 1.0, 1.0), -9.0),
    ),
}


def pair(dims: int) -> tuple[MetaTensor, MetaTensor]:
    return tuple(  # type: ignore[return-value]
        MetaTensor(torch.as_tensor(blobs(shape, seed))[None], affine=torch.as_tensor(affine))
        for seed, (shape, affine) in enumerate(zip(SHAPES[dims], PAIRS[dims], strict=True))
    )


def test_the_pairs_are_left_handed_and_oblique() -> None:
    for dims in (2, 3):
        for affine in PAIRS[dims]:
            assert np.linalg.det(affine) < 0
            assert (np.abs(affine[:dims, :dims]) > 0.05).all()


def judged(transform: Any, points: np.ndarray) -> np.ndarray:
    """Where a transform of ITK takes RAS points."""
    flip = np.array([-1.0, -1.0, 1.0][: points.shape[1]])
    return np.array([transform.TransformPoint((point * flip).tolist()) for point in points]) * flip


def maps_as(matrix: np.ndarray, transform: Any, within: float = 1e-9) -> None:
    points = np.random.default_rng(0).uniform(-100, 100, (8, len(matrix) - 1))
    np.testing.assert_allclose(apply_affine(matrix, points), judged(transform, points), atol=within)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("suffix", FORMATS["itk"].suffixes)
@pytest.mark.parametrize("centered", [False, True])
def test_round_trip_and_points(tmp_path: Path, dims: int, suffix: str, centered: bool) -> None:
    path = tmp_path / f"pair.v1{suffix}"
    fixed = pair(dims)[0] if centered else None
    write_transform(path, AFFINE[dims], fixed)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    np.testing.assert_allclose(read_transform(path), AFFINE[dims], rtol=0, atol=1e-12)
    transform = sitk.ReadTransform(str(path))
    maps_as(AFFINE[dims], transform)
    center = Grid.of(fixed).center.numpy() * [-1.0, -1.0, 1.0][:dims] if fixed is not None else np.zeros(dims)
    np.testing.assert_allclose(transform.GetFixedParameters(), center, atol=1e-9)


# class: dimension, parameters and fixed parameters
STATED = {
    "AffineTransform": [(2, 6, 2), (3, 12, 3)],
    "CenteredAffineTransform": [(2, 8, 2), (3, 15, 3)],
    "Euler2DTransform": [(2, 3, 2)],
    "Rigid2DTransform": [(2, 3, 2)],
    "CenteredRigid2DTransform": [(2, 5, 0)],
    "Similarity2DTransform": [(2, 4, 2)],
    "CenteredSimilarity2DTransform": [(2, 6, 0)],
    "Euler3DTransform": [(3, 6, 3), (3, 6, 4)],
    "CenteredEuler3DTransform": [(3, 9, 3), (3, 9, 4)],
    "VersorTransform": [(3, 3, 3)],
    "VersorRigid3DTransform": [(3, 6, 3)],
    "QuaternionRigidTransform": [(3, 7, 3)],
    "Similarity3DTransform": [(3, 7, 3)],
    "ScaleVersor3DTransform": [(3, 9, 3)],
    "ScaleSkewVersor3DTransform": [(3, 15, 3)],
    "ComposeScaleSkewVersor3DTransform": [(3, 12, 3)],
    "ScaleTransform": [(2, 2, 2), (3, 3, 3)],
    "TranslationTransform": [(2, 2, 0), (3, 3, 0)],
    "IdentityTransform": [(2, 0, 0), (3, 0, 0)],
}


@pytest.mark.parametrize("kind", STATED)
def test_reads_every_linear_kind_as_itk_does(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    for dims, count, fixed in STATED[kind]:
        # small numbers: the vector of a rotation has a length below one
        values = rng.uniform(0.1, 0.5, count)
        if kind == "QuaternionRigidTransform":
            values[:4] /= np.linalg.norm(values[:4])
        numbers = " ".join(map(repr, values.tolist()))
        center = " ".join(map(repr, [*rng.uniform(-20, 20, min(fixed, 3)).tolist(), 1.0][:fixed]))
        text = f"Transform: {kind}_double_{dims}_{dims}\nParameters: {numbers}\nFixedParameters: {center}"
        path = write_itk(tmp_path / "t.tfm", text)
        # SimpleITK has a name for a composite, but not for all that may be in it
        whole = write_itk(tmp_path / "whole.tfm", COMPOSITE.replace("3", str(dims)), text)
        maps_as(read_transform(path), sitk.ReadTransform(str(whole)), 1e-6)


MATRIX_OFFSET = {
    2: "Parameters: 0.9 -0.2 0.3 1.1 5 6\nFixedParameters: 10 20",
    3: "Parameters: 0.9 -0.2 0.1 0.3 1.1 0 0.05 0 1 5 6 7\nFixedParameters: 10 20 30",
}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("precision", ["double", "float"])
def test_reads_matrix_offset_transforms(tmp_path: Path, dims: int, precision: str) -> None:
    """Convert3D, ANTs' older tools and fMRIPrep write the base class of linear transforms, and Slicer a rigid one."""
    kind = f"MatrixOffsetTransformBase_{precision}_{dims}_{dims}"
    path = write_itk(tmp_path / "t.tfm", f"Transform: {kind}\n{MATRIX_OFFSET[dims]}")
    matrix = read_transform(path)
    maps_as(matrix, sitk.ReadTransform(str(path)), 1e-5)
    lines = dict(line.split(": ") for line in MATRIX_OFFSET[dims].splitlines())
    parts = [np.array(lines[key].split(), dtype=float) for key in ("Parameters", "FixedParameters")]
    stated = [(kind, parts[0]), ("fixed", parts[1])]
    (tmp_path / "t.mat").write_bytes(b"".join(matlab_array(*one) for one in stated))
    np.testing.assert_allclose(read_transform(tmp_path / "t.mat"), matrix, atol=1e-12)
    if dims == 3:
        rigid = write_itk(tmp_path / "rigid.tfm", f"Transform: Rigid3DTransform_{precision}_3_3\n{MATRIX_OFFSET[3]}")
        np.testing.assert_allclose(read_transform(rigid), matrix, atol=1e-12)


def matlab_array(name: str, values: np.ndarray) -> bytes:
    """Written by SciPy, which knows the format on its own."""
    file = io.BytesIO()
    scipy_io.savemat(file, {name: values[:, None]}, format="4")
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".TFM", ".Txt", ".MAT", ".H5"])
def test_suffixes_in_capitals(tmp_path: Path, suffix: str) -> None:
    write_transform(tmp_path / f"t{suffix.lower()}", AFFINE[3])
    (tmp_path / f"t{suffix.lower()}").rename(tmp_path / f"t{suffix}")
    np.testing.assert_allclose(read_transform(tmp_path / f"t{suffix}"), AFFINE[3], atol=1e-12)


@pytest.mark.parametrize("suffix", [".mat", ".tfm", ".h5"])
def test_a_cut_file_is_our_error(tmp_path: Path, suffix: str) -> None:
    write_transform(tmp_path / f"whole{suffix}", AFFINE[3])
    content = (tmp_path / f"whole{suffix}").read_bytes()
    for length in (3, 21, len(content) // 2, len(content) - 9):
        (tmp_path / f"cut{suffix}").write_bytes(content[:length])
        if suffix == ".tfm" and length == len(content) - 9:
            continue  # a text that lost only its last digits cannot be told from a whole one
        with pytest.raises(RegistrationError, match="^path: "):
            read_transform(tmp_path / f"cut{suffix}")


@pytest.mark.parametrize("dims", [2, 3])
def test_itk_resamples_as_we_do(tmp_path: Path, dims: int) -> None:
    fixed, moving = pair(dims)
    write_transform(tmp_path / "pair.tfm", AFFINE[dims])
    transform = sitk.ReadTransform(str(tmp_path / "pair.tfm"))
    expected = sitk_moved(sitk_image(moving), sitk_image(fixed), transform)
    ours = ApplyAffineRegistration()(moving, AFFINE[dims], fixed)[0].numpy()
    assert (expected > 0).mean() > 0.2
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_itk_resamples_nifti_files_as_we_do(tmp_path: Path) -> None:
    """No MONAI on the judge's side: nibabel writes, ITK reads and resamples."""
    for name, image in zip(("fixed", "moving"), pair(3), strict=True):
        nib.save(nib.Nifti1Image(image[0].numpy(), image.affine.numpy()), tmp_path / f"{name}.nii.gz")
    write_transform(tmp_path / "pair.h5", AFFINE[3])
    images = [sitk.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in ("moving", "fixed")]
    expected = sitk_moved(*images, sitk.ReadTransform(str(tmp_path / "pair.h5")))
    load = LoadImage(ensure_channel_first=True, image_only=True)
    fixed, moving = load(tmp_path / "fixed.nii.gz"), load(tmp_path / "moving.nii.gz")
    ours = ApplyAffineRegistration()(moving, tmp_path / "pair.h5", fixed)[0].numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-3)


TRANSLATION = "Transform: TranslationTransform_double_3_3\nParameters: 5 6 7\nFixedParameters:"
COMPOSITE = "Transform: CompositeTransform_double_3_3\nParameters:\nFixedParameters:"
FIELD = "Transform: DisplacementFieldTransform_double_3_3\nParameters: 0 0 0\nFixedParameters: 1 1 1"


def write_itk(path: Path, *transforms: str) -> Path:
    body = "".join(f"#Transform {i}\n{t}\n" for i, t in enumerate(transforms))
    path.write_text("#Insight Transform File V1.0\n" + body)
    return path


def test_reads_a_composite_in_its_order(tmp_path: Path) -> None:
    first, second = sitk.TranslationTransform(3, (5.0, 6.0, 7.0)), sitk.Euler3DTransform()
    second.SetRotation(0.3, 0.2, -0.4)
    for name in ("c.h5", "c.tfm"):
        sitk.WriteTransform(sitk.CompositeTransform([first, second]), str(tmp_path / name))
        affine = read_transform(tmp_path / name)
        # of a composite, the transform that was added last acts first
        point = np.array([10.0, -20.0, 30.0])
        expected = np.array(first.TransformPoint(second.TransformPoint((point * [-1, -1, 1]).tolist()))) * [-1, -1, 1]
        np.testing.assert_allclose(affine[:3, :3] @ point + affine[:3, 3], expected, atol=1e-9)


@pytest.mark.parametrize("suffix", FORMATS["itk"].suffixes)
def test_refuses_a_file_that_is_missing_or_broken(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(RegistrationError, match="a file that exists"):
        read_transform(tmp_path / f"none{suffix}")
    (tmp_path / f"broken{suffix}").write_text("hello")
    with pytest.raises(RegistrationError, match="^path: "):
        read_transform(tmp_path / f"broken{suffix}")


def test_refuses_several_and_nonlinear_transforms(tmp_path: Path) -> None:
    with pytest.raises(RegistrationError, match="2 transforms instead of one"):
        read_transform(write_itk(tmp_path / "two.tfm", TRANSLATION, TRANSLATION))
    with pytest.raises(RegistrationError, match="0 transforms instead of one"):
        read_transform(write_itk(tmp_path / "none.tfm"))
    with pytest.raises(RegistrationError, match="5 parameters instead of 3"):
        read_transform(write_itk(tmp_path / "long.tfm", TRANSLATION.replace("5 6 7", "5 6 7 8 9")))
    with pytest.raises(RegistrationError, match="DisplacementFieldTransform_double_3_3"):
        read_transform(write_itk(tmp_path / "field.tfm", COMPOSITE, TRANSLATION, FIELD))
    sitk.WriteTransform(sitk.BSplineTransform(3), str(tmp_path / "spline.h5"))
    with pytest.raises(RegistrationError, match="BSplineTransform"):
        read_transform(tmp_path / "spline.h5")
