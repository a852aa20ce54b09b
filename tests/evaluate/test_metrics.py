"""What every metric of the table promises, whatever it measures; the definitions are in the tests of each file."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import numpy as np
import pytest

from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.metrics import METRICS, regex_metric

WORDS = ["the", "cat", "sat", "on", "a", "mat,", "while", "7", "dogs", "ran", "over", "12", "hills.", "Why?"]


def sample(name: str, rows: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Predictions and references of the metric's kind, about half of them right."""
    chance = random.Random(seed)
    one = {"label": lambda: chance.randrange(2), "value": lambda: chance.gauss(0, 1), "text": lambda: words(chance)}
    draw = one[METRICS[name].kind]
    if name == "json_equal":
        draw = lambda: json.dumps({"key": chance.randrange(9)})  # noqa: E731
    right = [draw() for _ in range(rows)]
    predictions = [answer if chance.random() < 0.5 else draw() for answer in right]
    if METRICS[name].kind == "text":
        return predictions, [[draw(), answer] for answer in right]
    return predictions, right


def words(chance: random.Random) -> str:
    return " ".join([*chance.choices(WORDS, k=chance.randrange(4, 9)), f"#### {chance.randrange(9)}"])


@pytest.mark.parametrize("name", METRICS)
def test_a_sample_of_rows_is_the_metric_of_that_sample(name):
    metric = METRICS[name]
    predictions, references = sample(name, 40, 1)
    rows = metric.rows(predictions, references)
    assert (rows.ndim, len(rows), rows.dtype) == (2, 40, np.float64)
    for seed in range(3):
        draw = np.random.default_rng(seed).integers(40, size=40)
        again = metric.rows([predictions[i] for i in draw], [references[i] for i in draw])
        assert metric.figure(rows[draw]) == pytest.approx(metric.figure(again), rel=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_the_order_of_the_rows_changes_nothing(name):
    rows = METRICS[name].rows(*sample(name, 60, 2))
    shuffled = np.random.default_rng(0).permutation(rows)
    assert METRICS[name].figure(shuffled) == pytest.approx(METRICS[name].figure(rows), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", METRICS)
def test_all_right_is_the_best_figure_and_half_right_lies_below(name):
    metric = METRICS[name]
    predictions, references = sample(name, 60, 3)
    right = [answers[1] for answers in references] if metric.kind == "text" else references
    if name == "json_valid":
        predictions, right = ["{", "{}"], ["{}", "{}"]
    best = metric.figure(metric.rows(right, references[: len(right)]))
    half = metric.figure(metric.rows(predictions, references[: len(predictions)]))
    assert best == pytest.approx(100.0 if name == "bleu" else 1.0, rel=1e-12)
    assert 0 < half < best - 0.05


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_figure_is_a_plain_finite_number_even_of_one_row(name, rows):
    for seed in range(10):
        figure = METRICS[name].figure(METRICS[name].rows(*sample(name, rows, seed)))
        assert type(figure) is float
        json.dumps(figure, allow_nan=False)


@pytest.mark.parametrize("name", METRICS)
def test_each_is_told_in_one_line(name):
    assert METRICS[name].about
    assert "\n" not in METRICS[name].about


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.kind == "text"])
def test_an_empty_text_is_scored(name):
    metric = METRICS[name]
    answer = '{"key": 3, "other": 4}'
    assert metric.figure(metric.rows([""], [[answer]])) == 0.0
    assert 0 < metric.figure(metric.rows(["", answer], [[answer], [answer]])) < (100 if name == "bleu" else 1)


@pytest.mark.parametrize(("name", "package"), [("spearman", "scipy"), ("rougeL", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_missing_library_is_a_message_with_the_command(name, package, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is not installed. Run `pip install 'qlora\[eval\]'`") as caught:
        METRICS[name].figure(METRICS[name].rows(*sample(name, 4, 0)))
    assert caught.value.code == Exit.ENVIRONMENT


def test_a_pattern_without_a_group_has_to_be_found():
    metric = regex_metric(r"\bno\b")
    assert metric.rows(["yes, or no?", "nowhere"], [[], []]).tolist() == [[1.0], [0.0]]


def test_group_one_of_the_first_match_has_to_be_an_answer():
    metric = regex_metric(r"(?i)answer: (\w+|\s\S+ )?")
    predictions = ["The answer: B, not Answer: A", "ANSWER: A", "answer: ", "A", "answer:  A "]
    assert metric.rows(predictions, [["A", "C"]] * 5)[:, 0].tolist() == [0.0, 1.0, 0.0, 0.0, 1.0]


def test_only_group_one_counts():
    assert regex_metric(r"(a+)(b+)").rows(["aabb"], [["bb"]])[0, 0] == 0.0
    assert regex_metric(r"(?:a+)(b+)").rows(["aabb"], [["bb"]])[0, 0] == 1.0


def test_a_broken_pattern_is_a_message():
    with pytest.raises(UserError, match=r"metric regex: '\(\[' is no regular expression: .* at position 1.*quotes"):
        regex_metric("([")
