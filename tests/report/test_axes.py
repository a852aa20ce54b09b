"""Axes: what is measured lies on them, and their ticks are round."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.report.reading import LARGEST, LEAST
from qlora_cli.report.scales import axis_of, in_words, steps_axis

numbers = st.floats(min_value=-LARGEST, max_value=LARGEST).filter(lambda value: value == 0 or abs(value) >= LEAST)


@given(st.lists(numbers, min_size=1, max_size=9), st.booleans())
def test_every_value_lies_on_its_axis_and_every_tick_too(values, from_zero):
    axis = axis_of(values, from_zero=from_zero)
    assert axis.low < axis.high
    assert all(-1e-6 <= axis.at(value) <= 1 + 1e-6 for value in (*values, *axis.ticks))
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert 1 <= len(axis.ticks) <= 15
    if from_zero:
        assert axis.low <= 0 <= axis.high


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.4, 4.7], ["0", "1", "2", "3", "4", "5"]),
        ([8000.0, 8400.0, 7900.0], ["7,900", "8,000", "8,100", "8,200", "8,300", "8,400"]),
        ([1e-4, 2e-4], ["1e-4", "1.2e-4", "1.4e-4", "1.6e-4", "1.8e-4", "2e-4"]),
        ([5.04, 0.0044], ["0.01", "0.1", "1", "10"]),
        ([2.0, 100.0], ["2", "5", "10", "20", "50", "100"]),
        ([3.0], ["0", "2", "4", "6"]),
    ],
)
def test_ticks_are_round_and_told_as_people_write_them(values, labels):
    axis = axis_of(values)
    assert axis.labels() == labels
    assert axis.log == (max(values) / min(values) >= 30)


def test_on_a_logarithmic_axis_equal_factors_are_equal_ways():
    axis = axis_of([0.001, 10.0])
    assert axis.at(0.1) - axis.at(0.01) == pytest.approx(axis.at(1.0) - axis.at(0.1))
    assert not axis_of([0.001, 10.0], from_zero=True).log
    assert not axis_of([0.0, 10.0]).log, "zero has no logarithm"


@pytest.mark.parametrize("last", [1, 2, 3, 7, 600, 1187, 100_000])
def test_steps_begin_at_zero_end_at_the_last_one_and_are_whole(last):
    axis = steps_axis(last)
    assert (axis.low, axis.high) == (0, last)
    assert all(tick == int(tick) and 0 <= tick <= last for tick in axis.ticks)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "0"), (1200.0, "1,200"), (0.05, "0.05"), (2e-5, "2e-5"), (3.5e6, "3.5M"), (1e10, "1e10"), (-2.5, "-2.5")],
)
def test_a_number_is_told_shortly(value, words):
    assert in_words(value) == words
    assert math.isfinite(value)
