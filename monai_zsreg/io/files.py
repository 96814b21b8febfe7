# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a final name never stands for a half-written file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monai_zsreg.errors import RegistrationError

__all__ = ["atomic_path", "output_folder", "write_json"]


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block ends without an error.

    The temporary name keeps all suffixes, because writers choose the format by them (``.nii.gz``, ``.tfm``).

    Args:
        path: the final name. Its folder is made if it is missing.

    Raises:
        RegistrationError: the folder cannot be made or written to, or ``path`` is a folder.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".partial-", suffix="".join(target.suffixes[-2:]), dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise RegistrationError("path", str(path), f"a file in a folder that can be written to ({error})") from error
    partial = Path(name)
    try:
        yield partial
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
