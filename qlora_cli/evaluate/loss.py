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
from qlora_cli.tasks.table import collated, rows_of_batches, target_losses


@dataclass(frozen=True)
class HeldOutLoss:
    """Means over what is trained of the held-out rows: tokens, classes, numbers, or first and last tokens of spans.

    loss: nats per token, class or end; squared error of a number. accuracy: None for numbers.
    """

    loss: float
    accuracy: float | None
    num_targets: int
    num_rows: int

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return exp(self.loss)

    def figures(self, task: str) -> dict[str, float]:
        """What is told of it, by name."""
        if task in ("causal_lm", "seq2seq_lm"):
            assert self.accuracy is not None
            return {"loss": self.loss, "perplexity": self.perplexity, "token_accuracy": self.accuracy}
        return {"loss": self.loss} | ({} if self.accuracy is None else {"accuracy": self.accuracy})


@torch.no_grad()
def held_out_loss(
    base: Base, model: Any, examples: Sequence[Example], batch_size: int, packed: bool = False
) -> HeldOutLoss:
    """Loss and accuracy of `model` on the examples; the model's mode is restored after.

    batch_size: rows of the longest length in one forward pass, of shorter ones as many as take no more tokens. packed:
    whether the model keeps examples apart that go through it one behind the other. Longest first, so that a batch too
    large for the memory fails early.
    """
    training = model.training
    model.eval()
    lengths = lengths_of(examples).tolist()
    loss = torch.zeros((), dtype=torch.float64, device=base.device)
    correct = torch.zeros((), dtype=torch.int64, device=base.device)
    num_targets, numbers = 0, False
    try:
        for rows in rows_of_batches(lengths, batch_size, max(lengths), packed, base):
            batch = collated([examples[row] for row in rows], packed, base)
            with base.compute():
                losses, likeliest = target_losses(base, model, batch)
            loss += losses.sum(dtype=torch.float64)
            num_targets += losses.numel()
            if likeliest is None:
                numbers = True
            else:
                correct += likeliest.sum()
    finally:
        model.train(training)
    accuracy = None if numbers else correct.item() / num_targets
    return HeldOutLoss(loss.item() / num_targets, accuracy, num_targets, len(examples))


def exp(loss: float) -> float:
    """e to the loss, infinite rather than an overflow error, and not a number where the loss is none."""
    return math.inf if loss >= 700 else math.exp(loss)
