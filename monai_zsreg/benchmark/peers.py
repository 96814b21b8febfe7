# SPDX-License-Identifier: Apache-2.0
"""The methods under test, ours and others, behind one interface: two images in, one pull matrix in RAS out.

What each does at its defaults, and where it starts:

* ``elastix`` (itk-elastix) and ``simpleelastix`` (SimpleITK-SimpleElastix): the default parameter map ``affine``.
  ``/default`` starts at the identity (that map asks for no initialization), ``/mass`` at the centers of mass.
* ``ants`` (antspyx): ``type_of_transform="Affine"``. Its default start *is* the centers of mass, so ``/default`` and
  ``/mass`` would be one run; ``/identity`` exists for comparison and runs only when named.
* ``sift``: OpenCV's SIFT, ratio test 0.75, RANSAC affine at 3 pixels. 2D only.
* ``none``: the identity.
* ``ours:<preset>``: ``monai_zsreg.register``.

Every peer gets the same number of threads. Its own image objects are made before the clock starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from monai_zsreg.errors import RegistrationError, RegistrationWarning
from monai_zsreg.geometry import Grid, itk_lattice, lps_to_ras

__all__ = [
    "ANTs",
    "Elastix",
    "Identity",
    "Method",
    "Options",
    "Ours",
    "SIFT",
    "SimpleElastix",
    "limit_threads",
    "make_methods",
]


@dataclass(frozen=True)
class Options:
    """What the methods share.

    Args:
        threads: threads of each method.
        device: where ours runs; None for its own choice.
        vgg19_weights: file for the presets that need it.
        seed: for methods that draw random numbers.
    """

    threads: int = 2
    device: str | None = None
    vgg19_weights: str | None = None
    seed: int = 0


def limit_threads(threads: int) -> None:
    """Give torch, ITK (also inside ANTs) and OpenCV the same number of threads.

    ITK inside ANTs reads its environment variable once, so this has to run before the first registration.
    """
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    if _installed("itk"):
        import itk

        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(threads)
    if _installed("cv2"):
        import cv2

        cv2.setNumThreads(threads)


class Method:
    """One method at one start.

    Args:
        options: threads, device, seed.
        start: name of the start.
    """

    family = ""
    module: str | None = None
    package = ""
    dims: tuple[int, ...] = (2, 3)
    starts: tuple[str, ...] = ("",)
    extra_starts: tuple[str, ...] = ()

    def __init__(self, options: Options, start: str = "") -> None:
        self.options = options
        self.start = start

    @property
    def name(self) -> str:
        return f"{self.family}/{self.start}" if self.start else self.family

    def prepare(self, fixed: MetaTensor, moving: MetaTensor) -> Any:
        """Hand the images over, ``[1, *spatial]`` each; not timed."""
        return fixed, moving

    def run(self, images: Any) -> np.ndarray:
        """Register; the pull matrix ``(D+1, D+1)`` from fixed world to moving world, RAS mm."""
        raise NotImplementedError

    def timed(self, images: Any) -> tuple[np.ndarray, float]:
        """`run` with its seconds."""
        begin = time.perf_counter()
        matrix = self.run(images)
        return np.asarray(matrix, dtype=np.float64), time.perf_counter() - begin

    @property
    def pid(self) -> int | None:
        """The process that does the work; None for this one."""
        return None

    def close(self) -> None:
        """End what the method started."""


class Identity(Method):
    """No registration."""

    family = "none"

    def run(self, images: Any) -> np.ndarray:
        return np.eye(images[0].ndim)


class Ours(Method):
    """A preset of ``monai_zsreg.register``; the start is the preset's name."""

    family = "ours"
    module = "monai_zsreg.registration"
    package = "monai-zsreg"

    @property
    def name(self) -> str:
        return f"ours:{self.start}"

    def run(self, images: Any) -> np.ndarray:
        from monai_zsreg.registration import register

        options: dict[str, Any] = {"preset": self.start, "seed": self.options.seed}
        if self.options.device is not None:
            options["device"] = self.options.device
        if self.options.vgg19_weights is not None:
            options["vgg19_weights"] = self.options.vgg19_weights
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RegistrationWarning)
            result = register(*images, **options)
        if not result.success:
            raise RuntimeError("; ".join(result.warnings) or "no success")
        return np.asarray(result.affine)


class Elastix(Method):
    """itk-elastix, parameter map ``affine``."""

    family = "elastix"
    module = "itk.elxParameterObjectPython"
    package = "itk-elastix"
    starts = ("default", "mass")

    def prepare(self, fixed: MetaTensor, moving: MetaTensor) -> Any:
        return _itk_image(fixed), _itk_image(moving)

    def align(self, images: Any) -> Any:
        """Run the registration; the filter object, which holds the transform."""
        import itk

        parameters = itk.ParameterObject.New()
        settings = parameters.GetDefaultParameterMap("affine")
        # the moved image is not part of what is timed
        settings["WriteResultImage"] = ["false"]
        if self.start == "mass":
            settings["AutomaticTransformInitialization"] = ["true"]
            settings["AutomaticTransformInitializationMethod"] = ["CenterOfGravity"]
        parameters.AddParameterMap(settings)
        method = itk.ElastixRegistrationMethod.New(*images)
        method.SetParameterObject(parameters)
        method.SetLogToConsole(False)
        method.SetNumberOfThreads(self.options.threads)
        method.Update()
        return method

    def convert(self, done: Any) -> np.ndarray:
        """The matrix in our convention from what `align` returns."""
        found = done.GetTransformParameterObject().GetParameterMap(0)
        return elastix_matrix(list(found["TransformParameters"]), list(found["CenterOfRotationPoint"]))

    def run(self, images: Any) -> np.ndarray:
        return self.convert(self.align(images))


class SimpleElastix(Method):
    """SimpleITK-SimpleElastix, parameter map ``affine``, in a process of its own.

    Its Python wrapping and itk-elastix's claim the same types, and one process with both crashes. The process waits
    while others run, and measures its own time.
    """

    family = "simpleelastix"
    module = "SimpleITK"
    package = "SimpleITK-SimpleElastix"
    starts = ("default", "mass")

    def __init__(self, options: Options, start: str = "default") -> None:
        super().__init__(options, start)
        self._worker: subprocess.Popen[str] | None = None
        self._files: tempfile.TemporaryDirectory | None = None
        self.points: list[list[float]] = []

    @property
    def _folder(self) -> Path:
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="zsreg-")
        return Path(self._files.name)

    def prepare(self, fixed: MetaTensor, moving: MetaTensor) -> Any:
        message: dict[str, Any] = {"start": self.start, "threads": self.options.threads}
        for role, image in (("fixed", fixed), ("moving", moving)):
            spacing, origin, direction = itk_lattice(Grid.of(image))
            path = self._folder / f"{role}.npy"
            # SimpleITK takes the axes in reverse, as ITK does
            np.save(path, np.ascontiguousarray(_plain(image).T), allow_pickle=False)
            message[role] = {
                "file": str(path),
                "spacing": spacing.tolist(),
                "origin": origin.tolist(),
                "direction": direction.ravel().tolist(),
            }
        self._ask(message | {"do": "load"})
        return message

    def timed(self, images: Any) -> tuple[np.ndarray, float]:
        answer = self._ask({"do": "run", "points": self.points})
        self.mapped = answer.get("mapped")
        return elastix_matrix(answer["parameters"], answer["center"]), float(answer["seconds"])

    def run(self, images: Any) -> np.ndarray:
        return self.timed(images)[0]

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._worker is None or self._worker.poll() is not None:
            script = Path(__file__).with_name("_simpleelastix.py")
            self._worker = subprocess.Popen(
                [sys.executable, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=self._folder,
            )
        assert self._worker.stdin is not None and self._worker.stdout is not None
        self._worker.stdin.write(json.dumps(message) + "\n")
        self._worker.stdin.flush()
        for line in self._worker.stdout:
            # the library prints to the same stream
            if line.startswith("@@"):
                answer: dict[str, Any] = json.loads(line[2:])
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer
        raise RuntimeError(f"the SimpleElastix process ended with status {self._worker.wait()}")

    @property
    def pid(self) -> int | None:
        return None if self._worker is None else self._worker.pid

    def close(self) -> None:
        if self._worker is not None and self._worker.poll() is None:
            assert self._worker.stdin is not None and self._worker.stdout is not None
            self._worker.stdin.close()
            self._worker.wait(timeout=30)
            self._worker.stdout.close()
        if self._files is not None:
            self._files.cleanup()


class ANTs(Method):
    """antspyx, ``type_of_transform="Affine"``."""

    family = "ants"
    module = "ants"
    package = "antspyx"
    starts = ("default",)
    extra_starts = ("identity",)

    def prepare(self, fixed: MetaTensor, moving: MetaTensor) -> Any:
        return _ants_image(fixed), _ants_image(moving)

    def align(self, images: Any) -> Any:
        """Run the registration; ANTs' own transform object."""
        import ants

        with tempfile.TemporaryDirectory(prefix="zsreg-") as folder:
            found = ants.registration(
                images[0],
                images[1],
                type_of_transform="Affine",
                initial_transform="Identity" if self.start == "identity" else None,
                outprefix=f"{folder}/",
                random_seed=self.options.seed + 1,
            )
            return ants.read_transform(found["fwdtransforms"][0])

    def convert(self, done: Any) -> np.ndarray:
        """The matrix in our convention from what `align` returns."""
        return elastix_matrix(list(done.parameters), list(done.fixed_parameters))

    def run(self, images: Any) -> np.ndarray:
        return self.convert(self.align(images))


class SIFT(Method):
    """OpenCV's SIFT with ratio test and RANSAC."""

    family = "sift"
    module = "cv2"
    package = "opencv-python-headless"
    dims = (2,)

    def run(self, images: Any) -> np.ndarray:
        # its type stubs know neither SIFT nor arrays of points
        cv2: Any = importlib.import_module("cv2")
        cv2.setRNGSeed(self.options.seed)
        detector = cv2.SIFT_create()
        (fixed_keys, fixed_words), (moving_keys, moving_words) = (
            detector.detectAndCompute(_bytes(_plain(image)), None) for image in images
        )
        if fixed_words is None or moving_words is None or len(moving_words) < 2:
            raise RuntimeError("no keypoints")
        matches = cv2.BFMatcher(cv2.NORM_L2).knnMatch(fixed_words, moving_words, k=2)
        good = [m for m, n in (pair for pair in matches if len(pair) == 2) if m.distance < 0.75 * n.distance]
        if len(good) < 3:
            raise RuntimeError(f"{len(good)} matches, 3 are needed")
        source = np.array([fixed_keys[m.queryIdx].pt for m in good], dtype=np.float32)
        target = np.array([moving_keys[m.trainIdx].pt for m in good], dtype=np.float32)
        found, _ = cv2.estimateAffine2D(source, target, method=cv2.RANSAC, ransacReprojThreshold=3.0)
        if found is None:
            raise RuntimeError("RANSAC found no affine transform")
        # OpenCV's x runs along the second array axis
        pull = np.eye(3)
        pull[:2] = found[::-1, [1, 0, 2]]
        fixed, moving = (Grid.of(image).affine.numpy() for image in images)
        return np.asarray(moving @ pull @ np.linalg.inv(fixed))


_FAMILIES: dict[str, type[Method]] = {m.family: m for m in (Identity, Ours, Elastix, SimpleElastix, ANTs, SIFT)}


def make_methods(specs: Sequence[str], options: Options) -> tuple[list[Method], list[str]]:
    """Methods by name: ``family`` for all of its usual starts, ``family/start`` for one, ``ours:preset`` for ours.

    Args:
        specs: names.
        options: what the methods share.

    Returns:
        The methods, and one line for each that is not installed.

    Raises:
        RegistrationError: an unknown name.
    """
    methods: list[Method] = []
    missing = []
    for spec in specs:
        family, _, start = spec.replace(":", "/", 1).partition("/")
        kind = _FAMILIES.get(family)
        known = kind is not None and (not start or family == "ours" or start in kind.starts + kind.extra_starts)
        if kind is None or not known or (family == "ours" and not start):
            raise RegistrationError("methods", spec, f"of {sorted(set(_FAMILIES) - {'ours'})} or ours:<preset>")
        if kind.module is not None and not _installed(kind.module):
            missing.append(f"{spec}: pip install {kind.package}")
            continue
        methods += [kind(options, s) for s in ((start,) if start else kind.starts)]
    return methods, missing


def _installed(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
        # a folder without code passes for a namespace package
        if spec is None or (spec.origin is None and module.startswith("monai_zsreg.")):
            return False
    except ModuleNotFoundError:
        return False
    if module == "SimpleITK":
        # plain SimpleITK has the same name and no elastix; looking must not import it beside itk
        from importlib.metadata import PackageNotFoundError, version

        try:
            return bool(version("SimpleITK-SimpleElastix"))
        except PackageNotFoundError:
            return False
    return True


def elastix_matrix(parameters: Sequence[Any], center: Sequence[Any]) -> np.ndarray:
    """ITK's matrix-offset parameters (LPS) as a RAS matrix.

    Args:
        parameters: D*D matrix entries row by row, then D translations, numbers or text.
        center: center of rotation, D numbers.

    Returns:
        ``(D+1, D+1)`` for ``A (x - center) + center + translation``.
    """
    middle = np.asarray(center, dtype=np.float64)
    dims = len(middle)
    values = np.asarray(parameters, dtype=np.float64)
    matrix = np.eye(dims + 1)
    matrix[:dims, :dims] = values[: dims * dims].reshape(dims, dims)
    matrix[:dims, dims] = values[dims * dims :] + middle - matrix[:dims, :dims] @ middle
    return lps_to_ras(matrix)


def _plain(image: MetaTensor) -> np.ndarray:
    return np.ascontiguousarray(image[0].detach().cpu().numpy(), dtype=np.float32)


def _bytes(image: np.ndarray) -> np.ndarray:
    low, high = np.percentile(image, [0.5, 99.5])
    return (np.clip((image - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)


def _itk_image(image: MetaTensor) -> Any:
    import itk

    spacing, origin, direction = itk_lattice(Grid.of(image))
    made = itk.image_from_array(np.ascontiguousarray(_plain(image).T))
    made.SetSpacing(spacing.tolist())
    made.SetOrigin(origin.tolist())
    made.SetDirection(itk.matrix_from_array(np.ascontiguousarray(direction)))
    return made


def _ants_image(image: MetaTensor) -> Any:
    import ants

    spacing, origin, direction = itk_lattice(Grid.of(image))
    return ants.from_numpy(_plain(image), origin=origin.tolist(), spacing=spacing.tolist(), direction=direction)
