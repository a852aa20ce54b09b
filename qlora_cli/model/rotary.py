"""Attention of a loaded model with another function for its rotary embeddings, each module by itself.

Such a module becomes an instance of a class of its own, whose forward is the code of its model's, in which the name of
transformers' function stands for another one. It gets it where that function, proven by random queries and keys, turns
the halves of a head by angles that are the same in both (RoFormer: Su et al. 2021, in the layout of Llama).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"
"""What transformers calls the function in the module of every model."""

Turned = tuple[Tensor, Tensor]
Rotary = Callable[[Tensor, Tensor, Tensor, Tensor], Turned]
"""query (B, H, T, D), key (B, H_kv, T, D), cos and sin (B or 1, T, D) of one type to query and key, turned."""


def reference_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Turned:
    """In plain torch, as Llama's."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

    return turned(query), turned(key)


def use_rotary(model: nn.Module, rotary: Rotary) -> int:
    """Gives every module whose forward calls a proven function `rotary` in its place; returns their number."""
    number = 0
    for module in [*model.modules()]:
        kind: Any = type(module)
        if "forward" not in vars(module) and is_known(kind):
            module.__class__ = _rotating(kind, rotary)
            number += 1
    return number


@cache
def is_known(kind: Any) -> bool:
    """Whether a class's forward calls a function of its module by NAME, which gives the bits of the reference."""
    forward = kind.forward
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return False
    own = forward.__globals__.get(NAME)
    return isinstance(own, FunctionType) and all(_is_standard(own, dtype) for dtype in (torch.float32, torch.bfloat16))


def _is_standard(own: Callable[..., Any], dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8))
    inputs = [torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes]
    try:
        found = own(*inputs)
        return all(map(torch.equal, found, reference_rotary(*inputs)))
    except Exception:  # anybody's function, given what it was not written for
        return False


@cache
def _rotating(kind: Any, rotary: Rotary) -> Any:
    forward: FunctionType = kind.forward
    own = forward.__globals__[NAME]

    def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Turned:
        one_type = query.dtype == key.dtype == cos.dtype == sin.dtype
        usual = not args and not kwargs and cos.dim() == 3 and cos.shape[-1] == query.shape[-1]
        turned: Turned = (rotary if one_type and usual else own)(query, key, cos, sin, *args, **kwargs)
        return turned

    names = forward.__globals__ | {NAME: turn}
    rebuilt = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    rebuilt.__kwdefaults__, rebuilt.__qualname__ = forward.__kwdefaults__, forward.__qualname__
    body = {"__module__": kind.__module__, "forward": rebuilt, "has_rotary": True}
    return type(kind.__name__, (kind,), body)
