# SPDX-License-Identifier: Apache-2.0
"""Array transforms: register a moving image, apply a known matrix or deformation, save a matrix.

An image is put on the fixed grid in two steps: its header moves by the inverse of the pull matrix T
(``affine = inv(T) @ affine``), then its voxels are resampled to the fixed grid. The header edit acts on the world side
of the affine and pending (lazy) operations act on its index side, so the two commute: lazily, the edit is made at once
and the resampling joins whatever is pending. Both are one entry in the trace, which holds the native header;
``inverse`` resamples back and puts that header back as it was. A deformation is no matrix that could be merged with
what is pending, so it is never lazy: what is pending is carried out first.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.data import FolderLayout, MetaTensor, get_track_meta
from monai.transforms import SpatialResample, Transform
from monai.transforms.lazy.functional import apply_pending
from monai.utils import GridSampleMode, GridSamplePadMode, LazyAttr, MetaKeys, SpaceKeys, TraceKeys, convert_to_tensor
from monai.utils.misc import ImageMetaKey
from torch import Tensor

from monai_zsreg.errors import RegistrationError, RegistrationFailure, RegistrationWarning
from monai_zsreg.geometry import Grid, checked_affine, checked_matrix, moved_header
from monai_zsreg.io import read_transform, write_transform
from monai_zsreg.io.transforms import FORMATS
from monai_zsreg.registration import DEFAULT_PRESET, Prepared, RegistrationResult, check_options, register
from monai_zsreg.registration.deformable import DEFORMABLE
from monai_zsreg.registration.displacement import Deformation, move
from monai_zsreg.registration.engine import TRANSFORMS
from monai_zsreg.registration.prepared import is_number
from monai_zsreg.resample import MODES, outside_value

#: what a registered image carries in its ``meta``
AFFINE_KEY = "registration_affine"
VERDICT_KEY = "registration_verdict"
REASONS_KEY = "registration_reasons"

_ON_FAILURE = ("raise", "warn", "ignore")

# in a trace
_NATIVE_META, _MAP = "native_meta", "map"
_SPLINE_ORDERS = range(6)
# lazily, zeros serve as background where they are this near to it, as a fraction of the range of intensities
_NEAR = 0.05


class ApplyAffineRegistration(SpatialResample):
    """Put a moving image on the fixed image's grid with a known matrix or deformation, in one interpolation.

    Lazy execution (of matrices) and inversion work.

    The result has the fixed image's affine and other metadata, the moving image's file name, and the matrix as
    ``meta["registration_affine"]`` (float64 tensor, ``(D+1, D+1)``).

    ``inverse`` puts voxels that live on the fixed grid (the image, or through ``Invertd`` a segmentation predicted
    there) back on the native grid of the moving image, with its metadata as it was, so without this matrix; what lies
    outside of the fixed grid gets the background of what is inverted, for labels 0.

    Lazy execution: MONAI carries out all pending operations with the interpolation and padding that the last of them
    states. This transform does, MONAI's own (1.6.1) do not and then get bilinear and border. So where a lazy transform
    follows, such as ``RandAffined``, tell ``Compose``:
    ``overrides={"label": {"mode": "nearest", "padding_mode": "zeros"}, "image": {"padding_mode": "zeros"}}``.

    Args:
        mode: ``"bilinear"``, ``"nearest"`` (labels: an exact lookup), ``"bicubic"`` or a spline order 0 to 5 (needs
            SciPy). In 3D ``"bicubic"`` is for deformations only, spline orders are for matrices only.
        padding_mode: what lies outside the moving image: ``"zeros"``, which stands for ``fill_value``, or, for
            matrices, ``"border"`` or ``"reflection"``.
        fill_value: value outside the moving image with padding mode ``"zeros"``; None for the image's own background,
            such as -1024 in CT (see `monai_zsreg.resample.outside_value`). MONAI's lazy resampling knows no value but
            0: where another is wanted, or the background is not near 0, this transform is eager even when execution is
            lazy, and carries out what is pending first.
        lazy: whether to execute lazily by default.

    Raises:
        RegistrationError: a wrong argument.
    """

    def __init__(
        self,
        mode: str | int = "bilinear",
        padding_mode: str = "zeros",
        fill_value: float | None = None,
        lazy: bool = False,
    ) -> None:
        super().__init__(
            mode=_check_mode(mode),
            padding_mode=_check_padding_mode(padding_mode),
            align_corners=False,
            dtype=np.float64,
            lazy=lazy,
        )
        self.fill_value = _check_fill(fill_value)

    def __call__(  # type: ignore[override]
        self,
        img: Any,
        affine: Tensor | np.ndarray | Sequence[Sequence[float]] | str | os.PathLike | Deformation,
        fixed: Any,
        mode: str | int | None = None,
        padding_mode: str | None = None,
        fill_value: float | None = None,
        lazy: bool | None = None,
    ) -> MetaTensor:
        """
        Args:
            img: moving image or labels, ``[C, *spatial]``, all channels are moved.
            affine: ``(D+1, D+1)``, fixed world to moving world, RAS mm, or the path of a transform file of any format
                of `monai_zsreg.io.read_transform`; or a `Deformation`, fixed world to moving world.
            fixed: image on the grid to move to, ``[C, *spatial]``; its voxels do not matter.
            mode, padding_mode, fill_value, lazy: override the constructor's.

        Returns:
            ``[C, *fixed spatial]`` in the type of ``img``, whole numbers rounded; float32 where execution is lazy (the
            last resampling decides, and MONAI makes it float32), for splines, and for padding other than ``"zeros"``.

        Raises:
            RegistrationError: an image of the wrong shape or not in RAS; images of unequal dimension; a matrix of the
                wrong shape or that cannot be inverted; a mode that this dimension does not have.
        """
        img, fixed = as_image(img, "img"), as_image(fixed, "fixed")
        dims = check_pair(img, fixed, "img")
        bends = isinstance(affine, Deformation)
        pull = affine if isinstance(affine, Deformation) else read_matrix(affine, dims, fixed, img)
        matrix = pull.affine if isinstance(pull, Deformation) else pull
        mode = self.mode if mode is None else _check_mode(mode)
        if mode == "bicubic" and dims == 3 and not bends:
            raise RegistrationError("mode", mode, "'bilinear', 'nearest' or a spline order, because the images are 3D")
        padding_mode = self.padding_mode if padding_mode is None else _check_padding_mode(padding_mode)
        fill = self.fill_value if fill_value is None else _check_fill(fill_value)
        # with tracing off MONAI drops pending operations, so only the eager way is right
        lazy_ = (self.lazy if lazy is None else lazy) and self.tracing and not bends
        lazy_ = bool(lazy_) and (padding_mode != "zeros" or _zeros_will_do(img, str(mode), fill))
        own = mode in MODES and padding_mode == "zeros" and not lazy_
        if bends and not own:
            raise RegistrationError("mode", (mode, padding_mode), f"{', '.join(MODES)} and 'zeros' with a deformation")

        source = img if lazy_ else evaluate_pending(img)
        header = moved_header(source.affine, matrix)
        # deep, here and in _copy: MONAI writes pixdim in place, which goes through shallow copies
        native = deepcopy(source.meta) | {MetaKeys.AFFINE: source.peek_pending_affine()}
        shape, target = fixed.peek_pending_shape(), fixed.peek_pending_affine()
        if own:
            grids = Grid.of(source, "img"), Grid(tuple(shape), checked_affine(target, dims, "fixed"))
            values = move(pull, source, *grids, mode=str(mode), fill=fill)
            moved: Any = MetaTensor(values, affine=target, applied_operations=list(source.applied_operations))
            extra: dict[str, Any] = {"mode": mode, "padding_mode": padding_mode, "src_affine": header}
            if isinstance(pull, Deformation):
                extra[_MAP] = (pull.affine, pull.displacement, pull.grid.affine)
            self.push_transform(moved, orig_size=tuple(source.shape[1:]), extra_info=extra)
        else:
            edited: Any = _copy(source)
            edited.affine = header
            # MONAI knows no value outside but 0
            shift = _outside(source, str(mode), fill) if padding_mode == "zeros" and not lazy_ else torch.zeros(1)
            edited = edited - shift if bool(shift.any()) else edited
            moved = super().__call__(edited, target, shape, mode, padding_mode, lazy=lazy_)
            moved = moved + shift if bool(shift.any()) else moved
        if self.tracing:
            trace = moved.pending_operations if lazy_ else moved.applied_operations
            # as pairs: MONAI rewrites keys such as "id" in every dictionary that it finds in the trace
            trace[-1][TraceKeys.EXTRA_INFO][_NATIVE_META] = list(native.items())
            if lazy_:
                # MONAI's own transforms do not state these, and what nobody states becomes bilinear and border
                trace[-1][LazyAttr.INTERP_MODE], trace[-1][LazyAttr.PADDING_MODE] = mode, padding_mode
        moved.meta = _moved_meta(moved, native, fixed, matrix)
        return moved

    def inverse(self, data: Any) -> MetaTensor:
        """Voxels on the fixed grid back to the moving image's native grid and header.

        Args:
            data: ``[C, *fixed spatial]`` with the trace of this transform as the last entry of its kind.

        Returns:
            ``[C, *native spatial]`` in the type of ``data``; float32 for splines and padding other than ``"zeros"``.

        Raises:
            RegistrationError: ``data`` has lost its metadata.
        """
        if not isinstance(data, MetaTensor):
            raise RegistrationError("data", type(data).__name__, "a MetaTensor with its trace: keep track_meta=True")
        transform = self.pop_transform(data)
        extra, shape = transform[TraceKeys.EXTRA_INFO], tuple(int(n) for n in transform[TraceKeys.ORIG_SIZE])
        meta = deepcopy(dict(extra[_NATIVE_META]))
        mode, padding_mode, header = extra["mode"], extra["padding_mode"], extra["src_affine"]
        if mode in MODES and padding_mode == "zeros":
            # the moved header lays the native grid into the fixed world; a map that bends starts from its own header
            bends = _MAP in extra
            back = traced_deformation(extra).inverse() if bends else torch.eye(len(shape) + 1)
            grid = Grid(shape, checked_affine(meta[MetaKeys.AFFINE] if bends else header, len(shape), "src_affine"))
            values = move(back, data, Grid.of(data, "data"), grid, mode=mode)
            native: Any = MetaTensor(values, applied_operations=data.applied_operations)
        else:
            with self.trace_transform(False):
                # not self.__call__, which moves the header; not super().inverse, which is lazy where this object is
                native = super().__call__(data, header, shape, mode, padding_mode, lazy=False)
        native.meta = meta
        return native

    def check_transforms_match(self, transform: Mapping) -> None:
        # a worker that was spawned has a copy with another id; MONAI knows that only where all processes spawn
        if transform.get(TraceKeys.CLASS_NAME) != type(self).__name__:
            super().check_transforms_match(transform)


class RegisterAffine(ApplyAffineRegistration):
    """Register a moving image to a fixed one and put it on the fixed grid. Lazy execution and inversion work.

    The transform is estimated from the images as they are after pending operations, which are carried out on a copy
    for that; the moving image itself is still interpolated once.

    Besides the matrix (see `ApplyAffineRegistration`) the result's ``meta`` has ``registration_verdict`` (``"PASS"``,
    ``"WARN"`` or ``"FAIL"``) and ``registration_reasons`` (one string, empty if there are none), so that all of it
    collates. These two, and not the matrix, are also in the ``meta`` of what ``inverse`` brings back.

    Args:
        preset: name of the method, see `monai_zsreg.register`.
        transform: ``"rigid"``, ``"similarity"`` or ``"affine"``.
        mode, padding_mode, fill_value: see `ApplyAffineRegistration`.
        device, vgg19_weights, seed: see `monai_zsreg.register`.
        on_failure: what a result with the verdict FAIL does: ``"raise"`` a `RegistrationFailure`; ``"warn"`` and go on
            with the best matrix that was found; ``"ignore"``, the same without a warning. ``meta`` says FAIL.
        lazy: whether to execute lazily by default.
        options: further arguments of `monai_zsreg.register`.

    Raises:
        RegistrationError: a wrong argument.
    """

    deforms = False

    def __init__(
        self,
        preset: str = DEFAULT_PRESET,
        transform: str = "affine",
        mode: str | int = "bilinear",
        padding_mode: str = "zeros",
        fill_value: float | None = None,
        device: str | torch.device | None = None,
        vgg19_weights: str | os.PathLike | None = None,
        seed: int = 0,
        on_failure: str = "raise",
        lazy: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(mode=mode, padding_mode=padding_mode, fill_value=fill_value, lazy=lazy)
        _check_choice("on_failure", on_failure, _ON_FAILURE)
        _check_choice("transform", transform, (DEFORMABLE,) if self.deforms else TRANSFORMS)
        _check_device(device)
        check_options(preset, transform, seed, vgg19_weights=vgg19_weights, **options)
        if vgg19_weights is not None and not os.path.isfile(vgg19_weights):
            raise RegistrationError("vgg19_weights", vgg19_weights, "an existing file, or None")
        self.on_failure = on_failure
        # plain strings, so that a cache that hashes the transform by pickling it gets the same hash in every process
        device, vgg19_weights = (None if given is None else str(given) for given in (device, vgg19_weights))
        own = {"preset": preset, "transform": transform, "device": device, "vgg19_weights": vgg19_weights, "seed": seed}
        self.register_options: dict[str, Any] = own | options

    def __call__(  # type: ignore[override]
        self,
        moving: Any,
        fixed: Any,
        mode: str | int | None = None,
        padding_mode: str | None = None,
        fill_value: float | None = None,
        lazy: bool | None = None,
        prepared: Prepared | None = None,
    ) -> MetaTensor:
        """
        Args:
            moving: image to register, ``[C, *spatial]``.
            fixed: image to register it to, ``[C, *spatial]``.
            mode, padding_mode, fill_value, lazy: override the constructor's.
            prepared: what `prepare` made of ``fixed``, where several images are registered to it.

        Returns:
            The moving image on the fixed grid, see `ApplyAffineRegistration`.

        Raises:
            RegistrationError, RegistrationFailure: see `estimate`.
        """
        moving, fixed = as_image(moving, "moving"), evaluate_pending(as_image(fixed, "fixed"))
        check_pair(moving, fixed, "moving")
        result = self.estimate(moving, fixed if prepared is None else prepared)
        moved = super().__call__(moving, self.map_of(result), fixed, mode, padding_mode, fill_value, lazy)
        said = {VERDICT_KEY: result.verdict, REASONS_KEY: "; ".join(result.reasons)}
        moved.meta |= said
        if self.tracing:
            # what comes back is only as good as the registration was
            last = (moved.pending_operations or moved.applied_operations)[-1]
            last[TraceKeys.EXTRA_INFO][_NATIVE_META] += said.items()
        return moved

    def map_of(self, result: RegistrationResult) -> Any:
        """What of a result the image is moved with."""
        return result.affine

    def prepare(self, fixed: MetaTensor) -> Prepared:
        """The fixed side of a registration, to be used with several moving images."""
        options = self.register_options
        return Prepared(evaluate_pending(fixed), options.get("fixed_channel", 0), options.get("fixed_mask"))

    def estimate(self, moving: MetaTensor, fixed: MetaTensor | Prepared) -> RegistrationResult:
        """The registration alone, which moves nothing; ``on_failure`` applies.

        Raises:
            RegistrationError: an image that cannot be used.
            RegistrationFailure: the verdict is FAIL, and ``on_failure`` is ``"raise"``.
        """
        options = self.register_options
        prepared = fixed if isinstance(fixed, Prepared) else self.prepare(fixed)  # with its channel and mask
        options = {name: value for name, value in options.items() if name not in ("fixed_channel", "fixed_mask")}
        result = register(prepared, evaluate_pending(moving), warn=self.on_failure == "warn", **options)
        if not result.success and self.on_failure == "raise":
            name = moving.meta.get(ImageMetaKey.FILENAME_OR_OBJ, "the moving image")
            reasons = "; ".join(result.reasons) or "no reason given"
            raise RegistrationFailure(
                f"registration of {name} failed: {reasons} (on_failure='warn' goes on with the best matrix found)"
            )
        return result


class RegisterDeformable(RegisterAffine):
    """Register a moving image to a fixed one by a smooth map and put it on the fixed grid. Inversion works.

    ``meta`` has what `RegisterAffine` puts there; the matrix is the affine part of the map.

    Args:
        stiffness: see `monai_zsreg.registration.deformable.register_deformable`.
        transform: ``"deformable"``.
        options: those of `RegisterAffine`.

    Raises:
        RegistrationError: a wrong argument.
    """

    deforms = True

    def __init__(self, stiffness: float | None = None, transform: str = DEFORMABLE, **options: Any) -> None:
        super().__init__(transform=transform, stiffness=stiffness, **options)

    def map_of(self, result: RegistrationResult) -> Deformation:
        if result.deformation is not None:
            return result.deformation
        # nothing could be computed, and the user wants to go on
        grid = result.fixed_image.grid
        one = Grid((1,) * grid.dims, grid.affine)
        return Deformation(torch.as_tensor(result.affine), torch.zeros(grid.dims, *one.shape), one)


class SaveAffine(Transform):
    """Write the matrix that an image was registered with, named after the image's file.

    The name is ``output_dir/[name/]name_postfix.ext``, as MONAI's ``SaveImage`` makes it.

    Args:
        output_dir: folder, made if missing.
        output_postfix: appended to the name.
        output_ext: one of ITK's: ``.tfm``, ``.txt``, ``.h5``, ``.hdf5``, ``.mat``.
        separate_folder: whether each image gets a folder of its own.
        data_root_dir: the part of the image's path that is left out where the folder structure is kept, see
            ``monai.data.utils.create_file_basename``.

    Raises:
        RegistrationError: an extension that is not ITK's; when called, an image without a matrix, or a file that cannot
            be written.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike = "./",
        output_postfix: str = "affine",
        output_ext: str = ".tfm",
        separate_folder: bool = True,
        data_root_dir: str | os.PathLike = "",
    ) -> None:
        if output_ext not in FORMATS["itk"].suffixes:
            raise RegistrationError("output_ext", output_ext, "one of " + ", ".join(FORMATS["itk"].suffixes))
        self.folder_layout = FolderLayout(
            output_dir=os.fspath(output_dir),
            postfix=output_postfix,
            extension=output_ext,
            parent=separate_folder,
            makedirs=False,
            data_root_dir=os.fspath(data_root_dir),
        )

    def __call__(self, img: MetaTensor) -> MetaTensor:
        """Write the matrix of what `RegisterAffine` or `ApplyAffineRegistration` returned, and give back ``img``."""
        if not isinstance(img, MetaTensor) or AFFINE_KEY not in img.meta:
            raise RegistrationError(
                "img", type(img).__name__, f"a registered image: a MetaTensor with meta['{AFFINE_KEY}']"
            )
        if img.is_batch:
            raise RegistrationError("img", tuple(img.shape), "one image; use decollate_batch first")
        subject = img.meta.get(ImageMetaKey.FILENAME_OR_OBJ, "subject")
        write_transform(self.folder_layout.filename(subject), img.meta[AFFINE_KEY], format="itk")
        return img


# --------------------------------------------------------------------------------------------------------------------
# images
# --------------------------------------------------------------------------------------------------------------------


def as_image(data: Any, name: str) -> MetaTensor:
    """A ``MetaTensor`` of what MONAI's spatial transforms accept: an array or plain tensor has the identity as affine,
    and a warning says so."""
    if not get_track_meta():
        allowed = "metadata, which monai.data.set_track_meta(False) has switched off: registration needs the affine"
        raise RegistrationError(name, type(data).__name__, allowed)
    if isinstance(data, MetaTensor):
        return data
    if not isinstance(data, (Tensor, np.ndarray)):
        raise RegistrationError(name, type(data).__name__, "an image [C, *spatial]: a MetaTensor, tensor or array")
    # where the channel was forgotten, the shape shows it
    shape = f"its shape {tuple(data.shape)} counts as [C, *spatial]"
    text = f"{name} has no affine, so {shape} and its voxels as cubes of 1 mm along the world axes"
    hint = "keep the metadata where there are such: EnsureType and caching data sets with track_meta=True"
    warnings.warn(f"{text}; {hint}", RegistrationWarning, stacklevel=3)
    return convert_to_tensor(data, track_meta=True)


def check_pair(moving: MetaTensor, fixed: MetaTensor, moving_name: str) -> int:
    """Number of spatial dimensions of a moving and a fixed image ``[C, *spatial]``, if they can be a pair."""
    for name, image in ((moving_name, moving), ("fixed", fixed)):
        if image.is_batch or image.affine.ndim != 2:
            raise RegistrationError(name, tuple(image.shape), "one image [C, *spatial]; use decollate_batch first")
        if image.meta.get(MetaKeys.SPACE, SpaceKeys.RAS) == SpaceKeys.LPS:
            allowed = "an affine in RAS, as LoadImage gives unless ITKReader has affine_lps_to_ras=False"
            raise RegistrationError(name, "an affine in LPS", allowed)
    dims = Grid.of(fixed, "fixed").dims
    if Grid.of(moving, moving_name).dims != dims:
        raise RegistrationError(moving_name, f"{moving.ndim - 1}D image", f"{dims} spatial dimensions, as fixed has")
    return dims


def read_matrix(affine: Any, dims: int, fixed: Any = None, moving: Any = None) -> Tensor:
    """A pull matrix from an array, nested sequences or the path of a transform file; see `checked_matrix`."""
    if isinstance(affine, (str, os.PathLike)):
        affine = read_transform(affine, fixed, moving)
    elif isinstance(affine, Sequence):
        with suppress(TypeError, ValueError):  # which `checked_matrix` puts in words
            affine = torch.tensor(affine, dtype=torch.float64)
    return checked_matrix(affine, dims, "affine")


def traced_deformation(extra: Mapping[str, Any]) -> Deformation:
    """The one that an entry of the trace holds."""
    affine, displacement, lattice = extra[_MAP]
    return Deformation(affine, displacement, Grid(tuple(displacement.shape[1:]), lattice))


def evaluate_pending(image: MetaTensor) -> MetaTensor:
    """``image`` with its pending (lazy) operations carried out; ``image`` itself stays as it is."""
    if not image.has_pending_operations:
        return image
    copy = _copy(image)
    copy.clear_pending_operations()
    return apply_pending(copy, pending=list(image.pending_operations))[0]


def _copy(image: MetaTensor) -> MetaTensor:
    """The same voxels with a header and lists of operations of their own."""
    copy = MetaTensor(image.as_tensor(), meta=deepcopy(image.meta), applied_operations=list(image.applied_operations))
    for operation in image.pending_operations:
        copy.push_pending_operation(operation)
    return copy


def _moved_meta(moved: MetaTensor, native: dict, fixed: MetaTensor, matrix: Tensor) -> dict:
    # eager and lazy alike: everything that describes the grid comes from the fixed image, the name from the moving
    drop = (AFFINE_KEY, VERDICT_KEY, REASONS_KEY, ImageMetaKey.FILENAME_OR_OBJ)
    meta = {key: value for key, value in deepcopy(fixed.meta).items() if key not in drop}
    if ImageMetaKey.FILENAME_OR_OBJ in native:
        meta[ImageMetaKey.FILENAME_OR_OBJ] = native[ImageMetaKey.FILENAME_OR_OBJ]
    # a copy: MONAI hands out the fixed image's own tensor
    return meta | {MetaKeys.AFFINE: moved.affine.clone(), AFFINE_KEY: matrix.clone()}


def _outside(image: MetaTensor, mode: str, fill: float | None) -> Tensor:
    """What lies outside, ``[C, 1, ...]``."""
    values = [outside_value(channel, mode, torch.float64) if fill is None else fill for channel in image.as_tensor()]
    return torch.tensor(values, device=image.device).view(-1, *[1] * (image.ndim - 1))


def _zeros_will_do(image: MetaTensor, mode: str, fill: float | None) -> bool:
    if fill is not None:
        return fill == 0.0
    background = _outside(image, mode, None).flatten().abs()
    channels = image.as_tensor().flatten(1)
    return bool((background <= _NEAR * (channels.amax(1) - channels.amin(1)).abs()).all())


# --------------------------------------------------------------------------------------------------------------------
# arguments
# --------------------------------------------------------------------------------------------------------------------


def _check_mode(mode: str | int) -> str | int:
    _check_choice("mode", mode, (*MODES, *_SPLINE_ORDERS))
    return mode if isinstance(mode, int) else str(GridSampleMode(mode).value)


def _check_padding_mode(padding_mode: str) -> str:
    _check_choice("padding_mode", padding_mode, [m.value for m in GridSamplePadMode])
    return str(GridSamplePadMode(padding_mode).value)


def _check_fill(fill_value: Any) -> float | None:
    if fill_value is not None and not is_number(fill_value):
        raise RegistrationError("fill_value", fill_value, "a number, or None for the image's background")
    return None if fill_value is None else float(fill_value)


def _check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise RegistrationError(name, value, "one of " + ", ".join(repr(a) for a in allowed))


def _check_device(device: str | torch.device | None) -> None:
    try:
        found = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise RegistrationError("device", device, f'a device such as "cpu" or "cuda" ({error})') from error
    # counting does not start CUDA, which a process that will fork workers must not do
    if found.type == "meta" or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise RegistrationError("device", str(device), '"cpu", or a device of this machine such as "cuda"')
