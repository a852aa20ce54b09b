"""Tiny random models of many architectures, and a packed forward of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_cli.kernels.packed_attention import packed_arguments

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma3_text": {"sliding_window": 4},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": GPT2,
}
"""Architectures and what makes them tiny; two have windows shorter than the documents below."""


def tiny(kind: str, attention: str | None = None, **changes: Any) -> Any:
    """A random model whose attention is sharp enough that a token more or less shows."""
    shape = GPT2 if MODELS.get(kind) is GPT2 else SHAPE | MODELS.get(kind, {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(shape | changes))
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed_logits(model: Any, input_ids: Tensor, lengths: list[int]) -> Tensor:
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    arguments = packed_arguments(model, position_ids, bounds_of(lengths), max(lengths))
    return model(input_ids=input_ids, use_cache=False, **arguments).logits
