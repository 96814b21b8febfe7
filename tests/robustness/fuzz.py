# SPDX-License-Identifier: Apache-2.0
"""Pairs of small images with something wrong with them, by the thousand.

Every case is drawn from its number and the seed alone. It must register, or end in `RegistrationError` that names an
argument; where the truth is known, a wrong answer must not have the verdict PASS. ``python tests/robustness/fuzz.py
--cases 10000`` prints the counts and ends with 1 if anything else happened.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

import monai_zsreg
from monai_zsreg.errors import RegistrationError, RegistrationFailure, RegistrationWarning
from monai_zsreg.transforms import RegisterAffined

Rng = np.random.Generator

# what the package says of a pair; anything else that warns would leak to the user
KNOWN_WARNINGS = (RegistrationWarning,)
SECONDS = 120.0


# ------------------------------------------------------------------------------------------------------------ images


def blobs(rng: Rng, dims: int, size: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centers, widths and heights of a lopsided object in a field of view of ``size`` mm."""
    count = 14
    centers = rng.uniform(-0.28, 0.28, (count, dims)) * size
    centers[:, 0] += 0.06 * size * (centers[:, 1] > 0)
    return centers, rng.uniform(0.05, 0.13, count) * size, rng.uniform(0.3, 1.0, count)


def paint(field: tuple[np.ndarray, ...], points: np.ndarray) -> np.ndarray:
    values = np.zeros(points.shape[:-1])
    for center, width, height in zip(*field, strict=True):
        values += height * np.exp(-((points - center) ** 2).sum(-1) / (2 * width**2))
    return np.where(values > 0.12, values, 0.0)


def rotation(rng: Rng, dims: int, degrees: float) -> np.ndarray:
    generator = rng.normal(size=(dims, dims))
    generator = generator - generator.T
    generator *= math.radians(degrees) / max(np.linalg.norm(generator) / math.sqrt(2), 1e-9)
    return torch.matrix_exp(torch.from_numpy(generator)).numpy()


def header(rng: Rng, shape: tuple[int, ...], size: float) -> np.ndarray:
    """Index to world with any orientation code, for a field of view of about ``size`` around the origin."""
    dims = len(shape)
    turned = rotation(rng, dims, rng.choice([0.0, 15.0, 180.0])) @ np.eye(dims)[rng.permutation(dims)]
    affine = np.eye(dims + 1)
    affine[:dims, :dims] = turned @ np.diag(size / np.asarray(shape) * rng.choice([-1, 1], dims))
    affine[:dims, dims] = -affine[:dims, :dims] @ ((np.asarray(shape) - 1) / 2) + rng.uniform(-0.05, 0.05, dims) * size
    return affine


def world_points(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    dims = len(shape)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(float)
    return index @ affine[:dims, :dims].T + affine[:dims, dims]


def pair(rng: Rng) -> dict[str, Any]:
    """Two images of one object, and the truth between them."""
    dims = int(rng.integers(2, 4))
    size = float(rng.choice([40.0, 100.0, 250.0]))
    sides = [16, 24, 32, 48] if dims == 3 else [24, 40, 64, 96]
    field = blobs(rng, dims, size)
    truth = np.eye(dims + 1)
    truth[:dims, :dims] = rotation(rng, dims, rng.choice([0.0, 10.0, 90.0, 170.0])) * rng.uniform(0.9, 1.1)
    truth[:dims, dims] = rng.uniform(-0.1, 0.1, dims) * size
    images = {}
    for name in ("fixed", "moving"):
        shape = tuple(int(n) for n in rng.choice(sides, dims))
        affine = header(rng, shape, size)
        points = world_points(shape, affine)
        if name == "moving":
            back = np.linalg.inv(truth)
            points = points @ back[:dims, :dims].T + back[:dims, dims]
        values = paint(field, points)
        if name == "moving" and rng.random() < 0.5:
            values = np.where(values > 0, 1.6 - 0.8 * values, 0.0)
        values += rng.normal(0, rng.choice([0.0, 0.02]), shape)
        images[name] = [values * rng.choice([1.0, 1e-3, 1000.0]), affine]
    return {"dims": dims, "size": size, "truth": truth, "knows": True, **images}


# ------------------------------------------------------------------------------- what is wrong with the voxels

Spoil = Callable[[Rng, np.ndarray], np.ndarray]


def _part(values: float) -> Spoil:
    def spoil(rng: Rng, image: np.ndarray) -> np.ndarray:
        image = image.copy()
        image[tuple(slice(0, max(1, n // int(rng.integers(2, 8)))) for n in image.shape)] = values
        return image

    return spoil


def _axes(rng: Rng, image: np.ndarray) -> np.ndarray:
    return image[tuple(slice(0, int(rng.choice([1, 2, 3, 4, 5, n]))) for n in image.shape)]


def _bits(rng: Rng, image: np.ndarray) -> np.ndarray:
    kind = np.dtype(str(rng.choice(["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", ">f4", ">i2"])))
    scaled = image / max(float(np.abs(image).max()), 1e-30) * 100
    return (scaled.clip(0) if kind.kind == "u" else scaled).astype(kind)


VOXELS: dict[str, Spoil] = {
    "axes of a few voxels": _axes,
    "empty": lambda rng, image: np.zeros((0, *image.shape[1:])),
    "constant": lambda rng, image: np.full(image.shape, rng.choice([0.0, -3.0, 1e30])),
    "all NaN": lambda rng, image: np.full(image.shape, np.nan),
    "some NaN": _part(math.nan),
    "some infinite": _part(math.inf),
    "some minus infinite": _part(-math.inf),
    "some huge": _part(1e30),
    "negative": lambda rng, image: -image,
    "huge": lambda rng, image: image * 1e30,
    "beyond float32": lambda rng, image: image * 1e200,
    "tiny": lambda rng, image: image * 1e-30,
    "subnormal": lambda rng, image: image * 1e-310,
    "another type": _bits,
    "bool": lambda rng, image: image > np.median(image),
    "complex": lambda rng, image: image.astype(complex),
    "text": lambda rng, image: np.full(image.shape, "voxel"),
    "objects": lambda rng, image: np.full(image.shape, None),
    "one voxel": lambda rng, image: (np.arange(image.size) == image.size // 2).reshape(image.shape).astype(float),
    "noise": lambda rng, image: rng.normal(size=image.shape),
    "RGB": lambda rng, image: np.stack([image] * 3, -1),
    "4D": lambda rng, image: np.stack([image] * 2, -1)[..., None],
    "one dimension": lambda rng, image: image.ravel(),
    "scalar": lambda rng, image: np.float64(1.0) * image.sum(),
}
# the same picture to a reader of the values: the truth holds
HARMLESS = {"another type", "negative"}


# ------------------------------------------------------------------------------------ what is wrong with the header


def _scaled(factor: float) -> Callable[[Rng, np.ndarray], np.ndarray]:
    def spoil(rng: Rng, affine: np.ndarray) -> np.ndarray:
        affine = affine.copy()
        affine[: len(affine) - 1, int(rng.integers(0, len(affine) - 1))] *= factor
        return affine

    return spoil


def _entry(value: float) -> Callable[[Rng, np.ndarray], np.ndarray]:
    def spoil(rng: Rng, affine: np.ndarray) -> np.ndarray:
        affine = affine.copy()
        affine[tuple(rng.integers(0, len(affine), 2))] = value
        return affine

    return spoil


def _sheared(rng: Rng, affine: np.ndarray) -> np.ndarray:
    shear = np.eye(len(affine))
    shear[0, 1] = rng.choice([0.3, 1.0, 30.0])
    return affine @ shear


HEADERS: dict[str, Callable[[Rng, np.ndarray], np.ndarray]] = {
    "spacing zero": _scaled(0.0),
    "spacing tiny": _scaled(1e-12),
    "spacing huge": _scaled(1e12),
    "spacing 100 times": _scaled(100.0),
    "NaN in the header": _entry(math.nan),
    "infinity in the header": _entry(math.inf),
    "far away": lambda rng, a: a + np.eye(len(a), k=len(a) - 1) * 1e9,
    "all zero": lambda rng, a: np.zeros_like(a),
    "sheared": _sheared,
    "left-handed": lambda rng, a: a @ np.diag([-1.0, *[1.0] * (len(a) - 1)]),
    "last row": lambda rng, a: a + np.eye(len(a), k=1 - len(a)),
}


# ------------------------------------------------------------------------------------------ what is wrong with a file


def _write(path: Path, image: np.ndarray, affine: np.ndarray) -> None:
    full = np.eye(4)
    dims = len(affine) - 1
    full[:dims, :dims], full[:dims, 3] = affine[:dims, :dims], affine[:dims, dims]
    kind = image.dtype if image.dtype.kind in "iuf" and image.dtype.newbyteorder("=") in _NIFTI_TYPES else np.float32
    stored = image.astype(kind)
    nib.save(nib.Nifti1Image(stored if image.ndim > 2 else stored[..., None], full), path)


_NIFTI_TYPES = [np.dtype(t) for t in ("u1", "i2", "i4", "f4", "f8")]


def _cut(path: Path, rng: Rng) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * rng.random())])


def _bytes_changed(path: Path, rng: Rng) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    for place in rng.integers(0, 352, int(rng.integers(1, 12))):
        content[place] = int(rng.integers(0, 256))
    path.write_bytes(gzip.compress(bytes(content)))


def _forms_disagree(path: Path, rng: Rng) -> None:
    image = nib.load(path)
    image.get_fdata()
    other = image.affine.copy()
    other[:3, 3] += 30
    image.set_qform(other, code=int(rng.integers(0, 5)))
    image.set_sform(image.affine, code=int(rng.integers(0, 5)))
    nib.save(image, path.with_name("again.nii.gz"))
    os.replace(path.with_name("again.nii.gz"), path)


def _folder(path: Path, rng: Rng) -> None:
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "notes.txt").write_text("no image")


def _link(target: str) -> Callable[[Path, Rng], None]:
    def spoil(path: Path, rng: Rng) -> None:
        place = path.with_name("elsewhere.nii.gz")
        os.replace(path, place)
        path.symlink_to({"good": place.name, "missing": "nothing.nii.gz", "itself": path.name}[target])

    return spoil


FILES: dict[str, Callable[[Path, Rng], None]] = {
    "cut off": _cut,
    "bytes of the header changed": _bytes_changed,
    "text": lambda path, rng: path.write_text("this is no image\n" * 50) and None,
    "nothing in it": lambda path, rng: path.write_bytes(b"") and None,
    "not compressed": lambda path, rng: path.write_bytes(gzip.decompress(path.read_bytes())) and None,
    "missing": lambda path, rng: path.unlink(),
    "unreadable": lambda path, rng: path.chmod(0),
    "folder": _folder,
    "forms disagree": _forms_disagree,
    "link": _link("good"),
    "broken link": _link("missing"),
    "link to itself": _link("itself"),
}
NAMES = [
    "image.nii.gz",
    "with space.nii.gz",
    "größe-脳.nii.gz",
    "new\nline.nii.gz",
    "$HOME.nii.gz",
    "@image.nii.gz",
    "%s%n.nii.gz",
    "-rf.nii.gz",
    "'quoted\".nii.gz",
    "a" * 240 + ".nii.gz",
    "a" * 400 + ".nii.gz",
    "IMAGE.NII.GZ",
    "image.nii.gz ",
    "image",
    "image.mha",
]
# read as the same image by whoever reads it
FAITHFUL = {"link", "not compressed"}


# --------------------------------------------------------------------------------------------------------- arguments

ARGUMENTS: dict[str, list[Any]] = {
    "transform": ["rigid", "similarity", "affine", "elastic", "", None, 3],
    "search": ["global", "local", "none", "everywhere", None],
    "spacing": [None, 1.0, 0.0, -1.0, math.nan, math.inf, 1e-9, 1e9, "1", True],
    "seed": [0, 1, 2**63 - 1, -1, 2**63, 0.5, "0", None, True],
    "fixed_channel": [0, 0, -1, 5, 0.0, "0", None],
    "moving_channel": [0, 0, -1, 5, 0.0, "0", None],
    "rotations": [None, 40, 7, -1, 2.5, "many"],
    "blocks": [None, 32, 0, -5, math.nan],
    "device": [None, "cpu", "cuda:99", "tpu", "", 7],
    "preset": ["robust", "Robust", "", None, "@robust"],
    "initial": ["eye", "singular", "nan", "shape", "missing.tfm", "mirror", 5],
    "fixed_mask": ["ones", "zeros", "shape", "nan", "missing.nii.gz", "half"],
    "moving_mask": ["ones", "zeros", "shape", "nan", "missing.nii.gz", "half"],
    "features": ["mind", "sift", None],
    "unknown": [1],
}


def argument(name: str, value: Any, case: dict[str, Any]) -> Any:
    dims = case["dims"]
    if name == "initial":
        eye = np.eye(dims + 1)
        shown = {
            "eye": eye,
            "singular": eye * 0,
            "nan": eye * np.nan,
            "shape": np.eye(7),
            "mirror": np.diag([-1.0] + [1.0] * dims),
        }
        return shown.get(value, value)
    if name.endswith("_mask"):
        shape = np.shape(case[name.split("_")[0]][0])
        mask = np.ones(shape)
        if value == "half" and mask.ndim:
            mask[: len(mask) // 2] = 0
        shown = {"ones": mask, "half": mask, "zeros": mask * 0, "nan": mask * np.nan, "shape": np.ones((3, 3, 3))}
        return shown.get(value, value)
    return value


# -------------------------------------------------------------------------------------------------------------- cases


def draw(seed: int, number: int, folder: Path) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """What is wrong, the pair, and the arguments of `register`."""
    rng = np.random.default_rng([seed, number])
    case = pair(rng)
    wrong: list[str] = []
    options: dict[str, Any] = {}
    # now and then nothing is wrong, mostly one thing, at times several
    for _ in range(int(rng.choice([0, 1, 1, 1, 2, 3]))):
        group = rng.choice(["voxels", "header", "file", "argument", "dimensions"], p=[0.36, 0.2, 0.2, 0.2, 0.04])
        name = str(rng.choice(["fixed", "moving"]))
        if group == "voxels":
            kind = str(rng.choice(list(VOXELS)))
            if (
                np.asarray(case[name][0]).dtype.kind not in "biuf"
                or np.ndim(case[name][0]) != case["dims"]
                or not np.size(case[name][0])
            ):
                continue  # spoiled already
            case[name][0] = VOXELS[kind](rng, np.asarray(case[name][0], dtype=np.float64))
            case["knows"] &= kind in HARMLESS
        elif group == "header":
            kind = str(rng.choice(list(HEADERS)))
            case[name][1] = HEADERS[kind](rng, case[name][1])
            case["knows"] = False
        elif group == "file":
            kind = str(rng.choice([*FILES, "name", "name"]))
            case.setdefault("files", {})[name] = kind
            if kind == "name":
                kind = str(rng.choice(NAMES))
                case.setdefault("names", {})[name] = kind
            case["knows"] &= kind in FAITHFUL or kind in NAMES
        elif group == "argument":
            key = str(rng.choice(list(ARGUMENTS)))
            values = ARGUMENTS[key]
            value = values[int(rng.integers(len(values)))]
            kind, name = f"{key}={value!r}", ""
            options[key] = argument(key, value, case)
            case["knows"] &= key == "transform" or key == "seed"
        else:
            kind = "another dimension"
            case[name] = pair(rng)[name]
            case["knows"] = False
        wrong.append(f"{group}: {kind} {name}".strip())
    for name in ("fixed", "moving"):
        options[name] = _hand_over(rng, case, name, folder)
    return wrong, case, options


def _hand_over(rng: Rng, case: dict[str, Any], name: str, folder: Path) -> Any:
    """As a file, an array, a tensor or a MetaTensor."""
    image, affine = case[name]
    fault = case.get("files", {}).get(name)
    plain = np.asarray(image)
    storable = plain.dtype.kind in "biuf" and 1 < plain.ndim < 6 and plain.size
    if (fault or rng.random() < 0.25) and storable:
        base = folder / name
        base.mkdir()
        path = base / case.get("names", {}).get(name, f"{name}.nii.gz")
        draft = base / "draft.nii.gz"
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _write(draft, plain, np.asarray(affine, dtype=float))
            except Exception:  # a header that no file can hold
                return torch.zeros(1, 2, 2)
        try:
            os.replace(draft, path)
        except OSError:  # a name that is too long to exist
            return str(path)
        if fault and fault != "name":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                FILES[fault](path, rng)
        return rng.choice([str, Path])(path)
    if plain.dtype.kind not in "biufc":
        return image
    if rng.random() < 0.1:
        case["knows"] = False  # the header is left behind
        return plain
    try:
        tensor = torch.from_numpy(np.ascontiguousarray(plain.astype(plain.dtype.newbyteorder("="))))
    except TypeError:  # types that torch does not know
        tensor = torch.from_numpy(plain.astype(np.float64))
    if tensor.ndim and rng.random() < 0.2:
        # as a view with strides of its own
        tensor = torch.stack([tensor, tensor])[:1]
    else:
        tensor = tensor[None]
    return MetaTensor(tensor, affine=torch.as_tensor(np.asarray(affine), dtype=torch.float64))


def error_mm(case: dict[str, Any], matrix: np.ndarray) -> float:
    """Mean target registration error over the object."""
    dims = case["dims"]
    values, affine = case["fixed"]
    points = world_points(np.shape(values), affine)
    values = np.abs(np.asarray(values, dtype=float))
    points = points[values > 0.1 * values.max()]
    if len(points) == 0 or matrix.shape != case["truth"].shape:
        return math.inf
    gap = matrix - case["truth"]
    return float(np.linalg.norm(points @ gap[:dims, :dims].T + gap[:dims, dims], axis=1).mean())


def run_case(seed: int, number: int, base: Path) -> dict[str, Any]:
    """Run one case: ``outcome`` is a verdict, the argument of the error, or what must not be."""
    folder = base / f"case{number}"
    folder.mkdir(parents=True)
    wrong, case, options = draw(seed, number, folder)
    row: dict[str, Any] = {"number": number, "wrong": wrong}
    started = time.perf_counter()
    try:
        # recorded, not raised: ITK's SWIG modules crash where a warning is an error while they are imported
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = _register(case, options, number)
            moved = result.moved.as_tensor().float()
        row["outcome"] = result.verdict
        if not np.isfinite(result.affine).all() or np.linalg.det(result.affine) <= 0:
            row["outcome"] = "BAD: matrix"
        if not torch.isfinite(moved).all() and case["knows"]:
            row["outcome"] = "BAD: moved image"
        for warning in caught:
            if not issubclass(warning.category, KNOWN_WARNINGS) and "swig" not in str(warning.message).lower():
                row["outcome"] = f"BAD: warns {warning.category.__name__}: {str(warning.message)[:200]}"
        if case["knows"] and result.success:
            row["error"] = error_mm(case, result.affine)
            voxel = max(np.linalg.norm(a[:-1, :-1], axis=0).max() for _, a in (case["fixed"], case["moving"]))
            limit = max(2.0 * voxel, 0.02 * case["size"]) + (0.1 * case["size"] if "rigid" in str(wrong) else 0)
            row["right"] = bool(row["error"] < limit)
            if row["outcome"] == "PASS" and not row["right"]:
                row["outcome"] = "BAD: PASS and wrong"
        elif row["outcome"] == "PASS" and any(f"voxels: {kind}" in w for kind in MEANINGLESS for w in wrong):
            row["outcome"] = "BAD: PASS of nothing"
    except RegistrationError as error:
        row["outcome"] = f"error: {error.argument}"
        if not error.argument or not error.allowed:
            row["outcome"] = f"BAD: error without a cure: {error}"
    except RegistrationFailure:
        row["outcome"] = "FAIL"  # what the transform in a chain does with that verdict
    except Exception as error:
        row["outcome"] = f"BAD: {type(error).__name__}: {str(error)[:200]}"
        row["trace"] = traceback.format_exc()[-1500:]
    row["seconds"] = time.perf_counter() - started
    shutil.rmtree(folder, ignore_errors=True)
    return row


# nothing can be known of these
MEANINGLESS = ("constant", "all NaN", "noise", "one voxel")


def _register(case: dict[str, Any], options: dict[str, Any], number: int) -> Any:
    options = dict(options)
    fixed, moving = options.pop("fixed"), options.pop("moving")
    if number % 4 or not options.keys() <= {"transform", "seed", "search", "spacing"}:
        return monai_zsreg.register(fixed, moving, **options)
    if not isinstance(fixed, MetaTensor) or not isinstance(moving, MetaTensor):
        return monai_zsreg.register(fixed, moving, **options)
    # the way through a chain
    item = RegisterAffined("moving", "fixed", **options)({"fixed": fixed, "moving": moving})
    assert item["moving"].shape[1:] == fixed.shape[1:]
    return monai_zsreg.register(fixed, moving, **options)


# ----------------------------------------------------------------------------------------------------------- the run


def _serve(seed: int, requests: Any, answers: Any, base: str) -> None:
    torch.set_num_threads(1)
    if os.geteuid() == 0:  # root reads everything, and writes everywhere
        os.setegid(65534)
        os.seteuid(65534)
    while (number := requests.get()) is not None:
        answers.put(("started", number))
        answers.put(("done", run_case(seed, number, Path(base))))


class Worker:
    """A process that runs cases one after the other and may die of one."""

    def __init__(self, seed: int, base: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.requests, self.answers = context.Queue(), context.Queue()
        self.process = context.Process(target=_serve, args=(seed, self.requests, self.answers, str(base)), daemon=True)
        self.process.start()
        self.current: int | None = None
        self.since = time.monotonic()

    def give(self, number: int) -> None:
        self.current, self.since = number, time.monotonic()
        self.requests.put(number)

    def poll(self) -> dict[str, Any] | None:
        """A finished case; a dead or stuck process is one too."""
        while not self.answers.empty():
            kind, value = self.answers.get()
            if kind == "done":
                self.current = None
                return value
            self.since = time.monotonic()
        if self.current is not None:
            if not self.process.is_alive():
                return {"number": self.current, "outcome": f"BAD: crash, exit code {self.process.exitcode}"}
            if time.monotonic() - self.since > SECONDS:
                self.process.kill()
                return {"number": self.current, "outcome": f"BAD: hangs, over {SECONDS:g} s"}
        return None


def run(cases: int, seed: int = 0, workers: int = 2, first: int = 0, report: Path | None = None) -> list[dict]:
    """Run cases in processes of their own; a crash or a hang costs one case."""
    rows: list[dict[str, Any]] = []
    numbers = iter(range(first, first + cases))
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        base.chmod(0o777)
        crew = [Worker(seed, base) for _ in range(min(workers, cases))]
        busy = 0
        for worker in crew:
            worker.give(next(numbers))
            busy += 1
        while busy:
            time.sleep(0.01)
            for place, worker in enumerate(crew):
                row = worker.poll()
                if row is None:
                    continue
                if "wrong" not in row:
                    row["wrong"] = ["see the number"]
                    crew[place] = worker = Worker(seed, base)
                rows.append(row)
                if report is not None:
                    with report.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                number = next(numbers, None)
                if number is None:
                    busy -= 1
                    worker.current = None
                    worker.requests.put(None)
                else:
                    worker.give(number)
        for worker in crew:
            worker.process.join(10)
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    outcomes = collections.Counter(row["outcome"].split(":")[0] for row in rows)
    arguments = collections.Counter(row["outcome"] for row in rows if row["outcome"].startswith("error"))
    known = [row for row in rows if "right" in row]
    lines = [f"{len(rows)} cases: " + ", ".join(f"{n} {kind}" for kind, n in sorted(outcomes.items()))]
    lines += [f"  {n:6d}  {kind}" for kind, n in arguments.most_common()]
    right = collections.Counter((row["outcome"], row["right"]) for row in known)
    lines += [f"  {n:6d}  truth known, {verdict}, {'right' if ok else 'wrong'}" for (verdict, ok), n in right.items()]
    lines += [f"BAD {row['number']}: {row['outcome']} {row['wrong']}" for row in bad(rows)]
    return "\n".join(lines)


def bad(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["outcome"].startswith("BAD")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", type=Path, help="JSON lines, one a case")
    options = parser.parse_args()
    rows = run(options.cases, options.seed, options.workers, options.first, options.report)
    print(summary(rows))
    for row in bad(rows)[:20]:
        print("\n", row["number"], row.get("trace", ""))
    return int(bool(bad(rows)))


if __name__ == "__main__":
    sys.exit(main())
