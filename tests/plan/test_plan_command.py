"""`qlora plan` as a user meets it: the page, the object, exit codes, what it reads, and how bad input is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from qlora_cli.plan.target import size_of, target_of
from scripts import plan_table
from scripts.plan_table import GB, PAPER_GB, SHAPES, config_of, line_of, rehearsed
from tests.conftest import REPOSITORY, Ended

SIZES = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8}
Qlora = Callable[..., Ended]


@pytest.fixture(scope="module")
def config_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with config.json and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(**SIZES, vocab_size=4096, max_position_embeddings=1024).save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


@pytest.fixture
def recipe(config_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return written(config_alone, "rows.jsonl", tmp_path, monkeypatch)


@pytest.fixture
def recipe_with_rows(tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return written(tiny_model, str(rows_file), tmp_path, monkeypatch)


def written(model: Path, rows: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    values = {
        "model": {"name_or_path": str(model)},
        "quantization": {"compute_dtype": "bfloat16"},
        "adapter": {"r": 128},
        "data": {"train": [{"path": rows}], "max_length": 256},
        "training": {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2},
        "output_dir": "runs/planned",
    }
    path = folder / "r.yaml"
    path.write_text(json.dumps(values))
    return path


def told(ended: Ended, code: int = 0) -> dict[str, Any]:
    assert ended.code == code, ended.err
    return json.loads(ended.out)


# ── the page and the object ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_config_of_a_hub_model_gives_a_page_of_80_columns_in_a_pipe(config_alone: Path, recipe: Path):
    """In a process of its own, offline; in the hub's cache lies config.json and nothing else."""
    cached, commit = recipe.parent / "hub" / "models--someone--llama", "0" * 40
    shutil.copytree(config_alone, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_CACHE": str(cached.parent), "HF_HUB_OFFLINE": "1"}
    arguments = ["plan", recipe.name, "--gpu", "24GiB", "--set", "model.name_or_path=someone/llama"]
    arguments += ["--set", "quantization.embeddings=int4"]  # whose scales need a table that nobody has made yet
    done = subprocess.run(
        [sys.executable, "-m", "qlora_cli", *arguments],
        capture_output=True,
        encoding="utf-8",
        cwd=recipe.parent,
        env=environment,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 40
    for start in ("model", "memory", " weights", " temporary", "allocated", "reserved", "the device's own", "needed"):
        assert any(line.startswith(start) for line in lines), start
    page = re.sub(r"\s+", " ", done.stdout)
    assert "model someone/llama, causal_lm, nf4 batch 2 rows of 256 tokens" in page
    assert "an NVIDIA GPU of 24 GiB: 25.77 GB" in page
    assert "3 of 3 layers recomputed" in page
    assert "rows were not read (rows.jsonl: no such file)" in page
    assert "of 25.77 GB" in page


def test_the_object_holds_the_figures_apart_and_they_add_up(recipe: Path, qlora: Qlora):
    found = told(qlora("plan", recipe, "--gpu", "24GiB", "--json"))
    memory = found["memory"]
    assert found["fits"] is True
    assert found["device"] == {
        "kind": "cuda",
        "name": "an NVIDIA GPU of 24 GiB",
        "budget_bytes": 24 << 30,
        "here": False,
    }
    assert sum(memory["by_kind"].values()) == memory["allocated_bytes"] <= memory["reserved_bytes"]
    assert memory["bytes"] == memory["reserved_bytes"] + memory["context_bytes"]
    assert memory["by_kind"]["optimizer"] < 10**6 < memory["host_bytes"], "of a paged optimizer"
    assert found["batch"] == {"rows": 2, "tokens": 256, "accumulated": 2}
    assert found["largest"]["length"] == found["whole_length"] == 1024
    assert found["disk"]["bytes"] == sum(found["disk"][part] for part in ("checkpoints", "adapter", "base"))
    assert (found["rows"], found["steps"], found["tokens"]) == (None, None, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine's own device is a GPU here")
def test_without_a_size_the_plan_is_for_this_machine(recipe: Path, qlora: Qlora):
    found = told(qlora("plan", recipe, "--json"))
    assert (found["device"]["kind"], found["device"]["here"]) == ("cpu", True)
    assert 0 < found["device"]["budget_bytes"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found["memory"]["context_bytes"] == 0
    assert found["memory"]["layers_recomputed"] == 0
    assert found["largest"]["micro_batch_size"] <= 64, "more take long to rehearse, and make no CPU faster"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine's own device is a GPU here")
def test_the_memory_that_is_free_is_less_than_there_is():
    assert 0 < target_of(None).budget_bytes < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ── what does not fit ────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_does_not_fit_ends_with_1_and_every_change_makes_it_fit(recipe: Path, qlora: Qlora):
    options = (
        "--gpu",
        "1GiB",
        "--set",
        "training.micro_batch_size=16",
        "--set",
        "training.gradient_checkpointing=false",
    )
    found = told(qlora("plan", recipe, *options, "--json"), code=1)
    assert found["fits"] is False
    keys = [change["key"] for change in found["changes"]]
    assert keys[0] == "training.gradient_checkpointing"
    assert {"training.micro_batch_size", "data.max_length"} <= set(keys)
    for change in found["changes"]:
        value = json.dumps(change["value"])
        again = told(qlora("plan", recipe, *options, "--set", f"{change['key']}={value}", "--json"))
        assert again["memory"]["bytes"] == change["num_bytes"]
    page = qlora("plan", recipe, *options)
    assert page.code == 1
    assert "\nchange    training.gradient_checkpointing: true, and it takes" in page.out


def test_where_no_key_is_enough_all_of_them_are_told_together(recipe: Path, qlora: Qlora):
    options = ("--gpu", "620MiB", "--set", "training.optimizer=adamw", "--set", "quantization.data_type=none")
    found = told(qlora("plan", recipe, *options, "--json"), code=1)
    assert found["changes"] == []
    keys = found["together"]["keys"]
    assert keys["training.optimizer"] == "paged_adamw_8bit"
    assert keys["quantization.data_type"] == "nf4"
    assert keys["training.micro_batch_size"] == 1
    assert found["together"]["num_bytes"] < found["memory"]["bytes"]
    page = re.sub(r"\s+", " ", qlora("plan", recipe, *options).out)
    assert "no keys make it fit: even training.optimizer: paged_adamw_8bit, quantization.data_type: nf4," in page


def test_one_key_is_not_together_and_a_device_without_room_for_itself_is_told(recipe: Path, qlora: Qlora):
    options = ("--no-rows", "--set", "training.micro_batch_size=1", "--set", "adapter.r=8")
    options += ("--set", "data.max_length=128", "--set", "model.task=causal_lm")
    page = re.sub(r"\s+", " ", qlora("plan", recipe, "--gpu", "620MiB", *options).out)
    assert "no keys make it fit: even data.max_length: 64 takes " in page
    page = re.sub(r"\s+", " ", qlora("plan", recipe, "--gpu", "0.6GB", *options).out)
    assert "no key makes it fit: the device's own context alone takes 0.63 GB" in page


def test_a_micro_batch_beyond_all_measure_is_too_large_with_changes(recipe: Path, qlora: Qlora):
    options = ("--gpu", "24GiB", "--no-rows", "--set", "training.micro_batch_size=100000")
    found = told(qlora("plan", recipe, *options, "--json"), code=1)
    assert found["memory"]["by_proportion"]
    assert found["batch"] == {"rows": 100_000, "tokens": 256, "accumulated": 2}
    assert 1 <= found["changes"][0]["value"] < 100_000
    assert any(one.startswith("what is beyond 524,288 tokens at once") for one in found["assumed"])


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_beside_a_tokenizer_give_the_steps_and_tokens_of_a_preview(recipe_with_rows: Path, qlora: Qlora):
    found = told(qlora("plan", recipe_with_rows, "--gpu", "8GiB", "--json"))
    seen = told(qlora("preview", recipe_with_rows, "--json"))["statistics"]
    assert found["steps"] == seen["epoch"]["total_steps"]
    assert found["tokens"] == 2 * seen["epoch"]["num_tokens"]
    assert found["batch"]["tokens"] == found["rows"]["longest"] == seen["lengths"]["most"] < 256
    page = qlora("plan", recipe_with_rows, "--gpu", "8GiB").out
    assert f"run       {found['steps']} steps; {found['tokens']:,} tokens; an epoch has 12 rows" in page
    assert ", all that the model reads" in page


def test_rows_are_left_alone_where_that_is_wanted(recipe_with_rows: Path, qlora: Qlora):
    found = told(qlora("plan", recipe_with_rows, "--gpu", "8GiB", "--no-rows", "--json"))
    assert (found["rows"], found["batch"]["tokens"]) == (None, 256)
    assert found["assumed"][0] == "every row as long as allowed, 256 tokens; rows were not read (--no-rows)"


def test_rows_that_are_missing_are_told_and_an_error_where_they_were_asked_for(recipe: Path, qlora: Qlora):
    found = told(qlora("plan", recipe, "--gpu", "8GiB", "--json"))
    assert found["assumed"][0].endswith("rows were not read (rows.jsonl: no such file)")
    ended = qlora("plan", recipe, "--gpu", "8GiB", "--rows")
    assert (ended.code, ended.out) == (2, "")


def test_rows_need_a_tokenizer_and_no_weights(tiny_model: Path, recipe_with_rows: Path, qlora: Qlora, tmp_path: Path):
    folder = shutil.copytree(tiny_model, tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    options = ("--gpu", "8GiB", "--json", "--set", f"model.name_or_path={folder}")
    found = told(qlora("plan", recipe_with_rows, *options, "--rows"))
    assert found["rows"] == told(qlora("plan", recipe_with_rows, "--gpu", "8GiB", "--json"))["rows"]
    for path in [*folder.iterdir()]:
        if path.name != "config.json":
            path.unlink()
    found = told(qlora("plan", recipe_with_rows, *options))
    assert found["assumed"][0].endswith("rows were not read (light: no tokenizer beside config.json)")
    ended = qlora("plan", recipe_with_rows, *options[:2], *options[3:], "--rows")
    assert (ended.code, ended.out) == (2, "")
    assert f"{folder}: no tokenizer beside config.json. Put the tokenizer's files into the model folder" in ended.err


def test_rows_cannot_be_wanted_and_not_wanted(recipe: Path, qlora: Qlora):
    ended = qlora("plan", recipe, "--rows", "--no-rows")
    assert (ended.code, ended.err) == (
        2,
        "--rows, --no-rows: say the opposite of each other. Leave one of them out.\n",
    )


def test_rows_beyond_the_models_positions_are_not_planned(recipe: Path, qlora: Qlora):
    found = told(qlora("plan", recipe, "--gpu", "8GiB", "--set", "data.max_length=5000", "--json"))
    assert found["batch"]["tokens"] == 1024


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [("24GiB", 24 << 30), ("80G", 80 << 30), ("24gb", 24 * 10**9), ("24564MiB", 24564 << 20), (" 1.5 GiB ", 3 << 29)],
)
def test_sizes_of_a_gpu(size: str, num_bytes: int):
    assert size_of(size) == num_bytes


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("24", "has no unit. Write 24GiB, if that is meant."),
        ("24576", "has no unit. Write 24576MiB, if that is meant."),
        ("0.5TiB", "is in a unit of larger things. Write 512GiB, if that is meant."),
        ("24,5GiB", "has a comma. Write 24.5GiB, if that is meant."),
        ("24Gb/s", "is no size. Write a size such as 24GiB."),
        ("24Parsec", "'Parsec' is no unit of a GPU's memory. Use GiB, GB or MiB: --gpu 24GiB."),
        ("24MiB", "is 25,165,824 bytes, less than any GPU has. Write a size such as 24GiB."),
        ("H100", "is no size. Write a size such as 24GiB."),
        ("-4GiB", "is no size. Write a size such as 24GiB."),
        ("", "is empty. Write a size such as 24GiB."),
    ],
)
def test_a_size_that_is_none_is_told_with_what_to_write(size: str, message: str, recipe: Path, qlora: Qlora):
    ended = qlora("plan", recipe, f"--gpu={size}")
    assert (ended.code, ended.out, ended.err) == (2, "", f"--gpu {size or chr(34) * 2}: {message}\n")


def test_models_without_a_config_are_told(recipe: Path, qlora: Qlora, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "no-such-model"}')
    for name, message in {
        "empty": "config.json: no such file (a transformers model folder needs it)",
        "file": "the base model must be a folder, this is a file",
        "./nowhere": "no such folder",
        "odd": "transformers cannot load this model",
        "nobody/nothing-of-the-kind": "name a folder here: a plan needs its config.json alone",
    }.items():
        ended = qlora("plan", recipe, "--gpu", "8GiB", "--set", f"model.name_or_path={name}")
        assert (ended.code, ended.out) == (2, ""), name
        assert message in ended.err, name
    problems = json.loads(qlora("plan", recipe, "--gpu", "H100", "--json").out)["problems"]
    assert problems == [{"where": "--gpu H100", "what": "is no size", "todo": "write a size such as 24GiB"}]


# ── what it costs, and the table of the page ─────────────────────────────────────────────────────────────────────────


def test_eighty_layers_are_rehearsed_in_6_cpu_seconds():
    """With room for slow machines: 3.0 s were measured."""
    rehearsed("nf4", LlamaConfig(**SIZES, vocab_size=4096))  # what is imported or built at a first time
    before = time.process_time()
    peak, _ = rehearsed("nf4", config_of("65B"))
    assert time.process_time() - before < 6 * 1.5
    assert peak.where == "backward of layer 0"


def test_the_table_by_memory_of_the_page_is_what_its_script_prints(monkeypatch, capsys):
    monkeypatch.setattr(plan_table, "LENGTHS", (2048,))
    plan_table.by_memory()
    printed = [line for line in capsys.readouterr().out.splitlines() if "2,048" in line]
    page = (REPOSITORY / "docs" / "plan.md").read_text().splitlines()
    for line in printed:
        value, told = line.split("|")[1], line.split("|")[3:-1]
        row = next(row for row in page if row.startswith(f"|{value}| 2,048 |"))
        assert [float(cell) for cell in row.split("|")[3:-1]] == pytest.approx([float(cell) for cell in told], rel=0.01)
    assert len(printed) == 4


def test_the_table_of_the_page_is_what_its_script_prints():
    """Of 7B, to 1%: kernels change a little with every version of what they are from."""
    page = (REPOSITORY / "docs" / "plan.md").read_text()
    row = next(row for row in page.splitlines() if row.startswith("| 7B |"))
    ours, paper, in_16_bits, full = (float(cell) for cell in row.split("|")[2:-1])
    line = line_of("7B")
    assert paper == PAPER_GB["7B"]
    assert ours == pytest.approx(line.in_4_bits.num_bytes / GB, rel=0.01)
    assert in_16_bits == pytest.approx(line.in_16_bits.num_bytes / GB, rel=0.01)
    assert full == pytest.approx(line.full_bytes / GB, rel=0.01)
    assert all(page.count(f"\n| {name} |") == 2 for name in SHAPES)
