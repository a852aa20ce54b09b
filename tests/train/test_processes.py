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
from tests.conftest import conversation


def launch(processes: int, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A module's command, with two processes by `accelerate launch` over gloo. Its --cpu starts a single one whatever
    is asked for; --multi_gpu starts all, and ACCELERATE_USE_CPU puts them on the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]  # fmt: skip
    whole = [sys.executable, "-m", *(launcher if processes > 1 else []), *map(str, command)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=300, env=environment)


def train(recipe, tmp_path: Path, processes: int, *options: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return launch(processes, "qlora_cli", "train", path, *options)


def test_two_processes_equal_one_with_the_same_global_batch(make_recipe, rows_file, heldout_file, tmp_path):
    """Five rows per step of one process cannot be dealt evenly; twelve rows leave a last window of two."""
    settings = {"max_steps": 6, "save_steps": 3, "learning_rate": 5e-3}
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
    done = train(pair, tmp_path, processes=2)
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
    halves = pair.model_copy(update={"output_dir": str(tmp_path / "halves")})
    assert train(halves, tmp_path, 2, "--max-steps", "3").returncode == 0
    assert not (tmp_path / "halves" / "adapter").exists()
    assert train(halves, tmp_path, 2).returncode == 0
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        stopped, whole = ((tmp_path / run / name).read_bytes() for run in ("halves", "two"))
        assert stopped == whole, f"a resumed run of two processes has another {name}"
    again = train(pair, tmp_path, processes=2)  # a finished run ends at once, on both processes
    assert again.returncode == 0, again.stderr
    assert "this run has finished" in again.stderr


def test_every_step_trains_the_same_rows_wherever_it_is_begun_and_on_any_number_of_processes(make_recipe, tmp_path):
    """With 1 and 2 preparing processes and with none (a filled cache), packed or not, prepared or streamed."""
    rows = [conversation(f"q{'u' * (number % 5)}{number}", f"a{number}") for number in range(22)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "one worker": {"workers": 1},
        "two workers": {"workers": 2, "max_length": 255},  # another key of the cache
        "no worker": {"workers": 2},
        "packed": {"packing": True, "max_length": 64},
        "a stream": {"workers": 1},
        "a stream, two workers": {"workers": 2},
        "a packed stream": {"packing": True, "max_length": 64},
    }

    def told(processes: int, micro_batch_size: int) -> dict[str, dict[str, list[list[list[int]]]]]:
        recipes = {}
        for name, options in kinds.items():
            source = {"path": str(tmp_path / "rows.jsonl"), "streaming": "stream" in name}
            training = {"micro_batch_size": micro_batch_size, "max_steps": 9, "gradient_accumulation_steps": 1}
            data = {"train": [source], "max_length": 256, "packing": False, **options}
            recipe = make_recipe(data=data, training=training, output_dir=str(tmp_path / "run"))
            starts = [1, 4, 7] if "stream" in name else range(1, 9)
            recipes[name] = (recipe.model_dump(by_alias=True, mode="json"), [*starts])
        wanted, out = tmp_path / "recipes.json", tmp_path / f"{processes}.json"
        wanted.write_text(json.dumps(recipes))
        cache = str(tmp_path / f"cache of {processes}")
        done = launch(processes, "tests.train.sample_ids", wanted, out, QLORA_CACHE=cache)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())

    alone, pair = told(1, 4), told(2, 2)
    assert pair == alone
    for starts in alone.values():
        for start, steps in starts.items():
            assert steps == starts["0"][int(start) :]
    assert alone["one worker"]["0"] == alone["no worker"]["0"] == alone["two workers"]["0"]
    assert alone["a stream"]["0"] == alone["a stream, two workers"]["0"]
    epoch = [row for step in alone["one worker"]["0"][:6] for row in step]
    assert len(epoch) == len(set(map(tuple, epoch))) == len(rows), "not each row once"


def test_two_processes_stop_early_together_with_the_best_adapter(make_recipe, rows_file, heldout_file, tmp_path):
    recipe = make_recipe(
        data={"train": [{"path": str(rows_file)}], "eval": [{"path": str(heldout_file)}]},
        training={
            "max_steps": 40,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.15,
            "lr_scheduler": "constant",
            "warmup_ratio": 0.0,
            "eval_steps": 1,
        },
        evaluation={"best_metric": "eval_loss", "early_stopping_patience": 2},
        output_dir=str(tmp_path / "pair"),
    )
    done = train(recipe, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "pair" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 2 < 40
    kept, result = (
        tmp_path / "pair" / name / "adapter_model.safetensors" for name in (f"best/step-{best:06d}", "adapter")
    )
    assert kept.read_bytes() == result.read_bytes()
