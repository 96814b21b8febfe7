# SPDX-License-Identifier: Apache-2.0
"""Many pairs in one run of the bundle: a datalist or a BIDS folder, one bad file never the end of it.

`input_list` is ``dataset#data``; `ReadIsolated` and `PairEvaluator` turn what goes wrong with a pair into its result;
`CohortWriter` writes it; `finish` gathers the summary and the exit status. Under ``torchrun`` each process takes every
n-th pair.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.engines import Evaluator, SupervisedEvaluator
from monai.transforms import Transform
from monai.utils import optional_import
from torch.utils.data import DataLoader

from monai_zsreg.errors import RegistrationError
from monai_zsreg.html_report import save_index
from monai_zsreg.inference import FAILED, PairWriter, ReadPair, flag, folder_of, pair_list, wrong_input_exits
from monai_zsreg.io import atomic_path, output_folder, write_json
from monai_zsreg.registration.confidence import FAIL

__all__ = [
    "INDEX",
    "SUMMARY",
    "CohortWriter",
    "PairEvaluator",
    "ReadAhead",
    "ReadIsolated",
    "all_pairs",
    "bids_pairs",
    "check_datalist",
    "finish",
    "input_list",
    "load_entries",
    "local_device",
    "moved_and_fixed",
    "number_names",
    "start",
    "summary_rows",
]

#: name of the table in the output folder
SUMMARY = "summary.csv"
#: name of the page that links the reports
INDEX = "index.html"
_REPORT = "report.json"
_KEYS = ("fixed", "moving", "labels", "name")
_VERDICTS = ("FAIL", "WARN", "PASS")
# what BIDS calls images of the head that can be registered to its T1w
_CONTRASTS = ("T1w", "T2w", "FLAIR", "PDw", "PDT2", "T2starw", "inplaneT1", "inplaneT2", "angio")


# --------------------------------------------------------------------------------------------------------------------
# which pairs
# --------------------------------------------------------------------------------------------------------------------


def input_list(
    fixed: Any = None,
    moving: Any = None,
    labels: Any = None,
    name: Any = None,
    dataset_dir: Any = "",
    datalist: Any = None,
    output_dir: Any = "output",
    resume: Any = True,
) -> list[dict[str, Any]]:
    """``dataset#data``: one pair, or what is left to do of many.

    Args:
        fixed: see `pair_list`.
        moving: see `pair_list`.
        labels: see `pair_list`.
        name: see `pair_list`.
        dataset_dir: folder that relative paths start from; the working directory if empty.
        datalist: CSV or JSON file of pairs, or a BIDS folder; None for the one pair that the other arguments name.
        output_dir: where results are.
        resume: whether pairs of the datalist that have a result of the same files there are left out.

    Returns:
        This process' part.

    Raises:
        RegistrationError: a datalist that cannot be read, or together with a pair.
    """
    if datalist is None:
        return pair_list(fixed, moving, labels, name, dataset_dir)
    for argument, value in (("fixed", fixed), ("moving", moving), ("labels", labels), ("name", name)):
        if value is not None:
            raise RegistrationError(argument, value, "nothing beside a datalist")
    pairs = all_pairs(datalist, dataset_dir)
    rank, world = _place()
    mine = pairs[rank::world]
    if flag(resume, "resume"):
        mine = [pair for pair in mine if not _finished(pair, output_dir)]
    return mine


def check_datalist(datalist: Any = None, dataset_dir: Any = "", resume: Any = True, **pair: Any) -> None:
    """A step of ``run`` beside `monai_zsreg.inference.check_inputs`; ``pair`` are the arguments for a single pair.

    Raises:
        SystemExit: a datalist that cannot be used; status ``WRONG_INPUT``, with the reason on stderr.
    """
    with wrong_input_exits():
        flag(resume, "resume")
        if datalist is not None:
            input_list(**pair, dataset_dir=dataset_dir, datalist=datalist, resume=False)


def all_pairs(datalist: Any, dataset_dir: Any = "") -> list[dict[str, Any]]:
    """All pairs of a datalist or BIDS folder, see `input_list`. Files need not exist yet."""
    if isinstance(datalist, (str, os.PathLike)) and Path(datalist).is_dir():
        return bids_pairs(datalist)
    entries = load_entries(datalist)
    pairs = []
    for index, entry in enumerate(entries):
        place = f"datalist[{index}]"
        if not isinstance(entry, Mapping):
            raise RegistrationError(place, entry, '{"fixed": ..., "moving": ...}')
        given = {key: value for key, value in entry.items() if value not in (None, "")}
        unknown = set(given) - set(_KEYS)
        if unknown:  # a misspelled name would go unnoticed otherwise
            raise RegistrationError(place, sorted(map(str, unknown)), f"none but {', '.join(_KEYS)}")
        for key in ("fixed", "moving"):
            if key not in given:
                raise RegistrationError(f"{place}.{key}", None, "a file: a pair needs both images")
        (pair,) = pair_list(
            given["fixed"], given["moving"], given.get("labels"), given.get("name"), dataset_dir
        )  # fmt: skip
        pairs.append((pair, "name" in given))
    return number_names(pairs, (SUMMARY, INDEX))


def load_entries(datalist: Any, key: str = "testing") -> Sequence[Any]:
    """The entries of a datalist.

    Args:
        datalist: a CSV file with a header line, a JSON file, or the list itself.
        key: under which a JSON object has the list.

    Raises:
        RegistrationError: it cannot be read, or has no entry.
    """
    entries: Any = datalist
    if isinstance(datalist, (str, os.PathLike)):
        path = Path(datalist)
        try:
            text = path.read_text(encoding="utf-8-sig")
            entries = list(csv.DictReader(text.splitlines())) if path.suffix.lower() == ".csv" else json.loads(text)
        except (OSError, ValueError, csv.Error) as error:
            raise RegistrationError("datalist", str(path), f"a CSV or JSON file ({error})") from error
    if isinstance(entries, Mapping):
        if key not in entries:
            raise RegistrationError("datalist", sorted(entries), f'a list of pairs, or one under "{key}"')
        entries = entries[key]
    if isinstance(entries, str) or not isinstance(entries, Sequence) or len(entries) == 0:
        raise RegistrationError("datalist", entries, "a list with at least one pair")
    return entries


def number_names(pairs: Sequence[tuple[dict[str, Any], bool]], reserved: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs with a name of their own each: those without one get a number where others have theirs too.

    Args:
        pairs: entries with ``name``, and whether the user chose it.
        reserved: names that are taken by files.

    Raises:
        RegistrationError: the user chose a name twice, or one that is taken.
    """
    chosen = [entry["name"] for entry, named in pairs if named]
    taken = set(reserved)
    for name in chosen:
        if name in taken:
            raise RegistrationError("name", name, "a name that no other pair and no file of the results has")
        taken.add(name)
    next_number: dict[str, int] = {}
    for entry, named in pairs:
        if not named:
            stem = entry["name"]
            while entry["name"] in taken:
                next_number[stem] = next_number.get(stem, 1) + 1
                entry["name"] = f"{stem}_{next_number[stem]}"
            taken.add(entry["name"])
    return [entry for entry, _ in pairs]


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
        if not plain:
            continue
        for path, stem, suffix in images:
            if path != plain[0][0]:
                pairs.append(({"fixed": str(plain[0][0]), "moving": str(path), "name": f"{stem}_{suffix}"}, False))
    if not pairs:
        allowed = "a BIDS folder: sub-*/[ses-*/]anat with a _T1w image and another contrast beside it"
        raise RegistrationError("datalist", str(folder), allowed)
    return number_names(pairs, (SUMMARY, INDEX))


def _finished(pair: Mapping[str, Any], output_dir: Any) -> bool:
    """Whether the pair has a result: ``report.json`` is written last. Files that could not be used are tried again."""
    report = _read_report(output_dir, pair["name"])
    files = {key: str(pair[key]) for key in ("fixed", "moving", "labels") if key in pair}
    return report is not None and "failure" not in report and report.get("input") == files


def _read_report(output_dir: Any, name: str) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        report = json.loads((folder_of(output_dir, name) / _REPORT).read_text(encoding="utf-8"))
        return report if isinstance(report, dict) else None
    return None


# --------------------------------------------------------------------------------------------------------------------
# one bad pair is a result
# --------------------------------------------------------------------------------------------------------------------


class ReadIsolated(Transform):
    """`ReadPair`, but what cannot be read is passed on as ``failure``, the reason in words.

    Args:
        isolate: whether to; otherwise the error is raised.
        output_dir: see `ReadPair`.
        demonstration_dims: see `ReadPair`.
    """

    def __init__(self, isolate: bool, output_dir: Any = "output", demonstration_dims: int = 2) -> None:
        self.isolate = isolate
        self.read = ReadPair(output_dir, demonstration_dims)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self.read(data)
        except Exception as error:
            if not self.isolate:
                raise
            files = {key: str(data[key]) for key in ("fixed", "moving", "labels") if key in data}
            return {"name": data["name"], "files": files, "failure": _reason(error)}


class ReadAhead(DataLoader):
    """A loader that reads the next pair in a thread while the last one is registered and written.

    Decompressing and reading leave Python's lock free, so a thread is enough, and a pair need not be copied between
    processes. (MONAI's ``ThreadDataLoader`` does the same, but an error in its thread ends the data without a word.)
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        source: Any = super().__iter__()
        end = object()
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
            coming = pool.submit(next, source, end)
            while (item := coming.result()) is not end:
                coming = pool.submit(next, source, end)
                yield item


class PairEvaluator(SupervisedEvaluator):
    """MONAI's evaluator; what goes wrong with a pair becomes its output, ``{"failure": reason}``.

    Args:
        isolate: whether to; otherwise the error is raised.
        args: of ``SupervisedEvaluator``.
        kwargs: likewise.
    """

    def __init__(self, *args: Any, isolate: bool = False, **kwargs: Any) -> None:
        self.isolate = isolate
        super().__init__(*args, **kwargs)

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        if "failure" in batchdata:
            engine.state.output = {"failure": batchdata["failure"]}
            return engine.state.output
        if not self.isolate:
            return super()._iteration(engine, batchdata)
        try:
            return super()._iteration(engine, batchdata)
        except Exception as error:
            engine.state.output = {"failure": _reason(error)}
            return engine.state.output


def moved_and_fixed(output: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output transform of the key metric: first channels of the moved and the fixed image; blank ones for a failure."""
    if "failure" in output:
        nothing = torch.zeros(1, 16, 16)
        return [nothing], [nothing]
    return [output["moved"][:1]], [output["image"]["fixed"][:1]]


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RegistrationError):  # MONAI wraps what transforms raise
        cause = cause.__cause__
    told = cause or error
    return str(told) if isinstance(told, RegistrationError) else f"{type(told).__name__}: {told}"


class CohortWriter(PairWriter):
    """`PairWriter`; with ``isolate`` failures are reports too, and a progress bar (tqdm) takes the place of the text.

    Args:
        output_dir: see `PairWriter`.
        isolate: whether there is more than one pair to care for.
        page: see `PairWriter`.
    """

    def __init__(self, output_dir: Any = "output", isolate: bool = False, page: Any = True) -> None:
        super().__init__(output_dir, quiet=isolate, page=page)
        self.isolate = isolate

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        super().attach(engine)
        if self.isolate and _place()[0] == 0 and optional_import("tqdm")[1]:
            ProgressBar(desc="registering", persist=True).attach(engine)
        if self.isolate:
            # the last pair's images are not kept while the next one is read
            engine.add_event_handler(Events.ITERATION_COMPLETED, _forget)

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        if "failure" not in state.output:
            if not self.isolate:
                return super().__call__(engine)
            try:
                return super().__call__(engine)
            except Exception as error:
                state.output = {"failure": _reason(error)}
        reason, name = state.output["failure"], state.batch["name"]
        state.registered[name], state.verdicts[name] = False, FAIL
        print(f"{name}: FAILED: {reason}", file=sys.stderr, flush=True)
        report = {
            "name": name,
            "success": False,
            "failure": reason,
            "warnings": [reason],
            "quality": {"verdict": FAIL, "reasons": [reason], "score": None, "measures": {}},
            "input": state.batch["files"],
        }
        # a folder that cannot be written to has had its say above
        with suppress(RegistrationError, OSError):
            write_json(output_folder(folder_of(self.output_dir, name)) / _REPORT, report)
        return None


def _forget(engine: Engine) -> None:
    if isinstance(engine.state.output, dict):
        engine.state.output = {key: value for key, value in engine.state.output.items() if key == "failure"}


# --------------------------------------------------------------------------------------------------------------------
# several processes, and what is left at the end
# --------------------------------------------------------------------------------------------------------------------


def _place() -> tuple[int, int]:
    """Number of this process and how many there are; torchrun tells by the environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start() -> None:
    """Step of ``initialize``: join the other processes where torchrun has started several."""
    if _place()[1] > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def local_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def finish(
    evaluator: Evaluator,
    datalist: Any = None,
    dataset_dir: Any = "",
    output_dir: Any = "output",
    exit_on_fail: Any = True,
) -> None:
    """The ``finalize`` step: the summary of a datalist, and the exit status.

    Args:
        evaluator: after its run.
        datalist: see `input_list`.
        dataset_dir: see `input_list`.
        output_dir: see `input_list`.
        exit_on_fail: whether a verdict FAIL, of this run or an earlier one, ends the process with status ``FAILED``.

    Raises:
        SystemExit: a pair failed; its results say so.
    """
    state: Any = evaluator.state
    failed = [name for name, verdict in getattr(state, "verdicts", {}).items() if verdict == FAIL]
    if dist.is_initialized():
        dist.barrier()
    if datalist is not None:
        rows = summary_rows(all_pairs(datalist, dataset_dir), output_dir)
        failed = [row["name"] for row in rows if row["verdict"] == FAIL]
        if _place()[0] == 0:
            _write_summary(rows, output_folder(output_dir))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if failed:
        if _place()[0] == 0:
            more = f" and {len(failed) - 10} more" if len(failed) > 10 else ""
            print(f"registration failed: {', '.join(failed[:10])}{more}", file=sys.stderr)
        if flag(exit_on_fail, "exit_on_fail"):
            raise SystemExit(FAILED)


def summary_rows(pairs: Sequence[Mapping[str, Any]], output_dir: Any) -> list[dict[str, Any]]:
    """A row for each pair, worst first: verdict, then score."""
    rows = []
    for pair in pairs:
        report = _read_report(output_dir, pair["name"])
        row: dict[str, Any] = {"name": pair["name"], "verdict": "", "reasons": "no result", "score": None}
        if report is not None:
            quality, metrics = report["quality"], report.get("metrics", {})
            row |= {"verdict": quality["verdict"], "reasons": "; ".join(quality["reasons"]), "score": quality["score"]}
            row["expected_error_mm"] = report.get("expected_error_mm", {}).get("root_mean_square")
            for key in ("nmi", "dice"):
                for when in ("before", "after"):
                    row[f"{key}_{when}"] = metrics.get(when, {}).get(key)
            row["seconds"] = report.get("seconds")
        row |= {key: pair.get(key, "") for key in ("fixed", "moving")}
        rows.append(row)
    order = {verdict: number for number, verdict in enumerate(("", *_VERDICTS))}
    return sorted(
        rows, key=lambda row: (order[row["verdict"]], row["score"] is not None, row["score"] or 0.0, row["name"])
    )


def _write_summary(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(folder / SUMMARY) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    linked = []
    for row in rows:
        pictures = {
            key: f"{row['name']}/{file}" for key, file in (("link", "report.html"), ("thumbnail", "overview.png"))
        }
        linked.append({**row, **{key: path for key, path in pictures.items() if (folder / path).exists()}})
    save_index(linked, folder / INDEX)
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in reversed(_VERDICTS)}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{len(rows)} pairs: {told}; {folder / SUMMARY}, {folder / INDEX}", flush=True)
