"""Which examples each optimizer step takes: a deterministic order with an exact cursor, the number of steps done.

Nothing is stored but that number: the order of an epoch follows from the seed and the epoch alone, so a run that starts
at step k takes exactly the examples that the uninterrupted run takes from there on, on any machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, chain, pairwise
from typing import Generic, TypeVar

import numpy as np

from qlora_cli.data.packing import pack

T = TypeVar("T")
Rows = np.ndarray[tuple[int], np.dtype[np.int64]]
"""Indices of examples."""


@dataclass(frozen=True, slots=True)
class Window(Generic[T]):
    """The examples, or their indices, of one optimizer step over all micro-batches and ranks; all count from 0.

    units: what a micro-batch is counted in: one example each, or with packing the examples that fill one row.
    """

    step: int
    epoch: int
    units: list[list[T]]

    @property
    def rows(self) -> list[T]:
        """All examples of the window."""
        return [row for unit in self.units for row in unit]


@dataclass(frozen=True)
class _Units:
    """The units of an epoch without a Python object for each. bounds: where each ends; None: each is one example."""

    rows: Rows
    bounds: Rows | None = None

    def __len__(self) -> int:
        return len(self.rows if self.bounds is None else self.bounds)

    def slice(self, begin: int, end: int) -> list[list[int]]:
        """The units begin, ..., end - 1, as far as there are so many."""
        if self.bounds is None:
            return [[row] for row in self.rows[begin:end].tolist()]
        edges = [int(self.bounds[begin - 1]) if begin else 0, *self.bounds[begin:end].tolist()]
        return [self.rows[first:last].tolist() for first, last in pairwise(edges)]


@dataclass(frozen=True)
class Order:
    """The order of all examples in every epoch.

    sources:       (number of examples, weight) of each source, in the examples' order
    units_per_step: the global batch
    lengths:       tokens of every example; with `capacity` they are packed into rows of so many tokens at most
    """

    sources: tuple[tuple[int, float], ...]
    units_per_step: int
    seed: int
    lengths: Rows = field(default_factory=lambda: np.zeros(0, np.int64), compare=False)
    capacity: int | None = None
    _num_units: dict[int, int] = field(default_factory=dict, compare=False)
    _last: dict[int, _Units] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        assert sum(number for number, _ in self.sources) > 0, "an epoch needs examples"
        assert self.units_per_step > 0, "a step needs examples"

    def epoch(self, epoch: int) -> _Units:
        """The units of an epoch, in order; the last one asked for is remembered."""
        if epoch not in self._last:
            order = epoch_order(self.sources, self.seed, epoch)
            units = _Units(order) if self.capacity is None else _packed(self, order, epoch)
            self._last.clear()
            self._last[epoch] = units
        return self._last[epoch]

    def steps_of(self, epoch: int) -> int:
        """Optimizer steps of an epoch; the last one takes what is left."""
        if self.capacity is None:
            return math.ceil(num_taken(self.sources) / self.units_per_step)
        if epoch not in self._num_units:  # packing an epoch again to count its rows would cost seconds
            self._num_units[epoch] = len(self.epoch(epoch))
        return math.ceil(self._num_units[epoch] / self.units_per_step)

    def total_steps(self, epochs: float, max_steps: int | None = None) -> int:
        """Optimizer steps of a run: `max_steps` where set, else so many passes, a fraction of a step rounded up.

        The number of epochs is taken as the decimal that the user wrote: 1.1 epochs of 10 steps are 11 steps, not 12.
        """
        if max_steps is not None:
            return max_steps
        exact = Fraction(repr(epochs))
        whole, rest = divmod(exact, 1)
        steps = sum(self.steps_of(epoch) for epoch in range(whole)) if self.capacity else whole * self.steps_of(0)
        return steps + (math.ceil(rest * self.steps_of(whole)) if rest else 0)

    def windows(self, num_steps: int, start_step: int = 0) -> Iterator[Window[int]]:
        """The windows of the steps start_step, ..., num_steps - 1; start_step is the number of steps done.

        The last window of an epoch is shorter where the units do not divide evenly: it never takes any of the next
        epoch, so each epoch sees each example as often as its source's weight says.
        """
        epoch, begin = self.place(start_step)
        for step in range(start_step, num_steps):
            if step - begin == self.steps_of(epoch):
                epoch, begin = epoch + 1, step
            at = (step - begin) * self.units_per_step
            yield Window(step, epoch, self.epoch(epoch).slice(at, at + self.units_per_step))

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of the step, and that epoch's first step."""
        if self.capacity is None:
            epoch = step // self.steps_of(0)
            return epoch, epoch * self.steps_of(0)
        epoch = begin = 0
        while step > begin and step >= begin + self.steps_of(epoch):
            begin += self.steps_of(epoch)
            epoch += 1
        return epoch, begin

    def epochs_done(self, step: int) -> float:
        """How many epochs `step` steps are."""
        epoch, begin = self.place(step)
        return epoch + (step - begin) / self.steps_of(epoch) if step > begin else float(epoch)


def epoch_order(sources: Sequence[tuple[int, float]], seed: int, epoch: int) -> Rows:
    """The examples of an epoch, shuffled over all sources; it depends on nothing but the arguments.

    sources: (number of examples, weight). A weight of 1 takes each example once, 2 twice, and 0.5 half of them, the
    other half in the next epoch.
    """
    taken, first = [], 0
    for index, (number, weight) in enumerate(sources):
        whole, part = int(weight), _part(number, weight)
        taken += [np.arange(first, first + number)] * whole
        if part:
            taken.append(first + _slice(number, epoch * part, part, f"{seed} source {index}"))
        first += number
    rows = np.concatenate(taken)
    return rows[permutation(len(rows), f"{seed} {epoch}")]


def num_taken(sources: Sequence[tuple[int, float]]) -> int:
    """Examples of an epoch."""
    return sum(int(weight) * number + _part(number, weight) for number, weight in sources)


def _part(number: int, weight: float) -> int:
    """Examples that the fraction of a weight takes: at least one of a source, where it has one."""
    fraction = weight - int(weight)
    part = round(fraction * number)
    return max(part, 1) if fraction and int(weight) == 0 and number else part


def _slice(number: int, begin: int, length: int, name: str) -> Rows:
    """Items begin, ..., begin + length - 1 of one permutation of range(number) after another."""
    cycles = range(begin // number, (begin + length - 1) // number + 1)
    rows = np.concatenate([permutation(number, f"{name} {cycle}") for cycle in cycles])
    begin -= cycles[0] * number
    return rows[begin : begin + length]


def permutation(number: int, name: str) -> Rows:
    """A permutation of range(number) that depends on the name alone.

    It sorts raw output of Philox, which numpy keeps the same across versions; what `permutation` returns it does not.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])
    return np.argsort(np.random.Philox(key=key).random_raw(number), kind="stable")


def _packed(order: Order, rows: Rows, epoch: int) -> _Units:
    """The rows of an epoch in bins, the bins shuffled: in the packer's order the last ones are those left unfilled."""
    assert order.capacity is not None
    bins = list(pack(order.lengths.tolist(), rows.tolist(), order.capacity))
    shuffled = [bins[at] for at in permutation(len(bins), f"{order.seed} {epoch} bins")]
    return _Units(np.array(list(chain.from_iterable(shuffled))), np.array(list(accumulate(map(len, shuffled)))))


def share_of(units: Sequence[T], rank: int, world: int) -> list[T]:
    """The units of one of `world` ranks, dealt in turn: shares differ by one unit at most, and may be empty."""
    assert 0 <= rank < world, "ranks count from 0"
    return list(units[rank::world])


def micro_batches(units: Sequence[T], micro_batch_size: int) -> list[list[T]]:
    """The units in portions of `micro_batch_size`, the last one shorter where they do not divide evenly."""
    assert micro_batch_size > 0, "a micro-batch needs units"
    return [list(units[at : at + micro_batch_size]) for at in range(0, len(units), micro_batch_size)]
