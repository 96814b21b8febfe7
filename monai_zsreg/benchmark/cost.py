# SPDX-License-Identifier: Apache-2.0
"""What a registration costs: seconds and memory against size, and whole processes beside those of others."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from monai_zsreg.benchmark.cases import Case, Row, Sample
from monai_zsreg.benchmark.peers import PEERS
from monai_zsreg.benchmark.perturb import PROTOCOLS, draw
from monai_zsreg.benchmark.volumes import Volume, foreground, moved

__all__ = ["SIZES", "phantom_cases", "phantom_pair", "save_phantom", "timed", "whole_processes"]

SIZES = {2: (128, 256, 512, 1024), 3: (64, 96, 128, 192, 240, 320)}
_FIELD_OF_VIEW = 240.0  # mm

# both read the file names ``fixed``, ``moving`` and ``output``, as the peers' own scripts do
_BARE = "import monai.bundle, shutil; shutil.copy(moving, output)"
_REGISTER = """
from monai_zsreg import register
from monai_zsreg.io.images import write_image
write_image(output, register(fixed, moving).resampled())
"""


def phantom_pair(dims: int, size: int, seed: int = 0) -> tuple[Volume, Volume, np.ndarray]:
    """A layered object in two contrasts, the second one moved by the mild protocol, and the truth.

    The object has the same shape and field of view (240 mm) at every size.
    """
    rng = np.random.default_rng(seed)
    side = 64
    axes = np.meshgrid(*[np.linspace(-1, 1, side)] * dims, indexing="ij")
    radius = np.sqrt(sum((a / w) ** 2 for a, w in zip(axes, (0.62, 0.72, 0.58), strict=False)))
    waves = ndimage.gaussian_filter(rng.normal(size=(side,) * dims), 2.5)
    level = np.clip(1.2 * (1 - radius) + 0.45 * waves / waves.std(), 0, 2) * (radius < 1)
    enlarge = partial(ndimage.zoom, zoom=size / side, order=1, mode="nearest", grid_mode=True)
    level, inside = enlarge(level.astype(np.float32)), enlarge((radius < 1).astype(np.float32)) > 0.5
    affine = np.diag([_FIELD_OF_VIEW / size] * dims + [1.0])
    contrasts = ([0.25, 0.5, 0.8, 1.0], [1.0, 0.6, 0.4, 0.7])
    still, other = (np.where(inside, np.interp(level, [0, 0.5, 1.0, 2.0], values), 0) for values in contrasts)
    truth, _ = draw(PROTOCOLS["mild", dims], Volume(still, affine), rng)
    shown = moved(Volume(other, affine), still.shape, affine, np.linalg.inv(truth), order=1, fill=0.0).values
    noisy = [(image + (image > 0) * rng.normal(0, 0.02, image.shape)).astype(np.float32) for image in (still, shown)]
    return Volume(noisy[0], affine), Volume(noisy[1], affine), truth


def save_phantom(folder: Path) -> list[Path]:
    """The pair of whole processes where none is given, 240 x 240 x 240, written to a folder."""
    paths = [folder / "fixed.nii.gz", folder / "moving.nii.gz"]
    for path, image in zip(paths, phantom_pair(3, 240)[:2], strict=True):
        nib.save(nib.Nifti1Image(image.values, image.affine), path)
    return paths


def phantom_cases(sizes: Mapping[int, Sequence[int]], seed: int) -> list[Case]:
    """One case a size, small sizes three, so that a median can be taken."""
    cases = []
    for dims, side in [(dims, side) for dims, sides in sizes.items() for side in sides]:
        row = Row("cost", dims, "exact", 3, 0, f"{side}^{dims}")
        for number in range(3 if side**dims <= 2**20 else 1):
            maker = partial(_make, size=side)
            cases.append(Case(row, number, "phantom", "phantom", seed, maker, {"group": "phantoms"}))
    return cases


def _make(case: Case, size: int) -> Sample:
    fixed, moving, truth = phantom_pair(case.row.dims, size, case.seed)
    return Sample(fixed, moving, fixed.points(foreground(fixed.values)), truth, truth)


def whole_processes(fixed: Path, moving: Path, bundle: Path, methods: Iterable[str]) -> tuple[pd.DataFrame, list[str]]:
    """Seconds of whole processes that register one pair, from start to the moved image on disk, in turn.

    Ours, the bundle in its folder, and those of ``methods`` that are peers with a script. Returns as `timed`.
    """
    commands, notes = _commands(bundle, methods)
    table, more = timed(commands, fixed, moving)
    return table, notes + more


def timed(
    commands: Mapping[str, Sequence[str]], fixed: Path, moving: Path, repeats: int = 3
) -> tuple[pd.DataFrame, list[str]]:
    """Median seconds and megabytes written of commands that run in turn ``repeats`` times, and once to warm up.

    ``FIXED``, ``MOVING``, ``FOLDER`` and ``OUTPUT`` (a file in it) stand for the places. A command that fails or
    writes no image is left out, with a note.
    """
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    written: dict[str, int] = {}
    notes = []
    for turn in range(repeats + 1):
        for name in list(seconds):
            with tempfile.TemporaryDirectory(prefix="zsreg-") as folder:
                places = {"FIXED": fixed, "MOVING": moving, "FOLDER": folder, "OUTPUT": Path(folder) / "moved.nii.gz"}
                command = [str(places.get(part, part)) for part in commands[name]]
                begin = time.perf_counter()
                ran = subprocess.run(command, capture_output=True, text=True, check=False)
                spent = time.perf_counter() - begin
                # status 3: registered, and not to be trusted
                if ran.returncode not in (0, 3) or not list(Path(folder).rglob("*.nii*")):
                    words = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()] or ["no image"]
                    notes.append(f"{name}: status {ran.returncode}, {words[-1][:200]}")
                    del seconds[name]
                elif turn:
                    seconds[name].append(spent)
                    written[name] = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    lines = [
        {"process": name, "seconds": round(float(np.median(times)), 2), "MB": round(written[name] / 1e6, 2)}
        for name, times in seconds.items()
    ]
    return pd.DataFrame(lines, columns=["process", "seconds", "MB"]).sort_values("seconds", ignore_index=True), notes


def _commands(bundle: Path, methods: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Command lines with places for the files, and notes on what is not there."""

    def script(text: str) -> list[str]:
        files = ["FIXED", "MOVING", "OUTPUT"]
        return [sys.executable, "-c", f"import sys\nfixed, moving, output = sys.argv[1:]\n{text}", *files]

    commands = {"import monai.bundle, for comparison": script(_BARE), "register, in Python": script(_REGISTER)}
    # beside this Python, whose folder need not be on the path
    command = shutil.which("zsreg") or shutil.which("zsreg", path=str(Path(sys.executable).parent))
    if command:
        commands["zsreg register"] = [command, "register", "FIXED", "MOVING", "-o", "FOLDER"]
    notes = [] if command else ["zsreg register: not installed"]
    run = f"-m monai.bundle run --config_file {bundle}/configs/inference.json --bundle_root {bundle}".split()
    commands["bundle"] = [sys.executable, *run, "--fixed", "FIXED", "--moving", "MOVING", "--output_dir", "FOLDER"]
    for family in dict.fromkeys(methods):
        try:
            module = importlib.import_module(f"monai_zsreg.benchmark.peers.{family}")
            version(PEERS[family].package)
        except ImportError as error:
            notes += [f"{family}: {error}"] if family not in ("ours", "none") else []
            continue
        if hasattr(module, "WHOLE"):
            commands[family] = script(module.WHOLE)
    return commands, notes
