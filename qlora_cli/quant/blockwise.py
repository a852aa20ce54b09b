"""Block-wise quantisation: a weight becomes the code of the level nearest to it in units of its block's scale.

`quantize` and `dequantize` are plain torch on any device; the layers' faster kernels give the same values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.quant.bits import at, pack, rows, unpack
from qlora_cli.quant.codebooks import Levels
from qlora_cli.quant.rounding import nearest
from qlora_cli.quant.scales import TINY, RangeRule, ScaleRule, Scales, absmax

CHUNK = 2**18
"""Weights that are quantised at once: what is computed on the way stays in the processor's cache."""


@dataclass(frozen=True)
class Code:
    """How the weights of a block are stored.

    bits: of a code; levels: by code. scale: the rule for a block's scale.
    range: with it weights are (level - zero point) · scale over this range; levels are 0, ..., 2^bits - 1.
    """

    bits: int
    levels: Levels
    scale: ScaleRule = absmax
    range: RangeRule | None = None


@dataclass(frozen=True)
class Packed:
    """A quantised tensor.

    codes: (numel · bits / 8,) uint8. zeros: (⌈blocks · bits / 8⌉,) uint8, the packed zero points, or None.
    """

    codes: Tensor
    scales: Scales
    zeros: Tensor | None = None


def quantize(weight: Tensor, code: Code, block_size: int, double_quant: bool, exact: bool = False) -> Packed:
    """A weight of any shape, finite, of whole blocks, in blocks of consecutive values.

    Codes are chosen against the scale as it is stored, so that double quantisation costs least; exact: against the one
    that is not quantised yet, as bitsandbytes does, whose codes and scales for nf4 and fp4 these are bit for bit.
    """
    assert weight.numel() % block_size == 0, "whole blocks"
    blocks = weight.detach().reshape(-1, block_size)
    if code.range is not None:
        return _quantize_range(blocks, code, code.range, double_quant)
    rows = _rows(blocks)
    found = torch.cat([code.scale(part.float(), code.levels) for part in blocks.split(rows)])
    scales = Scales.of(found, double_quant)
    inverse = _inverse(found if exact else scales.restored())
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)
    for part, scale, into in zip(blocks.split(rows), inverse.split(rows), codes.split(rows), strict=True):
        into.copy_(nearest(part.float() * scale, code.levels))
    return Packed(pack(codes.view(-1), code.bits), scales)


def dequantize(packed: Packed, code: Code, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that the codes stand for, computed in fp32 and rounded once to dtype."""
    scale = packed.scales.restored().unsqueeze(1)
    levels = torch.tensor(code.levels, device=packed.codes.device)
    units = levels[unpack(packed.codes, code.bits).int()].reshape(len(scale), -1)
    if packed.zeros is not None:
        units = units - unpack(packed.zeros, code.bits)[: len(scale)].unsqueeze(1)
    return (units * scale).to(dtype).reshape(shape)


def rows_of(packed: Packed, code: Code, index: Tensor, num_rows: int) -> Packed:
    """Some rows (k,) int64 of a matrix whose rows are whole blocks, as `quantize` packs a matrix; scales restored.

    Raises IndexError for a row that there is not.
    """
    in_row = len(packed.scales.values) // num_rows
    blocks = (index.unsqueeze(1) * in_row + torch.arange(in_row, device=index.device)).view(-1)
    scales = Scales(packed.scales.at(blocks))  # first: it knows the rows that there are
    zeros = None if packed.zeros is None else pack(at(packed.zeros, code.bits, blocks), code.bits)
    return Packed(rows(packed.codes, code.bits, index, num_rows), scales, zeros)


def _rows(blocks: Tensor) -> int:
    """Blocks that are quantised at once."""
    return max(1, CHUNK // blocks.shape[1])


def _inverse(scale: Tensor) -> Tensor:
    """(n, 1) reciprocals; of blocks of zeros, whose codes do not matter, a number."""
    return (1.0 / scale.clamp(min=TINY)).unsqueeze(1)


def _quantize_range(blocks: Tensor, code: Code, rule: RangeRule, double_quant: bool) -> Packed:
    """As `quantize`, with a zero point: over the range that the rule gives, with zero in it."""
    most, rows = code.levels[-1], _rows(blocks)
    ranges = [rule(part.float(), code.levels) for part in blocks.split(rows)]
    low, high = (torch.cat([found[side] for found in ranges]) for side in (0, 1))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = Scales.of((high - low) / most, double_quant)
    inverse = _inverse(scales.restored())
    zeros = (-low.unsqueeze(1) * inverse).round().clamp(0, most)
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)
    parts = zip(blocks.split(rows), inverse.split(rows), zeros.split(rows), codes.split(rows), strict=True)
    for part, scale, zero, into in parts:
        into.copy_((part.float() * scale + zero).round().clamp(0, most))
    packed_zeros = pack(zeros.to(torch.uint8).reshape(-1), code.bits)
    return Packed(pack(codes.view(-1), code.bits), scales, packed_zeros)
