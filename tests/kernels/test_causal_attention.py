"""Attention of our own in 16 bits on a CPU, against torch's in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qlora_cli.kernels import causal_attention as module
from qlora_cli.kernels.causal_attention import ROWS, SHORTEST, _CausalAttention, causal_attention

KINDS = {"plain": (1.0, 0.0), "peaked": (8.0, 0.0), "values far from zero": (2.0, 5.0)}
"""What queries and keys are multiplied with, and the mean of the values."""


def drawn(length: int, heads: int, kv_heads: int, kind: str = "plain") -> list[Tensor]:
    """Query, key, value and a gradient, as bf16 has them."""
    torch.manual_seed(length)
    factor, mean = KINDS[kind]
    shapes = [(heads, factor, 0.0), (kv_heads, factor, 0.0), (kv_heads, 1.0, mean), (heads, 1.0, 0.0)]
    return [(torch.randn(1, n, length, 16) * times + plus).bfloat16() for n, times, plus in shapes]


def torchs(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)


def passes(attend, tensors: list[Tensor], dtype: torch.dtype, scale: float | None = None) -> list[Tensor]:
    """Output and three gradients in fp64."""
    query, key, value = (tensor.to(dtype).detach().clone().requires_grad_() for tensor in tensors[:3])
    output = attend(query, key, value, scale)
    output.backward(tensors[3].to(dtype))
    return [tensor.detach().double() for tensor in (output, query.grad, key.grad, value.grad)]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [((one - other).norm() / other.norm()).item() for one, other in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [SHORTEST, ROWS, ROWS + 1, 3 * ROWS - 5])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_it_is_torchs_attention_to_rounding_in_fp32(length, heads, scale):
    """Its own passes in fp32, which the dispatcher leaves to torch."""
    tensors = drawn(length, *heads)

    def ours(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        output: Tensor = _CausalAttention.apply(query, key, value, 0.25 if scale is None else scale)
        return output

    assert (
        max(errors(passes(ours, tensors, torch.float32, scale), passes(torchs, tensors, torch.float64, scale))) < 1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [SHORTEST, 256])
def test_in_bf16_its_errors_are_those_of_torchs_kernel(length, kind):
    """Also where a difference of two large numbers is left: dP - D must not be rounded before it is taken."""
    tensors = drawn(length, 6, 2, kind)
    wanted = passes(torchs, tensors, torch.float64)
    ours, theirs = (errors(passes(attend, tensors, torch.bfloat16), wanted) for attend in (causal_attention, torchs))
    assert all(one <= 1.5 * other + 1e-3 for one, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_it_is_taken_for_long_rows_in_bf16_whether_they_train_or_not_and_for_no_others(monkeypatch):
    taken: list[int] = []
    apply = _CausalAttention.apply
    monkeypatch.setattr(module._CausalAttention, "apply", lambda *a: (taken.append(a[0].shape[2]), apply(*a))[1])
    for length in (SHORTEST - 1, SHORTEST):
        for dtype in (torch.float32, torch.bfloat16):
            passes(causal_attention, drawn(length, 4, 2), dtype)
    with torch.no_grad():
        causal_attention(*drawn(SHORTEST, 4, 2)[:3])
    assert taken == [SHORTEST, SHORTEST]
