"""One thing wrong with a recipe, by its key path; load.py turns it into a UserError with file, line and column."""

from __future__ import annotations

from typing import NamedTuple

from qlora_cli.recipe.located_yaml import KeyPath


class Problem(NamedTuple):
    path: KeyPath
    what: str
    todo: str
    at_key: bool = True  # else at the value
