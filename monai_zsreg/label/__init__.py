# SPDX-License-Identifier: Apache-2.0
"""A MONAI Label app that registers images of its datastore (extra ``label``).

``monailabel start_server --app $(python -m monai_zsreg.label) --studies FOLDER`` starts it; `register` has the requests
that it answers. Nothing here imports MONAI Label: the app does.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from monai_zsreg.io.files import atomic_path

_MAIN = "main.py"


def app_folder(folder: str | os.PathLike | None = None) -> Path:
    """A folder for ``monailabel start_server --app``, with the app of the installed version in it.

    It is not the package's own: the server writes logs and the like into it, and the package may be read-only.

    Args:
        folder: made if it is missing; None for one of the user's cache.

    Returns:
        The folder.

    Raises:
        RegistrationError: the folder cannot be made or written to.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = Path(folder) if folder is not None else cache / "monai_zsreg" / "label"
    with atomic_path(target / _MAIN) as partial:
        shutil.copyfile(Path(__file__).with_name(_MAIN), partial)
    return target
