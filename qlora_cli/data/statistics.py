"""What prepared rows amount to: lengths, trained tokens, how they lie in the batches, steps. No weight is needed.

Arrays of one number per example, no loop over examples and none over tokens: a million rows are told in a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qlora_cli.data.examples import Examples
from qlora_cli.data.limits import Limits
from qlora_cli.data.order import Order, Rows
from qlora_cli.data.row_task import NO_TEXT, trained_in_words
from qlora_cli.data.rows import count
from qlora_cli.recipe.schema import Recipe

MOST_BINS = 12
"""Bars of a histogram, at most."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How lengths in tokens are spread: p90 is the smallest length that 90% of the examples do not exceed."""

    least: int
    median: int
    p90: int
    p99: int
    most: int
    mean: float


@dataclass(frozen=True, slots=True)
class Bin:
    """A bar of a histogram: so many examples have `first` to `last` tokens, both included."""

    first: int
    last: int
    num_examples: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How the examples of the first epoch lie in the batches.

    padding:      share of padded batches that is padding, on one process
    capacity:     tokens of a row that examples fill (data.packing: true), None without
    num_rows:     such rows; full: the share of their tokens that are examples'
    """

    num_examples: int
    padding: float
    capacity: int | None = None
    num_rows: int | None = None
    full: float | None = None

    def words(self, packed: bool | None) -> str:
        """The layout in a line. packed: whether the model keeps examples in one row apart; None: not known yet."""
        if self.num_rows is not None:
            rows = f"{count(self.num_examples, 'example')} in {count(self.num_rows, 'row')} of {self.capacity:,} tokens"
            return f"{rows}, {self.full:.1%} full, no padding between them"
        if packed:
            return "examples one behind the other, no padding"
        padded = f"padded, of similar lengths: {self.padding:.1%} of their tokens are padding"
        if packed is None:
            return f"no padding if the model keeps packed rows apart, which training tries; else {padded}"
        return padded


@dataclass(frozen=True, slots=True)
class Epoch:
    """The first pass over the data, and the run.

    num_examples: weights counted; num_trained: tokens that count in the loss; steps: optimizer steps of the pass;
    units_per_step: examples of a step, or rows that they fill, on one process; total_steps: of the run, epochs passes
    """

    num_examples: int
    num_tokens: int
    num_trained: int
    steps: int
    units_per_step: int
    total_steps: int
    epochs: float
    layout: Layout
    batches: str


@dataclass(frozen=True, slots=True)
class Statistics:
    """The prepared rows of one role in numbers.

    lengths, answers: tokens, and trained tokens, of an example; limit: the longest example that is allowed
    num_bad, num_skipped, num_emptied: rows left out because they are bad, too long, or lost all that is trained
    num_truncated: rows cut and kept; epoch: None for held-out data; task: model.task
    """

    num_rows: int
    num_bad: int
    num_skipped: int
    num_emptied: int
    num_truncated: int
    num_examples: int
    num_tokens: int
    num_trained: int
    trained_share: float
    limit: int
    lengths: Spread
    answers: Spread
    histogram: tuple[Bin, ...]
    epoch: Epoch | None = None
    task: str = "causal_lm"

    def words(self) -> list[tuple[str, str]]:
        """The figures that no table holds, as labels and texts."""
        tokens = f"{count(self.num_tokens, 'token')}, {trained_in_words(self.task, self.num_trained, self.num_tokens)}"
        if self.epoch is None:
            return [("in all", f"{count(self.num_examples, 'example')}, {tokens}")]
        epoch = self.epoch
        trained = f"{epoch.num_trained:,} tokens of these ({epoch.num_trained / epoch.num_tokens:.1%})"
        if self.task in NO_TEXT:
            trained = trained_in_words(self.task, epoch.num_trained, epoch.num_tokens)
        unit = "row" if epoch.layout.capacity else "example"
        return [
            ("one epoch", f"{count(epoch.num_examples, 'example')}, {count(epoch.num_tokens, 'token')}"),
            ("trained", trained),
            ("steps", f"{epoch.steps:,} in an epoch, {epoch.total_steps:,} in all ({epoch.epochs:.4g} epochs)"),
            ("a step", f"{count(epoch.units_per_step, unit)} on one process"),
            ("batches", epoch.batches + _per_row(epoch.layout)),
        ]


def _per_row(layout: Layout) -> str:
    return f", {layout.num_examples / layout.num_rows:.1f} examples in each" if layout.num_rows else ""


def statistics(examples: Examples, recipe: Recipe, order: Order | None = None) -> Statistics:
    """The numbers of prepared examples, of which there must be one. order: that of training data."""
    lengths, trained = examples.lengths, examples.trained_lengths
    assert len(lengths), "no examples, no statistics"
    return Statistics(
        num_rows=examples.num_rows,
        num_bad=examples.num_bad,
        num_skipped=examples.num_skipped,
        num_emptied=examples.num_emptied,
        num_truncated=examples.num_truncated,
        num_examples=len(lengths),
        num_tokens=int(lengths.sum()),
        num_trained=int(trained.sum()),
        trained_share=float(trained.sum() / lengths.sum()),
        limit=Limits.of(recipe.data, recipe.model.task).longest,
        lengths=spread(lengths),
        answers=spread(trained),
        histogram=histogram(lengths),
        epoch=None if order is None else _epoch(examples, recipe, order),
        task=recipe.model.task,
    )


def _epoch(examples: Examples, recipe: Recipe, order: Order) -> Epoch:
    """The first epoch of the order, and the steps of the run."""
    layout = layout_of(order, recipe.training.micro_batch_size)
    rows, steps = order.epoch(0).rows, order.steps_of(0)
    total = order.total_steps(recipe.training.epochs, recipe.training.max_steps)
    packing = recipe.data.packing if recipe.model.task == "causal_lm" else False
    return Epoch(
        num_examples=len(rows),
        num_tokens=int(examples.lengths[rows].sum()),
        num_trained=int(examples.trained_lengths[rows].sum()),
        steps=steps,
        units_per_step=order.units_per_step,
        total_steps=total,
        epochs=order.epochs_done(total),
        layout=layout,
        batches=layout.words(None if packing == "auto" else packing),
    )


def layout_of(order: Order, micro_batch_size: int) -> Layout:
    """How the examples of the first epoch lie in the batches; with a capacity there is no padding."""
    units = order.epoch(0)
    lengths = order.lengths[units.rows]
    if order.capacity is None:
        return Layout(len(lengths), _padding(lengths, order.units_per_step, micro_batch_size))
    full = float(lengths.sum() / (len(units) * order.capacity))
    return Layout(len(lengths), 0.0, order.capacity, len(units), full)


def _padding(lengths: Rows, units_per_step: int, micro_batch_size: int) -> float:
    """The share of padding where each step's examples go through the model `micro_batch_size` at once, longest first.

    lengths: in the order of the epoch.
    """
    steps = -(-len(lengths) // units_per_step)
    width = -(-units_per_step // micro_batch_size) * micro_batch_size
    windows = np.zeros((steps, width), np.int64)  # 0: no example there
    at = np.arange(len(lengths))
    windows[at // units_per_step, at % units_per_step] = lengths
    batches = -np.sort(-windows, axis=1).reshape(-1, micro_batch_size)
    padded = (batches[:, 0] * (batches > 0).sum(axis=1)).sum()
    return float(1 - lengths.sum() / padded)


def spread(lengths: Rows) -> Spread:
    """How the lengths are spread."""
    least, median, p90, p99, most = np.quantile(lengths, [0, 0.5, 0.9, 0.99, 1], method="inverted_cdf").tolist()
    return Spread(int(least), int(median), int(p90), int(p99), int(most), float(lengths.mean()))


def histogram(lengths: Rows, most_bins: int = MOST_BINS) -> tuple[Bin, ...]:
    """The lengths in bins of one width, a round number: 1, 2 or 5 times a power of 10."""
    least, most = int(lengths.min()), int(lengths.max())
    widths = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    width = next(width for width in widths if most // width - least // width < most_bins)
    first = least // width
    numbers = np.bincount(lengths // width - first)
    edges = [(first + at) * width for at in range(len(numbers) + 1)]
    return tuple(
        Bin(edge, following - 1, int(number))
        for edge, following, number in zip(edges, edges[1:], numbers, strict=False)
    )
