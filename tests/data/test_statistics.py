"""The numbers of a preview, against the same numbers counted one by one from the examples."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.examples import Examples, SourceCount
from qlora_cli.data.order import Order, micro_batches
from qlora_cli.data.statistics import histogram, layout_of, spread, statistics
from qlora_cli.recipe import Recipe


def examples_of(*lengths: list[tuple[int, int]], weights: tuple[float, ...] = (1.0, 1.0)) -> Examples:
    """Sources of examples with so many tokens, of which so many are trained at their end."""
    rows, sources = [], []
    for number, source in enumerate(lengths):
        for at, (total, trained) in enumerate(source):
            labels = [IGNORE_INDEX] * (total - trained) + [7] * trained
            rows.append(Example([7] * total, labels, f"{number}.jsonl:{at + 1}"))
        tokens, answers = sum(total for total, _ in source), sum(min(trained, total - 1) for total, trained in source)
        counts = (len(source) + 1, 1, len(source), tokens, answers)
        sources.append(SourceCount(f"{number}.jsonl", "text", False, weights[number], 0, *counts))
    return Examples(tuple(rows), tuple(sources), num_rows=len(rows) + len(lengths), num_bad=len(lengths))


def drawn(number: int, seed: int = 0) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    totals = [draw.randint(2, 400) for _ in range(number)]
    return [(total, draw.randint(1, total - 1)) for total in totals]


def recipe_of(data: dict[str, Any] | None = None, **training: Any) -> Recipe:
    values = {"train": [{"path": "rows.jsonl"}], "max_length": 512, **(data or {})}
    return Recipe.model_validate({"model": {"name_or_path": "base"}, "data": values, "training": training})


def order_for(examples: Examples, per_step: int, capacity: int | None = None) -> Order:
    sources = tuple((source.num_examples, source.weight) for source in examples.sources)
    return Order(sources, per_step, 42, examples.lengths, capacity)


def test_every_number_is_that_of_a_count_one_by_one():
    examples = examples_of(drawn(37), drawn(23, seed=1), weights=(2.0, 0.5))
    recipe = recipe_of({"packing": False}, epochs=2.5, micro_batch_size=3, gradient_accumulation_steps=4)
    told = statistics(examples, recipe, order_for(examples, 12))
    lengths = sorted(len(row.input_ids) for row in examples.rows)
    trained = sorted(sum(label != IGNORE_INDEX for label in row.labels[1:]) for row in examples.rows)
    for found, counted in ((told.lengths, lengths), (told.answers, trained)):
        assert (found.least, found.most, found.mean) == (counted[0], counted[-1], sum(counted) / 60)
        for share, value in ((0.5, found.median), (0.9, found.p90), (0.99, found.p99)):
            assert value == counted[math.ceil(share * 60) - 1]
    assert (told.num_examples, told.num_rows, told.num_bad, told.limit) == (60, 62, 2, 512)
    assert (told.num_tokens, told.num_trained) == (sum(lengths), sum(trained))
    assert told.trained_share == sum(trained) / sum(lengths)

    windows = list(order_for(examples, 12).windows(8))
    seen = [examples.rows[row] for window in windows if window.epoch == 0 for row in window.rows]
    assert told.epoch is not None
    assert told.epoch.num_examples == len(seen) == 2 * 37 + 12
    assert told.epoch.num_tokens == sum(row.num_tokens for row in seen)
    assert told.epoch.num_trained == sum(row.num_trained for row in seen)
    assert told.epoch.steps == 8
    assert (told.epoch.total_steps, told.epoch.epochs, told.epoch.units_per_step) == (20, 2.5, 12)


@pytest.mark.parametrize(("number", "micro", "accumulation"), [(60, 4, 4), (61, 3, 5), (5, 8, 2), (1, 1, 1)])
def test_padding_is_that_of_the_batches_that_training_makes(number: int, micro: int, accumulation: int):
    examples = examples_of(drawn(number))
    order = order_for(examples, micro * accumulation)
    real = padded = 0
    for window in order.windows(order.steps_of(0)):
        lengths = sorted((examples.rows[row].num_tokens for row in window.rows), reverse=True)
        for batch in micro_batches(lengths, micro):
            real, padded = real + sum(batch), padded + len(batch) * max(batch)
    assert layout_of(order, micro).padding == pytest.approx(1 - real / padded)


def test_the_padding_is_that_of_the_tensors():
    import torch
    from transformers import LlamaConfig

    from qlora_cli.tasks.table import batches

    base: Any = SimpleNamespace(config=LlamaConfig(), device=torch.device("cpu"), task="causal_lm")
    examples = examples_of(drawn(50))
    order = order_for(examples, 12)
    cells = tokens = 0
    for window in order.windows(order.steps_of(0)):
        rows = [examples.rows[row] for row in window.rows]
        for batch in batches(rows, [row.num_tokens for row in rows], 4, 512, False, base):
            cells, tokens = cells + batch.input_ids.numel(), tokens + int(batch.attention_mask.sum())
    assert layout_of(order, 4).padding == pytest.approx(1 - tokens / cells)


def test_packing_counts_the_rows_that_examples_fill():
    examples = examples_of(drawn(200))
    recipe = recipe_of({"packing": True}, epochs=2, micro_batch_size=2, gradient_accumulation_steps=2)
    order = order_for(examples, 4, 512)
    told = statistics(examples, recipe, order)
    windows = list(order.windows(order.steps_of(0)))
    bins = [unit for window in windows for unit in window.units]
    assert told.epoch is not None
    layout = told.epoch.layout
    assert (layout.num_rows, layout.num_examples) == (len(bins), sum(map(len, bins)))
    assert layout.full == pytest.approx(told.num_tokens / (512 * len(bins)))
    assert told.epoch.steps == len(windows)
    assert told.epoch.total_steps == order.steps_of(0) + order.steps_of(1)
    assert told.epoch.batches == (
        f"200 examples in {len(bins)} rows of 512 tokens, {layout.full:.1%} full, no padding between them"
    )
    words = dict(told.words())
    assert words["batches"].endswith(f", {200 / len(bins):.1f} examples in each")
    assert words["a step"] == "4 rows on one process"


def test_automatic_packing_promises_nothing_that_needs_the_weights():
    examples = examples_of(drawn(20))
    order = order_for(examples, 16)
    padded = f"padded, of similar lengths: {layout_of(order, 4).padding:.1%} of their tokens are padding"
    told = {packing: statistics(examples, recipe_of({"packing": packing}), order).epoch for packing in ("auto", False)}
    assert (
        told["auto"].batches == f"no padding if the model keeps packed rows apart, which training tries; else {padded}"
    )
    assert told[False].batches == padded
    assert layout_of(order, 4).words(packed=True) == "examples one behind the other, no padding"


def test_max_steps_wins_and_tells_how_many_epochs_it_is():
    examples = examples_of(drawn(40))
    told = statistics(examples, recipe_of(epochs=3, max_steps=5), order_for(examples, 16))
    assert dict(told.words())["steps"] == "3 in an epoch, 5 in all (1.667 epochs)"


def test_held_out_rows_have_no_epoch():
    examples = replace(examples_of([(10, 4), (6, 2)]), num_skipped=3, num_truncated=1, num_emptied=2)
    told = statistics(examples, recipe_of())
    assert told.epoch is None
    assert told.words() == [("in all", "2 examples, 16 tokens, 6 trained (37.5%)")]
    assert (told.num_skipped, told.num_truncated, told.num_emptied) == (3, 1, 2)


def test_a_first_token_is_never_trained():
    told = statistics(examples_of([(4, 4)]), recipe_of())
    assert (told.num_tokens, told.num_trained) == (4, 3)


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [1, 2, 3], [88, 1016, 300, 300], list(range(2, 4097)), [1, 10**9]])
def test_a_histogram_holds_every_length_in_few_equal_bins(lengths: list[int]):
    bins = histogram(np.array(lengths))
    assert 1 <= len(bins) <= 12
    assert {one.last - one.first + 1 for one in bins} == {bins[0].last - bins[0].first + 1}
    assert all(left.last + 1 == right.first for left, right in pairwise(bins))
    for one in bins:
        assert one.num_examples == sum(one.first <= length <= one.last for length in lengths)
    assert str(bins[0].last - bins[0].first + 1).strip("0") in ("1", "2", "5")
    assert bins[0].num_examples > 0
    assert bins[-1].num_examples > 0


def test_a_million_rows_are_told_in_a_second():
    import time

    lengths = np.random.default_rng(0).integers(2, 2049, 1_000_000)
    order = Order(((1_000_000, 1.0),), 16, 42, lengths)
    order.epoch(0)
    started = time.process_time()
    layout_of(order, 4)
    spread(lengths)
    histogram(lengths)
    assert time.process_time() - started < 1


def test_the_numbers_are_plain_values():
    import json

    examples = examples_of(drawn(9))
    told = statistics(examples, recipe_of({"packing": True}), order_for(examples, 16, 512))
    assert json.loads(json.dumps(asdict(told)))["epoch"]["layout"]["capacity"] == 512
