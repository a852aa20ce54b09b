"""Bases that others stored quantised: `qlora train` and `qlora merge` end in an ordinary model, with a certificate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import load_base
from qlora_cli.model.heads import auto_class
from qlora_cli.recipe import Recipe
from tests.architectures import outputs, rows_of, write_architecture
from tests.stored_bases import AWQ, GPTQ, needs_package, store_by_bitsandbytes, write_stored
from tests.tiny import write_tiny_gpt2, write_tiny_model

Write = Callable[[Path], Path]


def llama(stored: dict[str, Any], **config: Any) -> Write:
    """Writes a tiny Llama by bitsandbytes."""
    return lambda folder: store_by_bitsandbytes(write_tiny_model(folder / "plain", **config), folder / "base", **stored)


def gpt2(folder: Path) -> Path:
    return store_by_bitsandbytes(write_tiny_gpt2(folder / "plain"), folder / "base", data_type="fp4")


def t5(folder: Path) -> Path:
    return store_by_bitsandbytes(write_architecture(folder / "plain", "t5"), folder / "base")


TIED = {"tie_word_embeddings": True}
HEAD = {"modules_to_save": ["lm_head"]}
CASES: dict[str, tuple[Write, dict[str, Any]]] = {
    "nf4, double, in shards": (llama({"max_shard_size": "3KB"}), {}),
    "fp4, single, tied": (llama({"data_type": "fp4", "double_quant": False}, **TIED), {}),
    "tied, the head trained": (llama({"max_shard_size": "20KB"}, **TIED), HEAD),
    "untied, the head trained": (llama({}), HEAD),
    "some layers, dora": (llama({}), {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "stored from bfloat16": (llama({"dtype": torch.bfloat16}), {"target_modules": ["q_proj", "down_proj"]}),
    "gpt2": (gpt2, {}),
    "t5": (t5, {}),
}


def run_of(root: Path, base: Path, adapter: dict[str, Any], rows: Path, task: str = "causal_lm") -> Path:
    """A recipe of three steps."""
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(base), "task": task},
        "quantization": {"compute_dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8, **adapter},
        "data": {"train": [{"path": str(rows)}], "max_length": 256},
        "training": {"max_steps": 3, "micro_batch_size": 2, "optimizer": "adamw", "learning_rate": 1e-2},
        "output_dir": str(root / "run"),
    }
    if task == "seq2seq_lm":
        pairs = [{"source": f"say {number}", "target": f"{number}"} for number in range(8)]
        (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        recipe["data"] = {"train": [{"path": str(root / "pairs.jsonl")}]}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root / "recipe.yaml"


def merged_run(qlora: Callable[..., Any], recipe: Path, *options: object) -> tuple[Path, dict[str, Any]]:
    """The run of a recipe, trained and merged, and what the merge says."""
    run = recipe.parent / "run"
    ended = qlora("train", recipe)
    assert ended.code == 0, ended.err
    ended = qlora("merge", run, "--json", *options)
    assert ended.code == 0, ended.err
    return run, json.loads(ended.out)["merges"][0]


def check_equal(run: Path, recipe: Path, task: str) -> None:
    """The merged folder, loaded as anybody does, gives the logits of base and adapter."""
    wanted_recipe = Recipe.model_validate(yaml.safe_load(recipe.read_text()))
    model = load_adapter(load_base(wanted_recipe, torch.device("cpu")), run / "adapter")
    wanted = outputs(model, rows_of(task))
    merged, info = auto_class(task).from_pretrained(run / "merged", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert "quantization_config" not in json.loads((run / "merged" / "config.json").read_text())
    found = outputs(merged, rows_of(task))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    with model.disable_adapter():
        assert (outputs(model, rows_of(task)) - wanted).norm() > 1e-3 * wanted.norm(), "the adapter does something"


@pytest.mark.parametrize("name", CASES)
def test_a_base_of_bitsandbytes_trains_and_merges_with_a_certificate(name, qlora, rows_file, tmp_path):
    write, adapter = CASES[name]
    task = "seq2seq_lm" if name == "t5" else "causal_lm"
    recipe = run_of(tmp_path, write(tmp_path), adapter, rows_file, task)
    run, said = merged_run(qlora, recipe)
    assert said["certificate"]["held"]
    assert said["certificate"]["mean_kl"] < 1e-6
    check_equal(run, recipe, task)
    broken = "tied, the head" in name and not name.startswith("un")
    assert set(said["untied"]) == ({"lm_head", "model.embed_tokens"} if broken else set())


def test_in_bfloat16_the_certificate_holds_too(qlora, rows_file, tmp_path):
    base = store_by_bitsandbytes(
        write_tiny_model(tmp_path / "plain"), tmp_path / "base", dtype=torch.bfloat16, max_shard_size="20KB"
    )
    recipe = run_of(tmp_path, base, {}, rows_file)
    recipe.write_text(recipe.read_text().replace("float32", "bfloat16"))
    _run, said = merged_run(qlora, recipe)
    assert said["dtype"] == "bfloat16"
    assert said["certificate"]["mean_kl"] < 5e-3


def test_the_weights_as_published_are_not_there_to_merge_onto(qlora, rows_file, tmp_path):
    recipe = run_of(tmp_path, llama({})(tmp_path), {}, rows_file)
    assert qlora("train", recipe).code == 0
    ended = qlora("merge", tmp_path / "run", "--base", "original")
    assert ended.code == 3
    assert "is what the adapter was trained on" in ended.err
    assert not (tmp_path / "run" / "merged").exists()


def test_a_base_that_has_lost_a_part_is_refused_and_nothing_is_written(qlora, rows_file, tmp_path):
    from safetensors.torch import load_file, save_file

    base = llama({})(tmp_path)
    recipe = run_of(tmp_path, base, {}, rows_file)
    assert qlora("train", recipe).code == 0
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    ended = qlora("merge", tmp_path / "run", "--no-verify")
    assert ended.code == 2
    assert "model.layers.1.mlp.up_proj.weight.absmax is missing" in ended.err
    assert not [path for path in (tmp_path / "run").iterdir() if "merged" in path.name]


@needs_package
@pytest.mark.parametrize(
    ("method", "stored"), [("gptq", GPTQ), ("gptq", GPTQ | {"bits": 8, "desc_act": False}), ("awq", AWQ)]
)
def test_a_base_of_gptq_or_awq_trains_and_merges_with_a_certificate(method, stored, qlora, rows_file, tmp_path):
    base, _reference = write_stored(tmp_path, method, stored, attention_bias=True)
    recipe = run_of(tmp_path, base, {}, rows_file)
    run, said = merged_run(qlora, recipe)
    assert said["certificate"]["held"]
    check_equal(run, recipe, "causal_lm")
