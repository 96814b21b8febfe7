# SPDX-License-Identifier: Apache-2.0
"""The process that runs SimpleElastix for `peers.SimpleElastix`; started as a file, so that it imports nothing else.

One JSON object a line comes in: ``{"do": "load", "fixed": {...}, "moving": {...}, "start": ..., "threads": ...}``, then
``{"do": "run", "points": [...]}``. One line that begins with ``@@`` goes out for each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["main"]


def _image(record: dict[str, Any]) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.load(record["file"], allow_pickle=False))
    image.SetSpacing(record["spacing"])
    image.SetOrigin(record["origin"])
    image.SetDirection(record["direction"])
    return image


def _filter(message: dict[str, Any]) -> Any:
    import SimpleITK as sitk

    settings = sitk.GetDefaultParameterMap("affine")
    settings["WriteResultImage"] = ["false"]
    if message["start"] == "mass":
        settings["AutomaticTransformInitialization"] = ["true"]
        settings["AutomaticTransformInitializationMethod"] = ["CenterOfGravity"]
    made = sitk.ElastixImageFilter()
    made.SetParameterMap(settings)
    made.SetFixedImage(_image(message["fixed"]))
    made.SetMovingImage(_image(message["moving"]))
    made.SetNumberOfThreads(message["threads"])
    made.LogToConsoleOff()
    made.LogToFileOff()
    return made


def _mapped(transform: Any, moving: Any, points: list[list[float]]) -> list[list[float]]:
    """Points (LPS) sent through the transform by Transformix itself."""
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory(prefix="zsreg-") as folder:
        listed = Path(folder) / "points.txt"
        listed.write_text("\n".join(["point", str(len(points)), *(" ".join(map(str, p)) for p in points)]) + "\n")
        shown = sitk.TransformixImageFilter()
        shown.SetTransformParameterMap(transform)
        shown.SetMovingImage(moving)
        shown.SetFixedPointSetFileName(str(listed))
        shown.SetOutputDirectory(folder)
        shown.LogToConsoleOff()
        shown.LogToFileOff()
        shown.Execute()
        lines = (Path(folder) / "outputpoints.txt").read_text().splitlines()
    return [[float(v) for v in line.split("OutputPoint = [")[1].split("]")[0].split()] for line in lines]


def main() -> None:
    """Serve until the input ends."""
    # not at the top: SimpleElastix must not be loaded beside itk, whoever imports this module
    import SimpleITK as sitk

    loaded: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if message["do"] == "load":
                # ITK reads this variable when the first filter is made
                os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(message["threads"])
                sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(message["threads"])
                loaded = _filter(message)
                answer: dict[str, Any] = {}
            else:
                begin = time.perf_counter()
                loaded.Execute()
                seconds = time.perf_counter() - begin
                found = loaded.GetTransformParameterMap(0)
                answer = {
                    "seconds": seconds,
                    "parameters": list(found["TransformParameters"]),
                    "center": list(found["CenterOfRotationPoint"]),
                }
                if message.get("points"):
                    answer["mapped"] = _mapped(found, loaded.GetMovingImage(0), message["points"])
        except Exception as error:
            answer = {"error": str(error).strip()}
        print("@@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
