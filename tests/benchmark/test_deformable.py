# SPDX-License-Identifier: Apache-2.0
"""The benchmark's rows of deformations: what is known of a trial, and a run of the command."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import pooled, template

from monai_zsreg.benchmark.__main__ import main
from monai_zsreg.benchmark.deformable import deformable_cases, write_report
from monai_zsreg.benchmark.methods import DEFORMABLE
from monai_zsreg.benchmark.pairs import find_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people, one the other shifted by a voxel, with labels that are blocks."""
    path = tmp_path_factory.mktemp("people")
    head = pooled(template("t1"), 6)
    values = head.as_tensor()[0].numpy()
    blocks = 1 + (np.indices(values.shape) // 8 * np.array([1, 4, 16]).reshape(3, 1, 1, 1)).sum(0)
    for name, shift in (("one", 0), ("two", 1)):
        (path / name).mkdir()
        brain = values > 50
        for file, image in (("t1", values), ("mask", brain), ("seg", blocks * brain)):
            moved = np.roll(image, shift, axis=1).astype(np.float32)
            nib.save(nib.Nifti1Image(moved, head.affine.numpy()), path / name / f"{file}.nii.gz")
    return path


def test_the_truth_has_no_error_and_nothing_has_all_of_it(folder: Path) -> None:
    cases = deformable_cases(find_pairs(folder, [])[0], "people", 1)
    made = {case.row.name: case.build() for case in cases if not case.row.name.startswith("between")}
    assert list(made) == ["known", "resection", "resection masked", "rigid"]
    for row, sample in made.items():
        assert sample.displacement is not None
        nothing, right = sample.judge(sample.nothing), sample.judge(sample.displacement)
        assert right["folded"] == 0 and max(v for k, v in right.items() if "folded" not in k) == 0
        assert row == "rigid" or min(v for k, v in nothing.items() if "folded" not in k) > 0.5
    assert made["resection"].mask is None and not made["resection masked"].mask.all()
    # the image shows at x what the other shows at x + truth
    known = made["resection masked"]
    steps = np.einsum("ij,j...->i...", np.linalg.inv(known.fixed.affine[:3, :3]), known.displacement)
    place = torch.from_numpy(np.indices(known.fixed.shape) + steps)
    index = [p.round().long().clamp(0, n - 1) for p, n in zip(place, known.moving.shape, strict=True)]
    shown = torch.from_numpy(known.moving.values)[tuple(index)].numpy()
    inside = known.regions["far"]
    assert np.corrcoef(shown[inside], known.fixed.values[inside])[0, 1] > 0.8


def test_labels_are_moved_by_the_field(folder: Path) -> None:
    case = deformable_cases(find_pairs(folder, [])[0], "people", 1)[0]
    assert case.row.name == "between people t1-t1" and case.images == "one-two"
    sample = case.build()
    field = sample.nothing
    assert sample.judge(field)["dice"] > 0.85
    field[0] = 24.0
    assert sample.judge(field)["dice"] < 0.6
    # left becomes right
    field[0] = -12.0 * np.arange(field.shape[1])[:, None, None]
    assert sample.judge(field)["folded inside"] > 100


def test_the_command_writes_a_table_and_goes_on(folder: Path, tmp_path: Path) -> None:
    words = [
        "deformable",
        str(folder),
        "--output",
        str(tmp_path),
        "--rows",
        "rigid",
        "--cases",
        "1",
        "--threads",
        "1",
        "--methods",
    ]
    for _ in range(2):
        assert main([*words, "affine alone"]) == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    assert "| rigid | affine alone | 1 |" in (tmp_path / "deformable.md").read_text()
    assert set(DEFORMABLE) > {"ours", "SyN", "SyNQuick", "elastix B-spline", "ConvexAdam"}


def test_a_run_that_failed_is_told_and_not_averaged(tmp_path: Path) -> None:
    run = {"row": "rigid", "failure": "", "median": 0.5, "95 %": 1.0, "folded": 0.0, "folded inside": 0.0}
    run |= {"seconds": 2.0, "peak_mib": 10.0}
    lost = run | {"failure": "RuntimeError: no", "median": 9.0, "seconds": None}
    results = pd.DataFrame([run | {"method": "SyN"}, lost | {"method": "SyN"}, lost | {"method": "greedy NCC"}])
    text = write_report(results, tmp_path, 1, ["ConvexAdam: no module"]).read_text()
    assert "| rigid | SyN | 1 | median, 95 % | 0.500, 1.000 | 0 | 0 | 2.0 | 10 |" in text
    assert "| greedy NCC |" not in text and "- greedy NCC in rigid: RuntimeError: no" in text
    assert "- ConvexAdam: no module" in text
