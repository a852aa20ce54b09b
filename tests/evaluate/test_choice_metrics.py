"""Figures of hand-made scores, and of any sample of rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qlora_cli.evaluate.choice import ChoiceScore
from qlora_cli.evaluate.choice_metrics import CHOICES, CONTINUATIONS, GROUPS, metrics_of, num_cut
from qlora_cli.evaluate.choice_rows import ChoiceRow


def score(logprob: float, text: str, is_greedy: bool = False, num_cut: int = 0) -> ChoiceScore:
    return ChoiceScore(logprob, is_greedy, 1, len(text), len(text.encode()), num_cut)


def row(gold: int | None, group: str = "") -> ChoiceRow:
    return ChoiceRow("rows.jsonl:1", "why?", (" a", " b"), gold, group)


def figures(metrics, scores, rows):
    return {name: metric.figure(metric.rows(scores, rows)) for name, metric in metrics.items()}


def test_a_longer_choice_wins_only_per_character_and_per_byte() -> None:
    scores = [[score(-4, "üü"), score(-5, "abc")], [score(-4, "abcd"), score(-4, "abcd")]]
    assert figures(CHOICES, scores, [row(0), row(1)]) == {
        "accuracy": 0.5,  # the first of two that are equal is taken
        "accuracy_norm": 0.0,  # -4 / 2 characters against -5 / 3
        "accuracy_bytes": 0.5,  # -4 / 4 bytes against -5 / 3
    }


def test_continuations_count_where_they_are_greedy() -> None:
    scores = [[score(-1, "a", is_greedy=True)], [score(-3, "b")]]
    assert figures(CONTINUATIONS, scores, [row(None), row(None)]) == {"accuracy": 0.5, "perplexity": math.exp(2)}


def test_groups_weigh_the_same_whatever_their_size() -> None:
    right, wrong = [score(-1, "a"), score(-2, "b")], [score(-2, "a"), score(-1, "b")]
    rows = [row(0, "law"), row(0, "art"), row(0, "law"), row(0, "law")]
    metric = GROUPS["accuracy_by_group"]
    added = metric.rows([right, wrong, right, wrong], rows)
    assert metric.figure(added) == pytest.approx((2 / 3 + 0) / 2)
    assert metric.figure(added[[0, 2]]) == 1.0  # a sample without art


def test_every_figure_is_the_same_in_any_order_and_takes_any_sample() -> None:
    draw = np.random.default_rng(0)
    rows = [row(int(draw.integers(2)), f"g{draw.integers(4)}") for _ in range(50)]
    scores = [[score(-draw.random(), "ab"), score(-draw.random(), "abc")] for _ in rows]
    for metric in metrics_of(rows).values():
        added = metric.rows(scores, rows)
        assert (added.shape[0], added.dtype) == (50, np.float64)
        assert metric.figure(added[draw.permutation(50)]) == pytest.approx(metric.figure(added))
        assert 0 <= metric.figure(added[draw.integers(50, size=50)]) <= 1


def test_rows_tell_which_figures_they_have() -> None:
    assert list(metrics_of([row(0), row(1)])) == ["accuracy", "accuracy_norm", "accuracy_bytes"]
    assert list(metrics_of([row(0, "law"), row(1, "art")]))[-1] == "accuracy_by_group"
    assert list(metrics_of([row(None)])) == ["accuracy", "perplexity"]


def test_rows_that_were_cut_are_counted() -> None:
    assert num_cut([[score(-1, "a", num_cut=3), score(-1, "b", num_cut=2)], [score(-1, "a")]]) == 1
