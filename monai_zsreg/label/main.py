# SPDX-License-Identifier: Apache-2.0
"""The app; MONAI Label finds it by this file's name and the name of the class."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from monai.utils import optional_import

import monai_zsreg
from monai_zsreg.errors import RegistrationError
from monai_zsreg.label.register import MISSING, PARAMETERS, RegisterTask, image_path
from monai_zsreg.registration.pair import build_network, resolve_device
from monai_zsreg.registration.presets import preset_options

MONAILabelApp, _ = optional_import(
    "monailabel.interfaces.app", name="MONAILabelApp", descriptor=MISSING, as_type="base"
)
HTTPException, _ = optional_import("fastapi", name="HTTPException", descriptor=MISSING)

__all__ = ["MyApp"]

logger = logging.getLogger(__name__)

_SETTINGS = ("device", "vgg19_weights")
# what a client may be told was wrong; a complaint about anything else is about the server
_ARGUMENTS = ("model", "image", "fixed", *PARAMETERS)


class MyApp(MONAILabelApp):  # type: ignore[valid-type, misc]
    """Registers images of the datastore; see `RegisterTask` for a request's parameters.

    Clients name images by their ids and nothing else. What a request must not decide is said when the server is
    started: ``--conf device cuda``, and ``--conf vgg19_weights FILE`` for the presets that use VGG-19.

    Args:
        app_dir: the app's folder, where the server writes its logs.
        studies: the datastore's folder, or its address.
        conf: the server's settings.

    Raises:
        RegistrationError: a device or a weights file that cannot be used.
    """

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]) -> None:
        unknown = sorted(set(conf) - set(_SETTINGS))
        if unknown:
            logger.warning("settings that this app does not know: %s; it knows %s", unknown, _SETTINGS)
        self.device = resolve_device(conf.get("device", "cuda" if torch.cuda.is_available() else "cpu"))
        self.vgg19_weights = conf.get("vgg19_weights")
        if self.vgg19_weights is not None:  # a wrong file should stop the start, not a request
            build_network(2, vgg19_weights=self.vgg19_weights, device=self.device, **preset_options("keypoints"))
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=dict(conf),
            name="monai_zsreg",
            description="Affine registration of two images of any modality",
            version=monai_zsreg.__version__,
        )

    def init_infers(self) -> dict[str, Any]:
        """The tasks by their names: the moved image, and for clients that expect a segmentation the moved labels."""
        common = {"datastore": self.datastore, "device": self.device, "vgg19_weights": self.vgg19_weights}
        return {
            "register": RegisterTask(**common),
            "register_labels": RegisterTask(**common, returns="labels"),
        }

    def infer(self, request: Mapping[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Answer one request. Of its parameters only those of `RegisterTask` count; all others are ignored.

        Args:
            request: ``model``, ``image`` and the parameters.
            datastore: in place of the app's own.

        Returns:
            As MONAI Label's apps do; nothing is saved to the datastore.

        Raises:
            HTTPException: wrong input, status 400, with the reason.
        """
        store = self.datastore() if datastore is None else datastore
        try:
            if not isinstance(request.get("model"), str) or request["model"] not in self._infers:
                raise RegistrationError("model", request.get("model"), f"one of {tuple(self._infers)}")
            # the base class would open any file of the server that a client names, and save where a client says
            chosen = {name: request[name] for name in PARAMETERS if name in request}
            path = self._uploaded(request) or image_path(store, request.get("image"), "image")
            chosen |= {"model": request["model"], "image": path, "image_id": request["image"]}
            return super().infer(chosen, store)
        except RegistrationError as error:
            if error.argument.partition(".")[0].partition("_")[0] not in _ARGUMENTS:
                raise
            raise HTTPException(status_code=400, detail=str(error)) from error

    def _uploaded(self, request: Mapping[str, Any]) -> str | None:
        """Path of the session's image, where the request is one of a session."""
        told, sessions = request.get("session"), self.sessions()
        name = told.get("name") if isinstance(told, dict) else None
        # a client can write this entry itself, so only what the server knows counts; its `get_session` takes paths
        session = sessions.get(name) if sessions is not None and isinstance(name, str) else None
        return session.image if session is not None and session.image == request.get("image") else None
