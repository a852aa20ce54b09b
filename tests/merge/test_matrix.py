"""What trains is what is merged: every adapter on every data type, tied or not, in fp32 to 1e-5 of the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.merge.merge import How, Merged, merge_adapter
from qlora_cli.model.adapter import attach_adapter, load_adapter, save_adapter
from qlora_cli.model.base import Base, find_base, load_base
from qlora_cli.model.heads import auto_class
from qlora_cli.model.layout import Made
from qlora_cli.model.owner import Owner
from qlora_cli.model.start import changes_base
from qlora_cli.model.stored_base import Making, on_stored_base, start_folder
from qlora_cli.quant.layers import quantized_modules
from qlora_cli.recipe import Recipe
from qlora_cli.train.base import quantize_base
from tests.architectures import outputs, rows_of, shift_adapter, write_architecture
from tests.tiny import write_tiny_model

CPU = torch.device("cpu")

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r".*\.0\..*up_proj": 3}, "alpha_pattern": {"k_proj": 3}},
    "some": {"target_modules": ["q_proj", "down_proj"], "layers": [1]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "embedding too": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding alone": {"modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head, dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "norms": {"modules_to_save": ["model.norm", "input_layernorm"]},
    "loftq": {"init": "loftq", "loftq": {"iterations": 1}},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
}
STORAGES: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4": {"data_type": "fp4", "double_quant": False},
    "int4": {"data_type": "int4", "zero_point": True},
    "nf2": {"data_type": "nf2"},
    "int2": {"data_type": "int2", "block_size": 32},
    "mixed": {"overrides": {"model.layers.0.*": "int2", "*o_proj": "none"}},
    "none": {"data_type": "none"},
}
UNTIE = ("modules_to_save", "embedding too", "embedding alone", "head", "head, dora")
"""Adapters that change one side of a tied weight, or both apart."""


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> dict[bool, Path]:
    """The tiny Llama, untied and tied."""
    root = tmp_path_factory.mktemp("llamas")
    return {tied: write_tiny_model(root / str(tied), tie_word_embeddings=tied) for tied in (False, True)}


def trained(recipe: Recipe, folder: Path) -> tuple[Base, Any, bool]:
    """A base with a random adapter, saved in folder / "adapter"; whether the base is one that its start changed."""
    if changed := changes_base(recipe.adapter):
        making = Making(lambda line: None, CPU, folder / "base")
        quantize_base(recipe, find_base(recipe), making.target, making)
        base = load_base(on_stored_base(recipe, making.target), CPU)
        model = load_adapter(base, start_folder(making.target, recipe.adapter), trainable=True)
    else:
        base = load_base(recipe, CPU)
        model = attach_adapter(base, recipe.adapter)
    shift_adapter(model)
    save_adapter(model, folder / "adapter", Owner(str(base.folder)))
    return base, model, changed


def merged(recipe: Recipe, base: Base, folder: Path, stored: bool) -> Merged:
    made = None if base.task == "causal_lm" else Made(base.task, base.config)
    modules = () if stored else list(quantized_modules(base.model))
    how = How(recipe.quantization, torch.float32, "dequantized", torch.float32, modules, made=made)
    return merge_adapter(base.folder, folder / "adapter", folder / "merged", how)


def loaded(folder: Path, task: str) -> Any:
    """What anybody loads of a merged folder, every tensor of the file used and none missing."""
    model, info = auto_class(task).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logits_are_those_of_the_unmerged_model(make_recipe, llamas, tmp_path, adapter, storage, tied):
    if "dora" in adapter and storage in ("int4", "nf2", "int2", "mixed"):
        pytest.skip("PEFT's DoRA cannot read packed layers: training refuses it")
    quantization = {"compute_dtype": "float32", **STORAGES[storage]}
    section = {"r": 4, "alpha": 6, **ADAPTERS[adapter]}
    recipe = make_recipe(model={"name_or_path": str(llamas[tied])}, adapter=section, quantization=quantization)
    base, model, changed = trained(recipe, tmp_path)
    rows = rows_of("causal_lm")
    wanted = outputs(model, rows)
    done = merged(recipe, base, tmp_path, changed)
    found = outputs(loaded(tmp_path / "merged", "causal_lm"), rows)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    broken = tied and adapter in UNTIE
    assert set(done.untied) == ({"lm_head", "model.embed_tokens"} if broken else set())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (tied and not broken)
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) is (not tied or broken)


@pytest.mark.parametrize("storage", ["nf4", "int2", "none"])
@pytest.mark.parametrize("change", [{"modules_to_save": ["lm_head"]}, {"target_modules": "(.*[.])?(q|q_proj|lm_head)"}])
@pytest.mark.parametrize(("name", "task"), [("bart", "seq2seq_lm"), ("t5", "seq2seq_lm"), ("gpt2", "causal_lm")])
def test_the_head_of_other_models_leaves_its_embedding(
    make_recipe, architecture, tmp_path, name, task, change, storage
):
    """T5 scales the logits of a tied head, which an untied one has in its weight."""
    if name == "gpt2" and "target_modules" in change:
        change = {"target_modules": ["c_attn", "lm_head"]}
    quantization = {"compute_dtype": "float32", **STORAGES[storage]}
    section = {"name_or_path": str(architecture(name)), "task": task}
    recipe = make_recipe(model=section, adapter={"r": 4, **change}, quantization=quantization)
    base, model, _changed = trained(recipe, tmp_path)
    wanted = outputs(model, rows_of(task))
    assert "lm_head" in merged(recipe, base, tmp_path, False).untied
    found = loaded(tmp_path / "merged", task)
    assert (outputs(found, rows_of(task)) - wanted).norm() < 1e-5 * wanted.norm()
    assert found.get_output_embeddings().weight is not found.get_input_embeddings().weight


def test_a_t5_with_a_head_of_its_own_keeps_embeddings_and_head_apart(make_recipe, tmp_path):
    """As published: T5 1.1 says that nothing is tied, and stores both; transformers 5.23 ties the embeddings alone."""
    folder = write_architecture(tmp_path / "base", "gated_t5")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    config.pop("scale_decoder_outputs")
    (folder / "config.json").write_text(json.dumps(config))
    section = {"name_or_path": str(folder), "task": "seq2seq_lm"}
    recipe = make_recipe(model=section, adapter={"modules_to_save": ["lm_head"]})
    base, model, _changed = trained(recipe, tmp_path)
    merged(recipe, base, tmp_path, False)
    wanted = outputs(model, rows_of("seq2seq_lm"))
    found = outputs(loaded(tmp_path / "merged", "seq2seq_lm"), rows_of("seq2seq_lm"))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
