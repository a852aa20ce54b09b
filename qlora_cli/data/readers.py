"""Files of rows: one reader per type, all exact, located and streaming, in memory that does not grow with the file.

Local files are read here and not by the builders of `datasets`: those infer one schema for the whole file (a missing
field becomes null, "007" in a csv becomes 7, mixed types are refused without a line number), copy every file to the
user's disk cache, and can serve the copy after the file has changed. What is read here is exact, located, uncached, and
opens no socket. A null counts as a missing key wherever it stands, because Arrow files cannot tell the two apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_cli.data.arrow_reader import read_arrow, read_parquet
from qlora_cli.data.csv_reader import read_csv, read_tsv
from qlora_cli.data.json_reader import read_json
from qlora_cli.data.lines import COMPRESSIONS, read_txt, readable
from qlora_cli.data.rows import BEGINNING, Mark, Read, Row, describe
from qlora_cli.errors import UserError

Reader = Callable[[str, Mark], Iterator[Read]]
"""(path, start) to what stands behind `start`. A damaged row is a UserError among the values; where the rows behind the
damage cannot be told, UserError is raised."""

TEXT_READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_txt,
}
ARROW_READERS: dict[str, Reader] = {".parquet": read_parquet, ".arrow": read_arrow}
READERS: dict[str, Reader] = {
    **TEXT_READERS,
    **{suffix + packed: reader for packed in COMPRESSIONS for suffix, reader in TEXT_READERS.items()},
    **ARROW_READERS,
}
KNOWN_TYPES = f"{', '.join(TEXT_READERS)} (each also as {' or '.join(COMPRESSIONS)}), {', '.join(ARROW_READERS)}"


@dataclass(frozen=True)
class DataFile:
    """A local file of a known type."""

    path: str

    def place(self, number: int) -> str:
        """Where a row stands, for messages: 'rows.jsonl:7', 'rows.parquet:row 7'."""
        return f"{self.path}:row {number}" if suffix_of(self.path) in ARROW_READERS else f"{self.path}:{number}"

    def read(self, start: Mark = BEGINNING) -> Iterator[Read]:
        """The rows behind `start`; each value is a Row, or the UserError that says why it is none.

        Raises UserError where the file cannot be read, and where the rows behind some damage cannot be told.
        """
        suffix = suffix_of(self.path)
        assert suffix is not None, "resolve() lets only known types through"
        with readable(self.path):
            for number, value, after in READERS[suffix](self.path, start):
                yield Read(number, as_row(value, self.place(number)), after)

    def digest(self) -> str:
        """SHA-256 of the file's bytes, in hex."""
        with readable(self.path), Path(self.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=256)
def suffix_of(path: str) -> str | None:
    """The key of READERS that a file's name ends with, in any case; None for an unknown type."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return next((found for found in ("".join(suffixes[-2:]), "".join(suffixes[-1:])) if found in READERS), None)


def as_row(value: Any, place: str) -> Row | UserError:
    """The value as a row without nulls, or why it is none; a UserError is itself."""
    if isinstance(value, UserError):
        return value
    if not isinstance(value, dict):
        what = f"expected an object with named columns, found {describe(value)}"
        return UserError(place, what, "make each row an object")
    try:
        return without_nulls(value)
    except RecursionError:
        return UserError(place, "JSON that is nested too deeply", "mend or remove the row")


def without_nulls(value: Any) -> Any:
    """The same value without the keys that hold null, at any depth of objects and lists."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
