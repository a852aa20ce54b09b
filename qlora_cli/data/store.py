"""Prepared examples on disk, mapped into memory: a million rows cost a few pages.

A folder holds `tokens.u32`, the token ids of all examples one behind the other with the bit TRAINED where trained;
`rows.i64`, (end, trained tokens, part, number, segment) of each example and its two targets as the bits of floats, NaN
where there is none; and `index.json`, written last. Little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, overload

import numpy as np

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.hub import HubData
from qlora_cli.data.readers import DataFile
from qlora_cli.data.sources import Part
from qlora_cli.data.worker import TRAINED
from qlora_cli.errors import Exit, UserError

TOKENS, ROWS, INDEX = "tokens.u32", "rows.i64", "index.json"
COLUMNS = 7
NO_TARGET = int(np.array(np.nan, "<f8").view("<i8"))
"""The bits of NaN."""


class Entry(NamedTuple):
    """What is stored of an example besides its ids. part, number: where it stands; segment, targets: as in Example."""

    num_tokens: int
    num_trained: int
    part: int
    number: int
    segment: int = 0
    targets: Sequence[float] = ()


class StoredRows(Sequence[Example]):
    """The examples of a folder in their order, each read when it is asked for.

    lengths, num_trained: tokens, and trained tokens, of every example, int64.
    """

    def __init__(self, folder: Path, num_rows: int, num_tokens: int, parts: Sequence[Part]) -> None:
        self._ids = _mapped(folder / TOKENS, np.dtype("<u4"), (num_tokens,))
        table = _mapped(folder / ROWS, np.dtype("<i8"), (num_rows, COLUMNS))
        self._ends, self._places, self._parts = table[:, 0], table[:, 2:], parts
        self.lengths = np.diff(self._ends, prepend=0)
        self.num_trained = np.array(table[:, 1])

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        end = int(self._ends[at])
        stored = self._ids[end - int(self.lengths[at]) : end]
        part, number, segment, *bits = self._places[at].tolist()
        return decoded(stored, self._parts[part].place(number), targets_of(bits), segment)


def decoded(stored: np.ndarray[Any, Any], where: str, targets: tuple[float, ...] = (), segment: int = 0) -> Example:
    """The example that these stored ids are."""
    ids = stored & (TRAINED - 1)
    labels = np.where(stored >= TRAINED, ids.astype(np.int64), IGNORE_INDEX)
    return Example(ids.tolist(), labels.tolist(), where, targets, segment)


def targets_of(bits: Sequence[int]) -> tuple[float, ...]:
    """The targets whose bits these are."""
    if bits[0] == NO_TARGET:
        return ()
    values = np.array(bits, "<i8").view("<f8").tolist()
    return tuple(value for value in values if value == value)


def bits_of(targets: Sequence[float]) -> list[int]:
    """Two 64-bit integers that `targets_of` reads."""
    padded = [*targets, *[np.nan] * (2 - len(targets))]
    bits: list[int] = np.array(padded, "<f8").view("<i8").tolist()
    return bits


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A file as an array; an empty one cannot be mapped."""
    return np.memmap(path, dtype, "r", shape=shape) if 0 not in shape else np.zeros(shape, dtype)


class Writer:
    """Writes a folder that `read_index` and `StoredRows` read, for a `with` block; `finish` makes it whole.

    Each of its methods raises UserError where the disk does not take what is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with written(folder):
            folder.mkdir(parents=True)
            self.tokens, self.rows = (folder / TOKENS).open("wb"), (folder / ROWS).open("wb")
        self.num_tokens = self.num_rows = self.num_trained = 0
        self.lengths, self.ids, self.places = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in (self.tokens, self.rows):
            with suppress(OSError):  # told of by what was raised before
                file.close()

    def add(self, ids: array[int], rows: Sequence[Entry]) -> None:
        """Appends examples, whose ids are one behind the other."""
        if not rows:
            return
        data = np.frombuffer(ids, np.uint32).astype("<u4").tobytes()
        table = np.array([[*row[:-1], *bits_of(row.targets)] for row in rows], "<i8")
        assert table[:, 0].sum() == len(ids), "the examples are all of the tokens"
        self.lengths.update(table[:, [0, 4, 5, 6]].tobytes())
        self.ids.update(data)
        self.num_trained += int(table[:, 1].sum())
        table[:, 0] = self.num_tokens + table[:, 0].cumsum()
        with written(self.folder):
            self.tokens.write(data)
            self.rows.write(table.tobytes())
        self.places.update(table.tobytes())
        self.num_tokens += len(ids)
        self.num_rows += len(rows)

    def finish(self, index: dict[str, Any]) -> None:
        """Writes the index, with everything on disk before it."""
        counts = {name: getattr(self, name) for name in ("num_rows", "num_tokens", "num_trained")}
        sums = {TOKENS: self.ids.hexdigest(), ROWS: self.places.hexdigest()}
        index = {**index, **counts, "digest": self.digest(), "sha256": sums}
        text = json.dumps({**index, "own": _own(index)})
        with written(self.folder), (self.folder / INDEX).open("wb") as last:
            for file in (self.tokens, self.rows):
                file.flush()
                os.fsync(file.fileno())
            last.write(text.encode())
            last.flush()
            os.fsync(last.fileno())

    def digest(self) -> str:
        """SHA-256 of the examples' lengths, targets, ids and labels, in order; where they came from is not in it."""
        return hashlib.sha256(self.lengths.digest() + self.ids.digest()).hexdigest()


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into a UserError at the folder of `folder`."""
    try:
        yield
    except OSError as error:
        what = f"prepared rows cannot be written: {error.strerror or error}"
        todo = "free space there, or set QLORA_CACHE to another folder"
        raise UserError(folder.parent, what, todo, Exit.FAILED) from error


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder, or None where it is not whole to the last bit: a gigabyte of ids takes about a second."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
        own = index.pop("own")
        found = {name: _sha256(folder / name) for name in (TOKENS, ROWS)}
        return index if own == _own(index) and found == index["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # or no object at all
        return None


def _own(index: dict[str, Any]) -> str:
    """The index's own SHA-256, without this one."""
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part_to_json(part: Part) -> dict[str, Any]:
    """What tells where a part's rows stand."""
    if isinstance(part, DataFile):
        return {"path": part.path}
    return {"path": part.path, "name": part.name, "split": part.split, "streaming": part.streaming}


def part_from_json(facts: dict[str, Any]) -> Part:
    """The part that `part_to_json` described."""
    return HubData(**facts) if "split" in facts else DataFile(**facts)
