"""Packed attention equals its dense reference, and a model switched to it still does all that it did before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_cli.kernels.packed_attention import (
    NAME,
    UNABLE,
    _varlen,
    packed_arguments,
    packed_attention,
    reference_packed_attention,
    register,
    supports,
    use_packed_attention,
)
from tests.kernels.tiny_models import MODELS, VOCAB, bounds_of, packed_logits, tiny

LENGTHS = [7, 6, 9]


def bounds_as_arguments(lengths: list[int]) -> dict[str, Any]:
    bounds = bounds_of(lengths)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths)}


def heads(query: int, key: int, tokens: int, size: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, query, tokens, size), (1, key, tokens, size), (1, key, tokens, size)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    counts=st.sampled_from([(1, 1), (4, 2), (6, 2), (4, 1), (3, 3)]),
    window=st.none() | st.integers(1, 13),
    scaling=st.none() | st.floats(0.05, 2),
)
def test_values_and_gradients_are_the_references(lengths, counts, window, scaling):
    tensors = heads(*counts, sum(lengths))
    arguments = bounds_as_arguments(lengths) | {"sliding_window": window}
    output, weights = packed_attention(torch.nn.Module(), *tensors, None, scaling=scaling, **arguments)
    wanted = reference_packed_attention(*tensors, bounds_of(lengths), scaling, window)
    assert weights is None
    assert output.shape == (1, sum(lengths), counts[0], 4)
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-10)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for found, right in zip(
        torch.autograd.grad(output, tensors, direction), torch.autograd.grad(wanted, tensors, direction), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def test_the_reference_is_what_each_document_has_alone():
    query, key, value = heads(2, 2, 5)
    parts = [reference_packed_attention(*(t[:, :, cut] for t in (query, key, value)), torch.tensor([0, n]), None, 2)
             for cut, n in ((slice(0, 2), 2), (slice(2, 5), 3))]  # fmt: skip
    torch.testing.assert_close(
        reference_packed_attention(query, key, value, torch.tensor([0, 2, 5]), None, 2), torch.cat(parts, 1)
    )
    first = value[:, :, 2].squeeze(0)
    torch.testing.assert_close(parts[1][0, 0], first)  # a first token sees itself alone


def test_dropout_drops_in_training_alone():
    tensors = heads(2, 1, 9)
    arguments = bounds_as_arguments([4, 5])
    kept, _ = packed_attention(torch.nn.Module(), *tensors, None, dropout=0.0, **arguments)
    dropped, _ = packed_attention(torch.nn.Module(), *tensors, None, dropout=0.5, **arguments)
    assert not torch.equal(kept, dropped)
    assert torch.equal(dropped[:, 0].eq(0), dropped[:, 0].eq(0).all(-1, keepdim=True).expand_as(dropped[:, 0]))


def test_autocast_computes_in_its_dtype_even_where_a_rotary_embedding_widened_two_of_three():
    query, key, value = heads(2, 2, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = packed_attention(torch.nn.Module(), query, key, value.bfloat16(), None, **bounds_as_arguments([5]))
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("argument", UNABLE)
@pytest.mark.parametrize("packed", [True, False])
def test_what_would_change_the_result_unknown_to_us_is_refused(argument, packed):
    arguments = bounds_as_arguments([3, 2]) if packed else {}
    with pytest.raises(NotImplementedError, match=argument):
        packed_attention(torch.nn.Module(), *heads(1, 1, 5), None, **arguments, **{argument: torch.ones(1)})


def test_refusals_name_their_reason():
    bounds, tensors = bounds_as_arguments([3, 2]), heads(1, 1, 5)
    bidirectional = SimpleNamespace(is_causal=False, training=False)
    cases: list[tuple[str, Any, Any, Tensor | None, dict[str, Any]]] = [
        ("not both", torch.nn.Module(), tensors, torch.ones(1, 1, 5, 5), bounds),
        ("is causal", bidirectional, tensors, None, bounds),
        ("is causal", torch.nn.Module(), tensors, None, bounds | {"is_causal": False}),
        ("one row", torch.nn.Module(), [t.expand(2, -1, -1, -1) for t in tensors], None, bounds),
        ("no cache", torch.nn.Module(), [tensors[0][:, :, -1:], *tensors[1:]], None, bounds),
        ("does not hand the documents' bounds", torch.nn.Module(), tensors, torch.empty(1, 1, 0, 0), {}),
    ]
    for message, module, qkv, mask, arguments in cases:
        with pytest.raises(NotImplementedError, match=message):
            packed_attention(module, *qkv, mask, **arguments)


def test_without_bounds_it_is_transformers_sdpa():
    tensors, mask = heads(4, 2, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
    for attention_mask in (mask, None):
        found, _ = packed_attention(module, *tensors, attention_mask, scaling=0.3, is_causal=None)  # type: ignore[arg-type]
        assert torch.equal(found, sdpa_attention_forward(module, *tensors, attention_mask, scaling=0.3)[0])  # type: ignore[arg-type]


def test_registering_twice_is_registering_once():
    register()
    register()
    assert transformers.AttentionInterface()[NAME] is packed_attention


@pytest.mark.parametrize("attention", [NAME, "sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_changing_any_token_of_a_document_leaves_every_bit_of_the_others(kind, attention):
    """With ours, and with each that a recipe may name on a CPU."""
    model = tiny(kind, None if attention == NAME else attention)
    assert attention != NAME or use_packed_attention(model)
    input_ids = torch.arange(sum(LENGTHS)).unsqueeze(0) % (VOCAB - 3) + 3
    with torch.no_grad():
        before = packed_logits(model, input_ids, LENGTHS)[0].split(LENGTHS)
        for at in range(sum(LENGTHS)):
            changed = input_ids.clone()
            changed[0, at] = (changed[0, at] + 11) % VOCAB
            after = packed_logits(model, changed, LENGTHS)[0].split(LENGTHS)
            mine = next(n for n in range(len(LENGTHS)) if at < sum(LENGTHS[: n + 1]))
            for number, (old, new) in enumerate(zip(before, after, strict=True)):
                assert torch.equal(old, new) == (number != mine), (at, number)


@pytest.mark.parametrize("kind", MODELS)
def test_documents_have_the_logits_packed_that_sdpa_gives_them_alone(kind):
    model, sdpa = tiny(kind), tiny(kind, "sdpa")
    use_packed_attention(model)
    input_ids = torch.randint(VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = packed_logits(model, input_ids, LENGTHS)[0].split(LENGTHS)
        for row, document in zip(found, input_ids[0].split(LENGTHS), strict=True):
            torch.testing.assert_close(row, sdpa(document.unsqueeze(0)).logits[0], rtol=1e-4, atol=1e-4)


def test_a_packed_forward_builds_no_mask_and_reads_nothing_back(monkeypatch):
    from transformers import masking_utils

    model = tiny("mistral")
    use_packed_attention(model)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a packed forward must not come here")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", never)  # its `.all()` waits for the device
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, NAME, never)
    packed_logits(model, torch.arange(sum(LENGTHS)).unsqueeze(0), LENGTHS)
    with pytest.raises(AssertionError, match="must not come here"):
        model(torch.arange(6).unsqueeze(0))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_padded_batches_and_generation_are_those_of_sdpa(kind):
    model, sdpa = tiny(kind), tiny(kind, "sdpa")
    use_packed_attention(model)
    input_ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    right, left = torch.ones_like(input_ids), torch.ones_like(input_ids)
    right[1, 6:] = left[1, :4] = 0
    for length in LENGTHS:  # packed forwards in between leave nothing behind
        packed_logits(model, torch.arange(length).unsqueeze(0), [length])
        with torch.no_grad():
            logits = [m(input_ids, attention_mask=right).logits for m in (model, sdpa)]
        assert torch.equal(*logits)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        texts = [m.generate(input_ids, attention_mask=left, **options) for m in (model, sdpa)]
        assert torch.equal(*texts)


def test_classes_that_keep_something_from_their_attention_are_not_switched():
    for kind, why in {"gpt_oss": "sinks", "bloom": "alibi", "falcon": "no interface"}.items():
        small = {"bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2}}.get(kind, {"num_hidden_layers": 1})
        config = AutoConfig.for_model(kind, vocab_size=VOCAB, **small)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        before = model.config._attn_implementation
        assert not supports(model), why
        assert not use_packed_attention(model), why
        assert model.config._attn_implementation == before


def test_arguments_for_other_attentions_are_position_ids_alone():
    bounds, position_ids = bounds_of([2, 3]), torch.tensor([[0, 1, 0, 1, 2]])
    for name, more in {"sdpa": set(), "eager": set(), "flash_attention_2": {"cu_seq_lens_q", "max_length_q"}}.items():
        model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=name))
        arguments = packed_arguments(model, position_ids, bounds, 3)
        assert arguments.keys() >= more | {"position_ids"}
        assert "attention_mask" not in arguments
        assert more or arguments.keys() == {"position_ids"}


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("counts", [(4, 4), (8, 2)])
def test_the_gpu_kernel_takes_our_arguments(window, counts):
    """On the meta device, which checks the call and its backward, not the numbers."""
    tensors = [t.detach().to("meta", torch.bfloat16).requires_grad_() for t in heads(*counts, 12, 64)]
    output = _varlen(*tensors, torch.zeros(3, dtype=torch.int32, device="meta"), 7, None, window)
    assert output.shape == (1, 12, counts[0], 64)
    gradients = torch.autograd.grad(output, tensors, torch.empty_like(output))
    assert [g.shape for g in gradients] == [t.shape for t in tensors]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("counts", [(4, 4), (8, 2)])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_gpu_kernel_equals_the_loop(window, counts, size):
    lengths = [37, 1, 130, 64]
    tensors = [t.detach().cuda().bfloat16().requires_grad_() for t in heads(*counts, sum(lengths), size)]
    arguments = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in bounds_as_arguments(lengths).items()}
    output, _ = packed_attention(torch.nn.Module(), *tensors, None, sliding_window=window, **arguments)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = reference_packed_attention(*exact, arguments["cu_seq_lens_q"], None, window)
    direction = torch.randn_like(wanted)
    pairs = [(output, wanted)]
    pairs += zip(
        torch.autograd.grad(output, tensors, direction.bfloat16()),
        torch.autograd.grad(wanted, exact, direction),
        strict=True,
    )
    for found, right in pairs:
        assert (found.double() - right).norm() / right.norm() < 1e-2
