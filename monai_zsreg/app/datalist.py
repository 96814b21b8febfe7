# SPDX-License-Identifier: Apache-2.0
"""Which pairs there are: of a CSV or JSON file, a list, a BIDS folder, or two files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_zsreg.app.settings import DEMONSTRATION, EVALUATION, INDEX, SUMMARY, TABLE
from monai_zsreg.errors import RegistrationError
from monai_zsreg.io.files import rows_of

_RESERVED = (SUMMARY, INDEX, TABLE, EVALUATION)
_TOGETHER = (("fixed", "moving"), ("fixed_mask", "moving_mask"), ("fixed_landmarks", "moving_landmarks"))
_KEYS = (*(key for keys in _TOGETHER for key in keys), "labels", "fixed_labels", "moving_labels", "truth", "name")
# what BIDS calls images of the head that can be registered to its T1w
_CONTRASTS = ("T1w", "T2w", "FLAIR", "PDw", "PDT2", "T2starw", "inplaneT1", "inplaneT2", "angio")


def text(value: Any, argument: str) -> str:
    """A path or name as text. Command lines turn what looks like a number into one."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RegistrationError(argument, value, "text; if it was, quote it once more within the quotes: '\"1.5\"'")


def one_pair(
    fixed: Any = None, moving: Any = None, name: Any = None, dataset_dir: Any = "", **further: Any
) -> dict[str, Any]:
    """The entry of one pair, or of the demonstration pair where neither image is named.

    Args:
        fixed, moving: files, or folders of DICOM series.
        name: of the folder for the results; None for the moving file's name without its suffix.
        dataset_dir: folder that relative paths start from; the working directory if empty.
        further: ``labels`` of the moving image, to be carried along; what is known for measuring: ``fixed_mask`` and
            ``moving_mask``, ``fixed_labels``, ``fixed_landmarks`` and ``moving_landmarks``, ``truth``.

    Raises:
        RegistrationError: one of two files that go together, or a value that is no path or name.
    """
    given = {"fixed": fixed, "moving": moving} | further
    given = {key: value for key, value in given.items() if value is not None}
    if "moving_labels" in given:
        if "labels" in given:
            raise RegistrationError("labels", given["labels"], "nothing beside moving_labels, which are the same")
        given["labels"] = given.pop("moving_labels")
    if not given:
        return {"name": _folder_name(DEMONSTRATION if name is None else name)}
    if "fixed_labels" in given and "labels" not in given:
        raise RegistrationError("moving_labels", None, "a file: fixed_labels and moving_labels go together")
    for one, two in _TOGETHER:
        if (one in given) != (two in given) or one == "fixed" and one not in given:
            missing = two if one in given else one
            raise RegistrationError(missing, None, f"a file: {one} and {two} go together")
    start = text(dataset_dir, "dataset_dir")
    # a worker elsewhere, and a later run that asks what was done, may have another working directory
    entry = {key: os.path.abspath(os.path.join(start, text(path, key))) for key, path in given.items()}
    return entry | {"name": _folder_name(_stem(entry["moving"]) if name is None else name)}


def read_datalist(datalist: Any, dataset_dir: Any = "", must_exist: bool = False) -> list[dict[str, Any]]:
    """All pairs of a list.

    Args:
        datalist: CSV file with a header line; JSON file with a list of pairs, or with such a list under
            ``"testing"``; the list itself; or a BIDS folder. A pair has ``fixed`` and ``moving`` and may have what
            `one_pair` knows. Cells may be empty.
        dataset_dir: folder that relative paths start from; the working directory if empty.
        must_exist: whether a file that is not there is an error already, not the bad result of one pair.

    Returns:
        Entries with a name of their own each: that of the moving file, with a number where others have it too.

    Raises:
        RegistrationError: no such list, an entry that cannot be used, or two pairs of one name.
    """
    if isinstance(datalist, (str, os.PathLike)) and Path(datalist).is_dir():
        return bids_pairs(datalist)
    pairs = []
    for number, row in enumerate(rows_of(datalist)):
        place = f"datalist[{number}]"
        if not isinstance(row, Mapping):
            raise RegistrationError(place, row, '{"fixed": ..., "moving": ...}')
        given = {key: value for key, value in row.items() if value is not None and str(value).strip() != ""}
        unknown = sorted(str(key) for key in given if key not in _KEYS)
        if unknown:  # a misspelled name would go unnoticed otherwise
            raise RegistrationError(place, unknown, f"none but {', '.join(_KEYS)}")
        if not {"fixed", "moving"} & set(given):
            raise RegistrationError(f"{place}.fixed", None, "a file: a pair needs both images")
        try:
            entry = one_pair(**given, dataset_dir=dataset_dir)
            missing = [key for key in entry if must_exist and key != "name" and not os.path.exists(entry[key])]
            if missing:
                raise RegistrationError(missing[0], entry[missing[0]], "an existing file")
        except RegistrationError as error:
            raise RegistrationError(f"{place}.{error.argument}", error.value, error.allowed) from error
        pairs.append((entry, "name" in given))
    return _numbered(pairs)


def bids_pairs(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """For each session of a BIDS folder its first T1w image without contrast agent as fixed, the others as moving.

    Args:
        folder: with ``sub-*/[ses-*/]anat/*_<suffix>.nii[.gz]``. Derived files (``desc-``, masks) are left out.

    Raises:
        RegistrationError: no session has a T1w image and another one.
    """
    root = Path(os.path.abspath(folder))
    pairs = []
    for anat in sorted([*root.glob("sub-*/anat"), *root.glob("sub-*/ses-*/anat")]):
        images = []
        for path in sorted(anat.iterdir()):
            found = re.fullmatch(r"(sub-.+)_([A-Za-z0-9]+)\.nii(\.gz)?", path.name)
            if found and found[2] in _CONTRASTS and "_desc-" not in path.name:
                images.append((path, found[1], found[2]))
        plain = [image for image in images if image[2] == "T1w" and "_ce-" not in image[1]]
        for path, stem, suffix in images if plain else []:
            if path != plain[0][0]:
                entry = {"fixed": str(plain[0][0]), "moving": str(path), "name": f"{stem}_{suffix}"}
                pairs.append((entry, False))
    if not pairs:
        allowed = "a BIDS folder: sub-*/[ses-*/]anat with a _T1w image and another contrast beside it"
        raise RegistrationError("datalist", str(folder), allowed)
    return _numbered(pairs)


def _numbered(pairs: Sequence[tuple[dict[str, Any], bool]]) -> list[dict[str, Any]]:
    """Entries with a name of their own each; those that the user did not name make way for those that he did."""
    taken = set(_RESERVED)
    for entry, named in pairs:
        if named and entry["name"] in taken:
            raise RegistrationError("name", entry["name"], "a name that no other pair and no file of the results has")
        if named:
            taken.add(entry["name"])
    numbers: dict[str, int] = {}
    for entry, named in pairs:
        stem = entry["name"]
        while not named and entry["name"] in taken:
            numbers[stem] = numbers.get(stem, 1) + 1
            entry["name"] = f"{stem}_{numbers[stem]}"
        taken.add(entry["name"])
    return [entry for entry, _ in pairs]


def _folder_name(value: Any) -> str:
    name = text(value, "name")
    if name in ("", ".", "..") or any(separator in name for separator in "/\\\0"):
        raise RegistrationError("name", name, "the name of a folder, without path separators")
    return name


def _stem(path: str) -> str:
    name = Path(path).resolve().name
    return name[:-7] if name.lower().endswith(".nii.gz") and len(name) > 7 else Path(name).stem
