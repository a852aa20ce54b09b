"""Every row once, no bin too full, none waits long, and real data leaves next to no room."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.data.packing import efficiency, fill, pack

CAPACITY = 40
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)
BUFFERS = st.integers(1, 70)


@given(LENGTHS, BUFFERS, st.randoms(use_true_random=False))
def test_every_row_is_in_one_bin_and_no_bin_is_too_full(lengths, buffer, rng):
    order = list(range(len(lengths)))
    rng.shuffle(order)
    bins = list(pack(lengths, order, CAPACITY, buffer))
    assert sorted(row for rows in bins for row in rows) == sorted(order)
    assert all(0 < sum(lengths[row] for row in rows) <= CAPACITY for rows in bins)
    assert bins == list(pack(tuple(lengths), iter(order), CAPACITY, buffer))


@given(LENGTHS, BUFFERS)
def test_no_more_than_a_buffer_of_rows_waits_and_none_waits_longer_than_a_buffer_of_bins(lengths, buffer):
    taken: list[int] = []

    def counted() -> Iterator[int]:
        for row in range(len(lengths)):
            taken.append(row)
            yield row

    placed, entered = 0, {}
    for number, rows in enumerate(pack(lengths, counted(), CAPACITY, buffer)):
        placed += len(rows)
        assert len(taken) - placed <= buffer
        for row in rows:
            assert number - entered.get(row, number) <= buffer
        entered |= {row: number for row in taken if row not in entered}


def test_each_bin_begins_with_the_row_that_waited_longest():
    lengths = [30, 9, 9, 30, 10, 5, 5, 20]
    waiting = list(range(len(lengths)))
    for rows in pack(lengths, range(len(lengths)), CAPACITY, 8):
        assert rows[0] == min(waiting)
        waiting = [row for row in waiting if row not in rows]
    assert next(pack(lengths, range(len(lengths)), CAPACITY, 8)) == [0, 4]


def test_rows_may_come_in_any_order_more_than_once_and_from_a_part():
    assert list(pack([10, 20, 30, 40], [2, 0, 2, 0], CAPACITY, 4)) == [[2, 0], [0, 2]]
    assert list(pack([10], [], CAPACITY)) == []


def test_a_row_too_long_is_our_mistake():
    for broken in (lambda: list(pack([CAPACITY + 1], [0], CAPACITY)), lambda: fill([CAPACITY + 1], CAPACITY)):
        with pytest.raises(AssertionError, match="cut before"):
            broken()


@given(LENGTHS)
def test_a_step_is_filled_with_every_row_once_into_few_bins(lengths):
    bins = fill(lengths, CAPACITY)
    assert sorted(at for rows in bins for at in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) and sum(lengths[at] for at in rows) <= CAPACITY for rows in bins)
    fewest = -(-sum(lengths) // CAPACITY)
    assert len(bins) >= fewest
    sums = sorted(sum(lengths[at] for at in rows) for rows in bins)
    assert len(sums) < 2 or sums[0] + sums[1] > CAPACITY  # best fit never leaves two bins that would fit into one
    assert bins == fill(tuple(lengths), CAPACITY)


def test_best_fit_takes_the_tightest_bin():
    assert fill([25, 30, 10, 15, 5], CAPACITY) == [[1, 2], [0, 3], [4]]


def test_efficiency_is_the_share_of_tokens():
    assert efficiency([[0, 1], [2]], [10, 20, 30], CAPACITY) == 60 / 80


def real_lengths(shared: Path, name: str) -> list[int]:
    """Tokens of each row of a data set, its EOS among them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared / "tokenizers/smollm2-135m-instruct/tokenizer.json"))
    if name == "gsm8k":
        rows = [json.loads(line) for line in (shared / "text/gsm8k/train.jsonl").read_text().splitlines()]
        texts = [f"{row['question']}\n{row['answer']}<|im_end|>" for row in rows]
    else:
        rows = json.loads((shared / "text/llamafactory/alpaca_en_demo.json").read_text())
        texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}<|im_end|>" for row in rows]
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]


@pytest.mark.parametrize("name", ["gsm8k", "alpaca"])
def test_real_rows_leave_less_than_one_percent_and_bins_stay_mixed(shared: Path, name: str):
    lengths = real_lengths(shared, name)
    order = list(range(len(lengths)))
    random.Random(0).shuffle(order)
    for capacity in (1024, 2048):
        bins = list(pack(lengths, order, capacity))
        assert efficiency(bins, lengths, capacity) >= 0.99
        spread = pstdev(mean(lengths[row] for row in rows) for rows in bins)
        of_best_fit = pstdev(mean(lengths[row] for row in rows) for rows in fill(lengths, capacity))
        assert spread < 0.6 * of_best_fit


def test_a_million_rows_take_seconds():
    rng = random.Random(0)
    lengths = [min(CAPACITY * 25, max(1, int(rng.gauss(187, 69)))) for _ in range(100_000)]
    start = time.process_time()
    bins = sum(1 for _ in pack(lengths, range(len(lengths)), 1024))
    assert time.process_time() - start < 5  # 0.2 s here; 1,000,000 rows in 2 s
    assert sum(lengths) / (bins * 1024) > 0.999
