# SPDX-License-Identifier: Apache-2.0
"""The deformable kind beside SyN, SyNQuick, elastix' B-spline, greedy and ConvexAdam.

    python -m monai_zsreg.benchmark.deformable DATA ... --output FOLDER

DATA are folders as in ``python -m monai_zsreg.benchmark``. Every method gets the same two images on one grid, the
moving one put there by our affine stage, and a process of its own. Rows:

- ``between``: two people, mean Dice of the labels that both have, of T1 and T1, and of T1 and T2 where there is one;
- ``known``: a smooth displacement of up to 10 mm, the other contrast simulated;
- ``resection``, ``resection masked``: up to 5 mm, and a cavity in the fixed image: errors within 10 mm of it and
  beyond 30 mm, without and with a mask (methods that take none are left out);
- ``rigid``: one head, turned by 8 degrees, noise of its own in each image: the displacement that is added.

Written to FOLDER: ``results.jsonl`` (the same command goes on where it stopped) and ``deformable.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from monai_zsreg.benchmark import damage, tables
from monai_zsreg.benchmark.methods import timed
from monai_zsreg.benchmark.perturb import about, turn
from monai_zsreg.benchmark.run import read_results
from monai_zsreg.benchmark.volumes import Volume, foreground, moved, read_volume, transformed
from monai_zsreg.geometry import Grid, flip_points
from monai_zsreg.io.displacement import read_displacement
from monai_zsreg.metrics import label_dice
from monai_zsreg.registration.displacement import determinant, map_points, sampled

__all__ = ["METHODS", "Trial", "main", "score", "trials"]


@dataclass(frozen=True)
class Trial:
    """Two images on one grid, and what is known of them. Fields ``[D, *shape]`` are mm, from fixed to moving, RAS."""

    fixed: Volume
    moving: Volume
    mask: np.ndarray | None = None  # where the fixed image counts
    truth: np.ndarray | None = None  # field
    regions: dict[str, np.ndarray] = field(default_factory=dict)  # where errors are measured
    labels: tuple[Volume, Volume, np.ndarray] | None = None  # fixed, moving, and the affine matrix between


# --------------------------------------------------------------------------------------------------------------------
# the methods: prepare(trial, threads) gives what is timed, which gives the field
# --------------------------------------------------------------------------------------------------------------------

Run = Callable[[], np.ndarray]


def _grid(image: Volume) -> Grid:
    return Grid(image.shape, torch.from_numpy(np.asarray(image.affine, dtype=np.float64)))


def _lps(vectors: np.ndarray) -> np.ndarray:
    """ITK's vectors ``[*reversed, D]`` as a field."""
    return flip_points(vectors).transpose(*range(vectors.ndim - 1, -1, -1)).astype(np.float32)


def _none(trial: Trial, threads: int) -> Run:
    return lambda: np.zeros((trial.fixed.dims, *trial.fixed.shape), dtype=np.float32)


def _ours(trial: Trial, threads: int) -> Run:
    from monai_zsreg import register
    from monai_zsreg.io.images import load_image

    images = [load_image(image.values, affine=image.affine) for image in (trial.fixed, trial.moving)]
    mask = None if trial.mask is None else load_image(trial.mask.astype(np.float32), affine=trial.fixed.affine)

    def run() -> np.ndarray:
        found = register(*images, transform="deformable", search="none", fixed_mask=mask)
        return sampled(partial(map_points, found.pull), _grid(trial.fixed)).displacement.numpy()

    return run


def _ants(trial: Trial, threads: int, kind: str) -> Run:
    ants, peer = import_module("ants"), import_module("monai_zsreg.benchmark.peers.ants")
    images = [peer._image(image) for image in (trial.fixed, trial.moving)]
    mask = None if trial.mask is None else peer._image(Volume(trial.mask, trial.fixed.affine))

    def run() -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="zsreg-") as folder:
            options = {"type_of_transform": kind, "mask": mask, "outprefix": f"{folder}/", "random_seed": 1}
            done = ants.registration(*images, initial_transform="Identity", **options)
            return read_displacement(next(p for p in done["fwdtransforms"] if p.endswith("Warp.nii.gz")))[0].numpy()

    return run


def _elastix(trial: Trial, threads: int) -> Run:
    itk, peer = import_module("itk"), import_module("monai_zsreg.benchmark.peers.elastix")
    images = [peer._image(image) for image in (trial.fixed, trial.moving)]
    parameters = itk.ParameterObject.New()
    parameters.AddParameterMap({**parameters.GetDefaultParameterMap("bspline"), "WriteResultImage": ["false"]})

    def run() -> np.ndarray:
        method = itk.ElastixRegistrationMethod.New(*images, parameter_object=parameters, number_of_threads=threads)
        if trial.mask is not None:
            mask = itk.image_from_array(np.ascontiguousarray(trial.mask.T.astype(np.uint8)))
            mask.CopyInformation(images[0])
            method.SetFixedMask(mask)
        method.Update()
        shown = itk.TransformixFilter.New(images[1], transform_parameter_object=method.GetTransformParameterObject())
        shown.ComputeDeformationFieldOn()
        shown.Update()
        return _lps(itk.array_from_image(shown.GetOutputDeformationField()))

    return run


def _greedy(trial: Trial, threads: int, options: str) -> Run:
    greedy, peer = import_module("picsl_greedy").Greedy3D(), import_module("monai_zsreg.benchmark.peers")
    images = {name: peer.sitk_image(getattr(trial, name)) for name in ("fixed", "moving")}
    command = f"-d 3 -i fixed moving -o found -n 100x50x10 -threads {threads} -V 0 {options}"
    if trial.mask is not None:
        images["mask"] = peer.sitk_image(Volume(trial.mask, trial.fixed.affine))
        command += " -gm mask"

    def run() -> np.ndarray:
        greedy.execute(command, found=None, **images)
        return _lps(import_module("SimpleITK").GetArrayFromImage(greedy["found"]))

    return run


def _convex(trial: Trial, threads: int) -> Run:
    find = import_module("convexAdam.convex_adam_MIND").convex_adam_pt
    if trial.mask is not None:
        raise NotImplementedError("run without masks")

    def run() -> np.ndarray:
        found = find(trial.fixed.values.copy(), trial.moving.values.copy(), device=torch.device("cpu"))
        return np.einsum("ij,...j->i...", trial.fixed.affine[:-1, :-1], found).astype(np.float32)

    return run


METHODS: dict[str, Callable[[Trial, int], Run]] = {
    "ours": _ours,
    "affine alone": _none,
    "SyN": partial(_ants, kind="SyNOnly"),
    "SyNQuick": partial(_ants, kind="antsRegistrationSyNQuick[so]"),
    "elastix B-spline": _elastix,
    "greedy NCC": partial(_greedy, options="-m NCC 2x2x2 -s 1.5vox 0.5vox"),
    "greedy NMI": partial(_greedy, options="-m NMI"),
    "ConvexAdam": _convex,
}


def _work(name: str, trial: Trial, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return timed(METHODS[name](trial, threads))


# --------------------------------------------------------------------------------------------------------------------
# the trials
# --------------------------------------------------------------------------------------------------------------------


def trials(folders: Sequence[Path], count: int) -> Iterator[tuple[str, str, Callable[[], Trial]]]:
    """Row, name and maker of at most ``count`` trials of each row and folder."""
    for folder in folders:
        people = [path.parent for path in sorted(folder.glob("*/t1.nii.gz"))]
        labeled = [path for path in people if (path / "seg.nii.gz").exists()]
        # each is fixed before one is for the second time
        pairs = [
            (one, labeled[(k + s) % len(labeled)]) for s in range(1, len(labeled)) for k, one in enumerate(labeled)
        ]
        for two in ("t1", "t2"):
            for one, other in pairs[:count]:
                if (other / f"{two}.nii.gz").exists() and _many(one, other):
                    name = f"{one.name}-{other.name}"
                    yield f"between {folder.name} t1-{two}", name, partial(_between, one, other, two)
        for person in [path for path in people if (path / "mask.nii.gz").exists()][:count]:
            for row in ("known", "resection", "resection masked", "rigid"):
                yield row, f"{folder.name}/{person.name}", partial(_made, person, row)


def _many(one: Path, other: Path) -> bool:
    """A lesion mask says nothing about two people's anatomy."""
    labels = [read_volume(path / "seg.nii.gz").values for path in (one, other)]
    return len(np.intersect1d(labels[0], labels[1])) >= 8


def _between(one: Path, other: Path, contrast: str) -> Trial:
    from monai_zsreg import register

    paths = one / "t1.nii.gz", other / f"{contrast}.nii.gz"
    fixed, moving = map(read_volume, paths)
    affine = register(*paths).affine
    labels = read_volume(one / "seg.nii.gz"), read_volume(other / "seg.nii.gz"), affine
    return Trial(fixed, moved(moving, fixed.shape, fixed.affine, affine), labels=labels)


def _made(person: Path, row: str) -> Trial:
    moving, mask = (read_volume(person / f"{name}.nii.gz") for name in ("t1", "mask"))
    brain = mask.values > 0
    rng = np.random.default_rng(0)
    noisy = partial(damage.add_noise, fraction=0.02, rng=rng)
    if row == "rigid":
        motion = about(moving.center, turn(8.0, 3, rng), np.array([3.0, -5.0, 4.0]))
        shown = moved(moving, moving.shape, moving.affine, np.linalg.inv(motion))
        shown = Volume(noisy(shown.values, brain), moving.affine)
        fixed = Volume(noisy(moving.values, brain), moving.affine)
        from monai_zsreg import register
        from monai_zsreg.io.images import load_image

        found = register(*[load_image(v.values, affine=v.affine) for v in (fixed, shown)], transform="rigid").affine
        return Trial(
            fixed,
            moved(shown, fixed.shape, fixed.affine, found),
            truth=np.zeros((3, *fixed.shape), dtype=np.float32),
            regions={"": brain},
        )
    tissue = person / "tissue.nii.gz"
    values = moving.values
    if row == "known":
        values = damage.simulated_t2(values, brain, read_volume(tissue).values if tissue.exists() else None)
    smooth = [ndimage.gaussian_filter(rng.standard_normal(moving.shape), 16 / moving.spacing) for _ in range(3)]
    truth = np.stack(smooth) * (10.0 if row == "known" else 5.0) / np.linalg.norm(smooth, axis=0)[brain].max()
    steps = np.einsum("ij,j...->i...", np.linalg.inv(moving.affine[:-1, :-1]), truth)
    where = np.indices(moving.shape) + steps
    seen = ndimage.map_coordinates(brain.astype(np.float32), where, order=1) > 0.5
    bent = Volume(ndimage.map_coordinates(values, where, order=3).astype(np.float32), moving.affine)
    regions, counts = {"": seen}, None
    if row != "known":
        cut = damage.blacken_cavity(bent, seen, rng)
        hole = cut.values != bent.values
        away = ndimage.distance_transform_edt(~hole, sampling=moving.spacing)
        regions = {"near": seen & (away > 0) & (away <= 10), "far": seen & (away > 30)}
        bent, counts = cut, ~hole if row.endswith("masked") else None
    fixed = Volume(noisy(bent.values, seen), moving.affine)
    return Trial(fixed, Volume(noisy(moving.values, brain), moving.affine), counts, truth, regions)


def score(trial: Trial, found: np.ndarray) -> dict[str, float]:
    """Dice, errors (mm, median and 95 % of each region) and folded voxels of a field."""
    steps = np.einsum("ij,j...->i...", np.linalg.inv(trial.fixed.affine[:-1, :-1]), found)
    folded = determinant(torch.from_numpy(steps)).numpy() <= 0
    result = {"folded": float(folded.sum()), "folded inside": float((folded & foreground(trial.fixed.values)).sum())}
    if trial.labels is not None:
        fixed, moving, affine = trial.labels
        place = np.moveaxis(np.indices(fixed.shape) + steps, 0, -1)
        index = transformed(np.linalg.inv(moving.affine) @ affine @ fixed.affine, place)
        shown = ndimage.map_coordinates(moving.values, np.moveaxis(index, -1, 0), order=0)
        still = np.where(np.isin(fixed.values, moving.values), fixed.values, 0)
        result["dice"] = label_dice(torch.from_numpy(still), torch.from_numpy(shown))
    for name, region in trial.regions.items():
        assert trial.truth is not None
        gap = np.linalg.norm((found - trial.truth)[:, region], axis=0)
        result |= {
            f"{name} median".strip(): float(np.median(gap)),
            f"{name} 95 %".strip(): float(np.quantile(gap, 0.95)),
        }
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    formatter = argparse.RawDescriptionHelpFormatter
    module = "python -m monai_zsreg.benchmark.deformable"
    parser = argparse.ArgumentParser(module, description=__doc__, formatter_class=formatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--rows", nargs="+", help="beginnings of rows' names; default: all")
    parser.add_argument("--cases", type=int, default=2, help="of each row and folder; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--redo", nargs="*", default=[], help="methods to run again")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "results.jsonl"
    have = {(r["case"], r["method"]) for r in read_results(log) if r["method"] not in args.redo}
    notes: dict[str, None] = {}
    for row, name, make in trials(args.data, args.cases):
        case = f"{row}: {name}"
        due = [method for method in args.methods if (case, method) not in have]
        if not due or (args.rows and not row.startswith(tuple(args.rows))):
            continue
        trial = make()
        for method in due:
            # libraries crash one another in one process, and memory is that of one method
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                try:
                    answer = pool.submit(_work, method, trial, args.threads).result()
                except Exception as error:  # a failed registration is a result
                    notes[f"{method} in {row}: {type(error).__name__}: {str(error).strip()[:200]}"] = None
                    continue
            line = {
                "case": case,
                "row": row,
                "method": method,
                "seed": 0,
                **score(trial, answer.pop("matrix")),
                **answer,
            }
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    _write(args.output / "deformable.md", read_results(log), args.threads, list(notes))
    print(args.output / "deformable.md")
    return 0


def _write(path: Path, results: list[dict[str, Any]], threads: int, notes: list[str]) -> None:
    cells = []
    for (row, method), group in itertools.groupby(
        sorted(results, key=lambda r: (r["row"], list(METHODS).index(r["method"]))), lambda r: (r["row"], r["method"])
    ):
        table = pd.DataFrame(list(group)).dropna(axis="columns", how="all")
        known = [name for name in table if name == "dice" or name.endswith(("median", "95 %"))]
        line = {"row": row, "method": method, "n": len(table)}
        line |= {"measure": ", ".join(known), "value": ", ".join(f"{table[name].mean():.3f}" for name in known)}
        line |= {"folded": f"{table['folded'].max():.0f}", "folded inside": f"{table['folded inside'].max():.0f}"}
        cells.append(line | {"seconds": f"{table['seconds'].median():.1f}", "MiB": f"{table['peak_mib'].max():.0f}"})
    text = ["# Benchmark of deformable registration", "", *tables.machine(threads), ""]
    text += ["Means over n trials (folded voxels, MiB: the largest; seconds: the median); errors in mm.", ""]
    text += [*tables.markdown(pd.DataFrame(cells)), "", *[f"- left out: {note}" for note in notes]]
    tables.write_lines(path, text)


if __name__ == "__main__":
    sys.exit(main())
