"""What `training.memory` leaves in host memory: which embeddings, how they are read, where a model then computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

from qlora_cli.errors import Exit, UserError
from qlora_cli.kernels.layer_stream import on_host, pinned_bytes
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import fingerprint, load_base, load_config
from qlora_cli.model.continued import CONFIG, as_continued
from qlora_cli.model.placement import (
    Hosted,
    Placed,
    _computing_on,
    _hosted,
    hosted_embeddings,
    loaded_on,
    place,
    refuse_lean,
    resident,
)
from qlora_cli.model.streamed import stream_layers
from qlora_cli.plan.meta_base import meta_model, stored_tensors
from qlora_cli.quant.layers import quantized_modules
from qlora_cli.quant.quantised_on import quantised_on
from qlora_cli.recipe.schema import Adapter
from tests.model.tiny_adapters import CPU
from tests.tiny import write_tiny_model

GPU = torch.device("cuda", 0)


def test_a_cpu_holds_everything_and_lean_alone_is_quantised_in_host_memory(make_recipe):
    for value in ("auto", "fast", "offload", "lean"):
        recipe = make_recipe(training={"memory": value})
        base = load_base(recipe, CPU)
        assert place(base.model, recipe, CPU) == Placed()
        assert not any(isinstance(module, Hosted) for module in base.model.modules())
        assert loaded_on(recipe, CPU) == CPU
        assert loaded_on(recipe, GPU) == (CPU if value == "lean" else GPU)
        assert loaded_on(resident(recipe), GPU) == GPU


@pytest.mark.parametrize(
    ("adapter", "hosted"),
    [
        ({}, True),
        ({"target_modules": ["q_proj"]}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["model.embed_tokens"]}, False),
        ({"target_modules": r".*embed_tok\w+"}, False),
        ({"target_modules": r".*_proj"}, True),
    ],
    ids=str,
)
def test_an_embedding_that_the_adapter_changes_stays_on_the_gpu(make_recipe, adapter, hosted):
    recipe = make_recipe(adapter=adapter)
    model = load_base(recipe, CPU).model
    assert hosted_embeddings(model, recipe.adapter) == ([model.get_input_embeddings()] if hosted else [])


def test_an_embedding_that_a_head_multiplies_with_stays_on_the_gpu(make_recipe, tmp_path, architecture):
    tied = make_recipe(model={"name_or_path": str(write_tiny_model(tmp_path, tie_word_embeddings=True))})
    assert hosted_embeddings(load_base(tied, CPU).model, tied.adapter) == []
    t5 = make_recipe(model={"name_or_path": str(architecture("t5")), "task": "seq2seq_lm"})
    model = load_base(t5, CPU).model
    found = hosted_embeddings(model, t5.adapter)
    shared = [module for module in model.modules() if getattr(module, "weight", None) is model.shared.weight]
    assert found == ([] if model.lm_head in shared else shared), "encoder's and decoder's are one table"


@pytest.mark.parametrize("quantization", [{}, {"embeddings": "int4"}], ids=str)
def test_a_hosted_embedding_gives_the_same_rows_and_reads_ids_where_they_are(make_recipe, quantization):
    recipe = make_recipe(quantization=quantization)
    base = load_base(recipe, CPU)
    table, ids = base.model.get_input_embeddings(), torch.arange(3, 33).view(5, 6)
    rows, digest = table(ids), fingerprint(base.model)
    kind: Any = type(table)
    table.__class__ = _hosted(kind)
    assert type(table).__name__ == kind.__name__
    assert torch.equal(table(ids), rows)
    assert fingerprint(base.model) == digest
    on_device: Any = torch.zeros_like(ids)  # whose values nobody waits for
    on_device.on_host = ids
    assert torch.equal(table(on_device), rows)
    with pytest.raises(UserError, match=r"adapter.modules_to_save: names the embedding, .*Use training.memory: auto"):
        copy.deepcopy(table)


def test_a_placed_model_computes_where_it_is_told_and_keeps_its_name(make_recipe):
    recipe = make_recipe()
    base = load_base(recipe, CPU)
    kind: Any = type(base.model)
    model = attach_adapter(base, recipe.adapter)
    base.model.__class__ = _computing_on(kind, torch.device("meta"))
    assert base.device == base.model.device == torch.device("meta")
    assert model.device == torch.device("meta"), "as transformers' generate asks of PEFT's model"
    assert type(base.model).__name__ == kind.__name__ == "LlamaForCausalLM"
    assert isinstance(base.model, kind)


@pytest.mark.parametrize("quantization", [{}, {"data_type": "int4"}, {"data_type": "none"}], ids=str)
def test_the_plan_counts_two_layers_and_no_embedding(make_recipe, tmp_path, quantization):
    folder = write_tiny_model(tmp_path, num_hidden_layers=6)
    held = {}
    for value in ("auto", "lean"):
        recipe = make_recipe(model={"name_or_path": str(folder)}, quantization=quantization, training={"memory": value})
        found = meta_model(recipe, load_config(Path(folder), recipe.model), "cuda", SimpleNamespace())
        tensors = (
            tensor.untyped_storage().nbytes() for kind, tensor in stored_tensors(found.model) if kind == "weights"
        )
        held[value] = sum(tensors), found.placed.host_bytes
    (auto, none), (lean, host) = held.values()
    assert none == 0
    layers = [len(one) for one in found.placed.stream.hosts]
    assert host - found.placed.embedding_bytes == sum(1 << (size - 1).bit_length() for size in layers)
    assert found.placed.left_out_bytes == found.placed.embedding_bytes + 4 * layers[0]
    assert 0 <= lean + found.placed.left_out_bytes - auto <= 6 * 28 * 256, "what is rounded up"
    assert found.placed.words == "; 6 layers and the embedding in host memory, two layers at a time on the device"
    assert found.placed._replace(stream=None).words == "; the embedding in host memory"


def test_hosted_classes_are_made_once():
    assert _hosted(nn.Embedding) is _hosted(nn.Embedding)


@pytest.mark.parametrize(
    ("stored", "adapter", "message"),
    [
        ({"quant_method": "gptq"}, {}, r"`lean`, and there is stored as gptq, .*Use offload"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {}, "stored as bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {}, None),
        ({"quant_method": "qlora"}, {}, None),
        (None, {"use_dora": True}, "the continued adapter has DoRA"),
        (None, {}, None),
    ],
    ids=str,
)
def test_what_lean_cannot_stream_is_refused_before_it_is_loaded(make_recipe, tmp_path, stored, adapter, message):
    (tmp_path / CONFIG).write_text(json.dumps({"r": 4, **adapter}))
    recipe = make_recipe(training={"memory": "lean"})
    recipe = recipe.model_copy(update={"adapter": Adapter.model_validate({"from": str(tmp_path)})})
    config = {"quantization_config": stored} if stored else {}
    refuse_lean(resident(recipe), config, Path("there"))
    if message is None:
        refuse_lean(recipe, config, Path("there"))
        return
    with pytest.raises(UserError, match=message) as caught:
        refuse_lean(recipe, config, Path("there"))
    assert caught.value.code == Exit.REFUSED


def of_the_embedding(base: Any, folder: Path) -> Adapter:
    """An adapter of anybody's that changes the embedding too, to go on from."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(base.model, config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return Adapter.model_validate({"from": str(folder)})


def test_a_continued_adapter_is_known_by_its_own_config(make_recipe, tmp_path):
    recipe = make_recipe()
    continued = as_continued(of_the_embedding(load_base(recipe, CPU), tmp_path))
    assert (set(continued.target_modules), continued.r) == ({"q_proj", "embed_tokens"}, 3)
    gone = Adapter.model_validate({"from": str(tmp_path / "gone")})
    assert as_continued(gone) == gone
    model = load_base(recipe, CPU).model
    assert hosted_embeddings(model, continued) == []
    assert hosted_embeddings(model, as_continued(recipe.adapter)) == [model.get_input_embeddings()]


def test_dora_over_streamed_layers_is_refused_whoever_asks_for_it(make_recipe):
    recipe = make_recipe(quantization={"data_type": "none"}, adapter={"use_dora": True})
    base = load_base(recipe, CPU)
    stream_layers(base.model, CPU)
    with pytest.raises(UserError, match=r"training.memory: `lean` streams the layers, .*Use offload"):
        attach_adapter(base, recipe.adapter)


def test_an_adapter_beside_a_weight_in_host_memory_is_refused(make_recipe, tmp_path):
    recipe = make_recipe()
    adapter, base = of_the_embedding(load_base(recipe, CPU), tmp_path), load_base(recipe, CPU)
    kind: Any = type(base.model)
    base.model.__class__ = _computing_on(kind, torch.device("meta"))
    with pytest.raises(UserError, match=r"leaves what the adapter changes in host memory: model\..*Use auto"):
        attach_adapter(base, adapter)


QUANTISED = [{}, {"data_type": "int4"}, {"data_type": "nf4", "embeddings": "int4"}]


@pytest.mark.parametrize("quantization", QUANTISED, ids=str)
def test_weights_are_quantised_where_it_is_said_and_come_back(make_recipe, quantization, monkeypatch):
    """On the CPU both places are one: what is seen is that every weight goes there, and that bits stay."""
    recipe = make_recipe(quantization=quantization)
    wanted, moved, to = fingerprint(load_base(recipe, CPU).model), [], torch.Tensor.to

    def seen(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is THERE:
            moved.append(tensor)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", seen)
    with quantised_on(THERE):
        found = load_base(recipe, CPU)
    assert fingerprint(found.model) == wanted
    assert len(moved) == len(quantized_modules(found.model))
    moved.clear()
    load_base(recipe, CPU)
    assert moved == []


THERE = torch.device("cpu")


def test_pinned_memory_is_counted_as_torch_takes_it():
    assert [pinned_bytes(size) for size in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]


def test_host_memory_that_cannot_be_had_is_told():
    with pytest.raises(torch.OutOfMemoryError, match=r"host memory: 4,611,686,018,427,387,904 bytes could not be had"):
        on_host(torch.Size([1 << 62]), torch.uint8, False)
