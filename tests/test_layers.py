# SPDX-License-Identifier: Apache-2.0
"""Who imports whom: downwards only, the core without MONAI, the package without torch until it is used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "monai_zsreg"

#: from the bottom up; a module may import what stands in its own line or above
LAYERS = (
    ("errors",),
    ("geometry",),
    ("foreground",),
    ("io",),
    ("resample",),
    ("networks",),
    ("registration",),
    ("paper", "training", "metrics"),
    ("handlers", "transforms"),
    ("app", "label", "benchmark"),
)
CORE = ("errors", "geometry", "foreground", "io", "resample", "registration")


def imports(path: Path, in_functions: bool = False) -> set[str]:
    """Modules that a file imports, not for type checkers alone; those in functions too, if asked for."""
    found: set[str] = set()
    queue: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
        elif in_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            queue += ast.iter_child_nodes(node)
    return found


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def test_every_module_has_its_layer() -> None:
    assert {unit(path) for path in MODULES} <= {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_downwards(path: Path) -> None:
    height = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    own = height.get(unit(path), len(LAYERS))
    ours = {name.split(".")[1] for name in imports(path, True) if name.startswith("monai_zsreg.")}
    assert not [name for name in ours if height.get(name, 0) > own]
    if unit(path) in CORE:
        # the paper's networks stand apart: a descriptor fetches VGG-19 when it is asked for
        assert not any(name.startswith("monai_zsreg.networks") for name in imports(path))
        foreign = {name.split(".")[0] for name in imports(path)}
        assert not foreign & {"monai", "ignite", "torchvision", "itk", "matplotlib", "pandas"}


# reads and writes images and transforms, registers, resamples and measures
_CORE_ALONE = """
import sys, monai_zsreg
assert monai_zsreg.__version__ and "torch" not in sys.modules
# SymPy, which some of torch's functions import at their first call, takes half a second
for name in ("monai", "itk", "torchvision", "nitransforms", "sympy"):
    sys.modules[name] = None
import nibabel as nib, numpy as np
from PIL import Image
from monai_zsreg.io import load_image, read_transform, write_image, write_transform
from monai_zsreg.metrics import foreground_tre, similarity
x = np.hypot(*np.mgrid[-1:1:40j, -1:1.4:40j])
x = np.where(x < 0.8, 200 * x, 0)
Image.fromarray(x.astype("uint8")).save("a.png")
fixed = load_image("a.png")
result = monai_zsreg.register(fixed, x.astype("float32"))
moved = result.resampled().values
assert similarity(fixed.values, moved)["dice"] > 0.9
assert foreground_tre(result.affine, result.affine, fixed.values)["max"] == 0
volume = nib.Nifti1Image(np.zeros((6, 7, 8), dtype="int16"), np.eye(4))
nib.save(volume, "a.nii.gz")
write_image("b.nii.gz", load_image("a.nii.gz"))
for name in ("t.tfm", "t.txt", "t.mat", "t.lta"):
    write_transform(name, np.eye(4), volume, volume)
    assert (read_transform(name) == np.eye(4)).all()
"""


def test_the_package_is_imported_without_torch_and_works_without_monai_and_itk(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", _CORE_ALONE], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
