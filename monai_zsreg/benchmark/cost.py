# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory against image size, each figure from a process of its own.

Memory is the peak resident size during the registration, less the level after imports, loading and a small warm-up.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import optional_import

from monai_zsreg.benchmark.data import foreground
from monai_zsreg.benchmark.peers import Method, Options, limit_threads, make_methods
from monai_zsreg.benchmark.perturb import PROTOCOLS, draw, resample
from monai_zsreg.benchmark.run import SUCCESS, _warm_up
from monai_zsreg.geometry import Grid
from monai_zsreg.metrics import foreground_tre

ndimage, _ = optional_import("scipy.ndimage")
psutil, _ = optional_import("psutil")
tqdm, _ = optional_import("tqdm", name="tqdm")

__all__ = ["SIZES", "PeakMemory", "measure", "phantom_pair", "read_cost", "run_cost"]

SIZES = {2: (128, 256, 512, 1024), 3: (64, 96, 128, 192, 240, 320)}
_FIELD_OF_VIEW = 240.0  # mm


def phantom_pair(dims: int, size: int, seed: int = 0) -> tuple[MetaTensor, MetaTensor, torch.Tensor]:
    """A layered object in two contrasts, the second one moved by the mild protocol.

    The object has the same shape and field of view (240 mm) at every size.

    Returns:
        Fixed and moving image ``[1, *spatial]``, and the truth ``(D+1, D+1)``.
    """
    rng = np.random.default_rng(seed)
    side = 64
    axes = np.meshgrid(*[np.linspace(-1, 1, side)] * dims, indexing="ij")
    widths = (0.62, 0.72, 0.58)[:dims]
    radius = np.sqrt(sum((a / w) ** 2 for a, w in zip(axes, widths, strict=True)))
    waves = ndimage.gaussian_filter(rng.normal(size=(side,) * dims), 2.5)
    level = np.clip(1.2 * (1 - radius) + 0.45 * waves / waves.std(), 0, 2) * (radius < 1)
    zoom = [size / side] * dims
    level = ndimage.zoom(level.astype(np.float32), zoom, order=1, mode="nearest", grid_mode=True)
    inside = ndimage.zoom((radius < 1).astype(np.float32), zoom, order=1, mode="nearest", grid_mode=True) > 0.5
    spacing = _FIELD_OF_VIEW / size
    affine = torch.diag(torch.tensor([spacing] * dims + [1.0], dtype=torch.float64))
    grid = Grid((size,) * dims, affine)
    one = np.where(inside, np.interp(level, [0, 0.5, 1.0, 2.0], [0.25, 0.5, 0.8, 1.0]), 0)
    two = np.where(inside, np.interp(level, [0, 0.5, 1.0, 2.0], [1.0, 0.6, 0.4, 0.7]), 0)
    drawn = draw(PROTOCOLS["mild", dims], grid, rng)
    moved = resample(two.astype(np.float32), grid, grid, drawn.matrix, order=1)
    full = torch.eye(4, dtype=torch.float64)
    full[:dims, :dims] = affine[:dims, :dims]
    images = [
        MetaTensor(torch.from_numpy((i + (i > 0) * rng.normal(0, 0.02, i.shape)).astype(np.float32))[None], affine=full)
        for i in (one, moved)
    ]
    return images[0], images[1], drawn.matrix


class PeakMemory:
    """Context manager: peak resident size of a process within the block, MiB above its beginning.

    On Linux the kernel's own high-water mark, reset at the beginning; elsewhere a thread that looks every 5 ms.

    Args:
        pid: the process; this one if None.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._process = psutil.Process(pid)

    def __enter__(self) -> PeakMemory:
        if self._process.pid == os.getpid():
            _give_back()  # what is freed within the block would hide as much of the block's own
        self._start = self._process.memory_info().rss
        self._peak = self._start
        self._kernel = _reset_high_water(self._process.pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if not self._kernel:
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self._kernel:
            self._peak = _high_water(self._process.pid)
        else:
            self._stop.set()
            self._thread.join()
        self.mib = max(0.0, (self._peak - self._start) / 2**20)


def _give_back() -> None:
    """Free what nothing refers to any more, and return freed memory to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_high_water(pid: int) -> bool:
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        return _high_water(pid) > 0
    except OSError:
        return False


def _high_water(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(method: Method, dims: int, size: int, repeats: int) -> dict[str, Any]:
    """Register one phantom pair in this process.

    Args:
        method: under test.
        dims: 2 or 3.
        size: voxels a side.
        repeats: timed runs; the median counts. The memory is the first one's.
    """
    fixed, moving, truth = phantom_pair(dims, size)
    result: dict[str, Any] = {"method": method.name, "dims": dims, "size": size, "failure": ""}
    try:
        images = method.prepare(fixed, moving)
        _warm_up(method, dims)
        images = method.prepare(fixed, moving)
        with PeakMemory(method.pid) as memory:
            matrix, first = method.timed(images)
        seconds = [first] + [method.timed(images)[1] for _ in range(repeats - 1)]
        inside = torch.from_numpy(foreground(fixed[0].numpy()))[None]
        tre = foreground_tre(matrix, truth, fixed, inside)["mean"]
        result |= {"seconds": float(np.median(seconds)), "peak_mib": memory.mib, "tre": tre, "success": tre < SUCCESS}
    except Exception as error:  # a method that cannot do a size has no figures there
        result["failure"] = f"{type(error).__name__}: {str(error).strip()}"[:300]
    finally:
        method.close()
    return result


def read_cost(path: Path) -> list[dict[str, Any]]:
    """Results of `run_cost`'s file; none where it does not exist. A half-written last line is passed over."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def run_cost(
    methods: Sequence[Method], options: Options, sizes: dict[int, Sequence[int]], output: Path, limit: float = 900.0
) -> list[dict[str, Any]]:
    """Measure every method at every size, each in a fresh process; what ``output`` holds is not measured again.

    Args:
        methods: under test.
        options: what they share.
        sizes: voxels a side by number of dimensions.
        output: JSON-lines file that results are appended to.
        limit: seconds after which a process is ended; its failure says so.
    """
    done = read_cost(output)
    have = {(r["method"], r["dims"], r["size"]) for r in done}
    jobs = [
        (d, s, m) for d, ss in sizes.items() for s in ss for m in methods if d in m.dims and (m.name, d, s) not in have
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    for dims, size, method in (bar := tqdm(jobs, unit="run")):
        bar.set_description(f"{method.name} {size}^{dims}")
        order = {"method": method.name, "dims": dims, "size": size, "options": asdict(options)}
        command = [sys.executable, "-m", "monai_zsreg.benchmark.cost", json.dumps(order)]
        result: dict[str, Any] = {"method": method.name, "dims": dims, "size": size}
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            answers = [line[2:] for line in ran.stdout.splitlines() if line.startswith("@@")]
            result |= (
                json.loads(answers[0])
                if answers
                else {"failure": f"status {ran.returncode}: {ran.stderr.strip()[-200:]}"}
            )
        except subprocess.TimeoutExpired:
            result["failure"] = f"longer than {limit:g} s"
        done.append(result)
        with open(output, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    return done


def _child(order: dict[str, Any]) -> dict[str, Any]:
    options = Options(**order["options"])
    limit_threads(options.threads)
    methods, missing = make_methods([order["method"]], options)
    if missing:
        return {"failure": missing[0]}
    repeats = 3 if order["size"] ** order["dims"] <= 2**20 else 1
    return measure(methods[0], order["dims"], order["size"], repeats)


if __name__ == "__main__":
    # set before torch's own pool exists
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", str(json.loads(sys.argv[1])["options"]["threads"]))
    print("@@" + json.dumps(_child(json.loads(sys.argv[1]))), flush=True)
