# SPDX-License-Identifier: Apache-2.0
"""What the bundle's ``evaluate.json`` adds to `monai_zsreg.inference`: figures over many pairs, before and after.

`evaluation_list` is ``dataset#data``; `ReadReference`, after `ReadPair`, reads what is known about a pair (masks,
labels, landmarks, the true transform); `MeasurePair`, between `MovePair` and `DescribePair`, measures; `MeasureHandler`
is the evaluator's metric; `EvaluationWriter` writes the table and its summary.

MONAI's ``MetricsSaver`` writes one file a metric and has no column for text or for what is missing, so the table is
written here.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric, compute_dice
from monai.transforms import Transform
from torch import Tensor

from monai_zsreg.cohort import load_entries, number_names
from monai_zsreg.errors import RegistrationError
from monai_zsreg.inference import pair_list, wrong_input_exits
from monai_zsreg.io import atomic_path, output_folder, pair_landmarks, read_landmarks, write_json
from monai_zsreg.metrics import foreground_mask, foreground_tre, landmark_tre, similarity, success_rate
from monai_zsreg.registration.images import read_image
from monai_zsreg.registration.result import RegistrationResult
from monai_zsreg.resample import by_header, read_matrix

__all__ = [
    "MEASURES",
    "EvaluationWriter",
    "MeasureHandler",
    "MeasurePair",
    "ReadReference",
    "additional_metrics",
    "check_evaluation",
    "evaluation_list",
    "label_dice",
]

#: columns of the table, each before and after; the last two only where landmarks or a true transform are given
MEASURES = ("dice", "ssim", "mi", "nmi", "mse", "rmse", "tre", "landmark_tre")
_WHEN = ("before", "after")
_TABLE, _SUMMARY = "evaluation.csv", "evaluation.json"
_LIST_KEY = "testing"

_TOGETHER = tuple((f"fixed_{what}", f"moving_{what}") for what in ("mask", "labels", "landmarks"))
_KEYS = ("fixed", "moving", *(key for keys in _TOGETHER for key in keys), "truth", "name")


def evaluation_list(
    datalist: str | os.PathLike | Sequence[Mapping[str, Any]] | None = None, dataset_dir: str | os.PathLike = ""
) -> list[dict[str, Any]]:
    """``dataset#data`` for an evaluation.

    MONAI's ``load_decathlon_datalist`` takes its layout too, but leaves a path that does not exist as it is, and makes
    a path of a name that happens to be one.

    Args:
        datalist: CSV file; JSON file with a list of pairs, or with such a list under ``"testing"``; or the list itself;
            None for the demonstration pair. A pair has ``fixed`` and ``moving``, and may have ``fixed_mask`` and
            ``moving_mask``, ``fixed_labels`` and ``moving_labels``, ``fixed_landmarks`` and ``moving_landmarks``,
            ``truth`` (transform file), all files; and a ``name``.
        dataset_dir: folder that relative paths of the pairs start from; the working directory if empty.

    Returns:
        A list as of `pair_list` with the further files. Pairs without a name get that of the moving file, with a
        number where others have it too.

    Raises:
        RegistrationError: no such file, an entry that cannot be used, or two pairs of one name.
    """
    if datalist is None:
        return pair_list()
    entries = load_entries(datalist, _LIST_KEY)
    pairs = [_entry(entry, f"datalist[{index}]", dataset_dir) for index, entry in enumerate(entries)]
    return number_names(pairs, (_TABLE, _SUMMARY))


def _entry(entry: Any, place: str, dataset_dir: str | os.PathLike) -> tuple[dict[str, Any], bool]:
    """One pair, and whether it was named."""
    if not isinstance(entry, Mapping):
        raise RegistrationError(place, entry, '{"fixed": ..., "moving": ...}')
    given = {key: value for key, value in entry.items() if value is not None}
    unknown = set(given) - set(_KEYS)
    if unknown:  # a misspelled name would go unnoticed otherwise
        raise RegistrationError(place, sorted(unknown), f"none but {', '.join(_KEYS)}")
    for one, two in (("fixed", "moving"), *_TOGETHER):
        if (one in given) != (two in given) or one == "fixed" and one not in given:
            missing = two if one in given else one
            raise RegistrationError(f"{place}.{missing}", None, f"a file: {one} and {two} go together")
    pair: dict[str, Any] = {}
    for key in _KEYS[:-1]:
        if key in given:
            if not isinstance(given[key], (str, os.PathLike)):
                raise RegistrationError(f"{place}.{key}", given[key], "a path")
            pair[key] = os.path.join(os.fspath(dataset_dir), os.fspath(given[key]))
            if not os.path.exists(pair[key]):
                raise RegistrationError(f"{place}.{key}", pair[key], "an existing file")
    (named,) = pair_list(pair["fixed"], pair["moving"], name=given.get("name"))
    if "moving_labels" in pair:  # the name under which the chain of `inference` carries them along
        pair["labels"] = pair.pop("moving_labels")
    return pair | {"name": named["name"]}, "name" in given


def check_evaluation(datalist: Any = None, dataset_dir: Any = "", success_mm: Any = 2.0) -> None:
    """First step of ``run``, beside `monai_zsreg.inference.check_inputs`.

    Raises:
        SystemExit: something cannot be used; status ``WRONG_INPUT``, with the reason on stderr.
    """
    with wrong_input_exits():
        evaluation_list(datalist, dataset_dir)
        if isinstance(success_mm, bool) or not isinstance(success_mm, Real) or not 0 < float(success_mm) < math.inf:
            raise RegistrationError("success_mm", success_mm, "a number above 0")


class ReadReference(Transform):
    """Preprocessing, after `ReadPair`: what is known about a pair.

    It gives, where the entry names them: ``fixed_mask``, ``fixed_labels``: ``MetaTensor [1, *fixed spatial]`` on the
    fixed grid; ``moving_mask``: ``MetaTensor``, on its own grid in the moving image's world; ``fixed_landmarks``,
    ``moving_landmarks``: ``[N, D]``; ``truth``: ``(D+1, D+1)``. ``files`` names them too.
    """

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """
        Raises:
            RegistrationError: a file that cannot be used.
        """
        pair = dict(data)
        fixed = pair["fixed"]
        dims = fixed.ndim - 1
        keys = [key for key in (*_KEYS, "labels") if key != "name" and isinstance(pair.get(key), (str, os.PathLike))]
        pair["files"] = pair["files"] | {key: str(pair[key]) for key in keys}
        for key in ("fixed_mask", "moving_mask", "fixed_labels"):
            if pair.get(key) is not None:
                path = pair[key]
                image = read_image(path, key)
                if image.ndim != fixed.ndim or image.shape[0] != 1:
                    raise RegistrationError(key, tuple(image.shape), f"one channel and {dims} dimensions, as fixed has")
                if key.startswith("fixed"):
                    image = by_header(image, fixed, mode="nearest")
                if not bool((image != 0).any()):
                    raise RegistrationError(key, str(path), "an image that is not 0 everywhere on the image it is of")
                pair[key] = image
        if pair.get("truth") is not None:
            with _named("truth"):
                pair["truth"] = read_matrix(pair["truth"], dims, "truth").numpy()
        if pair.get("fixed_landmarks") is not None:
            points = []
            for key in ("fixed_landmarks", "moving_landmarks"):
                with _named(key):
                    points.append(read_landmarks(pair[key]))
                if len(points[-1].points) == 0 or points[-1].points.shape[1] != dims:
                    raise RegistrationError(key, points[-1].points.shape, f"one or more points with {dims} coordinates")
            with _named("moving_landmarks"):
                pair["fixed_landmarks"], pair["moving_landmarks"] = pair_landmarks(*points)
        return pair


@contextmanager
def _named(argument: str) -> Iterator[None]:
    """Errors of readers that call every file "path" get the name of what was read."""
    try:
        yield
    except RegistrationError as error:
        raise RegistrationError(argument, error.value, error.allowed) from error


class MeasurePair(Transform):
    """Postprocessing, between `MovePair` and `DescribePair`: how alike and how far apart, before and after.

    Adds ``metrics``, for the report: ``before`` and ``after``, each with the `MEASURES` that can be had; ``region``,
    ``"masks"`` or ``"foreground"`` (by Otsu): where SSIM, mutual information and the squared errors are taken, the
    union over both images; ``dice_of``, what Dice compares: ``"labels"`` (mean over the labels of the fixed image),
    else ``"masks"``, else ``"foreground"``. ``tre`` is the mean error against ``truth`` over the foreground (or the
    mask) of the fixed image, ``landmark_tre`` that of the landmarks, mm. Masks and labels are carried along by nearest
    neighbor. A pair that could not be registered is measured with the identity, which is what its user gets.
    """

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        pair = dict(data)
        result: RegistrationResult = pair["pred"]
        fixed = pair["fixed"]
        fixed_mask, moving_mask = pair.get("fixed_mask"), pair.get("moving_mask")
        if pair.get("mask") is None:
            inside = fixed_mask[0] != 0 if fixed_mask is not None else foreground_mask(fixed[:1])[0]
            pair["mask"] = inside.as_tensor() if isinstance(inside, MetaTensor) else inside
            if not bool(pair["mask"].any()):
                pair["mask"] = torch.ones_like(pair["mask"])
        labels = pair.get("fixed_labels")
        moved_labels, masks = {}, {}
        if labels is not None:
            moved_labels = {"before": by_header(pair["labels"], fixed, mode="nearest"), "after": pair["moved_labels"]}
        if moving_mask is not None:
            masks = {
                "before": by_header(moving_mask, fixed, mode="nearest"),
                "after": result.apply(moving_mask, mode="nearest"),
            }
        images = {"before": pair["unregistered"], "after": pair["moved"]}
        matrices = {"before": np.eye(len(result.affine)), "after": result.affine}
        metrics: dict[str, Any] = {
            "region": "foreground" if moving_mask is None else "masks",
            "dice_of": "labels" if labels is not None else "foreground" if moving_mask is None else "masks",
        }
        for when in _WHEN:
            values = similarity(fixed[:1], images[when][:1], fixed_mask=fixed_mask, moving_mask=masks.get(when))
            if labels is not None:
                values["dice"] = label_dice(labels, moved_labels[when])
            if pair.get("truth") is not None:
                mask = torch.as_tensor(pair["mask"])[None]
                values["tre"] = foreground_tre(matrices[when], pair["truth"], fixed, mask)["mean"]
            if pair.get("fixed_landmarks") is not None:
                points = pair["fixed_landmarks"], pair["moving_landmarks"]
                values["landmark_tre"] = float(landmark_tre(matrices[when], *points).mean())
            metrics[when] = values
        return pair | {"metrics": metrics}


def label_dice(fixed: Tensor, moved: Tensor) -> float:
    """Mean Dice over the labels that the fixed label image has, 0 left out.

    Args:
        fixed: ``[1, *spatial]``, whole numbers.
        moved: likewise, on the same grid.

    Raises:
        RegistrationError: no labels, or shapes that differ.
    """
    one, two = (image.as_tensor() if isinstance(image, MetaTensor) else image for image in (fixed, moved))
    if one.shape != two.shape:
        raise RegistrationError("moved", tuple(two.shape), f"{tuple(one.shape)}, as fixed")
    labels = one.unique()
    labels = labels[labels != 0]
    if len(labels) == 0:
        raise RegistrationError("fixed", "only zeros", "at least one label")
    # label by label: one-hot images of an anatomical atlas would fill the memory
    scores = [compute_dice((two == label)[None], (one == label)[None], ignore_empty=False) for label in labels]
    return float(torch.stack([score.squeeze() for score in scores]).mean())


class _Measure(CumulativeIterationMetric):
    """Numbers as they come, one a pair; NaN where a pair has none."""

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        return y_pred

    def aggregate(self) -> Tensor:
        """Mean over the pairs that have the number; NaN if none has."""
        data = self.get_buffer()
        return data.nanmean() if isinstance(data, Tensor) else torch.tensor(math.nan)


class MeasureHandler(IgniteMetricHandler):
    """The mean over all pairs of one number that `MeasurePair` found, as an ignite metric.

    Args:
        measure: one of `MEASURES`.
        when: ``"before"`` or ``"after"``.
        save_details: keep each pair's value in ``engine.state.metric_details``.

    Raises:
        RegistrationError: an unknown measure or moment.
    """

    def __init__(self, measure: str, when: str = "after", save_details: bool = True) -> None:
        for name, value, allowed in (("measure", measure, MEASURES), ("when", when, _WHEN)):
            if value not in allowed:
                raise RegistrationError(name, value, f"one of {allowed}")
        self.measure = measure
        self.when = when
        super().__init__(metric_fn=_Measure(), output_transform=self._value, save_details=save_details)

    def _value(self, output: Mapping[str, Any]) -> tuple[Tensor, None]:
        return torch.tensor([[output["metrics"][self.when].get(self.measure, math.nan)]]), None


def additional_metrics(key: str = "dice_after") -> dict[str, MeasureHandler]:
    """``additional_metrics`` of the evaluator: all `MEASURES` before and after, by names such as ``"ssim_before"``.

    Args:
        key: name of the key metric, which is left out.
    """
    names = {f"{measure}_{when}": (measure, when) for measure in MEASURES for when in _WHEN}
    return {name: MeasureHandler(*what) for name, what in names.items() if name != key}


class EvaluationWriter:
    """Handler: writes ``evaluation.csv``, a row a pair, and at the end ``evaluation.json``, the summary.

    The table is written anew after every pair, so that a run that is stopped leaves what it has; the summary of an
    earlier run is taken away at the start. It needs `MeasurePair` and `DescribePair`.

    Args:
        output_dir: made if it is missing.
        success_mm: a pair counts as accurate below this mean error after registration, of the landmarks if it has any,
            else against the true transform.
        settings: of the run, to be stated in the summary.
    """

    def __init__(self, output_dir: str | os.PathLike = "output", success_mm: float = 2.0, **settings: Any) -> None:
        self.output_dir = output_dir
        self.success_mm = success_mm
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self.versions: dict[str, str] = {}

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self.rows = []
        for name in (_TABLE, _SUMMARY):
            (Path(self.output_dir) / name).unlink(missing_ok=True)

    def __call__(self, engine: Engine) -> None:
        """
        Raises:
            RegistrationError: a folder that cannot be written to.
        """
        state: Any = engine.state
        metrics, report = state.output["metrics"], state.output["report"]
        self.versions = report["versions"]
        row = {key: report[key] for key in ("name", "success", "seconds")}
        row |= {"warnings": "; ".join(report["warnings"]), "dice_of": metrics["dice_of"]}
        for measure in MEASURES:
            row |= {f"{measure}_{when}": metrics[when].get(measure) for when in _WHEN}
        self.rows.append(row | {key: report["input"][key] for key in ("fixed", "moving")})
        with atomic_path(output_folder(self.output_dir) / _TABLE) as partial, partial.open("w", newline="") as file:
            table = csv.DictWriter(file, list(self.rows[0]))
            table.writeheader()
            table.writerows(self.rows)

    def _finish(self, engine: Engine) -> None:
        summary = self.summary()
        path = Path(self.output_dir) / _SUMMARY
        write_json(path, summary)
        print(_told(summary, path.parent), flush=True)

    def summary(self) -> dict[str, Any]:
        """Success rates with Wilson's 95 % limits, and mean, median and standard deviation of every column."""
        errors = []
        for row in self.rows:
            error = row["tre_after"] if row["landmark_tre_after"] is None else row["landmark_tre_after"]
            if error is not None:
                errors.append(error if row["success"] else math.inf)
        columns = {
            measure: {when: stats for when in _WHEN if (stats := _statistics(self.rows, f"{measure}_{when}"))}
            for measure in MEASURES
        }
        return {
            "pairs": len(self.rows),
            "registered": _rate([0.0 if row["success"] else math.inf for row in self.rows], 1.0),
            "accurate": _rate(errors, self.success_mm) | {"below_mm": self.success_mm} if errors else None,
            "dice_of": {
                kind: count
                for kind in ("labels", "masks", "foreground")
                if (count := sum(row["dice_of"] == kind for row in self.rows))
            },
            "columns": {name: stats for name, stats in columns.items() if stats},
            "seconds": _statistics(self.rows, "seconds"),
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "versions": self.versions,
        }


def _rate(errors: Sequence[float], threshold: float) -> dict[str, float]:
    return success_rate(errors, threshold)._asdict()


def _statistics(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, Any]:
    """Of the pairs that have a value; empty if none has. The standard deviation is that of a sample."""
    values = np.array([row[column] for row in rows if row[column] is not None], dtype=np.float64)
    if len(values) == 0:
        return {}
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"n": len(values), "mean": float(values.mean()), "median": float(np.median(values)), "std": std}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _told(summary: Mapping[str, Any], folder: Path) -> str:
    lines = [f"pairs: {summary['pairs']}", f"  {'':<14}{'before':>22}{'after':>22}   (mean, median)"]
    for name, stats in summary["columns"].items():
        cells = "".join(f"{stats[when]['mean']:>12.4f}{stats[when]['median']:>10.4f}" for when in _WHEN)
        lines.append(f"  {name:<14}{cells}")
    for name, text in (("registered", "registered"), ("accurate", f"error below {_limit(summary)} mm")):
        rate = summary[name]
        if rate is not None:
            limits = f"{100 * rate['low']:.0f} to {100 * rate['high']:.0f} %"
            lines.append(f"  {text}: {rate['successes']} of {rate['n']} (95 % interval {limits})")
    return "\n".join([*lines, f"  {_TABLE} and {_SUMMARY} in {folder}"])


def _limit(summary: Mapping[str, Any]) -> str:
    return "" if summary["accurate"] is None else f"{summary['accurate']['below_mm']:g}"
