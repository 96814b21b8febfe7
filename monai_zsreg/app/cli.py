# SPDX-License-Identifier: Apache-2.0
"""The command ``zsreg``.

Nothing is imported until it is needed: ``--help`` and a wrong argument must not wait for torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from monai_zsreg import __version__
from monai_zsreg.app.settings import FAILED, PRESETS, REPORT, TRANSFORMS, WRONG_INPUT, Settings
from monai_zsreg.errors import RegistrationError, RegistrationWarning

_NIIVUE = "node_modules/@niivue/niivue/dist/niivue.umd.js"

# files that are options, of which the first three go to `monai_zsreg.register` as its further arguments
_FURTHER, _WEIGHTS = ("initial", "fixed_mask", "moving_mask"), ("vgg19_weights", "regressor_weights")

_EXAMPLES = {
    "register": """examples:
  zsreg register t1.nii.gz flair.nii.gz -o out
  zsreg register t1.nii.gz t2.nii.gz flair.nii.gz -o out          several moving images, one fixed
  zsreg register ct.nii.gz mr.nii.gz --labels mr_seg.nii.gz --transform rigid
  zsreg register t1.nii.gz t2.nii.gz --set search=local --set spacing=2
  zsreg register one.nii.gz other.nii.gz --transform deformable --set stiffness=2
  zsreg register --demo

The first image stays; the others are moved onto its grid. Results of each go to OUTPUT/NAME/: moved.nii.gz,
transform.tfm (ITK, ANTs, 3D Slicer), expected_error.nii.gz, report.html, overview.png, report.json. Of --transform
deformable, transform.tfm is the affine part alone and displacement.nii.gz the whole map; stiffness is in mm.
Exit status: 0 registered, 2 wrong input, 3 verdict FAIL, 1 anything else.""",
    "apply": """examples:
  zsreg apply flair_to_t1.mat --fixed t1.nii.gz --moving flair.nii.gz -o moved.nii.gz
  zsreg apply a.lta b.tfm --fixed t1.nii.gz --moving seg.nii.gz --labels -o moved_seg.nii.gz
  zsreg apply displacement.nii.gz --fixed one.nii.gz --moving other_seg.nii.gz --labels -o seg.nii.gz
  zsreg apply t.tfm --points t1_points.csv --save-points flair_points.csv
  zsreg apply t.tfm --fixed t1.nii.gz --moving flair.nii.gz --save-transform flair_to_t1.mat --save-format fsl

A transform maps points of the fixed image to points of the moving image, and so brings voxels of the moving image to
the fixed grid. Several are composed in the order given: the first acts first on the fixed image's points.
--invert inverts the composition: the files belong to the pair the other way about. An LTA whose geometry tells source
from destination needs no --invert.""",
    "report": """examples:
  zsreg report out/flair            the page of one pair anew, from its report.json
  zsreg report out                  the pages of all pairs in there, and their index""",
    "cohort": """examples:
  zsreg cohort pairs.csv -o out     columns fixed, moving, labels, name (masks, landmarks, truth); cells may be empty
  zsreg cohort bids/ -o out         T1w fixed, the other contrasts beside it moving
  zsreg cohort pairs.json -o out --evaluate
  zsreg cohort pairs.csv -o out --workers 4
  zsreg cohort pairs.csv -o out --scheduler tcp://node1:8786

A pair that cannot be read or registered is a row with its reason. The same command again does what is missing or was
made with other settings.

With --workers or --scheduler (extra "cluster") pairs are registered by the workers of a Dask cluster: on this machine,
or of one that runs already, such as dask-jobqueue starts under SLURM, whose workers have this package and see the same
files. A pair whose worker was killed goes to another one.""",
}


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            if word.startswith("--"):
                from difflib import get_close_matches

                near = get_close_matches(word.partition("=")[0], self._option_string_actions, 1)
                self.error(f"unrecognized argument {word}" + (f"; did you mean {near[0]}?" if near else ""))
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: words after the name of the command; those of the process if None.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["benchmark"]:
        try:
            from monai_zsreg.benchmark.__main__ import main as benchmark
        except ImportError as error:
            print(f"error: {error}", file=sys.stderr)
            return WRONG_INPUT
        return int(benchmark(words[1:]) or 0)
    args = _parser().parse_args(words)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has seen enough
        return 1
    except Exception as error:
        wrong = isinstance(error, RegistrationError)
        missing = isinstance(error, ImportError) and not str(error.name).startswith("monai_zsreg")
        full = isinstance(error, (OSError, MemoryError)) or type(error).__name__ == "OutOfMemoryError"
        if not (wrong or missing or full):  # neither the user nor the machine: a mistake of ours
            raise
        print(f"zsreg {args.command}: error: {error}", file=sys.stderr)
        return WRONG_INPUT if wrong else 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="zsreg", description="Registration of images of any modality, without training.")
    version = f"zsreg {__version__}"
    parser.add_argument("--version", action="version", version=version, help="show the version and end")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, text: str, run: Any) -> Any:
        epilog = _EXAMPLES.get(name)
        form = argparse.RawDescriptionHelpFormatter
        made = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=form, allow_abbrev=False
        )
        made.set_defaults(run=run, parser=made)
        return made

    register = command("register", "Register one or several images to a fixed one.", _register)
    register.add_argument("images", nargs="*", metavar="IMAGE", help="the fixed image, then the moving ones")
    register.add_argument("--demo", action="store_true", help="register the demonstration pair (needs nilearn)")
    register.add_argument("--labels", metavar="FILE", help="label image of the moving image, carried along")
    register.add_argument("--name", help="folder of the results (default: the moving file's name)")
    _add_options(register)

    cohort = command("cohort", "Register many pairs.", _cohort)
    cohort.add_argument("datalist", help="CSV or JSON file of pairs, or BIDS folder")
    cohort.add_argument("--dataset-dir", default="", metavar="DIR", help="folder that relative paths start from")
    cohort.add_argument("--workers", type=int, default=0, metavar="N", help="processes, on GPUs one each (this one)")
    cohort.add_argument("--scheduler", metavar="ADDRESS", help="Dask scheduler whose workers register the pairs")
    cohort.add_argument("--no-resume", action="store_true", help="register again what has a result already")
    cohort.add_argument(
        "--evaluate", dest="exact", action="store_true", help="measure on all voxels; write evaluation.csv and .json"
    )
    cohort.add_argument("--success-mm", type=float, default=2.0, metavar="MM", help="error that counts as accurate (2)")
    _add_options(cohort)

    apply = command("apply", "Apply, compose, invert and convert transforms that exist already.", _apply)
    add = apply.add_argument
    add("transform", nargs="+", metavar="TRANSFORM", help="transform file; several are composed")
    add("--invert", action="store_true", help="invert the (composed) transform")
    add("--format", metavar="NAME", help="of the transform files (default: by name and content)")
    add("--via", action="append", default=[], metavar="IMAGE", help="image between two transforms, for FSL's format")
    add("--fixed", metavar="IMAGE", help="image whose grid to move to")
    add("--moving", metavar="IMAGE", help="image or labels to move")
    add("-o", "--output", metavar="IMAGE", help="the moved image, .nii or .nii.gz")
    add("--labels", action="store_true", help="--moving holds labels: nearest neighbor, whole numbers")
    _add_fill_value(add)
    add("--points", metavar="FILE", help="landmarks of the fixed image: .csv (RAS mm), .fcsv or .mrk.json")
    add("--save-points", metavar="CSV", help="where these lie in the moving image (default: print them)")
    add("--save-transform", metavar="FILE", help="the composed, inverted or converted transform")
    add("--save-format", metavar="NAME", help="its format (default: by name)")

    report = command("report", "Draw the pages of results anew.", _report)
    report.add_argument("folders", nargs="+", metavar="FOLDER", help="of a pair, or one with folders of pairs")
    commands.add_parser("benchmark", help="Measure against other tools, see zsreg benchmark --help.", add_help=False)
    return parser


def _add_fill_value(add: Any) -> None:
    add("--fill-value", type=float, metavar="VALUE", help="outside of the moved image (default: its background)")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--output", dest="output_dir", default="output", metavar="DIR", help="folder for the results (output)")
    add("--preset", choices=PRESETS, default=PRESETS[0], help="method (robust)")
    add("--transform", choices=TRANSFORMS, default="affine", help="kind of transform (affine)")
    add("--device", metavar="DEVICE", help="where to compute, such as cuda (cpu)")
    add("--seed", type=int, default=0, help="of all random draws (0)")
    add("--initial", metavar="FILE", help="transform file to start from")
    add("--fixed-mask", metavar="FILE", help="where to look in the fixed image")
    add("--moving-mask", metavar="FILE", help="where to look in the moving image")
    add("--vgg19-weights", metavar="FILE", help="state dict of VGG-19, for what uses it")
    add("--regressor-weights", metavar="FILE", help="state dict of the perceptron, for preset paper")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="further argument of monai_zsreg.register")
    _add_fill_value(add)
    add("--uncertainty", action="store_true", help="the paper's uncertainty too, ten more estimates")
    interactive = "a page to look through both images (npm install @niivue/niivue)"
    add("--interactive", dest="niivue", action="store_const", const=_NIIVUE, help=interactive)
    add("--no-page", dest="page", action="store_false", help="no pictures, no page")
    add("--json", action="store_true", help="print the reports as JSON, and nothing else")
    add("-q", "--quiet", action="store_true", help="print nothing but errors")


# --------------------------------------------------------------------------------------------------------------------
# register, cohort
# --------------------------------------------------------------------------------------------------------------------


def _register(args: argparse.Namespace) -> int:
    if bool(args.images) == args.demo or len(args.images) == 1:
        raise RegistrationError("images", args.images, "a fixed and a moving image, or --demo")
    for path in args.images:
        _check_exists("images", path)
    _check_exists("labels", args.labels)
    fixed, *moving = args.images or (None,)
    if len(moving) > 1 and (args.labels or args.name):
        name = "labels" if args.labels else "name"
        raise RegistrationError(name, getattr(args, name), "none with several moving images")
    _begin(args)

    from monai_zsreg.app import cohort, datalist

    if args.demo:
        entries = [datalist.one_pair(name=args.name)]
    elif len(moving) == 1:
        entries = [datalist.one_pair(fixed, moving[0], args.name, labels=args.labels)]
    else:
        entries = datalist.read_datalist([{"fixed": fixed, "moving": path} for path in moving])
    settings = _settings(args)
    progress = cohort.Progress(len(entries) if len(entries) > 1 else 0, args.quiet or args.json)
    cohort.run_cohort(entries, settings, progress, isolate=False)
    _print_json(args, settings, progress.verdicts, many=len(entries) > 1)
    return FAILED if "FAIL" in progress.verdicts.values() else 0


def _cohort(args: argparse.Namespace) -> int:
    if not os.path.exists(args.datalist):
        raise RegistrationError("datalist", args.datalist, "an existing file or folder")
    if not args.success_mm > 0:
        raise RegistrationError("success-mm", args.success_mm, "a number above 0")
    if args.workers < 0 or args.workers and args.scheduler:
        allowed = "a number of processes, and none beside --scheduler, which has its own"
        raise RegistrationError("workers", args.workers, allowed)
    if args.workers and find_spec("distributed") is None:
        print('--workers needs "monai-zsreg[cluster]": all pairs are registered in this process', file=sys.stderr)
        args.workers = 0
    _begin(args)

    from monai_zsreg.app import cohort, datalist

    settings = _settings(args)
    entries = datalist.read_datalist(args.datalist, args.dataset_dir, must_exist=args.exact)
    left = cohort.remaining(entries, settings, not args.no_resume)
    progress = cohort.Progress(len(left), args.quiet or args.json)
    isolate = not args.exact
    if left and (args.workers or args.scheduler):
        cohort.run_on_cluster(left, settings, progress, isolate, args.workers, args.scheduler)
    else:
        cohort.run_cohort(left, settings, progress, isolate)
    failed = cohort.finish(entries, settings, progress.verdicts, args.success_mm, quiet=args.quiet or args.json)
    _print_json(args, settings, progress.verdicts, many=True)
    return FAILED if failed and not args.exact else 0


def _begin(args: argparse.Namespace) -> None:
    """What can be said before torch is loaded."""
    for name in (*_FURTHER, *_WEIGHTS):
        if getattr(args, name) is not None:
            _check_exists(name.replace("_", "-"), getattr(args, name))
            setattr(args, name, os.path.abspath(getattr(args, name)))  # workers elsewhere read it too
    if args.niivue and not os.path.exists(args.niivue):
        raise RegistrationError("interactive", args.niivue, "a folder with NiiVue in it: npm install @niivue/niivue")
    if sys.stderr.isatty() and not (args.quiet or args.json):  # loading torch takes a while
        print("registering ...", file=sys.stderr, flush=True)


def _settings(args: argparse.Namespace) -> Settings:
    import warnings

    warnings.simplefilter("ignore", RegistrationWarning)  # the verdict is told anyway
    options = _options(args.set)
    for name in options:
        flag = f"--{name.replace('_', '-')}"
        if flag in args.parser._option_string_actions:
            raise RegistrationError("set", name, f"{flag} for it")
    further = {name: getattr(args, name) for name in _FURTHER if getattr(args, name) is not None}
    settings = Settings.of(vars(args), options=options | further)
    settings.check()
    return settings


def _options(words: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` words as keyword arguments; values as JSON where they are, else as text."""
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise RegistrationError("set", word, "NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _check_exists(argument: str, path: str | None) -> None:
    if path is not None and not os.path.exists(path):
        raise RegistrationError(argument, path, "an existing file")


def _print_json(args: argparse.Namespace, settings: Settings, names: Iterable[str], many: bool) -> None:
    """The reports of this run's pairs, as they were written, in a list where there could be many."""
    from monai_zsreg.app.tables import read_report

    if args.json:
        found = [read_report(settings.folder(name)) for name in names]
        print(json.dumps(found if many else found[0], indent=2, ensure_ascii=False), flush=True)


# --------------------------------------------------------------------------------------------------------------------
# apply, report
# --------------------------------------------------------------------------------------------------------------------


def _apply(args: argparse.Namespace) -> int:
    if not (args.output or args.points or args.save_transform):
        raise RegistrationError("output", None, "something to do: --output, --points or --save-transform")
    needs = {"labels": "output", "fill_value": "output", "save_points": "points", "save_format": "save_transform"}
    for option, needed in needs.items():
        given = getattr(args, option)
        if given is not None and given is not False and not getattr(args, needed):
            needed, option = needed.replace("_", "-"), option.replace("_", "-")
            raise RegistrationError(needed, None, f"--{needed}, because --{option} is given")
    for name in ("fixed", "moving") if args.output else ():
        if not getattr(args, name):
            raise RegistrationError(name, None, f"an image, because --output is given: name it with --{name}")
    if args.output and not args.output.lower().endswith((".nii", ".nii.gz")):
        raise RegistrationError("output", args.output, "a name that ends in .nii or .nii.gz")
    sources = [path for path in (*args.transform, *args.via, args.fixed, args.moving, args.points) if path]
    for path in sources:
        _check_exists("transform" if path in args.transform else "path", path)
    read = {os.path.realpath(path) for path in sources}
    for option in ("output", "save_points", "save_transform"):
        path = getattr(args, option)
        if path and os.path.realpath(path) in read:
            raise RegistrationError(option.replace("_", "-"), path, "another file than those that are read")

    from monai_zsreg.app.apply import apply_files

    apply_files(args)
    return 0


def _report(args: argparse.Namespace) -> int:
    from monai_zsreg.app import tables
    from monai_zsreg.app.run import draw_anew

    for given in map(Path, args.folders):
        pairs = [given] if (given / REPORT).is_file() else sorted(path.parent for path in given.glob(f"*/{REPORT}"))
        if not pairs:
            raise RegistrationError("folder", str(given), f"a folder with {REPORT}, or with folders that have one")
        for folder in pairs:
            print(draw_anew(folder), flush=True)
        if pairs != [given]:
            rows = tables.worst_first([tables.read_report(folder) or {"name": folder.name} for folder in pairs])
            print(tables.save_summary(rows, given, 0), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
