"""docs/tasks.md: its recipes load, its rows are of the formats that they stand beside, and it has all of both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from qlora_cli.data.classes import LABELS, TEXTS, Labelled
from qlora_cli.data.formats import check_row, choose_format
from qlora_cli.data.task_rows import formats_of
from qlora_cli.model.heads import TASKS
from qlora_cli.recipe import load_recipe
from qlora_cli.recipe.schema import Model
from qlora_cli.recipe.suite_rules import DEFAULTS
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "tasks.md").read_text(encoding="utf-8")
SECTIONS: dict[str, str] = dict(re.findall(r"\n## `(\w+)`\n(.*?)(?=\n## )", PAGE, re.DOTALL))


def rows_of(task: str) -> list[tuple[str, dict[str, Any]]]:
    """What stands in the first column of a section's table, and the row in the second."""
    found = re.findall(r"^\| (.*?) \| `(\{.*\})` \|$", SECTIONS[task], re.MULTILINE)
    return [(name.replace("`", ""), json.loads(row.replace("\\|", "|"))) for name, row in found]


ROWS = [(task, name, row) for task in SECTIONS for name, row in rows_of(task)]


def test_each_task_has_a_section_and_a_line_in_the_table():
    assert list(SECTIONS) == list(TASKS) == list(get_args(Model.model_fields["task"].annotation))
    for task, suites in DEFAULTS.items():
        line = re.search(rf"^\| `{task}` .*$", PAGE, re.MULTILINE)[0]
        assert all(f"`{suite}`" in line for suite in suites), f"{task} is measured by {suites}"


@pytest.mark.parametrize("task", SECTIONS)
def test_the_recipe_of_a_section_is_valid_and_of_its_task(task: str, tmp_path: Path):
    path = tmp_path / "my.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", SECTIONS[task], re.DOTALL)[1])
    assert load_recipe(path).model.task == task


@pytest.mark.parametrize("task", SECTIONS)
def test_every_format_has_a_row(task: str):
    named = {name for name, _ in rows_of(task)}
    assert named == ({", ".join(texts) for texts in TEXTS} if "classification" in task else set(formats_of(task)))


@pytest.mark.parametrize(("task", "name", "row"), ROWS, ids=[f"{task}-{name}" for task, name, _ in ROWS])
def test_a_row_is_read_by_the_format_that_it_stands_beside(task: str, name: str, row: dict[str, Any]):
    known, format = formats_of(task), "classification" if "classification" in task else name
    if known[format].auto:
        assert choose_format(row, "here", known) == format
    check_row(format, False, row, "here", known)
    read = known[format].read(row, "here")
    if isinstance(read, Labelled):
        assert read.texts == tuple(row[column] for column in name.split(", "))
        assert read.label in [row[column] for column in LABELS if column in row]


def test_every_column_of_a_label_is_named():
    told = re.search(r"a label in (.*?)\. That", SECTIONS["sequence_classification"], re.DOTALL)[1]
    assert re.findall(r"`([^`]+)`", told) == list(LABELS)
