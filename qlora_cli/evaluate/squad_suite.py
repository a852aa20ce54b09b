"""The suite `squad`: answers to questions about contexts, scored as SQuAD scores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.evaluate.metrics import METRICS
from qlora_cli.evaluate.squad import Asked, answer_questions, read_questions
from qlora_cli.evaluate.suite import Answer, Context, Opened, name_of, no_rows, of_metric
from qlora_cli.model.base import Base
from qlora_cli.recipe.schema import Suite


def open_squad(suite: Suite, context: Context) -> Opened:
    """Questions with their windows; with SQuAD 2's, those with an answer and those without are told apart."""
    left_out: list[UserError] = []
    limit = context.limit_of(suite)
    asked = read_questions(suite.data, context.found, context.recipe, limit, left_out.append)
    if not asked:
        raise no_rows(suite)
    longest = context.recipe.evaluation.max_answer_length
    read = [[one.question, [window.example.input_ids for window in one.windows]] for one in asked]
    return Opened(
        name_of(suite),
        suite.suite,
        len(asked),
        {
            "suite": suite.suite,
            "questions": read,
            "max_answer_length": longest,
            "may_be_none": asked[0].may_be_none,
        },
        partial(_answer, asked, context.batch_size, longest),
        {name: of_metric(METRICS[name], "prediction", "references") for name in ("squad_exact_match", "squad_f1")},
        group=_group,
        told=[f"bad row {error}" for error in left_out[:5]],
    )


def _answer(
    asked: Sequence[Asked], size: int, longest: int, base: Base, model: Any, todo: Sequence[int]
) -> Iterator[tuple[int, Answer]]:
    for at, answer in answer_questions(base, model, [asked[row] for row in todo], size, longest):
        yield todo[at], answer


def _group(answer: Answer) -> str:
    """Whether the question has an answer, where not all have one."""
    if answer["null_score"] is None:
        return ""
    return "with an answer" if answer["references"] else "without an answer"
