# SPDX-License-Identifier: Apache-2.0
"""Measure presets and other registration methods on known transforms of one's own images.

::

    python -m monai_zsreg.benchmark FOLDER --output results
    python -m monai_zsreg.benchmark pairs.json --output results --methods ours:robust elastix
    python -m monai_zsreg.benchmark FOLDER --output results --quick
    python -m monai_zsreg.benchmark cost --output results
    python -m monai_zsreg.benchmark calibrate FOLDER --output results

``FOLDER`` holds one folder for each subject with co-registered images on one grid, named after their modality
(``t1.nii.gz``, ``t2.nii.gz``, ...; a prefix ``study1_`` is ignored), and where there are any ``mask.nii.gz`` (brain),
``tissue.nii.gz`` (1 fluid, 2 gray, 3 white matter) and ``seg.nii.gz`` (anatomical labels). ``pairs.json`` is a list of
``{"fixed", "moving", "subject", "fixed_modality", "moving_modality", "mask"?, "residual"?}``.

Written to the output folder: ``results.jsonl`` (one line a case and method, appended at once: the same command again
goes on where it stopped), ``results.csv``, ``summary.csv``, ``summary.md``, ``figure4.png`` and ``capture.png``; by
``cost``: ``cost.jsonl``, ``cost.csv``, ``cost.md``, ``cost.png``; by ``calibrate``, which measures the uncertainty and
the verdict: ``calibration.jsonl``, ``calibration.md``, ``reliability.png``, ``roc.png``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from monai_zsreg.registration.presets import PRESETS

if TYPE_CHECKING:
    from monai_zsreg.benchmark.cases import Case
    from monai_zsreg.benchmark.data import Pair
    from monai_zsreg.benchmark.peers import Method, Options

__all__ = ["main"]

_PAIRS = ("t1-t2", "t1-flair", "t1-t1ce")
_METHODS = (*(f"ours:{preset}" for preset in PRESETS), "elastix", "simpleelastix", "ants", "sift", "none")
# a minute or more a volume, against seconds
_CAPS = ("ants:3=20", "elastix:3=40", "simpleelastix:3=10", "ours:keypoints:3=10", "ours:paper:3=10")
_QUICK_CAPS = ("ants:3=0", "simpleelastix:3=0", "ours:keypoints:3=0", "ours:paper:3=0", "elastix:3=2", "ants:2=6")
_QUICK_SECONDS = 420.0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m monai_zsreg.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "data",
        nargs="*",
        help="folders of subjects or datalists; `calibrate` and folders; `cost`; `table` to redo the tables alone",
    )
    add("--output", required=True, type=Path, help="folder for the results")
    add("--residuals", type=Path, help="CSV with subject, a, b, dx, dy, dz: a(x) ~ b(x + d), mm along the voxel axes")
    add("--methods", nargs="+", default=list(_METHODS), help=f"default: {' '.join(_METHODS)}")
    add("--protocols", nargs="+", help="paper mild so3 stress natural between, or one stress by name; default: all")
    add("--kinds", nargs="+", choices=("real", "exact", "natural", "between"), help="default: all")
    add("--dims", nargs="+", type=int, choices=(2, 3), default=[2, 3])
    add(
        "--pairs", nargs="+", default=list(_PAIRS), help=f"modalities, both directions run; default: {' '.join(_PAIRS)}"
    )
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="leave out subjects, such as 'spm12/*'")
    add("--cases", type=int, help="cases of every row; each row has a default of its own")
    add(
        "--cap",
        nargs="+",
        default=[],
        metavar="METHOD:DIMS=N",
        help=f"fewer for slow methods; default: {' '.join(_CAPS)}",
    )
    add("--cases-ants", type=int, help="short for --cap ants:3=N")
    add("--planes", nargs="+", choices=("axial", "coronal", "sagittal"), default=["axial"])
    add("--slices", type=int, default=5, help="slices of a volume (2D)")
    add("--min-side", type=int, default=128, help="leave out smaller slices (2D)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=os.cpu_count() or 1, help="threads of every method; default: all cores")
    add("--device", help="where ours runs, such as cpu or cuda; default: its own choice")
    add("--vgg19-weights", help="weights file for the presets that need one")
    add("--time-limit", type=float, help="seconds after which no further registration begins")
    add("--no-similarity", action="store_true", help="leave out Dice, SSIM, MI and MSE")
    add("--redo", nargs="+", default=[], help="methods to run again; `failures` for runs without an answer")
    add("--quick", action="store_true", help="a few cases of the main rows, within ten minutes on two cores")
    add(
        "--symmetric",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="calibrate: subjects that a mirror leaves as they are, such as averages of many heads",
    )
    add("--sizes-2d", nargs="*", type=int, help="cost: pixels a side")
    add("--sizes-3d", nargs="*", type=int, help="cost: voxels a side")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = _arguments(argv)
    # ITK reads this once, when its first filter runs
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(args.threads)

    from monai_zsreg.benchmark.peers import Options, limit_threads, make_methods
    from monai_zsreg.errors import RegistrationError

    options = Options(args.threads, args.device, args.vgg19_weights, args.seed)
    limit_threads(args.threads)
    methods: list[Method] = []
    try:
        methods, missing = make_methods(args.methods, options)
        if args.data == ["cost"]:
            _cost(args, methods, options)
            return 0
        if args.data[:1] == ["calibrate"]:
            _calibrate(args)
            return 0
        cases, notes = ([], []) if args.data == ["table"] else _cases(args)
        notes = [f"not installed: {m}" for m in missing] + notes
        for note in notes:
            print(note, file=sys.stderr)
        _run(args, cases, methods, notes)
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


def _pairs(args: argparse.Namespace) -> tuple[list[Pair], list[str]]:
    from monai_zsreg.benchmark import data
    from monai_zsreg.errors import RegistrationError

    if not args.data:
        raise RegistrationError("data", None, "a folder of subjects or a datalist")
    wanted = []
    for text in args.pairs:
        names = tuple(text.split("-"))
        if len(names) != 2:
            raise RegistrationError("pairs", text, "two modalities with a hyphen between, such as t1-t2")
        wanted.append((names[0], names[1]))
    pairs: list[data.Pair] = []
    notes: list[str] = []
    for source in args.data:
        if Path(source).is_dir():
            found, left_out = data.find_pairs(source, wanted)
            pairs += [*found, *data.t1_pairs(source), *data.same_modality_pairs(source)]
            notes += left_out
        else:
            pairs += data.read_datalist(source)
    if args.residuals is not None:
        pairs = data.attach_residuals(pairs, data.read_residuals(args.residuals))
    kept = [p for p in pairs if not any(fnmatch(p.subject, pattern) for pattern in args.exclude)]
    return kept, notes


def _cases(args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    from monai_zsreg.benchmark.cases import draw_cases, natural_pairs, select_rows
    from monai_zsreg.benchmark.run import interleave
    from monai_zsreg.errors import RegistrationError

    pairs, notes = _pairs(args)
    rows = [row for row in select_rows(args.protocols, args.dims) if args.kinds is None or row.kind in args.kinds]
    if not rows:
        raise RegistrationError("protocols", args.protocols, "at least one row with these dimensions and kinds")
    lists = []
    for row in rows:
        count = args.cases if args.cases is not None else row.quick if args.quick else row.cases
        if count == 0:
            continue
        source = natural_pairs() if row.kind == "natural" else pairs
        cases = draw_cases(row, source, count, args.seed, args.slices, args.planes, args.min_side)
        if not cases:
            notes.append(f"{row.name}: no pair suits this row")
        lists.append(cases)
    return interleave(lists), notes


def _run(args: argparse.Namespace, cases: list[Case], methods: list[Method], notes: list[str]) -> None:
    from monai_zsreg.benchmark import plots, tables
    from monai_zsreg.benchmark.run import Caps, read_results, run_cases
    from monai_zsreg.io.files import output_folder

    folder = output_folder(args.output)
    log = folder / "results.jsonl"
    caps = [*(_QUICK_CAPS if args.quick else _CAPS), *args.cap]
    if args.cases_ants is not None:
        caps.append(f"ants:3={args.cases_ants}")
    if cases:
        _same_settings(args, folder / "settings.json")
    limit = args.time_limit if args.time_limit is not None else _QUICK_SECONDS if args.quick else None
    try:
        run_cases(cases, methods, log, Caps(_caps(caps)), limit, not args.no_similarity, args.redo)
    finally:
        # an interrupted run leaves its tables too
        results = read_results(log)
        if results:
            lines = tables.summarize(results)
            tables.write_csv(folder / "results.csv", [{k: v for k, v in r.items() if k != "matrix"} for r in results])
            tables.write_csv(folder / "summary.csv", lines)
            tables.write_markdown(folder / "summary.md", lines, tables.machine(args.threads), notes)
            results = tables.best_starts(results)
            plots.plot_figure4(results, folder / "figure4.png")
            plots.plot_capture(results, folder / "capture.png")
            print(folder / "summary.md")


def _same_settings(args: argparse.Namespace, path: Path) -> None:
    """Refuse to mix results of different images, slices or thread counts in one table."""
    import json

    from monai_zsreg.errors import RegistrationError
    from monai_zsreg.io.files import write_json

    names = ("data", "residuals", "pairs", "exclude", "planes", "slices", "min_side", "threads", "device")
    settings = {name: getattr(args, name) for name in names}
    settings["data"] = [str(Path(source).resolve()) for source in args.data]
    settings["residuals"] = None if args.residuals is None else str(args.residuals.resolve())
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(name for name in settings if before.get(name) != settings[name])
        if other:
            was = {name: before.get(name) for name in other}
            raise RegistrationError(
                "output", str(path.parent), f"a folder begun with the same {', '.join(other)} (was {was})"
            )
    else:
        write_json(path, settings)


def _caps(texts: Sequence[str]) -> dict[tuple[str, int], int]:
    from monai_zsreg.errors import RegistrationError

    caps = {}
    for text in texts:
        try:
            key, number = text.split("=")
            method, dims = key.rsplit(":", 1)
            caps[method, int(dims)] = int(number)
        except ValueError as error:
            raise RegistrationError("cap", text, "METHOD:DIMS=N, such as ants:3=20") from error
    return caps


def _calibrate(args: argparse.Namespace) -> None:
    from monai_zsreg.benchmark import calibrate, tables
    from monai_zsreg.benchmark.run import read_results
    from monai_zsreg.errors import RegistrationError
    from monai_zsreg.io.files import output_folder

    folder = output_folder(args.output)
    args.data = args.data[1:]
    pairs, notes = _pairs(args)
    for note in notes:
        print(note, file=sys.stderr)
    log = folder / "calibration.jsonl"
    count = 40 if args.cases is None else args.cases
    cases = calibrate.calibration_cases(pairs, args.dims, count, args.seed, args.symmetric)
    if not cases:
        raise RegistrationError("data", args.data, "images that suit at least one row")
    _same_settings(args, folder / "settings.json")
    try:
        calibrate.collect(cases, log, args.device, args.time_limit)
    finally:
        records = read_results(log)
        if records:
            print(calibrate.write_report(records, folder, tables.machine(args.threads)))


def _cost(args: argparse.Namespace, methods: list[Method], options: Options) -> None:
    from monai_zsreg.benchmark import cost, plots, tables
    from monai_zsreg.io.files import output_folder

    folder = output_folder(args.output)
    given = {2: args.sizes_2d, 3: args.sizes_3d}
    sizes = {d: cost.SIZES[d] if given[d] is None else given[d] for d in args.dims}
    try:
        cost.run_cost(methods, options, sizes, folder / "cost.jsonl")
    finally:
        rows = cost.read_cost(folder / "cost.jsonl")
        if rows:
            tables.write_csv(folder / "cost.csv", rows)
            tables.write_cost_markdown(folder / "cost.md", rows, tables.machine(args.threads))
            plots.plot_cost(rows, folder / "cost.png")
            print(folder / "cost.md")


if __name__ == "__main__":
    sys.exit(main())
