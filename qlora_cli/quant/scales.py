"""The scale of each block: its largest magnitude, or the one of least error; and scales quantised themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_cli.quant.codebooks import SCALE_BLOCK, Levels

if TYPE_CHECKING:
    from typing import Self


ScaleRule = Callable[[Tensor, Levels], Tensor]
"""(blocks (n, B) fp32, levels) to scales (n,) fp32, not negative."""


def absmax(blocks: Tensor, levels: Levels) -> Tensor:
    """The largest magnitude of each block: nothing is clipped."""
    return blocks.abs().amax(dim=1)


def percentile(blocks: Tensor, levels: Levels, share: float = 0.99) -> Tensor:
    """The magnitude that a share of the block's weights do not exceed; larger ones are clipped."""
    return blocks.abs().quantile(share, dim=1)


def two_sigma(blocks: Tensor, levels: Levels) -> Tensor:
    """The larger magnitude of mean ± 2 standard deviations of each block, at most its absmax.

    Source: the uniform quantiser of LoftQ (Li et al. 2023, section 4.1, after Dettmers et al.), there per tensor.
    """
    reach = blocks.mean(dim=1).abs() + 2 * blocks.std(dim=1, correction=0)
    return torch.minimum(reach, absmax(blocks, levels))


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
        each = self.absmax.repeat_interleave(SCALE_BLOCK)[: len(self.values)]
        return dynamic_map(self.values.device)[self.values.int()] * each + self.offset


def dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' 256 signed levels of 8 bits, (256,) fp32 ascending."""
    from bitsandbytes.functional import create_dynamic_map, name2qmap

    if "dynamic" not in name2qmap:
        name2qmap["dynamic"] = create_dynamic_map()
    table: Tensor = name2qmap["dynamic"]
    return table.to(device)
