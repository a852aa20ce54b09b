"""Every value gets the code of the level nearest to it, whatever the levels, near bounds and at the ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.quant.codebooks import CODE_BOOKS, symmetric
from qlora_cli.quant.rounding import PIECE, nearest

LEVELS = {**CODE_BOOKS, "int4": symmetric(4), "int8": symmetric(8), "7 odd ones": (-3.0, -1.0, 0.5, 0.5, 2.0, 9.0, 9.5)}


def by_searching(values: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """Codes by torch's own search among the bounds; of two equal levels the first code."""
    table, codes = torch.tensor(levels).sort(stable=True)
    return codes[torch.bucketize(values, (table[1:] + table[:-1]) / 2)].to(torch.uint8)


@pytest.mark.parametrize("name", LEVELS)
def test_codes_are_those_of_a_search_on_bounds_beside_them_and_beyond(name):
    table = torch.tensor(LEVELS[name]).sort().values
    bounds = (table[1:] + table[:-1]) / 2
    near = [torch.nextafter(bounds, bounds + side) for side in (-1, 0, 1)]
    ends = torch.tensor([0.0, -0.0, 1e-45, 30.0, -30.0, 1e38, -1e38, torch.inf, -torch.inf])
    drawn = torch.randn(PIECE + 77, generator=torch.Generator().manual_seed(0))
    values = torch.cat([*near, ends, drawn])
    assert torch.equal(nearest(values, LEVELS[name]), by_searching(values, LEVELS[name]))
    if len(table) > 4:
        assert torch.equal(nearest(torch.tensor([torch.nan]), LEVELS[name]), by_searching(ends[7:8], LEVELS[name]))


@settings(deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=40), st.lists(st.floats(width=32, allow_nan=False)))
def test_also_for_levels_of_any_kind(levels, values):
    """Some are so close that no grid parts their bounds."""
    given_, shape = torch.tensor(values, dtype=torch.float32), (1, len(values))
    assert torch.equal(nearest(given_.view(shape), tuple(levels)), by_searching(given_, tuple(levels)).view(shape))
