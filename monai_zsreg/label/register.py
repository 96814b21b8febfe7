# SPDX-License-Identifier: Apache-2.0
"""The infer task: one image of a datastore onto another."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import

from monai_zsreg.app.run import describe_pair, read_pair, register_pair
from monai_zsreg.app.settings import Settings
from monai_zsreg.errors import RegistrationError, RegistrationFailure
from monai_zsreg.geometry import ras_to_lps
from monai_zsreg.io import Image, load_image, write_image
from monai_zsreg.registration import DEFAULT_PRESET, PRESETS, RegistrationResult
from monai_zsreg.registration.deformable import DEFORMABLE
from monai_zsreg.registration.engine import TRANSFORMS

#: for `optional_import`: what to do about a missing MONAI Label
MISSING = "{}: install monai-zsreg[label], in an environment of its own"

InferTask, _ = optional_import(
    "monailabel.interfaces.tasks.infer_v2", name="InferTask", descriptor=MISSING, as_type="base"
)
_LocalDatastore, _ = optional_import("monailabel.datastore.local", name="LocalDatastore", descriptor=MISSING)

logger = logging.getLogger(__name__)

#: what a request may say
PARAMETERS = ("moving", "labels", "return", "preset", "transform", "seed", "save")

#: what a request can ask for
RETURNS = ("image", "labels")

#: tags that a saved transform has in the datastore, by the suffix of the file; a deformation has the first alone
TRANSFORM_TAGS = {".tfm": "transform", ".h5": "transform_h5"}
# what a person made or looked at, and what a model made, as MONAI Label calls it
_FINAL, _ORIGINAL = "final", "original"
# above it a list to choose from is of no use
_MOST_LISTED = 200


def image_path(datastore: Any, image: Any, argument: str) -> str:
    """File (or folder of a DICOM series) of an image of the datastore; a `RegistrationError` for any other id."""
    allowed = "the id of an image of this server's datastore"
    if not isinstance(image, str) or image not in datastore.list_images():
        raise RegistrationError(argument, image, allowed)
    path = str(datastore.get_image_uri(image))
    # a local datastore is one folder and its ids are file names, but its upload also takes an id with a path in it
    if isinstance(datastore, _LocalDatastore) and Path(image).name != image:
        raise RegistrationError(argument, image, allowed)
    if not path or not os.path.exists(path):
        raise RegistrationError(argument, image, "an image whose file is still there")
    return path


def label_path(datastore: Any, image: Any, argument: str) -> str:
    """File of the final label of an image of the datastore; a `RegistrationError` where it has none."""
    image_path(datastore, image, argument)
    label = datastore.get_label_by_image_id(image, _FINAL)
    path = str(datastore.get_label_uri(label, _FINAL)) if label else ""
    if not path or not os.path.exists(path):
        raise RegistrationError(argument, image, "an image with a final label")
    return path


class RegisterTask(InferTask):  # type: ignore[valid-type, misc]
    """Registers one image of the datastore to the image of the request.

    Parameters of a request:

    - ``moving``: id of the moving image. Required.
    - ``return``: ``"image"`` for the moved image or ``"labels"`` for the moved labels.
    - ``labels``: id of the moving image whose final label is moved; that of ``moving`` if left out.
    - ``preset``, ``transform``, ``seed``: see `monai_zsreg.register`.
    - ``save``: whether the datastore keeps the results, as an image ``MOVING_on_FIXED`` with the transform as its
      label of the tags "transform" (``.tfm``) and "transform_h5" (``.h5``; of the kind "deformable" a displacement
      field, ``.nii.gz``, of the first tag alone), and moved labels as that of the tag "original".

    The answer is a NIfTI file on the fixed grid and the fields of the bundle's ``report.json``, with ids as ``input``,
    ``matrix_lps``, ``returned``, ``label_names`` with labels, and ``saved``, the id, where results were kept.

    The task keeps nothing in memory between requests, so they may run at once.

    Args:
        datastore: gives the datastore to look ids up in.
        device: where to compute.
        vgg19_weights: file of VGG-19's weights; without it only the preset that does without is offered.
        returns: default of ``return``.
    """

    def __init__(
        self,
        datastore: Callable[[], Any],
        device: torch.device | str = "cpu",
        vgg19_weights: str | None = None,
        returns: str = RETURNS[0],
    ) -> None:
        labels = returns == "labels"
        what = "the final label of the image" if labels else "the image"
        # 3D Slicer offers its "Auto Segmentation" for one type alone, and expects labels from it
        told = (
            "3D Slicer lists it and shows the labels as a segmentation."
            if labels
            else "For scripts: 3D Slicer lists models that return labels only; there take register_labels."
        )
        super().__init__(
            type="segmentation" if labels else "others",
            labels=None,
            dimension=3,
            description=f"Affine registration: moves {what} named as `moving` onto the grid of the fixed one. {told}",
        )
        self.datastore = datastore
        self.device = device
        self.vgg19_weights = vgg19_weights
        self.returns = returns
        self.presets = PRESETS if vgg19_weights is not None else (DEFAULT_PRESET,)

    def is_valid(self) -> bool:
        """Always: there is nothing to train or to download."""
        return True

    def config(self) -> dict[str, Any]:
        """The parameters; of a list, the first is the default."""
        store = self.datastore()
        images = sorted(store.list_images())
        labeled = sorted(store.get_labeled_images())
        return {
            "moving": ["", *images] if len(images) <= _MOST_LISTED else "",
            "return": sorted(RETURNS, key=lambda name: name != self.returns),
            "labels": ["", *labeled] if len(labeled) <= _MOST_LISTED else "",
            "preset": list(self.presets),
            "transform": [*sorted(TRANSFORMS), DEFORMABLE],
            "seed": 0,
            "save": False,
        }

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """
        Args:
            request: ``image``, the path of the fixed image; ``image_id``, its name for the report; and parameters.

        Returns:
            Path of the image, which is the caller's to delete, and the report.

        Raises:
            RegistrationError: parameters or images that cannot be used. Paths are not in it.
            RegistrationFailure: the verdict FAIL, with its reasons.
        """
        store = self.datastore()
        returned = request.get("return") or self.returns
        preset = request.get("preset") or self.presets[0]
        if returned not in RETURNS:
            raise RegistrationError("return", returned, f"one of {RETURNS}")
        if preset not in self.presets:
            raise RegistrationError("preset", preset, f"one of {self.presets}, which this server offers")
        moving = request.get("moving")
        ids = {"fixed": request.get("image_id", "image"), "moving": moving}
        paths = {"fixed": request["image"], "moving": image_path(store, moving, "moving")}
        if returned == "labels" or request.get("labels"):
            ids["labels"] = request.get("labels") or moving
            paths["labels"] = label_path(store, ids["labels"], "labels")
        name = f"{moving}_on_{ids['fixed']}"
        save = request.get("save", False)
        if save:
            _check_free(store, name)

        settings = Settings(
            preset=preset,
            transform=request.get("transform") or "affine",
            device=self.device,
            vgg19_weights=self.vgg19_weights,
            seed=request.get("seed", 0),
        )
        images = {key: _load(path, key, ids[key]) for key, path in paths.items()}
        pair = read_pair({"name": name} | images, settings) | {"files": ids}
        result = register_pair(pair, settings)
        if not result.success:
            raise RegistrationFailure(f"{moving} does not register to {ids['fixed']}: {'; '.join(result.reasons)}")
        report, moved = describe_pair(pair, result, settings)
        report |= {"matrix_lps": ras_to_lps(result.affine).tolist(), "returned": returned}
        if "moved_labels" in moved:
            report["label_names"] = _label_names(store, ids["labels"], moved["moved_labels"])
        if save:
            report["saved"] = name
            _save(store, name, pair, result, moved, report)
        key = "moved_labels" if returned == "labels" else "moved"
        handle, path = tempfile.mkstemp(prefix=f"moved_{returned}_", suffix=".nii.gz")
        os.close(handle)
        _write(Path(path), pair, moved, key)
        return path, report


def _load(path: str, name: str, identifier: Any) -> Image:
    try:
        return load_image(path, name)
    except RegistrationError as error:
        if os.path.dirname(path) not in str(error):
            raise
        # readers' messages are full of the server's paths
        logger.warning("%s", error)
        raise RegistrationError(name, identifier, "an image that can be read") from None


def _write(path: Path, pair: Mapping[str, Any], images: Mapping[str, Image], key: str) -> None:
    """Write one of the moved images, in the type that it came in."""
    labels = key == "moved_labels"
    try:
        write_image(path, images[key], like=pair["labels" if labels else "moving"], labels=labels)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _check_free(datastore: Any, name: str) -> None:
    """A `RegistrationError` where the datastore cannot keep results under this name."""
    if type(datastore) is not _LocalDatastore:
        raise RegistrationError("save", True, "False: this server's datastore is not a folder")
    if name in datastore.list_images():  # it may have been looked at and labeled
        raise RegistrationError("save", name, "a name that is free: delete that image from the datastore first")


def _save(
    datastore: Any,
    name: str,
    pair: Mapping[str, Any],
    result: RegistrationResult,
    images: Mapping[str, Image],
    report: Mapping[str, Any],
) -> None:
    """Add the results to the datastore, which copies the files."""
    told = {key: report[key] for key in ("input", "verdict", "reasons", "preset", "transform", "matrix_lps")}
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "moved.nii.gz")
        _write(image, pair, images, "moved")
        datastore.add_image(name, str(image), {"registration": told})
        tags = TRANSFORM_TAGS if result.deformation is None else {".nii.gz": TRANSFORM_TAGS[".tfm"]}
        for suffix, tag in tags.items():
            result.save_transform(Path(folder, f"transform{suffix}"))
            datastore.save_label(name, str(Path(folder, f"transform{suffix}")), tag, {"registration": told})
        if "moved_labels" in images:
            _write(image, pair, images, "moved_labels")
            named = [{"idx": value, "name": label} for label, value in report["label_names"].items()]
            datastore.save_label(name, str(image), _ORIGINAL, {"label_info": named})


def _label_names(datastore: Any, image: str, labels: Image) -> dict[str, int]:
    """Names of the values that are left after moving, by what the client that saved the label called them."""
    known: dict[int, str] = {}
    info = datastore.get_label_info(datastore.get_label_by_image_id(image, _FINAL), _FINAL).get("label_info")
    for entry in info if isinstance(info, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("idx"), int):
            known[entry["idx"]] = str(entry.get("name"))
    values = np.unique(np.rint(labels.values.cpu().numpy())).astype(int).tolist()
    return {known.get(value, f"label_{value}"): value for value in values if value != 0}
