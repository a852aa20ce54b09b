"""Suites of evaluation over what a run reads: its held-out rows, or rows that a suite names."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import NamedTuple

from qlora_cli.data.examples import Examples
from qlora_cli.data.sources import Part, resolve
from qlora_cli.errors import UserError
from qlora_cli.evaluate.generate_suite import NothingAsked
from qlora_cli.evaluate.loss import HeldOutLoss
from qlora_cli.evaluate.suite import Context, Opened, name_of
from qlora_cli.evaluate.suites import open_suite, suites_of
from qlora_cli.model.base import Found
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Source, Suite
from qlora_cli.train.reading import encode_role, refuse_beyond_context, refuse_parts
from qlora_cli.train.report import Report


class Reading(NamedTuple):
    """How rows are read. today: what a template that prints the date gets. trained: files that no suite may measure."""

    report: Report
    today: date
    trained: Sequence[Part]


def context_of(
    recipe: Recipe,
    found: Found,
    reading: Reading,
    held_out: Examples,
    limit: int | None = None,
) -> Context:
    """What suites are opened with. held_out: the recipe's own held-out rows, read and refused already."""
    report, today = reading.report, reading.today

    def rows(sources: Sequence[Source]) -> Examples:
        if not sources:
            return held_out
        data = recipe.data.model_copy(update={"eval": list(sources), "eval_fraction": 0.0})
        examples = encode_role(recipe.model_copy(update={"data": data}), found, "eval", report, today)
        refuse_beyond_context(found, examples)
        return examples

    return Context(recipe, found, rows, limit, reading.trained)


def measured_in_training(recipe: Recipe, held_out: Examples, suites: Sequence[Opened]) -> list[str]:
    """The figures that an evaluation in training gives."""
    nothing = HeldOutLoss(0.0, None if recipe.model.num_labels == 1 else 0.0, 0, 0)
    names = [f"eval_{name}" for name in nothing.figures(recipe.model.task)] if held_out.rows else []
    return names + [f"{suite.name}.{name}" for suite in suites for name in suite.measures]


def suites_in_training(recipe: Recipe, context: Context, held_out: Examples) -> list[Opened]:
    """The suites of evaluation.during_training. Raises UserError where best_metric is no figure of an evaluation."""
    for suite in recipe.evaluation.suites:  # those that run later too: a file that is not there is told now
        for source in suite.data:
            resolve(source, "eval")
    names, metric = recipe.evaluation.during_training, recipe.evaluation.best_metric
    suites = open_suites(context, names) if names else []
    known = measured_in_training(recipe, held_out, suites)
    if metric is not None and metric not in known:
        what = f"{metric!r} is not measured in training"
        raise UserError("evaluation.best_metric", what, f"choose from {', '.join(known)}")
    return suites


def open_suites(context: Context, names: Sequence[str] = ()) -> list[Opened]:
    """The recipe's suites with their rows read, those of the names if there are any.

    Raises UserError where the `data` of one, or what a task of lm_eval reads its rows from, was trained on. It does not
    see through a task that makes its rows by a function of its own, nor through a copy of a file under another name.
    """
    suites = suites_of(context.recipe, names)
    for suite in suites:
        measured = [part for source in suite.data for part in resolve(source, "eval").parts]
        refuse_parts(context.trained, measured, _where(suite))
    opened = []
    for suite in suites:
        try:
            opened.append(open_suite(suite, context))
        except NothingAsked:
            if names or context.recipe.evaluation.suites:
                raise
            continue  # nobody asked for it: of plain text the loss is all there is
        refuse_parts(context.trained, opened[-1].measured, _where(suite))
    return opened


def _where(suite: Suite) -> str:
    return f"evaluation.suites: {name_of(suite)}"


def need_held_out(recipe: Recipe, names: Sequence[str] = ()) -> bool:
    """Whether one of the suites measures the recipe's held-out rows."""
    return any(not suite.data and suite.suite != "lm_eval" for suite in suites_of(recipe, names))
