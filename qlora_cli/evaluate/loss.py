"""Held-out loss: token-weighted, the same for every batch size, without keeping logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_cli.data.encode import Example
from qlora_cli.data.examples import lengths_of
from qlora_cli.model.base import Base
from qlora_cli.tasks.causal_lm import batches, token_loss_sum, trained_logits


@dataclass(frozen=True)
class HeldOutLoss:
    """Means over the trained tokens of the held-out rows; loss in nats per token."""

    loss: float
    perplexity: float
    token_accuracy: float
    tokens: int
    rows: int


@torch.no_grad()
def held_out_loss(
    base: Base, model: Any, examples: Sequence[Example], batch_size: int, packed: bool = False
) -> HeldOutLoss:
    """Loss, perplexity and token accuracy of `model` on the examples; the model's mode is restored after.

    packed: whether the model keeps examples apart that go through it one behind the other. Longest first, so that a
    batch too large for the memory fails at once.
    """
    training = model.training
    model.eval()
    lengths = lengths_of(examples).tolist()
    loss = torch.zeros((), dtype=torch.float64, device=base.device)
    correct = torch.zeros((), dtype=torch.int64, device=base.device)
    tokens = 0
    try:
        for batch in batches(examples, lengths, batch_size, max(lengths), packed, base):
            with base.compute():
                logits, targets = trained_logits(model, batch)
            loss += token_loss_sum(logits, targets)
            correct += (logits.argmax(dim=-1) == targets).sum()
            tokens += targets.numel()
    finally:
        model.train(training)
    mean = loss.item() / tokens
    return HeldOutLoss(mean, exp(mean), correct.item() / tokens, tokens, len(examples))


def exp(loss: float) -> float:
    """e to the loss, infinite rather than an overflow error, and not a number where the loss is none."""
    return math.inf if loss >= 700 else math.exp(loss)
