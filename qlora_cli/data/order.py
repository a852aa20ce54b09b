"""Which rows each optimizer step takes: a deterministic order with an exact cursor, the number of steps done.

Nothing is stored but that number: the order of an epoch follows from the seed and the epoch alone, so a run that starts
at step k takes exactly the rows that the uninterrupted run takes from there on, on any machine.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Window:
    """The rows of one optimizer step, over all micro-batches and ranks. step and epoch count from 0."""

    step: int
    epoch: int
    rows: list[int]


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The rows of an epoch, each once, as a permutation of range(num_rows) that depends on nothing else.

    Seed and epoch are hashed: as the two halves of one integer, seed s in epoch s + 1 would be seed 0 in that epoch.
    It sorts by `random()` and does not call `shuffle`: only the former's sequence is guaranteed across Python versions.
    """
    generator = random.Random(int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()))
    keys = [generator.random() for _ in range(num_rows)]
    return sorted(range(num_rows), key=keys.__getitem__)


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Optimizer steps of one pass; the last one takes what is left."""
    assert num_rows > 0, "an epoch needs rows"
    assert rows_per_step > 0, "a step needs rows"
    return math.ceil(num_rows / rows_per_step)


def total_steps(num_rows: int, rows_per_step: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps of a run: `max_steps` where set, else so many passes, a fraction of a step rounded up.

    The number of epochs is taken as the decimal that the user wrote: 1.1 epochs of 10 steps are 11 steps, not 12.
    """
    if max_steps is not None:
        return max_steps
    return math.ceil(Fraction(repr(epochs)) * steps_per_epoch(num_rows, rows_per_step))


def windows(num_rows: int, rows_per_step: int, seed: int, num_steps: int, start_step: int = 0) -> Iterator[Window]:
    """The windows of the steps start_step, ..., num_steps - 1.

    start_step: the number of steps done. The last window of an epoch is shorter where the rows do not divide evenly: it
    never takes rows of the next epoch, so each epoch sees each row exactly once.
    """
    per_epoch = steps_per_epoch(num_rows, rows_per_step)
    order: list[int] = []
    for step in range(start_step, num_steps):
        epoch, index = divmod(step, per_epoch)
        if not order or index == 0:
            order = epoch_order(num_rows, seed, epoch)
        yield Window(step, epoch, order[index * rows_per_step : (index + 1) * rows_per_step])


def share_of(rows: Sequence[int], rank: int, world: int) -> list[int]:
    """The rows of one of `world` ranks, dealt in turn: shares differ by one row at most, and may be empty."""
    assert 0 <= rank < world, "ranks count from 0"
    return list(rows[rank::world])


def micro_batches(rows: Sequence[int], micro_batch_size: int) -> list[list[int]]:
    """The rows in portions of `micro_batch_size`, the last one shorter where they do not divide evenly."""
    assert micro_batch_size > 0, "a micro-batch needs rows"
    return [list(rows[at : at + micro_batch_size]) for at in range(0, len(rows), micro_batch_size)]
