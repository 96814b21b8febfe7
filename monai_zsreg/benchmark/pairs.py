# SPDX-License-Identifier: Apache-2.0
"""Co-registered pairs of images: found in a folder or listed in a datalist, with the residual each pair carries.

A residual says how far a "co-registered" pair really is from aligned: ``fixed(x) ~ moving(x + r)``, r in millimeters
along the voxel axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from monai_zsreg.benchmark import damage
from monai_zsreg.benchmark.volumes import Volume, background_value, foreground, read_volume
from monai_zsreg.errors import RegistrationError, require
from monai_zsreg.io.files import rows_of

_LABELS = {"seg", "mask", "tissue"}
_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
_PREFIX = "study1_"


@dataclass(frozen=True)
class Pair:
    """Two images on one grid, or two people's images with labels."""

    subject: str
    fixed_modality: str
    moving_modality: str
    fixed: Path
    moving: Path  # the fixed image's file where one contrast is simulated
    kind: str = "real"  # as that of a row
    mask: Path | None = None  # brain
    tissue: Path | None = None  # 1 CSF, 2 gray, 3 white matter
    labels: tuple[Path, Path] | None = None  # anatomical, of the fixed and of the moving image
    residual: tuple[float, ...] | None = None
    slice: tuple[int, int] | None = None  # axis and index of the slice that it is of volumes

    @property
    def name(self) -> str:
        spot = "" if self.slice is None else f":{'ijk'[self.slice[0]]}{self.slice[1]}"
        return f"{self.subject}:{self.fixed_modality}-{self.moving_modality}{spot}"

    def reversed(self) -> Pair:
        """The pair with the roles of the two images swapped."""
        back = None if self.residual is None else tuple(-r for r in self.residual)
        one, two = self.moving_modality, self.fixed_modality
        turned = replace(self, fixed_modality=one, moving_modality=two, residual=back)
        return replace(turned, fixed=self.moving, moving=self.fixed)

    def images(self) -> tuple[Volume, Volume, np.ndarray, np.ndarray | None]:
        """Fixed and moving image, the fixed foreground, and the brain where a file tells it."""
        if self.kind == "natural":
            return *_photograph(self), None

        def cut(path: Path) -> np.ndarray:
            values = read_volume(path).values
            return values if self.slice is None else np.take(values, self.slice[1], axis=self.slice[0])

        fixed, moving = cut(self.fixed), cut(self.moving)
        brain = None if self.mask is None else cut(self.mask) > 0
        tissue = None if self.tissue is None else np.rint(cut(self.tissue))
        if self.kind == "exact":
            # the brain is where the T1 has signal, also where a mask file is a little larger
            inside = foreground(fixed) if brain is None else brain & (fixed > background_value(fixed))
            t2 = damage.simulated_t2(fixed, inside, tissue)
            fixed, moving = (t2, fixed) if self.fixed_modality == "t2-sim" else (fixed, t2)
        mask = foreground(fixed) if brain is None or not brain.any() else brain
        # a slice is measured in pixels, as the paper does
        affine = read_volume(self.fixed).affine if self.slice is None else np.eye(3)
        return Volume(fixed, affine), Volume(moving, affine), mask, brain


def find_pairs(root: Path, wanted: Sequence[tuple[str, ...]]) -> tuple[list[Pair], list[str]]:
    """Pairs of every folder below ``root`` with images named after their modality (``t1.nii.gz``): a subject each.

    Returns:
        The pairs in one direction: real ones of ``wanted`` modalities; a T1 with a T2-like contrast to be simulated
        from it; T1 images of different people of one data set (folders with one parent) where both have anatomical
        labels. And one line for each pair that was left out, with the reason.

    Raises:
        RegistrationError: no such folder.
    """
    require(root.is_dir(), "data", str(root), "a folder or a datalist that exists")
    pairs, left_out = [], []
    people: dict[Path, list[tuple[str, dict[str, Path]]]] = {}
    for directory in sorted([root, *[p for p in root.rglob("*") if p.is_dir()]]):
        files = _images(directory)
        subject = directory.relative_to(root).as_posix()
        mask, tissue = files.get("mask"), files.get("tissue")
        for a, b in wanted:
            if a not in files or b not in files:
                continue
            # headers say which pairs cannot be co-registered voxel by voxel
            if read_volume(files[a]).grid.same_as(read_volume(files[b]).grid, 0.01):
                pairs.append(Pair(subject, a, b, files[a], files[b], mask=mask, tissue=tissue))
            else:
                left_out.append(f"{subject}: {a} and {b} lie on different grids")
        # a head without a mask has scalp and bone, which the simulation has no tissue for
        if "t1" in files and (mask or tissue or _stripped(read_volume(files["t1"]).values)):
            pairs.append(Pair(subject, "t1", "t2-sim", files["t1"], files["t1"], "exact", mask, tissue))
        if {"t1", "seg"} <= files.keys():
            people.setdefault(directory.parent, []).append((subject, files))
    for group in people.values():
        # each is fixed before one is for the second time
        turns = [(k, (k + step) % len(group)) for step in range(1, len(group)) for k in range(len(group))]
        for (one, files), (other, others) in ((group[a], group[b]) for a, b in turns):
            labels = (files["seg"], others["seg"])
            # a lesion mask has one or a few labels and says nothing about two people's anatomy
            if len(np.intersect1d(read_volume(labels[0]).values, read_volume(labels[1]).values)) >= 8:
                images = files["t1"], others["t1"]
                pairs.append(Pair(f"{one}|{other}", "t1", "t1", *images, "between", labels=labels))
    return pairs, left_out


def _images(directory: Path) -> dict[str, Path]:
    """Image files of a folder by modality; none where it holds labels alone."""
    files = {}
    for path in sorted(directory.iterdir()):
        suffix = next((s for s in _SUFFIXES if path.name.endswith(s)), None)
        if suffix is not None and path.is_file():
            files[path.name.removesuffix(suffix).removeprefix(_PREFIX)] = path
    return files if files.keys() - _LABELS else {}


def _stripped(image: np.ndarray) -> bool:
    # a whole head fills more of its frame than a brain does
    return bool((image == background_value(image)).mean() > 0.65)


def photographs() -> list[Pair]:
    """Color channels of the photographs that scikit-image installs: red against blue and green against blue."""
    names = [Path(name) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    return [Pair(f"skimage/{p}", one, "blue", p, p, "natural") for p in names for one in ("red", "green")]


def _photograph(pair: Pair) -> tuple[Volume, Volume, np.ndarray]:
    from skimage import data
    from skimage.transform import downscale_local_mean

    image = getattr(data, pair.fixed.name)().astype(np.float32)
    if max(image.shape[:2]) > 400:
        image = downscale_local_mean(image, (2, 2, 1)).astype(np.float32)
    names = ("red", "green", "blue")
    one, two = (image[..., names.index(name)] for name in (pair.fixed_modality, pair.moving_modality))
    return Volume(one, np.eye(3)), Volume(two, np.eye(3)), np.ones(one.shape, dtype=bool)


def read_datalist(source: Path) -> list[Pair]:
    """Pairs of a JSON file: a list, or a dictionary with lists, of items such as

    ``{"fixed": "a/t1.nii.gz", "moving": "a/t2.nii.gz", "subject": "a", "fixed_modality": "t1", "moving_modality": "t2",
    "mask": "a/mask.nii.gz", "residual": [0.0, 0.1, 0.3]}``; all but the first two may be missing. Relative file names
    start at the folder of the JSON file.

    Raises:
        RegistrationError: the file is no such list, an image is missing, or the two images lie on different grids.
    """
    items = rows_of(source)
    listed = all(isinstance(item, dict) and {"fixed", "moving"} <= item.keys() for item in items)
    require(listed, "data", str(source), "a list of items with 'fixed' and 'moving'")
    pairs = []
    for index, item in enumerate(items):
        where = f"{source.name}[{index}]"
        files = {key: source.parent / item[key] for key in ("fixed", "moving", "mask", "tissue") if item.get(key)}
        missing = [str(path) for path in files.values() if not path.is_file()]
        fine = not missing and read_volume(files["fixed"]).grid.same_as(read_volume(files["moving"]).grid, 0.01)
        require(fine, where, missing or item, "files that exist, on one grid")
        residual, dims = item.get("residual"), read_volume(files["fixed"]).dims
        fine = residual is None or (len(residual) == dims and bool(np.isfinite(residual).all()))
        require(fine, f"{where}['residual']", residual, f"{dims} finite numbers, mm")
        fixed, moving = str(item.get("fixed_modality", "fixed")), str(item.get("moving_modality", "moving"))
        known = None if residual is None else tuple(map(float, residual))
        pairs.append(Pair(str(item.get("subject", index)), fixed, moving, residual=known, **files))
    return pairs


def with_residuals(pairs: Iterable[Pair], path: Path) -> list[Pair]:
    """The pairs with the residual shifts that are known for them, in whichever direction they were measured.

    Args:
        pairs: of which the real ones get theirs.
        path: CSV file with the columns ``subject, a, b`` and ``dx, dy, dz``; columns ``ngf_dx, ngf_dy, ngf_dz`` come
            first where there are any. ``a(x) ~ b(x + d)``, mm along the voxel axes.

    Raises:
        RegistrationError: the file cannot be read or has other columns.
    """
    try:
        table = pd.read_csv(path, dtype={"subject": str, "a": str, "b": str}).set_index(["subject", "a", "b"])
        prefix = "ngf_" if "ngf_dx" in table else ""
        shifts = table[[f"{prefix}d{c}" for c in "xyz"]].astype(float)
    except (OSError, KeyError, ValueError) as error:
        allowed = f"a CSV file with subject, a, b, dx, dy, dz ({error})"
        raise RegistrationError("residuals", str(path), allowed) from error
    known: dict[tuple[str, str, str], tuple[float, ...]] = {}
    for (subject, a, b), shift in zip(shifts.index, shifts.to_numpy().tolist(), strict=True):
        known[subject, a, b] = tuple(shift)
        known.setdefault((subject, b, a), tuple(-d for d in shift))
    found = [(pair, known.get((pair.subject, pair.fixed_modality, pair.moving_modality))) for pair in pairs]
    return [replace(pair, residual=shift) if shift and pair.kind == "real" else pair for pair, shift in found]
