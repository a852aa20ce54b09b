"""How far a merged model is from the unmerged one, measured on real rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_cli.errors import Exit, UserError


@dataclass(frozen=True)
class Difference:
    """Candidate against reference over all measured positions; `dataclasses.asdict` of it is JSON."""

    max_abs: float  # largest difference of a logit
    mean_kl: float  # KL(reference || candidate), nats per position
    p99_kl: float  # its 99th percentile
    top1_agreement: float  # share of positions with the same best choice
    positions: int


Forward = Callable[[Any, Any], tuple[Tensor, Tensor, int]]
"""A model and some rows to its logits (positions, choices), of the next token, of classes or of the ends of a span; the
loss summed over the rows' targets in nats, () float32; and the number of targets."""


@dataclass(frozen=True)
class Seen:
    """What a model says of some rows: its logits at chosen positions, (positions, choices) float32 on the CPU for each
    portion of the rows, and its mean loss over all targets in nats."""

    logits: list[Tensor]
    loss: float


@torch.no_grad()
def seen(model: Any, portions: Sequence[Any], forward: Forward, most_bytes: int) -> Seen:
    """What a model says of the rows, a portion of them at a time, in evaluation mode.

    most_bytes: of logits that are kept; of more every second, third, ... position of each portion is. Losses are of all
    targets. A 4-bit model on the CPU must have been disarmed (`support_avx512bf16_for_cpu`): evaluation mode would
    repack its weights.
    """
    was_training = model.training
    kept, losses, num_targets = [], 0.0, 0
    model.eval()
    try:
        for portion in portions:
            logits, loss, number = forward(model, portion)
            most = max(1, most_bytes // (4 * logits.shape[1] * len(portions)))
            chosen = torch.linspace(0, len(logits) - 1, min(most, len(logits))).round().long()
            kept.append(logits[chosen.to(logits.device)].float().cpu())
            losses, num_targets = losses + loss.item(), num_targets + number
    finally:
        model.train(was_training)
    return Seen(kept, losses / max(1, num_targets))


NOT_FINITE = {
    "unmerged": "train again at a lower learning rate: the adapter is broken",
    "merged": "merge in bfloat16 or float32",
}
"""What to do about logits that are not finite."""

BARRED = -1e30
"""For a logit of minus infinity: its probability is zero, and arithmetic with it stays finite."""


def compare(reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> Difference:
    """Measure in float64, a portion at a time. reference, candidate: per portion (positions, choices).

    Raises UserError (exit code FAILED) where logits are not finite.
    """
    assert [tensor.shape for tensor in reference] == [tensor.shape for tensor in candidate], "not the same positions"
    assert reference, "a comparison needs a row"
    largest, divergences, agreeing = 0.0, [], 0
    for portion, (expected, got) in enumerate(zip(reference, candidate, strict=True)):
        barred = torch.isneginf(expected)  # no choice, as the padding of a span's row
        expected, got = (logits.masked_fill(barred, BARRED) for logits in (expected, got))
        for model, logits in (("unmerged", expected), ("merged", got)):
            if not torch.isfinite(logits).all():
                what = f"its logits are not finite in portion {portion + 1} of the rows"
                raise UserError(f"{model} model", what, NOT_FINITE[model], Exit.FAILED)
        largest = max(largest, (expected.double() - got.double()).abs().max().item())
        divergences.append(divergence(expected.double(), got.double()))
        agreeing += int((expected.argmax(-1) == got.argmax(-1)).sum())
    kl = torch.cat(divergences).clamp(min=0)  # rounding can leave -1e-17
    return Difference(largest, kl.mean().item(), kl.quantile(0.99).item(), agreeing / len(kl), len(kl))


def divergence(expected: Tensor, got: Tensor) -> Tensor:
    """KL(expected || got) of each row of logits (N, C), in nats; of numbers (N, 1) that of Gaussians around them.

    A number's loss is its squared error, so a model of numbers says a Gaussian of variance 1.
    """
    if expected.shape[1] == 1:
        return (expected - got).square().squeeze(1) / 2
    log_p, log_q = expected.log_softmax(-1), got.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
