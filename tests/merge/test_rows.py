"""Added tokens merged: the vocabulary grows by the trained rows, in fp32 to 1e-5 of the unmerged model's logits."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM

from qlora_cli.errors import UserError
from qlora_cli.merge.merge import How, Merged, merge_adapter
from qlora_cli.merge.rows import keys_of_vocabulary
from qlora_cli.model.adapter import attach_adapter, save_adapter
from qlora_cli.model.base import Base, load_base
from qlora_cli.model.heads import auto_class
from qlora_cli.model.layout import Made
from qlora_cli.model.owner import Owner
from qlora_cli.quant.layers import quantized_modules
from tests.architectures import outputs, rows_of, shift_adapter, write_architecture
from tests.tiny import write_tiny_model

CPU = torch.device("cpu")
TOKENS = ["<a>", "<b>", "<c>"]
DELTA = "token_adapter.trainable_tokens_delta"
KINDS = [
    ("untied", "causal_lm"),
    ("sharded", "causal_lm"),
    ("padded", "causal_lm"),
    ("llama", "causal_lm"),
    ("gpt2", "causal_lm"),
    ("bart", "seq2seq_lm"),
    ("t5", "seq2seq_lm"),
    ("gated_t5", "seq2seq_lm"),
    ("own_head", "seq2seq_lm"),
    ("bert", "sequence_classification"),
    ("llama", "sequence_classification"),
    ("bart", "sequence_classification"),
    ("t5", "question_answering"),
    ("llama", "question_answering"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, architecture):
    """Models by name: those of tests/architectures.py, and four more."""
    root = tmp_path_factory.mktemp("bases")
    own = {"untied": write_tiny_model(root / "untied"), "padded": write_tiny_model(root / "padded", vocab_size=264)}
    own["own_head"] = with_own_head(write_architecture(root / "own_head", "gated_t5"))
    own["sharded"] = write_tiny_model(root / "sharded")
    (root / "sharded/model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(root / "untied").save_pretrained(root / "sharded", max_shard_size="200KB")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 1
    return lambda name: own.get(name) or architecture(name)


def with_own_head(folder: Path) -> Path:
    """A T5 as 1.1 is published: the head is its own, and config.json says that nothing is tied."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    config.pop("scale_decoder_outputs")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def trained(make_recipe, bases, tmp_path):
    """A base with TOKENS and a random adapter that trains their rows, saved in tmp_path / "adapter"."""

    def made(name: str, task: str = "causal_lm", **quantization: Any) -> tuple[Any, Base, Any]:
        model = {"name_or_path": str(bases(name)), "task": task, "added_tokens": TOKENS}
        model |= {"num_labels": 3} if task == "sequence_classification" else {}
        recipe = make_recipe(model=model, quantization={"compute_dtype": "float32", **quantization})
        base = load_base(recipe, CPU)
        adapted = attach_adapter(base, recipe.adapter)
        shift_adapter(adapted)
        save_adapter(adapted, tmp_path / "adapter", Owner(str(base.folder)))
        base.tokenizer.save_pretrained(tmp_path / "adapter")
        return recipe, base, adapted

    return made


def merge(recipe: Any, base: Base, folder: Path, onto: str = "dequantized", **how: Any) -> Merged:
    made = None if base.task == "causal_lm" else Made(base.task, base.config)
    asked = {"dtype": torch.float32, "made": made, "quantized_modules": [*quantized_modules(base.model)], **how}
    settings = How(recipe.quantization, torch.float32, onto, **asked)
    return merge_adapter(base.folder, folder / "adapter", folder / "merged", settings)


def edit(folder: Path, change: Any, config: dict[str, Any] | None = None) -> None:
    """Changes an adapter's tensors, and its adapter_config.json."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    stored = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(stored))


@pytest.mark.parametrize("data_type", ["nf4", "none"])
@pytest.mark.parametrize(("name", "task"), KINDS)
def test_logits_are_those_of_the_unmerged_model(trained, tmp_path, name, task, data_type):
    recipe, base, model = trained(name, task, data_type=data_type)
    rows = rows_of(task)
    rows["input_ids"][:, 3:6] = torch.tensor(base.added_ids)
    wanted = outputs(model, rows)
    done = merge(recipe, base, tmp_path)
    assert done.untied == ()
    found, info = auto_class(task).from_pretrained(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert (outputs(found, rows) - wanted).norm() < 1e-5 * wanted.norm()
    number = 264 if name == "padded" else 262
    assert found.config.vocab_size == number
    assert len(found.get_input_embeddings().weight) == number
    assert AutoConfig.from_pretrained(tmp_path / "merged").vocab_size == number
    if name == "sharded":
        index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == done.num_bytes
    if name == "llama" and task == "causal_lm":
        assert "lm_head.weight" not in load_file(tmp_path / "merged/model.safetensors")


def test_rows_are_those_of_the_adapter_to_the_last_bit_onto_either_base(trained, tmp_path):
    recipe, base, _model = trained("untied")
    rows = load_file(tmp_path / "adapter/adapter_model.safetensors")[f"base_model.model.lm_head.{DELTA}"]
    merge(recipe, base, tmp_path, "original", dtype=torch.bfloat16)
    merged, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base.folder))
    assert torch.equal(merged["lm_head.weight"][259:], rows.bfloat16())
    assert torch.equal(merged["lm_head.weight"][:259], stored["lm_head.weight"].bfloat16())


def test_a_bart_that_stores_its_logits_biases_gets_zeros_for_the_new_tokens(make_recipe, architecture, tmp_path):
    folder = copytree(architecture("bart"), tmp_path / "bart")
    tensors = load_file(folder / "model.safetensors") | {"final_logits_bias": torch.linspace(0, 1, 259)[None]}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    section = {"name_or_path": str(folder), "task": "seq2seq_lm", "added_tokens": TOKENS}
    recipe = make_recipe(model=section)
    base = load_base(recipe, CPU)
    model = attach_adapter(base, recipe.adapter)
    shift_adapter(model)
    save_adapter(model, tmp_path / "adapter", Owner(str(folder)))
    merge(recipe, base, tmp_path)
    biases = load_file(tmp_path / "merged/model.safetensors")["final_logits_bias"]
    assert torch.equal(biases, torch.cat([tensors["final_logits_bias"], torch.zeros(1, 3)], dim=1))
    wanted = outputs(model, rows_of("seq2seq_lm"))
    found = outputs(auto_class("seq2seq_lm").from_pretrained(tmp_path / "merged"), rows_of("seq2seq_lm"))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda t: t.pop(f"base_model.model.lm_head.{DELTA}"),
            None,
            "has the adapter change lm_head, and no tensor of",
        ),
        (
            lambda t: t.pop(f"base_model.model.lm_head.{DELTA}"),
            {"trainable_token_indices": {"model.embed_tokens": [259, 260, 261]}},
            "rows for tokens behind the base's last, and none of lm_head.weight",
        ),
        (lambda t: None, {"trainable_token_indices": None}, "whose tokens adapter_config.json does not name"),
        (
            lambda t: None,
            {"trainable_token_indices": {"embed_tokens": [260, 261, 262], "lm_head": [260, 261, 262]}},
            "is of the tokens 260 to 262, and the base's last is 258",
        ),
        (
            lambda t: None,
            {"trainable_token_indices": {"embed_tokens": [259, 260], "lm_head": [259, 260]}},
            r"has shape \[3, 64\], but base and adapter_config.json ask for \[2, 64\]",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(259, 64)}),
            None,
            rf"lm_head.{DELTA} beside base_model.model.lm_head.weight",
        ),
        (
            lambda t: t.update({f"base_model.model.lm_head.{DELTA}": torch.full((3, 64), float("nan"))}),
            None,
            "the merged lm_head.weight is not finite",
        ),
    ],
)
def test_an_adapter_that_does_not_hold_together_is_refused(trained, tmp_path, change, config, message):
    recipe, base, _model = trained("untied")
    edit(tmp_path / "adapter", change, config)
    with pytest.raises(UserError, match=message):
        merge(recipe, base, tmp_path)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["untied", "llama"])
def test_rows_of_tokens_that_the_base_knows_are_merged_too(make_recipe, bases, tmp_path, name):
    """Of an adapter that plain PEFT trained, which lists them for the embedding alone."""
    recipe = make_recipe(model={"name_or_path": str(bases(name))}, quantization={"data_type": "none"})
    base = load_base(recipe, CPU)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[7, 5])
    model = peft.get_peft_model(base.model, config)
    shift_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    rows = rows_of("causal_lm")
    rows["input_ids"][:, 3:5] = torch.tensor([5, 7])
    wanted = outputs(model.eval(), rows)
    merge(recipe, base, tmp_path)
    found = auto_class("causal_lm").from_pretrained(tmp_path / "merged")
    assert (outputs(found, rows) - wanted).norm() < 1e-5 * wanted.norm()
    assert found.config.vocab_size == 259


def test_the_size_is_written_where_the_base_has_it(tmp_path):
    def told(stored: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
        (tmp_path / "config.json").write_text(json.dumps(stored))
        text = SimpleNamespace(attribute_map=names)
        layout: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
        return keys_of_vocabulary(300, layout, tmp_path)

    assert told({"vocab_size": 256}, {}) == {"vocab_size": 300}
    assert told({}, {}) == {"vocab_size": 300}
    assert told({"n_words": 256}, {"vocab_size": "n_words"}) == {"n_words": 300}
    nested = {"text_config": {"vocab_size": 256, "hidden_size": 64}, "vision_config": {"hidden_size": 32}}
    assert told(nested, {}) == {"text_config": {"vocab_size": 300, "hidden_size": 64}}
