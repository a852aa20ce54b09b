"""Suites over models: nothing is answered twice, and figures stand beside their intervals and differences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from qlora_cli.evaluate.bootstrap import interval, paired_difference
from qlora_cli.evaluate.measuring import Subject, answered, figures, finite, result_of
from qlora_cli.evaluate.suite import Measure, Opened, columns

BASE: Any = SimpleNamespace()


def mean(rows: np.ndarray) -> float:
    return float(rows[:, 0].mean())


class Killed(Exception):
    """What ends a process in mid-suite."""


def suite_of(asked: list[int], num_rows: int = 8, dies_at: int | None = None) -> Opened:
    """A suite whose answer to row i is 10 i, longest first; `asked` keeps what was asked."""

    def answer(base, model, todo):
        assert not model.training, "suites run in evaluation mode"
        for row in reversed(todo):
            if row == dies_at:
                raise Killed
            asked.append(row)
            yield row, {"value": 10.0 * row + model.add, "group": "odd" if row % 2 else "even"}

    measures = {"mean": Measure(columns("value"), mean), "most": Measure(columns("value"), lambda rows: rows.max())}
    return Opened("s", "loss", num_rows, {"rows": num_rows}, answer, measures, group=lambda answer: answer["group"])


def subject_of(name: str, add: float = 0.0) -> Subject:
    model = nn.Linear(1, 1).train()
    model.add = add  # type: ignore[assignment]
    return Subject(name, BASE, model, f"digest of {name}")


def test_a_suite_that_was_killed_answers_the_rest_alone(tmp_path):
    first: list[int] = []
    subject = subject_of("adapter")
    with pytest.raises(Killed):
        answered(suite_of(first, dies_at=3), subject, tmp_path, again=False)
    assert subject.model.training, "the mode is restored"
    rest: list[int] = []
    told: list[int] = []
    answers = answered(suite_of(rest), subject, tmp_path, False, told.append)
    assert (first, rest) == ([7, 6, 5, 4], [3, 2, 1, 0])
    assert told == [4, 5, 6, 7, 8]
    assert [answer["value"] for answer in answers] == [10.0 * row for row in range(8)]
    nothing: list[int] = []
    assert answered(suite_of(nothing), subject, tmp_path, again=False) == answers
    assert nothing == []
    assert answered(suite_of(nothing), subject, tmp_path, again=True) == answers
    assert len(nothing) == 8


def test_figures_intervals_and_paired_differences_are_the_bootstraps(tmp_path):
    suite = suite_of([])
    found = {
        name: answered(suite, subject_of(name, add), tmp_path, again=False)
        for name, add in (("base", 0.0), ("adapter", 5.0), ("merged", 5.0))
    }
    result = result_of(suite, found, 200)
    values = np.arange(8)[:, None] * 10.0
    assert result["models"]["base"]["mean"]["value"] == values.mean()
    low, high = interval(mean, values, resamples=200)
    assert (result["models"]["base"]["mean"]["low"], result["models"]["base"]["mean"]["high"]) == (low, high)
    names = [(difference["of"], difference["to"]) for difference in result["differences"]]
    assert names == [("adapter", "base"), ("merged", "adapter")]
    first, second = (difference["figures"]["mean"] for difference in result["differences"])
    assert (first["value"], first["low"], first["high"]) == paired_difference(mean, values + 5, values, resamples=200)
    assert first["low"] == first["high"] == 5.0, "each row gained 5, however they are drawn"
    assert (second["value"], second["low"], second["high"]) == (0.0, 0.0, 0.0)
    assert result["groups"]["base"]["odd"] == {"rows": 4, "mean": 40.0, "most": 70.0}
    assert figures(suite, found["adapter"]) == {"mean": 40.0, "most": 75.0}


def test_without_resamples_there_are_no_intervals(tmp_path):
    suite = suite_of([])
    result = result_of(suite, {"base": answered(suite, subject_of("base"), tmp_path, again=False)}, 0)
    assert result["models"]["base"]["mean"] == {"value": 35.0}
    assert result["differences"] == []


def test_what_json_has_no_word_for_is_null():
    assert [finite(value) for value in (1.0, float("inf"), float("nan"))] == [1.0, None, None]
