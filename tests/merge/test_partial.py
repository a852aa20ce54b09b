"""A merge that is interrupted, has no room, or is not alone: what stays, and how it goes on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import Exit, UserError
from qlora_cli.merge import merge, partial
from qlora_cli.merge.partial import INPUTS, made_aside, place_of, refuse_inside
from qlora_cli.model.safetensors_stream import SafetensorsWriter
from tests.conftest import REPOSITORY
from tests.merge_runs import change_tensors, contents, finish_run, sign, write_sharded_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory, rows_file) -> Path:
    """A run on a base of three files."""
    folder = tmp_path_factory.mktemp("sharded")
    return finish_run(folder, write_sharded_model(folder / "base"), rows_file)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it, with a base of its own, to be changed."""
    shutil.copytree(finished.parent / "base", tmp_path / "base")
    shutil.copytree(finished, tmp_path / "run")
    for name in ("recipe.yaml", "resolved.yaml"):
        text = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text(text.replace(str(finished.parent), str(tmp_path)))
    return tmp_path / "run"


@contextmanager
def interrupted_after(files: int) -> Iterator[None]:
    """A user who presses Ctrl-C when so many files of weights are made."""
    real, count = merge._write_shard, 0

    def counted(*arguments: Any) -> bool:
        nonlocal count
        made = real(*arguments)
        count += 1
        if count == files:
            raise KeyboardInterrupt
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "_write_shard", counted)
        yield


def shards(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {path.name: path.stat() for path in folder.glob("model*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


# ── killed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def killed(finished, tmp_path_factory) -> dict[str, Any]:
    """What tests/killed_merges.py has seen."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.killed_merges", str(finished), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_any_moment_the_same_command_ends_in_the_undisturbed_merge(killed, finished, qlora, tmp_path):
    assert qlora("merge", finished, "--out", tmp_path / "whole", "--no-verify").code == 0
    whole = contents(tmp_path / "whole")
    names = [one["moment"].split(" ")[0] for one in killed["killed"]]
    assert {name: names.count(name) for name in ("mkdir", "write", "rename")} == {"mkdir": 1, "write": 3, "rename": 1}
    assert names.count("replace") >= 5
    for one in killed["killed"]:
        assert one["code"] == -9, one
        assert one["beside"] == [name for name in one["beside"] if name.startswith("kept-")], one
        found = contents(Path(one["kept"]))
        late = one["moment"] == "rename /out"
        assert found.pop(INPUTS, None) is None or late, one
        assert found == whole, one["moment"]
        assert one["again"] == 0, one["said"]


def test_what_had_its_name_when_it_was_killed_is_not_written_again(killed):
    assert {len(one["whole"]) for one in killed["killed"]} == {0, 1, 2, 3}
    for one in killed["killed"]:
        assert one["whole"].items() <= one["after"].items(), one["moment"]
        count = len(one["whole"])
        told = f"; {count} file{' was' if count == 1 else 's were'} there already"
        assert (told in one["said"]) is (count > 0 and not one["out"]), one


def test_of_two_at_once_the_second_is_told_and_the_first_ends_well(killed, finished, qlora, tmp_path):
    pair = killed["beside"]
    assert (pair["second"], pair["first"]) == (Exit.IN_USE, 0)
    assert ".out.partial: another process is merging there. Wait for it to end." in pair["said"]
    assert qlora("merge", finished, "--out", tmp_path / "whole", "--no-verify").code == 0
    assert contents(Path(pair["kept"])) == contents(tmp_path / "whole")


def test_a_place_that_got_its_name_between_looking_and_locking_is_in_use(tmp_path, monkeypatch):
    out, lock = tmp_path / "out", partial.fcntl.flock

    def renamed_meanwhile(descriptor: int, how: int) -> None:
        place_of(out).rename(tmp_path / "elsewhere")
        lock(descriptor, how)

    monkeypatch.setattr(partial.fcntl, "flock", renamed_meanwhile)
    with pytest.raises(UserError, match="another process is merging there") as caught, made_aside(out, {}, 1):
        pass
    assert caught.value.code == Exit.IN_USE


def test_a_place_that_is_taken_in_the_meantime_is_left_alone_and_the_work_is_kept(tmp_path):
    out = tmp_path / "out"

    def make() -> None:
        with made_aside(out, {}, 1) as aside:
            (aside / "model.safetensors").touch()
            out.mkdir()
            (out / "thesis.tex").touch()

    with pytest.raises(UserError, match="nothing is overwritten"):
        make()
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    assert {path.name for path in place_of(out).iterdir()} == {INPUTS, "model.safetensors"}


# ── interrupted, and something changed ───────────────────────────────────────────────────────────────────────────────


def other_dtype(run: Path) -> list[str]:
    return ["--dtype", "bfloat16"]


def other_base(run: Path) -> list[str]:
    base = run.parent / "base"
    change_tensors(
        next(iter(sorted(base.glob("*.safetensors")))), lambda tensors: {n: t * 1.5 for n, t in tensors.items()}
    )
    return []


def other_adapter(run: Path) -> list[str]:
    adapter = run / "adapter"
    change_tensors(
        adapter / "adapter_model.safetensors", lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()}
    )
    sign(adapter)
    return []


def other_scaling(run: Path) -> list[str]:
    file = run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 3}))
    sign(run / "adapter")
    return []


@pytest.mark.parametrize("change", [other_dtype, other_base, other_adapter, other_scaling])
def test_a_merge_of_something_else_begins_anew(run, qlora, tmp_path, change):
    command = ["merge", run, "--no-verify", "--out"]
    with interrupted_after(2):
        assert qlora(*command, tmp_path / "out").code == Exit.SIGINT
    left = shards(place_of(tmp_path / "out"))
    assert (len(left), (tmp_path / "out").exists()) == (2, False)
    (place_of(tmp_path / "out") / "of-another-time.json").touch()
    more = change(run)
    ended = qlora(*command, tmp_path / "out", *more)
    assert (ended.code, "there already" in ended.err) == (0, False), ended.err
    assert qlora(*command, tmp_path / "whole", *more).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not any(one in left.values() for one in shards(tmp_path / "out").values())


def test_a_certified_merge_takes_up_what_is_there_too(finished, qlora, tmp_path):
    with interrupted_after(2):
        assert qlora("merge", finished, "--out", tmp_path / "out").code == Exit.SIGINT
    left = shards(place_of(tmp_path / "out"))
    ended = qlora("merge", finished, "--out", tmp_path / "out")
    assert (ended.code, "; 2 files were there already; comparing" in ended.err) == (0, True), ended.err
    assert left.items() <= shards(tmp_path / "out").items()
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["certificate"]["held"]


def test_somebody_else_s_folder_is_refused_and_untouched(finished, qlora, tmp_path):
    theirs = place_of(tmp_path / "out")
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    ended = qlora("merge", finished, "--out", tmp_path / "out", "--no-verify")
    assert (ended.code, [path.name for path in theirs.iterdir()]) == (Exit.USAGE, ["thesis.tex"])
    assert ".out.partial: is there and was not left by a merge. Move it away, or name another --out." in ended.err


# ── no room ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """A file that grows beyond that cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_be_written_leaves_the_whole_ones_and_nothing_half_done(finished, qlora, tmp_path):
    largest = sorted(path.stat().st_size for path in (finished.parent / "base").glob("*.safetensors"))
    names = sorted(path.name for path in (finished.parent / "base").glob("*.safetensors"))
    first = (finished.parent / "base" / names[0]).stat().st_size
    assert first < largest[-1], "the first file fits, a later one does not"
    with files_of_at_most(first + 1000):
        ended = qlora("merge", finished, "--out", tmp_path / "out", "--no-verify")
    assert ended.code == Exit.FAILED
    assert "cannot write: File too large; " in ended.err
    assert f"{largest[-1]:,} bytes are needed. Free space there or name another folder." in ended.err
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    left = shards(place_of(tmp_path / "out"))
    assert [*left] == names[:1]
    assert {path.name for path in place_of(tmp_path / "out").iterdir()} == {*left, INPUTS}
    ended = qlora("merge", finished, "--out", tmp_path / "out", "--no-verify")
    assert (ended.code, "; 1 file was there already" in ended.err) == (0, True), ended.err
    assert left.items() <= shards(tmp_path / "out").items()


def test_no_room_for_a_first_file_leaves_nothing_and_is_no_trouble_later(finished, qlora, tmp_path):
    with files_of_at_most(1000):  # less than what is merged of what takes
        ended = qlora("merge", finished, "--out", tmp_path / "out", "--no-verify")
    assert (ended.code, list(tmp_path.iterdir())) == (Exit.FAILED, []), ended.err
    assert "bytes are needed. Free space there or name another folder." in ended.err
    place_of(tmp_path / "out").mkdir()
    (place_of(tmp_path / "out") / f".{INPUTS}.tmp").touch()  # of one that was killed at that moment
    assert qlora("merge", finished, "--out", tmp_path / "out", "--no-verify").code == 0


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of a megabyte of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    tried = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if not tried or tried.returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@contextmanager
def filled_after(disk: Path, wanted: str) -> Iterator[None]:
    """Somebody else fills the disk once a file of that name is there."""
    real = SafetensorsWriter.write

    def write(writer: Any, *tensor: Any) -> None:
        if any(disk.rglob(wanted)) and not (disk / "ballast").exists():
            fill(disk)
        real(writer, *tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", write)
        yield


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))


def test_a_disk_that_fills_up_in_mid_merge_ends_it_and_with_room_it_goes_on(finished, qlora, small_disk):
    command = ["merge", finished, "--out", small_disk / "out", "--no-verify"]
    with filled_after(small_disk, "model-00001-*"):
        ended = qlora(*command)
    assert (ended.code, "cannot write: No space left on device; " in ended.err) == (Exit.FAILED, True), ended.err
    assert "bytes are needed. Free space there or name another folder." in ended.err
    left = shards(place_of(small_disk / "out"))
    assert ([*left], (small_disk / "out").exists()) == (["model-00001-of-00003.safetensors"], False)
    again = qlora(*command)
    assert again.code == Exit.FAILED
    assert "bytes are needed and " in again.err
    (small_disk / "ballast").unlink()
    assert qlora(*command).code == 0
    assert left.items() <= shards(small_disk / "out").items()


def test_a_disk_that_is_full_when_the_record_is_written_ends_it_too(finished, qlora, small_disk, monkeypatch):
    from qlora_cli.merging import verb

    real = verb.record

    def full_now(*arguments: Any) -> dict[str, Any]:
        fill(small_disk)
        return real(*arguments)

    monkeypatch.setattr(verb, "record", full_now)
    ended = qlora("merge", finished, "--out", small_disk / "out", "--no-verify")
    assert (ended.code, "cannot write: No space left on device; " in ended.err) == (Exit.FAILED, True), ended.err
    assert not (small_disk / "out").exists()
    (small_disk / "ballast").unlink()
    monkeypatch.undo()
    ended = qlora("merge", finished, "--out", small_disk / "out", "--no-verify")
    assert (ended.code, "; 3 files were there already" in ended.err) == (0, True), ended.err


# ── places that are refused ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("run/adapter/merged", "the adapter"),
        ("run/adapter", "the adapter"),
        ("run/checkpoints/merged", "the checkpoints"),
        ("run/checkpoints/step-000004/merged", "the checkpoints"),
        ("base/merged", "the base"),
        ("base", "the base"),
        ("to-adapter/merged", "the adapter"),
        ("to-adapter", "the adapter"),
        ("to-base/deep/in/merged", "the base"),
        ("run/../base/merged", "the base"),
    ],
)
def test_a_place_inside_what_is_read_is_refused_before_a_weight_is(run, qlora, tmp_path, place, what):
    (tmp_path / "to-adapter").symlink_to(run / "adapter")
    (tmp_path / "to-base").symlink_to(tmp_path / "base")
    before = sorted(tmp_path.rglob("*"))
    ended = qlora("merge", run, "--out", tmp_path / place)
    assert (ended.code, ended.out) == (Exit.USAGE, "")
    assert f"is inside {what}, " in ended.err
    assert ended.err.endswith("Name a folder beside it.\n")
    assert "examples" not in ended.err, "no row was read for it"
    assert sorted(tmp_path.rglob("*")) == before


def a_file(out: Path) -> None:
    out.write_text("mine")


def a_folder(out: Path) -> None:
    out.mkdir()
    (out / "mine").touch()


def a_dangling_link(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


def a_loop(out: Path) -> None:
    out.symlink_to(out)


def a_link_to_an_empty_folder(out: Path) -> None:
    (out.parent / "empty").mkdir()
    out.symlink_to(out.parent / "empty")


@pytest.mark.parametrize("make", [a_file, a_folder, a_dangling_link, a_loop, a_link_to_an_empty_folder])
def test_what_is_there_is_never_overwritten(finished, qlora, tmp_path, make):
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    ended = qlora("merge", finished, "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (Exit.USAGE, "")
    assert (
        "out: it exists and is not an empty folder; nothing is overwritten. Name a new folder with --out" in ended.err
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_named_by_dots_is_a_folder_as_any(finished, qlora, tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    assert qlora("merge", finished, "--out", ".", "--no-verify", "--quantize", "nf4").code == 0
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"below", "below-nf4"}
    monkeypatch.chdir(tmp_path / "here" / "below")
    ended = qlora("merge", finished, "--out", "..", "--no-verify", "--base", "both")
    assert (ended.code, "nothing is overwritten" in ended.err) == (Exit.USAGE, True)


def test_a_folder_beside_what_is_read_is_no_part_of_it(tmp_path):
    (tmp_path / "adapter").mkdir()
    refuse_inside(tmp_path / "adapter-merged", {"the adapter": tmp_path / "adapter"})
    with pytest.raises(UserError, match="is inside the adapter"):
        refuse_inside(tmp_path / "adapter" / ".." / "adapter" / "x", {"the adapter": tmp_path / "adapter"})
