"""Values to the codes of the levels nearest to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qlora_cli.quant.codebooks import Levels

PIECE = 2**16
"""Values that are rounded at once on a CPU: what is computed on the way stays in its cache."""

FINEST = 2**16
"""Bins of the finest grid that is tried."""


def nearest(scaled: Tensor, levels: Levels) -> Tensor:
    """Codes (uint8, same shape) of the levels nearest to fp32 values; halfway the lower one, as in bitsandbytes."""
    flat = scaled.reshape(-1)
    pieces = flat.split(PIECE) if scaled.device.type == "cpu" else [flat]
    return torch.cat([_codes(piece, levels) for piece in pieces]).view(scaled.shape)


def _codes(values: Tensor, levels: Levels) -> Tensor:
    order = sorted(range(len(levels)), key=levels.__getitem__)  # stable: FP4 has two zeros
    found = _bounds_below(values, levels)
    if order == [*range(len(order))]:
        return found
    return torch.tensor(order, dtype=torch.uint8, device=values.device)[found.int()]


def _bounds_below(values: Tensor, levels: Levels) -> Tensor:
    """How many of the bounds between levels are less than each value (n,): uint8."""
    grid = _grid(levels, values.device)
    if grid is None:
        found = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
        for bound in _bounds(levels, values.device):
            found += values > bound
        return found
    bins = grid.bins(values)
    return grid.before.index_select(0, bins) + (values > grid.own.index_select(0, bins)).view(torch.uint8)


@dataclass(frozen=True)
class _Grid:
    """Even bins with one bound in each at most, so that one comparison tells how many bounds are less than a value.

    low: the least bound; per_unit: bins. before: bounds in lower bins than each, uint8; own: the one in it or infinity.
    """

    low: float
    per_unit: float
    before: Tensor
    own: Tensor

    def bins(self, values: Tensor) -> Tensor:
        """The bin (int32) of each value: it never falls where values rise, and that is enough.

        The last one is above all bounds; NaN is in it, as `torch.bucketize` has it.
        """
        last = len(self.own) - 1
        place = (values - self.low).mul_(self.per_unit).add_(1)
        return place.nan_to_num_(nan=last).clamp_(0, last).to(torch.int32)


@cache
def _bounds(levels: Levels, device: torch.device) -> Tensor:
    ascending = torch.tensor(sorted(levels), device=device)
    return (ascending[1:] + ascending[:-1]) / 2


@cache
def _grid(levels: Levels, device: torch.device) -> _Grid | None:
    """None for a few bounds, and where no grid parts them."""
    bounds, number = _bounds(levels, device), 32
    if len(bounds) < 4 or len(bounds.unique()) < len(bounds):
        return None
    low, high = bounds[0].item(), bounds[-1].item()
    while number <= FINEST:
        per_unit = (number - 3) / (high - low)
        own = torch.full((number,), torch.inf, device=device)
        bins = _Grid(low, per_unit, own, own).bins(bounds)
        if len(bins.unique()) == len(bins):
            before = torch.searchsorted(bins, torch.arange(number, dtype=torch.int32, device=device))
            return _Grid(low, per_unit, before.to(torch.uint8), own.index_copy(0, bins.long(), bounds))
        number *= 2
    return None
