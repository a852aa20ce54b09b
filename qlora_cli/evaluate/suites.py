"""The suites of evaluation, by the recipe's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlora_cli.errors import UserError
from qlora_cli.evaluate.choice_suite import open_choice
from qlora_cli.evaluate.generate_suite import open_classify, open_generate
from qlora_cli.evaluate.lm_eval_suite import open_lm_eval
from qlora_cli.evaluate.loss_suite import open_loss
from qlora_cli.evaluate.squad_suite import open_squad
from qlora_cli.evaluate.suite import Context, Opened, name_of
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Suite
from qlora_cli.recipe.suite_rules import DEFAULTS

SUITES: dict[str, Callable[[Suite, Context], Opened]] = {
    "loss": open_loss,
    "choice": open_choice,
    "generate": open_generate,
    "classify": open_classify,
    "squad": open_squad,
    "lm_eval": open_lm_eval,
}
"""What opens a suite: reads its rows. recipe/suite_rules.py says which task each can measure."""


def suites_of(recipe: Recipe, names: Sequence[str] = ()) -> list[Suite]:
    """The recipe's suites, those of its task where it names none; of them those of the names, if there are any."""
    found = list(recipe.evaluation.suites) or [Suite(suite=kind) for kind in DEFAULTS[recipe.model.task]]  # type: ignore[arg-type]
    known = [name_of(suite) for suite in found]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--suite {unknown[0]}", "no such suite in the recipe", f"choose from {', '.join(known)}")
    return [suite for suite in found if not names or name_of(suite) in names]


def open_suite(suite: Suite, context: Context) -> Opened:
    """The suite with its rows read. Raises UserError where it has none."""
    return SUITES[suite.suite](suite, context)
