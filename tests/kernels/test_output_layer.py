"""What a model does to its logits is found on the model itself, and losses from hidden states are those from logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from qlora_cli.data.encode import Example
from qlora_cli.kernels import linear_cross_entropy
from qlora_cli.kernels.linear_cross_entropy import NO_TAIL, Tail
from qlora_cli.kernels.output_layer import find_tail, hidden_states
from qlora_cli.model.base import Base
from qlora_cli.tasks import table
from qlora_cli.tasks.causal_lm import collate, collate_packed
from qlora_cli.tasks.table import TASKS, loss_sum, mean_loss, target_losses
from tests.architectures import BART, COMMON, T5
from tests.kernels.tiny_models import VOCAB, tiny

CPU = torch.device("cpu")
SIZES = {"vocab_size": VOCAB}
OPT = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}


@torch.no_grad()
def seq2seq(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(std=2)
    return model


def bart() -> Any:
    return seq2seq(BartForConditionalGeneration, BartConfig(**(COMMON | BART | SIZES)))


def t5(tied: bool) -> Any:
    return seq2seq(T5ForConditionalGeneration, T5Config(**(COMMON | T5 | SIZES), tie_word_embeddings=tied))


CAUSAL: dict[str, tuple[Callable[[], Any], Tail]] = {
    "llama": (lambda: tiny("llama"), NO_TAIL),
    "llama, tied": (lambda: tiny("llama", tie_word_embeddings=True), NO_TAIL),
    "gpt2": (lambda: tiny("gpt2"), NO_TAIL),
    "opt": (lambda: tiny("opt", **OPT), NO_TAIL),
    "gemma2": (lambda: tiny("gemma2", final_logit_softcapping=5.0), Tail(softcap=5.0)),
    "gemma3": (lambda: tiny("gemma3_text", sliding_window=4, final_logit_softcapping=None), NO_TAIL),
    "cohere": (lambda: tiny("cohere", logit_scale=0.3), Tail(scale=0.3)),
    "granite": (lambda: tiny("granite", logits_scaling=7.0), Tail(scale=1 / 7)),
    "hyperclovax": (lambda: tiny("hyperclovax", logits_scaling=0.2), Tail(scale=0.2)),
}
SEQ2SEQ: dict[str, tuple[Callable[[], Any], Tail]] = {
    "bart": (bart, NO_TAIL),
    "t5, tied": (lambda: t5(True), NO_TAIL),
    "t5, untied": (lambda: t5(False), NO_TAIL),
}
KINDS = [*CAUSAL, *SEQ2SEQ]


@cache
def model_of(kind: str) -> Any:
    return (CAUSAL | SEQ2SEQ)[kind][0]()


def base_of(model: Any, dtype: torch.dtype = torch.float32) -> Base:
    task = "seq2seq_lm" if model.config.is_encoder_decoder else "causal_lm"
    return Base(Path(), None, frozenset(), model.config, task, model, dtype, "")


def batch_of(base: Base) -> Any:
    generator = torch.Generator().manual_seed(4)
    rows = []
    for length, prompt in ((9, 3), (14, 6), (5, 1)):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        rows.append(Example(ids, [-100] * prompt + ids[prompt:], "a row"))
    return TASKS[base.task].collate(rows, base)


def gradients(loss: Tensor, model: Any) -> list[Tensor]:
    """The loss, and its gradient by every parameter: of tied ones from both sides."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [loss.detach(), *(gradient for gradient in found if gradient is not None)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    """To 1e-5 of the loss, and of the largest gradient."""
    assert len(found) == len(wanted) > 5
    assert abs(found[0] - wanted[0]) <= 1e-5 * wanted[0]
    largest = max(float(gradient.abs().max()) for gradient in wanted[1:])
    assert largest > 1e-3
    for ours, plain in zip(found[1:], wanted[1:], strict=True):
        assert (ours - plain).abs().max() <= 1e-5 * largest


def by_logits(base: Base, batch: Any) -> Tensor:
    return loss_sum(*TASKS[base.task].outputs(base.model, batch)) / 11


@pytest.fixture
def no_logits(monkeypatch) -> None:
    """Small chunks, and an error where all logits are made after all."""
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 5 * VOCAB * 4)
    monkeypatch.setattr(table, "loss_sum", lambda *_: pytest.fail("from logits"))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_through_the_tail_are_those_of_the_logits(kind, no_logits):
    base = base_of(model_of(kind))
    batch, wanted = batch_of(base), (CAUSAL | SEQ2SEQ)[kind][1]
    found = base.tail
    assert found is not None
    assert (found.scale, found.softcap) == (pytest.approx(wanted.scale), wanted.softcap)
    assert (found.bias is base.model.final_logits_bias) if kind == "bart" else found.bias is None
    ours = gradients(mean_loss(base, base.model, batch, 11), base.model)
    assert_same(ours, gradients(by_logits(base, batch), base.model))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_hits_of_an_evaluation_are_those_of_the_logits(kind, no_logits):
    base = base_of(model_of(kind))
    batch = batch_of(base)
    losses, likeliest = target_losses(base, base.model, batch)
    with torch.no_grad():
        logits, targets = TASKS[base.task].outputs(base.model, batch)
    assert likeliest is not None
    assert not losses.requires_grad
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-5)
    assert torch.equal(likeliest, logits.argmax(dim=-1) == targets)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tail_is_found_in_bf16_too_and_the_loss_is_as_near_to_the_truth(kind):
    made = (CAUSAL | SEQ2SEQ)[kind][0]
    exact, model = base_of(made().bfloat16().float()), made().bfloat16()
    if hasattr(model, "final_logits_bias"):
        exact.model.final_logits_bias = model.final_logits_bias.float()
    base, batch = base_of(model, torch.bfloat16), batch_of(exact)
    assert base.tail is not None
    with base.compute():
        ours, plain = mean_loss(base, model, batch, 11), by_logits(base, batch)
    truth = by_logits(exact, batch)
    assert abs(ours - truth) <= 1.5 * abs(plain - truth) + 1e-3 * truth
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_packed_rows_lose_what_their_logits_lose(kind, no_logits):
    base = base_of(model_of(kind))
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (9, 6)]
    batch = collate_packed([Example(row, row, "a row") for row in rows], CPU)
    ours = gradients(mean_loss(base, base.model, batch, 11), base.model)
    assert_same(ours, gradients(by_logits(base, batch), base.model))


def test_finding_the_tail_leaves_modes_random_state_and_head_as_they_were():
    model = tiny("gpt2", resid_pdrop=0.5).train()
    model.lm_head.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert base_of(model).tail == NO_TAIL
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in model.lm_head.__dict__


def changed(change: Callable[[Any, Tensor], Tensor]) -> Any:
    """A Llama that does something of its own to its logits: `change` of the model and them."""
    model = tiny("llama")

    class Other(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            made = super().forward(*args, **kwargs)
            made.logits = change(self, made.logits)
            return made

    model.__class__ = Other
    return model


def refuse(model: Any, logits: Tensor) -> Tensor:
    if logits[0, 0, 0] == -40:
        raise ValueError("these are not my head's")
    return logits


UNKNOWN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a cube": lambda model, logits: logits + logits**3,
    "a bias of an unknown name": lambda model, logits: logits + torch.linspace(0, 1, VOCAB),
    "one token masked": lambda model, logits: logits.index_fill(-1, torch.tensor([5]), -1e9),
    "fewer tokens": lambda model, logits: logits[..., :-1],
    "no number": lambda model, logits: logits * torch.where(logits == -40, torch.nan, 1.0),
    "the weight beside the module": lambda model, logits: logits + model.lm_head.weight.sum(dim=1) * 1e-3,
    "refused": refuse,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_model_of_unknown_ways_computes_its_logits(name):
    model = changed(UNKNOWN[name])
    base = base_of(model)
    rows = [Example(ids, ids, "a row") for ids in ([5, 6, 7, 8, 9], [9, 8, 7])]
    batch = collate(rows, CPU)
    assert base.tail is None
    assert "forward" not in model.lm_head.__dict__
    if name != "fewer tokens":
        found = gradients(mean_loss(base, model, batch, 11), model)
        assert_same(found, gradients(by_logits(base, batch), model))
    losses, likeliest = target_losses(base, model, batch)
    with torch.no_grad():
        logits, targets = TASKS[base.task].outputs(model, batch)
    assert torch.equal(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(likeliest, logits.argmax(dim=-1) == targets)  # type: ignore[arg-type]


def test_a_head_that_is_no_module_or_that_nobody_calls_has_no_tail(monkeypatch):
    model = tiny("llama")
    assert base_of(model).tail == NO_TAIL
    assert find_tail(model, lambda: torch.zeros(1, 1, VOCAB)) is None
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert base_of(model).tail is None
    twice = changed(lambda model, logits: (model.lm_head(torch.zeros(1, 1, 32)), logits)[1])
    assert base_of(twice).tail is None


def test_a_device_without_memory_is_told():
    def exhausted() -> Tensor:
        raise torch.OutOfMemoryError

    model = tiny("llama")
    with pytest.raises(torch.OutOfMemoryError):
        find_tail(model, exhausted)
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite", "bart"])
def test_on_the_meta_device_the_config_is_believed(kind):
    wanted = base_of(model_of(kind)).tail
    with torch.device("meta"):
        model = model_of(kind).__class__(model_of(kind).config)
    found = find_tail(model, lambda: pytest.fail("nothing can be computed"))
    assert found is not None
    assert wanted is not None
    assert (found.scale, found.softcap, found.bias is None) == (wanted.scale, wanted.softcap, wanted.bias is None)


@pytest.mark.parametrize("before", [None, lambda hidden: hidden * 2])
def test_the_head_has_its_own_forward_again_also_after_an_exception(before):
    model = tiny("llama")
    head: nn.Linear = model.lm_head
    if before is not None:
        head.forward = before
    ids = torch.arange(3, 8).unsqueeze(0)
    with torch.no_grad():
        wanted = model(ids).logits
        with suppress(KeyError), hidden_states(model) as seen:
            assert model(ids).logits.shape == (1, 1, VOCAB)
            raise KeyError
        assert head.__dict__.get("forward") is before
        assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(head(seen[0]), wanted)
    assert len(seen) == 1
