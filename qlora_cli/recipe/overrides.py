"""`--set training.learning_rate=1e-4`: one value of a recipe replaced from the command line, by the same rules."""

from __future__ import annotations

import re
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.recipe.fields import dotted
from qlora_cli.recipe.located_yaml import KeyPath, Located, Place, parse_yaml, show

NAME = r"[^\s.=\[\]]+"
PATH = re.compile(rf"{NAME}(?:\.{NAME}|\[[0-9]{{1,6}}\])*")
EXAMPLE = "`--set training.learning_rate=1e-4` or `--set 'data.train[0].path=rows.jsonl'`"


def apply_override(values: dict[str, Any], located: Located, text: str, order: int) -> None:
    """Write one `a.b[0].c=value` into `values`, and its place into `located`; the order-th override, from 1.

    The value is YAML, so `[q_proj, v_proj]` is a list; with nothing after the `=` it is null. Raises UserError.
    """
    label = "--set " + (text if len(text) <= 80 else text[:77] + "...")
    name, equals, written = text.partition("=")
    if not equals or not PATH.fullmatch(name.strip()):
        raise UserError(label, "not of the form key=value", f"Write it like {EXAMPLE}")
    value, places = parse_yaml(written, Located(label, order))
    path = _put(values, re.findall(r"[^.\[\]]+", name.strip()), value, label)
    for table in (located.keys, located.values):
        for old in [old for old in table if old[: len(path)] == path]:
            del table[old]
    located.keys[path] = Place(order, 1, 1, label)
    located.keys.update({path + inner: place for inner, place in places.keys.items()})
    located.values.update({path + inner: place for inner, place in places.values.items()})


def _put(values: dict[str, Any], steps: list[str], value: Any, label: str) -> KeyPath:
    """Set `value` at the path, making the mappings and lists on the way; returns the path with numbers for indices."""
    holder: Any = values
    path: KeyPath = ()
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        key = _key_in(holder, step, path, label)
        path = (*path, key)
        if following is None:
            new = value
        else:
            present = holder.get(key) if isinstance(holder, dict) else (holder[key] if int(key) < len(holder) else None)
            new = ([] if following.isdecimal() else {}) if present is None else present
        if isinstance(holder, list) and key == len(holder):
            holder.append(new)
        else:
            holder[key] = new
        holder = new
    return path


def _key_in(holder: Any, step: str, path: KeyPath, label: str) -> str | int:
    """The step as a key of a mapping or an index of a list, at most one beyond its end. Raises UserError."""
    if isinstance(holder, dict):
        return step
    if not isinstance(holder, list):
        raise UserError(label, f"`{dotted(path)}` is {show(holder)}, with no keys below it", "Set the key itself")
    if not step.isdecimal() or len(step) > 6:
        raise UserError(label, f"`{dotted(path)}` is a list, and `{step}` is no index", f"Write `{dotted(path)}[0]`")
    if int(step) > len(holder):
        what = f"`{dotted(path)}` has {len(holder)} entries, so there is no [{step}]"
        raise UserError(label, what, f"The next free one is `{dotted(path)}[{len(holder)}]`")
    return int(step)
