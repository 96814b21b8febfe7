# SPDX-License-Identifier: Apache-2.0
"""What the bundle's configurations are made of: the steps of `monai_zsreg.app.run` in MONAI's usual places.

`entries` is ``dataset#data``, `ReadPair` the preprocessing, `PairInferer` the inferer, `PairWriter` the handler. A
batch is one pair: fixed and moving image stay on their own grids, so nothing is collated. What the user asks for
arrives as one dictionary, ``request``.
"""

from __future__ import annotations

import ast
import inspect
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import repeat, takewhile
from pathlib import Path
from textwrap import fill, indent
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.bundle import run as run_bundle
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from monai.transforms import Transform
from torch.utils.data import DataLoader

from monai_zsreg.app import cohort, datalist
from monai_zsreg.app.settings import FAILED, WRONG_INPUT, Settings
from monai_zsreg.app.tables import mean_metrics
from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.registration.prepared import is_number

_PAIR = ("fixed", "moving", "labels", "name")


# --------------------------------------------------------------------------------------------------------------------
# what the user asks for
# --------------------------------------------------------------------------------------------------------------------


def check(request: Mapping[str, Any]) -> None:
    """First step of ``run``: look at what the user said before the configuration's parts are made from it.

    What cannot be used ends the process with status 2 and the reason on stderr.
    """
    with wrong_input_exits():
        _refuse_unknown(sys.argv)
        settings(request).check()
        limit = request["success_mm"]
        if not is_number(limit) or not 0 < float(limit) < math.inf:
            raise RegistrationError("success_mm", limit, "a number above 0")
        found = _all_entries(request)
        files = {key: request[key] for key in ("vgg19_weights", "regressor_weights")}
        if request["datalist"] is None:  # of many pairs each has its own result, good or bad
            files |= {key: path for key, path in found[0].items() if key != "name"}
        for argument, path in files.items():
            if path is not None and not os.path.exists(datalist.text(path, argument)):
                raise RegistrationError(argument, path, "an existing file")
    # the verdict is told anyway
    warnings.simplefilter("ignore", RegistrationWarning)


def settings(request: Mapping[str, Any]) -> Settings:
    """The settings of a run; a `RegistrationError` for an option of another type."""
    options, weights, fill = request["options"] or {}, request["regressor_weights"], request["fill_value"]
    if not isinstance(options, Mapping):
        raise RegistrationError("options", options, 'a dictionary such as "{spacing: 3}"')
    for name in options.keys() & request.keys():
        raise RegistrationError("options", name, f"--{name} for it")
    if fill is not None and not is_number(fill):
        raise RegistrationError("fill_value", fill, "a number, or null for the background of the image")
    flags = {
        name: flag(request[name], name) for name in ("resume", "page", "uncertainty", "exit_on_fail", "evaluation")
    }
    return Settings.of(
        {**request, **flags},
        exact=flags["evaluation"],
        options=options,
        output_dir=datalist.text(request["output_dir"], "output_dir"),
        regressor_weights=None if weights is None else datalist.text(weights, "regressor_weights"),
        fill_value=None if fill is None else float(fill),
    )


def flag(value: Any, argument: str) -> bool:
    """True or False. The command line leaves ``true`` as text, and any text would count as true."""
    word = str(value).lower()
    if word not in ("true", "false"):
        raise RegistrationError(argument, value, "true or false")
    return word == "true"


def entries(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``dataset#data``: one pair, or what is left to do of many."""
    found = _all_entries(request)
    if request["datalist"] is None:
        return found
    return cohort.remaining(found, settings(request), flag(request["resume"], "resume"))


def _all_entries(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    pair = {key: request[key] for key in _PAIR}
    if request["datalist"] is None:
        return [datalist.one_pair(**pair, dataset_dir=request["dataset_dir"])]
    for argument, value in pair.items():
        if value is not None:
            raise RegistrationError(argument, value, "nothing beside a datalist")
    strict = flag(request["evaluation"], "evaluation")
    return datalist.read_datalist(request["datalist"], request["dataset_dir"], must_exist=strict)


def _refuse_unknown(argv: Sequence[str]) -> None:
    """MONAI takes options that no configuration knows without a word; here a mistyped one is an error."""
    given = _given(argv)
    files = _config_files(given)
    if not files:
        return
    known = [*inspect.signature(run_bundle).parameters, *ConfigParser.load_config_files(files)]
    for name, value in given.items():
        top = name.replace("::", "#").partition("#")[0]
        if top not in known:
            near = get_close_matches(top, known, 1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise RegistrationError(f"--{name}", value, f"an option of the configuration{hint} (`run help` lists them)")


def _given(argv: Sequence[str]) -> dict[str, str]:
    """The options of ``python -m monai.bundle run``, by name; none where another program runs."""
    given: dict[str, str] = {}
    if not argv or not os.path.normpath(argv[0]).endswith(os.path.join("monai", "bundle", "__main__.py")):
        return given
    for number, word in enumerate(argv):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            given[name.replace("-", "_")] = value if equals else "".join(argv[number + 1 : number + 2])
    return given


def _config_files(given: Mapping[str, str]) -> list[str]:
    files = given.get("config_file", "")
    if files.startswith("["):
        return list(ast.literal_eval(files))
    return [files] if files else []


@contextmanager
def wrong_input_exits() -> Iterator[None]:
    """Ends the process with status `WRONG_INPUT` and the reason on stderr where a `RegistrationError` comes up."""
    try:
        yield
    except RegistrationError as error:
        print(f"wrong input: {error}", file=sys.stderr)
        raise SystemExit(WRONG_INPUT) from error


def print_options(bundle_root: str | os.PathLike) -> None:
    """``python -m monai.bundle run help``: the table of options in the bundle's documentation.

    The bundle is the folder of the command line's configuration, which is run from anywhere, else ``bundle_root``.
    """
    head = "| option | default | meaning |"
    folders = [Path(name).resolve().parent.parent for name in _config_files(_given(sys.argv))]
    pages = [folder / "docs" / "README.md" for folder in (*folders, Path(bundle_root))]
    texts = (page.read_text(encoding="utf-8").splitlines() for page in pages if page.is_file())
    lines = next((lines for lines in texts if head in lines), [])
    with wrong_input_exits():
        if not lines:
            raise RegistrationError("bundle_root", str(bundle_root), "the folder of the bundle, with docs/README.md")
    for line in takewhile(lambda line: line.startswith("| "), lines[lines.index(head) + 2 :]):
        option, default, meaning = (cell.strip().replace("`", "") for cell in line.strip("|").split(" | "))
        print(option, indent(fill(f"{meaning} (default: {default})", 96), "    "), sep="\n")


# --------------------------------------------------------------------------------------------------------------------
# the parts of the evaluator
# --------------------------------------------------------------------------------------------------------------------


class ReadPair(Transform):
    """Preprocessing: `monai_zsreg.app.cohort.read_isolated`; what cannot be read passes on with its ``error``."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        if "name" not in data:  # another program's single image, such as MONAI Label's own app gives
            allowed = "two images, fixed and moving; in MONAI Label use the app of monai_zsreg.label"
            error = RegistrationError("data", sorted(data), allowed)
            if "fastapi" in sys.modules:  # that app's server tells its client the reason of this exception alone
                raise sys.modules["fastapi"].HTTPException(400, str(error)) from error
            raise error
        return cohort.read_isolated(data, self.settings)


class ReadAhead(DataLoader):
    """A loader that reads the next pair in a thread while the last one is registered.

    Decompressing and reading leave Python's lock free, so a thread is enough, and a pair need not be copied between
    processes. (MONAI's ``ThreadDataLoader`` does the same, but an error in its thread ends the data without a word.)
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        source: Any = super().__iter__()
        end = object()

        def following(_: Any) -> Any:
            try:
                return next(source, end)
            except (OSError, EOFError, RuntimeError) as error:
                if not self.num_workers:
                    raise
                # a process that dies while it hands something over leaves errors that do not name it
                raise RuntimeError(f"the worker that reads pairs ahead failed: {error}") from error

        yield from takewhile(lambda item: item is not end, cohort.ahead(following, repeat(None)))


class PairInferer(Inferer):
    """`monai_zsreg.app.cohort.register_isolated`.

    The preset makes the network that it needs. Another in its place, such as one exported to TorchScript, serves preset
    ``"paper"``.

    Args:
        settings: of the run.
        isolate: whether what goes wrong with a pair is given back in place of its result, or is raised.
    """

    def __init__(self, settings: Settings, isolate: bool = False) -> None:
        self.settings = settings
        self.isolate = isolate

    def __call__(  # type: ignore[override]
        self, inputs: Mapping[str, Any], network: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        further = {} if network is None or isinstance(network, torch.nn.Identity) else {"network": network}
        found = cohort.register_isolated(inputs, self.settings, **further)
        if isinstance(found, Exception) and not self.isolate:
            raise found
        return found


class PairWriter:
    """Handler: describes and writes each pair's results in a thread, and tells of them.

    At the end ``state.verdicts`` has the verdicts by name, and ``state.metrics`` the means of what was measured, by
    names such as ``"dice_after"``.

    Args:
        settings: of the run.
        progress: whether there are many pairs, which get a line each or a bar, and may fail one by one.
    """

    def __init__(self, settings: Settings, progress: bool = False) -> None:
        self.settings = settings
        self.progress = progress

    def attach(self, engine: Engine) -> None:
        engine.logger.setLevel("CRITICAL")  # whoever runs it tells what went wrong
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._end)

    def _start(self, engine: Engine) -> None:
        state: Any = engine.state
        state.verdicts = {}
        self.reports: list[dict[str, Any]] = []
        self.tell = cohort.Progress(state.epoch_length if self.progress else 0)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self.pending: Future[dict[str, Any]] | None = None

    def _wait(self) -> None:
        """Until the last pair is written, so that no results pile up."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.reports.append(pending.result())
            self.tell(self.reports[-1])

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        pair, found = state.batch, state.output["pred"]
        if pair["name"] in state.verdicts:
            raise RegistrationError("name", pair["name"], "a name that no other pair has")
        state.verdicts[pair["name"]] = getattr(found, "verdict", "FAIL")
        isolate = self.progress and not self.settings.exact
        self._wait()
        self.pending = self.pool.submit(cohort.finish_pair, pair, found, self.settings, isolate)
        if self.progress:  # images are not kept while the next pair is read
            state.output, state.batch = {}, {"name": pair["name"]}

    def _end(self, engine: Engine) -> None:
        try:
            self._wait()
        finally:
            self.pool.shutdown()
        engine.state.metrics.update(mean_metrics(self.reports))


# --------------------------------------------------------------------------------------------------------------------
# the run
# --------------------------------------------------------------------------------------------------------------------


def local_device() -> torch.device:
    """The GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(evaluator: SupervisedEvaluator, request: Mapping[str, Any]) -> None:
    """Second step of ``run``: register all pairs, then write the tables of many.

    In a process of your own, call ``evaluator.run()`` instead: it raises what went wrong. This one ends the process:
    with status 2 where input is wrong, with status 3 where a verdict is FAIL, of this run or an earlier one, unless
    ``exit_on_fail`` is false or this is an evaluation.
    """
    state: Any = evaluator.state
    state.verdicts = {}
    with wrong_input_exits():
        if len(evaluator.data_loader) > 0:  # type: ignore[arg-type]  # else everything was done before
            evaluator.run()
        made = settings(request)
        many = request["datalist"] is not None
        failed = cohort.finish(_all_entries(request), made, state.verdicts, request["success_mm"], many)
    if failed and flag(request["exit_on_fail"], "exit_on_fail") and not made.exact:
        raise SystemExit(FAILED)
