# SPDX-License-Identifier: Apache-2.0
"""Many pairs in one run: one bad file is never the end of it, and nothing is done twice.

`run_cohort` registers pairs in this process, `run_on_cluster` on the workers of a Dask cluster.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

import monai_zsreg
from monai_zsreg.app import tables
from monai_zsreg.app.run import files_of, read_pair, register_pair, write_pair
from monai_zsreg.app.settings import REPORT, Settings
from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.io import output_folder, write_json

# pairs that a scheduler is told of at once: more than a cluster has workers, and little memory however long the list
_IN_FLIGHT = 1000


# --------------------------------------------------------------------------------------------------------------------
# what is left to do
# --------------------------------------------------------------------------------------------------------------------


def fingerprint(entry: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What a result depends on: a pair whose report holds the same need not be registered again."""
    named = {key: value for key, value in sorted(settings.arguments.items()) if key != "device"}
    plain = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in named.items()}
    files = {key: path for key, path in entry.items() if key != "name"}
    files |= {key: value for key, value in named.items() if isinstance(value, (str, os.PathLike))}
    states = {}
    for key, path in sorted(files.items()):
        with suppress(OSError, ValueError):
            state = os.stat(path)
            states[key] = [str(path), state.st_size, state.st_mtime_ns]
    work = {name: getattr(settings, name) for name in ("uncertainty", "exact", "fill_value")}
    return plain | work | {"version": monai_zsreg.__version__, "files": states}


def remaining(entries: Sequence[dict[str, Any]], settings: Settings, resume: bool = True) -> list[dict[str, Any]]:
    """The pairs that have no result of these files and settings yet; all of them without ``resume``."""
    return [entry for entry in entries if not (resume and _finished(entry, settings))]


def _finished(entry: Mapping[str, Any], settings: Settings) -> bool:
    report = tables.read_report(settings.folder(entry["name"]))
    # what could not be used is tried again
    if report is None or "failure" in report or settings.page and "page" not in report.get("output", {}):
        return False
    return bool(report.get("made_from") == fingerprint(entry, settings))


# --------------------------------------------------------------------------------------------------------------------
# one pair, whose failure is a result
# --------------------------------------------------------------------------------------------------------------------


# the fixed image that was read last in this process, and what it depends on
_last: tuple[Any, Any] = (None, None)


def read_isolated(entry: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """`read_pair`, with the fixed image of the pair before where it is the same; an ``error`` where that fails."""
    global _last
    try:
        made_from = fingerprint(entry, settings)
        depends = [made_from["files"].get(key) for key in ("fixed", "fixed_mask")], settings
        known = {"prepared": _last[1]} if depends[0][0] is not None and depends == _last[0] else {}
        pair = read_pair({**entry, **known}, settings) | {"made_from": made_from}
        _last = depends, pair["prepared"]
        return pair
    except Exception as error:
        return {"name": entry.get("name"), "files": files_of(entry), "error": error}


def register_isolated(pair: Mapping[str, Any], settings: Settings, **further: Any) -> Any:
    """The result of a pair of `read_isolated`, or the error that stands in its place."""
    try:
        return pair.get("error") or register_pair(pair, settings, **further)
    except Exception as error:
        return error


def finish_pair(pair: Mapping[str, Any], found: Any, settings: Settings, isolate: bool) -> dict[str, Any]:
    """Write a pair, of which ``found`` is the result of `register_isolated`, and give back its report.

    With ``isolate`` an error is a report too, which needs ``name`` and ``files`` of the pair alone; else it is raised.
    """
    try:
        if isinstance(found, Exception):
            raise found
        return write_pair(pair, found, settings)
    except Exception as error:
        if not isolate:
            raise
        told = str(error) if isinstance(error, RegistrationError) else f"{type(error).__name__}: {error}"
    reason = (told.splitlines() or [""])[0]
    report = {"name": pair["name"], "verdict": "FAIL", "reasons": [reason], "failure": reason}
    report |= {"score": None, "measures": {}, "input": pair["files"]}
    # a folder that cannot be written to has had its say
    with suppress(RegistrationError, OSError):
        write_json(output_folder(settings.folder(pair["name"])) / REPORT, report)
    return report


# --------------------------------------------------------------------------------------------------------------------
# in this process
# --------------------------------------------------------------------------------------------------------------------


def run_cohort(
    entries: Sequence[Mapping[str, Any]],
    settings: Settings,
    done: Callable[[dict[str, Any]], None],
    isolate: bool = True,
) -> None:
    """Register pairs one after the other; the next one is read and the last one written meanwhile.

    Args:
        entries: of `read_datalist`.
        settings: of the run.
        done: called with each report.
        isolate: see `finish_pair`.
    """
    pairs = ahead(lambda entry: read_isolated(entry, settings), entries)
    found = ((pair, register_isolated(pair, settings)) for pair in pairs)
    for report in ahead(lambda both: finish_pair(both[0], both[1], settings, isolate), found):
        done(report)


def ahead(step: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """``step`` of each item, made in a thread while what is done with the one before goes on."""
    coming: deque[Any] = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            coming.append(pool.submit(step, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        yield from (last.result() for last in coming)


# --------------------------------------------------------------------------------------------------------------------
# on a cluster
# --------------------------------------------------------------------------------------------------------------------


def run_on_cluster(
    entries: Sequence[Mapping[str, Any]],
    settings: Settings,
    done: Callable[[dict[str, Any]], None],
    isolate: bool = True,
    workers: int = 1,
    scheduler: str | None = None,
) -> None:
    """Register pairs on the workers of a Dask cluster, which must see the same files.

    A pair whose worker dies goes to another one. Where that one dies too, the pair is a failure. (A scheduler of the
    user's has its own number, ``distributed.scheduler.allowed-failures``.)

    Args:
        entries, settings, isolate: see `run_cohort`.
        done: called with each report, in the order in which they come.
        workers: processes of a cluster on this machine; with ``device="cuda"`` at most one a GPU.
        scheduler: address of a cluster that runs already, in place of one of our own.

    Raises:
        RegistrationError: no scheduler at this address, or workers without this version of the package.
        ConnectionError: the scheduler went away.
    """
    from distributed import KilledWorker, as_completed

    settings = replace(settings, output_dir=os.path.abspath(settings.output_dir))
    waiting, asked = iter(entries), {}
    with _client(workers, scheduler, settings.device) as client:

        def submit(entry: Mapping[str, Any]) -> Any:
            future = client.submit(_on_worker, entry, settings, isolate, scheduler is None, pure=False)
            asked[future.key] = entry
            return future

        running = as_completed([submit(entry) for entry in islice(waiting, _IN_FLIGHT)])
        for future in running:
            entry = asked.pop(future.key)
            for following in islice(waiting, 1):
                running.add(submit(following))
            try:
                report = future.result()
            except CancelledError as error:
                raise ConnectionError("the scheduler has gone; the same command again does the rest") from error
            except Exception as error:
                if not isolate:
                    raise
                killed = isinstance(error, KilledWorker)
                told = RuntimeError("every process that tried it was killed; out of memory?") if killed else error
                pair = {"name": entry["name"], "files": files_of(entry)}
                report = finish_pair(pair, told, settings, isolate)
            done(report)


@contextmanager
def _client(workers: int, scheduler: str | None, device: Any) -> Iterator[Any]:
    """A client of the cluster at an address, or of one of our own."""
    import dask
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        if scheduler is not None:
            try:
                client = stack.enter_context(Client(scheduler, timeout="10s"))
            except (OSError, ValueError) as error:
                allowed = f"the address of a running Dask scheduler ({error})"
                raise RegistrationError("scheduler", scheduler, allowed) from error
        else:
            if torch.device(device or "cpu").type == "cuda":
                workers = min(workers, torch.cuda.device_count())
            threads = os.environ.get("OMP_NUM_THREADS") or max(1, dask.system.CPU_COUNT // workers)
            rules = {
                # a worker has one pair, and no others that would die with it; without room it would pause for good
                "scheduler.worker-saturation": 1.0,
                "scheduler.allowed-failures": 1,
                "worker.memory.pause": False,
                # without Dask's MALLOC_TRIM_THRESHOLD_, with which half of a worker's time goes into asking for memory
                "nanny.pre-spawn-environ": {"OMP_NUM_THREADS": str(threads)},
            }
            stack.enter_context(dask.config.set({f"distributed.{name}": value for name, value in rules.items()}))
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL
            )
            client = stack.enter_context(Client(stack.enter_context(cluster)))
        try:
            versions = set(client.run(_version).values())
        except ImportError as error:
            versions = {str(error)}
        if versions - {monai_zsreg.__version__}:
            allowed = f"workers with monai_zsreg {monai_zsreg.__version__}"
            raise RegistrationError("scheduler", sorted(versions), allowed)
        yield client


def _version() -> str:
    return monai_zsreg.__version__


def _on_worker(entry: Mapping[str, Any], settings: Settings, isolate: bool, spread: bool) -> dict[str, Any]:
    """All steps for one pair; with ``spread`` the worker's number is that of its GPU."""
    from distributed import get_worker

    warnings.simplefilter("ignore", RegistrationWarning)  # the verdict is told anyway
    if spread and str(settings.device) == "cuda":
        settings = replace(settings, device=f"cuda:{get_worker().name}")
    pair = read_isolated(entry, settings)
    return finish_pair(pair, register_isolated(pair, settings), settings, isolate)


# --------------------------------------------------------------------------------------------------------------------
# what is told
# --------------------------------------------------------------------------------------------------------------------


class Progress:
    """Tells of pairs as they are done: a bar on a terminal, else a line each; of a single one more.

    Args:
        total: number of pairs; 0 for a single one.
        quiet: whether to say nothing.

    Attributes:
        verdicts: of the pairs so far, by name.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc="registering", unit="pair", disable=None if total and not quiet else True)
        self.many = total > 0
        self.quiet = quiet
        self.verdicts: dict[str, str] = {}

    def __call__(self, report: dict[str, Any]) -> None:
        """Tell of one more."""
        self.verdicts[report["name"]] = report["verdict"]
        self.bar.update()
        if len(self.verdicts) == self.bar.total:
            self.bar.close()
        if self.quiet:
            return
        if "failure" in report:
            self.bar.write(f"{report['name']}: FAILED: {report['failure']}", file=sys.stderr)
        elif not self.many:
            print(tables.in_words(report), flush=True)
        elif self.bar.disable:
            reasons = "; ".join([report["verdict"], *report["reasons"]])
            print(f"{report['name']}: {reasons} ({report['seconds']:.1f} s)", flush=True)


def finish(
    entries: Sequence[Mapping[str, Any]],
    settings: Settings,
    verdicts: Mapping[str, str],
    success_mm: float = 2.0,
    many: bool = True,
    quiet: bool = False,
) -> list[str]:
    """Write the tables of a run, say so unless ``quiet``, and give back the names of the pairs with the verdict FAIL.

    Args:
        entries: all pairs, those of earlier runs too.
        settings: of the run; with ``exact`` it is an evaluation.
        verdicts: of the pairs of this run, by name.
        success_mm: see `monai_zsreg.app.tables.save_evaluation`.
        many: whether there are others than a single pair.
        quiet: whether to say nothing of the tables.
    """
    reports = [tables.read_report(settings.folder(entry["name"])) for entry in entries]
    failed = [name for name, verdict in verdicts.items() if verdict == "FAIL"]
    told = []
    if settings.exact:
        told.append(tables.save_evaluation([report for report in reports if report], settings, success_mm))
    if many:
        without = ({"name": entry["name"], "input": entry} for entry in entries)
        found = tables.worst_first([report or nothing for report, nothing in zip(reports, without, strict=True)])
        failed = [row["name"] for row in found if row["verdict"] == "FAIL"]
        told.append(tables.save_summary(found, settings.output_dir, len(verdicts)))
    if told and not quiet:
        print(*told, sep="\n", flush=True)
    if failed:
        more = f" and {len(failed) - 10} more" if len(failed) > 10 else ""
        print(f"registration failed: {', '.join(failed[:10])}{more}", file=sys.stderr)
    return failed
