# SPDX-License-Identifier: Apache-2.0
"""DICOM: folders and enhanced files through dcm2niix, other files by pydicom and ITK.

dcm2niix knows the vendors: it tells series, times, echoes and mosaics apart and decodes their pixels. A NIfTI file
states one spacing and (as dcm2niix writes it) no gantry tilt, so where the slices lie is taken from the DICOM headers.
Of a file of its own ITK says where it lies, and pydicom what it holds: ITK takes masks of one bit for bytes and turns
MONOCHROME1 around, which neither dcm2niix nor pydicom does.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from monai_zsreg.geometry import flip_points
from monai_zsreg.io.readers import Stored, from_nibabel, read_itk

_TAGS = [
    "SOPClassUID",
    "BitsAllocated",
    "SeriesInstanceUID",
    "StudyDate",
    "StudyTime",
    "ImageType",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "NumberOfFrames",
    "SpacingBetweenSlices",
    "GridFrameOffsetVector",
    "PerFrameFunctionalGroupsSequence",
    "SharedFunctionalGroupsSequence",
]
_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
# of the distance of two slices: what rounding in headers may leave
_EVEN = 0.02
# of the usual distance of two slices: farther ones have slices missing between them
_GAP = 1.5


@dataclass
class _Volume:
    """One of the files that dcm2niix made."""

    key: str
    stored: Stored
    about: dict[str, Any]

    def __str__(self) -> str:
        channels, *shape = self.stored.channels.shape
        times = f" x {channels} times" if channels > 1 else ""
        echo = f", echo time {1000 * self.about['EchoTime']:g} ms" if "EchoTime" in self.about else ""
        name = self.about.get("SeriesDescription") or self.about.get("ProtocolName") or "no description"
        return f"#{self.key} ({name}, {' x '.join(str(n) for n in shape)}{times}{echo})"


def is_dicom(path: Path) -> bool:
    """Whether a file says that it is DICOM."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_dicom_file(path: Path) -> Stored:
    """One file: an image in 2D, a volume or a series of them where it has many frames, or a segmentation.

    Raises:
        Exception: what pydicom, dcm2niix or ITK raise for a file that they cannot read.
    """
    import pydicom

    data: Any = pydicom.dcmread(path, force=True)
    kind = data.get("SOPClassUID", data.file_meta.get("MediaStorageSOPClassUID"))
    if not {"PixelData", "FloatPixelData", "DoubleFloatPixelData"} & set(data.dir()):
        raise ValueError(f"a DICOM file without pixels ({getattr(kind, 'name', 'of no stated kind')})")
    if kind == _SEGMENTATION:
        return _segmentation(data)
    if "PerFrameFunctionalGroupsSequence" in data and "SeriesInstanceUID" in data:
        return _one_of(_converted(path, [data]), path, None)
    stored = read_itk(path)
    pixels = _pixels(data)
    if pixels is not None and pixels.shape == stored.channels.shape:
        stored.channels = pixels
        stored.meta["dtype"] = pixels.dtype.name
    spaced = "SpacingBetweenSlices" in data or "GridFrameOffsetVector" in data
    if stored.channels.shape[-1] > 1 and not spaced:
        # frames without a distance from one to the next are a film
        if len(stored.channels) > 1:
            raise ValueError("a film in color: save a frame, or the film in gray")
        stored.channels = np.moveaxis(stored.channels, -1, 1)[0][..., None]
    return stored


def _pixels(data: Any) -> np.ndarray | None:
    """``[C, columns, rows, frames]`` in the unit that the file states; None for what ITK decodes and pydicom does not.

    That is some compressed pixels, color palettes, and color stated as luminance and chrominance.
    """
    if data.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2", "RGB"):
        return None
    try:
        array = np.asarray(data.pixel_array)
    except Exception:  # it raises many things where a decoder is missing, and ITK says what is wrong otherwise
        return None
    slope, intercept = float(data.get("RescaleSlope", None) or 1), float(data.get("RescaleIntercept", None) or 0)
    if (slope, intercept) != (1.0, 0.0):
        array = array * slope + intercept
        if slope.is_integer() and intercept.is_integer() and np.abs(array).max() < 2**31:
            array = array.astype(np.int16 if np.abs(array).max() < 2**15 else np.int32)
    return array.reshape(-1, data.Rows, data.Columns, data.SamplesPerPixel).T


def _segmentation(data: Any) -> Stored:
    """A segmentation as one label image: the numbers of its segments, 0 where there is none."""
    numbers = [
        int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        for frame in data.PerFrameFunctionalGroupsSequence
    ]
    if data.SegmentationType != "BINARY":
        raise ValueError(f"a segmentation of type {data.SegmentationType} instead of BINARY")
    planes, points = _frames(data)
    measures = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    axes = planes[0]
    normal = np.cross(*axes)
    along = (points - points[0]) @ normal
    levels = np.unique(np.round(along, 3))
    # empty slices are left out
    step = float(np.diff(levels).min()) if len(levels) > 1 else float(measures.get("SpacingBetweenSlices", 1.0))
    index = (along - along.min()) / step
    apart = np.abs(points - points[0] - np.outer(along, normal)).max()
    if np.ptp(planes, axis=0).max() > 1e-4 or apart > _EVEN * step or np.abs(index - index.round()).max() > _EVEN:
        raise ValueError("a segmentation whose frames are not even steps along one normal")
    masks = np.asarray(data.pixel_array).reshape(-1, data.Rows, data.Columns) > 0
    if len(masks) != len(numbers):
        raise ValueError(f"{len(masks)} frames of a segmentation and the places of {len(numbers)}")
    labels = np.zeros((data.Columns, data.Rows, round(index.max()) + 1), dtype=np.min_scalar_type(max(numbers)))
    for number, level, mask in zip(numbers, index.round().astype(int), masks, strict=True):
        if labels[..., level][mask.T].any():
            raise ValueError("a segmentation whose segments overlap")
        labels[..., level][mask.T] = number
    affine = np.eye(4)
    rows, columns = (float(size) for size in measures.PixelSpacing)
    affine[:3, :3] = np.stack([axes[0] * columns, axes[1] * rows, normal * step], axis=1)
    affine[:3, 3] = points[along.argmin()]
    return Stored(labels[None], affine, {"dtype": labels.dtype.name, "unit": "mm"})


def read_dicom_folder(folder: Path, choice: str | None) -> Stored:
    """The image in a folder. Times and echoes of a series are its channels.

    Args:
        folder: with the files of one or several series.
        choice: number of a series, or the key of one volume, as the error for several of them lists these.

    Raises:
        ValueError: no image; several series and no choice; slices that do not form a volume.
    """
    headers = [header for header in map(_header, sorted(folder.iterdir())) if header is not None]
    if any(header.get("BitsAllocated") == 1 for header in headers):
        # which dcm2niix takes for bytes
        raise ValueError("the folder holds masks of one bit: name the file of one")
    return _one_of(_converted(folder, headers), folder, choice)


def _header(path: Path) -> Any | None:
    """The tags that tell where slices lie; None for what is no DICOM file."""
    import pydicom

    if not path.is_file():
        return None
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=_TAGS)
        return header if "SeriesInstanceUID" in header else None
    except Exception:  # it raises many things for what is not DICOM; dcm2niix says what it makes of the file
        return None


def _converted(source: Path, headers: Sequence[Any]) -> list[_Volume]:
    """What dcm2niix makes of a folder or a file, each volume where the headers say that it lies."""
    try:
        import dcm2niix
    except ImportError as error:
        raise ImportError(f"reading a DICOM series needs the package dcm2niix ({error})") from error
    with tempfile.TemporaryDirectory(prefix="monai_zsreg-") as out:
        # uncompressed, no search in folders below, not the user's defaults, sidecars with identifiers
        options = ["-z", "n", "-d", "0", "-g", "i", "-b", "y", "-ba", "n", "-f", "%s", "-o", out]
        single = ["-s", "y"] if source.is_file() else []
        read = _with_one_time(source, headers, Path(out)) if source.is_dir() else source
        run = subprocess.run(
            [dcm2niix.bin, *options, *single, str(read)], capture_output=True, text=True, errors="replace"
        )
        volumes = []
        # what dcm2niix resampled itself, and overlays, have no sidecar
        for sidecar in sorted(Path(out).glob("*.json")):
            nifti = sidecar.with_suffix(".nii")
            file: Any = nib.load(nifti) if nifti.exists() else None
            # older releases lay slices of one place upon each other, where newer ones make no volume
            if file is not None and max(file.shape[:2]) > 1 and np.linalg.det(file.affine) != 0:
                about = json.loads(sidecar.read_text(encoding="utf-8", errors="replace"))
                stored = from_nibabel(file)
                stored.meta["notes"] = []
                volumes.append(_Volume(sidecar.stem, stored, about))
    if not volumes:
        said = [line.strip() for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        telling = ("Error", "Unable", "Unsupported", "Slice positions")
        reasons = [line for line in said if line.startswith(telling)] or said[-2:]
        raise ValueError("dcm2niix makes no volume of it: " + "; ".join(reasons[:3]))
    for volume in volumes:
        if "MOSAIC" not in volume.about.get("ImageType", ()):
            _place_slices(volume, headers)
    return volumes


def _with_one_time(folder: Path, headers: Sequence[Any], out: Path) -> Path:
    """The folder, or a copy in which the files of a series state one time of the study.

    They should, and dcm2niix takes them apart where they do not. ITK and SimpleITK state when they wrote each file.
    """
    import pydicom

    first: dict[str, tuple[Any, Any]] = {}
    times = [(header.SeriesInstanceUID, (header.get("StudyDate"), header.get("StudyTime"))) for header in headers]
    if all(first.setdefault(series, when) == when for series, when in times):
        return folder
    copy = out / "one_time"
    copy.mkdir()
    for header in headers:
        data = pydicom.dcmread(header.filename, force=True)
        data.StudyDate, data.StudyTime = first[data.SeriesInstanceUID]
        data.save_as(copy / Path(header.filename).name)
    return copy


def _one_of(volumes: list[_Volume], source: Path, choice: str | None) -> Stored:
    """The only series, or the chosen one, its volumes as channels."""
    listed, some = ", ".join(str(v) for v in volumes), f'"{source.name}#{volumes[0].key}"'
    if choice is not None:
        exact = [v for v in volumes if v.key == choice]
        volumes = exact or [v for v in volumes if str(v.about.get("SeriesNumber")) == choice]
    if not volumes or not all(_same_place(volumes[0], other) for other in volumes):
        raise ValueError(f"the folder holds {listed}; name one volume as in {some}")
    first = volumes[0]
    if len(volumes) > 1:
        first.stored.meta["channels"] = [str(v) for v in volumes for _ in v.stored.channels]
    first.stored.channels = np.concatenate([v.stored.channels for v in volumes])
    return first.stored


def _same_place(one: _Volume, two: _Volume) -> bool:
    same = one.about.get("SeriesInstanceUID") == two.about.get("SeriesInstanceUID")
    a, b = one.stored, two.stored
    return same and a.channels.shape[1:] == b.channels.shape[1:] and np.allclose(a.affine, b.affine, atol=1e-3)


# -------------------------------------------------------------------------------------------------- where slices lie


def _frames(header: Any) -> tuple[np.ndarray, np.ndarray]:
    """Row and column directions ``[N, 2, 3]`` and positions ``[N, 3]``, RAS, of a file's frames that state both."""
    shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    planes, points = [], []
    for frame in header.get("PerFrameFunctionalGroupsSequence") or [None]:
        plane = where = header
        if frame is not None:
            plane = (frame.get("PlaneOrientationSequence") or shared.get("PlaneOrientationSequence") or [{}])[0]
            where = (frame.get("PlanePositionSequence") or shared.get("PlanePositionSequence") or [{}])[0]
        if plane.get("ImageOrientationPatient") and where.get("ImagePositionPatient"):
            planes.append(np.array(plane.get("ImageOrientationPatient"), dtype=np.float64).reshape(2, 3))
            points.append(np.array(where.get("ImagePositionPatient"), dtype=np.float64))
    return flip_points(np.reshape(planes, (-1, 2, 3))), flip_points(np.reshape(points, (-1, 3)))


def _positions(volume: _Volume, headers: Sequence[Any], normal: np.ndarray) -> np.ndarray:
    """Where the slices of a volume lie, ``[N, 3]`` RAS, each once, in the order of the volume."""
    series = volume.about.get("SeriesInstanceUID")
    found = [_frames(header) for header in headers if header.SeriesInstanceUID == series]
    planes, points = (np.concatenate(part) for part in zip(*found, strict=True)) if found else _frames({})
    points = points[np.abs(np.cross(planes[:, 0], planes[:, 1]) @ normal) > 0.999]
    points = points[np.argsort(points @ normal)]
    return points[np.diff(points @ normal, prepend=-np.inf) > 1e-3]


def _place_slices(volume: _Volume, headers: Sequence[Any]) -> None:
    """Put the slices of a volume where the headers say; unevenly spaced ones are resampled along their stack."""
    stored = volume.stored
    count = stored.channels.shape[-1]
    affine = stored.affine = np.array(stored.affine, dtype=np.float64)
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal *= np.sign(normal @ affine[:3, 2]) / np.linalg.norm(normal)
    positions = _positions(volume, headers, normal)
    if count == 1 or len(positions) == 0:
        return
    along = positions @ normal
    shown = ", ".join(f"{a:.2f}" for a in along[:8]) + (", ..." if len(along) > 8 else "")
    if len(positions) != count:
        raise ValueError(f"{volume} has {count} slices at {len(positions)} positions ({shown} mm): it is not whole")
    whole = positions[-1] - positions[0]
    tolerance = max(_EVEN * (along[-1] - along[0]) / (count - 1), 1e-3)
    straight = positions[0] + np.outer((along - along[0]) / (along[-1] - along[0]), whole)
    if np.linalg.norm(positions - straight, axis=1).max() > tolerance:
        raise ValueError(f"{volume}: its slices do not lie on one line ({shown} mm along their normal)")
    even = np.linspace(along[0], along[-1], count)
    if np.abs(along - even).max() > tolerance:
        step = float(np.median(np.diff(along)))
        count = 1 + round((along[-1] - along[0]) / step)
        even = np.linspace(along[0], along[-1], count)
        stored.channels = _between_slices(stored.channels, along, even)
        distances = f"{np.diff(along).min():.2f} to {np.diff(along).max():.2f} mm"
        stored.meta["notes"].append(f"the slices are {distances} apart and were resampled to {step:.2f} mm")
    affine[:3, 2] = whole / (count - 1)


def _between_slices(channels: np.ndarray, given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Linear interpolation along the last axis; NaN, which means not seen, where slices are missing."""
    right = np.clip(np.searchsorted(given, wanted), 1, len(given) - 1)
    left = right - 1
    distance = given[right] - given[left]
    weight = np.clip((wanted - given[left]) / distance, 0.0, 1.0).astype(np.float32)
    values = channels[..., left] * (1 - weight) + channels[..., right] * weight
    missing = distance > _GAP * np.median(np.diff(given))
    values[..., missing & (weight > _EVEN) & (weight < 1 - _EVEN)] = np.nan
    return values.astype(np.float32)
