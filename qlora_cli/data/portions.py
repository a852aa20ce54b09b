"""The rows of a source in portions for the preparing processes, with what cannot be read in its place among them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from qlora_cli.data.cache import Wanted
from qlora_cli.data.formats import choose_format
from qlora_cli.data.rows import Read, Row, describe
from qlora_cli.data.sources import Part, SourceMark, read_parts
from qlora_cli.data.task_rows import TASK_ROWS, formats_of
from qlora_cli.data.worker import Result, Task, shortened
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Source

MOST_ROWS = 256
"""Rows of a portion."""

MOST_CHARACTERS = 4_000_000
"""Characters of a portion, at which it ends: a process holds its rows, texts and tokens at once."""

DEEPEST = 200
"""Objects and lists within each other that a row may have; deeper ones cannot be sent to a process."""


@dataclass
class Portion:
    """Some rows that follow each other.

    task:    those that can be read, for a process
    places:  part and number of each row of the task
    unread:  (rows of the task before it, why) of each other row
    failure: why the rows behind this portion cannot be read
    """

    task: Task
    places: list[tuple[int, int]] = field(default_factory=list)
    unread: list[tuple[int, UserError]] = field(default_factory=list)
    failure: UserError | None = None
    num_characters: int = 0

    @property
    def num_rows(self) -> int:
        """Rows read, those that are none among them."""
        return len(self.places) + len(self.unread)

    @property
    def is_full(self) -> bool:
        """Whether the next row belongs to another portion."""
        return self.num_rows >= MOST_ROWS or self.num_characters >= MOST_CHARACTERS

    def bad_rows(self, result: Result) -> list[UserError]:
        """Why each row that is left out is, in the rows' order. result: what became of the task."""
        bad = [(index, 0, error) for index, error in self.unread]  # before the row of its index
        bad += [(index, 1, UserError(where, what, todo)) for index, where, what, todo in result.bad]
        return [error for _, _, error in sorted(bad, key=lambda one: one[:2])]


def portions(source: Source, parts: Sequence[Part], wanted: Wanted) -> Iterator[Portion]:
    """The rows of a source on the wanted side of eval_fraction."""
    return portions_of(read_parts(parts, source, SourceMark()), source, parts, wanted)


def portions_of(
    reads: Iterable[tuple[int, Read]],
    source: Source,
    parts: Sequence[Part],
    wanted: Wanted,
    format: str | None = None,
) -> Iterator[Portion]:
    """These rows of a source on the wanted side of eval_fraction, those of nested files one by one.

    format: what the first row has chosen where source.format is auto; None: the first of these rows chooses it.
    A row that cannot be read is on every side. Where reading ends with an error, the last portion holds it.
    """
    template = source.template.model_dump() if source.template else None
    name, auto = ("template" if template else source.format), source.format == "auto" and not template
    format = format if auto else name
    portion = Portion(Task([], [], format or "", auto, template))
    try:
        for part, read, value, place in _rows(reads, source, parts, wanted):
            if format is None and not isinstance(value, UserError):
                value, format = _first(value, place, wanted)
                portion.task = Task([], [], format or "", auto, template)
            if isinstance(value, UserError):
                error = UserError(value.where, shortened(value.what), value.todo, value.code)
                portion.unread.append((len(portion.places), error))
            elif is_wanted(value, wanted):
                _append(portion, value, place, (part, read.number))
            if portion.is_full:
                yield portion
                portion = Portion(Task([], [], format or "", auto, template))
    except UserError as error:
        portion.failure = error
    yield portion


def _append(portion: Portion, row: Row, place: str, at: tuple[int, int]) -> None:
    portion.task.rows.append(row)
    portion.task.places.append(place)
    portion.places.append(at)
    portion.num_characters += num_characters(row)


def _rows(
    reads: Iterable[tuple[int, Read]], source: Source, parts: Sequence[Part], wanted: Wanted
) -> Iterator[tuple[int, Read, Row | UserError, str]]:
    """Part, what was read of it, a row of that, and its place; of the rows within one, source.limit at most."""
    rows = TASK_ROWS.get(wanted.settings.task.name)
    expand = rows.expand if rows else None
    number = 0
    for part, read in reads:
        place = parts[part].place(read.number)
        value = _checked(read.value, place)
        if expand is None or isinstance(value, UserError):
            yield part, read, value, place
            continue
        for at, row in enumerate(expand(value), 1):
            number += 1
            if source.limit is not None and number > source.limit:
                return
            inside = place if row is value else f"{place}: question {at}"
            yield part, read, row if isinstance(row, dict) else _no_object(row, inside), inside


def _no_object(value: Any, place: str) -> UserError:
    return UserError(place, f"is {describe(value)} where an object is asked for", "mend the file")


def _first(row: Row, place: str, wanted: Wanted) -> tuple[Row | UserError, str | None]:
    """The row and the format that its columns choose; or why they cannot."""
    try:
        return row, choose_format(row, place, formats_of(wanted.settings.task.name))
    except UserError as error:
        return error, None


def is_wanted(row: Row, wanted: Wanted) -> bool:
    """Whether a row is on the wanted side of eval_fraction.

    It depends on the row's content and the seed alone: rows that are appended move no other, and two equal rows are
    never one trained and one held out.
    """
    if not wanted.eval_fraction:
        return True
    text = json.dumps(row, sort_keys=True, default=_told)
    drawn = int.from_bytes(hashlib.blake2b(f"{wanted.seed} {text}".encode(), digest_size=8).digest())
    return (drawn < wanted.eval_fraction * 2**64) == (wanted.side == "eval")


def _told(value: Any) -> str:
    """What a value that JSON has no form for is, without where it lies in memory."""
    return repr(value) if isinstance(value, bytes | date | time | timedelta | Decimal) else type(value).__name__


def _checked(value: Row | UserError, place: str) -> Row | UserError:
    """The row, unless it is nested too deeply."""
    level: list[Any] = [] if isinstance(value, UserError) else [value]
    for _ in range(DEEPEST):
        level = [child for item in level for child in _children(item) if isinstance(child, dict | list)]
        if not level:
            return value
    what = f"objects and lists are nested more than {DEEPEST} deep"
    return UserError(place, what, "mend or remove the row")


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def num_characters(row: Row) -> int:
    """Characters of all texts in a row, keys among them, at any depth."""
    total, left = 0, [row]
    while left:
        value: Any = left.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
    return total
