# SPDX-License-Identifier: Apache-2.0
"""The MONAI Label app, on a real server on loopback, called as 3D Slicer calls it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.parser import BytesParser
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch.nn.functional as F

from monai_zsreg.io import read_transform
from monai_zsreg.label import app_folder
from monai_zsreg.label.register import TRANSFORM_TAGS

BUNDLE = Path(__file__).parents[2] / "bundles" / "zero_shot_affine_registration"
needs_server = pytest.mark.skipif(
    find_spec("monailabel") is None or find_spec("requests") is None,
    reason="MONAI Label is not installed here: it wants an environment of its own (.ci/label makes one)",
)


def test_app_folder_holds_the_app(tmp_path: Path) -> None:
    folder = app_folder(tmp_path / "app")
    assert "class MyApp" in (folder / "main.py").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "monai_zsreg.label", str(tmp_path / "app")], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "app")
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "monai_zsreg.label", str(tmp_path / "file")], capture_output=True, text=True
    )
    assert done.returncode == 2 and "wrong input" in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(app: str, studies: Path, log: Path, *options: str) -> Iterator[str]:
    """Address of a server that runs while the generator does."""
    import requests

    port = free_port()
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", app, "--studies", str(studies)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (
        open(log, "w") as out,
        subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *options], stdout=out, stderr=out, env=environment
        ) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(180):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    if requests.get(f"{address}/info/", timeout=5).ok:
                        break
                except requests.ConnectionError:
                    time.sleep(0.5)
            else:
                raise AssertionError(log.read_text()[-3000:])
            yield address
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, load_volume) -> Iterator[SimpleNamespace]:
    """A datastore of a T1, a T2 shifted by its header, a label of the T2, noise, and a file that is no image."""
    root = tmp_path_factory.mktemp("label")
    studies = root / "studies"
    (studies / "labels" / "final").mkdir(parents=True)
    header = np.diag([-3.0, 3.0, 3.0, 1.0])
    shifted = header.copy()
    shifted[:3, 3] = 8.0, -6.0, 4.0
    for name, affine in (("t1", header), ("t2", shifted)):
        values = F.avg_pool3d(load_volume(modality=name).as_tensor()[None], 3)[0, 0].numpy()
        nib.save(nib.Nifti1Image(values, affine), studies / f"{name}.nii.gz")
    labels = (values > np.percentile(values, 90)).astype(np.uint8) * 2
    nib.save(nib.Nifti1Image(labels, shifted), studies / "labels" / "final" / "t2.nii.gz")
    noise = np.random.default_rng(0).random(values.shape, dtype=np.float32)
    nib.save(nib.Nifti1Image(noise, header), studies / "noise.nii.gz")
    (studies / "broken.nii.gz").write_text("no image")
    secret = root / "secret.nii.gz"
    shutil.copy(studies / "t2.nii.gz", secret)
    running = serve(str(app_folder(root / "app")), studies, root / "log.txt")
    yield SimpleNamespace(url=next(running), root=root, header=header, shifted=shifted, secret=secret)
    running.close()


def infer(url: str, image: str, output: str = "all", model: str = "register", **parameters: Any) -> Any:
    """As 3D Slicer's client asks: the parameters are a field of a form."""
    import requests

    return requests.post(
        f"{url}/infer/{model}", params={"image": image, "output": output}, data={"params": json.dumps(parameters)},
        timeout=400,
    )  # fmt: skip


def parts(response: Any) -> dict[str, bytes]:
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser().parsebytes(head + response.content)
    names = {part.get_param("name", header="content-disposition"): part for part in message.get_payload()}  # type: ignore
    return {str(name): part.get_payload(decode=True) for name, part in names.items()}  # type: ignore[misc]


@needs_server
@pytest.mark.slow
def test_info_and_moved_image(server: SimpleNamespace, tmp_path: Path) -> None:
    import requests

    info = requests.get(f"{server.url}/info/", timeout=30).json()
    assert set(info["models"]) == {"register", "register_labels"}
    models = info["models"]
    assert models["register"]["config"]["moving"] == ["", "broken", "noise", "t1", "t2"]
    assert models["register"]["config"]["preset"] == ["robust"], "the others need VGG-19's weights"
    assert all("3D Slicer" in model["description"] for model in models.values())
    assert models["register_labels"]["type"] == "segmentation" != models["register"]["type"]
    response = infer(server.url, "t1", moving="t2")
    assert response.status_code == 200, response.text
    answer = parts(response)
    report = json.loads(answer["params"])
    assert report["verdict"] == "PASS" and report["input"] == {"fixed": "t1", "moving": "t2"}
    assert report["expected_error"]["below_in_95_percent"] < 1.0
    # both scans lie on one lattice but for the shift in the header
    np.testing.assert_allclose(np.array(report["matrix"])[:3, 3], server.shifted[:3, 3], atol=2.0)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    np.testing.assert_allclose(report["matrix_lps"], lps @ np.array(report["matrix"]) @ lps)
    assert report["metrics"]["after"]["nmi"] > report["metrics"]["before"]["nmi"]
    (tmp_path / "moved.nii.gz").write_bytes(answer["image"])
    moved = nib.load(tmp_path / "moved.nii.gz")
    np.testing.assert_allclose(moved.affine, server.header, atol=1e-4)
    assert np.corrcoef(moved.get_fdata().ravel(), nib.load(server.secret).get_fdata().ravel())[0, 1] > 0.95


@needs_server
@pytest.mark.slow
def test_moved_labels(server: SimpleNamespace, tmp_path: Path) -> None:
    answer = parts(infer(server.url, "t1", moving="t2", **{"return": "labels"}))
    (tmp_path / "moved.nii.gz").write_bytes(answer["image"])
    moved = np.asarray(nib.load(tmp_path / "moved.nii.gz").dataobj)
    assert set(np.unique(moved)) == {0, 2} and json.loads(answer["params"])["label_names"]


@needs_server
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["SECRET", "../secret", "..", "/etc/passwd", "nothing", "", None, 7, ["t2"], "t2.nii.gz"]
)
def test_moving_is_an_id_and_nothing_else(server: SimpleNamespace, name: Any) -> None:
    response = infer(server.url, "t1", moving=str(server.secret) if name == "SECRET" else name)
    assert response.status_code == 400 and "moving" in response.json()["detail"]
    assert "Traceback" not in response.text and len(response.text) < 500 and "id of an image" in response.text


@needs_server
@pytest.mark.slow
def test_a_typo_is_refused_with_what_is_allowed(server: SimpleNamespace) -> None:
    response = infer(server.url, "t1", moving="t2", trasform="rigid")
    assert response.status_code == 400
    assert all(name in response.json()["detail"] for name in ("'trasform'", "did you mean 'transform'", "preset"))
    # what 3D Slicer's client adds to its options
    extra = {"client_id": "user-xyz", "result_extension": ".nrrd", "result_dtype": "uint8"}
    assert infer(server.url, "t1", "json", moving="t2", **extra).status_code == 200


@needs_server
@pytest.mark.slow
@pytest.mark.parametrize(
    ("moving", "status", "told"),
    [("noise", 422, "noise does not register to t1: "), ("broken", 400, "an image that can be read")],
)
def test_what_went_wrong_is_told_without_paths(server: SimpleNamespace, moving: str, status: int, told: str) -> None:
    response = infer(server.url, "t1", moving=moving)
    assert response.status_code == status and told in response.json()["detail"]
    assert len(response.json()["detail"]) > len(told) and str(server.root) not in response.text


@needs_server
@pytest.mark.slow
def test_two_clients_at_once_get_what_one_gets(server: SimpleNamespace) -> None:
    def matrix(fixed: str) -> list:
        response = infer(server.url, fixed, "json", moving="t2" if fixed == "t1" else "t1")
        assert response.status_code == 200, response.text
        return response.json()["params"]["matrix"] if "params" in response.json() else response.json()["matrix"]

    alone = [matrix("t1"), matrix("t2")]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(matrix, ["t1", "t2"] * 2))
    for number, found in enumerate(together):
        np.testing.assert_allclose(found, alone[number % 2], atol=1e-5)
    np.testing.assert_allclose(np.array(alone[0]) @ np.array(alone[1]), np.eye(4), atol=0.3)


@needs_server
@pytest.mark.slow
def test_requests_leave_no_files_behind(server: SimpleNamespace) -> None:
    before = set(Path("/tmp").glob("moved_image_*"))
    assert infer(server.url, "t1", moving="t2").status_code == 200
    time.sleep(1.0)
    assert set(Path("/tmp").glob("moved_image_*")) <= before
    assert not (server.root / "studies" / "labels" / "original").exists() or not list(
        (server.root / "studies" / "labels" / "original").iterdir()
    )


@needs_server
@pytest.mark.slow
def test_tutorial_against_the_server(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONAI_LABEL_SERVER", server.url)
    monkeypatch.setenv("MONAI_LABEL_STUDIES", str(server.root / "studies"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pytest.importorskip("matplotlib")
    path = Path(__file__).parents[2] / "tutorials" / "06_monai_label_and_slicer.ipynb"
    names: dict[str, Any] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert "register" in names["info"]["models"]
    assert names["report"]["verdict"] == "PASS"
    assert "matrix_lps" in names["report"], "the server's answer, not the one computed here"


def _resident_mb(port: str) -> float:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if port.encode() in command and b"start_server" in command:
                pages = int((folder / "statm").read_text().split()[1])
                return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        except OSError:
            continue
    raise AssertionError(f"no server on port {port}")


@needs_server
@pytest.mark.slow
def test_two_hundred_requests_eight_at_once(server: SimpleNamespace) -> None:
    """None is lost, all give the same, and the server's memory stays where it is after the first fifty."""

    def one(number: int) -> list:
        response = infer(server.url, "t1", output="json", moving="t2")
        assert response.status_code == 200, response.text
        return response.json()["params"]["matrix"] if "params" in response.json() else response.json()["matrix"]

    port = server.url.rsplit(":", 1)[1]
    with ThreadPoolExecutor(8) as crew:
        answers = list(crew.map(one, range(50)))
        before = _resident_mb(port)
        answers += list(crew.map(one, range(150)))
    grown = _resident_mb(port) - before
    print(f"200 requests, {before:.0f} MB after 50, {grown:+.0f} MB after 200")
    assert len(answers) == 200
    assert all(answer == answers[0] for answer in answers)
    assert grown < 100


def fetched(server: SimpleNamespace, path: Path, what: str, **query: str) -> Path:
    import requests

    response = requests.get(f"{server.url}/datastore/{what}", params=query, timeout=30)
    assert response.status_code == 200, response.text
    path.write_bytes(response.content)
    return path


@needs_server
@pytest.mark.slow
def test_saved_results_can_be_fetched(server: SimpleNamespace, tmp_path: Path) -> None:
    answer = parts(infer(server.url, "t1", moving="t2", labels="t2", save=True))
    report = json.loads(answer["params"])
    assert report["saved"] == "t2_on_t1" and str(server.root) not in answer["params"].decode()
    image = fetched(server, tmp_path / "image.nii.gz", "image", image="t2_on_t1")
    (tmp_path / "answer.nii.gz").write_bytes(answer["image"])
    np.testing.assert_array_equal(nib.load(image).get_fdata(), nib.load(tmp_path / "answer.nii.gz").get_fdata())
    for suffix, tag in TRANSFORM_TAGS.items():
        transform = fetched(server, tmp_path / f"t2_on_t1{suffix}", "label", label="t2_on_t1", tag=tag)
        np.testing.assert_allclose(read_transform(transform), report["matrix"], atol=1e-9)
    labels = fetched(server, tmp_path / "labels.nii.gz", "label", label="t2_on_t1", tag="original")
    assert set(np.unique(np.asarray(nib.load(labels).dataobj))) == {0, 2}
    again = infer(server.url, "t1", moving="t2", save=True)
    assert again.status_code == 400 and "a name that is free" in again.json()["detail"]


@needs_server
@pytest.mark.slow
def test_a_batch_keeps_results_and_does_not_end_with_a_failure(server: SimpleNamespace) -> None:
    import requests

    def batch(moving: str) -> dict[str, Any]:
        body = {"moving": moving}
        url, what = f"{server.url}/batch/infer/register", {"images": "labeled", "run_sync": True}
        response = requests.post(url, params=what, json=body, timeout=300)
        assert response.status_code == 200, response.text
        return dict(response.json()["t2"])

    answer = batch("t1")
    assert answer["label"] == answer["params"]["saved"] == "t1_on_t2", "a name in the datastore, no file of the server"
    assert "t1_on_t2" in requests.get(f"{server.url}/datastore/?output=all", timeout=30).text
    assert "noise does not register to t2" in batch("noise")["params"]["error"]
    assert "another image than the fixed one" in batch("t2")["params"]["error"]


@needs_server
@pytest.mark.slow
def test_in_the_servers_own_app_for_bundles(server: SimpleNamespace, tmp_path: Path) -> None:
    """The bundle loads and shows there; one image makes no pair, and the client is told so."""
    import requests

    copy = [sys.executable, "-m", "monailabel.main", "apps", "--download", "--name", "monaibundle"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run([*copy, "--output", str(tmp_path)], check=True, capture_output=True, env=environment)
    shutil.copytree(BUNDLE, tmp_path / "monaibundle" / "model" / BUNDLE.name)
    # nothing is to be downloaded: neither a list of bundles nor SAM 2
    options = ["--conf", "models", BUNDLE.name, "--conf", "zoo_source", "ngc", "--conf", "sam2", "false"]
    running = serve(str(tmp_path / "monaibundle"), server.root / "studies", tmp_path / "log.txt", *options)
    try:
        url = next(running)
        assert BUNDLE.name in requests.get(f"{url}/info/", timeout=30).json()["models"]
        response = infer(url, "t1", model=BUNDLE.name)
        assert response.status_code == 400, (tmp_path / "log.txt").read_text()[-3000:]
        assert "fixed and moving" in response.json()["detail"] and "monai_zsreg.label" in response.json()["detail"]
    finally:
        running.close()
