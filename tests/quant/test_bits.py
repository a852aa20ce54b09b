"""Codes come back from their bytes, and widened 2-bit codes are read rightly by bitsandbytes' 4-bit kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_cli.quant.bits import at, nf2_as_nf4, pack, pairs_as_fp4, rows, unpack
from qlora_cli.quant.blockwise import Code, dequantize, quantize
from qlora_cli.quant.codebooks import CODE_BOOKS
from qlora_cli.quant.scales import absmax, best_for_pairs


def drawn(number: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, (number,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@settings(deadline=None)
@given(st.integers(1, 67), st.sampled_from([2, 4, 8]), st.integers(0, 2**32))
def test_packed_codes_come_back(number, bits, seed):
    codes = drawn(number, bits, seed)
    packed = pack(codes, bits)
    assert len(packed) == -(-number * bits // 8)
    assert torch.equal(unpack(packed, bits)[:number], codes)


@settings(deadline=None)
@given(st.integers(1, 67), st.sampled_from([2, 4, 8]), st.lists(st.integers(0, 66), max_size=9), st.integers(0, 2**32))
def test_single_codes_are_found_in_their_bytes(number, bits, places, seed):
    codes, index = drawn(number, bits, seed), torch.tensor([place % number for place in places], dtype=torch.int64)
    assert torch.equal(at(pack(codes, bits), bits, index), codes[index])


@settings(deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 5), st.sampled_from([2, 4, 8]), st.lists(st.integers(0, 8)), st.integers(0, 2**32)
)
def test_rows_of_a_packed_matrix_are_packed_as_a_matrix_of_them(number, fours, bits, chosen, seed):
    codes = drawn(4 * number * fours, bits, seed)
    index = torch.tensor([row % number for row in chosen], dtype=torch.int64)
    wanted = pack(codes.view(number, -1)[index].reshape(-1), bits)
    assert torch.equal(rows(pack(codes, bits), bits, index, number), wanted)


def test_the_places_of_codes_in_bytes_never_change():
    """What is stored once must be read by every later version."""
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x12, 0x30]
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b01_11_10_00]
    assert pack(torch.tensor([1, 2, 3, 0, 2, 2, 1, 1], dtype=torch.uint8), 2).tolist() == [0b01_10_10_10, 0b11_01_00_01]


@pytest.mark.parametrize("number", [4, 12, 32, 256, 260])
@pytest.mark.parametrize(("widen", "narrow", "wide"), [(pairs_as_fp4, "int2", "fp4"), (nf2_as_nf4, "nf2", "nf4")])
def test_widened_codes_stand_for_the_same_levels(number, widen, narrow, wide):
    codes = torch.arange(number, dtype=torch.uint8) * 7 % 4
    found = unpack(widen(pack(codes, 2)), 4)
    narrow_levels, wide_levels = torch.tensor(CODE_BOOKS[narrow]), torch.tensor(CODE_BOOKS[wide])
    assert torch.equal(wide_levels[found.int()], narrow_levels[codes.int()])


@pytest.mark.parametrize("shape", [(64, 64), (5, 16), (6, 8), (3, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "widen", "kernel", "scale"),
    [("int2", pairs_as_fp4, "fp4", best_for_pairs), ("nf2", nf2_as_nf4, "nf4", absmax)],
)
def test_the_4_bit_kernel_gives_the_2_bit_values_exactly(name, widen, kernel, scale, dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    code, blocks = Code(2, CODE_BOOKS[name], scale), (weight.numel() // 16, 16)
    packed = quantize(weight, code, 16, double_quant=False)
    found = torch.ops.bitsandbytes.dequantize_4bit(widen(packed.codes), packed.scales.values, 16, kernel, blocks, dtype)
    assert torch.equal(found.view(shape), dequantize(packed, code, weight.shape, dtype))
