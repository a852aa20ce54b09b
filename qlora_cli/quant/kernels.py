"""Packed weights to the values a layer multiplies with, by the fastest kernel there is for code and device.

On a GPU one Triton kernel reads every code, where it can be built. Else bitsandbytes' 4-bit kernels read its own two
code books, and 2-bit codes whose levels lie in one of them are widened first; all other codes of 2 and 4 bits are
looked up two at a time. All give the bits of `blockwise.dequantize`.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.quant import blockwise
from qlora_cli.quant.bits import nf2_as_nf4, pairs_as_fp4, unpack
from qlora_cli.quant.blockwise import Code, Packed
from qlora_cli.quant.codebooks import CODE_BOOKS, Levels


def _as_they_are(codes: Tensor) -> Tensor:
    return codes


READ_AS: dict[Levels, tuple[str, Callable[[Tensor], Tensor]]] = {
    CODE_BOOKS["nf4"]: ("nf4", _as_they_are),
    CODE_BOOKS["fp4"]: ("fp4", _as_they_are),
    CODE_BOOKS["int2"]: ("fp4", pairs_as_fp4),
    CODE_BOOKS["nf2"]: ("nf4", nf2_as_nf4),
}
"""Levels to the kernel of bitsandbytes that knows them, and what makes its codes of ours."""

CUDA_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes of bitsandbytes' CUDA kernels."""


def _triton_works() -> bool:
    """Whether Triton is installed, and what it builds the launcher of a kernel with: a C compiler, Python's headers."""
    headers = Path(sysconfig.get_config_var("INCLUDEPY") or "", "Python.h")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return find_spec("triton") is not None and compiler is not None and headers.exists()


HAS_TRITON = _triton_works()
"""Asked once; Triton is imported only where a weight lies on a GPU."""


def dequantize(packed: Packed, code: Code, block_size: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The values of a packed weight in its shape; fp32, bfloat16 or float16."""
    if packed.codes.is_cuda and HAS_TRITON and block_size % 4 == 0:
        from qlora_cli.quant import triton_kernels

        return triton_kernels.dequantize(packed, code, block_size, shape, dtype)
    known = READ_AS.get(code.levels)
    if known is None or block_size % 2 or (packed.codes.is_cuda and block_size not in CUDA_BLOCKS):
        return _looked_up(packed, code, shape, dtype)
    kernel, widened = known
    scales = packed.scales.restored()
    blocks = (len(scales), block_size)  # rows are viewed as blocks: bitsandbytes' CPU kernel is wrong for others
    codes = widened(packed.codes)
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, block_size, kernel, blocks, dtype)
    return values.view(shape)


def _looked_up(packed: Packed, code: Code, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Two levels for a byte of 4-bit codes, or for each half of one of 2-bit codes, in one look at a table of 256."""
    if code.bits == 8 or shape.numel() % 4:
        return blockwise.dequantize(packed, code, shape, dtype)
    codes, scale = packed.codes.int(), packed.scales.restored().unsqueeze(1)
    pairs = [table.to(codes.device).index_select(0, codes) for table in _pairs(code.levels, code.bits)]
    units = torch.cat(pairs).view(torch.float32).view(len(scale), -1)
    if packed.zeros is not None:
        units = units - unpack(packed.zeros, code.bits)[: len(scale)].unsqueeze(1)
    return (units * scale).to(dtype).view(shape)


@cache
def _pairs(levels: Levels, bits: int) -> list[Tensor]:
    """Tables from a byte to two levels, as one int64 (256,): of all its codes, or of those of each half."""
    values = torch.tensor(levels)[unpack(torch.arange(256, dtype=torch.uint8), bits).int()]
    if bits == 4:
        return [values.view(256, 2).view(torch.int64).view(256)]
    return [half.contiguous().view(256, 2).view(torch.int64).view(256) for half in values.view(2, -1)]
