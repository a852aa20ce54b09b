"""The tasks: how examples become a batch, and a batch a loss that is a sum, so that batches of unequal size add up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from qlora_cli.data.encode import Example
from qlora_cli.data.packing import fill
from qlora_cli.kernels.linear_cross_entropy import linear_cross_entropy, token_losses
from qlora_cli.kernels.packed_attention import unwrapped
from qlora_cli.model.base import Base
from qlora_cli.model.rope import rope_boundaries
from qlora_cli.tasks import causal_lm, question_answering, seq2seq_lm, sequence_classification
from qlora_cli.tasks.causal_lm import Batch, PackedBatch, collate_packed
from qlora_cli.tasks.question_answering import Windows
from qlora_cli.tasks.seq2seq_lm import SourceTarget
from qlora_cli.tasks.sequence_classification import Texts

AnyBatch = Batch | PackedBatch | SourceTarget | Texts | Windows

MOST_ROWS = 4096
"""Rows of a forward pass of an evaluation, however short they are, unless more are asked for."""


@dataclass(frozen=True)
class Task:
    """collate: examples as one padded batch on the base's device.

    outputs: (model, batch) to logits (N, V) and the N targets; (N, 1) and float targets for numbers.
    hidden: (model, batch) to what the model's head makes these logits of, (N, d), and the N targets, where the logits
    are of a vocabulary and too many to be made at once.
    """

    collate: Callable[[Sequence[Example], Base], Any]
    outputs: Callable[[Any, Any], tuple[Tensor, Tensor]]
    hidden: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None


TASKS: dict[str, Task] = {
    "causal_lm": Task(
        lambda examples, base: causal_lm.collate(examples, base.device),
        causal_lm.trained_logits,
        causal_lm.trained_hidden,
    ),
    "seq2seq_lm": Task(seq2seq_lm.collate, seq2seq_lm.outputs, seq2seq_lm.hidden),
    "sequence_classification": Task(sequence_classification.collate, sequence_classification.outputs),
    "question_answering": Task(question_answering.collate, question_answering.outputs),
}


def mean_loss(base: Base, model: Any, batch: AnyBatch, num_targets: int) -> Tensor:
    """The batch's part of a mean over num_targets targets, its own among them: with gradients, () float32."""
    task = TASKS[base.task]
    if task.hidden is None or base.tail is None:
        return loss_sum(*task.outputs(model, batch)) / num_targets
    hidden, targets = task.hidden(model, batch)
    head = unwrapped(model).get_output_embeddings()
    return linear_cross_entropy(hidden, targets, head, base.tail, 1 / num_targets)


@torch.no_grad()
def target_losses(base: Base, model: Any, batch: AnyBatch) -> tuple[Tensor, Tensor | None]:
    """The loss of each of the batch's N targets, (N,) float32, and whether it is the likeliest, (N,) bool.

    Of numbers, whose loss is the squared error, there is no likeliest.
    """
    task = TASKS[base.task]
    if task.hidden is not None and base.tail is not None:
        return token_losses(*task.hidden(model, batch), unwrapped(model).get_output_embeddings(), base.tail)
    logits, targets = task.outputs(model, batch)
    if targets.is_floating_point():
        return mse_loss(logits.float().squeeze(1), targets.float(), reduction="none"), None
    return cross_entropy(logits.float(), targets, reduction="none"), logits.argmax(dim=-1) == targets


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats summed over the targets, squared errors where these are numbers.

    logits (N, V), targets (N,) int64; or logits (N, 1), targets (N,) float. Returns () float32.
    """
    if targets.is_floating_point():
        return mse_loss(logits.float().squeeze(1), targets.float(), reduction="sum")
    return cross_entropy(logits.float(), targets, reduction="sum")


def batches(
    examples: Sequence[Example], lengths: Sequence[int], size: int, longest: int, packed: bool, base: Base
) -> Iterator[AnyBatch]:
    """The examples in the forward passes of training, longest first, none of more tokens than `size` of `longest`.

    lengths: tokens of each example, so that none is read before its turn.
    packed: one behind the other, in as few passes as that allows; else `size` of like length at once, padded.
    """
    rows = _packed(lengths, size * longest) if packed else _padded(lengths, base, lambda length: size)
    for some in rows:
        yield collated([examples[row] for row in some], packed, base)


def rows_of_batches(lengths: Sequence[int], size: int, longest: int, packed: bool, base: Base) -> Iterator[list[int]]:
    """The rows of each forward pass of an evaluation, as indices, longest first.

    A padded pass has as many as fit into the cells of `size` rows of `longest` tokens, MOST_ROWS or `size` at most:
    the shorter they are, the more. longest: tokens of the longest row, or more.
    """
    if packed:
        return _packed(lengths, size * longest)
    return _padded(lengths, base, lambda length: max(size, min(MOST_ROWS, size * longest // max(length, 1))))


def collated(examples: Sequence[Example], packed: bool, base: Base) -> AnyBatch:
    """The examples as one batch on the base's device, one behind the other or padded."""
    batch: AnyBatch = collate_packed(examples, base.device) if packed else TASKS[base.task].collate(examples, base)
    return batch


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)


def _packed(lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    ordered = _longest_first(lengths)
    for bin in fill([lengths[row] for row in ordered], capacity):
        yield [ordered[at] for at in bin]


def _padded(lengths: Sequence[int], base: Base, most: Callable[[int], int]) -> Iterator[list[int]]:
    """Rows of like length, none beside rows for which RoPE turns otherwise. most: rows at once, by their longest."""
    boundaries = rope_boundaries(base.config)
    for _, rows in groupby(_longest_first(lengths), key=lambda row: bisect_left(boundaries, lengths[row])):
        alike = list(rows)
        while alike:
            number = most(lengths[alike[0]])
            yield alike[:number]
            alike = alike[number:]
