# SPDX-License-Identifier: Apache-2.0
"""The app; MONAI Label finds it by this file's name and the name of the class."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from monai.utils import optional_import

import monai_zsreg
from monai_zsreg.errors import RegistrationError, RegistrationFailure
from monai_zsreg.label.register import MISSING, PARAMETERS, RegisterTask, image_path
from monai_zsreg.paper import build_network
from monai_zsreg.registration import resolve_device
from monai_zsreg.registration.pair import refuse_unknown

MONAILabelApp, _ = optional_import(
    "monailabel.interfaces.app", name="MONAILabelApp", descriptor=MISSING, as_type="base"
)
HTTPException, _ = optional_import("fastapi", name="HTTPException", descriptor=MISSING)

logger = logging.getLogger(__name__)

_SETTINGS = ("device", "vgg19_weights")
# what a client may be told was wrong; a complaint about anything else is about the server
_ARGUMENTS = ("model", "image", "fixed", "options", *PARAMETERS)
# what MONAI Label and its clients put beside them; a name that is nobody's is a typo
_OF_THE_SERVER = (
    *("model", "image", "label", "session", "description", "timeout", "device", "logging"),
    *("client_id", "result_extension", "result_dtype", "result_compress", "label_info"),
    *("images", "save_label", "label_tag", "multi_gpu", "gpus", "max_workers", "max_batch_size", "_id", "_image_id"),
)
# of an answer: wrong input, and a pair that no transform could be found for
_WRONG_INPUT, _FAILED = 400, 422


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
            build_network("keypoints", vgg19_weights=self.vgg19_weights, device=self.device)
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
        """Answer one request as MONAI Label's apps do. The parameters of `RegisterTask` count, the server's own do not.

        One of a batch, whose answers nobody reads, has its results saved, and where there are none the reason as
        ``params["error"]``.

        Raises:
            HTTPException: status 400, wrong input, or 422, the verdict FAIL, with the reason.
        """
        batch = "_image_id" in request
        try:
            if batch and request.get("moving") == request["image"]:
                raise RegistrationError("moving", request["moving"], "another image than the fixed one")
            answer = self._answer(dict(request) | ({"save": True} if batch else {}), datastore)
            return answer | ({"label": answer["params"]["saved"]} if batch else {})
        except RegistrationFailure as failure:
            status, reason = _FAILED, str(failure)
        except RegistrationError as error:
            if error.argument.partition(".")[0].partition("_")[0] not in _ARGUMENTS:
                raise
            status, reason = _WRONG_INPUT, str(error)
        if batch:  # one exception would end it
            return {"label": None, "tag": None, "file": None, "params": {"error": reason}}
        raise HTTPException(status_code=status, detail=reason)

    def batch_infer(self, request: Mapping[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Register one image to many. MONAI Label would deal them out to GPUs, and fail where there is none; here the
        server's own device does all of them.

        Args:
            request: ``model``, ``images`` (``"all"``, ``"labeled"``, ``"unlabeled"`` or a list of ids) and parameters.
            datastore: in place of the app's own.

        Returns:
            The answer of `infer` for each image.
        """
        return super().batch_infer(dict(request) | {"multi_gpu": False, "device": str(self.device)}, datastore)

    def _answer(self, request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        store = self.datastore() if datastore is None else datastore
        if not isinstance(request.get("model"), str) or request["model"] not in self._infers:
            raise RegistrationError("model", request.get("model"), f"one of {tuple(self._infers)}")
        refuse_unknown({name: 0 for name in request if name not in _OF_THE_SERVER}, [*PARAMETERS])
        # the base class would open any file of the server that a client names, and save where a client says
        chosen = {name: request[name] for name in PARAMETERS if name in request}
        path = self._uploaded(request)
        identifier = "session" if path else request.get("image")
        path = path or image_path(store, identifier, "image")
        return super().infer(chosen | {"model": request["model"], "image": path, "image_id": identifier}, store)

    def _uploaded(self, request: Mapping[str, Any]) -> str | None:
        """Path of the session's image, where the request is one of a session."""
        told, sessions = request.get("session"), self.sessions()
        name = told.get("name") if isinstance(told, dict) else None
        # a client can write this entry itself, so only what the server knows counts; its `get_session` takes paths
        session = sessions.get(name) if sessions is not None and isinstance(name, str) else None
        return session.image if session is not None and session.image == request.get("image") else None
