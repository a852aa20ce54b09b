"""Packed weights to values in one pass over memory on a GPU, by Triton: every code, any block size of a multiple of 4.

Imported only where a weight lies on a GPU and Triton is installed. Gives the bits of `blockwise.dequantize`: computed
in fp32 without fused multiply-adds, rounded once. Levels are looked up in a table that stays in L1: one load a value,
without bank conflicts up to 32 levels, where a tree of selects would take 15 operations for 16 levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_cli.quant.blockwise import Code, Packed
from qlora_cli.quant.codebooks import SCALE_BLOCK, Levels
from qlora_cli.quant.scales import dynamic_map

TILE = {2: 1024, 4: 2048, 8: 1024}
"""Bytes of codes that a program reads, by bits: 8 or 16 a thread in one load, written as values 16 bytes at a time."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Of every launch: threads of a program / 32, and no fused multiply-adds."""

LONGEST_RUN = 64
"""Consecutive values of one block that are scaled by one look at its scale, at most."""


def dequantize(packed: Packed, code: Code, block_size: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The values of a packed weight in its shape; block_size: a multiple of 4; dtype: fp32, bfloat16 or float16."""
    scales = packed.scales
    tensors = [packed.codes, scales.values, scales.absmax, scales.offset, packed.zeros]
    values: Tensor = dequantize_op(tensors, code.levels, block_size, shape, dtype)
    return values


@torch.library.custom_op("qlora::dequantize", mutates_args=())  # torch.compile would lose OPTIONS otherwise
def dequantize_op(
    tensors: Sequence[Tensor | None], levels: Sequence[float], block_size: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """tensors: codes, scales, their absmax and offset, and zero points, as in Packed and Scales. Returns (*shape,)."""
    codes, _scales, absmax, _offset, zeros = tensors
    assert codes is not None
    assert block_size % 4 == 0
    assert all(one is None or one.is_contiguous() for one in tensors)
    bits = len(levels).bit_length() - 1
    values = torch.empty(shape, dtype=dtype, device=codes.device)
    part = values.numel() // (2 if bits == 2 else 1)
    run = min(LONGEST_RUN, _power_of_two_in(block_size | part))
    rows = TILE[bits] // (run if bits == 8 else run // 2)
    tables = _on(codes.device, tuple(levels)), None if absmax is None else _dynamic_map_on(codes.device)
    zeros_half = 0 if zeros is None else 2 * len(zeros)
    with torch.cuda.device_of(codes):
        _dequantize[(triton.cdiv(part // run, rows),)](
            *(*tensors, *tables, values, part // run, zeros_half),
            *(bits, run, block_size // run, rows, SCALE_BLOCK),
            **OPTIONS,
        )
    return values


@dequantize_op.register_fake
def _(tensors: Any, levels: Any, block_size: int, shape: Any, dtype: torch.dtype) -> Tensor:
    values: Tensor = tensors[0].new_empty(shape, dtype=dtype)
    return values


@triton.jit
def _dequantize(
    codes: tl.tensor,
    scales: tl.tensor,
    absmax: tl.tensor,
    offset: tl.tensor,
    zeros: tl.tensor,
    levels: tl.tensor,
    scale_levels: tl.tensor,
    values: tl.tensor,
    num_runs: tl.tensor,
    zeros_half: tl.tensor,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
) -> None:
    """ROWS runs of RUN values; of 2-bit codes so many of the tensor's first half and of its second (see `bits`).

    num_runs: of a half, or of all. RUNS: in a block. zeros_half: zero points before those in a byte's second places.
    """
    WIDTH: tl.constexpr = RUN if BITS == 8 else RUN // 2
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    there = row < num_runs - first
    stored = tl.load(codes + first * WIDTH + (row * WIDTH + tl.arange(0, WIDTH)[None, :]), mask=there).to(tl.int32)
    for half in tl.static_range(2 if BITS == 2 else 1):
        start = half * num_runs + first
        block = start // RUNS + ((start % RUNS).to(tl.int32) + row) // RUNS
        scale = tl.load(scales + block, mask=there)
        if absmax is not None:
            scale = tl.load(scale_levels + scale) * tl.load(absmax + block // SCALE_BLOCK, mask=there) + tl.load(offset)
            scale = tl.where(scale < 0, 0.0, scale)
        code = stored
        if BITS < 8:
            high = 8 - BITS * (half + 1)
            code = tl.reshape(tl.join(stored >> high, stored >> high - 4) & 2**BITS - 1, (ROWS, RUN))
        units = tl.load(levels + code)
        if zeros is not None:
            at, shift = block, 0
            if BITS < 8:
                second = (block >= zeros_half).to(tl.int32)
                at = (block - second * zeros_half) // 2
                shift = 8 - BITS * (second + 1) - 4 * (block % 2)
            units -= (tl.load(zeros + at, mask=there).to(tl.int32) >> shift & 2**BITS - 1).to(tl.float32)
        place = values + start * RUN + (row * RUN + tl.arange(0, RUN)[None, :])
        tl.store(place, (units * scale).to(values.dtype.element_ty), mask=there)


def _power_of_two_in(number: int) -> int:
    """The largest power of two that divides it."""
    return number & -number


@cache
def _on(device: torch.device, levels: Levels) -> Tensor:
    """The levels, (2^bits,) fp32."""
    return torch.tensor(levels, device=device)


@cache
def _dynamic_map_on(device: torch.device) -> Tensor:
    """The levels of double-quantised scales, (256,) fp32."""
    return dynamic_map(device)
