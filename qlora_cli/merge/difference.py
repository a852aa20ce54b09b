"""How far a merged model is from the unmerged one, measured on real rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.errors import Exit, UserError


@dataclass(frozen=True)
class Difference:
    """Candidate against reference over all measured positions; `dataclasses.asdict` of it is JSON."""

    max_abs: float  # largest difference of a logit
    mean_kl: float  # KL(reference || candidate), nats per position
    p99_kl: float  # its 99th percentile
    top1_agreement: float  # share of positions with the same best choice
    positions: int


Forward = Callable[[nn.Module, Any], Tensor]
"""A model and a row to its logits (positions, choices): of the next token, of classes, of the ends of a span."""


def next_tokens(model: nn.Module, row: list[int]) -> Tensor:
    """The next-token logits (T, V) behind every token of a row of ids."""
    device: Any = model.device  # of a placed model not that of its first parameter (model/placement.py)
    found: Tensor = model(input_ids=torch.tensor([row], device=device)).logits[0]
    return found


@torch.no_grad()
def logits_of(
    model: nn.Module, rows: Sequence[Any], max_positions: int, forward: Forward = next_tokens
) -> list[Tensor]:
    """Logits of each row at evenly spaced positions, at most max_positions in all (one per row at least).

    Rows are run one by one, in eval mode, so that no more than one row's logits are ever whole in memory. A 4-bit model
    on the CPU must have been disarmed (`support_avx512bf16_for_cpu`): eval mode would repack its weights.
    Returns per row (positions, choices) float32 on the CPU.
    """
    per_row = max(1, max_positions // max(1, len(rows)))
    was_training = model.training
    kept = []
    model.eval()
    try:
        for row in rows:
            logits = forward(model, row)
            chosen = torch.linspace(0, len(logits) - 1, min(per_row, len(logits))).round().long()
            kept.append(logits[chosen.to(logits.device)].float().cpu())
    finally:
        model.train(was_training)
    return kept


def compare(reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> Difference:
    """Measure in float64, row by row. reference, candidate: per row (positions, choices), as `logits_of` gives.

    Raises UserError (exit code FAILED) where the candidate's logits are not finite.
    """
    assert [tensor.shape for tensor in reference] == [tensor.shape for tensor in candidate], "not the same positions"
    assert reference, "a comparison needs a row"
    largest, divergences, agreeing = 0.0, [], 0
    for row, (expected, got) in enumerate(zip(reference, candidate, strict=True)):
        if not torch.isfinite(got).all():
            raise UserError(
                "merged model",
                f"its logits are not finite on row {row + 1}",
                "merge in bfloat16 or float32",
                Exit.FAILED,
            )
        largest = max(largest, (expected.double() - got.double()).abs().max().item())
        log_p, log_q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agreeing += int((expected.argmax(-1) == got.argmax(-1)).sum())
    kl = torch.cat(divergences).clamp(min=0)  # rounding can leave -1e-17
    return Difference(largest, kl.mean().item(), kl.quantile(0.99).item(), agreeing / len(kl), len(kl))
