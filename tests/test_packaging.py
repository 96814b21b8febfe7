# SPDX-License-Identifier: Apache-2.0
"""What a stranger gets from ``pip install``: the wheel's content, its metadata, and that hard dependencies suffice."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import monai_zsreg

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "monai_zsreg"

# distributions of the extras, by the names they are imported under
_EXTRAS_ONLY = (
    "nilearn",
    "matplotlib",
    "skimage",
    "nitransforms",
    "SimpleITK",
    "ants",
    "cv2",
    "pandas",
)

_IMPORT_EVERYTHING = f"""
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_EXTRAS_ONLY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
import monai_zsreg
print(monai_zsreg.__file__)
for module in pkgutil.walk_packages(monai_zsreg.__path__, "monai_zsreg."):
    # the benchmark says itself that it needs its extra
    if not module.name.endswith(".__main__") and not module.name.startswith("monai_zsreg.benchmark"):
        importlib.import_module(module.name)
        print(module.name)
print(importlib.import_module("monai_zsreg.networks.regressors").shipped_weights(2))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # the neighbors of the package, which must stay out
    for name in ("monai_zsreg", "tests", "bundles", "tutorials"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        licenses = [n for n in archive.namelist() if n.endswith("LICENSE")]
    modules = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py")}
    # the regressor's weights come from the bundle's folder
    weights = {f"monai_zsreg/pretrained_models/{name}" for name in ("model.pt", "model_3d.pt")}
    pages = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.html")}
    assert len(pages) == 4 and names == modules | {"monai_zsreg/py.typed"} | weights | pages
    assert len(licenses) == 1


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {p.parent for p in PACKAGE.rglob("*.py")}
    assert [f.relative_to(ROOT) for f in folders if not (f / "__init__.py").is_file()] == []


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "monai-zsreg"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "benchmark", "cluster", "demo", "dev", "interop", "label", "test", "train",
    }  # fmt: skip
    hard = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert any(r.startswith("monai>=1.6.1") for r in hard)
    assert any(r.startswith("numpy") and ">=1.26" in r and "<3" in r for r in hard)


def test_modules_import_with_the_hard_dependencies_alone(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:  # pure Python: unpacking is installing
        archive.extractall(site)
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_EVERYTHING],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert Path(lines[0]).is_relative_to(site)
    assert Path(lines[-1]).is_relative_to(site)
    assert {"monai_zsreg.registration.pair", "monai_zsreg.io.images", "monai_zsreg.label.register"} <= {*lines}


def test_the_version_is_the_packages(metadata: Message) -> None:
    stated = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{metadata["Version"]}"' in stated and monai_zsreg.__version__ == metadata["Version"]
    assert metadata["Version"] not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    # files that other tools read have to repeat it
    assert f"## {metadata['Version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {metadata['Version']}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    (bundle,) = (ROOT / "bundles").glob("*/configs/metadata.json")
    assert json.loads(bundle.read_text(encoding="utf-8"))["version"] == metadata["Version"]


def test_every_module_states_its_license() -> None:
    files = [p for folder in ("monai_zsreg", "tests") for p in (ROOT / folder).rglob("*.py") if p.stat().st_size]
    assert len(files) > 5
    unmarked = [
        str(p) for p in files if not p.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0")
    ]
    assert unmarked == []


def test_license_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text and "APPENDIX: How to apply the Apache License" in text
    copies = list((ROOT / "bundles").glob("*/LICENSE"))
    assert all(copy.read_text(encoding="utf-8") == text for copy in copies)


def test_ci_runs_the_readme_test_command() -> None:
    for script in ("run", "release", "label"):
        assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / script)]).returncode == 0
    script, command = (ROOT / ".ci" / "run").read_text(encoding="utf-8"), "python -m pytest"
    # all tests, and what is passed on is nothing but the reasons that a test may skip for
    assert re.search(rf'^ +{command} "\$@" \|', script, re.M) and re.search(r'^tests "\$private"$', script, re.M)
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
