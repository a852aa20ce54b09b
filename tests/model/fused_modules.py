"""Small models by their kind; their norms and MLPs that have fused functions, and the models without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn

from qlora_cli.model.layer_kernels import FusedMLP, FusedNorm

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}


def model_of(kind: str) -> Any:
    """A small random model, its norms' weights neither 0 nor 1."""
    config = transformers.AutoConfig.for_model(kind, **SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter)
    return model.requires_grad_(False).eval()


def fused(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FusedNorm | FusedMLP)]


@contextmanager
def models_own(model: nn.Module) -> Iterator[None]:
    """Inside the block every norm and MLP is of its model's class."""
    modules = [(module, type(module)) for module in fused(model)]
    assert modules
    for module, kind in modules:
        module.__class__ = kind.__mro__[2]  # behind itself and FusedNorm or FusedMLP
        assert type(module).__module__.startswith("transformers.")
    try:
        yield
    finally:
        for module, kind in modules:
            module.__class__ = kind
