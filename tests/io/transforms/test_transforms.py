# SPDX-License-Identifier: Apache-2.0
"""Transform files of other tools, judged by those tools where they can be had, and by hand where not."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import LoadImage
from nibabel.affines import apply_affine
from phantoms import blobs
from scipy import ndimage

from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import AffineParameters, Grid, compose_parameters
from monai_zsreg.io import read_transform, write_transform
from monai_zsreg.transforms import ApplyAffineRegistration

AFFINE = {
    2: compose_parameters(AffineParameters((3.0, -2.0), (14.0,), (1.05, 0.93), (0.06,), (5.0, -4.0))),
    3: compose_parameters(
        AffineParameters(
            (3.0, -2.0, 4.0), (10.0, -14.0, 8.0), (1.05, 0.93, 1.02), (0.06, -0.03, 0.02), (5.0, -4.0, 9.0)
        )
    ),
}
# of scanner coordinates: far from the origin, so that a wrong center shows
POINTS = np.random.default_rng(0).uniform(-150, 150, (20, 3))
FORMATS = {
    "t.tfm": None, "t.txt": None, "t.h5": None, "t.hdf5": None, "t.mat": None, "t.json": None, "t.lta": None,
    "fsl.mat": "fsl", "flirt.xfm": "fsl", "plain.txt": "text", "t.aff": "text", "g.mat": "greedy", "n.txt": "niftyreg",
    "m.txt": "mrtrix", "t.aff12.1D": None, "T.1D": "afni", "t.xfm": None, "t.x5": None, "e.txt": "elastix",
}  # fmt: skip
# in 2D, and without images
FLAT = ["t.tfm", "t.txt", "t.h5", "t.hdf5", "t.mat", "t.json", "plain.txt", "t.aff", "g.mat"]


def header(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], axes: str, degrees: float = 0.0
) -> np.ndarray:
    """Index to world of an anisotropic image whose axes run towards ``axes``, turned by ``degrees`` about each."""
    orientation = nib.orientations.axcodes2ornt(axes)
    directions = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(orientation):
        directions[int(world), axis] = sign
    turn = compose_parameters(AffineParameters((0.0,) * 3, (degrees,) * 3, (1.0,) * 3, (0.0,) * 3, (0.0,) * 3))
    affine = np.eye(4)
    affine[:3, :3] = turn[:3, :3] @ directions * spacing
    affine[:3, 3] = affine[:3, :3] @ [(1 - n) / 2 for n in shape] + [11.0, -7.0, 5.0]
    return affine


FIXED_SHAPE, MOVING_SHAPE = (26, 31, 14), (22, 24, 25)
FIXED_SPACING, MOVING_SPACING = (1.2, 0.9, 2.0), (0.8, 1.5, 1.1)
# fixed and moving: handedness equal and unequal, along the axes and oblique, axes in other order
PAIRS = {
    "RAS-RAS": (("RAS", 0.0), ("RAS", 0.0)),
    "LAS-LPS": (("LAS", 0.0), ("LPS", 0.0)),
    "RAS-LAS": (("RAS", 0.0), ("LAS", 0.0)),
    "oblique LPS-LAS": (("LPS", 12.0), ("LAS", -9.0)),
    "oblique PIR-RSA": (("PIR", -20.0), ("RSA", 15.0)),
}


def images(name: str) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    (one, turned), (two, turned_too) = PAIRS[name]
    return (
        nib.Nifti1Image(blobs(FIXED_SHAPE, 0), header(FIXED_SHAPE, FIXED_SPACING, one, turned)),
        nib.Nifti1Image(blobs(MOVING_SHAPE, 1), header(MOVING_SHAPE, MOVING_SPACING, two, turned_too)),
    )


@pytest.fixture(params=list(PAIRS))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Files of a fixed and a moving image."""
    paths = tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz"
    for image, path in zip(images(request.param), paths, strict=True):
        nib.save(image, path)
    return paths


def same_points(one: np.ndarray, two: np.ndarray, within: float = 1e-3) -> None:
    gap = np.linalg.norm(apply_affine(one, POINTS) - apply_affine(two, POINTS), axis=1)
    assert gap.max() < within


def test_the_pairs_differ_in_handedness() -> None:
    signs = {tuple(np.sign(np.linalg.det(image.affine)) for image in images(name)) for name in PAIRS}
    assert signs == {(1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)} - {(-1.0, -1.0)} | {(-1.0, 1.0)}


# ------------------------------------------------------------------------------------------------------- ourselves


@pytest.mark.parametrize("name", list(FORMATS))
def test_round_trip_leaves_one_file(pair: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    path = tmp_path / "out" / name
    write_transform(path, AFFINE[3], *pair, format=FORMATS[name])
    assert [p.name for p in path.parent.iterdir()] == [name]
    # the names of FSL's .mat and of a plain .txt leave the format open: the content tells, but for greedy's
    stated = FORMATS[name] if path.suffix not in (".mat", ".txt") or name == "g.mat" else None
    np.testing.assert_allclose(read_transform(path, *pair, format=stated), AFFINE[3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FLAT)
def test_round_trip_in_2d_and_without_images(tmp_path: Path, name: str) -> None:
    for dims in (2, 3):
        write_transform(tmp_path / name, torch.as_tensor(AFFINE[dims]), format=FORMATS[name])
        stated = FORMATS[name] if name in ("t.aff", "g.mat") else None
        matrix = read_transform(tmp_path / name, format=stated)
        assert matrix.dtype == np.float64
        np.testing.assert_allclose(matrix, AFFINE[dims], rtol=0, atol=1e-12)


@st.composite
def transforms(draw: st.DrawFn) -> np.ndarray:
    """Any rotation within 85 degrees an axis, scales from a half to two, some shear, shifts within 200 mm."""

    def three(low: float, high: float) -> tuple[float, ...]:
        return draw(st.tuples(*[st.floats(low, high)] * 3))

    parameters = AffineParameters(three(-200, 200), three(-85, 85), three(0.5, 2), three(-0.5, 0.5), three(-100, 100))
    return compose_parameters(parameters)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Oblique, sheared, anisotropic; half of them left-handed."""
    affine = draw(transforms())
    affine[:3, 0] *= draw(st.sampled_from([-1.0, 1.0]))
    return Grid(draw(st.tuples(*[st.integers(2, 300)] * 3)), torch.as_tensor(affine))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(transforms(), grids(), grids(), st.sampled_from([("t.lta", None), ("t.mat", "fsl"), ("t.aff", "text")]))
def test_any_matrix_between_any_grids_comes_back(
    tmp_path: Path, matrix: np.ndarray, fixed: Grid, moving: Grid, form: tuple[str, str | None]
) -> None:
    write_transform(tmp_path / form[0], matrix, fixed, moving, form[1])
    same_points(read_transform(tmp_path / form[0], fixed, moving, form[1]), matrix, 1e-6)


def test_ways_to_name_an_image_agree(tmp_path: Path) -> None:
    fixed, moving = images("oblique LPS-LAS")
    paths = tmp_path / "f.nii.gz", tmp_path / "m.nii"
    nib.save(fixed, paths[0])
    nib.save(moving, paths[1])
    load = LoadImage(image_only=True, ensure_channel_first=True)
    tensors = load(paths[0]), load(paths[1])
    # a format that nibabel does not read
    sitk.WriteImage(sitk.ReadImage(str(paths[0])), str(tmp_path / "f.nrrd"))
    write_transform(tmp_path / "t.mat", AFFINE[3], *paths, format="fsl")
    for one, two in (
        (fixed, moving),
        tensors,
        (Grid.of(tensors[0]), str(paths[1])),
        (tmp_path / "f.nrrd", tensors[1]),
    ):
        same_points(read_transform(tmp_path / "t.mat", one, two), AFFINE[3], 1e-4)


def test_reading_does_not_need_the_voxels(tmp_path: Path) -> None:
    """A header is enough, so a volume of any size costs nothing."""
    one, two = images("RAS-LAS")
    write_transform(tmp_path / "t.mat", AFFINE[3], one, two, "fsl")
    nib.save(one, tmp_path / "f.nii")
    with open(tmp_path / "f.nii", "r+b") as file:
        file.truncate(400)
    same_points(read_transform(tmp_path / "t.mat", tmp_path / "f.nii", two), AFFINE[3], 1e-4)


# ---------------------------------------------------------------------------------------------------- ITK and ANTs


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["t.tfm", "t.txt", "t.h5", "t.mat"])
def test_itk_maps_points_as_we_do(tmp_path: Path, dims: int, name: str) -> None:
    write_transform(tmp_path / name, AFFINE[dims])
    transform = sitk.ReadTransform(str(tmp_path / name))
    flip = np.array([-1.0, -1.0, 1.0][:dims])
    for point in POINTS[:, :dims]:
        judged = np.array(transform.TransformPoint((point * flip).tolist())) * flip
        np.testing.assert_allclose(apply_affine(AFFINE[dims], point), judged, atol=1e-9)


@pytest.mark.parametrize("name", ["t.tfm", "t.txt", "t.h5", "t.mat"])
def test_reads_what_itk_wrote(tmp_path: Path, name: str) -> None:
    transform = sitk.Euler3DTransform()
    transform.SetCenter([10.0, -20.0, 30.0])
    transform.SetRotation(0.3, 0.2, -0.4)
    transform.SetTranslation([5.0, 6.0, 7.0])
    sitk.WriteTransform(transform, str(tmp_path / name))
    matrix = read_transform(tmp_path / name)
    for point in POINTS:
        judged = np.array(transform.TransformPoint((point * [-1, -1, 1]).tolist())) * [-1, -1, 1]
        np.testing.assert_allclose(apply_affine(matrix, point), judged, atol=1e-9)


def test_ants_resamples_as_we_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    ants = pytest.importorskip("ants")
    write_transform(tmp_path / "0GenericAffine.mat", AFFINE[3])
    judged = ants.apply_transforms(
        fixed=ants.image_read(str(pair[0])),
        moving=ants.image_read(str(pair[1])),
        transformlist=[str(tmp_path / "0GenericAffine.mat")],
        interpolator="linear",
    ).numpy()
    load = LoadImage(image_only=True, ensure_channel_first=True)
    ours = ApplyAffineRegistration()(load(pair[1]), AFFINE[3], load(pair[0]))[0].numpy()
    assert (judged > 0).mean() > 0.05
    np.testing.assert_allclose(ours, judged, atol=1e-3)


def test_reads_what_ants_wrote(tmp_path: Path) -> None:
    ants = pytest.importorskip("ants")
    transform = ants.new_ants_transform(dimension=3, transform_type="AffineTransform")
    linear = compose_parameters(AffineParameters((0.0,) * 3, (9.0, -7.0, 5.0), (1.1, 0.9, 1.0), (0.1,) * 3, (0.0,) * 3))
    transform.set_fixed_parameters([10.0, -20.0, 30.0])
    transform.set_parameters([*linear[:3, :3].ravel(), 5.0, 6.0, 7.0])
    ants.write_transform(transform, str(tmp_path / "0GenericAffine.mat"))
    matrix = read_transform(tmp_path / "0GenericAffine.mat")
    for point in POINTS:
        judged = np.array(transform.apply_to_point((point * [-1, -1, 1]).tolist())) * [-1, -1, 1]
        np.testing.assert_allclose(apply_affine(matrix, point), judged, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ FSL


def test_flirt_by_hand(tmp_path: Path) -> None:
    """FSL: voxel index times voxel size; the first axis is counted from its end where the determinant is positive."""
    fixed = Grid((10, 8, 6), torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64)))
    moving = Grid(
        (20, 6, 7),
        torch.tensor([[-1, 0, 0, 10], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64),
    )
    # as flirt prints it; from the moving (-in) to the fixed image (-ref)
    (tmp_path / "in2ref.mat").write_text("1  0  0  1  \n0  1  0  2  \n0  0  1  3  \n0  0  0  1  \n")
    matrix = read_transform(tmp_path / "in2ref.mat", fixed, moving)
    # fixed world (2, 3, 4) is index (1, 1, 1), in scaled voxels ((10 - 1 - 1) * 2, 3, 4) = (16, 3, 4);
    # less (1, 2, 3): (15, 1, 1) of the left-handed moving image, which is index (15, 1, 1), world (10 - 15, 1, 1)
    np.testing.assert_allclose(apply_affine(matrix, [2.0, 3.0, 4.0]), [-5.0, 1.0, 1.0], atol=1e-12)
    write_transform(tmp_path / "again.mat", matrix, fixed, moving, format="fsl")
    np.testing.assert_allclose(np.loadtxt(tmp_path / "again.mat"), np.loadtxt(tmp_path / "in2ref.mat"), atol=1e-12)


def test_flirt_goes_by_the_voxel_sizes_in_the_header(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((10, 8, 6), dtype=np.float32), np.diag([-1.0, 1.0, 1.0, 1.0]))
    image.header.set_zooms((2.0, 2.0, 2.0))
    nib.save(image, tmp_path / "odd.nii")
    assert nib.load(tmp_path / "odd.nii").header.get_zooms() == (2.0, 2.0, 2.0)
    np.savetxt(tmp_path / "t.mat", np.block([[np.eye(3), np.array([[4.0], [0.0], [0.0]])], [np.eye(4)[3:]]]))
    other = Grid((10, 8, 6), torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64)))
    # index (3, 1, 1) is (6, 2, 2) in scaled voxels, less 4: (2, 2, 2) of the other image is its index, world (-2, 2, 2)
    matrix = read_transform(tmp_path / "t.mat", tmp_path / "odd.nii", other, "fsl")
    np.testing.assert_allclose(apply_affine(matrix, [-3.0, 1.0, 1.0]), [-2.0, 2.0, 2.0], atol=1e-12)


def test_nitransforms_reads_and_writes_flirt_as_we_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    linear = pytest.importorskip("nitransforms.linear")
    fixed, moving = (nib.load(path) for path in pair)
    write_transform(tmp_path / "ours.mat", AFFINE[3], *pair, format="fsl")
    judged = linear.Affine.from_filename(str(tmp_path / "ours.mat"), fmt="fsl", reference=fixed, moving=moving)
    same_points(judged.matrix, AFFINE[3])
    linear.Affine(AFFINE[3], reference=fixed).to_filename(str(tmp_path / "theirs.mat"), fmt="fsl", moving=moving)
    same_points(read_transform(tmp_path / "theirs.mat", *pair, format="fsl"), AFFINE[3])


# ----------------------------------------------------------------------------------------------------- FreeSurfer

LTA = """# transform file by hand
type      = {kind} # a comment
nxforms   = 1
mean      = 0.0000 0.0000 0.0000
sigma     = 10000.0000
1 4 4
{rows}
src volume info
valid = {valid}  # volume info
filename = /a path/with = and # in it.mgz
volume = 4 4 4
voxelsize = 2.0000 2.0000 2.0000
xras   = -1.0000 0.0000 0.0000
yras   = 0.0000 0.0000 -1.0000
zras   = 0.0000 1.0000 0.0000
cras   = 10.0000 20.0000 30.0000
dst volume info
valid = {valid}  # volume info
filename = fixed.mgz
volume = 6 6 6
voxelsize = 1.0000 1.0000 1.0000
xras   = 1.0000 0.0000 0.0000
yras   = 0.0000 1.0000 0.0000
zras   = 0.0000 0.0000 1.0000
cras   = 0.0000 0.0000 0.0000
subject fsaverage
fscale 0.150000
"""
# index to world of the two volumes above: cras lies at index shape / 2
LTA_SOURCE = np.array([[-2.0, 0, 0, 14], [0, 0, 2, 16], [0, -2, 0, 34], [0, 0, 0, 1]])
LTA_DESTINATION = np.array([[1.0, 0, 0, -3], [0, 1, 0, -3], [0, 0, 1, -3], [0, 0, 0, 1]])
LTA_GRIDS = (
    Grid((6, 6, 6), torch.as_tensor(LTA_DESTINATION)),
    Grid((4, 4, 4), torch.as_tensor(LTA_SOURCE)),
)
SHIFT = np.array([[1.0, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])


def lta(path: Path, kind: int = 1, matrix: np.ndarray = SHIFT, valid: int = 1, **changes: str) -> Path:
    rows = "\n".join(" ".join(f"{value:+.6f}" for value in row) for row in matrix)
    text = LTA.format(kind=kind, rows=rows, valid=valid)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def test_lta_in_voxels_by_hand(tmp_path: Path) -> None:
    path = lta(tmp_path / "t.lta", kind=0)
    expected = {
        # destination world: source world. Source index (0, 0, 0) is cras + 2 * (2, -2, 2); with the shift by (1, 2, 3)
        # it comes to destination index (1, 2, 3), which is cras + (-2, -1, 0)
        (-2.0, -1.0, 0.0): (14.0, 16.0, 34.0),
        (-1.0, -1.0, 0.0): (12.0, 16.0, 34.0),  # one voxel on along the first axis, which runs to the left
        (-2.0, 0.0, 0.0): (14.0, 16.0, 32.0),  # the second, which runs downwards
        (-2.0, -1.0, 1.0): (14.0, 18.0, 34.0),  # the third, which runs forward
    }
    for images_ in ((None, None), LTA_GRIDS):
        matrix = read_transform(path, *images_)
        np.testing.assert_allclose(apply_affine(matrix, list(expected)), list(expected.values()), atol=1e-12)


def test_lta_in_ras_by_hand(tmp_path: Path) -> None:
    # from source to destination, and a pull matrix leads from fixed = destination to moving = source
    matrix = read_transform(lta(tmp_path / "t.lta"))
    np.testing.assert_allclose(apply_affine(matrix, [1.0, 2.0, 3.0]), [0.0, 0.0, 0.0], atol=1e-12)


@pytest.mark.parametrize("kind", [0, 1])
def test_lta_is_read_in_the_direction_of_the_images(tmp_path: Path, kind: int) -> None:
    path = lta(tmp_path / "t.lta", kind=kind)
    destination, source = LTA_GRIDS
    as_stated = read_transform(path)
    for fixed, moving in ((destination, source), (destination, None), (None, source)):
        np.testing.assert_allclose(read_transform(path, fixed, moving), as_stated, atol=1e-12)
    for fixed, moving in ((source, destination), (source, None), (None, destination)):
        np.testing.assert_allclose(read_transform(path, fixed, moving), np.linalg.inv(as_stated), atol=1e-12)
    # images that the file does not know, and two on one grid, say nothing
    for fixed, moving in ((images("RAS-LAS")), (destination, destination)):
        np.testing.assert_allclose(read_transform(path, fixed, moving), as_stated, atol=1e-12)


def test_lta_without_geometry(tmp_path: Path) -> None:
    path = lta(tmp_path / "ras.lta", kind=1, valid=0)
    np.testing.assert_allclose(read_transform(path), np.linalg.inv(SHIFT), atol=1e-12)
    path = lta(tmp_path / "voxels.lta", kind=0, valid=0)
    np.testing.assert_allclose(
        read_transform(path, *LTA_GRIDS), read_transform(lta(tmp_path / "valid.lta", kind=0)), atol=1e-12
    )
    for given_, missing in (((None, LTA_GRIDS[1]), "fixed"), ((LTA_GRIDS[0], None), "moving")):
        with pytest.raises(RegistrationError, match=f"^{missing}: got None, expected the {missing} image"):
            read_transform(path, *given_)


def test_written_lta_has_the_geometry_that_nibabel_states(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_transform(tmp_path / "t.lta", AFFINE[3], *pair)
    text = (tmp_path / "t.lta").read_text()
    for section, path in (("dst", pair[0]), ("src", pair[1])):
        image = nib.load(path)
        judge = nib.MGHImage(np.zeros(image.shape, dtype=np.float32), image.affine).header
        lines = text.split(f"{section} volume info\n")[1].splitlines()[:8]
        fields = {line.split("=")[0].strip(): line.split("=")[1].split() for line in lines}
        assert fields["valid"][0] == "1"
        assert fields["filename"] == [str(path)]
        assert tuple(int(n) for n in fields["volume"]) == image.shape
        np.testing.assert_allclose([float(x) for x in fields["voxelsize"]], judge["delta"], atol=1e-6)
        np.testing.assert_allclose([[float(x) for x in fields[f"{a}ras"]] for a in "xyz"], judge["Mdc"], atol=1e-6)
        np.testing.assert_allclose([float(x) for x in fields["cras"]], judge["Pxyz_c"], atol=1e-4)


def test_nitransforms_reads_and_writes_lta_as_we_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    linear = pytest.importorskip("nitransforms.linear")
    fixed, moving = (nib.load(path) for path in pair)
    write_transform(tmp_path / "ours.lta", AFFINE[3], *pair)
    same_points(linear.Affine.from_filename(str(tmp_path / "ours.lta"), fmt="fs").matrix, AFFINE[3])
    linear.Affine(AFFINE[3], reference=fixed).to_filename(str(tmp_path / "theirs.lta"), fmt="fs", moving=moving)
    for given_ in ((), pair):
        same_points(read_transform(tmp_path / "theirs.lta", *given_), AFFINE[3])


def test_reads_ltas_that_freesurfer_wrote() -> None:
    """A registration of FreeSurfer's in RAS and the same in voxels; both come with NiTransforms."""
    nitransforms = pytest.importorskip("nitransforms")
    folder = Path(nitransforms.__file__).parent / "tests" / "data"
    ras, voxels = folder / "bold-to-t1w.lta", folder / "bold-to-t1w.v2v.lta"
    if not (ras.exists() and voxels.exists()):
        pytest.skip("this release of nitransforms comes without its test data")
    judged = nitransforms.linear.Affine.from_filename(str(ras), fmt="fs").matrix
    assert np.abs(judged - np.eye(4)).max() > 0.01
    same_points(read_transform(ras), judged)
    same_points(read_transform(voxels), judged)


# --------------------------------------------------------------------------------------------- greedy and Convert3D


def test_greedy_resamples_as_we_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """greedy reads our matrix and reslices with it."""
    greedy = pytest.importorskip("picsl_greedy")
    write_transform(tmp_path / "t.mat", AFFINE[3], format="greedy")
    out = tmp_path / "moved.nii.gz"
    greedy.Greedy3D().execute(f"-d 3 -rf {pair[0]} -rm {pair[1]} {out} -r {tmp_path / 't.mat'} -ri LINEAR")
    ours = resampled(*pair, AFFINE[3])
    assert (ours > 0).mean() > 0.1
    np.testing.assert_allclose(nib.load(out).get_fdata(), ours, atol=2e-3)


def test_a_text_of_two_tools_asks_for_the_format(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Four rows with single blanks may be greedy's, Convert3D's, or from FSL's matrix written by another program."""
    np.savetxt(tmp_path / "t.mat", AFFINE[3], fmt="%g")
    for given_ in ((), pair):
        with pytest.raises(RegistrationError, match="format= one of fsl, greedy"):
            read_transform(tmp_path / "t.mat", *given_)
    np.testing.assert_allclose(read_transform(tmp_path / "t.mat", format="greedy"), AFFINE[3], atol=1e-4)
    np.savetxt(tmp_path / "flat.mat", AFFINE[2], fmt="%g")
    np.testing.assert_allclose(read_transform(tmp_path / "flat.mat"), AFFINE[2], atol=1e-4)


def resampled(fixed: Path, moving: Path, matrix: np.ndarray) -> np.ndarray:
    """The moving image on the fixed grid by SciPy, from nothing but the two affines and the pull matrix."""
    one, two = nib.load(fixed), nib.load(moving)
    index = np.linalg.inv(two.affine) @ matrix @ one.affine
    return ndimage.affine_transform(two.get_fdata(), index[:3, :3], index[:3, 3], one.shape, order=1, cval=0.0)


# ----------------------------------------------------------------------------------------------------------- elastix


def test_transformix_resamples_as_we_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    itk = pytest.importorskip("itk")
    pytest.importorskip("itk.itkTransformixFilterPython")
    write_transform(tmp_path / "t.txt", AFFINE[3], *pair, format="elastix")
    parameters = itk.ParameterObject.New()
    parameters.AddParameterFile(str(tmp_path / "t.txt"))
    moved = itk.transformix_filter(itk.imread(str(pair[1]), itk.F), transform_parameter_object=parameters)
    np.testing.assert_allclose(itk.array_from_image(moved).T, resampled(*pair, AFFINE[3]), atol=2e-3)


@pytest.mark.parametrize("kind", ["Translation", "Euler", "Similarity", "Affine"])
@pytest.mark.parametrize("dims", [2, 3])
def test_elastix_kinds_are_those_of_itk(tmp_path: Path, kind: str, dims: int) -> None:
    """elastix' transforms are ITK's with the same parameters, in the fixed image's LPS."""
    count = {"Translation": dims, "Euler": 3 * (dims - 1), "Similarity": 3 * dims - 2, "Affine": dims * (dims + 1)}[
        kind
    ]
    values = " ".join(map(repr, np.random.default_rng(dims).uniform(0.1, 0.4, count).tolist()))
    center = "3.0 -4.0 5.0" if dims == 3 else "3.0 -4.0"
    name = f"{kind}{dims}DTransform" if kind in ("Euler", "Similarity") else f"{kind}Transform"
    (tmp_path / "itk.tfm").write_text(
        f"#Insight Transform File V1.0\nTransform: {name}_double_{dims}_{dims}\n"
        f"Parameters: {values}\nFixedParameters: {center if kind != 'Translation' else ''}\n"
    )
    start = "NoInitialTransform"
    (tmp_path / "e.txt").write_text(elastix(f"{kind}Transform", values, center, dims, start))
    expected = read_transform(tmp_path / "itk.tfm")
    np.testing.assert_allclose(read_transform(tmp_path / "e.txt"), expected, atol=1e-12)
    # a second stage acts on what the first one gives
    (tmp_path / "e2.txt").write_text(elastix(f"{kind}Transform", values, center, dims, "/elsewhere/e.txt"))
    np.testing.assert_allclose(read_transform(tmp_path / "e2.txt"), expected @ expected, atol=1e-12)


def elastix(kind: str, values: str, center: str, dims: int, start: str) -> str:
    return (
        f'(Transform "{kind}") // a comment\n(TransformParameters {values})\n'
        f'(InitialTransformParametersFileName "{start}")\n(HowToCombineTransforms "Compose")\n'
        f"(FixedImageDimension {dims})\n(MovingImageDimension {dims})\n(CenterOfRotationPoint {center})\n"
    )


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"EulerTransform": "BSplineTransform"}, "BSplineTransform instead of one of"),
        ({"NoInitialTransform": "self.txt"}, "do not end"),
        ({"(FixedImageDimension": '(UseDirectionCosines "false")\n(FixedImageDimension'}, "without the directions"),
        ({"0.1 0.2 0.3 1 2 3": "0.1 0.2 0.3 1"}, "4 parameters instead of 6"),
    ],
)
def test_refuses_elastix_files_it_cannot_use(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    text = elastix("EulerTransform", "0.1 0.2 0.3 1 2 3", "0 0 0", 3, "NoInitialTransform")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "self.txt").write_text(text)
    with pytest.raises(RegistrationError, match=f"^path: .*{reason}"):
        read_transform(tmp_path / "self.txt")


# ----------------------------------------------------------------------------------------------- AFNI, MINC, X5


def test_nitransforms_reads_and_writes_afni_as_we_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    linear = pytest.importorskip("nitransforms.linear")
    fixed, moving = (nib.load(path) for path in pair)
    write_transform(tmp_path / "ours.aff12.1D", AFFINE[3], *pair)
    judged = linear.Affine.from_filename(str(tmp_path / "ours.aff12.1D"), fmt="afni", reference=fixed, moving=moving)
    # it rounds voxel sizes, and writes six digits
    same_points(judged.matrix, AFFINE[3], 2e-2)
    linear.Affine(AFFINE[3], reference=fixed).to_filename(str(tmp_path / "theirs.1D"), fmt="afni", moving=moving)
    same_points(read_transform(tmp_path / "theirs.1D", *pair), AFFINE[3], 2e-2)


def test_afni_by_hand(tmp_path: Path) -> None:
    # base to source, x to the left and y to the back
    (tmp_path / "t.aff12.1D").write_text("# 3dAllineate matrices\n 1 0 0 5 0 1 0 -6 0 0 1 7\n")
    np.testing.assert_array_equal(read_transform(tmp_path / "t.aff12.1D")[:3, 3], [-5, 6, 7])


def test_minc_by_hand(tmp_path: Path) -> None:
    head = "MNI Transform File\n% made by hand; with = signs\n\n"
    shift = "Transform_Type = Linear;\n{}Linear_Transform =\n 1 0 0 10\n 0 1 0 20\n 0 0 1 30;\n"
    scale = "Transform_Type = Linear;\nLinear_Transform =\n 2 0 0 0\n 0 2 0 0\n 0 0 2 0;\n"
    # from the moving image to the fixed one, and ours leads the other way
    for content, point in (
        (shift.format(""), [-10, -20, -30]),
        (shift.format("Invert_Flag = True;\n"), [10, 20, 30]),
        (shift.format("") + scale, [-10, -20, -30]),
        (scale + shift.format(""), [-5, -10, -15]),
    ):
        (tmp_path / "t.xfm").write_text(head + content)
        matrix = read_transform(tmp_path / "t.xfm")
        np.testing.assert_allclose(matrix[:3, 3], point)
        np.testing.assert_allclose(matrix[0, 0], 0.5 if scale in content else 1.0)


def test_nitransforms_reads_and_writes_x5_as_we_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    linear = pytest.importorskip("nitransforms.linear")
    write_transform(tmp_path / "ours.x5", AFFINE[3])
    same_points(linear.Affine.from_filename(str(tmp_path / "ours.x5"), fmt="X5").matrix, AFFINE[3])
    for name in ("theirs.x5", "theirs.h5"):
        linear.Affine(AFFINE[3], reference=nib.load(pair[0])).to_filename(str(tmp_path / name), fmt="X5")
        same_points(read_transform(tmp_path / name), AFFINE[3])


def test_refuses_an_x5_file_of_another_layout(tmp_path: Path) -> None:
    """fslpy's files of this name hold two spaces and a matrix between them."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "fslpy.x5", "w") as file:
        file.attrs["Format"], file.attrs["Type"] = "X5", "linear"
        file.create_dataset("Transform/Matrix", data=AFFINE[3])
    with pytest.raises(RegistrationError, match="no TransformGroup"):
        read_transform(tmp_path / "fslpy.x5")


@pytest.mark.parametrize("name", ["niftyreg", "mrtrix"])
def test_niftyreg_and_mrtrix_by_hand(tmp_path: Path, name: str) -> None:
    """Both take a point of the reference to the floating image, in the world of the sform, and neither in voxels.

    NiftyReg multiplies the matrix of the file with the reference's index-to-world matrix, for where in the floating
    image to look; MRtrix's transform "maps points in the template image to the moving image". Here a quarter turn
    about z, and a translation, between a reference and a floating image of other voxels and handedness.
    """
    reference = np.array([[-2.0, 0, 0, 40], [0, 2, 0, -30], [0, 0, 3, -20], [0, 0, 0, 1]])
    floating = np.array([[0, 0, 1.5, -12], [1, 0, 0, -50], [0, 1, 0, 7], [0, 0, 0, 1.0]])
    (tmp_path / "t.txt").write_text("0 -1 0 5\n1 0 0 -2\n0 0 1 10\n0 0 0 1\n")
    matrix = read_transform(tmp_path / "t.txt", format=name)
    # the reference's voxel (10, 20, 8) is at (20, 10, 4), which goes to (-5, 18, 14)
    found = np.linalg.inv(floating) @ matrix @ reference @ [10, 20, 8, 1]
    np.testing.assert_allclose(found, [68, 7, 14 / 3, 1], atol=1e-12)
    write_transform(tmp_path / "back.txt", matrix, format=name)
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "back.txt"), np.loadtxt(tmp_path / "t.txt"))


def test_mrtrix_may_leave_out_the_last_row(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "t.txt", AFFINE[3][:3], header="command_history: mrregister")
    np.testing.assert_array_equal(read_transform(tmp_path / "t.txt", format="mrtrix"), AFFINE[3])
    with pytest.raises(RegistrationError, match="four rows"):
        read_transform(tmp_path / "t.txt")


# --------------------------------------------------------------------------------------------------- text and JSON


def test_plain_text_is_the_matrix(tmp_path: Path) -> None:
    write_transform(tmp_path / "t.txt", AFFINE[3], format="text")
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "t.txt"), AFFINE[3])
    (tmp_path / "c.txt").write_text("\ufeff# a comment\n\n1 0 0 5\r\n0 1 0 6 # y\n0 0 1 7e0\n0 0 0 1\n")
    np.testing.assert_array_equal(read_transform(tmp_path / "c.txt")[:3, 3], [5, 6, 7])


def test_json_states_what_it_holds(tmp_path: Path) -> None:
    write_transform(tmp_path / "t.json", AFFINE[2])
    assert json.loads((tmp_path / "t.json").read_text()) == {
        "matrix": AFFINE[2].tolist(),
        "maps": "points of the fixed image to points of the moving image",
        "unit": "mm",
        "space": "RAS",
    }


def test_reads_the_bundles_report(tmp_path: Path) -> None:
    report = {
        "name": "pair",
        "success": True,
        "transform": "affine",
        "matrix": AFFINE[3].tolist(),
        "matrix_maps": "points of the fixed image to points of the moving image, RAS, mm",
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    np.testing.assert_array_equal(read_transform(tmp_path / "report.json"), AFFINE[3])
    (tmp_path / "report.json").write_text(json.dumps(report | {"success": False}))
    with pytest.warns(RegistrationWarning, match="report.json reports a registration that failed"):
        read_transform(tmp_path / "report.json")


# ----------------------------------------------------------------------------------------------------- wrong input


def rows(matrix: np.ndarray) -> str:
    return "\n".join(" ".join(map(str, row)) for row in matrix)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("t.mat", "hello", "the content of a file of format itk or fsl or greedy"),
        ("t.mat", "", "the content of a file"),
        ("t.mat", rows(np.eye(4)[:, :3]), "four rows of four numbers"),
        ("t.mat", "1  0  0  0  \n0  0  0  0  \n0  0  1  0  \n0  0  0  1  \n", "Singular"),
        ("t.mat", rows(np.eye(4)), "format= one of fsl, greedy"),
        ("t.mat", b"\x00\x01garbage", "format 'itk'"),
        ("t.mat", b"MATLAB 5.0 MAT-file" + bytes(200), "the content of a file"),
        ("t.txt", rows(np.eye(5)), "three of three"),
        ("t.txt", rows(np.diag([1.0, np.nan, 1.0, 1.0])), "finite, invertible"),
        ("t.txt", rows(np.diag([1.0, 1e-20, 1.0, 1.0])), "finite, invertible"),
        ("t.txt", rows(np.diag([1.0, 1.0, 1.0, 2.0])), "last row"),
        ("t.txt", b"\xff\xfe\x01", "the content of a file of format itk or text or elastix"),
        ("t.txt", "#Insight Transform File V1.0\nnothing", "0 transforms instead of one"),
        ("t.tfm", "#Insight Transform File V1.0\nParameters: 1 2", "format 'itk'"),
        ("t.json", "{", "format 'json'"),
        ("t.json", "[[1, 0], [0, 1]]", 'no "matrix"'),
        ("t.json", '{"matrix": [[1, 2], [3]]}', "inhomogeneous"),
        ("t.json", '{"matrix": [[1, 2], [3, 4]]}', "4x4 matrix"),
        ("t.json", json.dumps({"matrix": np.eye(4).tolist(), "space": "LPS"}), "'LPS' instead of 'RAS'"),
        ("t.json", json.dumps({"matrix": np.eye(4).tolist(), "unit": "m"}), "'m' instead of 'mm'"),
        ("t.json", json.dumps({"matrix": np.eye(4).tolist(), "maps": "moving to fixed"}), "'moving to fixed' instead"),
        ("t.lta", "type = 1\n", "1 4 4"),
        ("t.lta", "nothing", "could not convert"),
        ("t.xfm", rows(np.eye(4)), "MNI Transform File"),
        ("t.xfm", "MNI Transform File\nTransform_Type = Grid_Transform;", "Grid_Transform instead of Linear"),
        ("t.aff12.1D", "1 0 0 0 0 1 0 0 0 0 1 0\n" * 3, "3 transforms instead of"),
        ("t.x5", "hello", "h5py|signature|format"),
        ("t", rows(np.eye(4)), "format= one of"),
    ],
)
def test_refuses_files_with_other_content(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RegistrationError, match=f"^path: got .*{name}.*{reason}"):
        read_transform(path, *images("RAS-RAS"))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"type      = 1": "type      = 14"}, "type 14 instead of type 0"),
        ({"nxforms   = 1": "nxforms   = 2"}, "2 transforms instead of one"),
        ({"1 4 4": "1 3 3"}, "1 4 4"),
        ({"volume = 4 4 4": "volume = 4 4"}, "three numbers"),
        ({"cras   = 10.0000": "cras   = nan"}, "not finite or singular"),
        ({"xras   = -1.0000": "xras   = 0.0000"}, "not finite or singular"),
        ({"voxelsize": "voxel"}, "voxelsize"),
        ({"type      = 1": "kind      = 1"}, "type"),
    ],
)
def test_refuses_ltas_it_cannot_use(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    with pytest.raises(RegistrationError, match=f"^path: .*{reason}"):
        read_transform(lta(tmp_path / "t.lta", **changes))


def test_refuses_missing_files_and_unknown_formats(tmp_path: Path) -> None:
    for path in (tmp_path / "none.mat", tmp_path):
        with pytest.raises(RegistrationError, match="^path: .*a file that exists"):
            read_transform(path)
    with pytest.raises(RegistrationError, match="^format: got 'spm', expected one of itk, fsl"):
        read_transform(tmp_path / "none.mat", format="spm")
    with pytest.raises(RegistrationError, match="^format: got 'spm'"):
        write_transform(tmp_path / "t.mat", np.eye(4), format="spm")
    with pytest.raises(RegistrationError, match="^path: .*t.nii.*ends in one of .tfm"):
        write_transform(tmp_path / "t.nii", np.eye(4))
    with pytest.raises(RegistrationError, match="^path: got None"):
        read_transform(None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, form", [("t.lta", None), ("t.mat", "fsl")])
def test_formats_that_depend_on_the_images_ask_for_them(tmp_path: Path, name: str, form: str | None) -> None:
    fixed, moving = images("RAS-LAS")
    with pytest.raises(RegistrationError, match="^fixed: got None, expected the fixed image"):
        write_transform(tmp_path / name, AFFINE[3], None, moving, form)
    with pytest.raises(RegistrationError, match="^moving: got None, expected the moving image"):
        write_transform(tmp_path / name, AFFINE[3], fixed, None, form)
    with pytest.raises(RegistrationError, match="^matrix: .*3D only"):
        write_transform(tmp_path / name, AFFINE[2], fixed, moving, form)
    flat = MetaTensor(torch.zeros(1, 8, 9))
    with pytest.raises(RegistrationError, match="^moving: got '2D image', expected a 3D image"):
        write_transform(tmp_path / name, AFFINE[3], fixed, flat, form)
    assert not list(tmp_path.iterdir())


def test_refuses_images_it_cannot_use(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "t.mat", np.eye(4))
    good = images("RAS-LAS")[0]
    (tmp_path / "broken.nii.gz").write_text("hello")
    singular = MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0])))
    lps = MetaTensor(torch.zeros(1, 4, 4, 4), meta={"space": "LPS"})
    for image, reason in (
        (tmp_path / "none.nii.gz", "an existing file"),
        (tmp_path / "broken.nii.gz", "an image that can be read"),
        (singular, "a finite, invertible matrix"),
        (lps, "an affine in RAS"),
        (np.eye(4), "a path, an image of nibabel, a MetaTensor, an Image or a Grid"),
    ):
        with pytest.raises(RegistrationError, match=f"^moving.*{reason}"):
            read_transform(tmp_path / "t.mat", good, image, "fsl")


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(
    "matrix",
    [
        np.eye(5),
        np.eye(4)[:3],
        np.diag([1.0, 1.0, 0.0, 1.0]),
        np.diag([1.0, np.inf, 1.0, 1.0]),
        np.diag([1.0, 1.0, 1.0, 2.0]),
        "no matrix",
        [[1.0], [1.0, 2.0]],
    ],
    ids=["5x5", "3x4", "singular", "infinite", "last row", "text", "ragged"],
)
def test_refuses_to_write_what_is_no_affine(tmp_path: Path, name: str, matrix: object) -> None:
    with pytest.raises(RegistrationError, match="^matrix: "):
        write_transform(tmp_path / name, matrix, *images("RAS-LAS"), format=FORMATS[name])  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_matrix_of_the_caller_stays_as_it_is(tmp_path: Path) -> None:
    matrix = AFFINE[3].copy()
    matrix[3, :3] = 1e-12
    before = matrix.copy()
    write_transform(tmp_path / "t.json", matrix)
    np.testing.assert_array_equal(matrix, before)
    np.testing.assert_array_equal(read_transform(tmp_path / "t.json")[3], [0, 0, 0, 1])
