# SPDX-License-Identifier: Apache-2.0
"""Many pairs in one run: lists and BIDS folders, one bad file never the end of it, nothing done twice.

Under ``torchrun`` the first process looks for what is left to do and every process takes its share of that.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

import monai_zsreg
from monai_zsreg.app.evaluate import save_evaluation
from monai_zsreg.app.run import (
    DEMONSTRATION,
    REPORT,
    Settings,
    describe_pair,
    folder_of,
    read_pair,
    register_pair,
    summary,
    write_pair,
)
from monai_zsreg.errors import RegistrationError
from monai_zsreg.io import atomic_path, output_folder, write_json

__all__ = [
    "INDEX",
    "SUMMARY",
    "WriteBehind",
    "bids_pairs",
    "fingerprint",
    "Progress",
    "failure",
    "finish",
    "finish_pair",
    "join",
    "leave",
    "one_pair",
    "place",
    "read_datalist",
    "read_isolated",
    "read_report",
    "remaining",
    "run_cohort",
    "save_summary",
    "summary_rows",
    "text",
    "total",
]

#: files beside the folders of the pairs
SUMMARY, INDEX = "summary.csv", "index.html"
_RESERVED = (SUMMARY, INDEX, "evaluation.csv", "evaluation.json")
_TOGETHER = (
    ("fixed", "moving"),
    ("fixed_mask", "moving_mask"),
    ("fixed_landmarks", "moving_landmarks"),
)
_KEYS = (*(key for keys in _TOGETHER for key in keys), "labels", "fixed_labels", "moving_labels", "truth", "name")
_VERDICTS = ("FAIL", "WARN", "PASS")
# what BIDS calls images of the head that can be registered to its T1w
_CONTRASTS = ("T1w", "T2w", "FLAIR", "PDw", "PDT2", "T2starw", "inplaneT1", "inplaneT2", "angio")


# --------------------------------------------------------------------------------------------------------------------
# which pairs
# --------------------------------------------------------------------------------------------------------------------


def text(value: Any, argument: str) -> str:
    """A path or name as text. Command lines turn what looks like a number into one."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RegistrationError(argument, value, "text; if it was, quote it once more within the quotes: '\"1.5\"'")


def one_pair(
    fixed: Any = None, moving: Any = None, name: Any = None, dataset_dir: Any = "", **further: Any
) -> dict[str, Any]:
    """The entry of one pair, or of the demonstration pair where neither image is named.

    Args:
        fixed: file, or folder of a DICOM series.
        moving: likewise.
        name: of the folder for the results; None for the moving file's name without its suffix.
        dataset_dir: folder that relative paths start from; the working directory if empty.
        further: ``labels`` of the moving image, to be carried along; what is known for measuring: ``fixed_mask`` and
            ``moving_mask``, ``fixed_labels``, ``fixed_landmarks`` and ``moving_landmarks``, ``truth``.

    Raises:
        RegistrationError: one of two files that go together, or a value that is no path or name.
    """
    given = {"fixed": fixed, "moving": moving} | further
    given = {key: value for key, value in given.items() if value is not None}
    if "moving_labels" in given:
        if "labels" in given:
            raise RegistrationError("labels", given["labels"], "nothing beside moving_labels, which are the same")
        given["labels"] = given.pop("moving_labels")
    if not given:
        return {"name": _folder_name(DEMONSTRATION if name is None else name)}
    if "fixed_labels" in given and "labels" not in given:
        raise RegistrationError("moving_labels", None, "a file: fixed_labels and moving_labels go together")
    for one, two in _TOGETHER:
        if (one in given) != (two in given) or one == "fixed" and one not in given:
            missing = two if one in given else one
            raise RegistrationError(missing, None, f"a file: {one} and {two} go together")
    start = text(dataset_dir, "dataset_dir")
    entry = {key: os.path.join(start, text(path, key)) for key, path in given.items()}
    return entry | {"name": _folder_name(_stem(entry["moving"]) if name is None else name)}


def read_datalist(datalist: Any, dataset_dir: Any = "", must_exist: bool = False) -> list[dict[str, Any]]:
    """All pairs of a list.

    Args:
        datalist: CSV file with a header line; JSON file with a list of pairs, or with such a list under
            ``"testing"``; the list itself; or a BIDS folder. A pair has ``fixed`` and ``moving`` and may have what
            `one_pair` knows. Cells may be empty.
        dataset_dir: folder that relative paths start from; the working directory if empty.
        must_exist: whether a file that is not there is an error already, not the bad result of one pair.

    Returns:
        Entries with a name of their own each: that of the moving file, with a number where others have it too.

    Raises:
        RegistrationError: no such list, an entry that cannot be used, or two pairs of one name.
    """
    if isinstance(datalist, (str, os.PathLike)) and Path(datalist).is_dir():
        return bids_pairs(datalist)
    pairs = []
    for number, row in enumerate(_rows(datalist)):
        place = f"datalist[{number}]"
        if not isinstance(row, Mapping):
            raise RegistrationError(place, row, '{"fixed": ..., "moving": ...}')
        given = {key: value for key, value in row.items() if value is not None and str(value).strip() != ""}
        unknown = sorted(str(key) for key in given if key not in _KEYS)
        if unknown:  # a misspelled name would go unnoticed otherwise
            raise RegistrationError(place, unknown, f"none but {', '.join(_KEYS)}")
        if not {"fixed", "moving"} & set(given):
            raise RegistrationError(f"{place}.fixed", None, "a file: a pair needs both images")
        try:
            entry = one_pair(**given, dataset_dir=dataset_dir)
            missing = [key for key in entry if must_exist and key != "name" and not os.path.exists(entry[key])]
            if missing:
                raise RegistrationError(missing[0], entry[missing[0]], "an existing file")
        except RegistrationError as error:
            raise RegistrationError(f"{place}.{error.argument}", error.value, error.allowed) from error
        pairs.append((entry, "name" in given))
    return _numbered(pairs)


def _rows(datalist: Any) -> Sequence[Any]:
    rows: Any = datalist
    if isinstance(datalist, (str, os.PathLike)):
        path = Path(datalist)
        try:
            content = path.read_text(encoding="utf-8-sig")
            rows = json.loads(content) if path.suffix.lower() != ".csv" else list(csv.DictReader(content.splitlines()))
        except (OSError, ValueError, csv.Error) as error:
            raise RegistrationError("datalist", str(path), f"a CSV or JSON file ({error})") from error
    if isinstance(rows, Mapping):
        if "testing" not in rows:
            raise RegistrationError("datalist", sorted(rows), 'a list of pairs, or one under "testing"')
        rows = rows["testing"]
    if isinstance(rows, str) or not isinstance(rows, Sequence) or len(rows) == 0:
        raise RegistrationError("datalist", rows, "a list with at least one pair")
    return rows


def bids_pairs(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """For each session of a BIDS folder its first T1w image without contrast agent as fixed, the others as moving.

    Args:
        folder: with ``sub-*/[ses-*/]anat/*_<suffix>.nii[.gz]``. Derived files (``desc-``, masks) are left out.

    Raises:
        RegistrationError: no session has a T1w image and another one.
    """
    root = Path(folder)
    pairs = []
    for anat in sorted([*root.glob("sub-*/anat"), *root.glob("sub-*/ses-*/anat")]):
        images = []
        for path in sorted(anat.iterdir()):
            found = re.fullmatch(r"(sub-.+)_([A-Za-z0-9]+)\.nii(\.gz)?", path.name)
            if found and found[2] in _CONTRASTS and "_desc-" not in path.name:
                images.append((path, found[1], found[2]))
        plain = [image for image in images if image[2] == "T1w" and "_ce-" not in image[1]]
        for path, stem, suffix in images if plain else []:
            if path != plain[0][0]:
                entry = {"fixed": str(plain[0][0]), "moving": str(path), "name": f"{stem}_{suffix}"}
                pairs.append((entry, False))
    if not pairs:
        allowed = "a BIDS folder: sub-*/[ses-*/]anat with a _T1w image and another contrast beside it"
        raise RegistrationError("datalist", str(folder), allowed)
    return _numbered(pairs)


def _numbered(pairs: Sequence[tuple[dict[str, Any], bool]]) -> list[dict[str, Any]]:
    """Entries with a name of their own each; those that the user did not name make way for those that he did."""
    taken = set(_RESERVED)
    for entry, named in pairs:
        if named and entry["name"] in taken:
            raise RegistrationError("name", entry["name"], "a name that no other pair and no file of the results has")
        if named:
            taken.add(entry["name"])
    numbers: dict[str, int] = {}
    for entry, named in pairs:
        stem = entry["name"]
        while not named and entry["name"] in taken:
            numbers[stem] = numbers.get(stem, 1) + 1
            entry["name"] = f"{stem}_{numbers[stem]}"
        taken.add(entry["name"])
    return [entry for entry, _ in pairs]


def _folder_name(value: Any) -> str:
    name = text(value, "name")
    if name in ("", ".", "..") or any(separator in name for separator in "/\\\0"):
        raise RegistrationError("name", name, "the name of a folder, without path separators")
    return name


def _stem(path: str) -> str:
    name = Path(path).resolve().name
    return name[:-7] if name.lower().endswith(".nii.gz") and len(name) > 7 else Path(name).stem


# --------------------------------------------------------------------------------------------------------------------
# what is left to do, and by whom
# --------------------------------------------------------------------------------------------------------------------


def fingerprint(entry: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What a result depends on: a pair whose report holds the same need not be registered again."""
    files = {key: path for key, path in entry.items() if key != "name"}
    named = {key: value for key, value in settings.arguments.items() if key != "device"}
    files |= {
        key: value for key, value in named.items() if isinstance(value, (str, os.PathLike)) and os.path.exists(value)
    }
    plain = {
        key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in sorted(named.items())
    }
    states = {}
    for key, path in sorted(files.items()):
        with suppress(OSError):
            state = os.stat(path)
            states[key] = [str(path), state.st_size, state.st_mtime_ns]
    work = {name: getattr(settings, name) for name in ("uncertainty", "exact", "fill_value")}
    return plain | work | {"version": monai_zsreg.__version__, "files": states}


def _finished(entry: Mapping[str, Any], settings: Settings) -> bool:
    """Whether the pair has a result of these files and settings. What could not be used is tried again."""
    report = read_report(settings.output_dir, entry["name"])
    if report is None or "failure" in report or settings.page and "page" not in report.get("output", {}):
        return False
    return bool(report.get("made_from") == fingerprint(entry, settings))


def read_report(output_dir: Any, name: str) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        report = json.loads((folder_of(output_dir, name) / REPORT).read_text(encoding="utf-8"))
        return report if isinstance(report, dict) else None
    return None


def place() -> tuple[int, int]:
    """Number of this process and how many there are; torchrun tells by the environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join() -> None:
    """Join the other processes, where torchrun has started several."""
    if place()[1] > 1 and not dist.is_initialized():
        # the others may be at work for long
        dist.init_process_group("gloo", timeout=timedelta(days=7))


def leave() -> None:
    """Shut down what `join` has started, before the interpreter does."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(number: int) -> int:
    """The sum of every process' number, once all have come to it."""
    if not dist.is_initialized():
        return number
    numbers: list[Any] = [None] * place()[1]
    dist.all_gather_object(numbers, number)
    return sum(numbers)


def remaining(entries: Sequence[dict[str, Any]], settings: Settings, resume: bool = True) -> list[dict[str, Any]]:
    """This process' share of the pairs that have no result yet.

    One process looks and tells the others: each would see another state while the first is at work already.
    """
    rank, world = place()
    found: list[Any] = [None]
    if rank == 0:
        found = [[entry for entry in entries if not (resume and _finished(entry, settings))]]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return list(found[0][rank::world])


# --------------------------------------------------------------------------------------------------------------------
# one bad pair is a result
# --------------------------------------------------------------------------------------------------------------------


def read_isolated(
    entry: Mapping[str, Any], settings: Settings, last: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`read_pair`; what cannot be read comes back with its ``error``."""
    try:
        return read_pair(entry, settings, last) | {"made_from": fingerprint(entry, settings)}
    except Exception as error:
        files = {key: str(path) for key, path in entry.items() if key != "name"}
        return {"name": entry.get("name"), "files": files, "error": error}


def failure(pair: Mapping[str, Any], error: BaseException, settings: Settings) -> dict[str, Any]:
    """Write the report of a pair that could not be read, registered or written, and give it back."""
    told = str(error) if isinstance(error, RegistrationError) else f"{type(error).__name__}: {error}"
    reason = (told.splitlines() or [""])[0]
    report = {
        "name": pair["name"],
        "verdict": "FAIL",
        "reasons": [reason],
        "failure": reason,
        "score": None,
        "measures": {},
        "input": pair["files"],
    }
    # a folder that cannot be written to has had its say
    with suppress(RegistrationError, OSError):
        write_json(output_folder(folder_of(settings.output_dir, pair["name"])) / REPORT, report)
    return report


class WriteBehind:
    """Writes the results of a pair in a thread while the next pair is registered.

    Args:
        done: called with each report, in the order of the pairs.
    """

    def __init__(self, done: Callable[[dict[str, Any]], None]) -> None:
        self.done = done
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self.pending: Future[dict[str, Any]] | None = None

    def put(self, write: Callable[[], dict[str, Any]]) -> None:
        """Hand over what makes a report; waits until the last one is written, so that no results pile up."""
        self.wait()
        self.pending = self.pool.submit(write)

    def wait(self) -> None:
        """Until all is written."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.done(pending.result())

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self.pool.shutdown()


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
        isolate: whether what goes wrong with a pair is its result, or is raised.
    """
    behind = WriteBehind(done)
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        coming = pool.submit(read_isolated, entries[0], settings) if entries else None
        for number in range(len(entries)):
            assert coming is not None
            pair = coming.result()
            if number + 1 < len(entries):
                coming = pool.submit(read_isolated, entries[number + 1], settings, pair)
            found: Any = pair.get("error")
            try:
                found = found or register_pair(pair, settings)
            except Exception as error:
                found = error
            behind.put(partial(finish_pair, pair, found, settings, isolate))
    behind.close()


def finish_pair(pair: Mapping[str, Any], found: Any, settings: Settings, isolate: bool) -> dict[str, Any]:
    """Describe and write a pair.

    Args:
        pair: of `read_isolated`.
        found: the result of the registration, or the error that stands in its place.
        settings: of the run.
        isolate: whether an error is a result, or is raised.

    Returns:
        The report.
    """
    try:
        if isinstance(found, Exception):
            raise found
        return write_pair(pair, found, describe_pair(pair, found, settings), settings)
    except Exception as error:
        if not isolate:
            raise
        return failure(pair, error, settings)


class Progress:
    """Tells of pairs as they are done: a bar on a terminal, else a line each; of a single one more.

    Args:
        total: number of pairs; 0 for a single one.
        quiet: whether to say nothing.

    Attributes:
        reports: of the pairs so far.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc="registering", unit="pair", disable=None if total and not quiet else True)
        self.many = total > 0
        self.quiet = quiet
        self.reports: list[dict[str, Any]] = []

    def __call__(self, report: dict[str, Any]) -> None:
        """Tell of one more."""
        self.reports.append(report)
        self.bar.update()
        if len(self.reports) == self.bar.total:
            self.bar.close()
        if self.quiet:
            return
        if "failure" in report:
            self.bar.write(f"{report['name']}: FAILED: {report['failure']}", file=sys.stderr)
        elif not self.many:
            print(summary(report), flush=True)
        elif self.bar.disable:
            reasons = "; ".join([report["verdict"], *report["reasons"]])
            print(f"{report['name']}: {reasons} ({report['seconds']:.1f} s)", flush=True)


# --------------------------------------------------------------------------------------------------------------------
# what is left at the end
# --------------------------------------------------------------------------------------------------------------------


def summary_rows(entries: Sequence[Mapping[str, Any]], output_dir: Any) -> list[dict[str, Any]]:
    """A row for each pair, worst first: verdict, then score."""
    rows = []
    for entry in entries:
        report = read_report(output_dir, entry["name"]) or {"verdict": "", "reasons": ["no result"], "score": None}
        metrics = report.get("metrics", {})
        row: dict[str, Any] = {"name": entry["name"], "verdict": report["verdict"]}
        row |= {"reasons": "; ".join(report["reasons"]), "score": report["score"]}
        row["expected_error"] = report.get("expected_error", {}).get("root_mean_square")
        for key in ("nmi", "dice"):
            row |= {f"{key}_{when}": metrics.get(when, {}).get(key) for when in ("before", "after")}
        rows.append(row | {"seconds": report.get("seconds")} | {key: entry.get(key, "") for key in ("fixed", "moving")})
    order = {verdict: number for number, verdict in enumerate(("", *_VERDICTS))}
    return sorted(
        rows, key=lambda row: (order[row["verdict"]], row["score"] is not None, row["score"] or 0.0, row["name"])
    )


def save_summary(rows: Sequence[Mapping[str, Any]], output_dir: Any, new: int) -> str:
    """Write ``summary.csv`` and ``index.html``; what comes back says so.

    Args:
        rows: of `summary_rows`.
        output_dir: made if it is missing.
        new: how many of them this run has registered.
    """
    from monai_zsreg.app.report import save_index

    folder = output_folder(output_dir)
    with atomic_path(folder / SUMMARY) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    linked = []
    for row in rows:
        paths = {key: f"{row['name']}/{file}" for key, file in (("link", "report.html"), ("thumbnail", "overview.png"))}
        linked.append({**row, **{key: path for key, path in paths.items() if (folder / path).exists()}})
    save_index(linked, folder / INDEX)
    counts = ", ".join(f"{sum(row['verdict'] == verdict for row in rows)} {verdict}" for verdict in reversed(_VERDICTS))
    done = f"{len(rows) - new} kept, {new} registered"
    return f"{len(rows)} pairs ({done}): {counts}; {folder / SUMMARY}, {folder / INDEX}"


def finish(
    entries: Sequence[Mapping[str, Any]],
    settings: Settings,
    verdicts: Mapping[str, str],
    success_mm: float = 2.0,
    many: bool = True,
    quiet: bool = False,
) -> list[str]:
    """Write the tables of a run, once all processes have come to its end, and say so.

    Args:
        entries: all pairs, those of earlier runs too.
        settings: of the run; with ``exact`` it is an evaluation.
        verdicts: of the pairs of this run, by name.
        success_mm: see `save_evaluation`.
        many: whether there are others than a single pair.
        quiet: whether to say nothing.

    Returns:
        Names of the pairs with the verdict FAIL.
    """
    new = total(len(verdicts))
    failed = [name for name, verdict in verdicts.items() if verdict == "FAIL"]
    if place()[0] > 0:
        return failed
    told = []
    if settings.exact:
        reports = [report for entry in entries if (report := read_report(settings.output_dir, entry["name"]))]
        told.append(save_evaluation(reports, settings, success_mm))
    if many:
        rows = summary_rows(entries, settings.output_dir)
        failed = [row["name"] for row in rows if row["verdict"] == "FAIL"]
        told.append(save_summary(rows, settings.output_dir, new))
    if told and not quiet:
        print(*told, sep="\n", flush=True)
    if failed:
        more = f" and {len(failed) - 10} more" if len(failed) > 10 else ""
        print(f"registration failed: {', '.join(failed[:10])}{more}", file=sys.stderr)
    return failed
