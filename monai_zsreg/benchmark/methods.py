# SPDX-License-Identifier: Apache-2.0
"""The methods under test, ours and others, each in a process of its own.

Wheels that wrap ITK crash one another in one process; a method that crashes ends its own process alone; and memory is
that of one method. The clock starts when the method's own images are made.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from monai_zsreg.benchmark.volumes import Volume, foreground
from monai_zsreg.errors import RegistrationError

__all__ = ["LEVELS", "Method", "Task", "easy_pair", "make_methods", "none", "ours", "prepare_function", "timed"]

LEVELS = (0.5, 0.9, 0.95)  # of the intervals that are checked
_TOO_LONG = 900.0  # seconds

Answer = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a method is asked for."""

    start: str = ""  # where it starts; of ours the preset, options after commas (``robust,search=none``)
    transform: str = "affine"  # or rigid
    threads: int = 2
    seed: int = 0
    device: str | None = None  # where ours runs; None for its own choice
    vgg19_weights: str | None = None  # for the presets of ours that need them


def ours(fixed: Volume, moving: Volume, task: Task) -> Callable[[], tuple[np.ndarray, Callable[[], Answer]]]:
    """A preset of ``monai_zsreg.register``, with what it says of itself beside the matrix."""
    import torch

    from monai_zsreg import register
    from monai_zsreg.io.images import load_image

    torch.set_num_threads(task.threads)
    images = [load_image(image.values, affine=image.affine) for image in (fixed, moving)]
    preset, *more = task.start.split(",")
    options: dict[str, Any] = dict(item.split("=", 1) for item in more)
    options |= {"device": task.device, "vgg19_weights": task.vgg19_weights, "seed": task.seed}

    def run() -> tuple[np.ndarray, Callable[[], Answer]]:
        result = register(*images, preset=preset, transform=task.transform, **options)
        return result.affine, lambda: _own_word(result, fixed)

    return run


def _own_word(result: Any, fixed: Volume) -> Answer:
    """Verdict, and how far off the result may be at one random point of the foreground."""
    answer: Answer = {"verdict": result.verdict, "score": float(result.score), "reasons": result.reasons}
    if result.covariance is not None:
        inside = fixed.points(foreground(fixed.values))
        point = inside[np.random.default_rng(len(inside)).integers(len(inside))][None]
        bounds = {str(level): float(result.uncertainty_at(point, level)[0]) for level in LEVELS}
        answer |= {"point": point[0].tolist(), "spread": float(result.uncertainty_at(point)[0]), "bounds": bounds}
    return answer


def none(fixed: Volume, moving: Volume, task: Task) -> Callable[[], np.ndarray]:
    """What the headers say."""
    return lambda: np.eye(fixed.dims + 1)


def prepare_function(family: str) -> Callable[[Volume, Volume, Task], Callable[[], Any]]:
    """A method's ``prepare``, see `monai_zsreg.benchmark.peers`; ImportError where it is not installed."""
    own: dict[str, Callable[[Volume, Volume, Task], Callable[[], Any]]] = {"ours": ours, "none": none}
    return own.get(family) or importlib.import_module(f"monai_zsreg.benchmark.peers.{family}").prepare


class Method:
    """One method at one start, in a process that begins when it is first needed.

    Args:
        family: ``ours``, ``none`` or a key of `PEERS`.
        task: start, threads, device, seed.
        dims: what it can register.
    """

    fresh = False  # a new process for each registration, so that its memory is known

    def __init__(self, family: str, task: Task, dims: tuple[int, ...] = (2, 3)) -> None:
        self.family, self.task, self.dims = family, task, dims
        self.name = f"{family}{':' if family == 'ours' else '/'}{task.start}".rstrip("/")
        self._process: Any = None

    def missing(self) -> str | None:
        """Why the method cannot run here; None where it can."""
        answer = self.register(*easy_pair(min(self.dims)))
        return answer["failure"] if answer.get("cannot_run") else None

    def register(self, fixed: Volume, moving: Volume, transform: str = "affine") -> Answer:
        """Register in the method's process: ``matrix``, ``seconds``, ``peak_mib`` and what the method has to add; or
        ``failure``, with ``cannot_run`` where it is not these images that the method cannot do."""
        if self._process is None:
            context = get_context("spawn")
            self._pipe, end = context.Pipe()
            self._process = context.Process(target=_serve, args=(end, self.family), daemon=True)
            self._process.start()
            end.close()
        try:
            self._pipe.send((fixed, moving, replace(self.task, transform=transform)))
            answer: Answer = {"failure": f"longer than {_TOO_LONG:g} s"}
            if self._pipe.poll(_TOO_LONG):
                answer = self._pipe.recv()
                if not self.fresh:
                    return answer
        except (EOFError, OSError):
            self._process.join()
            answer = {"failure": f"its process ended with status {self._process.exitcode}"}
        self.close()
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Any, family: str) -> None:
    """Answer tasks until the other end closes."""
    # what libraries print is not ours, and what ours warns of is in its answer
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    warm: set[int] = set()
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            fixed, moving, task = pipe.recv()
            try:
                prepare = prepare_function(family)
                if fixed.dims not in warm:
                    # so that libraries are loaded and threads exist when the clock starts
                    with suppress(RuntimeError):
                        prepare(*easy_pair(fixed.dims), task)()
                    warm.add(fixed.dims)
                answer = timed(prepare(fixed, moving, task))
            except Exception as error:  # a failed registration is a result
                text = f"{type(error).__name__}: {str(error).strip()}"
                answer = {"failure": text[:300], "cannot_run": _cannot_run(error)}
            pipe.send(answer)


def timed(run: Callable[[], Any]) -> Answer:
    unit = 2**20 if sys.platform == "darwin" else 1024
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = run()
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    matrix, more = found if isinstance(found, tuple) else (found, dict)
    return {"matrix": np.asarray(matrix), "seconds": seconds, "peak_mib": (after - before) / unit, **more()}


def _cannot_run(error: Exception) -> bool:
    absent = ("device", "preset", "regressor_weights", "transform", "vgg19_weights")
    return isinstance(error, ImportError) or (isinstance(error, RegistrationError) and error.argument in absent)


def easy_pair(dims: int) -> tuple[Volume, Volume]:
    """A small textured blob, and the same two voxels away."""
    axes = np.meshgrid(*[np.linspace(-1, 1, 96 if dims == 2 else 48)] * dims, indexing="ij")
    blob = np.sum([((a - 0.1 * i) * (1.2 + 0.3 * i)) ** 2 for i, a in enumerate(axes)], axis=0)
    texture = np.random.default_rng(0).normal(0, 0.05, blob.shape)
    image = (100 * (np.exp(-3 * blob) + texture) * (blob < 1)).astype(np.float32)
    return Volume(image, np.eye(dims + 1)), Volume(np.roll(image, 2, axis=0), np.eye(dims + 1))


def make_methods(specs: Sequence[str], task: Task) -> list[Method]:
    """Methods by name: ``family`` for all of its usual starts, ``family/start`` for one, ``ours:preset`` for ours.

    Raises:
        RegistrationError: an unknown name.
    """
    from monai_zsreg.benchmark.peers import PEERS

    methods: list[Method] = []
    for spec in specs:
        family, _, start = spec.replace(":", "/", 1).partition("/")
        peer = PEERS.get(family)
        if (family == "ours" and start) or (family == "none" and not start):
            methods.append(Method(family, replace(task, start=start)))
        elif peer is not None and (not start or start in peer.starts + peer.extra_starts):
            starts = (start,) if start else peer.starts
            methods += [Method(family, replace(task, start=s), peer.dims) for s in starts]
        else:
            raise RegistrationError("methods", spec, f"none, ours:<preset>, or of {sorted(PEERS)}")
    return methods
