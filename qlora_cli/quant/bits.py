"""Codes of 2, 4 and 8 bits in bytes, and 2-bit codes widened to 4 bits without being taken apart.

4-bit codes lie as in bitsandbytes: the first weight in a byte's high half. A byte of 2-bit codes holds two weights of
the tensor's first half and two of its second, in turn, so that masks and one shift make two bytes of 4-bit codes of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """(n,) uint8 codes to (⌈n · bits / 8⌉,) uint8; what is missing in the last byte is zeros."""
    if bits == 8:
        return codes
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % (8 // bits)))
    if bits == 4:
        return (codes[::2] << 4).bitwise_or_(codes[1::2])
    first, second = codes.view(2, -1, 2)
    packed = first[:, 0] << 6
    for part, at in ((second[:, 0], 4), (first[:, 1], 2), (second[:, 1], 0)):
        packed |= part << at
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(n,) uint8 to (n · 8 / bits,) uint8 codes."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)
    shifts = ((6, 2), (4, 0))
    return torch.stack([torch.stack([packed >> at & 3 for at in half], dim=1) for half in shifts]).reshape(-1)


def at(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """The codes at some places (k,) int64 of what `unpack` gives: (k,) uint8."""
    if bits == 8:
        return packed.index_select(0, index)
    if bits == 4:
        return packed.index_select(0, index >> 1) >> (4 - 4 * (index & 1)) & 15
    half, within = index // (2 * len(packed)), index % (2 * len(packed))
    return packed.index_select(0, within >> 1) >> (6 - 4 * (within & 1) - 2 * half) & 3


def rows(packed: Tensor, bits: int, index: Tensor, num_rows: int) -> Tensor:
    """Some rows (k,) int64 of a matrix with rows of a multiple of 4 codes, packed as a matrix of k rows."""
    if bits > 2:
        return packed.view(num_rows, -1).index_select(0, index).view(-1)
    halves = (2 * index.unsqueeze(1) + torch.arange(2, device=index.device)).view(-1)  # of rows: no byte has two of one
    second = (halves >= num_rows).unsqueeze(1)
    found = packed.view(num_rows, -1).index_select(0, halves % num_rows)
    first, last = (torch.where(second, found << 2, found) & 0xCC).view(2, -1)
    return first | last >> 2


def pairs_as_fp4(packed: Tensor) -> Tensor:
    """(n,) uint8 of the 2-bit codes of ±1/4 and ±1 to (2n,) uint8 of FP4's codes: 4 · code + 3."""
    words, repeated = _words(packed)
    wide = torch.empty((2, len(words)), dtype=words.dtype, device=words.device)
    torch.bitwise_and(words, repeated(0xCC), out=wide[0])
    torch.bitwise_and(words << 2, repeated(0xCC), out=wide[1])
    return wide.bitwise_or_(repeated(0x33)).view(-1).view(torch.uint8)


def nf2_as_nf4(packed: Tensor) -> Tensor:
    """(n,) uint8 of NF2's codes to (2n,) uint8 of NF4's codes for the same levels: 0, 7, 11 and 15.

    The high bits of 4 · code are its own, and the low ones are set where it is not 0: where code + 3 passes 3.
    """
    words, repeated = _words(packed)
    wide = torch.empty((2, len(words)), dtype=words.dtype, device=words.device)
    torch.bitwise_and(words, repeated(0xCC), out=wide[0])
    torch.bitwise_and(words << 2, repeated(0xCC), out=wide[1])
    fours = (wide >> 2).bitwise_and_(repeated(0x33)).add_(repeated(0x33)).bitwise_and_(repeated(0x44))
    return wide.add_(fours).sub_(fours >> 2).view(-1).view(torch.uint8)


def _words(packed: Tensor) -> tuple[Tensor, Callable[[int], int]]:
    """The bytes, eight at a time where they divide evenly, and what repeats a byte to such a word."""
    if len(packed) % 8:
        return packed, lambda byte: byte
    return packed.view(torch.int64), lambda byte: byte * 0x0101010101010101 - (byte >> 7 << 64)
