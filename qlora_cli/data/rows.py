"""What a row is, and words for what is wrong with one. Imports nothing heavy: the preparing processes load it."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qlora_cli.errors import UserError

Row = dict[str, Any]
Role = Literal["train", "eval"]


class Mark(NamedTuple):
    """A place in a file between two rows.

    number: line ends, or rows, before it; offset: bytes of text before it (0: the file is entered by counting rows);
    state: what a streamed data set of the hub needs to go on, as JSON.
    """

    number: int = 0
    offset: int = 0
    state: str = ""


BEGINNING = Mark()


class Read(NamedTuple):
    """One row as it was read.

    number: its line or row in the file, from 1; value: what stands there, or why it cannot be read;
    after: the place behind it, from which reading can go on.
    """

    number: int
    value: Any | UserError
    after: Mark


def describe(value: Any) -> str:
    """A JSON value in words, for messages: 'a list', 'the number 3'."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value}"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def near_names(path: Path) -> str:
    """', did you mean ...?' with names in the folder of `path` that resemble its own, or an empty string."""
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    try:
        names = sorted(os.listdir(path.parent))
    except OSError:
        return " that we may read"
    close = difflib.get_close_matches(path.name, names, n=3)
    return f" (did you mean {' or '.join(str(path.parent / name) for name in close)}?)" if close else ""


def text_of(row: Row, column: str, where: str) -> str:
    """The text in a column. Raises UserError where it is anything else, or no valid Unicode."""
    value: Any = row.get(column)
    if not isinstance(value, str):
        raise UserError(where, f"{column} is {describe(value)}, not a text", f"make {column} a text")
    return whole_text(value, column, where)


def whole_text(value: str, name: str, where: str) -> str:
    """`value` itself. Raises UserError where it holds half of a character, which no tokenizer can read."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"{name} holds half of a character (U+{ord(value[error.start]):04X}), which has no UTF-8 form"
        raise UserError(where, what, "mend the escape sequence in the row") from error
    return value


def count(number: int, noun: str) -> str:
    """'1 row', '7,473 rows'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
