"""The order of rows: a function of seed and epoch, with an exact cursor."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.data.order import epoch_order, micro_batches, share_of, steps_per_epoch, total_steps, windows

ROWS = st.integers(1, 50)
SEEDS = st.integers(0, 2**32 - 1)


@given(ROWS, SEEDS, st.integers(0, 9))
def test_an_epoch_has_every_row_once_and_leaves_the_global_generator_alone(rows: int, seed: int, epoch: int) -> None:
    state = random.getstate()
    order = epoch_order(rows, seed, epoch)
    assert sorted(order) == list(range(rows))
    assert order == epoch_order(rows, seed, epoch)
    assert random.getstate() == state


def test_the_order_never_changes_between_versions() -> None:
    assert epoch_order(8, 42, 0) == [3, 4, 6, 5, 0, 1, 2, 7]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(ROWS, st.integers(1, 60), SEEDS, st.integers(0, 30), st.integers(0, 30))
def test_starting_at_a_step_gives_exactly_the_tail(rows: int, per_step: int, seed: int, steps: int, start: int) -> None:
    whole = list(windows(rows, per_step, seed, steps))
    assert list(windows(rows, per_step, seed, steps, start)) == whole[start:]
    assert [window.step for window in whole] == list(range(steps))


@given(ROWS, st.integers(1, 60), SEEDS, st.integers(1, 3))
def test_windows_of_an_epoch_are_its_order_and_never_wrap(rows: int, per_step: int, seed: int, epochs: int) -> None:
    run = list(windows(rows, per_step, seed, total_steps(rows, per_step, epochs)))
    for epoch in range(epochs):
        mine = [window.rows for window in run if window.epoch == epoch]
        assert [row for part in mine for row in part] == epoch_order(rows, seed, epoch)
        assert all(len(part) == per_step for part in mine[:-1])
        assert 0 < len(mine[-1]) <= per_step
        assert len(mine) == steps_per_epoch(rows, per_step)


def test_total_steps_take_the_epochs_as_written() -> None:
    assert total_steps(100, 10, 1.1) == 11  # 1.1 * 10 is 11.000000000000002
    assert total_steps(95, 10, 3.0) == 30
    assert total_steps(95, 10, 0.01) == 1
    assert total_steps(95, 10, 0.55) == 6
    assert total_steps(100, 10, 1e-9) == 1
    assert total_steps(100, 10, 3.0, max_steps=7) == 7


@given(st.lists(st.integers()), st.integers(1, 6))
def test_ranks_share_a_window_without_loss(rows: list[int], world: int) -> None:
    shares = [share_of(rows, rank, world) for rank in range(world)]
    assert sorted(row for share in shares for row in share) == sorted(rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.integers()), st.integers(1, 6))
def test_micro_batches_are_the_window_in_portions(rows: list[int], size: int) -> None:
    portions = micro_batches(rows, size)
    assert [row for portion in portions for row in portion] == rows
    assert all(len(portion) == size for portion in portions[:-1])
    assert all(portions)


def test_impossible_sizes_are_our_mistake() -> None:
    for wrong in (lambda: steps_per_epoch(0, 1), lambda: steps_per_epoch(1, 0), lambda: micro_batches([1], 0)):
        with pytest.raises(AssertionError):
            wrong()
    with pytest.raises(AssertionError):
        share_of([1], 2, 2)
