"""Weights get the nearest level of their block's scale, packed; bitsandbytes' bit for bit; with the known errors."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_cli.quant.bits import unpack
from qlora_cli.quant.blockwise import Code, dequantize, quantize
from qlora_cli.quant.codebooks import CODE_BOOKS, counted, lloyd_max, symmetric, two_pairs
from qlora_cli.quant.rounding import nearest
from qlora_cli.quant.scales import (
    Scales,
    absmax,
    best_for_pairs,
    percentile,
    percentile_range,
    searched,
    searched_range,
    two_sigma,
    two_sigma_range,
    whole_range,
)

CODES = {
    "nf4": Code(4, CODE_BOOKS["nf4"], absmax),
    "fp4": Code(4, CODE_BOOKS["fp4"], absmax),
    "nf2": Code(2, CODE_BOOKS["nf2"], absmax),
    "nf8": Code(8, CODE_BOOKS["nf8"], absmax),
    "int2": Code(2, two_pairs(1 / 4), best_for_pairs),
    "int2 of thirds": Code(2, two_pairs(1 / 3), best_for_pairs),
    "int4": Code(4, symmetric(4), absmax),
    "int4 clipped": Code(4, symmetric(4), two_sigma),
    "int4 of the 99th percentile": Code(4, symmetric(4), percentile),
    "int8": Code(8, symmetric(8), absmax),
    "int4 searched": Code(4, symmetric(4), searched),
    "int2 with zero point": Code(2, counted(2), range=whole_range),
    "int4 with zero point": Code(4, counted(4), range=whole_range),
    "int8 with zero point": Code(8, counted(8), range=whole_range),
    "int4 with zero point, clipped": Code(4, counted(4), range=two_sigma_range),
    "int4 with zero point, of the 99th percentile": Code(4, counted(4), range=percentile_range),
    "int4 with zero point, searched": Code(4, counted(4), range=searched_range),
    "int2 with zero point, searched": Code(2, counted(2), range=searched_range),
    "Lloyd-Max of 2 bits": Code(2, lloyd_max(2, 64), absmax),
}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def roundtrip(weight: Tensor, code: Code, block_size: int = 64, double_quant: bool = False) -> Tensor:
    return dequantize(quantize(weight, code, block_size, double_quant), code, weight.shape)


def relative(weight: Tensor, found: Tensor) -> float:
    return float((weight - found).norm() / weight.norm())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nf4", 0.0921),
        ("int4", 0.1076),
        ("fp4", 0.1221),
        ("nf2", 0.563),
        ("int2", 0.336),
        ("int2 of thirds", 0.336),
        ("int4 with zero point", 0.0911),
        ("Lloyd-Max of 2 bits", 0.344),
    ],
)
def test_errors_on_gaussian_weights_are_the_known_ones(name, error, double_quant):
    weight = gaussian(2048, 1024)
    assert relative(weight, roundtrip(weight, CODES[name], 64, double_quant)) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_exact_codes_are_those_of_bitsandbytes_bit_for_bit(name, block_size, double_quant):
    weight = gaussian(512, 512) * torch.logspace(-0.2, 0.2, 512).unsqueeze(1)
    weight[0, :64] = 0
    theirs, state = functional.quantize_4bit(
        weight, quant_type=name, blocksize=block_size, compress_statistics=double_quant
    )
    ours = quantize(weight, CODES[name], block_size, double_quant, exact=True)
    assert torch.equal(ours.codes, theirs.view(-1))
    assert torch.equal(ours.scales.values, state.absmax)
    assert torch.equal(dequantize(ours, CODES[name], weight.shape), functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("name", CODES)
def test_no_other_code_is_nearer_to_a_weight(name):
    """Against every level of the stored scale, in fp64."""
    code, weight = CODES[name], gaussian(64, 64)
    packed = quantize(weight, code, 64, double_quant=True)
    zero = 0 if packed.zeros is None else unpack(packed.zeros, code.bits)[:64].view(-1, 1, 1).double()
    levels = torch.tensor(code.levels, dtype=torch.float64).view(1, 1, -1)
    offered = (levels - zero) * packed.scales.restored().double().view(-1, 1, 1)
    least = (offered - weight.double().unsqueeze(2)).abs().amin(dim=2)
    error = (dequantize(packed, code, weight.shape).double() - weight).abs()
    assert (error - least).max() < 1e-6


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("block_size", [16, 48, 64])
def test_blocks_run_over_rows_and_a_blocks_values_depend_on_it_alone(name, block_size):
    code, weight = CODES[name], gaussian(48, 20)
    whole = roundtrip(weight, code, block_size)
    for start in range(0, weight.numel(), block_size):
        block = weight.reshape(-1)[start : start + block_size]
        assert torch.equal(whole.reshape(-1)[start : start + block_size], roundtrip(block, code, block_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CODES)
def test_zeros_stay_zeros_and_values_round_once(name, dtype):
    weight = gaussian(8, 64).to(dtype)
    weight[3] = 0
    code = CODES[name]
    packed = quantize(weight, code, 64, double_quant=False)
    found = dequantize(packed, code, weight.shape, dtype)
    assert torch.equal(found[3], torch.zeros(64, dtype=dtype))
    assert torch.equal(found, dequantize(packed, code, weight.shape).to(dtype))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-4, 4, width=32), min_size=4, max_size=12), st.sampled_from([1 / 4, 1 / 3]))
def test_the_scale_of_pairs_is_the_best_there_is(values, inner):
    """Against a search over a fine grid of scales."""
    block, levels = torch.tensor([values]), two_pairs(inner)

    def error(scale: Tensor) -> Tensor:
        offered = torch.tensor(levels, dtype=torch.float64).view(1, 1, -1) * scale.double().view(-1, 1, 1)
        return (offered - block.double().unsqueeze(2)).abs().amin(dim=2).square().sum(dim=1)

    grid = torch.linspace(0, 1.3, 2000) * block.abs().max() / inner
    assert error(best_for_pairs(block, levels)) <= error(grid).min() + 1e-6


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("int4 searched", "int4"),
        ("int4 with zero point, searched", "int4 with zero point"),
        ("int2 with zero point, searched", "int2 with zero point"),
    ],
)
def test_a_search_is_never_worse_than_no_clipping_on_any_block(name, plain):
    weight = gaussian(256, 64) * torch.linspace(0.1, 9, 256).unsqueeze(1)
    weight[:, 0] *= torch.linspace(1, 50, 256)
    found, wanted = ((roundtrip(weight, CODES[one]) - weight).square().sum(dim=1) for one in (name, plain))
    assert (found <= wanted * (1 + 1e-5)).all()
    assert (found < 0.97 * wanted).float().mean() > 0.3, "many blocks gain"


def test_clipped_ranges():
    block = torch.tensor([[*([1.0, -1.0] * 50), 100.0]])
    assert [bound.item() for bound in whole_range(block, ())] == [-1.0, 100.0]
    low, high = two_sigma_range(block, ())
    assert (low.item(), high.item()) == (-1.0, pytest.approx(float(block.mean() + 2 * block.std(correction=0))))
    low, high = percentile_range(block, ())
    assert (low.item(), high.item()) == (-1.0, pytest.approx(1.0 + 0.5 * 99, rel=0.01))


def test_clipped_scales():
    block = torch.tensor([[*([1.0, -1.0] * 50), 100.0]])
    assert percentile(block, ()).item() == pytest.approx(1.0, abs=1e-5)
    assert two_sigma(block, ()).item() == pytest.approx(float(block.mean() + 2 * block.std(correction=0)))
    assert two_sigma(torch.ones(1, 8), ()).item() == 1.0
    assert absmax(block, ()).item() == 100.0


def test_stored_scales_are_those_of_bitsandbytes():
    scales = gaussian(1000).abs()
    stored = Scales.of(scales, double_quant=True)
    codes, state = functional.quantize_blockwise(scales - scales.mean(), blocksize=256)
    assert torch.equal(stored.values, codes)
    theirs = functional.dequantize_blockwise(codes, state) + scales.mean()
    assert torch.equal(stored.restored(), theirs.clamp(min=0)), "which may be below zero, as no scale is"
    assert torch.equal(Scales.of(scales, double_quant=False).restored(), scales)


def test_halfway_between_two_levels_the_lower_is_taken():
    assert nearest(torch.tensor([-0.5, 0.5, 0.500001]), (-1.0, 0.0, 1.0)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", CODES)
def test_a_scale_that_double_quantisation_loses_turns_no_block_over(name):
    """Rounded below zero it would: rows 1,000 times smaller than the others come out as zeros at worst."""
    weight = gaussian(256, 256)
    weight[100:120] *= 1e-3
    weight[:, :64] *= 8
    packed = quantize(weight, CODES[name], 64, double_quant=True)
    assert packed.scales.restored().min() >= 0
    found = dequantize(packed, CODES[name], weight.shape)
    assert ((found * weight).view(-1, 64).sum(dim=1) >= -1e-6).all()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20])
@pytest.mark.parametrize("name", ["int4 searched", "int4 with zero point, searched"])
def test_a_search_does_not_depend_on_the_weights_size(name, size):
    weight = gaussian(64, 64)
    errors = [relative((weight * one).double(), roundtrip(weight * one, CODES[name]).double()) for one in (1.0, size)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
