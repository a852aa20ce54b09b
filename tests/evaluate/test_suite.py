"""What suites are made of: measures over columns of answers, and a digest of what answers depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_cli.evaluate.metrics import METRICS
from qlora_cli.evaluate.suite import Opened, columns, name_of, no_rows, of_metric
from qlora_cli.recipe.schema import Suite
from tests.evaluate.opening import context, recipe_of


def nothing(base: Any, model: Any, todo: Any) -> Any:
    return iter(())


OPENED = Opened("s", "loss", 2, {"rows": "abc", "length": 7}, nothing, {})


def test_the_digest_is_of_what_the_answers_are_made_of_alone() -> None:
    assert replace(OPENED, name="t", measures={"m": of_metric(METRICS["accuracy"], "p", "l")}).digest == OPENED.digest
    assert replace(OPENED, made_of={"length": 7, "rows": "abc"}).digest == OPENED.digest
    assert replace(OPENED, made_of={"rows": "abc", "length": 8}).digest != OPENED.digest


def test_columns_are_float64_in_their_order() -> None:
    found = columns("b", "a")([{"a": 1, "b": True}, {"a": 0.1, "b": 3}])
    assert found.dtype == np.float64
    assert found.tolist() == [[1.0, 1.0], [3.0, 0.1]]


def test_a_metric_reads_two_columns() -> None:
    measure = of_metric(METRICS["accuracy"], "said", "right")
    answers = [{"said": 1, "right": 1}, {"said": 0, "right": 1}, {"said": 2, "right": 2}]
    assert measure.figure(measure.rows(answers)) == pytest.approx(2 / 3)


def test_names_and_errors_are_the_recipes() -> None:
    assert (name_of(Suite(suite="loss")), name_of(Suite(suite="loss", name="texts"))) == ("loss", "texts")
    assert str(no_rows(Suite(suite="loss", name="texts"))).startswith("evaluation.suites: texts: no rows. Name files")


@pytest.mark.parametrize(("size", "wanted"), [("auto", 6), (11, 11)])
def test_batches_are_training_s_unless_the_recipe_says_so(size: Any, wanted: int, tiny_model: Path) -> None:
    recipe = recipe_of(
        {"name_or_path": str(tiny_model)}, training={"micro_batch_size": 6}, evaluation={"batch_size": size}
    )
    assert context(recipe).batch_size == wanted
