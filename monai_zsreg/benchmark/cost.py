# SPDX-License-Identifier: Apache-2.0
"""What a registration costs: seconds and memory against size, and whole processes beside those of others."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

# scripts read the names ``fixed``, ``moving`` and ``output``, as the peers' own do; figures are printed as a dictionary
_BARE = "import monai.bundle, shutil; shutil.copy(moving, output)"
_REGISTER = """
from monai_zsreg import register
from monai_zsreg.io.images import write_image
write_image(output, register(fixed, moving).resampled())
"""
# no image serves twice in a row, or it would be read once
_COHORT = """
import json, pathlib, time
begin, folder = time.perf_counter(), pathlib.Path(output).parent
pairs = [dict(name=str(n), fixed=(fixed, moving)[n % 2], moving=(moving, fixed)[n % 2]) for n in range(6)]
(folder / "pairs.json").write_text(json.dumps(pairs))
from monai_zsreg.app.cli import main
main(["cohort", str(folder / "pairs.json"), "-o", str(folder), "-q"])
spent = (time.perf_counter() - begin) / len(pairs)
own = [json.loads(path.read_text())["seconds"] for path in folder.glob("*/report.json")]
print(json.dumps({"value": spent, "beside": sum(own) / len(own)}))
"""
_CHAIN = """
import json, statistics, time
from monai.transforms import LoadImaged
from monai_zsreg import register
from monai_zsreg.transforms import RegisterAffined
keys, own, spent = ["a", "b", "c"], [], []
data = LoadImaged(["f", *keys], ensure_channel_first=True)({"f": fixed} | dict.fromkeys(keys, moving))
chain = RegisterAffined(keys, "f", on_failure="ignore")
for turn in range(4):
    own.append(sum(register(data["f"], data[key], warn=False).seconds for key in keys))
    begin = time.perf_counter()
    chain(data)
    spent.append(time.perf_counter() - begin)
print(json.dumps({"value": statistics.median(spent[1:]), "beside": statistics.median(own[1:])}))
"""
# ``fixed`` is a shape and ``moving`` a tool; Linux tells the most memory that was held, and forgets it when asked to
_RESAMPLE = """
import json, re, time
import numpy as np
from scipy.spatial.transform import Rotation
shape = json.loads(fixed)
dims = len(shape)
matrix = np.eye(dims + 1)
matrix[:dims, :dims] = Rotation.from_euler("zyx", [12, 9 * (dims > 2), 7 * (dims > 2)], True).as_matrix()[:dims, :dims]
middle = (np.array(shape) - 1) / 2
matrix[:dims, dims] = middle - matrix[:dims, :dims] @ middle
values = np.random.default_rng(0).random(shape, np.float32)
if moving == "ours":
    import torch
    from monai_zsreg.geometry import Grid
    from monai_zsreg.resample import resample
    torch.set_num_threads(1)
    image, grid = torch.from_numpy(values)[None], Grid(tuple(shape), torch.eye(dims + 1, dtype=torch.float64))
    work = lambda: resample(image, grid, grid, matrix, fill=0.0)
else:
    import SimpleITK
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    image = SimpleITK.GetImageFromArray(values)
    back = matrix[dims - 1 :: -1, dims - 1 :: -1]
    transform = SimpleITK.AffineTransform(dims)
    transform.SetMatrix(back.flatten().tolist())
    transform.SetTranslation(matrix[dims - 1 :: -1, dims].tolist())
    work = lambda: SimpleITK.Resample(image, image, transform, SimpleITK.sitkLinear, 0.0)
held = lambda name: int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")
before, begin = held("VmRSS"), time.process_time()
result = work()
spent = time.process_time() - begin
print(json.dumps({"value": spent, "extra": held("VmHWM") - before - values.nbytes / 2**20}))
"""
# what starts it is small: a child's peak memory is at least that of its parent
_WATCH = """
import json, resource, subprocess, sys, time
begin = time.perf_counter()
ran = subprocess.run(sys.argv[1:], capture_output=True, text=True)
spent, used = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
text = ran.stdout + ran.stderr if ran.returncode else ran.stderr + ran.stdout
said = ([line for line in text.splitlines() if line.strip()] or ["no word"])[-1]
found = {"status": ran.returncode, "said": said, "seconds": spent, "CPU": used.ru_utime + used.ru_stime}
print(json.dumps(found | {"peak MB": used.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)}))
"""
# seconds above which one run is enough
_LONG = 10.0
_IMPORT, _ZSREG, _BUNDLE = "import monai.bundle, for comparison", "zsreg register", "bundle"
_SHAPES = ((480, 480, 310), (10_000, 10_000))


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


def whole_processes(
    files: Sequence[Path],
    bundle: Path,
    methods: Iterable[str],
    parts: Sequence[str] | None = None,
    end: float = math.inf,
) -> tuple[list[pd.DataFrame], list[str]]:
    """What one pair costs, from start to the moved image on disk, beside what it is to be compared with.

    Args:
        files: of the fixed and of the moving image.
        bundle: folder of the bundle.
        methods: families of peers; those that have a script are run.
        parts: ``"processes"``, ``"cohort"``, ``"chain"`` and ``"resampling"``, or some of these; None for all.
        end: see `timed`.

    Returns:
        A table of ratios and one of whole processes, and notes on what was left out.
    """
    commands, notes = _commands(bundle, methods, parts or ("processes", "cohort", "chain", "resampling"))
    found, more = timed(commands, files[0], files[1], end=end)
    columns = ["process", "seconds", "CPU", "peak MB", "MB written"]
    told = [{"process": name, **row} for name, row in found.items() if "value" not in row]
    table = pd.DataFrame(told, columns=columns).sort_values("seconds", ignore_index=True)
    return [pd.DataFrame(_ratios(found), columns=["", "measured", "beside", "ratio"]), table.round(2)], notes + more


def _ratios(found: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, ...]]:
    """The lines of the first table, of what could be measured."""

    def line(text: str, value: float, beside: float, unit: str = "s") -> tuple[str, ...]:
        return text, f"{value:.2f} {unit}", f"{beside:.2f} {unit}", f"{value / beside:.2f}"

    for name in (_BUNDLE, _ZSREG):
        if name in found and _IMPORT in found:
            yield line(f"{name}, over importing monai.bundle", found[name]["seconds"], found[_IMPORT]["seconds"])
        if name in found:
            yield f"{name}, peak memory", f"{found[name]['peak MB']:.0f} MB", "", ""
            written = found[name]["MB written"]
            yield line(f"{name}, written over the moved image", written, found[name]["moved MB"], "MB")
    for name in ("zsreg --help", "a wrong argument"):
        if name in found:
            yield name, f"{found[name]['seconds']:.2f} s", "", ""
    for name, row in found.items():
        if "beside" in row:
            yield line(name, row["value"], row["beside"])
    for shape in map(list, _SHAPES):
        ours, other = (found.get(f"{tool} {shape}") for tool in ("ours", "SimpleITK"))
        if ours and other:
            yield line(f"resampling {shape}, CPU over SimpleITK's", ours["value"], other["value"])
            extra = [f"{row['extra']:.0f} MB" for row in (ours, other)]
            yield f"resampling {shape}, memory above image and result", *extra, ""


def timed(
    commands: Mapping[str, Sequence[str]], fixed: Path, moving: Path, repeats: int = 3, end: float = math.inf
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Medians of what commands take that register a pair.

    They run in turn ``repeats`` times, and once before to warm up; once where that takes more than ten seconds. After
    ``end``, by the monotonic clock, each runs once at most.

    ``FIXED``, ``MOVING``, ``FOLDER`` and ``OUTPUT`` (a file in it) stand for the places. A command that fails or
    writes no image where it should is left out, with a note.
    """
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    notes = []
    for name in [*commands] * (repeats + 1):
        seen = rows.get(name)
        late = time.monotonic() > end or bool(seen and len(seen) > 1 and seen[-1]["seconds"] > _LONG)
        if seen is not None and not (seen and late):
            with tempfile.TemporaryDirectory(prefix="zsreg-") as folder:
                places = {"FIXED": fixed, "MOVING": moving, "FOLDER": folder, "OUTPUT": Path(folder) / "moved.nii.gz"}
                command = [str(places.get(part, part)) for part in commands[name]]
                watched = [sys.executable, "-c", _WATCH, *command]
                row = json.loads(subprocess.run(watched, capture_output=True, text=True, check=True).stdout)
                files = [path for path in Path(folder).rglob("*") if path.is_file()]
                images = [path.stat().st_size / 1e6 for path in files if path.name.startswith("moved.nii")]
                status, said = row.pop("status"), row.pop("said")
                # 3: registered, and not to be trusted
                fine = status in ((2,) if "--ouput" in command else (0, 3))
                if not fine or ({"FOLDER", "OUTPUT"} & {*commands[name]} and not images):
                    notes.append(f"{name}: status {status}, {said[:200]}")
                    del rows[name]
                else:
                    row |= {"MB written": sum(path.stat().st_size for path in files) / 1e6, "moved MB": sum(images)}
                    seen.append(row | (json.loads(said) if said.startswith("{") else {}))
    return {name: dict(pd.DataFrame(seen[1:] or seen).median()) for name, seen in rows.items()}, notes


def _commands(bundle: Path, methods: Iterable[str], parts: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Command lines with places for the files, and notes on what is not there."""

    def script(text: str, *files: str) -> list[str]:
        files = files or ("FIXED", "MOVING", "OUTPUT")
        return [sys.executable, "-c", f"import sys\nfixed, moving, output = sys.argv[1:]\n{text}", *files]

    commands: dict[str, list[str]] = {}
    notes = []
    if "processes" in parts:
        commands = {_IMPORT: script(_BARE), "register, in Python": script(_REGISTER)}
        zsreg = [sys.executable, "-m", "monai_zsreg.app.cli"]
        commands[_ZSREG] = [*zsreg, "register", "FIXED", "MOVING", "-o", "FOLDER"]
        commands["zsreg --help"] = [*zsreg, "--help"]
        commands["a wrong argument"] = [*zsreg, "register", "FIXED", "MOVING", "--ouput", "out"]
        run = f"-m monai.bundle run --config_file {bundle}/configs/inference.json --bundle_root {bundle}".split()
        commands[_BUNDLE] = [sys.executable, *run, "--fixed", "FIXED", "--moving", "MOVING", "--output_dir", "FOLDER"]
    for family in dict.fromkeys(methods) if "processes" in parts else ():
        try:
            module = importlib.import_module(f"monai_zsreg.benchmark.peers.{family}")
            version(PEERS[family].package)
        except ImportError as error:
            notes += [f"{family}: {error}"] if family not in ("ours", "none") else []
            continue
        if hasattr(module, "WHOLE"):
            commands[family] = script(module.WHOLE)
    if "cohort" in parts:
        commands["cohort, a pair over its own registration"] = script(_COHORT)
    if "chain" in parts:
        commands["RegisterAffined, three over three registrations"] = script(_CHAIN, "FIXED", "MOVING", "")
    for shape in _SHAPES if "resampling" in parts else ():
        for tool in ("ours", "SimpleITK"):
            commands[f"{tool} {list(shape)}"] = script(_RESAMPLE, json.dumps(shape), tool, "")
    return commands, notes
