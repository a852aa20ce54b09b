"""Code books: the values that k-bit codes stand for, from theory, in units of a block's scale.

A block of weights is stored as one scale and, per weight, the code of a level: weight ≈ level · scale. A level's place
in a book is its code, as bitsandbytes orders the two books that it has too. Errors below are relative, ‖W − Q‖ / ‖W‖,
on Gaussian weights in blocks of 64 (tests/quant/test_blockwise.py); real bits per weight are `bits_per_weight`'s.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np

NORMAL_OFFSET = 0.9677083
"""The outermost quantile of NormalFloat: 1 - (1/32 + 1/30) / 2 (bitsandbytes 0.50.2, functional.create_normal_map)."""

FP32_BITS = 32
SCALE_BITS, SCALE_BLOCK = 8, 256
"""Double quantisation: bits of a quantised scale, and scales that share an fp32 one (QLoRA section 3)."""

Levels = tuple[float, ...]


def normal_float(bits: int) -> Levels:
    """NormalFloat-k: quantiles of N(0, 1) scaled to [-1, 1], one more above zero than below, and an exact zero.

    Dettmers et al. 2023 (QLoRA), section 3 and appendix E. Each level is hit equally often by Gaussian weights that are
    scaled by a constant; scaled by their block's absmax they are not, so it is the optimum of entropy, not of error.
    Error: NF4 0.092; NF2 0.563, a poor code: three of its four levels are not negative. NF4 equals bitsandbytes' table
    bit for bit, for which the roundings below stand in its order.
    """
    above, below = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    outer = [*(-_quantiles(below)), 0.0, *_quantiles(above)[::-1]]
    levels = np.array(outer, np.float32)
    return _levels(levels / levels.max())


def fp4() -> Levels:
    """FP4 as bitsandbytes' bits: sign, two of exponent, one of mantissa, with a subnormal of 1/192; error 0.122.

    bitsandbytes 0.50.2, functional.get_4bit_type("fp4"). The optimum of nothing: it is what floating-point units read.
    """
    half = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    return _levels(np.array([*half, *(-value for value in half)], np.float32) / np.float32(12))


def symmetric(bits: int) -> Levels:
    """Uniform levels -1, ..., 0, ..., 1, of which there are 2^k - 1: INT-k without zero point; INT4 0.108 by absmax.

    The last code stands for the largest level again and is never written. The optimum of a uniform density.
    """
    most = 2 ** (bits - 1) - 1
    levels = np.arange(-most, most + 1, dtype=np.float32) / np.float32(most)
    return _levels(np.append(levels, np.float32(1)))


def counted(bits: int) -> Levels:
    """The levels 0, 1, ..., 2^k - 1, which an integer zero point per block moves: INT-k with zero point; INT4 0.091.

    A weight is (code - zero point) · scale, so that zero is exact. With a scale of (most - least) / (2^k - 1) it is the
    optimum of a uniform density between any two bounds; a zero point costs k bits per block.
    """
    return _levels(np.arange(2**bits, dtype=np.float32))


def two_pairs(inner: float) -> Levels:
    """The four levels 1, inner, -1, -inner: `int2`, whose scale is searched per block (scales.best_for_pairs).

    Error with inner 1/4: 0.336, near the least of any 2-bit code with one scale, since the scale is chosen for the
    block and not for its largest weight. In this order the code of 1/4 is FP4's with its two last bits left out (they
    are ones), so that FP4's kernels can read it.
    """
    return _levels(np.array([1.0, inner, -1.0, -inner], np.float32))


@cache
def lloyd_max(bits: int, block_size: int) -> Levels:
    """The levels of least error for Gaussian blocks of `block_size` that are scaled by their absmax; 2 bits: 0.344.

    Lloyd 1982, Max 1960, on the density of w / absmax weighted by absmax², since errors count in the weights' units
    (as BOF4, Blumenberg et al. 2025). Bounds are the midpoints of levels and levels the centroids between bounds.
    """
    points, mass = _absmax_density(block_size)
    total, moment = np.cumsum(mass), np.cumsum(mass * points)
    levels = (2 * np.arange(2**bits) + 1) / 2**bits - 1
    for _ in range(10_000):
        edges = np.searchsorted(points, (levels[1:] + levels[:-1]) / 2)
        ends = np.append(edges, len(points)) - 1
        centroids = np.diff(moment[ends], prepend=0.0) / np.diff(total[ends], prepend=0.0)
        moved = np.abs(centroids - levels).max()
        levels = (centroids - centroids[::-1]) / 2  # the density is even, whatever rounding says
        if moved < 1e-9:
            break
    return _levels(levels.astype(np.float32))


def bits_per_weight(bits: int, block_size: int, double_quant: bool, zero_point: bool = False) -> float:
    """Stored bits per weight, scales and zero points among them; a tensor's own few bytes are not.

    A scale costs 32 bits, or 8 and its share of an fp32 one per 256; a zero point k bits. With double quantisation and
    blocks of 64: nf4 4.127, nf2 2.127.
    """
    scale = SCALE_BITS + FP32_BITS / SCALE_BLOCK if double_quant else FP32_BITS
    return bits + (scale + bits * zero_point) / block_size


def _quantiles(number: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Quantiles of N(0, 1) from NORMAL_OFFSET down to, and without, 0.5."""
    places = _linspace(NORMAL_OFFSET, 0.5, number + 1)[:-1]
    return np.array([NormalDist().inv_cdf(float(place)) for place in places], np.float32)


def _linspace(first: float, last: float, number: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """torch.linspace in fp32: from each end to the middle."""
    start, end = np.float32(first), np.float32(last)
    step = (end - start) / np.float32(number - 1)
    at = np.arange(number, dtype=np.float32)
    return np.where(at < number // 2, start + step * at, end - step * at[::-1]).astype(np.float32)


def _absmax_density(block_size: int, number: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """Points in [-1, 1] and the mass there of w / absmax, weighted by absmax², for blocks of N(0, 1).

    One weight of a block is its largest, at -1 or 1; the others are Gaussian between -absmax and absmax.
    """
    largest = np.linspace(1e-3, 9.0, 3000)
    normal = np.exp(-(largest**2) / 2) / math.sqrt(2 * math.pi)
    inside = np.array([math.erf(value / math.sqrt(2)) for value in largest])
    density = 2 * block_size * normal * inside ** (block_size - 1)  # of the largest magnitude
    points = (2 * np.arange(number) + 1) / number - 1
    truncated = np.exp(-(np.outer(points, largest) ** 2) / 2) / math.sqrt(2 * math.pi) * largest / inside
    mass = truncated @ (density * largest**2) * (2 / number) * (block_size - 1)
    ends = (density * largest**2).sum() / 2
    return np.concatenate([[-1.0], points, [1.0]]), np.concatenate([[ends], mass, [ends]])


def _levels(values: np.ndarray) -> Levels:
    return tuple(float(value) for value in values)


CODE_BOOKS: dict[str, Levels] = {
    "nf2": normal_float(2),
    "nf4": normal_float(4),
    "nf8": normal_float(8),
    "fp4": fp4(),
    "int2": two_pairs(1 / 4),
    "int4": symmetric(4),
    "int8": symmetric(8),
}
"""Levels by the name of a data type whose scale is one number per block."""
