"""LoftQ: a quantised weight and an adapter that starts at what quantisation lost (Li et al. 2023, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from qlora_cli.quant.svd import low_rank

S = TypeVar("S")
"""What a quantiser stores."""

Quantizer = Callable[[Tensor], tuple[S, Tensor]]
"""A weight (out, in) fp32 to what is stored of it and the fp32 values that a layer multiplies with."""

Order = Literal["quantize_first", "svd_first"]


@dataclass(frozen=True)
class Start(Generic[S]):
    """Where training starts: W ≈ Q + scaling · B A.

    stored: Q as it is stored. A: (r, in), B: (out, r), fp32, balanced: of equal norm, row by row and column by column;
    both None where no iterate beats plain quantisation. plain, error: ‖W - q(W)‖ and ‖W - (Q + scaling · B A)‖, divided
    by ‖W‖; iteration: the one that was kept, 0 for plain quantisation.
    """

    stored: S
    A: Tensor | None
    B: Tensor | None
    plain: float
    error: float
    iteration: int


def loftq(
    weight: Tensor, quantizer: Quantizer[S], rank: int, scaling: float, iterations: int, order: Order = "quantize_first"
) -> Start[S]:
    """Alternates quantisation of W - scaling · B A and an SVD of what it leaves; the best iterate is kept.

    weight: (out, in) fp32. quantizer: the one that is deployed, double quantisation and compute type included.
    scaling: the adapter's own, alpha / r or alpha / √r. order: LoftQ's, or its variant that begins with an SVD of the
    weight and ends with a quantisation.
    The error of iterates may rise again (absmax codes of 2 bits do so), so every one is measured.
    """
    norm = float(weight.norm()) or 1.0
    stored, values = quantizer(weight)
    plain = float((weight - values).norm()) / norm
    best: Start[S] = Start(stored, None, None, plain, plain, 0)
    basis: Tensor | None = None
    product = torch.zeros_like(weight)
    for iteration in range(1, iterations + 1):
        if order == "quantize_first":
            if iteration > 1:
                stored, values = quantizer(weight - product)
            found = low_rank(weight - values, rank, basis=basis)
        else:
            found = low_rank(weight - values if iteration > 1 else weight, rank, basis=basis)
        basis = found.basis
        product = (found.left * found.values) @ found.right.T
        if order == "svd_first":
            stored, values = quantizer(weight - product)
        error = float((weight - values - product).norm()) / norm
        if error < best.error:
            root = (found.values / scaling).sqrt()
            best = Start(stored, (found.right * root).T.contiguous(), found.left * root, plain, error, iteration)
    return best
