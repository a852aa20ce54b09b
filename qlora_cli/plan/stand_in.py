"""Code that believes itself on a device while its floats lie on `meta`: no memory, no weights, no GPU.

Inside `standing_in` Python reads the device that is played off every tensor, so it takes the branches of that device;
C++ goes on seeing `meta`. What C++ would decide by the device is decided here as torch 2.13 decides it there: which
attention kernel runs, how dropout masks, and what autocast casts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora_cli.quant import kernels

LOWER = (
    *("linear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "linalg_vecdot", "conv1d", "conv2d", "conv3d"),
    *("addmv", "mv", "addr", "einsum", "chain_matmul", "linalg_multi_dot", "prelu"),
)
"""Operators that autocast feeds its dtype; those of the second line on CUDA alone (ATen/autocast_mode.h)."""

WIDER = {
    "cpu": ("mse_loss", "nll_loss", "nll_loss2d", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "prod"),
    "cuda": (
        *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt"),
        *("sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm"),
        *("native_layer_norm", "group_norm", "rms_norm", "nll_loss", "nll_loss2d", "kl_div", "l1_loss"),
        *("smooth_l1_loss", "huber_loss", "mse_loss", "binary_cross_entropy_with_logits", "logsumexp"),
        *("softmax.int", "log_softmax.int", "cumsum", "prod", "sum", "sum.dim_IntList"),
    ),
}
"""Operators that autocast feeds fp32, by device."""

KEY = "AutocastPrivateUse1"
"""A dispatch key above autograd that nothing else here uses: meta tensors have no autocast of their own."""

CAPABILITY = (9, 0)
"""Of the GPU that is played where there is none to ask."""


NOT_ITS_OWN = object()


class Stage:
    """is_on: whether Python is to see the device that is played; not while torch works out shapes."""

    is_on = True


STAGE = Stage()


@contextmanager
def standing_in(kind: str) -> Iterator[None]:
    """Inside the block meta tensors, and the integers beside them, are on `kind` ("cpu" or "cuda"), as Python sees."""
    with ExitStack() as stack:
        for change in _python_changes(kind):
            stack.enter_context(change)
        casts = _Casts(kind)
        stack.enter_context(replaced(torch, "clear_autocast_cache", casts.forget))
        library, all_others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
        stack.callback(library._destroy)
        stack.callback(all_others._destroy)
        all_others.fallback(torch.library.fallthrough_kernel, KEY)
        library.impl("scaled_dot_product_attention", _attention(kind), "AutogradMeta")
        library.impl("dropout", _dropout(kind), "AutogradMeta")
        for name in LOWER if kind == "cuda" else LOWER[:11]:
            library.impl(name, casts.kernel(name, None), KEY)
        library.impl("scaled_dot_product_attention", casts.kernel("scaled_dot_product_attention", None), KEY)
        for name in WIDER[kind]:
            library.impl(name, casts.kernel(name, torch.float32), KEY)
        stack.enter_context(_key_included())
        yield


@contextmanager
def _key_included() -> Iterator[None]:
    """Every operator passes by KEY first."""
    torch._C._dispatch_tls_set_dispatch_key_excluded(KEY, False)
    torch._C._dispatch_tls_set_dispatch_key_included(KEY, True)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_included(KEY, False)
        torch._C._dispatch_tls_set_dispatch_key_excluded(KEY, True)


def _python_changes(kind: str) -> Iterator[Any]:
    """Where Python would see or use the device; for CUDA without a call that would start it."""
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    truth = torch._C.TensorBase.device.__get__

    def seen(tensor: Tensor) -> torch.device:
        found: torch.device = device if STAGE.is_on else truth(tensor)
        return found

    yield replaced(torch.Tensor, "device", property(seen))
    if kind != "cuda":
        return
    from torch.cuda.amp import common
    from torch.utils import checkpoint

    yield replaced(torch.Tensor, "is_cuda", property(lambda tensor: STAGE.is_on))
    yield replaced(torch.cuda, "_lazy_init", lambda: None)
    yield replaced(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY)
    yield replaced(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    yield replaced(common, "amp_definitely_not_available", lambda: False)
    yield replaced(checkpoint, "get_device_states", lambda *args: ([], []))
    yield replaced(checkpoint, "set_device_states", lambda *args, **kwargs: None)
    yield replaced(kernels, "dequantize", _dequantized)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside the block the attribute is another one; afterwards it is its own again, or inherited."""
    own = vars(owner).get(name, NOT_ITS_OWN)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is NOT_ITS_OWN:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _dequantized(packed: Any, code: Any, block_size: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What one Triton kernel gives: the weight, and nothing beside it."""
    return torch.empty(shape, dtype=dtype, device=packed.codes.device)


# ── autocast ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Casts:
    """Autocast for meta tensors: what is cast, and the casts of trained weights, kept until its outermost end."""

    def __init__(self, kind: str) -> None:
        self.kind, self.kept = kind, dict[int, tuple[Tensor, Tensor]]()
        keys = (KEY, "AutocastCPU", "AutocastCUDA")
        self.below = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[keys[0]])
        for key in keys[1:]:
            self.below = self.below | torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key])

    def forget(self) -> None:
        """Stands in for `torch.clear_autocast_cache`."""
        self.kept.clear()

    def kernel(self, name: str, dtype: torch.dtype | None) -> Callable[..., Any]:
        """An operator with its floats cast to `dtype`; None: to autocast's."""
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def run(*args: Any, **kwargs: Any) -> Any:
            is_on = torch.is_autocast_enabled(self.kind)  # which excluding the keys would switch off
            with torch._C._ExcludeDispatchKeyGuard(self.below):
                if is_on:
                    to = dtype or torch.get_autocast_dtype(self.kind)
                    args = tuple(self._cast(one, to) for one in args)
                    kwargs = {key: self._cast(one, to) for key, one in kwargs.items()}
                return op(*args, **kwargs)

        return run

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, list | tuple):
            return [self._cast(one, dtype) for one in value]
        if not isinstance(value, Tensor) or value.dtype == dtype or not value.is_floating_point():
            return value
        if value.dtype == torch.float64:
            return value
        cacheable = value.is_leaf and value.requires_grad and dtype != torch.float32 and value._base is None
        if not (cacheable and torch.is_autocast_cache_enabled()):
            return value.to(dtype)
        if id(value) not in self.kept:
            self.kept[id(value)] = value, value.to(dtype)
        return self.kept[id(value)][1]


# ── attention and dropout ────────────────────────────────────────────────────────────────────────────────────────────


def _dropout(kind: str) -> Callable[..., Tensor]:
    def dropout(x: Tensor, p: float, train: bool) -> Tensor:
        if not train or p == 0:
            return x
        if kind == "cuda" and p < 1:
            kept: Tensor = torch.ops.aten.native_dropout(x, p, train)[0]
            return kept
        return x * torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)

    return dropout


def _attention(kind: str) -> Callable[..., Tensor]:
    choose = _choice_on_cpu if kind == "cpu" else _choice_on_cuda

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The kernel that the device's own `scaled_dot_product_attention` would choose."""
        chosen = choose(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        if chosen != "math" and attn_mask is not None and attn_mask.dtype == torch.bool:
            zero = torch.zeros(attn_mask.shape, dtype=query.dtype, device="meta")
            attn_mask = zero.masked_fill_(attn_mask.logical_not(), float("-inf"))
        return RUN[chosen](query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    return attention


def _choice_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, gqa: bool) -> str:
    """As torch chooses for tensors of these shapes on a CPU; the ledger asks it."""
    return "flash_for_cpu" if torch._fused_sdp_choice(q, k, v, mask, p, causal, enable_gqa=gqa) == 1 else "math"


def _choice_on_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, gqa: bool) -> str:
    """Flash attention for 16 bits without a mask, memory-efficient attention else, arithmetic for what both cannot."""
    size, half = q.shape[-1], q.dtype in (torch.float16, torch.bfloat16)
    if half and mask is None and size <= 256 and size == v.shape[-1]:
        return "flash"
    repeated = gqa and q.shape[1] != k.shape[1]
    return "efficient" if not repeated and size % (8 if half else 4) == 0 else "math"


def _math(q: Any, k: Any, v: Any, mask: Any, p: float, causal: bool, scale: Any, gqa: bool) -> Tensor:
    found = torch.ops.aten._scaled_dot_product_attention_math(
        q, k, v, mask, p, causal, None, scale=scale, enable_gqa=gqa
    )
    return _first(found)


def _flash_for_cpu(q: Any, k: Any, v: Any, mask: Any, p: float, causal: bool, scale: Any, gqa: bool) -> Tensor:
    return _first(
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, p, causal, attn_mask=mask, scale=scale)
    )


def _flash(q: Any, k: Any, v: Any, mask: Any, p: float, causal: bool, scale: Any, gqa: bool) -> Tensor:
    return _first(torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, p, causal, False, scale=scale))


def _efficient(q: Any, k: Any, v: Any, mask: Any, p: float, causal: bool, scale: Any, gqa: bool) -> Tensor:
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    learns = any(one.requires_grad for one in (q, k, v))
    return _first(torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, learns, p, causal, scale=scale))


def _first(found: Any) -> Tensor:
    output: Tensor = found[0]
    return output


RUN: dict[str, Callable[..., Tensor]] = {
    "math": _math,
    "flash_for_cpu": _flash_for_cpu,
    "flash": _flash,
    "efficient": _efficient,
}
"""Attention by the kernel that was chosen, as an operator that is no composition of others."""
