"""The data types of a recipe as codes: one table, from a name and the options of uniform ones."""

from __future__ import annotations

from collections.abc import Callable

from qlora_cli.quant.blockwise import Code
from qlora_cli.quant.codebooks import CODE_BOOKS, counted, symmetric, two_pairs
from qlora_cli.quant.scales import (
    RangeRule,
    ScaleRule,
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

CLIPS: dict[str, tuple[ScaleRule, RangeRule]] = {
    "absmax": (absmax, whole_range),
    "percentile": (percentile, percentile_range),
    "2sigma": (two_sigma, two_sigma_range),
    "search": (searched, searched_range),
}
"""Clipping ranges of uniform types, without and with a zero point, by quantization.clip; auto: the search."""


def uniform(bits: int) -> Callable[[bool, str], Code]:
    """INT-k, symmetric or with a zero point."""

    def code(zero_point: bool, clip: str) -> Code:
        scale, range = CLIPS["search" if clip == "auto" else clip]
        return Code(bits, counted(bits), range=range) if zero_point else Code(bits, symmetric(bits), scale)

    return code


def _int2(zero_point: bool, clip: str) -> Code:
    """±1/4 and ±1 with the best scale of each block: the default of 2 bits; with other options uniform levels."""
    return uniform(2)(zero_point, clip) if zero_point or clip != "auto" else Code(2, two_pairs(1 / 4), best_for_pairs)


def _normal(name: str) -> Callable[[bool, str], Code]:
    return lambda zero_point, clip: Code(len(CODE_BOOKS[name]).bit_length() - 1, CODE_BOOKS[name], absmax)


CODES: dict[str, Callable[[bool, str], Code]] = {
    "nf4": _normal("nf4"),
    "fp4": _normal("fp4"),
    "nf2": _normal("nf2"),
    "int4": uniform(4),
    "int2": _int2,
    "int8": lambda zero_point, clip: Code(8, symmetric(8)),
}
"""The code of a data type in blocks: (zero_point, clip) of the recipe to how its weights are stored.

int8 is stored so only where an adapter's start changes the base; else it is bitsandbytes', in rows.
"""

UNIFORM = ("int4", "int2")
"""Those that zero_point and clip are for."""

QUANT_METHOD = "qlora_packed"
"""What config.json calls a checkpoint of packed layers."""
