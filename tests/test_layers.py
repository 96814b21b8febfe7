# SPDX-License-Identifier: Apache-2.0
"""Who imports whom: downwards only, the core without MONAI, the package without torch until it is used."""

from __future__ import annotations

import ast
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
    ("registration",),
    ("networks",),
    ("paper", "training", "metrics"),
    ("handlers", "transforms"),
    ("app", "label", "benchmark"),
)
CORE = ("errors", "geometry", "foreground", "io", "resample", "registration")


def imports(path: Path) -> set[str]:
    """Modules imported where a file is imported: not in functions, not for type checkers alone."""
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
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
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
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("monai_zsreg.")}
    assert not [name for name in ours if height.get(name, 0) > own]
    if unit(path) in CORE:
        foreign = {name.split(".")[0] for name in imports(path)}
        assert not foreign & {"monai", "ignite", "torchvision", "itk", "matplotlib", "pandas"}


def test_the_package_is_imported_without_torch_and_registers_without_monai() -> None:
    script = (
        "import sys, monai_zsreg\n"
        "assert monai_zsreg.__version__ and 'torch' not in sys.modules\n"
        "import numpy as np\n"
        "x = np.hypot(*np.mgrid[-1:1:40j, -1:1.4:40j])\n"
        "image = np.where(x < 0.8, x, 0).astype('float32')\n"
        "result = monai_zsreg.register(image, image)\n"
        "result.resampled()\n"
        "print(result.verdict, [m for m in ('monai', 'itk', 'torchvision') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "[]"
