"""What scores of choices add up to: for each figure a number or two per row, and the figure over any sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qlora_cli.evaluate.choice import ChoiceScore
from qlora_cli.evaluate.choice_rows import ChoiceRow
from qlora_cli.evaluate.loss import exp

Floats = NDArray[np.float64]
Scores = Sequence[Sequence[ChoiceScore]]
Length = Callable[[ChoiceScore], int]


@dataclass(frozen=True)
class ChoiceMetric:
    """rows(scores, rows) -> float64 (n, k): what each row adds; figure((n, k)) -> float: over any of them."""

    rows: Callable[[Scores, Sequence[ChoiceRow]], Floats]
    figure: Callable[[Floats], float]
    about: str


def metrics_of(rows: Sequence[ChoiceRow]) -> dict[str, ChoiceMetric]:
    """The figures that these rows have: those of choices or of continuations, and the mean over groups if there are."""
    chosen = CHOICES if rows[0].gold is not None else CONTINUATIONS
    return chosen | GROUPS if len({row.group for row in rows}) > 1 else chosen


def num_cut(scores: Scores) -> int:
    """Rows whose context was too long for the model, so that tokens were left out in front."""
    return sum(any(score.num_cut for score in row) for row in scores)


def likeliest(scores: Sequence[ChoiceScore], length: Length | None = None) -> int:
    """The index of the choice of the highest log-likelihood, or of the highest one per unit of length; the first."""
    return int(np.argmax([score.logprob / (length(score) if length else 1) for score in scores]))


def _right(scores: Scores, rows: Sequence[ChoiceRow], length: Length | None = None) -> Floats:
    """(n, 1): 1 where the likeliest choice is the right one, or greedy decoding writes the continuation."""
    right = [
        each[0].is_greedy if row.gold is None else likeliest(each, length) == row.gold
        for each, row in zip(scores, rows, strict=True)
    ]
    return np.asarray(right, dtype=np.float64)[:, None]


def _right_in_group(scores: Scores, rows: Sequence[ChoiceRow]) -> Floats:
    """(n, 2): as _right, and the number of the row's group among their sorted names."""
    numbers = {group: number for number, group in enumerate(sorted({row.group for row in rows}))}
    return np.column_stack([_right(scores, rows), [numbers[row.group] for row in rows]])


def _logprobs(scores: Scores, rows: Sequence[ChoiceRow]) -> Floats:
    """(n, 1): the log-likelihood of each continuation in nats."""
    return np.asarray([each[0].logprob for each in scores], dtype=np.float64)[:, None]


def _mean(rows: Floats) -> float:
    return float(rows[:, 0].mean())


def _mean_over_groups(rows: Floats) -> float:
    """The mean of the means of those groups that the sample has."""
    groups = rows[:, 1].astype(np.int64)
    sizes = np.bincount(groups)
    sums = np.bincount(groups, weights=rows[:, 0])
    return float((sums[sizes > 0] / sizes[sizes > 0]).mean())


def _perplexity(rows: Floats) -> float:
    return exp(-_mean(rows))


_NORM = partial(_right, length=lambda score: score.num_characters)
_BYTES = partial(_right, length=lambda score: score.num_bytes)

CHOICES: dict[str, ChoiceMetric] = {
    "accuracy": ChoiceMetric(_right, _mean, "share of rows whose likeliest choice is right (lm-eval: acc)"),
    "accuracy_norm": ChoiceMetric(_NORM, _mean, "the same by log-likelihood per character (lm-eval: acc_norm)"),
    "accuracy_bytes": ChoiceMetric(_BYTES, _mean, "the same by log-likelihood per byte (lm-eval: acc_bytes)"),
}
CONTINUATIONS: dict[str, ChoiceMetric] = {
    "accuracy": ChoiceMetric(_right, _mean, "share of continuations that greedy decoding writes (LAMBADA)"),
    "perplexity": ChoiceMetric(_logprobs, _perplexity, "e to the mean loss of a whole continuation (LAMBADA)"),
}
GROUPS: dict[str, ChoiceMetric] = {
    "accuracy_by_group": ChoiceMetric(
        _right_in_group, _mean_over_groups, "mean over groups of the accuracy in each (MMLU's subjects)"
    ),
}
