"""docs/recipe.md and docs/recipe.schema.json, made from the schema: what the loader takes is what they say."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from qlora_cli.recipe.fields import (
    annotation,
    choices,
    describe,
    dotted,
    fields,
    listing,
    same,
    section_of,
    sections,
    today,
)
from qlora_cli.recipe.located_yaml import show
from qlora_cli.recipe.rules import RULES
from qlora_cli.recipe.schema import Recipe, Section

HEAD = """# The recipe

Made from `qlora_cli/recipe/schema.py` by `qlora schema --markdown > docs/recipe.md`: change it there.

A recipe is one YAML 1.2 file: `2e-4` is a number, `no` and `on` are text, and a key that appears twice, an unknown key
or a value of the wrong type is an error with its line and column. Only `model.name_or_path` and `data.train` have no
default. `qlora validate RECIPE` says all that is wrong at once; `--set data.train[0].path=rows.jsonl` replaces any key.
`auto` is legal from the first day and means the best that exists so far.
"""


def recipe_json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors: the loader's types, limits and values of today.

    What it cannot say: keys that exclude each other (rules.py), and that 8.0 is no whole number.
    """
    made = Recipe.model_json_schema(by_alias=True)
    for section in dict.fromkeys(section for _, section in sections()):  # Source is in several places
        holder = made if section is Recipe else made["$defs"][section.__name__]
        holder.pop("title")
        for name, field in fields(section).items():
            holder["properties"][name] = _property(holder["properties"][name], field)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "qlora recipe"}
    return head | {key: value for key, value in made.items() if key != "$defs"} | {"$defs": made["$defs"]}


def recipe_markdown() -> str:
    """Every key of every section in a table, one for all places of the same section, and the rules between keys."""
    places: dict[type[Section], list[str]] = {}
    for path, section in sections():
        places.setdefault(section, []).append(f"`{dotted(path).replace('[0]', '[]')}`" if path else "Top level")
    parts = [HEAD, *("\n".join(_table(", ".join(names), section)) for section, names in places.items())]
    parts.append("\n".join(_rules()))
    return "\n".join(parts)


def _property(made: dict[str, Any], field: FieldInfo) -> dict[str, Any]:
    """One key for an editor: pydantic's types and limits, or the list of values that work today."""
    extra = field.json_schema_extra
    unit = extra.get("unit") if isinstance(extra, dict) else ""
    allowed, later = today(field), _not_yet(field)
    text = f"{field.description}{f' [{unit}]' if unit else ''}{f'. Not available yet: {later}' if later else ''}"
    kept = {key: value for key, value in made.items() if key not in ("title", "unit", "live", "description", "default")}
    out = {"description": text, **(kept if allowed is None else {"enum": allowed})}
    if not field.is_required() and section_of(field.annotation) is None:
        out["default"] = field.get_default(call_default_factory=True)
    return out


def _not_yet(field: FieldInfo) -> str:
    """The legal values whose feature is still to come, in words."""
    allowed = today(field)
    if allowed is None:
        return ""
    spelled = choices(field.annotation) + ([True, False] if bool in _kinds(field) else [])
    later = [value for value in spelled if not any(same(value, other) for other in allowed)]
    return listing(later) if later else f"anything but {listing(allowed)}"


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    return (field.annotation, *getattr(field.annotation, "__args__", ()))


def _table(title: str, section: type[Section]) -> Iterator[str]:
    yield f"## {title}\n\n{inspect.getdoc(section)}\n"
    yield "| key | type | default | unit | effect | not yet |"
    yield "|---|---|---|---|---|---|"
    for name, field in fields(section).items():
        extra = field.json_schema_extra
        unit = extra.get("unit") if isinstance(extra, dict) else ""
        default = "required" if field.is_required() else _default(field)
        kind = describe(annotation(field)).partition(" with the keys")[0]
        cells = [f"`{name}`", kind, default, str(unit or ""), field.description or "", _not_yet(field)]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Section):
        return "its keys' defaults"
    return f"`{default if isinstance(default, str) else show(default).replace(chr(39), '')}`"


def _rules() -> Iterator[str]:
    yield "## What does not go together\n"
    for rule in RULES:
        yield f"- {' '.join((inspect.getdoc(rule) or '').split())}"
    yield ""
