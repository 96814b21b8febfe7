# SPDX-License-Identifier: Apache-2.0
"""The API reference builds from the docstrings without a warning and has every public name."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import monai_zsreg

# these need MONAI Label, or the package of a peer
LEFT_OUT = ("monai_zsreg.label.main", "monai_zsreg.label.register", "monai_zsreg.benchmark.peers.")


def modules() -> list[str]:
    found = [m.name for m in pkgutil.walk_packages(monai_zsreg.__path__, "monai_zsreg.")]
    hidden = [name for name in found if any(part.startswith("_") for part in name.split("."))]
    return ["monai_zsreg", *(name for name in found if name not in hidden and not name.startswith(LEFT_OUT))]


def public_names(module: ModuleType) -> list[str]:
    """What a package gives on, or what a module defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return getattr(module, "__all__", [name for name in own if not name.startswith("_")])


@pytest.mark.slow
def test_reference_builds_and_is_complete(tmp_path: Path) -> None:
    pdoc = pytest.importorskip("pdoc")
    # source in colors takes most of the time and is none of the docstrings'
    pdoc.render.configure(docformat="google", show_source=False, search=False)
    names = modules()
    for name in names:
        module = importlib.import_module(name)
        # the package imports its names when they are asked for
        assert all(hasattr(module, public) for public in public_names(module))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # packages bring some of their modules along
        warnings.filterwarnings("ignore", message=".*has already been added")
        pdoc.pdoc(*names, output_directory=tmp_path)
    for name in names:
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text(encoding="utf-8")
        for public in public_names(importlib.import_module(name)):
            assert f'id="{public}"' in page or public.startswith("_"), (name, public)
