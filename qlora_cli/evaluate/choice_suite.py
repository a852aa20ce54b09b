"""The suite `choice`: questions with choices, scored by log-likelihood as lm-evaluation-harness does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from qlora_cli.evaluate import choice_metrics
from qlora_cli.evaluate.choice import ChoiceScore, score_choices
from qlora_cli.evaluate.choice_rows import ChoiceRow, read_choices
from qlora_cli.evaluate.suite import Answer, Context, Measure, Opened, name_of, no_rows
from qlora_cli.model.base import Base, default_device
from qlora_cli.recipe.schema import Suite

CHOICE_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of a forward pass of `choice` where evaluation.batch_size is auto: a CPU gains nothing by more."""


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
    size, auto = context.recipe.evaluation.batch_size, CHOICE_TOKENS[default_device().type]
    budget = auto if size == "auto" else size * (context.found.context or auto)
    measures = {
        name: Measure(partial(_choice_rows, metric), metric.figure, name == "perplexity")
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
