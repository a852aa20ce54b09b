"""What the model would learn from, before anything is paid for: rows as it sees them, statistics, bad rows."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_cli.data.examples import Examples
from qlora_cli.data.prepare import Unfit
from qlora_cli.data.rows import Role, count
from qlora_cli.data.sources import resolve
from qlora_cli.data.statistics import statistics
from qlora_cli.data.stream import BLOCK
from qlora_cli.data.view import row_of, shown, special_ids
from qlora_cli.errors import UserError
from qlora_cli.model.base import Found, find_base
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.remote import with_whole_paths
from qlora_cli.train.reading import load_role, order_of, positions_of, refuse_trained_on
from qlora_cli.train.report import Report
from qlora_cli.train.run import Run, date_of

SHOWN_ROWS, PAGE_ROWS = 3, 20
"""Examples that are shown of a single source, and on a page."""


def preview(recipe: Recipe, report: Report, role: Role, row: int | None, limit: int | None) -> dict[str, Any]:
    """The statistics of the rows, and some of them as the model sees them. No weight is read.

    row: the number of the only example to show, from 1; else `limit` examples, three or one of each source where None.
    """
    recipe = with_whole_paths(recipe)  # as training does, which finds the rows prepared then
    found = find_base(recipe)
    examples = load(recipe, found, role, report)
    total = len(examples.rows)
    if row is not None and row > total:
        raise UserError(f"--row {row}", f"{count(total, 'example')} in all", f"name a number from 1 to {total}")
    training = recipe.training
    per_step = training.micro_batch_size * training.gradient_accumulation_steps
    streamed = role == "train" and recipe.data.train[0].streaming
    order = order_of(recipe, examples, per_step) if role == "train" and not streamed else None
    told = statistics(examples, recipe, order)
    if limit is None:
        limit = len(examples.sources) if len(examples.sources) > 1 else SHOWN_ROWS
    chosen = shown(examples, limit) if row is None else [row - 1]
    special = special_ids(found.tokenizer, found.stop_token_ids)
    rows = [row_of(examples, at, found.tokenizer, special, recipe.model.labels) for at in chosen]
    return {
        "role": role,
        "model": recipe.model.name_or_path,
        "task": recipe.model.task,
        "sources": [{**asdict(source), "path": from_here(source.path)} for source in examples.sources],
        "statistics": asdict(told),
        "summary": told.words(),
        "notes": [
            *(beginnings(recipe) if streamed else []),
            *(seen(recipe, examples) if role == "eval" else []),
            *examples.losses(),
            *beyond_context(found, examples),
        ],
        "rows": [{**row, "where": from_here(row["where"])} for row in rows],
        "whole": row is not None,
    }


def bad_rows(recipe: Recipe, report: Report, role: Role) -> dict[str, Any]:
    """Every row that cannot be read, proven or trained on, the first 1,000 with place, cause and remedy.

    Rows beyond the length limits are one problem more, where data.on_long_row says that they are an error.
    """
    recipe = with_whole_paths(recipe)
    lenient = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_bad_row": "skip"})})
    told: Examples | Unfit
    try:
        told = load(lenient, find_base(recipe), role, report)
    except Unfit as error:
        told = error
    problems = [{"where": from_here(where), "what": what, "todo": todo} for where, what, todo in told.bad]
    if isinstance(told, Unfit) and (told.num_bad < told.num_rows or not told.num_rows):
        problems.append({"where": from_here(told.where), "what": told.what, "todo": told.todo})
    counts = {"num_rows": told.num_rows, "num_bad": told.num_bad, "num_listed": len(told.bad)}
    return {"role": role, **counts, "problems": problems}


def load(recipe: Recipe, found: Found, role: Role, report: Report) -> Examples:
    """The rows of the role, prepared as training would prepare them. Raises UserError where it has none."""
    try:
        examples = load_role(recipe, found, role, report, date_of(Run(Path(recipe.output_dir))))
    finally:
        report.end()
    if not examples.rows:
        raise UserError("data.eval", "no held-out data", "name rows in data.eval, or set data.eval_fraction")
    return examples


def from_here(where: str) -> str:
    """A place without the path of the folder that we are in."""
    return where.removeprefix(os.path.join(os.getcwd(), ""))


def seen(recipe: Recipe, examples: Examples) -> list[str]:
    """That held-out files are trained on, which training refuses."""
    parts = [part for source in recipe.data.train for part in resolve(source, "train").parts]
    try:
        if not recipe.data.eval_fraction:
            refuse_trained_on(parts, examples)
    except UserError as error:
        return [f"training will refuse this: {error}"]
    return []


def beginnings(recipe: Recipe) -> list[str]:
    """That of streams no more was read than their beginnings."""
    steps = count(recipe.training.max_steps or 0, "step")
    return [f"the first {BLOCK:,} rows of each source at most: it is streamed, and training reads on for {steps}"]


def beyond_context(found: Found, examples: Examples) -> list[str]:
    """What training will refuse: an example of more tokens than the model has positions."""
    context, lengths = found.context, positions_of(examples)
    longest = int(lengths.max())
    if not context or longest <= context:
        return []
    longer = count(int((lengths > context).sum()), "example")
    what = f"the longest example has {longest:,} tokens, the model {context:,} positions"
    return [f"{what}: training will refuse {longer}"]
