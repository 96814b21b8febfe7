# SPDX-License-Identifier: Apache-2.0
"""DICOM: folders of slices and files of many frames, written here, against the image they were cut from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from monai_zsreg.errors import RegistrationError
from monai_zsreg.io import load_image

CLASSES = {"MR": "1.2.840.10008.5.1.4.1.1.4", "CT": "1.2.840.10008.5.1.4.1.1.2"}
SHAPE = (24, 20, 12)
EVEN = np.arange(12.0)


def brightness(world: np.ndarray) -> np.ndarray:
    """What is to be seen at points ``[..., 3]`` in LPS mm: smooth, and the same at no two places."""
    blobs = [((2.0, 3.0, 1.0), 14.0, 300.0), ((-10.0, -9.0, 8.0), 9.0, 200.0), ((8.0, 11.0, -9.0), 8.0, 150.0)]
    return 500 + sum(h * np.exp(-(((world - np.array(c)) / s) ** 2).sum(-1)) for c, s, h in blobs)


def header(
    spacing: tuple[float, ...] = (2.0, 2.0, 3.0), tilt: float = 0.0, axes: np.ndarray | None = None
) -> np.ndarray:
    """Index to world, LPS, of a volume around the origin; with a tilt the slices shift along the second axis."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if axes is None else axes) * spacing
    affine[:3, 2] += spacing[2] * np.tan(np.deg2rad(tilt)) * affine[:3, 1] / spacing[1]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return affine


def pixels(affine: np.ndarray, at: np.ndarray) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE[:2]), at, indexing="ij"), -1)
    return np.rint(brightness(index @ affine[:3, :3].T + affine[:3, 3])).astype(np.int16)


def write_series(
    folder: Path,
    affine: np.ndarray,
    at: np.ndarray = EVEN,
    add: int = 0,
    kind: str = "MR",
    uid: str = "1.2.3.1",
    **tags: Any,
) -> Path:
    """A file a slice, at ``at`` slice distances from the first, in an order that tells nothing."""
    folder.mkdir(exist_ok=True)
    before = len(list(folder.iterdir()))
    spacing = np.linalg.norm(affine[:3, :2], axis=0)
    for number, place in enumerate(np.random.default_rng(before).permutation(len(at))):
        data = dataset(pixels(affine, at[[place]])[..., 0] + add, kind, f"{uid}.{before + number + 1}", uid)
        data.ImageOrientationPatient = (affine[:3, :2] / spacing).T.ravel().tolist()
        data.ImagePositionPatient = np.round(affine[:3, :3] @ [0, 0, at[place]] + affine[:3, 3], 6).tolist()
        data.PixelSpacing = spacing[::-1].tolist()
        data.SliceThickness, data.InstanceNumber = float(np.linalg.norm(affine[:3, 2])), number + 1
        for tag, value in tags.items():
            setattr(data, tag, value)
        save(data, folder / f"{before + number:04d}.dcm")
    return folder


def save(data: Dataset, path: Path) -> None:
    """With preamble and group lengths, whatever the release of pydicom calls that."""
    if int(pydicom.__version__.partition(".")[0]) < 3:
        data.is_little_endian, data.is_implicit_VR = True, False
        data.save_as(path, write_like_original=False)
    else:
        data.save_as(path, enforce_file_format=True)


def dataset(plane: np.ndarray, kind: str, instance: str, series: str) -> Dataset:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CLASSES[kind]
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = instance
    data.Modality, data.SeriesInstanceUID, data.StudyInstanceUID, data.SeriesNumber = kind, series, "1.2.3", 3
    data.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    data.Columns, data.Rows = plane.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelData = np.ascontiguousarray(plane.T).tobytes()
    if kind == "CT":
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
    else:
        data.EchoTime, data.RepetitionTime, data.ScanningSequence = 30.0, 2000.0, "GR"
    return data


def off(values: torch.Tensor, affine: torch.Tensor) -> np.ndarray:
    """Difference of every voxel from what is to be seen where the affine (RAS) puts it."""
    index = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), -1)
    world = index @ affine[:3, :3].numpy().T + affine[:3, 3].numpy()
    return np.abs(values.numpy() - brightness(world * [-1, -1, 1]))


TURNED = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
OBLIQUE = np.linalg.qr(np.array([[1.0, 0.2, 0.1], [-0.2, 1.0, 0.3], [0.1, -0.3, 1.0]]))[0]
STACKS = {
    "straight": header(),
    "tilted": header(tilt=20.0),
    "tilted back": header(tilt=-18.5),
    "sagittal": header(axes=TURNED),
    "oblique": header(axes=OBLIQUE),
    "head first down": header(axes=np.diag([1.0, 1.0, -1.0])),
}


@pytest.mark.parametrize("kind", ["MR", "CT"])
@pytest.mark.parametrize("name", STACKS)
def test_every_voxel_is_where_its_header_says(tmp_path: Path, name: str, kind: str) -> None:
    image = load_image(write_series(tmp_path / "s", STACKS[name], kind=kind))
    assert image.values.shape == (1, *SHAPE) and image.meta["dtype"] == "int16" and image.meta["notes"] == []
    assert off(image.values[0] + (1024 if kind == "CT" else 0), image.affine).max() < 0.6
    # the tilt as a shear, not lost and not resampled
    step = STACKS[name][:3, 2] * [-1, -1, 1]
    np.testing.assert_allclose(np.abs(image.affine[:3, 2]), np.abs(step), atol=1e-4)


def test_missing_slices_are_not_seen(tmp_path: Path) -> None:
    at = np.delete(EVEN, [5, 6, 7])
    image = load_image(write_series(tmp_path / "s", header(), at))
    assert image.values.shape == (1, *SHAPE)
    assert image.seen is not None
    seen = image.seen[0].numpy()
    # the order of the slices is the reader's
    assert sorted(np.flatnonzero(~seen.any(axis=(0, 1)))) in ([5, 6, 7], [4, 5, 6])
    assert off(image.values[0], image.affine)[seen].max() < 0.6
    assert len(image.meta["notes"]) == 1 and "3.00 to 12.00 mm apart" in image.meta["notes"][0]


@pytest.mark.parametrize("tilt", [0.0, 15.0])
def test_uneven_slices_are_resampled_and_said(tmp_path: Path, tilt: float) -> None:
    at = np.array([0, 1, 2, 3, 4, 5, 6, 6.5, 7.5, 8.5, 9.5, 10.5])
    image = load_image(write_series(tmp_path / "s", header(tilt=tilt), at))
    assert "1.50 to 3.00 mm" in image.meta["notes"][0] or tilt
    assert len(image.meta["notes"]) == 1 and image.seen is None
    # linear interpolation of a smooth image
    assert off(image.values[0], image.affine).max() < 12


def test_slices_out_of_line_are_refused_with_their_positions(tmp_path: Path) -> None:
    write_series(tmp_path / "s", header())
    for path in sorted((tmp_path / "s").iterdir())[:1]:
        data = pydicom.dcmread(path)
        data.ImagePositionPatient = [data.ImagePositionPatient[0] + 8, *data.ImagePositionPatient[1:]]
        data.save_as(path)
    with pytest.raises(RegistrationError, match="do not lie on one line.*-16.50, -13.50"):
        load_image(tmp_path / "s")


def test_times_and_echoes_are_channels(tmp_path: Path) -> None:
    for time in range(3):
        tags = {"TemporalPositionIdentifier": time + 1, "AcquisitionNumber": time + 1, "NumberOfTemporalPositions": 3}
        write_series(tmp_path / "times", header(), add=100 * time, **tags)
    for echo in range(2):
        write_series(tmp_path / "echoes", header(), add=100 * echo, EchoTime=10.0 + 20 * echo, EchoNumbers=echo + 1)
    for folder, count in (("times", 3), ("echoes", 2)):
        image = load_image(tmp_path / folder)
        assert image.values.shape == (count, *SHAPE)
        for number, values in enumerate(image.values):
            assert off(values - 100 * number, image.affine).max() < 0.6
    assert "echo time 30 ms" in image.meta["channels"][1]
    # one echo alone
    assert load_image(f"{tmp_path / 'echoes'}#3_e2").values.shape == (1, *SHAPE)


def test_a_time_without_all_slices_is_refused(tmp_path: Path) -> None:
    for time in range(3):
        write_series(tmp_path / "s", header(), EVEN[: 12 - (time == 2)], AcquisitionNumber=time + 1)
    with pytest.raises(RegistrationError, match="not divisible"):
        load_image(tmp_path / "s")


def test_files_that_state_when_they_were_written_are_one_series(tmp_path: Path) -> None:
    """As ITK and SimpleITK write a series, a file a second."""
    folder = write_series(tmp_path / "s", header(), kind="CT")
    for second, path in enumerate(sorted(folder.iterdir())):
        data = pydicom.dcmread(path)
        data.StudyDate, data.StudyTime = "20260101", f"1200{second // 3:02d}"
        del data.SeriesNumber
        data.save_as(path)
    image = load_image(folder)
    assert image.values.shape == (1, *SHAPE)
    assert off(image.values[0] + 1024, image.affine).max() < 0.6


def test_two_series_are_listed_and_chosen(tmp_path: Path) -> None:
    write_series(tmp_path / "s", header(), SeriesDescription="first")
    write_series(tmp_path / "s", header(axes=TURNED), add=50, uid="1.2.3.2", SeriesNumber=7, SeriesDescription="second")
    with pytest.raises(
        RegistrationError, match=r"#3 \(first, .*#7 \(second, .*name one volume as in \"s#3\""
    ) as caught:
        load_image(tmp_path / "s", "moving")
    assert caught.value.argument == "moving"
    for number, add in ((3, 0), (7, 50)):
        image = load_image(f"{tmp_path / 's'}#{number}")
        assert off(image.values[0] - add, image.affine).max() < 0.6
    with pytest.raises(RegistrationError, match="the folder holds #3"):
        load_image(f"{tmp_path / 's'}#4")


def test_a_single_slice_is_an_image_in_2d_with_its_place(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", header(axes=TURNED, spacing=(1.5, 2.0, 3.0)), EVEN[4:5])
    for source in (folder, next(folder.iterdir())):
        image = load_image(source)
        assert image.dims == 2 and sorted(image.grid.spacing) == [1.5, 2.0]
        place = torch.tensor(image.meta["place"])
        assert off(image.values[0][..., None], place).max() < 0.6


def enhanced(path: Path, affine: np.ndarray, at: np.ndarray = EVEN) -> Path:
    """One file of many frames, each with its own position."""
    data = dataset(pixels(affine, at), "MR", "1.2.3.9", "1.2.3.8")
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    data.NumberOfFrames = len(at)
    data.PixelData = np.ascontiguousarray(pixels(affine, at).T).tobytes()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = spacing[1::-1].tolist(), float(spacing[2])
    plane.ImageOrientationPatient = (affine[:3, :2] / spacing[:2]).T.ravel().tolist()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([plane])
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for number, place in enumerate(at):
        frame, where, content = Dataset(), Dataset(), Dataset()
        where.ImagePositionPatient = np.round(affine[:3, :3] @ [0, 0, place] + affine[:3, 3], 6).tolist()
        content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", number + 1, [1, number + 1]
        frame.PlanePositionSequence, frame.FrameContentSequence = Sequence([where]), Sequence([content])
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    save(data, path)
    return path


@pytest.mark.parametrize("tilt", [0.0, 12.0])
def test_enhanced_files_are_volumes(tmp_path: Path, tilt: float) -> None:
    image = load_image(enhanced(tmp_path / "e.dcm", header(tilt=tilt)))
    assert image.values.shape == (1, *SHAPE)
    assert off(image.values[0], image.affine).max() < 0.6


def test_a_film_has_its_frames_as_channels(tmp_path: Path) -> None:
    frames = pixels(header(), EVEN)
    data = dataset(frames, "MR", "1.2.3.9", "1.2.3.8")
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.3.1"  # ultrasound
    data.Modality, data.NumberOfFrames, data.PixelData = "US", 12, np.ascontiguousarray(frames.T).tobytes()
    save(data, tmp_path / "film.dcm")
    image = load_image(tmp_path / "film.dcm")
    np.testing.assert_array_equal(image.values.numpy(), np.moveaxis(frames, -1, 0))


def test_pixels_are_those_that_the_file_states(tmp_path: Path) -> None:
    """Where ITK turns the brightness around, takes bits for bytes, or mistakes the order of bytes or of colors."""
    plane = pixels(header(), EVEN[:1])[..., 0] - 400
    kinds: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "inverted": (plane, {"PhotometricInterpretation": "MONOCHROME1"}),
        "mask": ((plane > 300).astype(np.uint8), {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}),
        "32 bits": (plane.astype(np.uint32) * 2**21, {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}),
        "scaled": (plane, {"RescaleSlope": 0.5, "RescaleIntercept": -7}),
        "moved": (plane, {"RescaleSlope": 1, "RescaleIntercept": -1024}),
        "colors": (np.stack([plane * k for k in (10, 20, 30)], -1).astype(np.uint16), {"SamplesPerPixel": 3}),
    }
    for name, (stored, tags) in kinds.items():
        data = dataset(plane, "MR", "1.2.3.9", "1.2.3.8")
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture
        flat = np.ascontiguousarray(np.swapaxes(stored, 0, 1))
        data.PixelData = np.packbits(flat.ravel(), bitorder="little").tobytes() if name == "mask" else flat.tobytes()
        data.PixelRepresentation = int(stored.dtype.kind == "i")
        for tag, value in tags.items():
            setattr(data, tag, value)
        if name == "colors":
            data.PhotometricInterpretation, data.PlanarConfiguration = "RGB", 0
            data.compress("1.2.840.10008.1.2.5")  # run lengths
        save(data, tmp_path / "f.dcm")
        image = load_image(tmp_path / "f.dcm")
        right = stored * tags.get("RescaleSlope", 1) + tags.get("RescaleIntercept", 0)
        right = np.moveaxis(right, -1, 0) if name == "colors" else right[None]
        np.testing.assert_array_equal(image.values.numpy(), right, err_msg=name)
        assert image.meta["dtype"] == ("int16" if name == "moved" else right.dtype.name)


def segmentation(path: Path, affine: np.ndarray, labels: np.ndarray, segments: dict[int, np.ndarray]) -> Path:
    """A mask of one bit for each segment and slice, in which there is any of it."""
    found = [(n, k) for n, mask in segments.items() for k in range(labels.shape[2]) if mask[..., k].any()]
    data = pydicom.dcmread(enhanced(path, affine, np.array([float(k) for _, k in found])))
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
    data.Modality, data.SegmentationType, data.PixelRepresentation = "SEG", "BINARY", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 1, 1, 0
    for frame, (number, _) in zip(data.PerFrameFunctionalGroupsSequence, found, strict=True):
        which = Dataset()
        which.ReferencedSegmentNumber = number
        frame.SegmentIdentificationSequence = Sequence([which])
    bits = np.stack([segments[n][..., k].T for n, k in found]).astype(np.uint8)
    data.PixelData = np.packbits(bits.ravel(), bitorder="little").tobytes()
    save(data, path)
    return path


@pytest.mark.parametrize("name", ["oblique", "head first down"])
def test_a_segmentation_is_a_label_image(tmp_path: Path, name: str) -> None:
    labels = np.zeros(SHAPE, dtype=int)
    labels[4:9, 3:15, 2:6], labels[10:21, 5:9, 4:9] = 1, 7
    labels[..., 5] = 0  # an empty slice, which such files leave out
    affine = STACKS[name]
    segments = {n: labels == n for n in (1, 7)}
    path = segmentation(tmp_path / "s.dcm", affine, labels, segments)
    image = load_image(path)
    index = np.stack(np.nonzero(image.values[0].numpy()), -1)
    world = index @ image.affine[:3, :3].numpy().T + image.affine[:3, 3].numpy()
    back = (world * [-1, -1, 1] - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    right = labels[tuple(np.rint(back).astype(int).T)]
    np.testing.assert_array_equal(image.values[0].numpy()[tuple(index.T)], right)
    assert len(index) == (labels > 0).sum() and np.abs(back - np.rint(back)).max() < 1e-4
    with pytest.raises(RegistrationError, match="masks of one bit"):
        load_image(tmp_path)
    segmentation(path, affine, labels, {1: segments[1], 7: segments[1] | segments[7]})
    with pytest.raises(RegistrationError, match="segments overlap"):
        load_image(path)


def test_a_file_without_pixels_says_what_it_is(tmp_path: Path) -> None:
    data = dataset(pixels(header(), EVEN[:1])[..., 0], "MR", "1.2.3.9", "1.2.3.8")
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.5"
    del data.PixelData
    save(data, tmp_path / "plan.dcm")
    with pytest.raises(RegistrationError, match="without pixels .RT Plan Storage"):
        load_image(tmp_path / "plan.dcm")


def test_folders_without_an_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(RegistrationError, match="dcm2niix"):
        load_image(tmp_path)
