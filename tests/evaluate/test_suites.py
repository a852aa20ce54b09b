"""The table of suites is that of the rules, and what is measured without a word fits every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from qlora_cli.errors import UserError, UserErrors
from qlora_cli.evaluate.suite import name_of
from qlora_cli.evaluate.suites import SUITES, suites_of
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Suite
from qlora_cli.recipe.suite_rules import DEFAULTS, KEYS_OF, TASKS_OF
from qlora_cli.tasks.table import TASKS
from tests.evaluate.opening import context, opened, recipe_of


def test_every_suite_of_the_schema_opens_and_has_its_tasks() -> None:
    kinds = set(get_args(Suite.model_fields["suite"].annotation))
    assert set(SUITES) == set(TASKS_OF) == kinds
    assert {kind for those in KEYS_OF.values() for kind in those} == kinds
    assert {task for those in TASKS_OF.values() for task in those} == set(TASKS)


def test_the_defaults_can_measure_their_task() -> None:
    assert set(DEFAULTS) == set(TASKS)
    for task, kinds in DEFAULTS.items():
        assert all(task in TASKS_OF[kind] for kind in kinds)


@pytest.mark.parametrize(
    ("task", "kind"), [(task, kind) for kind, known in TASKS_OF.items() for task in TASKS if task not in known]
)
def test_a_suite_of_another_task_is_refused_in_the_recipe(task: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    more = {"choice": ", data: [{path: r.jsonl}]", "lm_eval": ", tasks: [piqa]"}.get(kind, "")
    path.write_text(
        f"model: {{name_or_path: m, task: {task}}}\ndata: {{train: [{{path: r.jsonl}}]}}\n"
        f"evaluation: {{suites: [{{suite: {kind}{more}}}]}}\n"
    )
    with pytest.raises(UserErrors, match=rf"r.yaml:3:\d+: `suite: {kind}` cannot measure `task: {task}`.* Choose from"):
        load_recipe(path)


MODEL = {"name_or_path": "m"}


def test_suites_are_chosen_by_their_names() -> None:
    plain = recipe_of(MODEL)
    assert [suite.suite for suite in suites_of(plain)] == ["loss", "generate"]
    assert [suite.suite for suite in suites_of(plain, ["generate"])] == ["generate"]
    named = [{"suite": "loss"}, {"suite": "loss", "name": "texts"}]
    recipe = recipe_of(MODEL, evaluation={"suites": named})
    assert [name_of(suite) for suite in suites_of(recipe)] == ["loss", "texts"]
    assert [name_of(suite) for suite in suites_of(recipe, ["texts"])] == ["texts"]
    with pytest.raises(UserError, match=r"--suite text: no such suite in the recipe\. Choose from loss, texts\."):
        suites_of(recipe, ["loss", "text"])


@pytest.mark.parametrize("kind", ["loss", "generate"])
def test_a_suite_without_data_is_told_with_its_name(kind: str, tiny_model: Path) -> None:
    with pytest.raises(
        UserError, match=r"evaluation.suites: mine: no rows\. Name files in its `data`, or hold rows out"
    ):
        opened(recipe_of({"name_or_path": str(tiny_model)}), suite=kind, name="mine")


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"), [(None, None, None), (3, None, 3), (None, 5, 5), (3, 5, 3), (9, 5, 5)]
)
def test_the_smaller_limit_counts(ours: Any, theirs: Any, wanted: Any, tiny_model: Path) -> None:
    suite = Suite(suite="loss", limit=theirs)
    assert context(recipe_of({"name_or_path": str(tiny_model)}), ours).limit_of(suite) == wanted
