"""Causal attention in 16 bits on a CPU, with a backward pass of matrix products.

torch's forward kernel is kept, with the logarithms of row sums that it returns; its backward kernel for CPUs (2.13) is
slow up to some thousand tokens (`scripts/bench/pieces.py`). Equations: FlashAttention-2 (Dao 2023), section 3.1.2;
scores are in fp32, as there.
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
    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] >= SHORTEST
    if not (trained and slow and query.shape[3] == value.shape[3]):
        gqa = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    output: Tensor = _CausalAttention.apply(query, key, value, query.shape[3] ** -0.5 if scale is None else scale)
    return output


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        group = query.shape[1] // key.shape[1]
        repeated = (tensor.repeat_interleave(group, dim=1) if group > 1 else tensor for tensor in (key, value))
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, *repeated, 0.0, True, scale=scale
        )
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        length, kv_heads, dtype = query.shape[2], key.shape[1], query.dtype
        group, wide = query.shape[1] // kv_heads, torch.promote_types(dtype, torch.float32)
        q, grad, output, shift = (_by_query(x, kv_heads) for x in (query, grad, output, logsumexp.unsqueeze(3)))
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
            p = torch.baddbmm(shift[:, rows], q_wide[:, rows], k_wide[:, :, :end], beta=-1)
            _hide_later(p.view(kv_heads, -1, group, end)[..., begin:])
            p.exp_()
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


def _hide_later(scores: Tensor) -> None:
    """Minus infinity where a key is behind its query; scores (H_kv, n, G, n) of the same n queries and keys."""
    later = torch.ones(scores.shape[1], scores.shape[3], dtype=torch.bool).triu(1)
    scores.masked_fill_(later.unsqueeze(1), -torch.inf)
