"""From a file and overrides to a Recipe, or to every problem at once with its place, the value seen and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_cli.errors import UserError, UserErrors
from qlora_cli.recipe.fields import (
    bare,
    below,
    choices,
    describe,
    dotted,
    field_at,
    fields,
    listing,
    members,
    same,
    section_of,
    sections,
    today,
    type_at,
)
from qlora_cli.recipe.located_yaml import CORE, SCALARS, KeyPath, Located, Place, read_yaml, show
from qlora_cli.recipe.overrides import apply_override
from qlora_cli.recipe.peers import advice
from qlora_cli.recipe.problems import Problem
from qlora_cli.recipe.rules import broken_rules
from qlora_cli.recipe.schema import Recipe, Section


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, after `a.b=value` overrides. Raises UserErrors: all of its problems, by position."""
    return recipe_of(*read_yaml(path), overrides)


def recipe_of(values: dict[str, Any], located: Located, overrides: Sequence[str] = ()) -> Recipe:
    """As load_recipe, of plain values with their places; both take the overrides in."""
    refused = []
    for order, text in enumerate(overrides, start=1):
        try:
            apply_override(values, located, text, order)
        except UserError as error:
            refused.append(error)
    if refused:
        raise UserErrors(refused)
    recipe, problems = check(values)
    if recipe is None or problems:
        found = sorted((_place(problem, located), problem.what, problem.todo) for problem in problems)
        raise UserErrors([UserError(*problem) for problem in found])
    return recipe


def check(values: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe that plain values make, None where they make none, and all that is wrong with them."""
    recipe, problems = None, []
    try:
        recipe = Recipe.model_validate(values, by_alias=True, by_name=False)
    except ValidationError as error:
        problems += _schema_problems(error.errors(include_url=False, include_context=False), values)
    problems = _without_repeats(problems, _not_yet(Recipe, values, ()))
    return recipe, _without_repeats(problems, broken_rules(recipe)) if recipe else problems


def _without_repeats(problems: list[Problem], more: Iterator[Problem]) -> list[Problem]:
    """Both, less what is said of a value that is already known to be wrong."""
    wrong = {problem.path[:length] for problem in problems for length in range(1, len(problem.path) + 1)}
    return problems + [problem for problem in more if problem.path not in wrong]


def _place(problem: Problem, located: Located) -> Place:
    """Where to point: the key or value itself, else the nearest thing around it that was written."""
    tables = (located.keys, located.values) if problem.at_key else (located.values, located.keys)
    for length in range(len(problem.path), -1, -1):  # what is missing is missed in the section around it
        for table in tables:
            if problem.path[:length] in table:
                return table[problem.path[:length]]
    raise AssertionError("the root has a place")


def _schema_problems(errors: list[ErrorDetails], values: Mapping[str, Any]) -> list[Problem]:
    """pydantic's errors in our words, one per path: the branches of a union complain one by one of the same value."""
    problems: list[Problem] = []
    wrong: set[KeyPath] = set()
    for error in errors:
        path = _path(error["loc"])
        if error["type"] == "extra_forbidden":
            problems.append(_unknown_key(path, error["input"]))
        elif error["type"] == "missing":
            problems += _missing(path)
        else:
            wrong.add(path)
    # a list with a wrong entry is also no text: keep what is said of the entry
    outer = {path[:length] for path in wrong for length in range(len(path))}
    return problems + [_wrong_value(path, values) for path in sorted(wrong - outer, key=str)]


def _path(loc: tuple[str | int, ...]) -> KeyPath:
    """pydantic's location without the names of union branches in it, such as `literal['auto']` or `list[str]`."""
    kind: Any = Recipe
    path: KeyPath = ()
    steps = iter(loc)
    for step in steps:
        path = (*path, step)
        kind = below(kind, step)
        if sum(member is not type(None) for member in members(kind)) > 1:
            next(steps, None)
    return path


def _missing(path: KeyPath) -> Iterator[Problem]:
    """One problem per required key: a section that is missing altogether misses its own ones."""
    field = field_at(path)
    assert field is not None, path
    section = section_of(field.annotation)
    if section and section is bare(field.annotation):
        for name, inner in fields(section).items():
            if inner.is_required():
                yield from _missing((*path, name))
        return
    todo = f"Add `{path[-1]}` to `{dotted(path[:-1])}`: {field.description} ({describe(field.annotation)})"
    yield Problem(path, f"`{dotted(path)}` is missing", todo)


def _wrong_value(path: KeyPath, values: Mapping[str, Any]) -> Problem:
    """A value of the wrong type or out of range, with what belongs there."""
    value: Any = values
    for step in path:
        value = value[step]
    kind, field = type_at(path), field_at(path)
    allowed = today(field) if field else None
    todo = f"Give {listing(allowed) if allowed else describe(kind)}"
    if value in ("", []):
        todo += ", not an empty one"
    elif isinstance(value, str):
        todo = _for_text(value, kind, todo, allowed or choices(kind))
    elif isinstance(value, bool | int | float) and str in map(bare, members(kind)):
        todo = f"Put it in quotes: {show(str(value).lower())}"
    elif section_of(kind) and section_of(kind) is bare(kind):
        todo = "Write its keys below it, indented, or leave it out: " + ", ".join(fields(section_of(kind) or Section))
    return Problem(path, f"`{dotted(path)}` is {show(value)}", todo, at_key=False)


def _for_text(value: str, kind: Any, todo: str, allowed: list[Any]) -> str:
    """A remedy for text where something else belongs: the nearest choice, YAML 1.1's booleans, numbers in quotes."""
    kinds = set(map(bare, members(kind)))
    near = difflib.get_close_matches(value.lower(), [word for word in allowed if isinstance(word, str)], 1)
    if near:
        return f"Perhaps {near[0]}? Possible are {listing(allowed)}"
    if bool in kinds and value.lower() in ("yes", "no", "on", "off", "true", "false"):
        word = "true" if value.lower() in ("yes", "on", "true") else "false"
        return f"Write {word}" + (", without quotes" if value.lower() == word else f": in YAML 1.2 {value} is text")
    if kinds & {int, float} and any(SCALARS[CORE + name].match(value) for name in ("int", "float")):
        return f"{todo}, without quotes"
    return todo


def _unknown_key(path: KeyPath, value: Any) -> Problem:
    """An unknown key, with where it lives here: by a peer's name, in another section, by the nearest spelling."""
    *around, name = path
    section = section_of(type_at(tuple(around))) or Recipe
    key = str(name) if str(name).isprintable() else show(str(name))  # a line separator would break the message
    seen = f"{key}: {show(value)}" if not isinstance(value, dict | list) else key
    inside = f" in `{dotted(tuple(around))}`" if around else ""
    what = f"unknown key `{seen}`{inside}"
    todo = advice(tuple(around), str(name)) or _elsewhere(str(name)) or _nearest(str(name), section)
    return Problem(path, what, todo or f"The keys here are {', '.join(fields(section))}")


def _elsewhere(name: str) -> str:
    homes = [
        f"in `{dotted(path)}`" if path else "at the top level" for path, home in sections() if name in fields(home)
    ]
    return f"`{name}` belongs {' or '.join(homes)}" if homes else ""


def _nearest(name: str, section: type[Section]) -> str:
    """The key that was probably meant: of this section, else of any other."""
    word = name.lower().replace("-", "_")
    everywhere = {key: dotted((*path, key)) for path, home in reversed(list(sections())) for key in fields(home)}
    for candidates in ({key: key for key in fields(section)}, everywhere):
        near = difflib.get_close_matches(word, candidates, 1, cutoff=0.7)
        if near:
            return f"The nearest key is `{candidates[near[0]]}`"
    return ""


def _not_yet(section: type[Section], values: Any, path: KeyPath) -> Iterator[Problem]:
    """Values of the right type whose feature is still to come. Anything of a wrong shape is reported elsewhere."""
    if isinstance(values, list):
        for index, entry in enumerate(values):
            yield from _not_yet(section, entry, (*path, index))
    if not isinstance(values, dict):
        return
    for name, field in fields(section).items():
        inner = section_of(field.annotation)
        if name not in values:
            continue
        if inner:
            yield from _not_yet(inner, values[name], (*path, name))
            continue
        allowed = today(field)
        if allowed is None or any(same(values[name], value) for value in allowed):
            continue
        what = f"`{dotted((*path, name))}: {show(values[name])}` is not available yet"
        todo = f"Use {listing(allowed)}" if len(allowed) > 1 else f"Leave it out: only {listing(allowed)} works today"
        yield Problem((*path, name), what, todo, at_key=False)
