# SPDX-License-Identifier: Apache-2.0
"""The methods under test, ours and others, each in a process of its own.

Wheels that wrap ITK crash one another in one process; a method that crashes ends its own process alone; and memory is
that of one method. The clock starts when the method's own images are made.
"""

from __future__ import annotations

import importlib
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from monai_zsreg.benchmark.peers import PEERS, Task
from monai_zsreg.benchmark.volumes import Volume
from monai_zsreg.errors import RegistrationError, require

_ALL = {2: math.inf, 3: math.inf}  # cases that a fast method runs, by number of dimensions
_TOO_LONG = 900.0  # seconds

_SLOW = ("ours:paper", "ours:keypoints")  # of ours, in 3D
METHODS = ("ours:robust", *_SLOW, *[name for name, peer in PEERS.items() if peer.starts])
# family and start of deformable methods, by their names in the table
DEFORMABLE = {name: (family, start) for family, peer in PEERS.items() for name, start in peer.deformable.items()}

Answer = dict[str, Any]


class Method:
    """One method at one start, in a process that begins when it is first needed.

    Args:
        family: a key of `PEERS`.
        task: start, threads, device, seed.
        cases: how many of a row it runs, by number of dimensions.
        name: in the tables; of family and start if None.
    """

    fresh = False  # a new process for each registration, so that its memory is known

    def __init__(self, family: str, task: Task, cases: Mapping[int, float] = _ALL, name: str | None = None) -> None:
        self.family, self.task, self.cases = family, task, cases
        self.name = name or f"{family}{':' if family == 'ours' else '/'}{task.start}".rstrip("/")
        self._process: Any = None

    def missing(self) -> str | None:
        """Why the method cannot run here; None where it can."""
        answer = self.register(*easy_pair(min(self.cases)))
        return answer["failure"] if answer.get("cannot_run") else None

    def register(
        self, fixed: Volume, moving: Volume, transform: str = "affine", mask: np.ndarray | None = None
    ) -> Answer:
        """Register in the method's process: ``matrix`` (of a deformable transform its displacements), ``seconds``,
        ``peak_mib`` and what the method has to add; or ``failure``, with ``cannot_run`` where it is not these images
        that the method cannot do."""
        if self._process is None:
            context = get_context("spawn")
            self._pipe, end = context.Pipe()
            self._process = context.Process(target=_serve, args=(end, self.family), daemon=True)
            self._process.start()
            end.close()
        try:
            self._pipe.send((fixed, moving, replace(self.task, transform=transform, mask=mask)))
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
                prepare = importlib.import_module(f"monai_zsreg.benchmark.peers.{family}").prepare
                if fixed.dims not in warm:
                    # so that libraries are loaded and threads exist when the clock starts, for which affine will do
                    kind = "affine" if task.transform == "deformable" else task.transform
                    with suppress(RuntimeError):
                        prepare(*easy_pair(fixed.dims), replace(task, transform=kind, mask=None))()
                    warm.add(fixed.dims)
                answer = _timed(prepare(fixed, moving, task))
            except Exception as error:  # a failed registration is a result
                text = f"{type(error).__name__}: {str(error).strip()}"
                answer = {"failure": text[:300], "cannot_run": _cannot_run(error)}
            pipe.send(answer)


def _timed(run: Callable[[], Any]) -> Answer:
    unit = 2**20 if sys.platform == "darwin" else 1024
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = run()
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    matrix, more = found if isinstance(found, tuple) else (found, dict)
    return {"matrix": np.asarray(matrix), "seconds": seconds, "peak_mib": (after - before) / unit, **more()}


def _cannot_run(error: Exception) -> bool:
    absent = ("device", "preset", "regressor_weights", "transform", "vgg19_weights")
    if isinstance(error, RegistrationError):
        return error.argument in absent
    return isinstance(error, (ImportError, NotImplementedError))


def easy_pair(dims: int) -> tuple[Volume, Volume]:
    """A small textured blob, and the same two voxels away."""
    axes = np.meshgrid(*[np.linspace(-1, 1, 96 if dims == 2 else 48)] * dims, indexing="ij")
    blob = np.sum([((a - 0.1 * i) * (1.2 + 0.3 * i)) ** 2 for i, a in enumerate(axes)], axis=0)
    texture = np.random.default_rng(0).normal(0, 0.05, blob.shape)
    image = (100 * (np.exp(-3 * blob) + texture) * (blob < 1)).astype(np.float32)
    return Volume(image, np.eye(dims + 1)), Volume(np.roll(image, 2, axis=0), np.eye(dims + 1))


def make_methods(specs: Sequence[str], task: Task) -> list[Method]:
    """Methods by name: ``family`` for all of its usual starts, ``family/start`` for one, ``ours:preset`` for ours; of
    a deformable task those of `DEFORMABLE`.

    Raises:
        RegistrationError: an unknown name.
    """
    methods: list[Method] = []
    for spec in specs:
        if task.transform == "deformable":
            require(spec in DEFORMABLE, "methods", spec, f"of {list(DEFORMABLE)}")
            family, start = DEFORMABLE[spec]
            methods.append(Method(family, replace(task, start=start), {3: math.inf}, spec))
            continue
        family, _, start = spec.replace(":", "/", 1).partition("/")
        peer = PEERS.get(family)
        starts = (start,) if start else peer.starts if peer else ()
        if not peer or not starts or not (family == "ours" or {*starts} <= {*peer.starts, *peer.extra_starts}):
            raise RegistrationError("methods", spec, f"ours:<preset>, or of {sorted({*PEERS} - {'ours'})}")
        methods += [Method(family, replace(task, start=s), dict.fromkeys(peer.cases, math.inf)) for s in starts]
    return methods


def default_caps(quick: bool) -> dict[tuple[str, int], float]:
    """How many cases of a row a slow method gets, by its name or family and the number of dimensions."""
    caps = {(name, dims): most[quick] for name, peer in PEERS.items() for dims, most in peer.cases.items()}
    caps |= {(name, 3): 0 if quick else 10 for name in _SLOW}
    return {key: most for key, most in caps.items() if most < math.inf}


def set_caps(methods: Sequence[Method], quick: bool, given: Sequence[str] = ()) -> None:
    """Limit slow methods to the first cases of a row: the default ones, and those ``given`` as ``ants:3=20``.

    Raises:
        RegistrationError: a text of another form.
    """
    caps = default_caps(quick)
    for text in given:
        try:
            key, number = text.split("=")
            name, dims = key.rsplit(":", 1)
            caps[name, int(dims)] = int(number)
        except ValueError as error:
            raise RegistrationError("cap", text, "METHOD:DIMS=N, such as ants:3=20") from error
    for m in methods:
        m.cases = {dims: caps.get((m.name, dims), caps.get((m.family, dims), most)) for dims, most in m.cases.items()}
