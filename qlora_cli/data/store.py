"""Prepared examples on disk, mapped into memory: a million rows cost a few pages.

A folder holds `tokens.u32`, the token ids of all examples one behind the other with the bit TRAINED where trained;
`rows.i64`, (end, trained tokens, part, number) of each example; and `index.json`, written last. Little-endian.
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
from typing import Any, overload

import numpy as np

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.hub import HubData
from qlora_cli.data.readers import DataFile
from qlora_cli.data.sources import Part
from qlora_cli.data.worker import TRAINED
from qlora_cli.errors import Exit, UserError

TOKENS, ROWS, INDEX = "tokens.u32", "rows.i64", "index.json"


class StoredRows(Sequence[Example]):
    """The examples of a folder in their order, each read when it is asked for.

    lengths, num_trained: tokens, and trained tokens, of every example, int64.
    """

    def __init__(self, folder: Path, num_rows: int, num_tokens: int, parts: Sequence[Part]) -> None:
        self._ids = _mapped(folder / TOKENS, np.dtype("<u4"), (num_tokens,))
        table = _mapped(folder / ROWS, np.dtype("<i8"), (num_rows, 4))
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
        part, number = self._places[at]
        return decoded(stored, self._parts[part].place(int(number)))


def decoded(stored: np.ndarray[Any, Any], where: str) -> Example:
    """The example that these stored ids are."""
    ids = stored & (TRAINED - 1)
    labels = np.where(stored >= TRAINED, ids.astype(np.int64), IGNORE_INDEX)
    return Example(ids.tolist(), labels.tolist(), where)


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

    def add(self, ids: array[int], rows: Sequence[tuple[int, int, int, int]]) -> None:
        """Appends examples; rows: tokens, trained tokens, part and number of each."""
        if not rows:
            return
        data = np.frombuffer(ids, np.uint32).astype("<u4").tobytes()
        table = np.array(rows, "<i8")
        assert table[:, 0].sum() == len(ids), "the examples are all of the tokens"
        self.lengths.update(table[:, 0].tobytes())
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
        """SHA-256 of the examples' lengths, ids and labels, in their order; where they came from is not in it."""
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
