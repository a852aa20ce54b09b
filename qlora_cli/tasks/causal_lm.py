"""Next-token prediction: batches, and a loss that is a sum so that batches of unequal size add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qlora_cli.data.encode import IGNORE_INDEX, Example


class Batch(NamedTuple):
    """Rows padded on the right to the longest of them; all (B, T) int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    """The examples as one batch on `device`. Padding is masked by position, so its id does not matter: it is 0."""
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        attention_mask[row, :length] = 1
        labels[row, :length] = torch.tensor(example.labels)
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in (input_ids, attention_mask, labels)))


def trained_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The (N, V) logits that predict the N trained tokens of the batch, and those tokens (N,)."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    targets = batch.labels[:, 1:]
    trained = targets != IGNORE_INDEX
    return logits[:, :-1][trained], targets[trained]


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the tokens: logits (N, V), targets (N,) int64, returns () float32."""
    return cross_entropy(logits.float(), targets, reduction="sum")
