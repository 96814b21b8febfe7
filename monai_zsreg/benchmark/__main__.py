# SPDX-License-Identifier: Apache-2.0
"""Measure presets and other registration methods on known transforms of one's own images.

::

    python -m monai_zsreg.benchmark FOLDER --output results
    python -m monai_zsreg.benchmark pairs.json --output results --methods ours:robust elastix
    python -m monai_zsreg.benchmark FOLDER --output results --quick
    python -m monai_zsreg.benchmark --protocols overlap --output results
    python -m monai_zsreg.benchmark cost --output results
    python -m monai_zsreg.benchmark cost --whole-process t1.nii.gz t2.nii.gz --output results
    python -m monai_zsreg.benchmark calibrate FOLDER --output results
    python -m monai_zsreg.benchmark deformable FOLDER --output results

``FOLDER`` holds one folder for each subject with co-registered images on one grid, named after their modality
(``t1.nii.gz``, ``t2.nii.gz``, ...; a prefix ``study1_`` is ignored), and where there are any ``mask.nii.gz`` (brain),
``tissue.nii.gz`` (1 fluid, 2 gray, 3 white matter) and ``seg.nii.gz`` (anatomical labels). ``pairs.json`` is a list of
``{"fixed", "moving", "subject", "fixed_modality", "moving_modality", "mask"?, "residual"?}``. A folder with a
``manifest.csv`` (``pair, fixed, moving, kind, truth, tolerance_mm``) holds pairs on grids of their own that their
headers put together. Photographs and retina pairs come with scikit-image.

Written to the output folder: ``results.jsonl`` (one line a case and method, appended at once: the same command again
goes on where it stopped), ``results.csv``, ``summary.csv``, ``summary.md``, ``figure4.png`` and ``capture.png``; by
``cost``: ``cost.jsonl``, ``cost.csv``, ``cost.md``, ``cost.png``, or ``whole-process.md``; by ``calibrate``, which
measures the uncertainty and the verdict: ``calibration.jsonl``, ``calibration.md``, ``reliability.png``, ``roc.png``;
by ``deformable`` (see `monai_zsreg.benchmark.deformable`): ``results.jsonl``, ``deformable.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from itertools import zip_longest
from pathlib import Path

import pandas as pd

from monai_zsreg.benchmark import anatomies, brains, calibrate, cost, deformable, pairs, summary, whole
from monai_zsreg.benchmark.cases import Case
from monai_zsreg.benchmark.methods import DEFORMABLE, METHODS, Method, default_caps, make_methods, set_caps
from monai_zsreg.benchmark.peers import Task
from monai_zsreg.benchmark.run import read_results, run_cases
from monai_zsreg.errors import RegistrationError, require
from monai_zsreg.io.files import output_folder, write_json

# what the first word may choose, and without one: where results go, what is written of them, which methods run
_STUDIES = {
    "": ("results.jsonl", summary.write_report, METHODS),
    "table": ("results.jsonl", summary.write_report, ()),
    "calibrate": ("calibration.jsonl", calibrate.write_report, (calibrate.ROBUST, *calibrate.NARROW)),
    "cost": ("cost.jsonl", cost.write_report, METHODS),
    "deformable": ("results.jsonl", deformable.write_report, tuple(DEFORMABLE)),
}
_QUICK_SECONDS = 420.0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m monai_zsreg.benchmark", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    several = partial(parser.add_argument, nargs="+")
    slow = " ".join(f"{name}:{dims}={count}" for (name, dims), count in default_caps(quick=False).items())
    add(
        "data",
        nargs="*",
        help="folders or datalists, after `calibrate` or `deformable` if that; `cost`; `table`: no runs",
    )
    add("--output", required=True, type=Path, help="folder for the results")
    add("--residuals", type=Path, help="CSV with subject, a, b, dx, dy, dz: a(x) ~ b(x + d), mm along the voxel axes")
    several(
        "--methods",
        help=f"default: {' '.join(METHODS)}; options of ours as in ours:robust,search=none; "
        f"deformable: {', '.join(DEFORMABLE)}",
    )
    several(
        "--protocols",
        help="paper mild so3 stress natural between anatomies overlap, or a stress or row by name; "
        f"of --whole-process: {' '.join(whole.PARTS)}",
    )
    several("--rows", help="deformable: beginnings of rows' names; default: all")
    several("--dims", type=int, choices=(2, 3), default=[2, 3])
    several("--pairs", default=["t1-t2", "t1-flair", "t1-t1ce"], help="modalities, both directions run")
    several("--exclude", default=[], metavar="PATTERN", help="leave out subjects, such as 'spm12/*'")
    add("--cases", type=int, help="cases of every row; each has a default of its own; deformable: 2 a folder")
    several("--cap", default=[], metavar="METHOD:DIMS=N", help=f"cases of slow methods; default: {slow}")
    add("--slices", type=int, default=5, help="slices of a volume (2D)")
    add("--min-side", type=int, default=128, help="leave out smaller slices (2D)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=os.cpu_count() or 1, help="threads of every method; default: all cores")
    add("--device", help="where ours runs, such as cpu or cuda; default: its own choice")
    add("--vgg19-weights", help="weights file for the presets that need one")
    add("--time-limit", type=float, help="seconds after which no further registration begins")
    add("--redo", nargs="*", default=[], help="methods to run again; `failures` for runs without an answer")
    add("--quick", action="store_true", help="a few cases of the main rows, within ten minutes on two cores")
    several("--symmetric", default=[], metavar="PATTERN", help="calibrate: subjects that a mirror leaves as they are")
    add("--sizes-2d", nargs="*", type=int, default=cost.SIZES[2], help="cost: pixels a side")
    add("--sizes-3d", nargs="*", type=int, default=cost.SIZES[3], help="cost: voxels a side")
    add("--whole-process", nargs="*", type=Path, metavar="FILE", help="cost: of whole processes; a pair, or a phantom")
    add("--bundle", type=Path, default=Path("bundles/zero_shot_affine_registration"), help="cost: the bundle to run")
    args = parser.parse_intermixed_args(argv)
    args.study = args.data.pop(0) if args.data and args.data[0] in _STUDIES else ""
    limit = _QUICK_SECONDS if args.quick else math.inf
    args.end = time.monotonic() + (limit if args.time_limit is None else args.time_limit)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = _arguments(argv)
    # the methods' processes inherit these
    for name in ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    try:
        output_folder(args.output)
        if args.whole_process is not None:
            families = [method.family for method in make_methods(args.methods or METHODS, Task())]
            page = (args.output, args.threads, args.protocols or whole.PARTS, args.end)
            print(whole.write_report(args.whole_process, args.bundle, families, *page))
        else:
            _run(args)
    except RegistrationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    """Run what has not run yet, and write the report of all results."""
    name, write_report, usual = _STUDIES[args.study]
    log = args.output / name
    task = Task(threads=args.threads, seed=args.seed, device=args.device, vgg19_weights=args.vgg19_weights)
    if args.study == "deformable":
        task = replace(task, transform="deformable")
    methods = make_methods(usual if args.study == "calibrate" else args.methods or usual, task)
    for method in methods:
        method.fresh = args.study in ("cost", "deformable")
    if not args.study:
        set_caps(methods, args.quick, args.cap)
    cases, notes = _cases(args)
    try:
        if cases:
            left_out = _left_out(methods)
            notes += left_out.values()
            able = [method for method in methods if method not in left_out]
            notes += run_cases(cases, able, log, args.end, with_similarity=not args.study, redo=args.redo)
    finally:
        for method in methods:
            method.close()
        # an interrupted run leaves its tables too
        results = read_results(log)
        if results:
            print(write_report(pd.DataFrame(results), args.output, args.threads, notes))


def _cases(args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """Cases of a study, and notes on what was left out."""
    if args.study == "table":
        return [], []
    if args.study == "cost":
        sizes = {2: args.sizes_2d, 3: args.sizes_3d}
        return cost.phantom_cases({dims: sizes[dims] for dims in args.dims}, args.seed), []
    if args.study == "deformable":
        found = {folder: pairs.find_pairs(folder, [])[0] for folder in map(Path, args.data)}
        some = [deformable.deformable_cases(p, f.name, args.cases or 2, args.seed) for f, p in found.items()]
        return [case for cases in some for case in cases if case.row.name.startswith(tuple(args.rows or ("",)))], []
    if args.study == "calibrate":
        args.cases = 40 if args.cases is None else args.cases
    cases, notes = _row_cases(args)
    _same_settings(args)
    return calibrate.calibration_cases(cases, args.symmetric) if args.study == "calibrate" else cases, notes


def _row_cases(args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """Cases of the selected rows, in turn so that a run cut short has some of each, and notes on what was left out."""
    wanted = [tuple(text.split("-")) for text in args.pairs]
    two = "two modalities with a hyphen between, such as t1-t2"
    require(all(len(names) == 2 for names in wanted), "pairs", args.pairs, two)
    rows = [row for row in (*brains.ROWS, *anatomies.ROWS) if row.dims in args.dims]
    if args.protocols is not None:
        names = {name for p in args.protocols for name in (brains.STRESS if p == "stress" else (p,))}
        rows = [row for row in rows if not {row.protocol, row.name}.isdisjoint(names)]
    require(bool(rows), "protocols", args.protocols, "at least one row with these dimensions")
    found: list[pairs.Pair] = []
    notes: list[str] = []
    manifest = None
    for source in map(Path, args.data):
        if anatomies.is_anatomies(source):
            manifest = source
        elif source.suffix == ".json":
            found += pairs.read_datalist(source)
        else:
            some, left_out = pairs.find_pairs(source, wanted)
            found, notes = found + some, notes + left_out
    if args.residuals is not None:
        found = pairs.with_residuals(found, args.residuals)
    found = [pair for pair in found if not any(fnmatch(pair.subject, pattern) for pattern in args.exclude)]
    lists: list[list[Case]] = []
    for row in rows:
        count = args.cases if args.cases is not None else row.quick if args.quick else row.cases
        if row in anatomies.ROWS:
            lists.append(anatomies.anatomy_cases(row, manifest, count, args.seed))
        else:
            some = pairs.photographs() if row.kind == "natural" else found
            lists.append(brains.brain_cases(row, some, count, args.seed, args.slices, args.min_side))
        if count and not lists[-1]:
            notes.append(f"{row.name}: no pair suits this row")
    enough = any(lists) and bool(args.data or args.protocols)
    require(enough, "data", args.data, "a folder or datalist with images that suit at least one row")
    return [case for turn in zip_longest(*lists) for case in turn if case is not None], notes


def _left_out(methods: Sequence[Method]) -> dict[Method, str]:
    """Methods that cannot run here, and why."""
    with ThreadPoolExecutor() as pool:
        reasons = dict(zip(methods, pool.map(Method.missing, methods), strict=True))
    left_out = {method: f"{method.name}: {reason}" for method, reason in reasons.items() if reason}
    print("".join(f"left out: {note}\n" for note in left_out.values()), end="", file=sys.stderr)
    return left_out


def _same_settings(args: argparse.Namespace) -> None:
    """Refuse to mix results of different images, slices or thread counts in one table."""
    names = ("residuals", "pairs", "exclude", "slices", "min_side", "threads", "device")
    settings = {name: getattr(args, name) for name in names} | {"data": [str(Path(p).resolve()) for p in args.data]}
    settings["residuals"] = None if args.residuals is None else str(args.residuals.resolve())
    path = args.output / "settings.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    other = {name: before.get(name) for name in settings if before.get(name) != settings[name]}
    require(not other, "output", str(args.output), f"a folder begun with the same {', '.join(other)} (was {other})")
    write_json(path, settings)


if __name__ == "__main__":
    sys.exit(main())
