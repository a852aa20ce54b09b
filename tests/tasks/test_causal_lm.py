"""Packed rows train as padded ones do: the same trained tokens, loss and gradients, whatever lies around the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.kernels.isolation import prepare_packing
from qlora_cli.kernels.packed_attention import NAME
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import Base, load_base
from qlora_cli.tasks.causal_lm import (
    Batch,
    PackedBatch,
    collate,
    collate_packed,
    trained_logits,
)
from qlora_cli.tasks.table import batches, loss_sum
from tests.kernels.tiny_models import MODELS, VOCAB, tiny

CPU = torch.device("cpu")
_generator = torch.Generator().manual_seed(0)
ROWS = [
    Example(ids, [token if at >= start else IGNORE_INDEX for at, token in enumerate(ids)], "a row")
    for length, start in ((9, 4), (1, 0), (14, 0), (6, 5), (11, 3))
    for ids in [torch.randint(3, VOCAB, (length,), generator=_generator).tolist()]
]
"""Rows of unequal length: two are trained from their first token on, one of them has no other."""


def loss_and_gradients(model: Any, batch: Batch | PackedBatch) -> tuple[Tensor, list[Tensor]]:
    logits, targets = trained_logits(model, batch)
    loss = loss_sum(logits, targets) / len(targets)
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def assert_same_step(model: Any) -> None:
    """One optimizer step over ROWS, padded and packed; the largest gradient is the unit."""
    loss, gradients = loss_and_gradients(model, collate(ROWS, CPU))
    packed_loss, packed_gradients = loss_and_gradients(model, collate_packed(ROWS, CPU))
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=1e-6)
    largest = max(gradient.abs().max() for gradient in gradients)
    for found, wanted in zip(packed_gradients, gradients, strict=True):
        assert (found - wanted).abs().max() <= 1e-6 * max(1, largest)


def with_adapter(make_recipe: Any, data_type: str) -> tuple[Base, Any]:
    """A quantised Llama with an adapter whose B is not zero, so that A has a gradient too."""
    recipe = make_recipe(quantization={"data_type": data_type})
    base = load_base(recipe, CPU)
    torch.manual_seed(0)
    model = attach_adapter(base, recipe.adapter).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return base, model


def test_a_packed_batch_is_its_rows_one_behind_the_other():
    rows = [Example([5, 6, 7], [5, 6, 7], "a"), Example([8], [8], "b"), Example([9, 4], [IGNORE_INDEX, 4], "c")]
    batch = collate_packed(rows, CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.predicting.tolist() == [0, 1, 4]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.cu_seqlens.dtype == torch.int32
    assert type(batch.max_length) is int
    assert batch.max_length == 3


def test_the_trained_tokens_are_those_of_the_padded_batch():
    model = tiny("llama")
    prepare_packing(model, CPU, VOCAB)
    with torch.no_grad():
        padded, packed = (trained_logits(model, batch) for batch in (collate(ROWS, CPU), collate_packed(ROWS, CPU)))
    assert torch.equal(padded[1], packed[1])
    assert len(packed[1]) == sum(row.num_trained for row in ROWS)
    torch.testing.assert_close(padded[0], packed[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("collated", [collate, collate_packed])
def test_logits_that_no_trained_token_needs_are_not_computed(collated):
    """Over a vocabulary of 128,000 they would be most of the memory; the head reads the places that train."""
    model = tiny("llama")
    prepare_packing(model, CPU, VOCAB)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
    batch = collated(ROWS[:1], CPU)
    with torch.no_grad():
        logits, targets = trained_logits(model, batch)
        whole = model(input_ids=batch.input_ids).logits
    assert seen == [ROWS[0].num_trained, ROWS[0].num_tokens]
    torch.testing.assert_close(logits, whole[0, -1 - len(targets) : -1], rtol=1e-5, atol=1e-5)


def test_a_model_that_computes_every_logit_gives_the_same(monkeypatch):
    model = tiny("llama")
    with torch.no_grad():
        wanted = trained_logits(model, collate(ROWS, CPU))
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda input_ids, **rest: forward(input_ids=input_ids, **rest))
        found = trained_logits(model, collate(ROWS, CPU))
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)


def test_rows_on_two_sides_of_a_longrope_boundary_share_no_batch():
    """The longest row of a batch chooses the frequencies of all: a short row's loss would depend on its neighbours."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 10}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=10)
    base: Any = SimpleNamespace(config=model.config, device=CPU, task="causal_lm")
    lengths = [row.num_tokens for row in ROWS]

    def losses(batch: Batch | PackedBatch) -> float:
        with torch.no_grad():
            return loss_sum(*trained_logits(model, batch)).item()

    alone = sum(losses(collate([row], CPU)) for row in ROWS)
    found = [*batches(ROWS, lengths, 4, max(lengths), False, base)]
    assert [sorted(batch.attention_mask.sum(dim=1).tolist()) for batch in found] == [[11, 14], [1, 6, 9]]
    assert sum(map(losses, found)) == pytest.approx(alone, rel=1e-6)
    assert losses(collate(ROWS, CPU)) != pytest.approx(alone, rel=1e-3), "else this shows nothing"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", [NAME, "sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_padded_rows(kind, attention, checkpointing):
    model = tiny(kind, None if attention == NAME else attention, initializer_range=0.02)
    for parameter in model.parameters():
        parameter.data *= 0.3  # softer than `tiny`: a loss near that of a real model
    if attention == NAME:
        assert prepare_packing(model, CPU, VOCAB) == NAME
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # GPT-2's are on by default
    assert_same_step(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("data_type", ["none", "nf4"])
def test_loss_and_gradients_are_those_of_padded_rows_through_an_adapter(make_recipe, data_type, checkpointing):
    base, model = with_adapter(make_recipe, data_type)
    assert prepare_packing(model, CPU, VOCAB) == NAME
    if checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
        base.model.enable_input_require_grads()
    assert_same_step(model)


def test_a_recomputed_layer_attends_within_documents_too(make_recipe, monkeypatch):
    """What recomputation sees is what the forward saw: each layer's attention is called twice, with bounds."""
    from qlora_cli.kernels import packed_attention

    base, model = with_adapter(make_recipe, "nf4")
    prepare_packing(model, CPU, VOCAB)
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    base.model.enable_input_require_grads()
    calls: list[list[int]] = []
    whole = packed_attention._by_document
    monkeypatch.setattr(packed_attention, "_by_document", lambda *a: (calls.append(list(a[3])), whole(*a))[1])
    batch = collate_packed(ROWS, CPU)
    loss_and_gradients(model, batch)
    assert calls == [batch.cu_seqlens.tolist()] * 2 * base.model.config.num_hidden_layers


def test_padded_evaluation_and_generation_are_as_before_packed_training(make_recipe):
    _, model = with_adapter(make_recipe, "nf4")
    prompt = {"input_ids": torch.tensor([[1, 5, 9], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}

    def answers() -> list[Tensor]:
        model.eval()
        with torch.no_grad():
            found = [trained_logits(model, collate(ROWS, CPU))[0], model.generate(**prompt, **options)]
        model.train()
        return found

    before = answers()
    assert prepare_packing(model, CPU, VOCAB) == NAME
    loss_and_gradients(model, collate_packed(ROWS, CPU))
    assert all(torch.equal(*pair) for pair in zip(before, answers(), strict=True))
