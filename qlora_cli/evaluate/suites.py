"""The suites of evaluation, by the recipe's name: which task each is for, and what opens it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.evaluate import choice_metrics
from qlora_cli.evaluate.choice import ChoiceScore, score_choices
from qlora_cli.evaluate.choice_rows import ChoiceRow, read_choices
from qlora_cli.evaluate.generate_suite import open_classify, open_generate
from qlora_cli.evaluate.loss_suite import open_loss
from qlora_cli.evaluate.suite import Answer, Context, Measure, Opened, name_of, no_rows
from qlora_cli.model.base import Base
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Suite

CHOICE_TOKENS = 4096
"""Tokens of a forward pass of `choice` where evaluation.batch_size is auto."""


@dataclass(frozen=True)
class Kind:
    """open: reads the rows of a suite. tasks: the recipe's tasks that it can measure."""

    open: Callable[[Suite, Context], Opened]
    tasks: tuple[str, ...]


def open_choice(suite: Suite, context: Context) -> Opened:
    """Questions with choices, each scored by its log-likelihood, and continuations (LAMBADA)."""
    seed = context.recipe.training.seed
    rows = read_choices(
        suite.data,
        delimiter=suite.delimiter,
        shots=suite.shots,
        shots_from=suite.shots_from,
        limit=context.limit_of(suite),
        seed=seed,
    )
    if not rows:
        raise no_rows(suite)
    size = context.recipe.evaluation.batch_size
    budget = CHOICE_TOKENS if size == "auto" else size * (context.found.context or CHOICE_TOKENS)
    measures = {
        name: Measure(partial(_choice_rows, metric), metric.figure)
        for name, metric in choice_metrics.metrics_of(rows).items()
    }
    return Opened(
        name_of(suite),
        suite.suite,
        len(rows),
        {"suite": suite.suite, "rows": [asdict(row) for row in rows]},
        partial(_score, rows, budget),
        measures,
        group=lambda answer: answer["group"],
        notes=_cut_contexts,
    )


def _score(
    rows: Sequence[ChoiceRow], budget: int, base: Base, model: Any, todo: Sequence[int]
) -> Iterator[tuple[int, Answer]]:
    chosen = [rows[row] for row in todo]
    for at, scores in score_choices(base, model, chosen, budget):
        row = chosen[at]
        answer: Answer = {"where": row.where, "group": row.group, "gold": row.gold}
        if row.gold is not None:
            answer |= {"chosen": choice_metrics.likeliest(scores)}
        yield todo[at], {**answer, "choices": list(row.choices), "scores": [asdict(score) for score in scores]}


def _choice_rows(metric: choice_metrics.ChoiceMetric, answers: Sequence[Answer]) -> Any:
    scores = [[ChoiceScore(**score) for score in answer["scores"]] for answer in answers]
    rows = [
        ChoiceRow(answer["where"], "", tuple(answer["choices"]), answer["gold"], answer["group"]) for answer in answers
    ]
    return metric.rows(scores, rows)


def _cut_contexts(answers: Sequence[Answer]) -> list[str]:
    number = sum(any(score["num_cut"] for score in answer["scores"]) for answer in answers)
    return [f"{number:,} rows are longer than the model reads: their beginnings were cut off"] if number else []


KINDS: dict[str, Kind] = {
    "loss": Kind(open_loss, ("causal_lm", "seq2seq_lm", "sequence_classification", "question_answering")),
    "choice": Kind(open_choice, ("causal_lm",)),
    "generate": Kind(open_generate, ("causal_lm", "seq2seq_lm")),
    "classify": Kind(open_classify, ("sequence_classification",)),
}

DEFAULTS = {
    "causal_lm": ("loss", "generate"),
    "seq2seq_lm": ("loss", "generate"),
    "sequence_classification": ("loss", "classify"),
    "question_answering": ("loss",),
}
"""What is measured of a task where the recipe names no suites."""


def suites_of(recipe: Recipe, names: Sequence[str] = ()) -> list[Suite]:
    """The recipe's suites, those of its task where it names none; of them those of the names, if there are any."""
    found = list(recipe.evaluation.suites) or [Suite(suite=kind) for kind in DEFAULTS[recipe.model.task]]  # type: ignore[arg-type]
    known = [name_of(suite) for suite in found]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--suite {unknown[0]}", "no such suite in the recipe", f"choose from {', '.join(known)}")
    return [suite for suite in found if not names or name_of(suite) in names]


def open_suite(suite: Suite, context: Context) -> Opened:
    """The suite with its rows read. Raises UserError where it cannot measure the recipe's task, or has no rows."""
    return KINDS[suite.suite].open(suite, context)
