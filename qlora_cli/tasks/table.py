"""The tasks: how examples become a batch, and a batch a loss that is a sum, so that batches of unequal size add up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from qlora_cli.data.encode import Example
from qlora_cli.data.packing import fill
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
    """

    collate: Callable[[Sequence[Example], Base], Any]
    outputs: Callable[[Any, Any], tuple[Tensor, Tensor]]


TASKS: dict[str, Task] = {
    "causal_lm": Task(lambda examples, base: causal_lm.collate(examples, base.device), causal_lm.trained_logits),
    "seq2seq_lm": Task(seq2seq_lm.collate, seq2seq_lm.outputs),
    "sequence_classification": Task(sequence_classification.collate, sequence_classification.outputs),
    "question_answering": Task(question_answering.collate, question_answering.outputs),
}


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
