# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a final name never stands for a half-written file."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from monai_zsreg.errors import RegistrationError

__all__ = ["atomic_path", "exists", "output_folder", "remove_leftovers", "write_json"]

_PARTIAL = ".partial-"
# what no folder with another process at work in it shows any more, seconds
_OLD = 3600.0


def exists(path: str | os.PathLike) -> bool:
    """True for a file or folder; False also for a name that none can have (too long, a NUL, links in a circle)."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block ends without an error.

    The temporary name keeps all suffixes, because writers choose the format by them (``.nii.gz``, ``.tfm``).

    Args:
        path: the final name. Its folder is made if it is missing.

    Raises:
        RegistrationError: the folder cannot be made or written to, the disk is full, or ``path`` is a folder or a
            device.
    """
    target = Path(path)
    if exists(target) and not target.is_file():
        # renaming would put a file in the place of a device
        raise RegistrationError("path", str(path), "the name of a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_PARTIAL, suffix="".join(target.suffixes[-2:]), dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise RegistrationError("path", str(path), f"a file in a folder that can be written to ({error})") from error
    partial = Path(name)
    try:
        try:
            yield partial
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise RegistrationError("path", str(path), f"room to write it ({error.strerror})") from error
        # mkstemp makes the file private; a finished file has the mode that a plain open() would give
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        try:
            os.replace(partial, target)
        except OSError as error:
            raise RegistrationError("path", str(path), f"the name of a file that can be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


# disk full, quota, largest size of a file, and the disk itself
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary files that a killed process left in a folder, once they are an hour old."""
    for partial in Path(folder).glob(f"{_PARTIAL}*"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > _OLD:
                partial.unlink()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write ``content`` as indented JSON under a temporary name, then rename.

    Args:
        path: the file to write.
        content: anything the JSON encoder takes. NaN and infinity are refused, because JSON has none.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def output_folder(path: str | os.PathLike) -> Path:
    """Make a folder for results.

    Args:
        path: the folder; its parents are made too.

    Returns:
        The folder as a ``Path``.

    Raises:
        RegistrationError: it cannot be made, or is a file.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistrationError(
            "output_dir", str(path), f"a folder that can be made and written to ({error})"
        ) from error
    return folder
