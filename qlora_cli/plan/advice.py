"""Which keys of a recipe take less memory with another value, and what they would make of a run that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.model.placement import can_stream
from qlora_cli.recipe import Recipe

Keys = dict[str, Any]
"""Values by key of the recipe: {"training.micro_batch_size": 1}."""

Rehearse = Callable[[Recipe, int], int]
"""Bytes that the device must have for a recipe with rows of so many tokens."""


@dataclass(frozen=True)
class Change:
    """A key of the recipe, the value that it should have, and the memory of the recipe with this change alone."""

    key: str
    value: Any
    num_bytes: int


@dataclass(frozen=True)
class Together:
    """Several keys, the values that they should have, and the memory of the recipe with all of them."""

    keys: Keys
    num_bytes: int


ROWS, RANK = "training.micro_batch_size", "adapter.r"
"""Keys of which a smaller number takes less memory."""

LEAST_RANK = 8
"""No lower rank is offered: it makes hardly anything smaller still."""

REPLACED: dict[str, tuple[str, ...]] = {
    "training.optimizer": ("paged_adamw_8bit", "adamw_8bit"),
    "quantization.compute_dtype": ("bfloat16", "float16", "auto"),
    "quantization.data_type": ("nf4", "fp4", "int4", "nf2", "int2"),
}
"""The value that takes less memory, and behind it those that it is not offered for."""


MEMORY = "training.memory"
LEANER = {"fast": ("offload", "lean"), "auto": ("offload", "lean"), "offload": ("lean",), "lean": ()}
"""Its values that take less of a GPU's memory, the mildest first; fast keeps nothing where there is no room."""


def offers(recipe: Recipe, recomputes_all: bool, kind: str) -> list[Keys]:
    """Values that take less memory and that the recipe does not have, each alone, the mildest first."""
    found: list[Keys] = [] if recomputes_all else [{"training.gradient_checkpointing": True}]
    for key, values in REPLACED.items():
        section, _, name = key.partition(".")
        if getattr(getattr(recipe, section), name) not in values:
            found.append({key: values[0]})
    leaner = LEANER[recipe.training.memory] if kind == "cuda" else ()
    return [*found, *({MEMORY: value} for value in leaner if value != "lean" or can_stream(recipe))]


def ranks(recipe: Recipe) -> list[int]:
    """Lower ranks, each half of the one before; none for an adapter that goes on from another, which has its own."""
    rank, found = recipe.adapter.r, []
    while recipe.adapter.from_ is None and rank >= 2 * LEAST_RANK:
        rank //= 2
        found.append(rank)
    return found


def changed(recipe: Recipe, keys: Keys) -> Recipe:
    """The recipe with these keys replaced; they are of its sections."""
    for key, value in keys.items():
        section, _, name = key.partition(".")
        part = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: part})
    return recipe


def alone(recipe: Recipe, tried: Iterable[Keys], length: int, budget_bytes: int, rehearse: Rehearse) -> list[Change]:
    """Those of the keys each of which makes the run fit by itself."""
    found = []
    for keys in tried:
        with suppress(UserError):  # of a model whose layers cannot be streamed
            num_bytes = rehearse(changed(recipe, keys), length)
            found += [Change(key, value, num_bytes) for key, value in keys.items() if num_bytes <= budget_bytes]
    return found


def length_keys(recipe: Recipe, length: int) -> Keys:
    """The key that bounds rows to so many tokens, where it is one."""
    if recipe.data.source_max_length is not None:
        return {}
    return {"data.max_length": length // 2 if recipe.model.task == "seq2seq_lm" else length}
