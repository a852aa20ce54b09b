"""The length of a run: its longest row, its steps and its tokens, from the recipe and what is known of the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora_cli.data.limits import Limits
from qlora_cli.recipe import Recipe


@dataclass(frozen=True)
class Rows:
    """What is known of the prepared training rows: their number and all their tokens in an epoch, the longest one's.

    total_steps: of the run, where their order is known.
    """

    number: int
    num_tokens: int
    longest: int
    total_steps: int | None = None


def longest_row(recipe: Recipe, rows: Rows | None) -> int:
    """Tokens of the longest row that a run may see."""
    allowed = Limits.of(recipe.data, recipe.model.task).longest
    filled = recipe.data.packing is True  # whose rows are as long as allowed, whatever they are filled with
    return allowed if rows is None or filled else max(2, min(allowed, rows.longest))


def num_steps(recipe: Recipe, rows: Rows | None) -> int | None:
    """Optimizer steps of the run on one device; with filled rows as many as their tokens need at least."""
    training = recipe.training
    if training.max_steps is not None or rows is None:
        return training.max_steps
    if rows.total_steps is not None:
        return rows.total_steps
    units = rows.number
    if recipe.data.packing is True:
        units = math.ceil(rows.num_tokens / recipe.data.max_length)
    return math.ceil(
        math.ceil(units / (training.micro_batch_size * training.gradient_accumulation_steps)) * training.epochs
    )


def num_tokens(recipe: Recipe, rows: Rows | None, steps: int | None) -> int | None:
    """Tokens that the model reads in training, without padding."""
    training = recipe.training
    if rows is None or steps is None:
        return None
    if training.max_steps is None:
        return math.ceil(rows.num_tokens * training.epochs)
    units = steps * training.micro_batch_size * training.gradient_accumulation_steps
    return units * recipe.data.max_length if recipe.data.packing is True else units * rows.num_tokens // rows.number
