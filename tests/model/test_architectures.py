"""Encoders, encoder-decoders and decoders with every task that each can do: quantised, trained, saved, loaded."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from qlora_cli.errors import UserError
from qlora_cli.model.adapter import attach_adapter, load_adapter, save_adapter
from qlora_cli.model.base import find_base, fingerprint, load_base
from qlora_cli.model.heads import TASKS, auto_class
from qlora_cli.model.owner import Owner
from qlora_cli.model.skeleton import check_storage
from qlora_cli.model.stored_base import Making, on_stored_base, start_folder
from qlora_cli.quant.embedding import PackedEmbedding
from qlora_cli.quant.layers import layer_values, quantized_modules
from qlora_cli.train.base import quantize_base
from tests.architectures import PAIRS, PUBLISHED, TASKS_OF, model_section, outputs, rows_of, shift_adapter

CPU = torch.device("cpu")
LINEAR = {
    "bert": {"query", "key", "value", "dense"},
    "roberta": {"query", "key", "value", "dense"},
    "deberta": {"query_proj", "key_proj", "value_proj", "dense"},
    "bart": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "t5": {"q", "k", "v", "o", "wi", "wo"},
    "gated_t5": {"q", "k", "v", "o", "wi_0", "wi_1", "wo"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}


@pytest.fixture
def recipe_of(make_recipe, architecture):
    """The recipe of an architecture and a task; keyword arguments are its section `quantization`."""

    def build(name, task, adapter=None, **quantization):
        section = model_section(architecture(name), task)
        return make_recipe(model=section, adapter=adapter or {}, quantization=quantization)

    return build


@pytest.mark.parametrize("data_type", ["nf4", "none", "int2"])
@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_it_trains_and_what_is_saved_loads_the_same(recipe_of, tmp_path, name, task, data_type):
    recipe = recipe_of(name, task, data_type=data_type)
    base = load_base(recipe, CPU)
    digest = fingerprint(base.model)
    model = attach_adapter(base, recipe.adapter).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    adapted = {n.split(".lora_A")[0].removeprefix("base_model.model.") for n in trained if "lora_A" in n}
    assert {n.rsplit(".", 1)[-1] for n in adapted} == LINEAR[name]
    assert not any(n in base.head for n in adapted)
    heads = {n.removeprefix("base_model.model.").split(".modules_to_save")[0] for n in trained if "modules_to" in n}
    assert heads == set(base.head.modules)
    batch, optimizer, losses = rows_of(task), torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        assert not [n for n, p in trained.items() if p.grad is None], "a gradient is missing"
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]
    save_adapter(model, tmp_path, Owner(str(base.folder)))
    again = load_base(recipe, CPU)
    assert fingerprint(again.model) == digest
    assert torch.equal(outputs(load_adapter(again, tmp_path), batch), outputs(model, batch))


@pytest.mark.parametrize(("name", "task"), [pair for pair in PAIRS if TASKS[pair[1]].has_head])
def test_the_adapter_folder_is_plain_peft_with_the_head_in_it(recipe_of, architecture, tmp_path, name, task):
    recipe = recipe_of(name, task, data_type="none")
    base = load_base(recipe, CPU)
    model = attach_adapter(base, recipe.adapter)
    shift_adapter(model)
    save_adapter(model, tmp_path, Owner(str(base.folder)))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == TASKS[task].peft_type
    assert sorted(config["modules_to_save"]) == sorted(base.head.modules)
    torch.manual_seed(11)  # another random head than ours
    renamed = {"key_mapping": dict(base.head.renamed)} if base.head.renamed else {}
    plain = auto_class(task).from_pretrained(architecture(name), config=base.config, dtype=torch.float32, **renamed)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert torch.allclose(outputs(theirs, rows_of(task)), outputs(model, rows_of(task)), atol=1e-6)


def test_saving_and_loading_again_and_again_adds_no_names(recipe_of, tmp_path):
    recipe = recipe_of("bert", "sequence_classification")
    model = attach_adapter(load_base(recipe, CPU), recipe.adapter)
    for index in range(3):
        save_adapter(model, tmp_path / str(index), Owner("base"))
        model = load_adapter(load_base(recipe, CPU), tmp_path / str(index), trainable=True)
    first, last = (json.loads((tmp_path / i / "adapter_config.json").read_text()) for i in ("0", "2"))
    assert first == last


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_quantised_embedding_gives_the_values_that_its_codes_stand_for(recipe_of, name):
    recipe = recipe_of(name, TASKS_OF[name][0], data_type="nf4", embeddings="int4")
    base = load_base(recipe, CPU)
    published = load_file(base.folder / "model.safetensors")
    tensor = next(t for n, t in published.items() if t.shape == (259, 64))
    scale = 8.0 if name == "bart" else 1.0  # scale_embedding: the square root of d_model
    ids = torch.arange(259)
    expected = layer_values(tensor, recipe.quantization, "embedding", torch.float32, embedding=True)
    packed = [module for module in base.model.modules() if isinstance(module, PackedEmbedding)]
    assert len(packed) == {"bart": 3, "t5": 3, "gated_t5": 3}.get(name, 1)
    lookups = [module for module in packed if module is not getattr(base.model.base_model, "shared", None)]
    for module in lookups:
        assert torch.allclose(module(ids), expected * scale, atol=1e-6)
    stored = {module.weight.data_ptr() for module in packed}
    assert len(stored) == 1, "what is tied is stored once"


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert", "sequence_classification"),
        ("bart", "seq2seq_lm"),
        ("t5", "question_answering"),
        ("llama", "question_answering"),
    ],
)
def test_a_start_that_changes_the_base_keeps_its_head(recipe_of, tmp_path, name, task):
    recipe = recipe_of(name, task, {"init": "loftq", "loftq": {"iterations": 1}}, data_type="nf2")
    plain = load_base(recipe, CPU, packed=True)
    table = quantize_base(
        recipe, find_base(recipe), tmp_path / "base", Making(lambda line: None, CPU, tmp_path / "base")
    )
    assert all(line.after < line.before for line in table)
    stored = load_base(on_stored_base(recipe, tmp_path / "base"), CPU)
    heads = [{n: p for n, p in one.model.named_parameters() if n in plain.head} for one in (plain, stored)]
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(parameter, heads[1][n]) for n, parameter in heads[0].items())
    assert not stored.head.new
    model = load_adapter(stored, start_folder(tmp_path / "base", recipe.adapter), trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    model(**rows_of(task)).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    assert sum("modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad) == len(heads[0])


@pytest.mark.parametrize("name", ["t5", "gated_t5"])
@pytest.mark.parametrize("data_type", ["nf4", "int2"])
def test_t5_quantises_what_transformers_would_keep_in_fp32(recipe_of, name, data_type):
    """T5 casts what it feeds `wo` to the type of its weight, which would turn activations into bytes."""
    recipe = recipe_of(name, "seq2seq_lm", data_type=data_type)
    base = load_base(recipe, CPU)
    layers = quantized_modules(base.model)
    wo = {n: module for n, module in layers.items() if n.endswith(".wo")}
    assert len(wo) == 4
    assert {module.weight.dtype for module in wo.values()} == {torch.int8}
    plain = auto_class("seq2seq_lm").from_pretrained(base.folder, dtype=torch.float32)
    with torch.no_grad():
        for n, module in layers.items():
            plain.get_submodule(n).weight.copy_(module.dequantized())
    batch = rows_of("seq2seq_lm")
    assert torch.allclose(outputs(base.model, batch), outputs(plain, batch), atol=1e-4)


def test_t5_in_int8_is_refused_with_what_would_be_left(recipe_of):
    with pytest.raises(UserError, match=r"only 80% of the weights .* left in full: .*DenseReluDense\.wo"):
        load_base(recipe_of("t5", "seq2seq_lm", data_type="int8"), CPU)


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_int8_quantises_encoders_but_not_their_head(recipe_of, name):
    base = load_base(recipe_of(name, "sequence_classification", data_type="int8"), CPU)
    assert {m.rsplit(".", 1)[-1] for m in quantized_modules(base.model)} == LINEAR[name]
    assert not [m for m in quantized_modules(base.model) if m in base.head]


@pytest.mark.parametrize("name", ["bart", "t5", "gated_t5"])
@pytest.mark.parametrize("side", ["shared", "embed_tokens", "encoder.embed_tokens"])
def test_training_one_side_of_tied_embeddings_is_refused(recipe_of, name, side):
    recipe = recipe_of(name, "seq2seq_lm", {"modules_to_save": [side]})
    with pytest.raises(UserError, match=rf"{side} shares its weight with the embedding"):
        attach_adapter(load_base(recipe, CPU), recipe.adapter)


def test_a_target_inside_the_head_is_not_adapted_beside_being_trained(recipe_of):
    recipe = recipe_of("roberta", "sequence_classification", {"target_modules": ["dense"]})
    base = load_base(recipe, CPU)
    model = attach_adapter(base, recipe.adapter)
    adapted = [n.removeprefix("base_model.model.") for n, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 6
    assert not [n for n in adapted if n in base.head]


def test_packed_storage_that_does_not_fit_is_told_from_the_skeleton(recipe_of):
    for name, task in (("t5", "seq2seq_lm"), ("bert", "sequence_classification")):
        recipe = recipe_of(name, task, data_type="int2", block_size=1024 * 3)
        with pytest.raises(UserError, match=r"which is no multiple of quantization\.block_size 3072"):
            check_storage(recipe, find_base(recipe))
    recipe = recipe_of("bert", "sequence_classification", data_type="int2", block_size=64)
    check_storage(recipe, find_base(recipe))
