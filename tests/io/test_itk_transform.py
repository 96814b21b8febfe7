# SPDX-License-Identifier: Apache-2.0
"""ITK transform files, judged by ITK: the same points and the same resampled voxels."""

from __future__ import annotations

from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.data.itk_torch_bridge import metatensor_to_itk_image
from monai.transforms import LoadImage

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import AffineParameters, compose_parameters
from monai_zsreg.io import ITK_SUFFIXES, read_itk_transform, write_itk_transform
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


def blobs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random smooth float32 image; its rim of zeros makes all ways to treat the border the same."""
    noise = torch.as_tensor(np.random.default_rng(seed).random((1, 1, *[n // 3 for n in shape]), dtype=np.float32))
    image = torch.nn.functional.interpolate(noise, size=shape)[0, 0].numpy()
    inside = np.zeros(shape, dtype=np.float32)
    inside[(slice(3, -3),) * len(shape)] = 1.0
    return image * inside


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


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
@pytest.mark.parametrize("centered", [False, True])
def test_round_trip_and_points(tmp_path: Path, dims: int, suffix: str, centered: bool) -> None:
    path = tmp_path / f"pair.v1{suffix}"
    center = (7.0, -8.0, 9.0)[:dims] if centered else None
    write_itk_transform(path, AFFINE[dims], center)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    np.testing.assert_allclose(read_itk_transform(path), AFFINE[dims], rtol=0, atol=1e-12)

    (transform,) = itk.transformread(str(path))
    flip = np.array([-1.0, -1.0, 1.0][:dims])
    np.testing.assert_allclose(transform.GetCenter(), np.zeros(dims) if center is None else np.array(center) * flip)
    for point in np.random.default_rng(0).uniform(-100, 100, (20, dims)):
        expected = AFFINE[dims][:dims, :dims] @ point + AFFINE[dims][:dims, dims]
        np.testing.assert_allclose(
            np.array(transform.TransformPoint((point * flip).tolist())) * flip, expected, atol=1e-9
        )


@pytest.mark.parametrize("dims", [2, 3])
def test_itk_resamples_as_we_do(tmp_path: Path, dims: int) -> None:
    fixed, moving = pair(dims)
    write_itk_transform(tmp_path / "pair.tfm", AFFINE[dims])
    judged = itk.resample_image_filter(
        metatensor_to_itk_image(moving),
        transform=itk.transformread(str(tmp_path / "pair.tfm"))[0],
        reference_image=metatensor_to_itk_image(fixed),
        use_reference_image=True,
    )
    ours = ApplyAffineRegistration()(moving, AFFINE[dims], fixed)[0].numpy()
    expected = itk.array_from_image(judged).T
    assert (expected > 0).mean() > 0.2
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_itk_resamples_nifti_files_as_we_do(tmp_path: Path) -> None:
    """No MONAI on the judge's side: nibabel writes, ITK reads and resamples."""
    for name, image in zip(("fixed", "moving"), pair(3), strict=True):
        nib.save(nib.Nifti1Image(image[0].numpy(), image.affine.numpy()), tmp_path / f"{name}.nii.gz")
    write_itk_transform(tmp_path / "pair.h5", AFFINE[3])
    judged = itk.resample_image_filter(
        itk.imread(str(tmp_path / "moving.nii.gz"), itk.F),
        transform=itk.transformread(str(tmp_path / "pair.h5"))[0],
        reference_image=itk.imread(str(tmp_path / "fixed.nii.gz"), itk.F),
        use_reference_image=True,
    )
    load = LoadImage(ensure_channel_first=True, image_only=True)
    fixed, moving = load(tmp_path / "fixed.nii.gz"), load(tmp_path / "moving.nii.gz")
    ours = ApplyAffineRegistration()(moving, tmp_path / "pair.h5", fixed)[0].numpy()
    np.testing.assert_allclose(ours, itk.array_from_image(judged).T, atol=1e-3)


def write_itk(path: Path, *transforms: str) -> Path:
    body = "".join(f"#Transform {i}\n{t}\n" for i, t in enumerate(transforms))
    path.write_text("#Insight Transform File V1.0\n" + body)
    return path


TRANSLATION = "Transform: TranslationTransform_double_3_3\nParameters: 5 6 7\nFixedParameters:"


@pytest.mark.parametrize(
    "text",
    [
        TRANSLATION,
        "Transform: Euler3DTransform_double_3_3\nParameters: 0.1 -0.2 0.3 5 6 7\nFixedParameters: 10 20 30 0",
        "Transform: AffineTransform_float_3_3\nParameters: 1 0.5 0 0 1 0 0 0 1 5 6 7\nFixedParameters: 10 20 30",
        "Transform: Euler2DTransform_double_2_2\nParameters: 0.4 5 6\nFixedParameters: 10 20",
    ],
    ids=["translation", "euler3d", "float", "euler2d"],
)
def test_reads_other_linear_transforms(tmp_path: Path, text: str) -> None:
    path = write_itk(tmp_path / "t.tfm", text)
    affine = read_itk_transform(path)
    dims = len(affine) - 1
    flip = np.array([-1.0, -1.0, 1.0][:dims])
    (transform,) = itk.transformread(str(path))
    for point in np.random.default_rng(1).uniform(-100, 100, (5, dims)):
        mapped = np.array(transform.TransformPoint((point * flip).tolist())) * flip
        np.testing.assert_allclose(affine[:dims, :dims] @ point + affine[:dims, dims], mapped, atol=1e-4)


def test_reads_a_composite_in_its_order(tmp_path: Path) -> None:
    first, second = itk.TranslationTransform[itk.D, 3].New(), itk.Euler3DTransform[itk.D].New()
    first.SetOffset([5.0, 6.0, 7.0])
    second.SetRotation(0.3, 0.2, -0.4)
    composite = itk.CompositeTransform[itk.D, 3].New()
    composite.AddTransform(first)
    composite.AddTransform(second)
    itk.transformwrite(composite, str(tmp_path / "c.h5"))
    affine = read_itk_transform(tmp_path / "c.h5")
    # of a composite, the transform that was added last acts first
    point = np.array([10.0, -20.0, 30.0])
    expected = np.array(first.TransformPoint(second.TransformPoint((point * [-1, -1, 1]).tolist()))) * [-1, -1, 1]
    np.testing.assert_allclose(affine[:3, :3] @ point + affine[:3, 3], expected, atol=1e-9)


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(5),
        np.eye(4)[:3],
        np.diag([1.0, 1.0, 0.0, 1.0]),
        np.diag([1.0, np.nan, 1.0, 1.0]),
        np.diag([1.0, 1.0, 1.0, 2.0]),
        "no matrix",
        [[1.0], [1.0, 2.0]],
    ],
    ids=["5x5", "3x4", "singular", "nan", "last row", "text", "ragged"],
)
def test_refuses_what_is_no_affine(tmp_path: Path, affine: object) -> None:
    with pytest.raises(RegistrationError, match="^affine: "):
        write_itk_transform(tmp_path / "t.tfm", affine)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_refuses_a_center_of_the_wrong_length(tmp_path: Path) -> None:
    with pytest.raises(RegistrationError, match="^center: "):
        write_itk_transform(tmp_path / "t.tfm", np.eye(4), (1.0, 2.0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["t.lta", "t", "tfm"])
def test_refuses_other_suffixes(tmp_path: Path, name: str) -> None:
    with pytest.raises(RegistrationError, match="ends in one of .tfm"):
        write_itk_transform(tmp_path / name, np.eye(4))
    with pytest.raises(RegistrationError, match="ends in one of .tfm"):
        read_itk_transform(tmp_path / name)


@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
def test_refuses_a_file_that_is_missing_or_broken(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(RegistrationError, match="a file that exists"):
        read_itk_transform(tmp_path / f"none{suffix}")
    (tmp_path / f"broken{suffix}").write_text("hello")
    with pytest.raises(RegistrationError, match="that ITK can read"):
        read_itk_transform(tmp_path / f"broken{suffix}")


def test_refuses_several_and_nonlinear_transforms(tmp_path: Path) -> None:
    with pytest.raises(RegistrationError, match="it has 2"):
        read_itk_transform(write_itk(tmp_path / "two.tfm", TRANSLATION, TRANSLATION))
    with pytest.raises(RegistrationError, match="that ITK can read"):
        read_itk_transform(write_itk(tmp_path / "none.tfm"))
    spline = itk.BSplineTransform[itk.D, 3, 3].New()
    itk.transformwrite(spline, str(tmp_path / "spline.h5"))
    with pytest.raises(RegistrationError, match="itkBSplineTransform"):
        read_itk_transform(tmp_path / "spline.h5")
