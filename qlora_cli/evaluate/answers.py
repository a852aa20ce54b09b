"""Answers on disk: a line of JSON each, behind a first line that says whose they are, so that a run can be taken up."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.suite import Answer

Key = dict[str, str]
"""What the answers of a file depend on: digests of the rows and of the model."""


def read_answers(path: Path, key: Key) -> tuple[dict[int, Answer], int]:
    """The answers in the file by the number of their row, and the bytes of it that are whole. key: what must be so.

    A last line that a kill tore is left out. Raises UserError where they are of another model or of other rows.
    """
    if not path.exists():
        return {}, 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        return {}, 0
    try:
        theirs = json.loads(whole[0])["key"]
        answers = {entry.pop("row"): entry for entry in map(json.loads, whole[1:])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(path, f"no answers of `qlora eval`: {error}", "move the file away") from error
    for name, what in (("model", "another model"), ("rows", "other rows or settings")):
        if name in key and theirs.get(name) != key[name]:
            todo = "give the suite another name, or measure anew with --again, which replaces them"
            raise UserError(path, f"holds answers of {what}", todo, Exit.REFUSED)
    return answers, sum(map(len, whole))


@contextmanager
def appended(path: Path, key: Key, whole_bytes: int) -> Iterator[IO[str]]:
    """The file, open to append answers behind its whole lines; with its first line where it is new.

    Raises UserError (exit 5) where another process writes to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(path, "another process writes answers to it", "wait for it to end", Exit.IN_USE) from None
        file.truncate(whole_bytes)
        if not whole_bytes:
            file.write(json.dumps({"key": key}) + "\n")
        yield file


def line_of(row: int, answer: Answer) -> str:
    """The line of an answer."""
    return json.dumps({"row": row, **answer}, allow_nan=False) + "\n"
