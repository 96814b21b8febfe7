# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a final name never stands for a half-written file, and reading lists of pairs."""

from __future__ import annotations

import csv
import errno
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from monai_zsreg.errors import RegistrationError, require

_PARTIAL = ".partial-"
# what no folder with another process at work in it shows any more, seconds
_OLD = 3600.0


def exists(path: str | os.PathLike) -> bool:
    """True for a file or folder; False also for a name that none can have (too long, a NUL, links in a circle)."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def require_nifti_name(path: str | os.PathLike) -> None:
    """A RegistrationError for the name of a file that is to be written and would be no NIfTI file."""
    named = str(path).lower().endswith((".nii", ".nii.gz"))
    require(named, "path", str(path), "a name that ends in .nii or .nii.gz")


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block ends without an error.

    The temporary name keeps all suffixes, because writers choose the format by them (``.nii.gz``, ``.tfm``). A symbolic
    link stays one: the file that it points to is replaced.

    Args:
        path: the final name. Its folder is made if it is missing.

    Raises:
        RegistrationError: the folder cannot be made or written to, or ``path`` is a folder or a device.
        OSError: the disk is full or fails.
    """
    # renaming would put a file in the place of a device
    require(not exists(path) or Path(path).is_file(), "path", str(path), "the name of a file")
    with _named(path, "path", "a file in a folder that can be written to"):
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.parent / f"{_PARTIAL}{secrets.token_hex(8)}{''.join(Path(path).suffixes[-2:])}"
        # made as a plain open() makes a file, so that it has the mode that the process' umask leaves
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        with _named(path):
            yield partial
        with _named(path, "path", "the name of a file that can be written"):
            if target.exists():
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


# disk full, quota, largest size of a file, and the disk itself
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def _named(path: str | os.PathLike, argument: str = "", allowed: str = "") -> Iterator[None]:
    """Name an error of the disk as one; others become those of ``argument``, if any."""
    try:
        yield
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        if number in _NO_ROOM:
            raise OSError(number, f"there is no room to write it ({os.strerror(number)})", str(path)) from error
        if not argument:
            raise
        raise RegistrationError(argument, str(path), f"{allowed} ({error})") from error


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary files that a killed process left in a folder, once they are an hour old."""
    for partial in Path(folder).glob(f"{_PARTIAL}*"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > _OLD:
                partial.unlink()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write ``content`` as indented JSON, whole or not at all. NaN and infinity are refused, because JSON has none."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def output_folder(path: str | os.PathLike) -> Path:
    """Make a folder for results, and its parents; errors as of `atomic_path`."""
    with _named(path, "output_dir", "a folder that can be made and written to"):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def rows_of(datalist: Any) -> Sequence[Any]:
    """What a list of pairs holds: that of a CSV or JSON file, the list under ``"testing"``, or the list itself."""
    rows: Any = datalist
    if isinstance(datalist, (str, os.PathLike)):
        path = Path(datalist)
        try:
            content = path.read_text(encoding="utf-8-sig")
            rows = json.loads(content) if path.suffix.lower() != ".csv" else list(csv.DictReader(content.splitlines()))
        except (OSError, ValueError, csv.Error) as error:
            raise RegistrationError("datalist", str(path), f"a CSV or JSON file ({error})") from error
    if isinstance(rows, Mapping):
        if "testing" not in rows:
            raise RegistrationError("datalist", sorted(rows), 'a list of pairs, or one under "testing"')
        rows = rows["testing"]
    if isinstance(rows, str) or not isinstance(rows, Sequence) or len(rows) == 0:
        raise RegistrationError("datalist", rows, "a list with at least one pair")
    return rows
