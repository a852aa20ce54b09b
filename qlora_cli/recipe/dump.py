"""A recipe, or any plain value, as YAML that both our loader and a YAML 1.1 reader read back to the same."""

from __future__ import annotations

from typing import Any

import yaml

from qlora_cli.recipe.located_yaml import SCALARS
from qlora_cli.recipe.schema import Recipe


class _Dumper(yaml.SafeDumper):
    """PyYAML's, which quotes what YAML 1.1 would misread (`no`); here also what 1.2 would (`2e-4` meant as text)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """A text; one with a line break of Unicode's own is escaped, as a YAML reader would fold it into a space."""
    style = '"' if any(character in value for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
for _tag, _pattern in SCALARS.items():
    _Dumper.add_implicit_resolver(_tag, _pattern, None)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe: every key in schema order, defaults written out. `load_recipe` reads back an equal one."""
    return to_yaml(recipe.model_dump(by_alias=True))


def to_yaml(value: Any) -> str:
    """A plain value as block YAML, keys in the order given; a scalar on one line."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n")
