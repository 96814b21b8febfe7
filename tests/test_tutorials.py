# SPDX-License-Identifier: Apache-2.0
"""The tutorials run from top to bottom, and show pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A kernel for all of them: to start one and to import the package takes as long as what most of them show."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("nilearn")
    found = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=300, shutdown_kernel="immediate")
    with pytest.MonkeyPatch.context() as patch:
        # as a notebook server has it, whatever the tests run under
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        with found.setup_kernel():
            yield found


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(client: Any, path: Path, tmp_path: Path) -> None:
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs for cell in code), "stored outputs go stale"
    # no name of the one before
    fresh = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {tmp_path}\nassert 'monai_zsreg' not in globals()")
    client.nb = nbformat.v4.new_notebook(cells=[fresh, *code])
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)
    outputs = [output for cell in client.nb.cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]


def test_there_are_tutorials() -> None:
    numbers = [path.stem[:2] for path in TUTORIALS]
    assert len(set(numbers)) == len(numbers) >= 10 and numbers[0] == "01"
