# SPDX-License-Identifier: Apache-2.0
"""Tests of writing files whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from monai_zsreg.errors import RegistrationError
from monai_zsreg.io import atomic_path, output_folder, write_json


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["moved.nii.gz", "transform.tfm", "report.json", "plain"])
def test_file_appears_at_the_end_with_its_suffixes(tmp_path, name):
    target = tmp_path / "new" / "folder" / name
    with atomic_path(target) as partial:
        assert partial.parent == target.parent
        assert "".join(partial.suffixes) == "".join(target.suffixes)
        partial.write_text("content")
        assert not target.exists()
    assert target.read_text() == "content"
    assert names(target.parent) == [name]


def test_error_leaves_what_was_there(tmp_path):
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_replaces_a_file(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with atomic_path(str(target)) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="file modes")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_mode_is_that_of_a_plain_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_path(tmp_path / "a.txt") as partial:
            partial.write_text("x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~mask


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    (tmp_path / "a.txt").touch(mode=0o600)
    with atomic_path(tmp_path / "a.txt") as partial:
        partial.write_text("x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o600


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("there", "missing"):
        (tmp_path / name).symlink_to(tmp_path / "data" / f"{name}.json")
    (tmp_path / "data" / "there.json").write_text("old")
    for name in ("there", "missing"):
        write_json(tmp_path / name, {"new": name})
        assert (tmp_path / name).is_symlink()
        assert json.loads((tmp_path / "data" / f"{name}.json").read_text()) == {"new": name}
    assert names(tmp_path / "data") == ["missing.json", "there.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_full_disk_is_named_and_leaves_nothing(tmp_path, number):
    target = tmp_path / "result.json"
    target.write_text("before")
    with pytest.raises(OSError, match="no room to write it") as caught, atomic_path(target) as partial:
        partial.write_text("half")
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number and str(target) in str(caught.value)
    assert target.read_text() == "before" and names(tmp_path) == ["result.json"]


def test_a_mode_that_threads_set_at_once(tmp_path):
    """The umask belongs to the whole process: nobody may see it changed while a file is written."""
    before, seen = os.umask(0o022), []

    def write(number: int) -> None:
        with atomic_path(tmp_path / f"{number}.txt") as partial:
            (tmp_path / f"plain{number}").touch()
            partial.write_text("x")
        seen.append(stat.S_IMODE((tmp_path / f"plain{number}").stat().st_mode))

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(200)))
    finally:
        os.umask(before)
    assert set(seen) == {0o644}


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RegistrationError) as caught, atomic_path(tmp_path / "file" / "a.json"):
        pytest.fail("there is nowhere to write")
    assert caught.value.argument == "path"
    with pytest.raises(RegistrationError) as caught:
        output_folder(tmp_path / "file")
    assert caught.value.argument == "output_dir"


def test_target_that_is_a_folder(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(RegistrationError, match="path"):
        write_json(tmp_path / "a.json", {})
    assert names(tmp_path) == ["a.json"]


def test_json_round_trip(tmp_path):
    content = {"matrix": [[1.0, 0.1], [0.2, 1e-300]], "name": "Größe", "none": None, "ok": True}
    write_json(tmp_path / "r.json", content)
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "Größe" in text and text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_does_not_have_is_refused_and_nothing_written(tmp_path, value):
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "r.json", {"a": value})
    assert names(tmp_path) == []


def test_output_folder(tmp_path):
    folder = output_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert output_folder(str(folder)) == folder
