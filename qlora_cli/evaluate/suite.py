"""What a suite of evaluation is: rows, an answer to each of them by a model, and figures over the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from qlora_cli.data.examples import Examples
from qlora_cli.data.sources import Part
from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.metrics import Metric
from qlora_cli.model.base import Base, Found
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Source, Suite

Answer = dict[str, Any]
"""What a model made of a row, as plain values: a line of the suite's JSONL."""


@dataclass(frozen=True)
class Measure:
    """A figure of a suite: rows(answers) is what each adds, float64 (n, k); figure((n, k)) is it over any of them."""

    rows: Callable[[Sequence[Answer]], np.ndarray]
    figure: Callable[[np.ndarray], float]
    lower_is_better: bool = False


@dataclass(frozen=True)
class Opened:
    """A suite whose rows are read.

    name, kind: as in the recipe. num_rows: how many answers it takes. made_of: all that its answers depend on besides
    the model. answer: (base, model, rows still to do) to answers, in any order, each with the number of its row.
    measured: what its rows were read from besides the recipe's sources.
    groups: of an answer the group that it belongs to, "" for none; figures are told for each group too.
    """

    name: str
    kind: str
    num_rows: int
    made_of: dict[str, Any]
    answer: Callable[[Base, Any, Sequence[int]], Iterator[tuple[int, Answer]]]
    measures: dict[str, Measure]
    group: Callable[[Answer], str] = lambda answer: ""
    notes: Callable[[Sequence[Answer]], list[str]] = lambda answers: []
    sample: Callable[[Answer], dict[str, str]] | None = None
    told: list[str] = field(default_factory=list)
    measured: list[Part] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """SHA-256 of what the answers depend on besides the model."""
        return hashlib.sha256(json.dumps(self.made_of, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Context:
    """What a suite is opened with.

    rows: the examples of sources, or of the recipe's held-out data for none, read and refused as training does.
    limit: rows that are measured at most; None: all of them. trained: files that no suite may measure.
    """

    recipe: Recipe
    found: Found
    rows: Callable[[Sequence[Source]], Examples]
    limit: int | None
    trained: Sequence[Part] = ()

    def limit_of(self, suite: Suite) -> int | None:
        """The rows of the suite that are measured, None for all."""
        limits = [limit for limit in (self.limit, suite.limit) if limit is not None]
        return min(limits, default=None)

    @property
    def batch_size(self) -> int:
        """Rows of the longest length in one forward pass."""
        size = self.recipe.evaluation.batch_size
        return self.recipe.training.micro_batch_size if size == "auto" else size


def name_of(suite: Suite) -> str:
    """The suite's name in tables and files."""
    return suite.name or suite.suite


def of_metric(metric: Metric, prediction: str, reference: str) -> Measure:
    """A metric over two columns of the answers."""

    def rows(answers: Sequence[Answer]) -> np.ndarray:
        return metric.rows([answer[prediction] for answer in answers], [answer[reference] for answer in answers])

    return Measure(rows, metric.figure)


def columns(*names: str) -> Callable[[Sequence[Answer]], np.ndarray]:
    """Columns of the answers as (n, k) float64."""
    return lambda answers: np.array([[answer[name] for name in names] for answer in answers], np.float64)


def refuse_nonfinite(numbers: Tensor, where: Sequence[str]) -> None:
    """Raises UserError (exit 1) at the first row of whose numbers (N, ...) one is not finite."""
    whole = numbers.isfinite().flatten(1).all(dim=1).tolist()
    if False in whole:
        what = "the model's logits are not numbers"
        raise UserError(where[whole.index(False)], what, "check its weights and compute_dtype", Exit.FAILED)


def no_rows(suite: Suite) -> UserError:
    """The error of a suite without anything to measure."""
    where = f"evaluation.suites: {name_of(suite)}"
    return UserError(where, "no rows", "name files in its `data`, or hold rows out with data.eval or eval_fraction")
