"""Correlations against the textbook's sums in exact arithmetic, and against scipy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.metrics import METRICS

PAIRS = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=2, max_size=30)


def figure(name: str, predictions: list[float], references: list[float]) -> float:
    return METRICS[name].figure(METRICS[name].rows(predictions, references))


def textbook(x: list[Fraction], y: list[Fraction]) -> float:
    """Pearson's correlation; only the root and the quotient are rounded."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return float(covariance) / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def ranks(x: list[int]) -> list[Fraction]:
    """1 for the smallest; equal numbers share the mean of their ranks."""
    return [Fraction(2 * sum(b < a for b in x) + x.count(a) + 1, 2) for a in x]


@settings(deadline=None)
@given(PAIRS)
def test_both_correlations_are_the_textbooks(pairs):
    x, y = (list(side) for side in zip(*pairs, strict=True))
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    exact = textbook([Fraction(a) for a in x], [Fraction(b) for b in y])
    assert figure("pearson", x, y) == pytest.approx(exact, rel=1e-12, abs=1e-14)
    assert figure("spearman", x, y) == pytest.approx(textbook(ranks(x), ranks(y)), rel=1e-12, abs=1e-14)


def test_both_are_scipys():
    x, noise = np.random.default_rng(0).normal(size=(2, 500))
    for scale, shift in [(1.0, 0.0), (1e-6, 1.0), (1e5, -3e5)]:
        y = scale * (x + noise) + shift
        assert figure("pearson", y, x) == pytest.approx(stats.pearsonr(y, x).statistic, rel=1e-9)
        assert figure("spearman", y, x) == pytest.approx(stats.spearmanr(y, x).statistic, rel=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_has_no_correlation(name):
    assert figure(name, [0.1] * 7, [1, 2, 3, 4, 5, 6, 7]) == 0.0  # 7 * 0.1 / 7 is not 0.1
    assert figure(name, [1, 2], [3, 3]) == 0.0
    assert figure(name, [2.5], [2.5]) == 0.0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_numbers_of_any_size_correlate(scale):
    assert figure("pearson", [scale, 2 * scale, 4 * scale], [1, 2, 4]) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_model_that_predicts_no_number_is_a_message(wrong):
    with pytest.raises(
        UserError, match=r"predictions: row 1 has the prediction (nan|inf) and the reference 2"
    ) as caught:
        figure("pearson", [1.0, wrong], [1.0, 2.0])
    assert caught.value.code == Exit.FAILED
