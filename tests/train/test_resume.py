"""A run that was stopped and continued ends in the adapter of the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qlora_cli import commands
from qlora_cli.display import QuietReport
from qlora_cli.errors import UserError
from qlora_cli.recipe import dump_recipe
from qlora_cli.train.checkpoint import checkpoints

HARD = {
    "quantization": {"data_type": "nf4", "compute_dtype": "auto"},
    "adapter": {"dropout": 0.05},
    "training": {"max_steps": 9, "gradient_accumulation_steps": 2, "save_steps": 2, "optimizer": "adamw_8bit"},
}
"""NF4, dropout, accumulation, three epochs of three steps, 8-bit optimizer state."""


def train(recipe: Any, **how: Any) -> Path:
    settings = {"main_process": True, "resume": "auto", "pause_at": None} | how
    return commands.train(recipe, b"", QuietReport(), **settings)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def check_equal(one: Path, other: Path) -> None:
    first, second = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert losses(one) == losses(other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model, rows_file) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(hard_recipe(tiny_model, rows_file, folder))
    return folder


def hard_recipe(tiny_model: Path, rows_file: Path, folder: Path, **training: Any) -> Any:
    from qlora_cli.recipe import Recipe

    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(tiny_model)},
            "quantization": HARD["quantization"],
            "adapter": {"r": 32, **HARD["adapter"]},
            "data": {
                "train": [{"path": str(rows_file)}],
                "eval": [{"path": str(rows_file.with_name("heldout.jsonl"))}],
            },
            "training": {
                "micro_batch_size": 2,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "eval_steps": 2,
                **HARD["training"],
                **training,
            },
            "output_dir": str(folder),
        }
    )


@pytest.mark.parametrize("pauses", [[1], [4], [2, 5, 8]])
def test_paused_and_continued_equals_uninterrupted(uninterrupted, tiny_model, rows_file, tmp_path, pauses):
    recipe = hard_recipe(tiny_model, rows_file, tmp_path)
    for step in pauses:
        train(recipe, pause_at=step)
        assert not (tmp_path / "adapter").exists()
    train(recipe)
    check_equal(tmp_path, uninterrupted)


SLOW_STEPS = """
import sys, time
from qlora_cli.train import loop
take = loop.take_step
def slow(session, *others):
    code = take(session, *others)
    print("step", session.step, flush=True)
    time.sleep(0.5)
    return code
loop.take_step = slow
from qlora_cli.cli import main
sys.argv = ["qlora", "train", sys.argv[1]]
main()
"""


def start(recipe: Any, tmp_path: Path) -> subprocess.Popen[str]:
    """`qlora train` in a process of its own, slowed down so that a signal meets the step that it is meant for."""
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_STEPS, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2)))},
    )


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    for printed in process.stdout:
        if printed.strip() == line:
            return
    raise AssertionError(process.stderr.read())


def test_killed_and_continued_equals_uninterrupted(uninterrupted, tiny_model, rows_file, tmp_path):
    run = tmp_path / "run"
    recipe = hard_recipe(tiny_model, rows_file, run)
    process = start(recipe, tmp_path)
    wait_for(process, "step 5")
    process.kill()
    process.wait()
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-000002", "step-000004"]
    train(recipe)
    check_equal(run, uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_so(tiny_model, rows_file, tmp_path, number, code):
    run = tmp_path / "run"
    process = start(hard_recipe(tiny_model, rows_file, run, save_steps=100), tmp_path)
    wait_for(process, "step 3")
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert "finishing this step and saving" in told
    assert re.search(r"stopped  after step [34], which is saved; the same command goes on", told)
    assert "Traceback" not in told
    assert [path.name for path in checkpoints(run / "checkpoints")] in (["step-000003"], ["step-000004"])


def test_a_finished_run_is_left_alone(uninterrupted, tiny_model, rows_file):
    before = (uninterrupted / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    started = time.perf_counter()
    train(hard_recipe(tiny_model, rows_file, uninterrupted))
    assert time.perf_counter() - started < 5
    assert (uninterrupted / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_held_out_rows_that_change_between_two_parts_of_a_run_are_told(tiny_model, rows_file, tmp_path):
    """The losses before and after would stand in one curve."""
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:4]))
    recipe = hard_recipe(tiny_model, rows_file, tmp_path / "run")
    values = recipe.model_dump(by_alias=True)
    values["data"]["eval"] = [{"path": str(held_out)}]
    recipe = recipe.model_validate(values)
    told: list[str] = []

    class Told(QuietReport):
        def say(self, text: str) -> None:
            told.append(text)

    def go_on(pause_at: int | None) -> bool:
        told.clear()
        commands.train(recipe, b"", Told(), main_process=True, resume="auto", pause_at=pause_at)
        return any("the held-out rows have changed since this run began" in line for line in told)

    assert not go_on(1)
    assert not go_on(2)
    held_out.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:3]))
    assert go_on(None)


def test_only_the_newest_checkpoints_are_kept(uninterrupted):
    assert [path.name for path in checkpoints(uninterrupted / "checkpoints")] == [
        "step-000006",
        "step-000008",
        "step-000009",
    ]


def test_changed_data_is_refused_on_resume(tiny_model, rows_file, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows_file.read_text())
    rows.with_name("heldout.jsonl").write_text(rows_file.with_name("heldout.jsonl").read_text())
    recipe = hard_recipe(tiny_model, rows, tmp_path / "run")
    train(recipe, pause_at=2)
    rows.write_text(rows_file.read_text().replace("batman", "robin"))
    with pytest.raises(UserError, match="the training data has changed since this run began"):
        train(recipe)


def test_resume_from_a_named_checkpoint(uninterrupted, tiny_model, rows_file, tmp_path):
    recipe = hard_recipe(tiny_model, rows_file, tmp_path)
    train(recipe, resume=str(uninterrupted / "checkpoints" / "step-000006"))
    first, second = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path, uninterrupted))
    assert all(first[name].equal(second[name]) for name in first)
    with pytest.raises(UserError, match=r"--resume .*nowhere: no checkpoint there"):
        train(hard_recipe(tiny_model, rows_file, tmp_path / "other"), resume=str(tmp_path / "nowhere"))


def test_a_checkpoint_of_two_processes_is_not_continued_by_one(tiny_model, rows_file, tmp_path, uninterrupted):
    from qlora_cli.train.checkpoint import load_checkpoint

    with pytest.raises(UserError, match="written by 1 processes, continued by 2: the global batch would differ"):
        load_checkpoint(uninterrupted / "checkpoints" / "step-000006", None, None, processes=2)


@pytest.mark.parametrize("packing", ["auto", True])
def test_a_stream_goes_on_where_it_stopped(tmp_path, tiny_model, rows_file, packing, monkeypatch):
    """In the middle of a block, and of its second pass over the rows."""
    monkeypatch.setattr("qlora_cli.data.stream.BLOCK", 8)
    streamed = {"train": [{"path": str(rows_file), "streaming": True}], "packing": packing}
    runs = [tmp_path / "whole", tmp_path / "stopped"]
    for run, pauses in zip(runs, ([], [1, 5]), strict=True):
        recipe = hard_recipe(tiny_model, rows_file, run)
        recipe = recipe.model_validate({**recipe.model_dump(by_alias=True), "data": {**streamed, "max_length": 256}})
        for pause in pauses:
            train(recipe, pause_at=pause)
        train(recipe)
    check_equal(*runs)
