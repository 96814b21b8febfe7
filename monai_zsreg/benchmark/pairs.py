# SPDX-License-Identifier: Apache-2.0
"""Co-registered pairs of images: found in a folder or listed in a datalist, with the residual each pair carries.

A residual says how far a "co-registered" pair really is from aligned: ``fixed(x) ~ moving(x + r)``, r in millimeters
along the voxel axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pandas as pd

from monai_zsreg.benchmark.volumes import Volume, background_value, read_volume, transformed
from monai_zsreg.errors import RegistrationError

__all__ = ["Pair", "attach_residuals", "find_pairs", "photographs", "read_datalist", "read_residuals"]

_LABELS = {"seg", "mask", "tissue"}
_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
_PREFIX = "study1_"

Residuals = dict[tuple[str, str, str], tuple[float, ...]]


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

    @property
    def name(self) -> str:
        return f"{self.subject}:{self.fixed_modality}-{self.moving_modality}"

    def reversed(self) -> Pair:
        """The pair with the roles of the two images swapped."""
        back = None if self.residual is None else tuple(-r for r in self.residual)
        one, two = self.moving_modality, self.fixed_modality
        turned = replace(self, fixed_modality=one, moving_modality=two, residual=back)
        return replace(turned, fixed=self.moving, moving=self.fixed)


def _one_lattice(one: Volume, two: Volume) -> bool:
    """True where the voxels of both lie within 0.01 mm of each other."""
    corners = np.array(list(product(*[(0, n - 1) for n in one.shape])))
    same = one.shape == two.shape
    return same and bool(np.abs(transformed(one.affine, corners) - transformed(two.affine, corners)).max() <= 0.01)


def find_pairs(root: Path, wanted: Sequence[tuple[str, ...]]) -> tuple[list[Pair], list[str]]:
    """Pairs of every folder below ``root`` with images named after their modality (``t1.nii.gz``): a subject each.

    Returns:
        The pairs in one direction: real ones of ``wanted`` modalities; a T1 with a T2-like contrast to be simulated
        from it; T1 images of different people of one data set (folders with one parent) where both have anatomical
        labels. And one line for each pair that was left out, with the reason.

    Raises:
        RegistrationError: no such folder.
    """
    if not root.is_dir():
        raise RegistrationError("data", str(root), "a folder or a datalist that exists")
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
            if _one_lattice(read_volume(files[a]), read_volume(files[b])):
                pairs.append(Pair(subject, a, b, files[a], files[b], mask=mask, tissue=tissue))
            else:
                left_out.append(f"{subject}: {a} and {b} lie on different grids")
        # a head without a mask has scalp and bone, which the simulation has no tissue for
        if "t1" in files and (mask or tissue or _stripped(read_volume(files["t1"]).values)):
            pairs.append(Pair(subject, "t1", "t2-sim", files["t1"], files["t1"], "exact", mask, tissue))
        if {"t1", "seg"} <= files.keys():
            people.setdefault(directory.parent, []).append((subject, files))
    for group in people.values():
        for (one, files), (other, others) in permutations(group, 2):
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


def read_datalist(source: Path) -> list[Pair]:
    """Pairs of a JSON file: a list, or a dictionary with lists, of items such as

    ``{"fixed": "a/t1.nii.gz", "moving": "a/t2.nii.gz", "subject": "a", "fixed_modality": "t1", "moving_modality": "t2",
    "mask": "a/mask.nii.gz", "residual": [0.0, 0.1, 0.3]}``; all but the first two may be missing. Relative file names
    start at the folder of the JSON file.

    Raises:
        RegistrationError: the file is no such list, an image is missing, or the two images lie on different grids.
    """
    from monai_zsreg.io.files import rows_of

    items = rows_of(source)
    if not all(isinstance(item, dict) and {"fixed", "moving"} <= item.keys() for item in items):
        raise RegistrationError("data", str(source), "a list of items with 'fixed' and 'moving'")
    pairs = []
    for index, item in enumerate(items):
        where = f"{source.name}[{index}]"
        files = {key: source.parent / item[key] for key in ("fixed", "moving", "mask", "tissue") if item.get(key)}
        missing = [str(path) for path in files.values() if not path.is_file()]
        if missing or not _one_lattice(read_volume(files["fixed"]), read_volume(files["moving"])):
            raise RegistrationError(where, missing or item, "files that exist, on one grid")
        residual = item.get("residual")
        dims = read_volume(files["fixed"]).dims
        if residual is not None and (len(residual) != dims or not np.isfinite(residual).all()):
            raise RegistrationError(f"{where}['residual']", residual, f"{dims} finite numbers, mm")
        given = None if residual is None else tuple(float(r) for r in residual)
        modalities = str(item.get("fixed_modality", "fixed")), str(item.get("moving_modality", "moving"))
        pair = Pair(str(item.get("subject", index)), *modalities, files["fixed"], files["moving"], residual=given)
        pairs.append(replace(pair, mask=files.get("mask"), tissue=files.get("tissue")))
    return pairs


def read_residuals(path: Path) -> Residuals:
    """Residual shifts of pairs, from a CSV file with the columns ``subject, a, b`` and ``dx, dy, dz``.

    Columns ``ngf_dx, ngf_dy, ngf_dz`` come first where there are any. ``a(x) ~ b(x + d)``, mm along the voxel axes.

    Raises:
        RegistrationError: the file cannot be read or has other columns.
    """
    try:
        table = pd.read_csv(path, dtype={"subject": str, "a": str, "b": str})
        prefix = "ngf_" if "ngf_dx" in table else ""
        shifts = table[[f"{prefix}d{c}" for c in "xyz"]].astype(float).itertuples(index=False, name=None)
        return dict(zip(table[["subject", "a", "b"]].itertuples(index=False, name=None), shifts, strict=True))
    except (OSError, KeyError, ValueError) as error:
        allowed = f"a CSV file with subject, a, b, dx, dy, dz ({error})"
        raise RegistrationError("residuals", str(path), allowed) from error


def attach_residuals(pairs: Iterable[Pair], residuals: Residuals) -> list[Pair]:
    """The pairs with the residuals that are known for them, in whichever direction they were measured."""
    done = []
    for pair in pairs:
        names = (pair.subject, pair.fixed_modality, pair.moving_modality)
        back = (pair.subject, pair.moving_modality, pair.fixed_modality)
        if pair.kind == "real" and names in residuals:
            pair = replace(pair, residual=residuals[names])
        elif pair.kind == "real" and back in residuals:
            pair = replace(pair, residual=tuple(-r for r in residuals[back]))
        done.append(pair)
    return done
