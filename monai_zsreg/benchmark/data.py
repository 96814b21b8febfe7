# SPDX-License-Identifier: Apache-2.0
"""Co-registered pairs of images: found in a folder or listed in a datalist, with the residual each pair carries.

A residual says how far a "co-registered" pair really is from aligned: ``fixed(x) ~ moving(x + r)``, r in millimeters
along the voxel axes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.transforms import LoadImage

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid

__all__ = [
    "LABEL_NAMES",
    "Pair",
    "attach_residuals",
    "background_value",
    "find_pairs",
    "foreground",
    "load_volume",
    "read_datalist",
    "read_residuals",
    "residual_shift",
    "same_modality_pairs",
    "slices_of",
    "superior_axis",
    "t1_pairs",
]

LABEL_NAMES = ("seg", "mask", "tissue")
_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
_PREFIX = "study1_"

Residuals = dict[tuple[str, str, str], tuple[float, ...]]


@dataclass(frozen=True)
class Pair:
    """Two images of one subject on one grid, or two subjects' images for the label comparison.

    Args:
        subject: who it is; the unit that intervals resample.
        fixed_modality: short name, such as ``t1``.
        moving_modality: likewise.
        fixed: file of the fixed image.
        moving: file of the moving image. For a simulated contrast it is the same file.
        mask: file of a brain mask on the same grid.
        tissue: file of tissue classes on the same grid (1 CSF, 2 gray, 3 white matter), or None.
        labels: anatomical labels of the fixed and of the moving image, or None.
        residual: ``fixed(x) ~ moving(x + r)``, mm along the voxel axes; None where nobody measured it.
        simulated: which image is a simulated contrast of the other: ``"fixed"``, ``"moving"`` or None.
    """

    subject: str
    fixed_modality: str
    moving_modality: str
    fixed: Path
    moving: Path
    mask: Path | None = None
    tissue: Path | None = None
    labels: tuple[Path, Path] | None = None
    residual: tuple[float, ...] | None = None
    simulated: str | None = None

    @property
    def name(self) -> str:
        """Subject and modalities, as they stand in case names."""
        return f"{self.subject}:{self.fixed_modality}-{self.moving_modality}"

    def reversed(self) -> Pair:
        """The pair with the roles of the two images swapped."""
        back = {"fixed": "moving", "moving": "fixed", None: None}
        return replace(
            self,
            fixed_modality=self.moving_modality,
            moving_modality=self.fixed_modality,
            fixed=self.moving,
            moving=self.fixed,
            labels=None if self.labels is None else self.labels[::-1],
            residual=None if self.residual is None else tuple(-r for r in self.residual),
            simulated=back[self.simulated],
        )


# --------------------------------------------------------------------------------------------------------------------
# reading images
# --------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=10)
def load_volume(path: Path) -> tuple[np.ndarray, Grid]:
    """Read one image without its channel axis.

    Args:
        path: file of a 3D (or 2D) image with one channel.

    Returns:
        Values, float32, not to be written to, and the lattice. Values that are not finite become 0.

    Raises:
        RegistrationError: the file holds more than one channel.
    """
    image = LoadImage(image_only=True, ensure_channel_first=True, dtype=np.float32)(path)
    if image.shape[0] != 1:
        raise RegistrationError("data", str(path), "images with one channel")
    array = np.ascontiguousarray(np.nan_to_num(image[0].numpy(), nan=0.0, posinf=0.0, neginf=0.0))
    array.setflags(write=False)
    return array, Grid.of(image, str(path))


def background_value(image: np.ndarray) -> float:
    """Median of the values on the border of the image."""
    faces = [np.take(image, (0, -1), axis=axis).ravel() for axis in range(image.ndim)]
    return float(np.median(np.concatenate(faces)))


def foreground(image: np.ndarray) -> np.ndarray:
    """Object against background: other than the border's value where that is constant, otherwise by Otsu's classes.

    Args:
        image: 2D or 3D.

    Returns:
        Boolean, same shape. All true where the image has no background.
    """
    from skimage.filters import threshold_otsu

    back = background_value(image)
    flat = image == back
    if flat.mean() > 0.1:
        return ~flat
    high = np.percentile(image, 99.5)
    if high <= image.min():
        return np.ones_like(image, dtype=bool)
    clipped = np.minimum(image, high)
    above = clipped > threshold_otsu(clipped)
    # between two far apart classes Otsu's threshold is arbitrary; a third of the way up keeps dark tissue
    low, top = float(clipped[~above].mean()), float(clipped[above].mean())
    mask: np.ndarray = image > low + (top - low) / 3
    # photographs fill their frame: a threshold would call the dark half of the scene background
    return mask if mask.mean() < 0.8 else np.ones_like(mask)


def superior_axis(grid: Grid) -> int:
    """The array axis that runs closest to head-foot."""
    codes = nib.orientations.io_orientation(_affine4(grid))
    return int(np.flatnonzero(codes[:, 0] == 2)[0])


def slices_of(mask: np.ndarray, axis: int, count: int) -> list[int]:
    """Indices of slices with a large foreground, spread over those with at least 60 % of the largest area."""
    area = mask.sum(axis=tuple(a for a in range(mask.ndim) if a != axis))
    if area.max() == 0:
        return []
    good = np.flatnonzero(area >= 0.6 * area.max())
    return sorted({int(good[round(q)]) for q in np.linspace(0, len(good) - 1, count + 2)[1:-1]})


def _affine4(grid: Grid) -> np.ndarray:
    full = np.eye(4)
    dims = grid.dims
    full[:dims, :dims] = grid.affine[:dims, :dims].numpy()
    full[:dims, 3] = grid.affine[:dims, dims].numpy()
    return full


# --------------------------------------------------------------------------------------------------------------------
# finding pairs
# --------------------------------------------------------------------------------------------------------------------


def find_pairs(root: str | Path, wanted: Sequence[tuple[str, str]]) -> tuple[list[Pair], list[str]]:
    """Pairs of every folder below ``root`` that holds the wanted modalities on one grid.

    Args:
        root: a folder; each folder below it with images named after their modality (``t1.nii.gz``) is a subject.
        wanted: pairs of modality names, such as ``[("t1", "t2")]``.

    Returns:
        The pairs in one direction, and one line for each pair that was left out, with the reason.

    Raises:
        RegistrationError: no such folder.
    """
    pairs, left_out = [], []
    for subject, files in _subjects(root):
        for a, b in wanted:
            if a not in files or b not in files:
                continue
            # headers say which pairs cannot be co-registered voxel by voxel
            if not load_volume(files[a])[1].same_as(load_volume(files[b])[1], tolerance=1e-2):
                left_out.append(f"{subject}: {a} and {b} lie on different grids")
                continue
            pairs.append(Pair(subject, a, b, files[a], files[b], files.get("mask"), files.get("tissue")))
    return pairs, left_out


def t1_pairs(root: str | Path) -> list[Pair]:
    """For every subject with a T1, the pair of that T1 and a T2-like contrast to be simulated from it."""
    pairs = []
    for subject, files in _subjects(root):
        # a head without a mask has scalp and bone, which the simulation has no tissue for
        if "t1" in files and ({"mask", "tissue"} & set(files) or _stripped(load_volume(files["t1"])[0])):
            t1 = files["t1"]
            pairs.append(
                Pair(subject, "t1", "t2-sim", t1, t1, files.get("mask"), files.get("tissue"), None, None, "moving")
            )
    return pairs


def same_modality_pairs(root: str | Path) -> list[Pair]:
    """T1 images of different subjects of one data set (folders with one parent), where both have label maps."""
    groups: dict[Path, list[tuple[str, dict[str, Path]]]] = {}
    for subject, files in _subjects(root):
        if "t1" in files and "seg" in files:
            groups.setdefault(Path(subject).parent, []).append((subject, files))
    pairs = []
    for members in groups.values():
        for one, files in members:
            for other, others in members:
                labels = (files["seg"], others["seg"])
                if one != other and _anatomical(labels):
                    pairs.append(Pair(f"{one}|{other}", "t1", "t1", files["t1"], others["t1"], labels=labels))
    return pairs


def _subjects(root: str | Path) -> list[tuple[str, dict[str, Path]]]:
    folder = Path(root)
    if not folder.is_dir():
        raise RegistrationError("data", str(root), "a folder that exists")
    found = []
    for directory in sorted([folder, *[p for p in folder.rglob("*") if p.is_dir()]]):
        files = {}
        for path in sorted(directory.iterdir()):
            suffix = next((s for s in _SUFFIXES if path.name.endswith(s)), None)
            if suffix is not None and path.is_file():
                files[path.name[: -len(suffix)].removeprefix(_PREFIX)] = path
        if set(files) - set(LABEL_NAMES):
            found.append((directory.relative_to(folder).as_posix(), files))
    return found


def _stripped(image: np.ndarray) -> bool:
    # a whole head fills more of its frame than a brain does
    return bool((image == background_value(image)).mean() > 0.65)


def _anatomical(labels: tuple[Path, Path]) -> bool:
    # a lesion mask has one or a few labels and says nothing about two people's anatomy
    shared = np.intersect1d(load_volume(labels[0])[0], load_volume(labels[1])[0])
    return len(shared) >= 8


def read_datalist(path: str | Path) -> list[Pair]:
    """Pairs of a JSON file: a list, or a dictionary with one list, of items such as

    ``{"fixed": "a/t1.nii.gz", "moving": "a/t2.nii.gz", "subject": "a", "fixed_modality": "t1", "moving_modality": "t2",
    "mask": "a/mask.nii.gz", "residual": [0.0, 0.1, 0.3]}``; ``mask`` and ``residual`` may be missing. Relative file
    names start at the folder of the JSON file.

    Raises:
        RegistrationError: the file is no such list, an image is missing, or the two images lie on different grids.
    """
    source = Path(path)
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RegistrationError("data", str(path), f"a datalist in JSON ({error})") from error
    if isinstance(content, dict):
        content = [item for value in content.values() if isinstance(value, list) for item in value]
    if not isinstance(content, list) or not content:
        raise RegistrationError("data", str(path), "a list of items with 'fixed' and 'moving'")
    return [_pair(item, source, index) for index, item in enumerate(content)]


def _pair(item: dict, source: Path, index: int) -> Pair:
    where = f"{source.name}[{index}]"
    if not isinstance(item, dict) or "fixed" not in item or "moving" not in item:
        raise RegistrationError(where, item, "a dictionary with 'fixed' and 'moving'")
    files = {key: source.parent / item[key] for key in ("fixed", "moving", "mask", "tissue") if item.get(key)}
    for key, path in files.items():
        if not path.is_file():
            raise RegistrationError(f"{where}['{key}']", str(path), "a file that exists")
    grids = [load_volume(files[key])[1] for key in ("fixed", "moving")]
    if not grids[0].same_as(grids[1], tolerance=1e-2):
        raise RegistrationError(where, item, "two co-registered images on one grid")
    residual = item.get("residual")
    if residual is not None and (len(residual) != grids[0].dims or not np.isfinite(residual).all()):
        raise RegistrationError(f"{where}['residual']", residual, f"{grids[0].dims} finite numbers, mm")
    return Pair(
        subject=str(item.get("subject", index)),
        fixed_modality=str(item.get("fixed_modality", "fixed")),
        moving_modality=str(item.get("moving_modality", "moving")),
        fixed=files["fixed"],
        moving=files["moving"],
        mask=files.get("mask"),
        tissue=files.get("tissue"),
        residual=None if residual is None else tuple(float(r) for r in residual),
    )


# --------------------------------------------------------------------------------------------------------------------
# residuals
# --------------------------------------------------------------------------------------------------------------------


def read_residuals(path: str | Path) -> Residuals:
    """Residual shifts of pairs, from a CSV file with the columns ``subject, a, b, ngf_dx, ngf_dy, ngf_dz``.

    Columns ``dx, dy, dz`` serve as well. ``a(x) ~ b(x + d)``, mm along the voxel axes.

    Raises:
        RegistrationError: the file cannot be read or has other columns.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        prefix = "ngf_" if rows and "ngf_dx" in rows[0] else ""
        return {(r["subject"], r["a"], r["b"]): tuple(float(r[f"{prefix}d{c}"]) for c in "xyz") for r in rows}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RegistrationError(
            "residuals", str(path), f"a CSV file with subject, a, b, dx, dy, dz ({error!r})"
        ) from error


def attach_residuals(pairs: Iterable[Pair], residuals: Residuals) -> list[Pair]:
    """The pairs with the residuals that are known for them, in whichever direction they were measured."""
    done = []
    for pair in pairs:
        forward = residuals.get((pair.subject, pair.fixed_modality, pair.moving_modality))
        back = residuals.get((pair.subject, pair.moving_modality, pair.fixed_modality))
        if pair.simulated is None and forward is not None:
            pair = replace(pair, residual=forward)
        elif pair.simulated is None and back is not None:
            pair = replace(pair, residual=tuple(-r for r in back))
        done.append(pair)
    return done


def residual_shift(residual: Sequence[float], grid: Grid) -> torch.Tensor:
    """A residual in mm along the voxel axes as a world matrix ``(D+1, D+1)``: x to x + r."""
    dims = grid.dims
    shift = torch.eye(dims + 1, dtype=torch.float64)
    steps = torch.tensor([r / s for r, s in zip(residual, grid.spacing, strict=True)], dtype=torch.float64)
    shift[:dims, dims] = grid.affine[:dims, :dims] @ steps
    return shift
