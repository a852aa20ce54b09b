"""Intervals against known distributions: they hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.evaluate.bootstrap import interval, paired_difference
from qlora_cli.evaluate.metrics import METRICS

MEAN = METRICS["accuracy"].figure


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_it_holds_the_truth_as_often_as_it_says(level):
    truth, repeats = 0.3, 400
    held = 0
    for seed in range(repeats):
        rows = (np.random.default_rng(1000 + seed).random((200, 1)) < truth).astype(float)
        low, high = interval(MEAN, rows, resamples=200, level=level, seed=seed)
        held += low <= truth <= high
    spread = (level * (1 - level) / repeats) ** 0.5
    assert held / repeats == pytest.approx(
        level, abs=3 * spread + 0.01
    )  # 0.01: percentile intervals are a little short


def test_it_is_the_normal_interval_of_a_mean():
    rows = np.random.default_rng(0).normal(5.0, 2.0, size=(2000, 1))
    low, high = interval(MEAN, rows)
    error = 1.96 * rows.std() / len(rows) ** 0.5
    assert low == pytest.approx(rows.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(rows.mean() + error, abs=0.1 * error)


def test_it_is_the_fisher_interval_of_a_correlation():
    x, noise = np.random.default_rng(0).normal(size=(2, 1000))
    rows = np.stack([x, x + noise], axis=1)
    centre, error = np.arctanh(METRICS["pearson"].figure(rows)), 1.96 / 997**0.5
    assert interval(METRICS["pearson"].figure, rows) == pytest.approx(
        np.tanh([centre - error, centre + error]), abs=0.01
    )


def test_the_same_seed_gives_the_same_ends_and_another_gives_others():
    rows = np.random.default_rng(0).random((50, 1))
    assert interval(MEAN, rows, seed=3) == interval(MEAN, rows, seed=3)
    assert interval(MEAN, rows, seed=3) != interval(MEAN, rows, seed=4)
    assert all(type(end) is float for end in interval(MEAN, rows))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 5))
def test_the_ends_are_in_order_and_lie_among_the_rows(values, seed):
    rows = np.array(values)[:, None]
    low, high = interval(MEAN, rows, resamples=50, seed=seed)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    wide = interval(MEAN, rows, resamples=50, level=0.99, seed=seed)
    assert wide[0] <= low
    assert high <= wide[1]


def test_a_single_row_has_no_spread():
    assert interval(MEAN, np.array([[0.25]])) == (0.25, 0.25)


@pytest.mark.parametrize("name", ["accuracy", "matthews", "spearman"])
def test_a_model_against_itself_differs_by_exactly_nothing(name):
    rows = METRICS[name].rows([0, 1, 1, 0, 1, 0], [0, 1, 0, 1, 1, 0])
    assert paired_difference(METRICS[name].figure, rows, rows.copy(), resamples=100) == (0.0, 0.0, 0.0)


def test_the_difference_is_the_first_less_the_second():
    better, worse = np.ones((30, 1)), np.zeros((30, 1))
    assert paired_difference(MEAN, better, worse, resamples=20) == (1.0, 1.0, 1.0)
    assert paired_difference(MEAN, worse, better, resamples=20) == (-1.0, -1.0, -1.0)


def test_pairing_sees_what_two_intervals_hide():
    """Hard and easy rows spread both figures; b gains 0.1 on every row, with little noise."""
    chance = np.random.default_rng(0)
    a = chance.normal(0.0, 1.0, size=(300, 1))
    b = a + 0.1 + chance.normal(0.0, 0.05, size=(300, 1))
    assert interval(MEAN, a)[1] > interval(MEAN, b)[0]
    difference, low, high = paired_difference(MEAN, b, a)
    assert 0.09 < low < difference < high < 0.11
    assert high - low == pytest.approx(2 * 1.96 * (b - a).std() / 300**0.5, rel=0.1)


def test_what_cannot_be_drawn_is_our_mistake():
    with pytest.raises(AssertionError, match="no rows"):
        interval(MEAN, np.zeros((0, 1)))
    with pytest.raises(AssertionError, match="the same rows of both"):
        paired_difference(MEAN, np.zeros((2, 1)), np.zeros((3, 1)))
    with pytest.raises(AssertionError, match="no resamples"):
        interval(MEAN, np.zeros((2, 1)), resamples=0)
    with pytest.raises(AssertionError, match="a level is a share"):
        interval(MEAN, np.zeros((2, 1)), level=95)
