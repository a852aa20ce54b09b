"""The scale of each block: its largest magnitude, or the one of least error; and scales quantised themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qlora_cli.quant.codebooks import SCALE_BLOCK, Levels

SHARES = tuple(step / 32 for step in range(38, 13, -1))
"""Scales that a search tries, as shares of what just clips nothing; larger ones may put the levels to better places."""

TINY = 1e-38
"""What a scale of zero is taken for where it divides."""

ScaleRule = Callable[[Tensor, Levels], Tensor]
"""(blocks (n, B) fp32, levels) to scales (n,) fp32, not negative."""

RangeRule = Callable[[Tensor, Levels], tuple[Tensor, Tensor]]
"""(blocks (n, B) fp32, levels 0, ..., k) to the least and the largest value that is not clipped, each (n,) fp32."""


# ── scales of levels around zero ─────────────────────────────────────────────────────────────────────────────────────


def absmax(blocks: Tensor, levels: Levels) -> Tensor:
    """The largest magnitude of each block: nothing is clipped."""
    return blocks.abs().amax(dim=1)


def percentile(blocks: Tensor, levels: Levels, share: float = 0.99) -> Tensor:
    """The magnitude that a share of the block's weights do not exceed; larger ones are clipped."""
    return blocks.abs().quantile(share, dim=1)


def two_sigma(blocks: Tensor, levels: Levels) -> Tensor:
    """The larger magnitude of mean ± 2 standard deviations of each block, at most its absmax.

    Source: the uniform quantiser of LoftQ's GLUE code (yxli2123/LoftQ, glue/utils_qaunt.py), there over the tensor.
    """
    reach = blocks.mean(dim=1).abs() + 2 * blocks.std(dim=1, correction=0)
    return torch.minimum(reach, absmax(blocks, levels))


def searched(blocks: Tensor, levels: Levels) -> Tensor:
    """Of SHARES shares of the absmax the one of least error: clipping a few weights can spare all others.

    levels: uniform ones around zero, to which a weight is rounded by arithmetic.
    """
    most = len(set(levels)) // 2
    whole = absmax(blocks, levels)
    units = blocks / whole.clamp(min=TINY).unsqueeze(1)
    lost = torch.empty_like(units)

    def tried() -> Iterator[tuple[Tensor, Tensor]]:
        for share in SHARES:
            torch.mul(units, most / share, out=lost).round_().clamp_(-most, most)
            yield whole * share, lost.mul_(share / most).sub_(units).square_().sum(dim=1)

    return _least(tried())


def best_for_pairs(blocks: Tensor, levels: Levels) -> Tensor:
    """The scale of least error for levels ±1 and ±a, exactly.

    With the k smallest magnitudes at ±a·s and the others at ±s the error is least at s = N / D and lower than Σw² by
    N² / D, with N = Σ|w| - (1 - a)·(sum of the k smallest) and D = B - (1 - a²)·k. One sort tries every k.
    """
    outer, inner = sorted({abs(level) for level in levels}, reverse=True)
    assert (outer, len(levels)) == (1.0, 4), "levels -1, -a, a, 1"
    ascending = blocks.abs().sort(dim=1).values
    smallest = torch.nn.functional.pad(ascending.cumsum(dim=1, dtype=torch.float64), (1, 0))
    number = torch.arange(smallest.shape[1], dtype=torch.float64, device=blocks.device)
    gain = smallest[:, -1:] - (1 - inner) * smallest
    weight = blocks.shape[1] - (1 - inner**2) * number
    best = (gain**2 / weight).argmax(dim=1, keepdim=True)
    return (gain / weight).gather(1, best).squeeze(1).float()


# ── ranges of levels with a zero point ───────────────────────────────────────────────────────────────────────────────


def whole_range(blocks: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """From the least to the largest weight of each block: nothing is clipped."""
    return blocks.amin(dim=1), blocks.amax(dim=1)


def percentile_range(blocks: Tensor, levels: Levels, share: float = 0.99) -> tuple[Tensor, Tensor]:
    """The middle `share` of each block's weights."""
    return blocks.quantile((1 - share) / 2, dim=1), blocks.quantile((1 + share) / 2, dim=1)


def two_sigma_range(blocks: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Mean ± 2 standard deviations of each block, within its weights; source as of two_sigma."""
    mean, reach = blocks.mean(dim=1), 2 * blocks.std(dim=1, correction=0)
    low, high = whole_range(blocks, levels)
    return torch.maximum(mean - reach, low), torch.minimum(mean + reach, high)


def searched_range(blocks: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Of SHARES shares of the whole range, with zero in it, the one of least error."""
    most = levels[-1]
    low, high = blocks.amin(dim=1).clamp(max=0), blocks.amax(dim=1).clamp(min=0)
    units = blocks / (high - low).clamp(min=TINY).unsqueeze(1)
    least = -low / (high - low).clamp(min=TINY)

    lost = torch.empty_like(units)

    def tried() -> Iterator[tuple[Tensor, Tensor]]:
        for share in SHARES:
            scale = share / most
            zero = (least.unsqueeze(1) * share / scale).round().clamp(0, most)
            torch.div(units, scale, out=lost).add_(zero).round_().clamp_(0, most)
            yield torch.full_like(low, share), lost.sub_(zero).mul_(scale).sub_(units).square_().sum(dim=1)

    share = _least(tried())
    return low * share, high * share


def _least(tried: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Of candidates (n,) with their errors (n,) the first one of least error, for each block."""
    best, least = next(tried)
    for candidate, error in tried:
        best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
    return best


# ── scales in 8 bits ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Scales:
    """One fp32 number per block, stored as it is or quantised to 8 bits (QLoRA section 3, double quantisation).

    values: (n,) fp32, or (n,) uint8 codes of bitsandbytes' dynamic map with absmax (⌈n/256⌉,) fp32 per 256 of them, and
    the offset () fp32, the mean, which was subtracted before.
    """

    values: Tensor
    absmax: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def of(cls, scales: Tensor, double_quant: bool) -> Self:
        """Scales (n,) fp32 as they are stored; as bitsandbytes 0.50.2 does (functional.quantize_4bit)."""
        from bitsandbytes.functional import quantize_blockwise

        if not double_quant:
            return cls(scales)
        offset = scales.mean()
        codes, state = quantize_blockwise(scales - offset, blocksize=SCALE_BLOCK)
        return cls(codes, state.absmax, offset)

    def restored(self) -> Tensor:
        """(n,) fp32."""
        if self.absmax is None or self.offset is None:
            return self.values
        number = len(self.values)
        codes = torch.nn.functional.pad(self.values, (0, -number % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
        restored = dynamic_map(codes.device)[codes.int()] * self.absmax.unsqueeze(1)
        # where scales differ by more than 256 times the least ones are rounded below 0, and would turn their block over
        return (restored.view(-1)[:number] + self.offset).clamp(min=0)

    def at(self, blocks: Tensor) -> Tensor:
        """Those of some blocks (k,) int64, restored: (k,) fp32. Raises IndexError for a block that there is not."""
        values = self.values.index_select(0, blocks)
        if self.absmax is None or self.offset is None:
            return values
        restored = dynamic_map(values.device)[values.int()] * self.absmax[blocks // SCALE_BLOCK]
        return (restored + self.offset).clamp(min=0)


def dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' 256 signed levels of 8 bits, (256,) fp32 ascending."""
    from bitsandbytes.functional import create_dynamic_map, name2qmap

    if "dynamic" not in name2qmap:
        name2qmap["dynamic"] = create_dynamic_map()
    table: Tensor = name2qmap["dynamic"]
    return table.to(device)
