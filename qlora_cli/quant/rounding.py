"""Values to the codes of the levels nearest to them."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_cli.quant.codebooks import Levels


def nearest(scaled: Tensor, levels: Levels) -> Tensor:
    """Codes (uint8, same shape) of the levels nearest to fp32 values; halfway the lower one, as in bitsandbytes."""
    order = sorted(range(len(levels)), key=levels.__getitem__)  # stable: FP4 has two zeros
    ascending = torch.tensor([levels[at] for at in order], device=scaled.device)
    bounds = (ascending[1:] + ascending[:-1]) / 2
    if len(order) > 16:
        found = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    else:  # four times as fast
        found = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
        for bound in bounds:
            found += scaled > bound
    if order == [*range(len(order))]:
        return found
    return torch.tensor(order, dtype=torch.uint8, device=scaled.device)[found.int()]
