"""What of a recipe's values is given: not the default. Rules look at values, never at which keys were written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_cli.recipe.fields import fields
from qlora_cli.recipe.located_yaml import show
from qlora_cli.recipe.problems import Problem
from qlora_cli.recipe.schema import Recipe, Section


def no_effect(recipe: Recipe, section: str, name: str, reason: str) -> Iterator[Problem]:
    """A problem where `section.name` is given although nothing reads it."""
    holder = getattr(recipe, section)
    if given(holder, name):
        what = f"`{name}: {show(getattr(holder, name))}` has no effect {reason}"
        yield Problem((section, name), what, "Delete one of the two")


def given(section: Section, name: str) -> bool:
    """Whether a key holds something else than its default."""
    return bool(plain(section, name) != _default(section, name))


def plain(section: Section, name: str) -> Any:
    """The value of a key by the name that YAML uses."""
    return section.model_dump(by_alias=True)[name]


def _default(section: Section, name: str) -> Any:
    default = fields(type(section))[name].get_default(call_default_factory=True)
    return default.model_dump(by_alias=True) if isinstance(default, Section) else default
