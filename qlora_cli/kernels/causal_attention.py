"""Causal attention in 16 bits on a CPU, of matrix products.

torch's kernels for CPUs (2.13) take 16-bit numbers at a fraction of the speed of its matrix products up to some
thousand tokens (`scripts/bench/pieces.py`). Equations: FlashAttention-2 (Dao 2023), section 3.1; scores are in fp32, as
there, and of so few queries at once that a softmax of whole rows is computed, in backward again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

SHORTEST = 48
"""Tokens from which on it pays."""

ROWS = 64
"""Queries of a tile, whose scores by all keys up to them are there at once."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """query (1, H, T, D), key and value (1, H_kv, T, D), H a multiple of H_kv, to (1, H, T, D)."""
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] >= SHORTEST
    if not slow or query.shape[3] != value.shape[3]:
        gqa = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    output: Tensor = _CausalAttention.apply(query, key, value, query.shape[3] ** -0.5 if scale is None else scale)
    return output


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        length, kv_heads, dtype = query.shape[2], key.shape[1], query.dtype
        group, wide = query.shape[1] // kv_heads, torch.promote_types(dtype, torch.float32)
        q = _by_query(query, kv_heads)
        q_wide, k_wide, v = q.to(wide) * scale, key[0].to(wide).transpose(1, 2), value[0]
        output = torch.empty_like(q)
        for begin in range(0, length, ROWS):
            end = min(begin + ROWS, length)
            rows = slice(begin * group, end * group)
            p = _attended(q_wide[:, rows], k_wide[:, :, :end], group)
            output[:, rows] = torch.bmm(p.to(dtype), v[:, :end])
        output = output.view(kv_heads, length, group, -1).transpose(1, 2).reshape(query.shape)
        ctx.save_for_backward(query, key, value, output)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output = ctx.saved_tensors
        length, kv_heads, dtype = query.shape[2], key.shape[1], query.dtype
        group, wide = query.shape[1] // kv_heads, torch.promote_types(dtype, torch.float32)
        q, grad, output = (_by_query(x, kv_heads) for x in (query, grad, output))
        k, v = key[0], value[0]
        less = (grad.to(wide) * output).sum(dim=2, keepdim=True)
        # subtracted inside of the product, before its sum is rounded: as two numbers of 16 bits it has all of its own
        high = less.to(dtype)
        grad_and_less = torch.cat([grad, high, (less - high).to(dtype)], dim=2)
        v_and_ones = torch.cat([v, v.new_full((*v.shape[:2], 2), -1.0)], dim=2)
        k_wide, q_wide = k.to(wide).transpose(1, 2), q.to(wide) * ctx.scale
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (k.new_zeros(k.shape, dtype=wide) for _ in range(2))
        for begin in range(0, length, ROWS):
            end = min(begin + ROWS, length)
            rows = slice(begin * group, end * group)
            p = _attended(q_wide[:, rows], k_wide[:, :, :end], group)
            ds = torch.bmm(grad_and_less[:, rows], v_and_ones[:, :end].transpose(1, 2)).to(wide)
            ds = ds.mul_(p).to(dtype)
            grad_v[:, :end] += torch.bmm(p.to(dtype).transpose(1, 2), grad[:, rows])
            grad_k[:, :end] += torch.bmm(ds.transpose(1, 2), q[:, rows])
            torch.mul(torch.bmm(ds, k[:, :end]), ctx.scale, out=grad_q[:, rows])
        grad_q = grad_q.view(kv_heads, length, group, -1).transpose(1, 2).reshape(query.shape)
        return grad_q, grad_k.mul_(ctx.scale).to(dtype)[None], grad_v.to(dtype)[None], None


def _by_query(tensor: Tensor, kv_heads: int) -> Tensor:
    """(1, H, T, x) to (H_kv, T * G, x): the heads that share keys beside each other, query by query."""
    heads, length, size = tensor.shape[1:]
    return tensor.reshape(kv_heads, heads // kv_heads, length, size).transpose(1, 2).reshape(kv_heads, -1, size)


def _attended(q: Tensor, k: Tensor, group: int) -> Tensor:
    """Weights (H_kv, n * G, T) by which the last n queries look at the keys up to them.

    q (H_kv, n * G, D), k (H_kv, D, T).
    """
    scores = torch.bmm(q, k)
    number = q.shape[1] // group
    later = torch.ones(number, number, dtype=torch.bool).triu(1)
    scores.view(len(q), number, group, -1)[..., -number:].masked_fill_(later.unsqueeze(1), -torch.inf)
    return scores.softmax(dim=2)
