"""A folder is whole or not there, whatever ends its writing, and is told by its content."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_cli.errors import Exit, UserError
from qlora_cli.model import whole_folder
from qlora_cli.model.whole_folder import MANIFEST, content_name, fault, publish, publish_by_content, publish_new, sha256


def write_files(place: Path) -> None:
    (place / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (place / "start").mkdir()
    (place / "start" / "state.json").write_text('{"step": 3}')


def test_what_is_published_verifies(tmp_path):
    path = publish(tmp_path / "whole", write_files)
    assert path == tmp_path / "whole"
    assert fault(path) == ""
    described = json.loads((path / MANIFEST).read_text())["files"]
    assert described.keys() == {"weights.bin", "start/state.json"}
    assert described["weights.bin"] == {"size": 2048, "sha256": sha256(path / "weights.bin")}
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda f: (f / "start/state.json").unlink(), "start/state.json is missing"),
        (lambda f: (f / "weights.bin").write_bytes(b""), "weights.bin has 0 bytes, 2048 were written"),
        (lambda f: flip_a_bit(f / "weights.bin"), "weights.bin has changed since it was written"),
        (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda f: (f / MANIFEST).write_text("{}"), "manifest.json is damaged"),
        (lambda f: (f / MANIFEST).write_text('{"files": [1]}'), "manifest.json is damaged"),
    ],
)
def test_what_is_wrong_is_told(harm, told, tmp_path):
    folder = publish(tmp_path / "whole", write_files)
    harm(folder)
    assert fault(folder) == told


def test_what_the_disk_does_not_read_is_no_fault_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be read: Not a directory") as error:
        fault(tmp_path / "file")
    assert error.value.code == Exit.FAILED


def test_a_name_by_content_is_a_function_of_the_content_alone(tmp_path):
    one = publish_by_content(tmp_path / "a", write_files)
    os.utime(one / "weights.bin", (1, 1))
    other = publish_by_content(tmp_path / "b", write_files)
    assert one.name == other.name == content_name(one) == content_name(other)
    assert len(one.name) == 64
    assert fault(one) == ""
    assert [*(tmp_path / "a").iterdir()] == [one]
    one.rename(tmp_path / "renamed")
    assert content_name(tmp_path / "renamed") == other.name

    changes: list[Callable[[Path], object]] = [
        lambda place: flip_a_bit(place / "weights.bin"),
        lambda place: (place / "weights.bin").rename(place / "others.bin"),
        lambda place: (place / "more").write_text(""),
        lambda place: (place / "start/state.json").unlink(),
    ]
    names = {publish_by_content(tmp_path / "c", lambda place, change=change: (write_files(place), change(place))).name
             for change in changes}  # fmt: skip
    assert len({*names, other.name}) == 1 + len(changes)


def test_the_same_content_twice_is_one_folder_and_mends_a_damaged_one(tmp_path):
    one = publish_by_content(tmp_path, write_files)
    assert publish_by_content(tmp_path, write_files) == one
    flip_a_bit(one / "weights.bin")
    assert fault(one) != ""
    assert publish_by_content(tmp_path, write_files) == one
    assert fault(one) == ""
    assert [*tmp_path.iterdir()] == [one]


def test_a_disk_that_is_full_while_tensors_are_written_is_a_message(tmp_path):
    """safetensors reports it by an error of its own, which is no OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # Python ignores SIGXFSZ: writes fail with EFBIG
    try:
        with pytest.raises(UserError, match=r"whole: cannot be written: .*File too large.*bytes free") as error:
            publish(tmp_path / "whole", lambda f: save_file({"a": torch.zeros(10_000)}, f / "a.safetensors"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.code == Exit.FAILED
    assert [*tmp_path.iterdir()] == [], "what a full disk needs least"


@pytest.mark.parametrize("make", [lambda root, write: publish(root / "whole", write), publish_by_content])
@pytest.mark.parametrize(
    ("reason", "raised"),
    [
        (
            OSError(28, os.strerror(28)),
            pytest.raises(UserError, match=r"No space left on device \([\d,]+ bytes free\)"),
        ),
        (KeyboardInterrupt(), pytest.raises(KeyboardInterrupt)),
        (UserError("a.safetensors: q", "holds NaN", "mend it"), pytest.raises(UserError, match="holds NaN")),
    ],
    ids=["full disk", "interrupted", "bad weight"],
)
def test_a_failing_write_leaves_nothing(make, reason, raised, tmp_path):
    def write(place: Path) -> None:
        write_files(place)
        raise reason

    with raised:
        make(tmp_path, write)
    assert [*tmp_path.iterdir()] == []


def test_what_a_killed_write_left_is_not_in_the_way(tmp_path):
    (tmp_path / ".whole.tmp" / "start").mkdir(parents=True)
    (tmp_path / ".whole.tmp" / "torn").write_text("")
    assert fault(publish(tmp_path / "whole", write_files)) == ""
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {MANIFEST, "weights.bin", "start"}
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_files_are_synced_before_the_rename_and_the_manifest_is_last(tmp_path, monkeypatch):
    calls: list[str] = []
    sync, rename = whole_folder.sync, Path.rename
    monkeypatch.setattr(whole_folder, "sync", lambda path: (calls.append(path.name), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (calls.append("rename"), rename(path, to))[1])
    publish(tmp_path / "whole", write_files)
    assert calls == ["start", "state.json", "weights.bin", MANIFEST, ".whole.tmp", "rename", tmp_path.name]


def test_a_new_folder_is_not_written_where_another_process_may_be_at_work(tmp_path):
    (tmp_path / ".new.tmp").mkdir()
    (tmp_path / ".new.tmp" / "theirs").write_text("precious")
    with pytest.raises(UserError, match=r"\.new\.tmp: is there: another process is writing, or one was killed"):
        publish_new(tmp_path / "new", write_files)
    assert (tmp_path / ".new.tmp" / "theirs").read_text() == "precious"
    shutil.rmtree(tmp_path / ".new.tmp")
    assert fault(publish_new(tmp_path / "new", write_files)) == ""


def test_a_new_folder_may_be_the_empty_one_that_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert publish_new(Path("."), write_files) == tmp_path / "here"
    assert fault(tmp_path / "here") == ""


def test_a_readme_is_no_part_of_the_content(tmp_path):
    def write(place: Path) -> None:
        write_files(place)
        (place / "README.md").write_text("mine")

    path = publish_by_content(tmp_path, write)
    assert path == publish_by_content(tmp_path, write_files)
    (path / "README.md").write_text("edited")
    assert fault(path) == ""


def test_sizes_alone_do_not_tell_a_flipped_bit(tmp_path):
    folder = publish(tmp_path / "whole", write_files)
    flip_a_bit(folder / "weights.bin")
    assert fault(folder, contents=False) == ""
    assert fault(folder)
    (folder / "weights.bin").write_bytes(b"")
    assert fault(folder, contents=False)
