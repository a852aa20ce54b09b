"""What `training.memory` leaves in host memory: which embeddings, how they are read, where a model then computes."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qlora_cli.errors import UserError
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import fingerprint, load_base, load_config
from qlora_cli.model.placement import (
    Hosted,
    Placed,
    _computing_on,
    _hosted,
    hosted_embeddings,
    loaded_on,
    place,
    resident,
)
from qlora_cli.plan.meta_base import meta_model, stored_tensors
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
    assert hosted_embeddings(model, recipe) == ([model.get_input_embeddings()] if hosted else [])


def test_an_embedding_that_a_head_multiplies_with_stays_on_the_gpu(make_recipe, tmp_path, architecture):
    tied = make_recipe(model={"name_or_path": str(write_tiny_model(tmp_path, tie_word_embeddings=True))})
    assert hosted_embeddings(load_base(tied, CPU).model, tied) == []
    t5 = make_recipe(model={"name_or_path": str(architecture("t5")), "task": "seq2seq_lm"})
    model = load_base(t5, CPU).model
    found = hosted_embeddings(model, t5)
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
    base.model.__class__ = _computing_on(kind, torch.device("meta"))
    assert base.device == base.model.device == torch.device("meta")
    model = attach_adapter(base, recipe.adapter)
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
    layers = host - found.placed.embedding_bytes
    rounding = 6 * 28 * 256
    assert abs(auto - (lean + host - 2 * layers // 6)) <= rounding
    assert found.placed.words == "; 6 layers and the embedding in host memory, two layers at a time on the device"
    assert found.placed._replace(stream=None).words == "; the embedding in host memory"


def test_hosted_classes_are_made_once():
    assert _hosted(nn.Embedding) is _hosted(nn.Embedding)
