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

``FOLDER`` holds one folder for each subject with co-registered images on one grid, named after their modality
(``t1.nii.gz``, ``t2.nii.gz``, ...; a prefix ``study1_`` is ignored), and where there are any ``mask.nii.gz`` (brain),
``tissue.nii.gz`` (1 fluid, 2 gray, 3 white matter) and ``seg.nii.gz`` (anatomical labels). ``pairs.json`` is a list of
``{"fixed", "moving", "subject", "fixed_modality", "moving_modality", "mask"?, "residual"?}``. A folder with a
``manifest.csv`` (``pair, fixed, moving, kind, truth, tolerance_mm``) holds pairs on grids of their own that their
headers put together. Photographs and retina pairs come with scikit-image.

Written to the output folder: ``results.jsonl`` (one line a case and method, appended at once: the same command again
goes on where it stopped), ``results.csv``, ``summary.csv``, ``summary.md``, ``figure4.png`` and ``capture.png``; by
``cost``: ``cost.jsonl``, ``cost.csv``, ``cost.md``, ``cost.png``, or ``whole-process.md``; by ``calibrate``, which
measures the uncertainty and the verdict: ``calibration.jsonl``, ``calibration.md``, ``reliability.png``, ``roc.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from itertools import zip_longest
from pathlib import Path

import pandas as pd

from monai_zsreg.benchmark import anatomies, brains, calibrate, cost, pairs, plots, tables
from monai_zsreg.benchmark.cases import Case
from monai_zsreg.benchmark.methods import Method, Task, make_methods
from monai_zsreg.benchmark.peers import PEERS
from monai_zsreg.benchmark.run import read_results, run_cases
from monai_zsreg.errors import RegistrationError
from monai_zsreg.io.files import output_folder, write_json

__all__ = ["main"]

_SLOW = ("ours:paper", "ours:keypoints")  # of ours, in 3D
_METHODS = ("ours:robust", *_SLOW, *PEERS, "none")
_QUICK_SECONDS = 420.0

Caps = dict[tuple[str, int], int]


def _default_caps(quick: bool) -> Caps:
    """How many cases of a row a slow method gets, by its name and number of dimensions."""
    caps = {(name, 3): 0 if quick else 10 for name in _SLOW}
    for name, peer in PEERS.items():
        caps |= {(name, dims): cases for dims, cases in (peer.quick_cases if quick else peer.cases).items()}
    return caps


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m monai_zsreg.benchmark", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    several = partial(parser.add_argument, nargs="+")
    slow = " ".join(f"{name}:{dims}={count}" for (name, dims), count in _default_caps(quick=False).items())
    add("data", nargs="*", help="folders or datalists; `calibrate` and such; `cost`; `table` to redo the tables alone")
    add("--output", required=True, type=Path, help="folder for the results")
    add("--residuals", type=Path, help="CSV with subject, a, b, dx, dy, dz: a(x) ~ b(x + d), mm along the voxel axes")
    several("--methods", default=_METHODS, help="default: %(default)s; options of ours as in ours:robust,search=none")
    several(
        "--protocols",
        help="paper mild so3 stress natural between anatomies overlap, or a stress or row by name; "
        "of --whole-process: processes cohort chain resampling",
    )
    several("--dims", type=int, choices=(2, 3), default=[2, 3])
    several("--pairs", default=["t1-t2", "t1-flair", "t1-t1ce"], help="modalities, both directions run")
    several("--exclude", default=[], metavar="PATTERN", help="leave out subjects, such as 'spm12/*'")
    add("--cases", type=int, help="cases of every row; each row has a default of its own")
    several("--cap", default=[], metavar="METHOD:DIMS=N", help=f"cases of slow methods; default: {slow}")
    add("--slices", type=int, default=5, help="slices of a volume (2D)")
    add("--min-side", type=int, default=128, help="leave out smaller slices (2D)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=os.cpu_count() or 1, help="threads of every method; default: all cores")
    add("--device", help="where ours runs, such as cpu or cuda; default: its own choice")
    add("--vgg19-weights", help="weights file for the presets that need one")
    add("--time-limit", type=float, help="seconds after which no further registration begins")
    several("--redo", default=[], help="methods to run again; `failures` for runs without an answer")
    add("--quick", action="store_true", help="a few cases of the main rows, within ten minutes on two cores")
    several("--symmetric", default=[], metavar="PATTERN", help="calibrate: subjects that a mirror leaves as they are")
    add("--sizes-2d", nargs="*", type=int, help="cost: pixels a side")
    add("--sizes-3d", nargs="*", type=int, help="cost: voxels a side")
    add("--whole-process", nargs="*", type=Path, metavar="FILE", help="cost: of whole processes; a pair, or a phantom")
    add("--bundle", type=Path, default=Path("bundles/zero_shot_affine_registration"), help="cost: the bundle to run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = _arguments(argv)
    # the methods' processes inherit these
    for name in ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    mode = args.data[0] if args.data and args.data[0] in ("cost", "calibrate", "table") else "run"
    args.data = args.data if mode == "run" else args.data[1:]
    methods: list[Method] = []
    try:
        output_folder(args.output)
        task = Task(threads=args.threads, seed=args.seed, device=args.device, vgg19_weights=args.vgg19_weights)
        if mode == "cost":
            _cost(args, task, methods)
        elif mode == "calibrate":
            _calibrate(args, task, methods)
        else:
            cases, notes = ([], []) if mode == "table" else _cases(args)
            methods += make_methods(args.methods, task)
            _run(args, methods, cases, notes)
    except RegistrationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        for method in methods:
            method.close()
    return 0


def _cases(args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """Cases of the selected rows, in turn so that a run cut short has some of each, and notes on what was left out."""
    wanted = [tuple(text.split("-")) for text in args.pairs]
    if any(len(names) != 2 for names in wanted):
        raise RegistrationError("pairs", args.pairs, "two modalities with a hyphen between, such as t1-t2")
    rows = [row for row in (*brains.ROWS, *anatomies.ROWS) if row.dims in args.dims]
    if args.protocols is not None:
        names = {name for p in args.protocols for name in (brains.STRESS if p == "stress" else (p,))}
        rows = [row for row in rows if not {row.protocol, row.name}.isdisjoint(names)]
    if not rows:
        raise RegistrationError("protocols", args.protocols, "at least one row with these dimensions")
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
        found = pairs.attach_residuals(found, pairs.read_residuals(args.residuals))
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
    if not any(lists) or (not args.data and args.protocols is None):
        raise RegistrationError("data", args.data, "a folder or datalist with images that suit at least one row")
    return [case for turn in zip_longest(*lists) for case in turn if case is not None], notes


def _usable(methods: list[Method]) -> list[str]:
    """Close and remove methods that cannot run here; why, a note each."""
    with ThreadPoolExecutor() as pool:
        reasons = dict(zip(methods, pool.map(lambda method: method.missing(), methods), strict=True))
    for method in [method for method in methods if reasons[method]]:
        method.close()
        methods.remove(method)
    notes = [f"{method.name}: {reason}" for method, reason in reasons.items() if reason]
    print("".join(f"left out: {note}\n" for note in notes), end="", file=sys.stderr)
    return notes


def _end(args: argparse.Namespace) -> float:
    limit = args.time_limit if args.time_limit is not None else _QUICK_SECONDS if args.quick else math.inf
    return time.monotonic() + limit


def _run(args: argparse.Namespace, methods: list[Method], cases: list[Case], notes: list[str]) -> None:
    log = args.output / "results.jsonl"
    try:
        if cases:
            caps = _default_caps(args.quick) | _caps(args.cap)
            _same_settings(args)
            notes += _usable(methods)
            notes += run_cases(cases, methods, log, caps, _end(args), redo=args.redo)
    finally:
        # an interrupted run leaves its tables too
        results = pd.DataFrame(read_results(log))
        if len(results):
            summary = tables.summarize(results)
            tables.write_csv(args.output / "results.csv", results.drop(columns="matrix"))
            tables.write_csv(args.output / "summary.csv", summary)
            tables.write_summary(args.output / "summary.md", summary, args.threads, notes)
            shown = results.merge(summary.loc[summary["best"], ["row", "method"]], on=["row", "method"])
            plots.plot_figure4(shown, args.output / "figure4.png")
            plots.plot_capture(shown, args.output / "capture.png")
            print(args.output / "summary.md")


def _same_settings(args: argparse.Namespace) -> None:
    """Refuse to mix results of different images, slices or thread counts in one table."""
    names = ("residuals", "pairs", "exclude", "slices", "min_side", "threads", "device")
    settings = {name: getattr(args, name) for name in names} | {"data": [str(Path(p).resolve()) for p in args.data]}
    settings["residuals"] = None if args.residuals is None else str(args.residuals.resolve())
    path = args.output / "settings.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    other = {name: before.get(name) for name in settings if before.get(name) != settings[name]}
    if other:
        allowed = f"a folder begun with the same {', '.join(other)} (was {other})"
        raise RegistrationError("output", str(args.output), allowed)
    write_json(path, settings)


def _caps(texts: Sequence[str]) -> Caps:
    caps: Caps = {}
    for text in texts:
        try:
            key, number = text.split("=")
            method, dims = key.rsplit(":", 1)
            caps[method, int(dims)] = int(number)
        except ValueError as error:
            raise RegistrationError("cap", text, "METHOD:DIMS=N, such as ants:3=20") from error
    return caps


def _calibrate(args: argparse.Namespace, task: Task, methods: list[Method]) -> None:
    args.cases = 40 if args.cases is None else args.cases
    cases, notes = _cases(args)
    _same_settings(args)
    cases = [case for case in cases if case.row.kind != "between"]
    turned = [case for case in cases if case.row.protocol == "so3"]
    methods += make_methods(["ours:robust", *calibrate.NARROW], task)
    log, end = args.output / "calibration.jsonl", _end(args)
    try:
        for some, users in (
            (cases, methods[:1]),
            (calibrate.spoiled_cases(cases, args.symmetric), methods[:1]),
            (turned, methods[1:]),
        ):
            notes += run_cases(some, users, log, end=end, with_similarity=False, redo=args.redo)
    finally:
        records = read_results(log)
        if records:
            report = calibrate.write_report(records, args.output, args.threads, notes)
            print(report.read_text(encoding="utf-8"), report, sep="\n")


def _cost(args: argparse.Namespace, task: Task, methods: list[Method]) -> None:
    methods += make_methods(args.methods, task)
    head = ["", *tables.machine(args.threads), ""]
    if args.whole_process is not None:
        with tempfile.TemporaryDirectory(prefix="zsreg-") as folder:
            files = args.whole_process or cost.save_phantom(Path(folder))
            if len(files) != 2:
                raise RegistrationError("whole-process", [*map(str, files)], "a fixed and a moving image")
            families = [method.family for method in methods]
            found, notes = cost.whole_processes(files, args.bundle, families, args.protocols, _end(args))
        text = [line for table in found if len(table) for line in (*tables.markdown(table), "")]
        path = args.output / "whole-process.md"
        title = "# One pair, whole processes from start to the moved image on disk"
        tables.write_lines(path, [title, *head, *text, *[f"- left out: {note}" for note in notes]])
        print(path)
        return
    notes = _usable(methods)
    for method in methods:
        method.close()
        method.fresh = True
    given = {2: args.sizes_2d, 3: args.sizes_3d}
    sizes = {dims: cost.SIZES[dims] if given[dims] is None else given[dims] for dims in args.dims}
    log = args.output / "cost.jsonl"
    try:
        notes += run_cases(cost.phantom_cases(sizes, args.seed), methods, log, end=_end(args), with_similarity=False)
    finally:
        results = read_results(log)
        if results:
            summary = tables.summarize(pd.DataFrame(results))
            tables.write_csv(args.output / "cost.csv", summary)
            text = [*head, *tables.cost_table(summary), "", *[f"- left out: {note}" for note in notes]]
            tables.write_lines(args.output / "cost.md", ["# Seconds and peak memory against size", *text])
            plots.plot_cost(summary, args.output / "cost.png")
            print(args.output / "cost.md")


if __name__ == "__main__":
    sys.exit(main())
