"""Suites opened as `qlora eval` opens them, and asked of a model in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.examples import Examples
from qlora_cli.display import QuietReport
from qlora_cli.evaluate.measuring import figures
from qlora_cli.evaluate.suite import Answer, Context, Opened
from qlora_cli.evaluate.suites import open_suite
from qlora_cli.model.base import Base, find_base, load_base
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Suite
from qlora_cli.train.suites import Reading, context_of


def recipe_of(model: dict[str, Any], **sections: Any) -> Recipe:
    """A recipe on a model, unquantised and in float32; keyword arguments are sections."""
    plain = {"quantization": {"data_type": "none", "compute_dtype": "float32"}}
    return Recipe.model_validate({"model": model, "data": {"train": [{"path": "none.jsonl"}]}, **plain, **sections})


def context(recipe: Recipe, limit: int | None = None) -> Context:
    """What its suites are opened with; there are no held-out rows."""
    return context_of(recipe, find_base(recipe), Reading(QuietReport(), date(2026, 1, 1), []), Examples(), limit)


def opened(recipe: Recipe, limit: int | None = None, **suite: Any) -> Opened:
    """A suite of the recipe."""
    return open_suite(Suite.model_validate(suite), context(recipe, limit))


def base_of(recipe: Recipe) -> Base:
    return load_base(recipe, torch.device("cpu"))


def answers_of(suite: Opened, base: Base, todo: Sequence[int] | None = None) -> list[Answer]:
    """The answers in the order of the rows, as they come back from a file."""
    rows = range(suite.num_rows) if todo is None else todo
    found = dict(suite.answer(base, base.model, rows))
    assert sorted(found) == sorted(rows), "an answer to each row, once"
    return [json.loads(json.dumps(found[row], allow_nan=False)) for row in sorted(found)]


def figures_of(suite: Opened, base: Base) -> dict[str, float]:
    return figures(suite, answers_of(suite, base))


def write(path: Path, rows: Sequence[Any]) -> dict[str, Any]:
    """A file of rows, as a source of a recipe."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path)}
