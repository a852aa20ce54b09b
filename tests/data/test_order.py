"""The order of examples: a function of seed and epoch, with an exact cursor."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.data.order import Order, Window, epoch_order, micro_batches, num_taken, share_of

SEEDS = st.integers(0, 2**32 - 1)
WEIGHTS = st.sampled_from([1.0, 2.0, 0.5, 0.3, 1.5, 3.0, 0.01, 2.25])
SOURCES = st.lists(st.tuples(st.integers(1, 30), WEIGHTS), min_size=1, max_size=3).map(tuple)
CAPACITY = 20


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Any order, packed or not."""
    sources = draw(SOURCES)
    number = sum(number for number, _ in sources)
    lengths = draw(st.lists(st.integers(1, CAPACITY), min_size=number, max_size=number))
    capacity = draw(st.sampled_from([None, CAPACITY]))
    return Order(sources, draw(st.integers(1, 40)), draw(SEEDS), np.array(lengths), capacity)


def plain(number: int, units_per_step: int, seed: int = 0, weight: float = 1.0) -> Order:
    return Order(((number, weight),), units_per_step, seed)


def packed(lengths: list[int], units_per_step: int = 2, seed: int = 0) -> Order:
    return Order(((len(lengths), 1.0),), units_per_step, seed, np.array(lengths), CAPACITY)


# ── an epoch ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_order_never_changes_between_versions() -> None:
    assert epoch_order([(8, 1)], 42, 0).tolist() == [5, 1, 7, 4, 0, 3, 6, 2]
    assert epoch_order([(8, 1)], 42, 1).tolist() == [3, 5, 0, 7, 2, 1, 4, 6]
    assert epoch_order([(3, 2), (6, 0.5)], 7, 0).tolist() == [6, 3, 0, 1, 2, 0, 8, 1, 2]
    lengths = [7, 3, 12, 20, 9, 5, 11, 6]
    assert packed(lengths, seed=42).epoch(0).slice(0, 9) == [[7, 6], [3], [4, 0], [5, 1, 2]]


@given(st.integers(1, 50), SEEDS, st.integers(0, 9))
def test_an_epoch_has_every_example_once_and_leaves_the_global_generators_alone(
    number: int, seed: int, epoch: int
) -> None:
    state, numbers = random.getstate(), np.random.get_state()[1].tolist()
    order = epoch_order([(number, 1)], seed, epoch).tolist()
    assert sorted(order) == list(range(number))
    assert order == epoch_order([(number, 1.0)], seed, epoch).tolist()
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == numbers


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    found = {tuple(epoch_order([(100, 1)], seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(found) == 25


def test_every_place_is_equally_likely() -> None:
    first = Counter(int(epoch_order([(4, 1)], seed, 0)[0]) for seed in range(2000))
    assert all(400 < first[row] < 600 for row in range(4))


def test_sources_are_mixed() -> None:
    rows = epoch_order([(500, 1), (500, 1)], 3, 0)
    assert 200 < (rows[:500] < 500).sum() < 300


@given(SOURCES, SEEDS, st.integers(0, 20))
def test_an_epoch_takes_each_example_as_often_as_its_weight_says(
    sources: tuple[tuple[int, float], ...], seed: int, epoch: int
) -> None:
    rows = Counter(epoch_order(sources, seed, epoch).tolist())
    assert sum(rows.values()) == num_taken(sources)
    first = 0
    for number, weight in sources:
        times = [rows.pop(row, 0) for row in range(first, first + number)]
        assert sum(times) == max(round(weight * number), 1) or abs(sum(times) - weight * number) <= 0.5
        assert min(times) >= int(weight)
        assert max(times) <= math.ceil(weight) + 1
        first += number
    assert not rows


@pytest.mark.parametrize("seed", range(5))
def test_weights_of_two_and_a_half(seed: int) -> None:
    sources = [(10, 2), (20, 0.5)]
    epochs = [Counter(epoch_order(sources, seed, epoch).tolist()) for epoch in range(6)]
    for rows in epochs:
        assert all(rows[row] == 2 for row in range(10))
        assert sum(rows[row] for row in range(10, 30)) == 10
        assert max(rows[row] for row in range(10, 30)) == 1
    for one, other in zip(epochs[::2], epochs[1::2], strict=True):  # halves that complement each other
        assert all(one[row] + other[row] == 1 for row in range(10, 30))
    assert len({tuple(sorted(rows.items())) for rows in epochs[::2]}) == 3


@given(st.integers(1, 40), st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7]), SEEDS)
def test_a_fraction_sees_all_examples_equally_often_over_the_epochs(number: int, weight: float, seed: int) -> None:
    seen = Counter(row for epoch in range(12) for row in epoch_order([(number, weight)], seed, epoch).tolist())
    times = [seen[row] for row in range(number)]
    assert max(times) - min(times) <= 1


def test_a_small_weight_takes_at_least_one_example() -> None:
    assert num_taken([(10, 0.001)]) == 1
    assert num_taken([(10, 1.001)]) == 10
    assert num_taken([(0, 0.5), (4, 1)]) == 4
    assert sorted(epoch_order([(0, 0.5), (4, 1), (0, 1)], 0, 0)) == [0, 1, 2, 3]


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(orders(), st.integers(0, 30), st.integers(0, 30))
def test_starting_at_a_step_gives_exactly_the_tail(order: Order, steps: int, start: int) -> None:
    whole = list(order.windows(steps))
    fresh = Order(order.sources, order.units_per_step, order.seed, order.lengths, order.capacity)
    assert list(fresh.windows(steps, start)) == whole[start:]
    assert [window.step for window in whole] == list(range(steps))


@given(orders(), st.integers(1, 3))
def test_windows_of_an_epoch_are_its_units_and_never_wrap(order: Order, epochs: int) -> None:
    run = list(order.windows(order.total_steps(epochs)))
    assert run[-1].epoch == epochs - 1
    for epoch in range(epochs):
        mine = [window.units for window in run if window.epoch == epoch]
        units = order.epoch(epoch)
        assert [unit for part in mine for unit in part] == units.slice(0, len(units))
        assert all(len(part) == order.units_per_step for part in mine[:-1])
        assert 0 < len(mine[-1]) <= order.units_per_step
        assert len(mine) == order.steps_of(epoch)


@given(orders())
def test_an_epoch_holds_the_same_examples_packed_or_not(order: Order) -> None:
    units = order.epoch(3)
    rows = [row for unit in units.slice(0, len(units)) for row in unit]
    assert sorted(rows) == sorted(epoch_order(order.sources, order.seed, 3).tolist())
    if order.capacity is None:
        assert units.slice(0, len(units)) == [[row] for row in rows]
    else:
        for unit in units.slice(0, len(units)):
            assert 0 < sum(order.lengths[row] for row in unit) <= order.capacity


def test_packed_epochs_hold_each_example_once_and_differ() -> None:
    lengths = random.Random(0).choices(range(1, CAPACITY + 1), k=200)
    order = packed(lengths)
    epochs = []
    for epoch in range(3):
        windows = [window for window in order.windows(order.total_steps(3)) if window.epoch == epoch]
        epochs.append([row for window in windows for row in window.rows])
        assert sorted(epochs[-1]) == list(range(200))
        full = sum(lengths) / (CAPACITY * sum(len(window.units) for window in windows))
        assert full > 0.9
    assert len({*map(tuple, epochs)}) == 3


@given(orders(), st.integers(0, 60))
def test_the_place_of_a_step_is_that_of_its_window(order: Order, step: int) -> None:
    window = list(order.windows(step + 1))[-1]
    epoch, begin = order.place(step)
    assert window.epoch == epoch
    assert begin <= step < begin + order.steps_of(epoch)
    assert order.epochs_done(step) == pytest.approx(epoch + (step - begin) / order.steps_of(epoch))
    assert order.epochs_done(begin) == epoch


def test_the_rows_of_a_window_are_those_of_its_units() -> None:
    assert Window(0, 0, [[1, 2], [3]]).rows == [1, 2, 3]
    assert list(plain(5, 2).windows(0)) == []
    assert [len(window.rows) for window in plain(5, 2).windows(6)] == [2, 2, 1, 2, 2, 1]
    assert [window.epoch for window in plain(5, 2).windows(6)] == [0, 0, 0, 1, 1, 1]


def test_total_steps_take_the_epochs_as_written() -> None:
    assert plain(100, 10).total_steps(1.1) == 11  # 1.1 * 10 is 11.000000000000002
    assert plain(95, 10).total_steps(3.0) == 30
    assert plain(95, 10).total_steps(3) == 30
    assert plain(95, 10).total_steps(0.01) == 1
    assert plain(95, 10).total_steps(0.55) == 6
    assert plain(100, 10).total_steps(1e-9) == 1
    assert plain(100, 10).total_steps(3.0, max_steps=7) == 7
    assert plain(100, 10, weight=0.5).total_steps(1) == 5


def test_total_steps_of_packed_epochs_are_counted_epoch_by_epoch() -> None:
    lengths = random.Random(1).choices(range(1, CAPACITY + 1), k=60)
    order = packed(lengths, units_per_step=3)
    steps = [order.steps_of(epoch) for epoch in range(3)]
    assert order.total_steps(2) == steps[0] + steps[1]
    assert order.total_steps(2.5) == steps[0] + steps[1] + math.ceil(steps[2] / 2)


def test_one_epoch_is_kept_at_a_time() -> None:
    order = plain(5, 2)
    assert order.epoch(1) is order.epoch(1)
    list(order.windows(12))
    assert len(order._last) == 1


# ── shares ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers()), st.integers(1, 6))
def test_ranks_share_a_window_without_loss(units: list[int], world: int) -> None:
    shares = [share_of(units, rank, world) for rank in range(world)]
    assert sorted(unit for share in shares for unit in share) == sorted(units)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.integers()), st.integers(1, 6))
def test_micro_batches_are_the_units_in_portions(units: list[int], size: int) -> None:
    portions = micro_batches(units, size)
    assert [unit for portion in portions for unit in portion] == units
    assert all(len(portion) == size for portion in portions[:-1])
    assert all(portions)


def test_impossible_sizes_are_our_mistake() -> None:
    wrong: list[Any] = [lambda: plain(0, 1), lambda: plain(1, 0), lambda: micro_batches([1], 0)]
    for call in (*wrong, lambda: share_of([1], 2, 2)):
        with pytest.raises(AssertionError):
            call()


def test_asking_how_far_a_run_is_packs_no_epoch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_cli.data import order as room

    order = Order(((50, 1.0),), 4, 1, np.full(50, 30), 100)
    steps = order.total_steps(3.0)
    monkeypatch.setattr(room, "pack", None)
    assert order.epochs_done(steps) == 3.0
