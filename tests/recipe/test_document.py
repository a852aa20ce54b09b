"""What the documents say is what the loader does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qlora_cli.recipe.document import recipe_json_schema, recipe_markdown
from qlora_cli.recipe.fields import fields, sections
from qlora_cli.recipe.load import check
from qlora_cli.recipe.rules import broken_rules

DOCS = Path(__file__).parents[2] / "docs"
KEYS = [(*path, name) for path, section in sections() for name in fields(section)]
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 8, 64, 2**32, -0.5, 0.0, 0.5, 1.5, "", "auto", "x", "none", "nf4", "int2"),
    *([], [1], [-1], ["x"], [""], [None], ["wandb"], [{}], [{"path": "x"}], {}, {"x": 1}, {"x": 0}, {"x": "y"}),
    *({"path": "x"}, {"name_or_path": "x"}, {"train": [{"path": "x"}]}, {"train": []}, {"iterations": 5}, 2048, 5, 6.0),
]


def test_the_json_schema_in_docs_is_fresh():
    written = json.loads((DOCS / "recipe.schema.json").read_text())
    assert written == recipe_json_schema(), "stale: run `qlora schema > docs/recipe.schema.json`"


def test_the_page_in_docs_is_fresh():
    written = (DOCS / "recipe.md").read_text()
    assert written == recipe_markdown(), "stale: run `qlora schema --markdown > docs/recipe.md`"


def test_the_json_schema_is_one_and_closed():
    schema = recipe_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for part in [schema, *schema["$defs"].values()]:
        assert part["additionalProperties"] is False
        assert all(entry["description"] for entry in part["properties"].values())
    assert not {"title", "live", "unit"} & {key for part in schema["$defs"].values() for key in part}


def test_the_page_has_every_key_with_its_effect():
    page = recipe_markdown()
    for _, section in sections():
        for name, field in fields(section).items():
            assert any(f"| `{name}` |" in line and str(field.description) in line for line in page.splitlines()), name


VALIDATOR = jsonschema.Draft202012Validator(recipe_json_schema())


@pytest.mark.parametrize("path", KEYS, ids=lambda path: ".".join(map(str, path)))
def test_the_schema_accepts_what_the_loader_accepts(path: tuple[Any, ...]):
    base: dict[str, Any] = {"model": {"name_or_path": "b"}, "data": {"train": [{"path": "t"}], "eval": [{"path": "e"}]}}
    for value in VALUES:
        values = copy.deepcopy(base)
        holder: Any = values
        for step in path[:-1]:
            holder = holder.setdefault(step, {}) if isinstance(holder, dict) else holder[step]
        holder[path[-1]] = value
        recipe, problems = check(values)
        rules = list(broken_rules(recipe)) if recipe else []
        loads = recipe is not None and all(problem in rules for problem in problems)
        whole = isinstance(value, float) and value.is_integer()  # JSON Schema takes 8.0 for an integer
        if not (whole and any("whole number" in problem.todo for problem in problems)):
            assert VALIDATOR.is_valid(values) == loads, (path, value, problems)
