"""Checkpoints are written while training goes on, and are what they would be if it had waited for them."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli import commands
from qlora_cli.display import QuietReport
from qlora_cli.errors import Exit, UserError
from qlora_cli.model import whole_folder
from qlora_cli.train import loop
from qlora_cli.train.checkpoint import checkpoints, host_copies
from qlora_cli.train.writer import Writer

PATIENCE_S = 30


def train(recipe, pause_at=None):
    return commands.train(recipe, b"", QuietReport(), main_process=True, resume="auto", pause_at=pause_at)


def test_one_write_waits_for_the_one_before():
    done: list[int] = []
    first = threading.Event()

    def write() -> None:
        assert first.wait(PATIENCE_S)
        done.append(1)

    with Writer() as writer:
        writer.start(write)
        writer.check()
        assert not done, "check waits for nothing"
        threading.Timer(0.1, first.set).start()
        writer.start(lambda: done.append(len(done) + 1))
        assert done[0] == 1
    assert done == [1, 2]


def fail() -> None:
    raise UserError("disk", "is full", "free space", Exit.FAILED)


def use(writer: Writer, *calls: Callable[[Writer], object]) -> None:
    """The calls in the writer's block."""
    with writer:
        for call in calls:
            call(writer)


def check_when_done(writer: Writer) -> None:
    assert writer.writing is not None
    writer.writing.exception(PATIENCE_S)
    writer.check()


def broken(writer: Writer) -> None:
    raise ValueError("mine")


@pytest.mark.parametrize(
    "meet", [check_when_done, Writer.wait, lambda writer: writer.start(print), lambda writer: None]
)
def test_an_error_of_the_thread_is_raised_at_the_next_call_or_at_the_end(meet):
    with pytest.raises(UserError, match="disk: is full"):
        use(Writer(), lambda writer: writer.start(fail), meet)


def test_the_blocks_own_error_goes_first():
    writer = Writer()
    with pytest.raises(ValueError, match="mine"):
        use(writer, lambda writer: writer.start(fail), broken)
    assert "is full" in str(writer.failure), "what was not written must not be lost beside it"


def test_what_is_begun_is_finished_when_the_block_fails():
    done: list[int] = []
    held = threading.Event()
    threading.Timer(0.1, held.set).start()
    with pytest.raises(ValueError, match="mine"):
        use(Writer(), lambda writer: writer.start(lambda: (held.wait(PATIENCE_S), done.append(1))), broken)
    assert done == [1]


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_steps_taken_while_it_is_written_do_not_change_a_checkpoint(make_recipe, tmp_path, monkeypatch):
    """The thread is held back until the run has taken its last step."""
    training = {"max_steps": 4, "save_steps": 3, "optimizer": "adamw_8bit"}

    def recipe(name: str):
        return make_recipe(adapter={"r": 64, "dropout": 0.1}, training=training, output_dir=str(tmp_path / name))

    train(recipe("waited"), pause_at=3)
    taken, take, write = threading.Event(), loop.take_step, loop.write_checkpoint

    def take_step(session, *others):
        code = take(session, *others)
        if session.step == 4:
            taken.set()
        return code

    def held_back(folder, held, keep):
        if held.step == 3:
            assert taken.wait(PATIENCE_S), "training waited for the checkpoint"
        return write(folder, held, keep)

    monkeypatch.setattr(loop, "take_step", take_step)
    monkeypatch.setattr(loop, "write_checkpoint", held_back)
    train(recipe("beside"))
    name = Path("checkpoints", "step-000003")
    assert digests(tmp_path / "beside" / name) == digests(tmp_path / "waited" / name)
    assert [path.name for path in checkpoints(tmp_path / "beside" / "checkpoints")] == ["step-000003", "step-000004"]


def test_a_full_disk_ends_the_run_as_an_error_and_keeps_what_was_saved(make_recipe, tmp_path, monkeypatch):
    synced = whole_folder.sync

    def full(path: Path) -> None:
        if "step-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(path)

    monkeypatch.setattr(whole_folder, "sync", full)
    with pytest.raises(UserError, match=r"step-000004: cannot be written: No space left .*what was saved is") as error:
        train(make_recipe(training={"max_steps": 6, "save_steps": 2}))
    assert error.value.code == Exit.FAILED
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run / "adapter").exists()
    monkeypatch.undo()
    assert train(make_recipe(training={"max_steps": 6, "save_steps": 2})).is_dir()


def test_a_process_that_dies_while_it_writes_leaves_the_checkpoint_before(make_recipe, tmp_path, monkeypatch):
    """What is on the disk at every sync of the second checkpoint is what a kill -9 there would leave."""
    synced, seen = whole_folder.sync, []

    def look(path: Path) -> None:
        synced(path)
        if ".step-000004.tmp" in str(path):
            seen.append([one.name for one in checkpoints(tmp_path / "run" / "checkpoints")])

    monkeypatch.setattr(whole_folder, "sync", look)
    train(make_recipe(training={"max_steps": 6, "save_steps": 2, "save_total_limit": 1}))
    assert len(seen) > 3
    assert all(names == ["step-000002"] for names in seen), "the one before goes when the new one is there"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000006"]


def test_copies_share_no_memory_with_what_they_are_of_or_with_each_other():
    tensor = torch.arange(6.0).view(2, 3)
    copies = host_copies({"a": tensor.T, "b": tensor.T})
    tensor.zero_()
    assert torch.equal(copies["a"], torch.arange(6.0).view(2, 3).T)
    assert copies["a"].is_contiguous()
    assert copies["a"].data_ptr() != copies["b"].data_ptr()


def test_a_checkpoint_is_what_the_model_and_its_optimizer_held(make_recipe, tmp_path):
    train(make_recipe(training={"max_steps": 3, "save_steps": 100}))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    names = {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer.safetensors"}
    assert {path.name for path in checkpoint.iterdir()} == names | {"random.safetensors", "state.json"}
    adapter, result = (load_file(at / "adapter_model.safetensors") for at in (checkpoint, tmp_path / "run" / "adapter"))
    assert adapter.keys() == result.keys()
    assert all(adapter[name].equal(result[name]) for name in adapter)
    assert load_file(checkpoint / "random.safetensors").keys() == {"0.cpu"}
