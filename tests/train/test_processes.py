"""Two processes give the adapter of one with the same global batch, and only the first of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli import commands
from qlora_cli.display import QuietReport
from qlora_cli.recipe import dump_recipe


def launch(recipe, tmp_path: Path, processes: int) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` over gloo. Its --cpu starts a single process whatever is asked for; --multi_gpu starts all,
    and ACCELERATE_USE_CPU puts them on the CPU."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               "-m", "qlora_cli", "train", str(path)]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_two_processes_equal_one_with_the_same_global_batch(make_recipe, rows_file, heldout_file, tmp_path):
    """Five rows per step of one process cannot be dealt evenly; twelve rows leave a last window of two."""
    settings = {"max_steps": 6, "save_steps": 4, "learning_rate": 5e-3}
    data = {"train": [{"path": str(rows_file)}], "eval": [{"path": str(heldout_file)}]}
    alone = make_recipe(
        training={**settings, "micro_batch_size": 10, "gradient_accumulation_steps": 1},
        data=data,
        output_dir=str(tmp_path / "one"),
    )
    pair = make_recipe(
        training={**settings, "micro_batch_size": 5, "gradient_accumulation_steps": 1},
        data=data,
        output_dir=str(tmp_path / "two"),
    )
    commands.train(alone, b"", QuietReport(), main_process=True, resume="auto", pause_at=None)
    done = launch(pair, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "two" / "adapter")
    assert done.stderr.count("step 6/6  loss") == 1, "both processes talk"

    first, second = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    difference = torch.cat([(first[name] - second[name]).flatten() for name in first]).norm()
    size = torch.cat([first[name].flatten() for name in first if "lora_B" in name]).norm()
    assert difference / size < 1e-4
    one, two = ([json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
                for run in ("one", "two"))  # fmt: skip
    assert len(one) == len(two), "both processes write"
    for ours, theirs in zip(one, two, strict=True):
        name = "loss" if "loss" in ours else "eval_loss"
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5)
    state = json.loads((tmp_path / "two" / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["processes"] == 2
    again = launch(pair, tmp_path, processes=2)  # a finished run ends at once, on both processes
    assert again.returncode == 0, again.stderr
    assert "this run has finished" in again.stderr
