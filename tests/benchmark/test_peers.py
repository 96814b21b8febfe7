# SPDX-License-Identifier: Apache-2.0
"""Each peer's transform, converted to our convention, is the one that moved the image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from monai_zsreg.benchmark.methods import Method, easy_pair, make_methods
from monai_zsreg.benchmark.peers import PEERS, Task, itk_image, matrix_of
from monai_zsreg.benchmark.perturb import about
from monai_zsreg.benchmark.volumes import Volume, transformed
from monai_zsreg.errors import RegistrationError

# mm; the peers end 0.1 to 1.5 mm off on this small scene, a flipped axis or an inverse at least 6
WRONG_SIGN_WOULD_EXCEED = 3.0


def _scene(points: np.ndarray) -> np.ndarray:
    """A smooth pattern of world coordinates, asymmetric in every axis."""
    total = np.zeros(points.shape[:-1])
    rng = np.random.default_rng(3)
    dims = points.shape[-1]
    for _ in range(40):
        center, width = rng.uniform(-28, 28, dims), rng.uniform(4, 8)
        total += rng.uniform(0.4, 1.0) * np.exp(-(((points - center) / width) ** 2).sum(-1) / 2)
    return total * (np.linalg.norm(points, axis=-1) < 48)


def _image(dims: int, angle: float, spacing: tuple[float, ...], flip: bool, back: np.ndarray) -> Volume:
    """The scene at ``back(world)``, oblique, anisotropic and (with ``flip``) left-handed, 110 mm about the origin."""
    rotation = Rotation.from_euler("zx", [angle, angle if dims == 3 else 0]).as_matrix()[:dims, :dims]
    linear = rotation @ np.diag(spacing) @ np.diag([-1.0 if flip else 1.0, *[1.0] * (dims - 1)])
    shape = tuple(int(110 / s) for s in spacing)
    affine = about(np.zeros(dims), linear, -linear @ ((np.array(shape) - 1) / 2))
    index = np.moveaxis(np.indices(shape), 0, -1)
    return Volume((100 * _scene(transformed(back, transformed(affine, index)))).astype(np.float32), affine)


def _case(dims: int) -> tuple[Volume, Volume, np.ndarray]:
    turn = Rotation.from_euler("z", 4, degrees=True).as_matrix()[:dims, :dims]
    truth = about(np.zeros(dims), turn, np.array([5.0, -3.0, 2.0][:dims]))
    spacings = ((1.0, 1.4), (1.2, 1.0)) if dims == 2 else ((2.0, 2.4, 3.0), (2.2, 2.0, 2.7))
    fixed = _image(dims, 0.15, spacings[0], True, np.eye(dims + 1))
    return fixed, _image(dims, -0.1, spacings[1], False, np.linalg.inv(truth)), truth


def _error(matrix: np.ndarray, truth: np.ndarray) -> float:
    points = np.random.default_rng(0).uniform(-35, 35, (200, len(truth) - 1))
    return float(np.linalg.norm(transformed(matrix - truth, points), axis=1).max())


@pytest.mark.slow  # loading the libraries takes most of it, so all of a family runs in one process
@pytest.mark.parametrize("family", [name for name in PEERS if name != "none"])
def test_transform_is_the_one_that_moved_the_image(family: str) -> None:
    method = Method(family, Task(threads=1))
    try:
        if PEERS[family].starts:
            method.task = make_methods([family], Task(threads=1))[-1].task
            _check_matrices(method)
        for start in PEERS[family].deformable.values():
            method.task = Task(start, "deformable", threads=1)
            _check_field(method)
    finally:
        method.close()


def _check_matrices(method: Method) -> None:
    family, reason = method.family, method.missing()
    if reason is not None:
        pytest.skip(reason)
    for dims in PEERS[family].cases if family != "sift" else ():
        fixed, moving, truth = _case(dims)
        for transform in ("rigid", "affine") if dims == 2 or family not in ("simpleitk", "elastix") else ("affine",):
            answer = method.register(fixed, moving, transform)
            assert "failure" not in answer, answer
            assert _error(answer["matrix"], truth) < WRONG_SIGN_WOULD_EXCEED, (dims, transform)
            assert answer["seconds"] > 0 and answer["peak_mib"] >= 0
            if transform == "rigid":
                turn = answer["matrix"][:dims, :dims]
                assert np.allclose(turn @ turn.T, np.eye(dims), atol=1e-4)


def _check_field(method: Method) -> None:
    fixed = _image(3, 0.15, (2.0, 2.4, 3.0), True, np.eye(4))
    # another sign of an axis, another order of axes or the inverse is 0.6 or less from it, as cosine
    shift = np.array([4.0, -2.0, 0.0])
    moving = _image(3, 0.15, (2.0, 2.4, 3.0), True, about(np.zeros(3), np.eye(3), -shift))
    # elastix erodes masks, so a corner must do
    mask = np.ones(fixed.shape, dtype=bool)
    mask[:4, :4, :4] = False
    answer = method.register(fixed, moving, "deformable", None if method.family == "convexadam" else mask)
    if answer.get("cannot_run"):
        pytest.skip(answer["failure"])
    assert "failure" not in answer, answer
    assert answer["matrix"].shape == (3, *fixed.shape)
    found = answer["matrix"][:, fixed.values > 20].mean(axis=1)
    length = np.linalg.norm(found)
    assert found @ shift > 0.85 * length * np.linalg.norm(shift) and length > 1.0


def test_matrix_of_a_known_transform() -> None:
    # rotation by 90 degrees about z in LPS is the same in RAS; a shift along x and y changes its sign
    def send(point: list[float]) -> list[float]:
        x, y, z = point
        return [-y + 1, x + 2, z + 3]

    expected = np.array([[0, -1, 0, -1], [1, 0, 0, -2], [0, 0, 1, 3], [0, 0, 0, 1.0]])
    assert np.allclose(matrix_of(send, 3), expected)


def test_lattice_agrees_with_itk() -> None:
    itk = pytest.importorskip("itk")
    image = _case(3)[0]
    made = itk_image(image, itk.image_from_array, itk.matrix_from_array)
    physical = np.array(made.TransformIndexToPhysicalPoint([3, 7, 11]))
    assert np.allclose(physical * [-1, -1, 1], transformed(image.affine, np.array([3, 7, 11])), atol=1e-6)
    assert made.GetPixel([3, 7, 11]) == pytest.approx(float(image.values[3, 7, 11]))


def test_sift_on_a_textured_pair() -> None:
    pytest.importorskip("cv2")
    from monai_zsreg.benchmark.peers.sift import prepare

    texture = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(260, 240)), 2.0)
    truth = np.array([[math.cos(0.3), -math.sin(0.3), 12.0], [math.sin(0.3), math.cos(0.3), -7.0], [0, 0, 1]])
    # indices of this grid are half its millimeters
    affine = np.diag([2.0, 2.0, 1.0])
    pull = np.linalg.inv(np.linalg.inv(affine) @ truth @ affine)
    shown = ndimage.affine_transform(texture, pull[:2, :2], pull[:2, 2], order=3)
    fixed, moving = Volume(texture, affine), Volume(shown, affine)
    assert _error(prepare(fixed, moving, Task(threads=1))(), truth) < 1.0
    with pytest.raises(RuntimeError, match="keypoints"):
        prepare(fixed, Volume(np.zeros((50, 50)), affine), Task(threads=1))()


def test_ours_says_what_it_thinks_of_itself() -> None:
    method = make_methods(["ours:robust,search=none"], Task(threads=1))[0]
    try:
        answer = method.register(*easy_pair(2))
        assert answer["verdict"] in ("PASS", "WARN", "FAIL") and answer["matrix"][:2, 2] == pytest.approx(
            [2, 0], abs=0.1
        )
        assert 0 < answer["bounds"]["0.5"] < answer["bounds"]["0.95"] and len(answer["point"]) == 2
        assert "cannot_run" in method.register(*easy_pair(2), "nonsense")
    finally:
        method.close()


def test_what_cannot_run_says_why() -> None:
    method = Method("no_such_peer", Task())
    try:
        assert "ModuleNotFoundError" in str(method.missing())
    finally:
        method.close()


def test_a_process_that_dies_is_a_failure_and_the_next_one_starts() -> None:
    method = make_methods(["none"], Task(threads=1))[0]
    try:
        assert np.array_equal(method.register(*easy_pair(2))["matrix"], np.eye(3))
        method._process.kill()
        method._process.join()
        assert "process ended" in method.register(*easy_pair(2))["failure"]
        assert np.array_equal(method.register(*easy_pair(3))["matrix"], np.eye(4))
    finally:
        method.close()


def test_names() -> None:
    for bad, transform in (
        *((name, "affine") for name in ("flirt", "elastix/nowhere", "ours", "none/there", "convexadam")),
        ("elastix", "deformable"),
    ):
        with pytest.raises(RegistrationError, match="methods"):
            make_methods([bad], Task(transform=transform))
    names = [m.name for m in make_methods(["none", "ours:paper", "elastix", "ants/identity"], Task())]
    assert names == ["none", "ours:paper", "elastix/default", "elastix/mass", "ants/identity"]
