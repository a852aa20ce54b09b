"""Operators that a rehearsal answers by itself, and what kernels take beside their outputs: two tables.

All others are run on meta as torch does it, which allocates what they return and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_cli.quant.scales import dynamic_map

if TYPE_CHECKING:
    from qlora_cli.plan.ledger import Ledger

aten = torch.ops.aten


def places(args: Any, kwargs: Any) -> tuple[bool, bool]:
    """Whether any tensor is on meta, and whether any is real."""
    meta = real = False
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            if value.is_meta:
                meta = True
            else:
                real = True
        elif isinstance(value, list | tuple):
            for one in value:
                if isinstance(one, Tensor):
                    if one.is_meta:
                        meta = True
                    else:
                        real = True
    return meta, real


def shape_alone(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _to_copy(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    """A move between devices that Python believes in is none; a cast of integers to floats leads to meta."""
    source: Tensor = args[0]
    dtype = kwargs.get("dtype") or source.dtype
    if "device" in kwargs and dtype == source.dtype and kwargs.get("memory_format") is None:
        return aten.alias(source)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
    if dtype.is_floating_point:
        return func(shape_alone(source), **kwargs)
    return func(source, **kwargs)


def _pinned(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    """Pinned memory is the host's, and asking for it would start the GPU."""
    return True if func is aten.is_pinned.default else aten.alias(args[0])


def _scalar(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    """The value of one number; where nobody knows it, one that lets a run go on: True, 1."""
    tensor: Tensor = args[0]
    if not tensor.is_meta:
        return func(*args, **kwargs)
    return {torch.bool: True}.get(tensor.dtype, 1.0 if tensor.is_floating_point() else 1)


def _indexed(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    """Indices that are booleans become numbers while their values are known."""
    indices: list[Any] = []
    for one in args[1]:
        masks = isinstance(one, Tensor) and not one.is_meta and one.dtype in (torch.bool, torch.uint8)
        indices += [*one.nonzero(as_tuple=True)] if masks else [one]
    return ledger.run(func, (args[0], indices, *args[2:]), kwargs)


def _in_place(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    """A real tensor that takes up shapes alone keeps what it holds."""
    meta, _ = places(args, kwargs)
    if meta and not args[0].is_meta:
        return args[0]
    return ledger.run(func, args, kwargs)


def _gemm_4bit(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    """bitsandbytes' product by way of the whole weight (backends/default/ops.py), in the operators that it consists of.

    On CUDA it is the one from 65 rows (H100) or 257 (RTX 4090) on, and always above 1,536.
    """
    x, packed, shape, absmax, block_size, quant_type = args[:6]
    bias = kwargs.get("bias") if len(args) < 7 else args[6]
    names = ("absmax_8bit", "absmax_code", "absmax_offset")
    codes, code, offset = (kwargs.get(name) for name in names)
    with ledger:
        if codes is not None:
            absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(codes, absmax, code, 256, torch.float32)
            absmax = absmax + offset
        weight = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, block_size, quant_type, shape, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)


def _dequantize_4bit(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    return torch.empty(args[4], dtype=args[5], device="meta")


def _dequantize_blockwise(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    return torch.empty(args[0].shape, dtype=args[4], device="meta")


def _product(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    """The shape of a product of two matrices: meta's own takes forty times as long."""
    a, b = args
    if not (a.is_meta and b.is_meta):
        return ledger.run(func, args, kwargs)
    return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype, device="meta")


def _attention_choice(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    """As torch chooses for real tensors of these shapes: a vector each, seen at every place."""

    def like(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_meta:
            return tensor
        return torch.empty(tensor.shape[-1], dtype=tensor.dtype).expand(tensor.shape)

    return func(*(like(one) for one in args), **{name: like(one) for name, one in kwargs.items()})


def _flash_for_cpu(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    """Output in the layout (B, T, H, D), and the sums of each row in fp32."""
    query = args[0]
    batch, heads, length, _ = query.shape
    output = torch.empty((batch, length, heads, args[2].shape[-1]), dtype=query.dtype, device="meta").transpose(1, 2)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, torch.empty((batch, length, heads), dtype=dtype, device="meta").transpose(1, 2)


def _vectorwise_quant(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    """Rows in int8, their scales, and columns with outliers, of which shapes alone know none."""
    rows: Tensor = args[0]
    threshold = kwargs.get("threshold", args[1] if len(args) > 1 else 0.0)
    outliers = torch.empty(0, dtype=torch.int64, device="meta") if threshold else None
    scales = torch.empty(rows.numel() // rows.shape[-1], device="meta")
    return torch.empty(rows.shape, dtype=torch.int8, device="meta"), scales, outliers


def _mixed_scaled_mm(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
    """Its output, and the columns with outliers, of which there are none here."""
    a, rows, weight = args[:3]
    return torch.empty((*rows.shape[:-1], len(weight)), dtype=a.dtype, device="meta"), a.new_empty(0)


Answer = Callable[["Ledger", Any, Any, Any], Any]
SPECIAL: dict[Any, Answer] = {
    aten._to_copy.default: _to_copy,
    aten.is_pinned.default: _pinned,
    aten._pin_memory.default: _pinned,
    aten._local_scalar_dense.default: _scalar,
    aten.index.Tensor: _indexed,
    aten.index_put_.default: _indexed,
    aten.index_put.default: _indexed,
    aten.add_.Tensor: _in_place,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten._fused_sdp_choice.default: _attention_choice,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_for_cpu,
}
"""Operators that are not simply run on shapes."""


def promoted(found: Tensor, args: Any) -> int:
    """On a CPU a pointwise kernel casts whole operands of other types than its own beforehand; a GPU does so inside."""
    operands = [one for one in args if isinstance(one, Tensor) and one.dim()]
    if len(operands) < 2 or len({one.dtype for one in operands}) == 1:
        return 0
    size = torch.result_type(operands[0], operands[1]).itemsize
    return sum(one.numel() * size for one in operands if one.dtype.itemsize != size)


def _logsumexp(kind: str, args: Any, kwargs: Any) -> int:
    """It subtracts the largest into a copy of its input."""
    tensor: Tensor = args[0]
    return tensor.numel() * tensor.element_size()


def _flash_backward(kind: str, args: Any, kwargs: Any) -> int:
    """FlashAttention-2's (mha_bwd): the gradient of the queries in fp32, and of keys and values by every head."""
    query, key, value = args[1:4]
    batch, heads, length, size = query.shape
    wide, rounded = -(-size // 32) * 32, -(-length // 128) * 128
    grouped = 0 if key.shape[1] == heads else heads * (key.shape[3] + value.shape[3]) * batch * key.shape[2]
    return 4 * batch * heads * rounded * (wide + 1) + grouped * key.element_size()


def _varlen_backward(kind: str, args: Any, kwargs: Any) -> int:
    """The same for documents one behind the other (mha_varlen_bwd): query, key and value (T, H, D)."""
    query, key, value, bounds = args[1], args[2], args[3], args[6]
    total, heads, size = query.shape
    rows, wide = total + 128 * (len(bounds) - 1), -(-size // 32) * 32
    grouped = 0 if key.shape[1] == heads else heads * (key.shape[2] + value.shape[2]) * len(key)
    return 4 * heads * rows * (wide + 1) + grouped * key.element_size()


def _sums_in_int32(kind: str, args: Any, kwargs: Any) -> int:
    """What an int8 product is before it is scaled."""
    return 4 * args[1].shape[:-1].numel() * len(args[2])


TEMPORARIES: dict[Any, Callable[[str, Any, Any], int]] = {
    aten.logsumexp.default: _logsumexp,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
}
"""Bytes that a kernel takes for itself, by operator: (device kind, args, kwargs) to bytes."""


def know_libraries() -> None:
    """Adds to the tables the operators that exist only once their libraries are imported."""
    import_module("bitsandbytes")
    dynamic_map(torch.device("cpu"))  # which the library makes at a first call, and keeps
    with suppress(ImportError):  # torch before 2.10
        import_module("torch.nn.attention.varlen")
        TEMPORARIES[torch.ops.torch_attn._varlen_attn_backward.default] = _varlen_backward
    ops = torch.ops.bitsandbytes
    SPECIAL[ops.gemm_4bit.default] = _gemm_4bit
    SPECIAL[ops.dequantize_4bit.default] = _dequantize_4bit
    SPECIAL[ops.dequantize_blockwise.default] = _dequantize_blockwise
    SPECIAL[ops.int8_vectorwise_quant.default] = _vectorwise_quant
    SPECIAL[ops.int8_mixed_scaled_mm.default] = _mixed_scaled_mm
    TEMPORARIES[ops.int8_mixed_scaled_mm.default] = _sums_in_int32
