# SPDX-License-Identifier: Apache-2.0
"""What the bundle's ``inference.json`` is made of: reading a pair, registering it, writing the results.

A pair flows through MONAI's usual parts: `pair_list` is ``dataset#data``, `ReadPair` the preprocessing, `PairInferer`
the inferer, `MovePair` and `DescribePair` the postprocessing, `PairWriter` the handler. Fixed and moving image stay on
their own grids, so a batch is one pair and nothing is collated.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.engines import Evaluator
from monai.inferers import Inferer
from monai.transforms import Transform

import monai_zsreg
from monai_zsreg.demo import demo_pair
from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import Grid
from monai_zsreg.html_report import save_html_report
from monai_zsreg.io.files import atomic_path, output_folder, remove_leftovers, write_json
from monai_zsreg.metrics import foreground_tre, similarity
from monai_zsreg.networks import IMAGENET, UNTRAINED_FOR_CHECKS_ONLY, ZeroShotAffineNet
from monai_zsreg.registration.estimators import KeypointEstimator
from monai_zsreg.registration.images import read_image
from monai_zsreg.registration.pair import (
    Method,
    build_method,
    check_options,
    check_pair_options,
    make_network,
    register_with,
    resolve_device,
)
from monai_zsreg.registration.presets import DEFAULT_PRESET, preset_options
from monai_zsreg.registration.result import RegistrationResult
from monai_zsreg.report import save_overview, save_uncertainty
from monai_zsreg.resample import by_header

__all__ = [
    "DEMONSTRATION",
    "FAILED",
    "WRONG_INPUT",
    "DescribePair",
    "DescribeUncertainty",
    "MovePair",
    "PairInferer",
    "PairWriter",
    "ReadPair",
    "check_inputs",
    "check_flags",
    "flag",
    "folder_of",
    "pair_list",
    "prepare_pair",
    "run_pairs",
    "trained_network",
    "wrong_input_exits",
    "write_image",
]

logger = logging.getLogger(__name__)

#: name of the pair that is registered where the user names none
DEMONSTRATION = "demonstration"

#: exit statuses of ``python -m monai.bundle run``; 0: registered, 1: anything else
WRONG_INPUT, FAILED = 2, 3

# arguments of `register_with`; all other options are the network's
_PAIR_OPTIONS = ("spacing", "fixed_channel", "moving_channel", "fixed_mask", "moving_mask", "initial")
_TRAINED = {"preset": "paper", "transform": "affine"}
_WRITTEN = {
    "moved": "moved.nii.gz",
    "moved_labels": "moved_labels.nii.gz",
    "transform": "transform.tfm",
    "overview": "overview.png",
    "page": "report.html",
    "expected_error": "uncertainty.nii.gz",
    "uncertainty_displacement": "uncertainty_displacement.nii.gz",
    "uncertainty_intensity": "uncertainty_intensity.nii.gz",
    "uncertainty": "uncertainty.png",
}
_IMAGES = ("moved", "moved_labels", "expected_error", "uncertainty_displacement", "uncertainty_intensity")
_REPORT = "report.json"


def trained_network(
    vgg19_weights: str | os.PathLike | None = None, spatial_dims: int = 2, seed: int = 0
) -> ZeroShotAffineNet:
    """The network that ``model.pt`` belongs to: preset ``"paper"`` with the shipped regressor, for affine transforms.

    It constructs without VGG-19's weights; then its first use fetches them or says how to get them.

    Args:
        vgg19_weights: see `monai_zsreg.register`.
        spatial_dims: 2 or 3.
        seed: of the draws of keypoints.

    Returns:
        A network of the caller's own, in evaluation mode: tools load other weights into it.

    Raises:
        RegistrationError: a weights file that cannot be used.
    """
    weights = IMAGENET if vgg19_weights is None else _text(vgg19_weights, "vgg19_weights")
    return deepcopy(_trained_network(weights, spatial_dims, seed))


@lru_cache(maxsize=2)
def _trained_network(vgg19_weights: str, spatial_dims: int, seed: int) -> ZeroShotAffineNet:
    options = preset_options(_TRAINED["preset"])
    network = make_network(spatial_dims, _TRAINED["transform"], vgg19_weights, None, seed, options)
    return network.eval().requires_grad_(False)


def pair_list(
    fixed: str | os.PathLike | None = None,
    moving: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    name: str | int | None = None,
    dataset_dir: str | os.PathLike = "",
) -> list[dict[str, Any]]:
    """``dataset#data`` for one pair, or for the demonstration pair where neither image is named.

    Args:
        fixed: file, or folder of a DICOM series.
        moving: likewise.
        labels: label image in the moving image's world, to be carried along.
        name: of the folder for the results; None for the moving file's name without its suffix.
        dataset_dir: folder that relative paths start from; the working directory if empty.

    Returns:
        A list of ``{"fixed", "moving", "name"}``, with ``"labels"`` if there are any. The demonstration has only its
        name: `ReadPair` makes it.

    Raises:
        RegistrationError: one image without the other, or a value that is no path or name.
    """
    if fixed is None and moving is None:
        if labels is not None:
            raise RegistrationError("labels", str(labels), "a pair of images that they belong to")
        return [{"name": _folder_name(DEMONSTRATION if name is None else name)}]
    paths: dict[str, Any] = {}
    for argument, path in (("fixed", fixed), ("moving", moving), ("labels", labels)):
        if path is not None:
            paths[argument] = os.path.join(_text(dataset_dir, "dataset_dir"), _text(path, argument))
        elif argument != "labels":
            raise RegistrationError(argument, None, "an image: name both fixed and moving, or neither")
    return [paths | {"name": _folder_name(_stem(paths["moving"]) if name is None else name)}]


class ReadPair(Transform):
    """Preprocessing: an entry of `pair_list` to images on their native grids.

    It gives ``fixed``, ``moving``, and if named ``labels``: ``MetaTensor [C, *spatial]``; ``files``: the paths they
    came from; for the demonstration pair ``truth``, ``(D+1, D+1)``, and ``mask``, bool ``[*spatial]``.

    Args:
        output_dir: where the demonstration pair is written to, in a folder of its name.
        demonstration_dims: 2 for a slice, or 3 for the volume.
    """

    def __init__(self, output_dir: str | os.PathLike = "output", demonstration_dims: int = 2) -> None:
        self.output_dir = output_dir
        self.demonstration_dims = demonstration_dims

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """
        Raises:
            RegistrationError: an image that cannot be used.
        """
        pair = dict(data)
        if "name" not in pair:  # another program's single image, such as MONAI Label's own app gives
            allowed = "two images, fixed and moving; in MONAI Label use the app of monai_zsreg.label"
            error = RegistrationError("data", sorted(pair), allowed)
            if "fastapi" in sys.modules:  # that app's server tells its client the reason of this exception alone
                raise sys.modules["fastapi"].HTTPException(400, str(error)) from error
            raise error
        if "fixed" not in pair and "moving" not in pair:
            pair.update(demo_pair(folder_of(self.output_dir, pair["name"]), self.demonstration_dims))
            print(
                f"Demonstration pair: {pair['fixed']} is the MNI152 T1 template; {pair['moving']} is SIMULATED from "
                "its tissue maps and moved by a known transform. It is no patient's image.",
                flush=True,
            )
        keys = [key for key in ("fixed", "moving", "labels") if pair.get(key) is not None]
        pair["files"] = {key: str(pair[key]) for key in keys}
        targets = {
            (folder_of(self.output_dir, pair["name"]) / file).resolve() for file in (*_WRITTEN.values(), _REPORT)
        }
        for key, value in pair.items():  # also what a later transform reads
            if key != "name" and isinstance(value, (str, os.PathLike)) and Path(value).resolve() in targets:
                allowed = "a file that the results do not overwrite: choose another name or output_dir"
                raise RegistrationError(key, str(value), allowed)
        for key in keys:
            pair[key] = read_image(pair[key], key)
        if "labels" in keys and pair["labels"].ndim != pair["moving"].ndim:
            dims = pair["moving"].ndim - 1
            raise RegistrationError("labels", f"{pair['labels'].ndim - 1}D image", f"a {dims}D image, as moving is")
        return pair


def prepare_pair(batchdata: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[dict[str, MetaTensor], None]:
    """``prepare_batch`` of the evaluator: the two images for the inferer, no target.

    They stay where they are: the registration moves what it needs to the network's device.
    """
    return {"fixed": batchdata["fixed"], "moving": batchdata["moving"]}, None


class PairInferer(Inferer):
    """Registers a pair of images of any shape, 2D or 3D.

    ``model.pt``'s network, which the evaluator hands over, is used for what it was trained for: preset ``"paper"``,
    affine transforms, images of its dimension. Other presets have networks with other parameters; these are made when
    the first pair needs them, and kept.

    Args:
        preset: see `monai_zsreg.register`.
        transform: see `monai_zsreg.register`.
        device: where to compute.
        vgg19_weights: see `monai_zsreg.register`.
        regressor_weights: see `monai_zsreg.register`.
        seed: see `monai_zsreg.register`.
        options: further arguments of `monai_zsreg.register`.
    """

    def __init__(
        self,
        preset: str = DEFAULT_PRESET,
        transform: str = "affine",
        device: str | torch.device | None = None,
        vgg19_weights: str | os.PathLike | None = None,
        regressor_weights: str | os.PathLike | None = None,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.preset = preset
        self.transform = transform
        self.device = device
        self.vgg19_weights = vgg19_weights
        self.regressor_weights = regressor_weights
        self.seed = seed
        options = dict(options or {})
        self.pair_options = {name: options.pop(name) for name in _PAIR_OPTIONS if name in options}
        self.network_options = options
        self._methods: dict[tuple[int, str], Method] = {}

    def __call__(  # type: ignore[override]
        self, inputs: Mapping[str, MetaTensor], network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RegistrationResult:
        """
        Args:
            inputs: ``fixed`` and ``moving``, ``[C, *spatial]`` each.
            network: the evaluator's.

        Raises:
            RegistrationError: an image, an option or weights that cannot be used.
        """
        device = resolve_device(self.device)
        return register_with(
            self.method_for(inputs["fixed"].ndim - 1, network, device),
            inputs["fixed"],
            inputs["moving"],
            preset=self.preset,
            transform=self.transform,
            device=device,
            seed=self.seed,
            **self.pair_options,
        )

    def method_for(self, spatial_dims: int, network: Any, device: torch.device) -> Method:
        """The preset's method for images of ``spatial_dims``, on ``network`` where that is the one it needs."""
        trained = {"preset": self.preset, "transform": self.transform} == _TRAINED and self.regressor_weights is None
        if trained and not self.network_options and getattr(network, "spatial_dims", None) == spatial_dims:
            if isinstance(network, ZeroShotAffineNet):
                network.features.load_weights()
            return partial(KeypointEstimator, network)
        check_pair_options(self.preset, self.pair_options)
        key = (spatial_dims, str(device))
        if key not in self._methods:
            options = preset_options(self.preset) | self.network_options
            weights = (self.vgg19_weights, self.regressor_weights)
            self._methods[key] = build_method(
                self.preset, spatial_dims, self.transform, *weights, self.seed, device, **options
            )
        return self._methods[key]


class MovePair(Transform):
    """Postprocessing: the moving image on the fixed grid.

    Adds ``moved``; ``unregistered``, the moving image on the fixed grid by the two headers alone; and where there are
    labels ``moved_labels`` (nearest neighbor): ``MetaTensor [C, *fixed spatial]`` each.
    """

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        pair = dict(data)
        result: RegistrationResult = pair["pred"]
        pair["moved"] = result.moved
        pair["unregistered"] = by_header(pair["moving"], pair["fixed"])
        if pair.get("labels") is not None:
            pair["moved_labels"] = result.apply(pair["labels"], mode="nearest")
        return pair


class DescribePair(Transform):
    """Postprocessing: adds ``report``, a dictionary for JSON; the bundle's README describes its fields.

    Where the preset knows its covariance, also ``expected_error``, ``MetaTensor [1, *fixed spatial]``: root mean square
    of the error in mm.

    Args:
        options: further settings of the run to state.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        pair = dict(data)
        result: RegistrationResult = pair["pred"]
        fixed = pair["fixed"]
        report = {
            "name": pair["name"],
            "success": result.success,
            "warnings": list(result.warnings),
            "quality": _without_infinity(result.quality.as_dict()),
            "preset": result.preset,
            "transform": result.transform,
            **{name: value if isinstance(value, (int, float)) else str(value) for name, value in self.options.items()},
            "input": pair["files"],
            "matrix": result.affine.tolist(),
            "matrix_maps": "points of the fixed image to points of the moving image, RAS, mm",
            "parameters": result.parameters.as_dict(),
            "keypoints": len(result.keypoints.get("fixed", ())),
            "metrics": pair.get("metrics")
            or {
                "region": "foreground",
                "before": similarity(fixed[:1], pair["unregistered"][:1]),
                "after": similarity(fixed[:1], pair["moved"][:1]),
            },
            "seconds": result.seconds,
            "versions": {
                "monai_zsreg": monai_zsreg.__version__,
                "monai": monai.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }
        if pair.get("truth") is not None:
            mask = torch.as_tensor(pair["mask"])[None]
            report["error_mm"] = {
                "against": "the known transform, over the foreground of the fixed image",
                "before": foreground_tre(np.eye(len(result.affine)), pair["truth"], fixed, mask),
                "after": foreground_tre(result.affine, pair["truth"], fixed, mask),
            }
        if result.success and result.covariance is not None:
            pair["expected_error"] = result.uncertainty_map()
            center = Grid.of(result.fixed).center.numpy()[None]
            report["expected_error_mm"] = {
                "at": "center of the fixed image",
                "root_mean_square": float(result.uncertainty_at(center)[0]),
                **{f"below_in_{100 * p:.0f}_percent": float(result.uncertainty_at(center, p)[0]) for p in (0.5, 0.95)},
            }
        pair["report"] = report
        return pair


class DescribeUncertainty(Transform):
    """Postprocessing: the paper's uncertainty (section 2.7), after `DescribePair`.

    Adds ``uncertainty_displacement`` and ``uncertainty_intensity``, ``MetaTensor [1, *fixed spatial]``, and the field
    ``uncertainty`` of the report. Without at least two repeats that succeeded there are no maps, and unknown numbers
    of the report are None. Where the registration failed the field is None.

    Args:
        enabled: whether to do anything; it costs ten estimates.
        channel: channel of the moving image for the intensity map, the one that was registered.
    """

    def __init__(self, enabled: Any = True, channel: int = 0) -> None:
        self.enabled = enabled
        self.channel = channel

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """
        Raises:
            RegistrationError: ``enabled`` is neither true nor false.
        """
        pair = dict(data)
        if not flag(self.enabled, "uncertainty"):
            return pair
        result: RegistrationResult = pair["pred"]
        start = time.perf_counter()
        uncertainty = result.uncertainty
        report = None
        if uncertainty is not None:
            displacement = uncertainty.displacement_map()
            report = _without_infinity(uncertainty.as_dict()) | {"seconds": time.perf_counter() - start}
            if bool(displacement.isfinite().all()):
                pair["uncertainty_displacement"] = displacement
                pair["uncertainty_intensity"] = uncertainty.intensity_map(self.channel)
        pair["report"] = pair["report"] | {"uncertainty": report}
        return pair


class PairWriter:
    """Handler: writes each pair's results to ``<output_dir>/<name>/`` and prints a summary.

    Every file gets its name when it is complete. ``report.json`` is taken away first and written last: where it is,
    the others belong to it. Success by name is kept in ``engine.state.registered``, the verdicts in
    ``engine.state.verdicts``.

    Args:
        output_dir: made if it is missing.
        quiet: whether to leave out the summary on the terminal.
        page: whether to write ``report.html``.
    """

    def __init__(self, output_dir: str | os.PathLike = "output", quiet: bool = False, page: Any = True) -> None:
        self.output_dir = output_dir
        self.quiet = quiet
        self.page = page

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator.
        """
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _start(self, engine: Engine) -> None:
        state: Any = engine.state
        state.registered = {}
        state.verdicts = {}

    def __call__(self, engine: Engine) -> None:
        """
        Raises:
            RegistrationError: a folder that cannot be written to, or a name that was used before.
        """
        state: Any = engine.state
        output = state.output
        result, report, name = output["pred"], output["report"], state.batch["name"]
        if name in state.registered:
            raise RegistrationError("name", name, "a name that no other pair has")
        folder = output_folder(folder_of(self.output_dir, name))
        remove_leftovers(folder)
        (folder / _REPORT).unlink(missing_ok=True)
        written = {"transform": folder / _WRITTEN["transform"]}
        result.save_transform(written["transform"])
        for key in _IMAGES:
            path = folder / _WRITTEN[key]
            if output.get(key) is not None:
                written[key] = path
                write_image(path, output[key], labels=key == "moved_labels")
            else:
                path.unlink(missing_ok=True)  # another run's
        draw: dict[str, Callable[[Path], None]] = {"overview": partial(save_overview, result)}
        if output.get("uncertainty_displacement") is not None:
            draw["uncertainty"] = partial(save_uncertainty, result.fixed, output["uncertainty_displacement"])
        if flag(self.page, "page"):
            draw["page"] = partial(save_html_report, result, name=name, files=report["input"], picture=False)
        for key in ("overview", "uncertainty", "page"):
            path = folder / _WRITTEN[key]
            path.unlink(missing_ok=True)
            if key in draw and find_spec("matplotlib") is not None:  # extra "report"; the other results do without
                draw[key](path)
                written[key] = path
        report["output"] = {key: str(path) for key, path in written.items()}
        write_json(folder / _REPORT, report)
        state.registered[name] = bool(result.success)
        state.verdicts[name] = result.quality.verdict
        if not self.quiet:
            print(_summary(report, folder), flush=True)


def check_inputs(
    fixed: Any = None,
    moving: Any = None,
    labels: Any = None,
    name: Any = None,
    dataset_dir: Any = "",
    output_dir: Any = "output",
    preset: Any = DEFAULT_PRESET,
    transform: Any = "affine",
    device: Any = None,
    vgg19_weights: Any = None,
    regressor_weights: Any = None,
    seed: Any = 0,
    datalist: Any = None,
) -> None:
    """First step of ``run``: look at what the user said before the configuration's parts are made from it.

    Raises:
        SystemExit: something cannot be used; status `WRONG_INPUT`, with the reason on stderr.
    """
    with wrong_input_exits():
        # of many pairs each has its own result, good or bad
        for entry in [] if datalist is not None else pair_list(fixed, moving, labels, name, dataset_dir):
            for argument in ("fixed", "moving", "labels"):
                if argument in entry and not os.path.exists(entry[argument]):
                    raise RegistrationError(argument, entry[argument], "an existing file")
        _text(output_dir, "output_dir")
        preset_options(preset)
        check_options(transform, seed)
        resolve_device(device)
        if regressor_weights is not None:
            _text(regressor_weights, "regressor_weights")
        if vgg19_weights == UNTRAINED_FOR_CHECKS_ONLY:
            allowed = "trained weights: random filters serve verify_net_in_out and ckpt_export, no registration"
            raise RegistrationError("vgg19_weights", vgg19_weights, allowed)
        trained_network(vgg19_weights, seed=seed)


def check_flags(**flags: Any) -> None:
    """A step of ``run`` beside `check_inputs`: options that are true or false.

    Raises:
        SystemExit: one is neither; status `WRONG_INPUT`, with the reason on stderr.
    """
    with wrong_input_exits():
        for name, value in flags.items():
            flag(value, name)


def run_pairs(evaluator: Evaluator) -> dict[str, bool]:
    """Second step of ``run``: register all pairs.

    In a process of your own, call ``evaluator.run()`` instead: it raises what went wrong.

    Returns:
        Success by name.

    Raises:
        SystemExit: input that is wrong; status `WRONG_INPUT`, with the reason on stderr. Pairs before it are written.
    """
    state: Any = evaluator.state
    if len(evaluator.data_loader) == 0:  # type: ignore[arg-type]  # everything was done before
        state.registered, state.verdicts = {}, {}
        return {}
    with wrong_input_exits():
        evaluator.run()
    return state.registered


@contextmanager
def wrong_input_exits() -> Iterator[None]:
    """Ends the process with status `WRONG_INPUT` and the reason on stderr where a `RegistrationError` comes up."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, RegistrationError):  # MONAI wraps what transforms raise
            cause = cause.__cause__
        if cause is None:
            raise
        print(f"wrong input: {cause}", file=sys.stderr)
        raise SystemExit(WRONG_INPUT) from error


def _text(value: Any, argument: str) -> str:
    """A path or name as text. The command line turns what looks like Python into numbers, lists and the like."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RegistrationError(argument, value, "text; if it was, quote it once more within the quotes: '\"1.5\"'")


def flag(value: Any, argument: str) -> bool:
    """True or False. The command line leaves ``true`` as text, and any text would count as true."""
    word = str(value).lower()
    if word not in ("true", "false"):
        raise RegistrationError(argument, value, "true or false")
    return word == "true"


def _without_infinity(value: Any) -> Any:
    """``value`` with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _folder_name(value: Any) -> str:
    name = _text(value, "name")
    if name in ("", ".", "..") or any(separator in name for separator in "/\\\0"):
        raise RegistrationError("name", name, "the name of a folder, without path separators")
    return name


def folder_of(output_dir: Any, name: Any) -> Path:
    """Where a pair's results go."""
    return Path(_text(output_dir, "output_dir")) / _folder_name(name)


def _stem(path: str) -> str:
    name = Path(path).resolve().name
    return name[:-7] if name.lower().endswith(".nii.gz") and len(name) > 7 else Path(name).stem


def write_image(path: Path, image: MetaTensor, labels: bool = False) -> None:
    """NIfTI of an image ``[C, *spatial]``; labels in the smallest integer type that holds them."""
    array = image.as_tensor().cpu().numpy()
    dtype: Any = np.float32
    if labels:
        low, high = array.min(), array.max()
        fits = (d for d in (np.uint8, np.int16, np.int32) if np.iinfo(d).min <= low and high <= np.iinfo(d).max)
        dtype = next(fits, np.float32) if (array == np.rint(array)).all() else np.float32
    # channels last, and in 2D behind a third axis, as NIfTI has it
    array = array[0] if len(array) == 1 else np.moveaxis(array if array.ndim == 4 else array[..., None], 0, -1)
    affine = to_affine_nd(3, image.affine.cpu().numpy())
    nifti = nib.Nifti1Image(array.astype(dtype), affine)
    nifti.set_qform(affine, code="scanner")
    nifti.set_sform(affine, code="scanner")
    nifti.header.set_xyzt_units("mm")
    with atomic_path(path) as partial:
        nib.save(nifti, partial)


def _summary(report: dict[str, Any], folder: Path) -> str:
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    compared = {"labels": "labels", "masks": "masks"}.get(report["metrics"].get("dice_of"), "foregrounds")
    lines = [
        f"{report['name']}: " + ("registered" if report["success"] else "FAILED") + f" in {report['seconds']:.1f} s "
        f"(preset {report['preset']}, {report['transform']})"
    ]
    lines += [f"  warning: {warning}" for warning in report["warnings"]]
    quality = report["quality"]
    lines.append(f"  quality {quality['verdict']}" + "".join(f"; {reason}" for reason in quality["reasons"]))
    if "expected_error_mm" in report:
        expected = report["expected_error_mm"]
        lines.append(
            "  expected error in the middle of the fixed image: "
            f"below {expected['below_in_50_percent']:.2f} mm in half of such cases, "
            f"below {expected['below_in_95_percent']:.2f} mm in 95 %"
        )
    lines.append(
        f"  normalized mutual information {before['nmi']:.4f} before, {after['nmi']:.4f} after; "
        f"Dice of the {compared} {before['dice']:.3f} before, {after['dice']:.3f} after"
    )
    if "error_mm" in report:
        error = report["error_mm"]
        lines.append(
            f"  mean error against the known transform: {error['before']['mean']:.2f} mm before, "
            f"{error['after']['mean']:.2f} mm after (largest {error['after']['max']:.2f} mm)"
        )
    if report.get("uncertainty") is not None:
        spread = report["uncertainty"]["std_mm_at_center"]
        told = "unknown, too few repeats succeeded" if spread is None else f"{spread:.2f} mm"
        lines.append(f"  standard deviation of the displacement in the middle of the fixed image: {told}")
    lines.append(f"  results in {folder}")
    return "\n".join(lines)
