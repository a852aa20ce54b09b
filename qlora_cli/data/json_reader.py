"""JSON rows: one per line, or the elements of one list, however long; told apart by the first character.

A list is parsed in a window of text that grows only while a row does not fit into it, and at least doubles then, so
that memory depends on the longest row alone and time on the file's size alone.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from qlora_cli.data import lines
from qlora_cli.data.rows import Mark, Read
from qlora_cli.errors import UserError

WINDOW_BYTES = 2**16
_SPACE = re.compile(r"[ \t\r\n]*")
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[\[{\]}]', re.DOTALL)
_SCALAR = re.compile(r"[^\s,\]}]*")
_LONGEST_UNIT = 16  # more than "\\ud83d\\ude00" and -Infinity have; the digits of a number are units of their own
_ONE_PER_LINE = "put one whole object on each line, or all of them in a list"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these keys; Python's own would take the last of two alike."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_json(path: str, start: Mark) -> Iterator[Read]:
    """The values of a file of JSON lines, or of one JSON list."""
    if lines.first_byte(path) == b"[":
        yield from _read_list(path, start)
        return
    for line in lines.read_lines(path, start):
        text = lines.decode(path, line)
        if isinstance(text, UserError):
            yield Read(line.number, text, line.after)
        elif text.strip():
            yield Read(line.number, _line_value(text, f"{path}:{line.number}"), line.after)


def _line_value(text: str, place: str) -> Any | UserError:
    """The one JSON value of a line, or what is wrong with it."""
    try:
        return _DECODER.decode(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        return UserError(f"{place}:{error.colno}", f"broken JSON: {error.msg}", _ONE_PER_LINE)
    except (ValueError, RecursionError) as error:
        return _unreadable(error, place)


def _unreadable(error: ValueError | RecursionError, place: str) -> UserError:
    """What is said about sound JSON that Python does not read: too deep, or a number of 5,000 digits."""
    reason = "is nested too deeply" if isinstance(error, RecursionError) else f"cannot be read: {error}"
    return UserError(place, f"JSON that {reason}", "mend or remove the row")


# ── a list ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Window:
    """The part of a file that is held. Bytes that are not UTF-8 are lone surrogates in it, which UTF-8 cannot hold.

    at: the position in `text`; offset, line: the bytes and line ends before it.
    column: characters between the last line end and `at`; None where that line end stands before the last row, whose
    place is where reading may have been taken up: a message must not depend on that.
    """

    path: str
    file: BinaryIO
    offset: int
    line: int
    column: int | None
    text: str = ""
    at: int = 0
    ended: bool = False
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("surrogateescape")
    )

    def grow(self) -> None:
        """Drop what lies before `at`, and read at least as much again as is left."""
        left = len(self.text) - self.at
        if left > lines.MAX_ROW_BYTES:
            raise lines.too_long(self.path, self.line + 1)
        data = self.file.read(max(WINDOW_BYTES, left))
        self.ended = not data
        self.text = self.text[self.at :] + self.decoder.decode(data, self.ended)
        self.at = 0

    def advance(self, to: int) -> bytes:
        """Move on to a position; the bytes passed."""
        passed = self.text[self.at : to]
        data = passed.encode("utf-8", "surrogateescape")
        self.offset += len(data)
        if num_ends := passed.count("\n"):
            self.line += num_ends
            self.column = len(passed) - passed.rindex("\n") - 1
        elif self.column is not None:
            self.column += len(passed)
        self.at = to
        return data

    def next_char(self) -> str:
        """The next character that is no white space, which is passed; empty at the end of the file."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None, "it matches nothing, too"
            self.advance(space.end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.grow()

    def place(self) -> str:
        """The line of `at`, for messages."""
        return f"{self.path}:{self.line + 1}"


def _read_list(path: str, start: Mark) -> Iterator[Read]:
    """The elements of the list, each with the line that it begins on.

    Raises UserError where the list is broken: where the next row begins can no longer be told.
    """
    with lines.open_bytes(path, start.offset) as file:
        window = _Window(path, file, start.offset, start.number, None if start.offset else 0)
        if start.offset == 0:
            _enter(window)
        behind_row = start.offset > 0
        while window.next_char() != "]":
            if behind_row:
                _pass_comma(window)
            number = window.line + 1
            value = _next_value(window)
            window.column, behind_row = None, True
            yield Read(number, value, Mark(window.line, window.offset))
        window.advance(window.at + 1)
        if window.next_char():
            raise UserError(window.place(), "text after the end of the JSON list", "keep one list per file")


def _enter(window: _Window) -> None:
    """Pass the byte order mark and the bracket that opens the list."""
    window.grow()
    if window.text.startswith("\ufeff"):
        window.advance(1)
        window.column = 0
    bracket = window.next_char()
    assert bracket == "[", "the caller has seen it"
    window.advance(window.at + 1)


def _pass_comma(window: _Window) -> None:
    """Pass the comma between two rows and the white space behind it."""
    if window.next_char() != ",":
        raise UserError(window.place(), "broken JSON: expected ',' or ']' after a row", "mend the list of rows")
    window.advance(window.at + 1)
    window.next_char()


def _next_value(window: _Window) -> Any | UserError:
    """The row that begins at hand, which is passed, or why it cannot be read although its end is known."""
    while True:
        try:
            value, end = _DECODER.raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            if window.ended or _is_certain(error, window.text):
                raise _broken(window, error) from error
            end = None
        except (ValueError, RecursionError) as error:
            value, end = _unreadable(error, window.place()), _end_of_value(window.text, window.at)
            if end is None and window.ended:
                raise value from error
        if end is not None and (window.ended or end + _LONGEST_UNIT < len(window.text)):  # 1 may go on as 1e5
            break
        window.grow()
    undecodable = _undecodable(window, end)
    window.advance(end)
    return undecodable or value


def _is_certain(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text cannot mend this: all that was cut in two at the end of `text` is a string or a short unit."""
    return error.pos + _LONGEST_UNIT < len(text) and not error.msg.startswith("Unterminated string")


def _broken(window: _Window, error: json.JSONDecodeError) -> UserError:
    """A syntax error with its column, or, where the row begins on another's line, with what stands there."""
    window_text, at, pos = window.text, window.at, error.pos
    line_end = window_text.rfind("\n", at, pos)
    line = window.line + window_text.count("\n", at, pos) + 1
    if line_end < 0 and window.column is None:
        place, seen = f"{window.path}:{line}", f" at {window_text[pos : pos + 12]!r}"
    else:
        column = pos - line_end if line_end >= 0 else (window.column or 0) + pos - at + 1
        place, seen = f"{window.path}:{line}:{column}", ""
    return UserError(place, f"broken JSON: {error.msg}{seen}", "mend the list of rows")


def _end_of_value(text: str, at: int) -> int | None:
    """The position behind the JSON value at `at`, found by its brackets alone; None where it lies beyond the text."""
    if text[at] not in "[{":
        scalar = _SCALAR.match(text, at)
        return scalar.end() if scalar else None
    depth = 0
    for token in _TOKEN.finditer(text, at):
        if token[0][0] == '"':
            if not token[1]:
                return None
        else:
            depth += 1 if token[0] in "[{" else -1
            if depth == 0:
                return token.end()
    return None


def _undecodable(window: _Window, end: int) -> UserError | None:
    """An error where a byte before `end` is not UTF-8."""
    try:
        window.text[window.at : end].encode()
    except UnicodeEncodeError as error:
        position = window.at + error.start
        line = window.line + window.text.count("\n", window.at, position) + 1
        what = f"byte 0x{ord(window.text[position]) - 0xDC00:02x} is not UTF-8"
        return UserError(f"{window.path}:{line}", what, "save the file as UTF-8")
    return None
