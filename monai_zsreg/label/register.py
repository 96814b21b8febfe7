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
from monai.data import MetaTensor
from monai.utils import optional_import

from monai_zsreg.errors import RegistrationError
from monai_zsreg.geometry import ras_to_lps
from monai_zsreg.inference import DescribePair, MovePair, write_image
from monai_zsreg.networks import TRANSFORMS
from monai_zsreg.registration import register
from monai_zsreg.registration.images import read_image
from monai_zsreg.registration.presets import DEFAULT_PRESET, PRESETS, ROBUST

#: for `optional_import`: what to do about a missing MONAI Label
MISSING = "{}: install monai-zsreg[label], in an environment of its own"

InferTask, _ = optional_import(
    "monailabel.interfaces.tasks.infer_v2", name="InferTask", descriptor=MISSING, as_type="base"
)

__all__ = ["MISSING", "PARAMETERS", "RETURNS", "RegisterTask", "image_path", "label_path"]

logger = logging.getLogger(__name__)

#: what a request may say
PARAMETERS = ("moving", "labels", "return", "preset", "transform", "seed")

#: what a request can ask for
RETURNS = ("image", "labels")

# what a person made or looked at, as MONAI Label calls it
_FINAL = "final"
# above it a list to choose from is of no use
_MOST_LISTED = 200


def image_path(datastore: Any, image: Any, argument: str) -> str:
    """File (or folder of a DICOM series) of an image of the datastore.

    Args:
        datastore: MONAI Label's.
        image: what the client wrote.
        argument: name of the parameter, for messages.

    Raises:
        RegistrationError: ``image`` is not the id of an image of the datastore.
    """
    allowed = "the id of an image of this server's datastore"
    if not isinstance(image, str) or image not in datastore.list_images():
        raise RegistrationError(argument, image, allowed)
    path = str(datastore.get_image_uri(image))
    # a local datastore is one folder and its ids are file names, but its upload also takes an id with a path in it
    local, has_local = optional_import("monailabel.datastore.local", name="LocalDatastore")
    if has_local and isinstance(datastore, local) and Path(image).name != image:
        raise RegistrationError(argument, image, allowed)
    if not path or not os.path.exists(path):
        raise RegistrationError(argument, image, "an image whose file is still there")
    return path


def label_path(datastore: Any, image: Any, argument: str) -> str:
    """File of the final label of an image of the datastore.

    Raises:
        RegistrationError: ``image`` is not the id of an image of the datastore, or has no final label.
    """
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

    The answer is a NIfTI file on the fixed grid and the fields of the bundle's ``report.json``, with ids as ``input``,
    ``matrix_lps``, ``returned``, ``label_names`` with labels, and ``quality`` where it was judged. Where the
    registration failed, ``success`` is False and the image lies where its header puts it.

    The task keeps nothing between requests, so they may run at once.

    Args:
        datastore: gives the datastore to look ids up in.
        device: where to compute.
        vgg19_weights: file of VGG-19's weights; without it only the presets that do without are offered.
        returns: default of ``return``.
    """

    def __init__(
        self,
        datastore: Callable[[], Any],
        device: torch.device | str = "cpu",
        vgg19_weights: str | None = None,
        returns: str = RETURNS[0],
    ) -> None:
        # 3D Slicer offers its "Auto Segmentation" for this type alone, and expects labels from it
        kind = "segmentation" if returns == "labels" else "others"
        what = "the final label of the image" if returns == "labels" else "the image"
        super().__init__(
            type=kind,
            labels=None,
            dimension=3,
            description=f"Affine registration: {what} named as `moving`, moved onto the grid of the request's image",
        )
        self.datastore = datastore
        self.device = device
        self.vgg19_weights = vgg19_weights
        self.returns = returns
        self.presets = (DEFAULT_PRESET, *(name for name in PRESETS if name != DEFAULT_PRESET))
        if vgg19_weights is None:
            self.presets = (ROBUST,)

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
            "transform": sorted(TRANSFORMS),
            "seed": 0,
        }

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """
        Args:
            request: ``image``, the path of the fixed image; ``image_id``, its name for the report; and parameters.

        Returns:
            Path of the image, which is the caller's to delete, and the report.

        Raises:
            RegistrationError: parameters or images that cannot be used. Paths are not in it.
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

        pair: dict[str, Any] = {name: _read(path, name, ids[name]) for name, path in paths.items()}
        if "labels" in pair and pair["labels"].ndim != pair["moving"].ndim:
            allowed = f"labels in {pair['moving'].ndim - 1}D, as moving is"
            raise RegistrationError("labels", f"{pair['labels'].ndim - 1}D labels", allowed)
        seed = request.get("seed", 0)
        result = register(
            pair["fixed"],
            pair["moving"],
            preset=preset,
            transform=request.get("transform") or "affine",
            device=self.device,
            vgg19_weights=self.vgg19_weights,
            seed=seed,
        )
        pair |= {"pred": result, "name": ids["moving"], "files": ids}
        pair = DescribePair(seed=seed, device=self.device)(MovePair()(pair))
        report: dict[str, Any] = pair["report"] | {
            "matrix_lps": ras_to_lps(result.affine).tolist(),
            "returned": returned,
        }
        image: MetaTensor = pair["moved_labels" if returned == "labels" else "moved"]
        if returned == "labels":
            report["label_names"] = _label_names(store, ids["labels"], image)
        return _temporary(image, returned), report


def _read(path: str, name: str, identifier: Any) -> MetaTensor:
    try:
        return read_image(path, name)
    except RegistrationError as error:
        if error.value != path:
            raise
        # readers' messages are full of the server's paths
        logger.warning("%s", error)
        raise RegistrationError(name, identifier, "an image that can be read") from None


def _label_names(datastore: Any, image: str, labels: MetaTensor) -> dict[str, int]:
    """Names of the values that are left after moving, by what the client that saved the label called them."""
    known: dict[int, str] = {}
    info = datastore.get_label_info(datastore.get_label_by_image_id(image, _FINAL), _FINAL).get("label_info")
    for entry in info if isinstance(info, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("idx"), int):
            known[entry["idx"]] = str(entry.get("name"))
    values = np.unique(np.rint(labels.as_tensor().cpu().numpy())).astype(int).tolist()
    return {known.get(value, f"label_{value}"): value for value in values if value != 0}


def _temporary(image: MetaTensor, returned: str) -> str:
    handle, path = tempfile.mkstemp(prefix=f"moved_{returned}_", suffix=".nii.gz")
    os.close(handle)
    try:
        write_image(Path(path), image, labels=returned == "labels")
    except BaseException:
        os.unlink(path)
        raise
    return path
