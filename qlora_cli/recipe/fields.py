"""The schema read as data: which keys a section has, what a key may hold, in words, and what of that works today."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic.fields import FieldInfo

from qlora_cli.recipe.located_yaml import KeyPath, show
from qlora_cli.recipe.schema import Recipe, Section

PLAIN = {str: "text", bool: "true or false", int: "a whole number", float: "a number", Any: "anything"}
PLURAL = {str: "texts", bool: "true or false", int: "whole numbers", float: "numbers", Any: "anything"}


@cache
def fields(section: type[Section]) -> dict[str, FieldInfo]:
    """The keys of a section by the name that YAML uses (`from`, not `from_`)."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def annotation(field: FieldInfo) -> Any:
    """The whole type of a field: pydantic keeps the constraints apart from it."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def bare(kind: Any) -> Any:
    """A type without the constraints on it."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a type: itself, unless it is a union."""
    kind = bare(kind)
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def section_of(kind: Any) -> type[Section] | None:
    """The section that a type holds, directly, beside null or as the entries of a list."""
    held = [member for member in members(kind) if member is not type(None)]
    kind = bare(held[0]) if len(held) == 1 else None
    if get_origin(kind) is list:
        kind = bare(get_args(kind)[0])
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def below(kind: Any, step: str | int) -> Any:
    """The type one step down: of a section's key, a list's entry or a mapping's value; None where there is none."""
    for member in map(bare, members(kind)):
        origin, arguments = get_origin(member), get_args(member)
        if isinstance(step, int) and origin is list:
            return arguments[0]
        if isinstance(step, str) and origin is dict:
            return arguments[1]
        if isinstance(member, type) and issubclass(member, Section) and step in fields(member):
            return annotation(fields(member)[str(step)])
    return None


def type_at(path: KeyPath) -> Any:
    """The type that the schema has at a path, None where it has none."""
    kind: Any = Recipe
    for step in path:
        kind = below(kind, step)
    return kind


def field_at(path: KeyPath) -> FieldInfo | None:
    """The field at a path that ends in a section's key."""
    section = section_of(type_at(path[:-1])) if path else None
    return fields(section).get(str(path[-1])) if section else None


def sections(section: type[Section] = Recipe, at: KeyPath = ()) -> Iterator[tuple[KeyPath, type[Section]]]:
    """Every section with its path, depth first in schema order; the entries of a list are at index 0."""
    yield at, section
    for name, field in fields(section).items():
        inner = section_of(field.annotation)
        if inner:
            is_list = get_origin(bare(field.annotation)) is list
            yield from sections(inner, (*at, name, 0) if is_list else (*at, name))


def dotted(path: KeyPath) -> str:
    """`data.train[0].path`, as --set takes it."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def choices(kind: Any) -> list[Any]:
    """The values that a Literal in the type spells out."""
    return [value for member in map(bare, members(kind)) if get_origin(member) is Literal for value in get_args(member)]


def today(field: FieldInfo) -> list[Any] | None:
    """The values whose feature exists: the live ones, the default and a legal auto; None where all values work."""
    extra = field.json_schema_extra
    live = extra.get("live") if isinstance(extra, dict) else None
    if not isinstance(live, list):
        return None
    default = field.get_default(call_default_factory=True)
    auto = ["auto"] if "auto" in choices(field.annotation) else []
    allowed: list[Any] = []
    for value in [*live, default, *auto]:
        if not any(same(value, other) for other in allowed):
            allowed.append(value)
    return allowed


def same(a: Any, b: Any) -> bool:
    """Equality as YAML sees it: 1 is 1.0, but true is not 1."""
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def describe(kind: Any) -> str:
    """What a type takes, in words: `a whole number, at least 1`."""
    parts = [_describe_one(member) for member in members(kind) if member is not type(None)]
    text = " or ".join(parts) + _limits(kind)
    return text if type(None) not in members(kind) else text + (", or null" if "," in text else " or null")


def _describe_one(kind: Any) -> str:
    inner = bare(kind)
    arguments = get_args(inner)
    if inner in PLAIN:
        return PLAIN[inner] + ("" if kind is inner else _limits(kind))
    if get_origin(inner) is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if get_origin(inner) is list:
        return f"a list of {_plural(arguments[0])}"
    if get_origin(inner) is dict:
        return f"a mapping from names to {_plural(arguments[1])}"
    assert issubclass(inner, Section), kind
    return f"a section with the keys {', '.join(fields(inner))}"


def _plural(kind: Any) -> str:
    """What a list or mapping holds; sections have a table of their own in the docs."""
    if section_of(kind):
        return "sections"
    one = describe(kind).removeprefix("one of ")
    return one.replace(PLAIN[bare(kind)], PLURAL[bare(kind)]) if bare(kind) in PLAIN else one


def _limits(kind: Any) -> str:
    """The constraints on a type in words, each after a comma."""
    if get_origin(kind) is not Annotated:
        return ""
    found = []
    for limit in _flat(get_args(kind)[1:]):
        match limit:
            case at.Ge(ge=bound):
                found.append(f"at least {bound}")
            case at.Gt(gt=bound):
                found.append(f"above {bound}")
            case at.Le(le=bound):
                found.append(f"at most {bound}")
            case at.Lt(lt=bound):
                found.append(f"below {bound}")
            case at.MultipleOf(multiple_of=factor):
                found.append(f"a multiple of {factor}")
    return "".join(f", {limit}" for limit in found)


def _flat(metadata: tuple[Any, ...]) -> Iterator[Any]:
    """The constraints of Annotated, those inside of a nested Field too."""
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            yield from entry.metadata
        else:
            yield entry


def listing(values: list[Any]) -> str:
    """`nf4, fp4 or int8`."""
    words = [value if isinstance(value, str) else show(value) for value in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
