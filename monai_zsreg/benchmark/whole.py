# SPDX-License-Identifier: Apache-2.0
"""What one pair costs, from start to the moved image on disk: whole processes beside those of others."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from monai_zsreg.benchmark.cost import phantom_pair
from monai_zsreg.benchmark.peers import PEERS
from monai_zsreg.benchmark.report import markdown, write_page
from monai_zsreg.errors import require
from monai_zsreg.io.images import write_image

PARTS = ("processes", "cohort", "chain", "resampling")

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
from monai_zsreg.benchmark.perturb import about
from monai_zsreg.benchmark.volumes import Volume
values = np.random.default_rng(0).random(json.loads(fixed), np.float32)
dims = values.ndim
image = Volume(values, np.eye(dims + 1))
turn = Rotation.from_euler("zyx", [12, 9 * (dims > 2), 7 * (dims > 2)], True).as_matrix()[:dims, :dims]
matrix = about(image.center, turn, np.zeros(dims))
if moving == "ours":
    import torch
    from monai_zsreg.resample import resample
    torch.set_num_threads(1)
    still = torch.from_numpy(values)[None]
    work = lambda: resample(still, image.grid, image.grid, matrix, fill=0.0)
else:
    import SimpleITK
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    still, transform = SimpleITK.GetImageFromArray(values), SimpleITK.AffineTransform(dims)
    # its axes are reversed
    transform.SetMatrix(matrix[dims - 1 :: -1, dims - 1 :: -1].flatten().tolist())
    transform.SetTranslation(matrix[dims - 1 :: -1, dims].tolist())
    work = lambda: SimpleITK.Resample(still, still, transform, SimpleITK.sitkLinear, 0.0)
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


def write_report(
    files: Sequence[Path],
    bundle: Path,
    families: Iterable[str],
    folder: Path,
    threads: int,
    parts: Collection[str] = PARTS,
    end: float = math.inf,
) -> Path:
    """Measure, and write ``whole-process.md``, whose path is returned: a table of ratios and one of whole processes.

    Args:
        files: of the fixed and of the moving image; none for a phantom of 240 x 240 x 240.
        bundle: folder of the bundle.
        families: of peers; those that have a script are run.
        folder: to write to.
        threads: of each process, for the page.
        parts: some of `PARTS`.
        end: see `timed`.

    Raises:
        RegistrationError: another number of files.
    """
    require(len(files) in (0, 2), "whole-process", [*map(str, files)], "a fixed and a moving image")
    commands, notes = _commands(bundle, families, parts)
    with tempfile.TemporaryDirectory(prefix="zsreg-") as place:
        fixed, moving = files or _save_phantom(Path(place))
        found, more = timed(commands, fixed, moving, end=end)
    columns = ["process", "seconds", "CPU", "peak MB", "MB written"]
    told = [{"process": name, **row} for name, row in found.items() if "value" not in row]
    processes = pd.DataFrame(told, columns=columns).sort_values("seconds", ignore_index=True).round(2)
    ratios = pd.DataFrame(_ratios(found), columns=["", "measured", "beside", "ratio"])
    body = [line for table in (ratios, processes) if len(table) for line in (*markdown(table), "")]
    title = "One pair, whole processes from start to the moved image on disk"
    return write_page(folder / "whole-process.md", title, threads, body[:-1], notes + more)


def _save_phantom(folder: Path) -> list[Path]:
    paths = [folder / "fixed.nii.gz", folder / "moving.nii.gz"]
    for path, image in zip(paths, phantom_pair(3, 240)[:2], strict=True):
        write_image(path, image.image)
    return paths


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
    for _ in range(repeats + 1):
        for name, seen in list(rows.items()):
            if seen and (time.monotonic() > end or (len(seen) > 1 and seen[-1]["seconds"] > _LONG)):
                continue
            row = _watched(commands[name], fixed, moving)
            if "told" in row:
                notes.append(f"{name}: {row['told']}")
                del rows[name]
            else:
                seen.append(row)
    return {name: dict(pd.DataFrame(seen[1:] or seen).median()) for name, seen in rows.items()}, notes


def _watched(command: Sequence[str], fixed: Path, moving: Path) -> dict[str, Any]:
    """What a command took, and what it says of itself; or why it failed, as ``told``."""
    with tempfile.TemporaryDirectory(prefix="zsreg-") as folder:
        places = {"FIXED": fixed, "MOVING": moving, "FOLDER": folder, "OUTPUT": Path(folder) / "moved.nii.gz"}
        watched = [sys.executable, "-c", _WATCH, *[str(places.get(part, part)) for part in command]]
        row = json.loads(subprocess.run(watched, capture_output=True, text=True, check=True).stdout)
        sizes = {path: path.stat().st_size / 1e6 for path in Path(folder).rglob("*") if path.is_file()}
    images = [size for path, size in sizes.items() if path.name.startswith("moved.nii")]
    status, said = row.pop("status"), row.pop("said")
    # 3: registered, and not to be trusted
    fine = status in ((2,) if "--ouput" in command else (0, 3))
    if not fine or ({"FOLDER", "OUTPUT"} & {*command} and not images):
        return {"told": f"status {status}, {said[:200]}"}
    row |= {"MB written": sum(sizes.values()), "moved MB": sum(images)}
    return row | (json.loads(said) if said.startswith("{") else {})


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
            if hasattr(module, "WHOLE"):
                version(PEERS[family].package)
                commands[family] = script(module.WHOLE)
        except ImportError as error:
            notes.append(f"{family}: {error}")
    if "cohort" in parts:
        commands["cohort, a pair over its own registration"] = script(_COHORT)
    if "chain" in parts:
        commands["RegisterAffined, three over three registrations"] = script(_CHAIN, "FIXED", "MOVING", "")
    for shape in _SHAPES if "resampling" in parts else ():
        for tool in ("ours", "SimpleITK"):
            commands[f"{tool} {list(shape)}"] = script(_RESAMPLE, json.dumps(shape), tool, "")
    return commands, notes
