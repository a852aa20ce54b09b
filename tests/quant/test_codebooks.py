"""Code books are those of theory: bitsandbytes' tables bit for bit, exact zeros, and the errors that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bitsandbytes.functional import get_4bit_type

from qlora_cli.quant.codebooks import (
    CODE_BOOKS,
    bits_per_weight,
    counted,
    lloyd_max,
    normal_float,
    symmetric,
    two_pairs,
)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_books_of_bitsandbytes_are_its_tables_bit_for_bit(name):
    assert torch.equal(torch.tensor(CODE_BOOKS[name]), get_4bit_type(name, device="cpu"))


def test_nf2_is_loftqs():
    """LoftQ's table (yxli2123/LoftQ, utils.py, NFQuantizer with num_bits=2), to its printed digits."""
    assert CODE_BOOKS["nf2"] == pytest.approx((-1.0, 0.0, 0.3379, 1.0), abs=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_float_has_an_exact_zero_and_one_level_more_above_it(bits):
    levels = normal_float(bits)
    assert list(levels) == sorted(set(levels))
    assert (levels[0], levels[-1], levels.count(0.0)) == (-1.0, 1.0, 1)
    assert sum(level > 0 for level in levels) == sum(level < 0 for level in levels) + 1 == 2 ** (bits - 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_levels_are_equally_far_apart(bits):
    levels = symmetric(bits)
    assert len(levels) == 2**bits
    assert levels[-1] == levels[-2] == 1.0, "the last code is never needed"
    assert levels[2 ** (bits - 1) - 1] == 0.0
    assert np.diff(levels[:-1]) == pytest.approx(1 / (2 ** (bits - 1) - 1), abs=1e-6)
    assert counted(bits) == tuple(range(2**bits))


def test_the_codes_of_int2_are_those_of_fp4_without_their_last_bits():
    assert [CODE_BOOKS["fp4"][4 * code + 3] for code in range(4)] == [*two_pairs(1 / 4)] == [*CODE_BOOKS["int2"]]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_lloyd_max_levels_are_centroids_of_what_is_nearest_to_them(bits, block_size):
    """Both of Lloyd's conditions, on a sample that knows nothing of the density they were computed from."""
    levels = np.array(lloyd_max(bits, block_size))
    assert levels == pytest.approx(-levels[::-1])
    weights = np.random.default_rng(0).standard_normal((2**22 // block_size, block_size))
    absmax = np.abs(weights).max(axis=1, keepdims=True)
    scaled = weights / absmax
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled)
    square = np.broadcast_to(absmax**2, scaled.shape)
    for code, level in enumerate(levels):
        here = nearest == code
        assert (scaled * square)[here].sum() / square[here].sum() == pytest.approx(level, abs=4e-3)


def test_stored_bits_are_those_of_the_papers():
    assert bits_per_weight(4, 64, double_quant=False) == 4.5
    assert pytest.approx(bits_per_weight(4, 64, False) - bits_per_weight(4, 64, True), abs=1e-3) == 0.5 - 0.127
    assert bits_per_weight(2, 64, double_quant=True) == pytest.approx(2.127, abs=5e-4)
    assert bits_per_weight(4, 64, double_quant=True, zero_point=True) == pytest.approx(4.127 + 4 / 64, abs=5e-4)


def test_every_book_has_a_level_for_every_code():
    for name, levels in CODE_BOOKS.items():
        assert math.log2(len(levels)) == int(name[-1])
        assert max(map(abs, levels)) == 1.0
