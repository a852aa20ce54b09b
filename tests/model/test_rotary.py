"""Attention gets another function for its rotary embeddings where its own is proven, module by module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

from qlora_cli.model.layer_kernels import OURS, in_words, use_layer_kernels
from qlora_cli.model.rotary import NAME, is_known, reference_rotary, use_rotary
from tests.model.fused_modules import model_of

TOKENS = torch.arange(3, 27).view(2, 12)
KNOWN = {
    "llama": True,
    "qwen3": True,
    "gemma2": True,
    "gemma3_text": True,
    "olmo2": True,
    "glm4": False,
    "cohere2": False,
}
"""Kinds of model, and whether theirs is Llama's; GLM and Cohere turn neighbours."""


def counting() -> tuple[list[Any], Any]:
    """A function like the reference, and the shapes that it was given."""
    seen: list[Any] = []

    def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((query.shape, key.shape, cos.shape))
        return reference_rotary(query, key, cos, sin)

    return seen, turn


@pytest.mark.parametrize("kind", KNOWN)
def test_a_proven_function_is_replaced_and_no_other(kind):
    model, (seen, turn) = model_of(kind), counting()
    before = model(TOKENS).logits
    assert use_rotary(model, turn) == (2 if KNOWN[kind] else 0)
    assert torch.equal(model(TOKENS).logits, before)
    assert len(seen) == (2 if KNOWN[kind] else 0)


def test_no_class_is_patched_and_names_stay():
    own, forward = getattr(modeling_llama, NAME), LlamaAttention.forward
    model, (seen, turn) = model_of("llama"), counting()
    use_rotary(model, turn)
    attention = model.model.layers[0].self_attn
    assert (type(attention).__name__, type(attention).__module__) == ("LlamaAttention", LlamaAttention.__module__)
    assert isinstance(attention, LlamaAttention)
    assert getattr(modeling_llama, NAME) is own
    assert LlamaAttention.forward is forward
    model_of("llama")(TOKENS)
    assert not seen


def test_a_cache_and_angles_of_another_type_are_as_before():
    model, (seen, turn) = model_of("llama"), counting()
    wanted = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    use_rotary(model, turn)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False), wanted)
    assert seen
    seen.clear()
    model.model.rotary_emb.register_forward_hook(lambda *call: tuple(one.double() for one in call[2]))
    with pytest.raises(RuntimeError):  # of the model's own, which widens queries and keys but not values
        model(TOKENS)
    assert not seen


def test_a_class_that_calls_nothing_of_the_name_is_not_known():
    assert not is_known(torch.nn.Linear)
    assert is_known(LlamaAttention)


def test_the_report_counts_them():
    model, (_, turn) = model_of("llama"), counting()
    use_layer_kernels(model, OURS._replace(rotary=turn))
    assert in_words(model) == "5 norms, 2 MLPs and 2 rotary embeddings fused (torch functions)"
