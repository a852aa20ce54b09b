"""Run by test_liger.py under TRITON_INTERPRET=1: liger-kernel's functions beside plain torch, errors as JSON.

Mended in Triton's interpreter (3.7), which has neither floats as arguments nor libdevice. Its product of two bfloat16
is none, so the narrow type is fp16.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from torch import Tensor
from triton.runtime import interpreter

from qlora_cli.kernels import liger
from qlora_cli.kernels.rms_norm import ORDERS, reference_rms_norm
from qlora_cli.kernels.swiglu import ACTIVATIONS, reference_gated
from qlora_cli.model.rotary import reference_rotary

EPS = 1e-3


def mend() -> None:
    """Gives the interpreter what it lacks."""
    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if type(argument) is not float:
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def off(found: Any, wanted: Any) -> float:
    """The largest difference, relative to the largest value, of the worst of some tensors."""
    assert all(ours.dtype == theirs.dtype for ours, theirs in zip(found, wanted, strict=True))
    pairs = [(ours.double(), theirs.double()) for ours, theirs in zip(found, wanted, strict=True)]
    return max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)


def passed(function: Any, *inputs: Tensor) -> list[Tensor]:
    """What it returns and the gradients of those inputs that have one, of one and the same gradient."""
    leaves = [tensor.clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    y = function(*leaves)
    by_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], by_y)]


def rotary(generator: torch.Generator) -> float:
    """The error of turned queries and keys and of their gradients, in the layout of an attention's projections."""
    query, key = (torch.randn((2, 7, heads, 16), generator=generator).transpose(1, 2) for heads in (6, 2))
    angles = torch.randn((1, 7, 8), generator=generator).repeat(1, 1, 2)
    errors = []
    for at in (0, 1):
        pair = [query.requires_grad_(at == 0), key.requires_grad_(at == 1)]
        ours, theirs = (
            passed(lambda q, k, by=by, at=at: by(q, k, angles.cos(), angles.sin())[at], *pair)
            for by in (liger.rotary, reference_rotary)
        )
        errors.append(off(ours, theirs))
        query, key = query.detach(), key.detach()
    return max(errors)


def main() -> None:
    """By name: the error in fp32, and in fp16 those beside each order of casts."""
    mend()
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn((2, 7, 96), generator=generator).requires_grad_(), torch.randn(96, generator=generator)
    gate, up = (torch.randn((2, 7, 96), generator=generator).requires_grad_() for _ in range(2))
    found: dict[str, Any] = {"norms": {}, "casts": {}, "gated": {}}
    for order in ORDERS:
        ours = passed(lambda x, w, order=order: liger.rms_norm(x, w, EPS, order), x, weight)
        found["norms"][order] = off(
            ours, passed(lambda x, w, order=order: reference_rms_norm(x, w, EPS, order), x, weight)
        )
        narrow = liger.rms_norm(x.half(), weight.half(), EPS, order)
        beside = {other: reference_rms_norm(x.half(), weight.half(), EPS, other) for other in ORDERS}
        found["casts"][order] = {other: (narrow != wanted).float().mean().item() for other, wanted in beside.items()}
    for name in ACTIVATIONS:
        ours = passed(lambda g, u, name=name: liger.gated(g, u, name), gate, up)
        found["gated"][name] = off(ours, passed(lambda g, u, name=name: reference_gated(g, u, name), gate, up))
    print(json.dumps(found | {"rotary": rotary(generator)}))


if __name__ == "__main__":
    main()
