"""Rows of a data source: a local json, jsonl, csv or parquet file, or a data set of the hub.

Local files are read here and not by the builders of `datasets`: those infer one schema for the whole file (a missing
field becomes null, "007" in a csv becomes 7, mixed types are refused without a line number), copy every file to the
user's disk cache, and can serve the copy after the file has changed. What is read here is exact, located, uncached, and
opens no socket. A null counts as a missing key wherever it stands, because Arrow files cannot tell the two apart.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from qlora_cli.errors import Exit, UserError
from qlora_cli.recipe.schema import Source

Row = dict[str, Any]
Role = Literal["train", "eval"]
Located = tuple[str, Any]
"""Where a row stands, as file:line, and what was found there."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w{0,7}")  # .jsonl is one, the .0 of owner/corpus-v1.0 is not


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one source in their order; `where[i]` is the place of `rows[i]`, as file:line."""

    rows: list[Row]
    where: list[str]


def load_rows(source: Source, role: Role) -> Rows:
    """Read the first `source.limit` rows (all where null).

    Raises UserError for a missing, unreadable or empty file, and at the line of the first row that cannot be read.
    """
    located = _hub_rows(source, role) if _on_hub(source.path) else _local_rows(source)
    rows, where = [], []
    for place, row in islice(located, source.limit):
        if not isinstance(row, dict):
            what = f"expected an object with named columns, found {describe(row)}"
            raise UserError(place, what, "make each row an object")
        try:
            rows.append(_without_nulls(row))
        except RecursionError as error:
            raise UserError(place, "JSON that is nested too deeply", "mend or remove the row") from error
        where.append(place)
    if not rows:
        raise UserError(source.path, "holds no rows", "name a source with at least one row")
    return Rows(rows, where)


def describe(value: Any) -> str:
    """A JSON value in words, for messages: 'a list', 'the number 3'."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value}"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _on_hub(path: str) -> bool:
    """Whether a path means the hub: nothing of that name is here, and it has the form of a hub id, not of a file."""
    if os.path.lexists(path) or not _HUB_ID.fullmatch(path):
        return False
    folder, name = os.path.split(path)
    in_folder = folder != "" and os.path.isdir(folder)
    return not in_folder and not _FILE_SUFFIX.fullmatch(Path(name).suffix)


def _without_nulls(value: Any) -> Any:
    """The same value without the keys that hold null, at any depth of objects and lists."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


# ── local files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _local_rows(source: Source) -> Iterator[Located]:
    """The located rows of a file, by its suffix."""
    path = Path(os.path.expanduser(source.path))
    try:
        yield from _reader(path, source)(path)
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise UserError(path, what, "check the file and its permissions") from error


def _reader(path: Path, source: Source) -> Callable[[Path], Iterator[Located]]:
    """The function that reads the file, which is there and not empty."""
    if not os.path.lexists(path):
        raise UserError(path, "no such file" + near_names(path), "correct the path of the data source")
    if path.is_dir():
        raise UserError(path, "is a folder; folders are not available yet", "name one file of it")
    if not path.is_file():
        raise UserError(path, "is not a regular file", "name a file on disk")
    if source.split is not None or source.name is not None:
        key = "split" if source.split is not None else "name"
        raise UserError(path, f"{key} is set, but a file has none", f"remove {key}: it belongs to hub data sets")
    if path.suffix.lower() not in READERS:
        raise UserError(path, f"unknown file type {path.suffix!r}", f"use one of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise UserError(path, "the file is empty", "name a file with at least one row")
    return READERS[path.suffix.lower()]


def near_names(path: Path) -> str:
    """', did you mean ...?' with names in the folder of `path` that resemble its own, or an empty string."""
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    close = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), n=3)
    return f", did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""


def _text_lines(path: Path) -> Iterator[str]:
    """The file's lines with their ends, decoded one by one so that a bad byte has a line number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8"
                raise UserError(f"{path}:{number}", what, "save the file as UTF-8") from error


def _json_rows(path: Path) -> Iterator[Located]:
    """A JSON list of objects, or one object per line: told apart by the first character, not by the suffix."""
    lines = ((number, line) for number, line in enumerate(_text_lines(path), 1) if line.strip())
    for row, (number, line) in enumerate(lines):
        if row == 0 and line.lstrip().startswith("["):
            yield from _json_list(path, "".join(_text_lines(path)))
            return
        yield f"{path}:{number}", _json_value(path, line.rstrip("\r\n"), 0, number)[0]


def _json_list(path: Path, text: str) -> Iterator[Located]:
    """The elements of the JSON list that `text` consists of, each with the line that it begins on."""
    at, line, counted = text.index("[") + 1, 1, 0
    comma = False  # whether an element must follow
    while True:
        at = _skip_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]" and not comma:
            break
        value, at = _json_value(path, text, at, 1)
        yield f"{path}:{line}", value
        at = _skip_space(text, at)
        comma = text[at : at + 1] == ","
        if not comma and text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            what = "broken JSON: expected ',' or ']' after a row"
            raise UserError(f"{path}:{line}", what, "mend the list of rows")
        at += comma
    if (rest := _skip_space(text, at + 1)) < len(text):
        line += text.count("\n", counted, rest)
        raise UserError(f"{path}:{line}", "text after the end of the JSON list", "keep one list per file")


def _skip_space(text: str, at: int) -> int:
    """The first position from `at` on that holds no JSON white space."""
    while text[at : at + 1] and text[at] in " \t\r\n":
        at += 1
    return at


def _json_value(path: Path, text: str, at: int, first_line: int) -> tuple[Any, int]:
    """The JSON value at `text[at:]` and the position behind it; a whole line must be one value."""
    try:
        if at == 0:
            return json.loads(text), len(text)
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        place = f"{path}:{first_line + error.lineno - 1}:{error.colno}"
        todo = "put one whole object on each line, or all of them in a list"
        raise UserError(place, f"broken JSON: {error.msg}", todo) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"cannot be read: {error}"
        line = first_line + text.count("\n", 0, at)
        raise UserError(f"{path}:{line}", f"JSON that {reason}", "mend or remove the row") from error


_DECODER = json.JSONDecoder()


def _csv_rows(path: Path) -> Iterator[Located]:
    """Rows of a comma-separated file with a header; every cell is a text, exactly as it stands."""
    reader = csv.reader(_text_lines(path), strict=True)
    header: list[str] | None = None
    begin = 1
    try:
        for cells in _wide_cells(reader):
            place, begin = f"{path}:{begin}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _csv_header(place, cells)
            elif len(cells) != len(header):
                what = f"{len(cells)} cells, but the header has {len(header)} columns"
                raise UserError(place, what, "quote cells that hold commas or line breaks")
            else:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}", f"broken csv: {error}", "quote the cell correctly") from error


def _wide_cells(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The reader's rows with cells of any length; the csv module's limit of 131,072 characters is one per process."""
    while True:
        limit = csv.field_size_limit(2**31 - 1)
        try:
            cells = next(reader, None)
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        yield cells


def _csv_header(place: str, cells: list[str]) -> list[str]:
    """The names of the columns; each must be there once."""
    double = sorted({name for name in cells if cells.count(name) > 1})
    if double:
        what = f"the header names {', '.join(map(repr, double))} twice"
        raise UserError(place, what, "give each column its own name")
    return cells


def _parquet_rows(path: Path) -> Iterator[Located]:
    """Rows of a parquet file, a few thousand at a time."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(path, f"broken parquet file: {error}", "write or copy the file again") from error


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


# ── the hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _hub_rows(source: Source, role: Role) -> Iterator[Located]:
    """Rows of a hub data set, through the cache of `datasets`."""
    import datasets
    from datasets.exceptions import DatasetsError

    todo = "check the id, the name and the split, or download the rows and name the file"
    try:
        split = source.split or _default_split(datasets.get_dataset_split_names(source.path, source.name), role)
        dataset = datasets.load_dataset(source.path, source.name, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # the hub's HTTP errors are OSErrors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"is no local file, and the hub does not give it: {reason}"
        code = Exit.ENVIRONMENT if isinstance(error, ConnectionError) else Exit.USAGE
        raise UserError(source.path, what, todo, code) from error
    for number, row in enumerate(dataset, 1):
        yield f"{source.path}[{split}]:row {number}", row


def _default_split(splits: list[str], role: Role) -> str:
    """`train` for training; for evaluation `test`, else `validation`."""
    wanted = ("train",) if role == "train" else ("test", "validation")
    found = [name for name in wanted if name in splits]
    if not found:
        raise ValueError(f"it has no split {' or '.join(wanted)}, only {', '.join(splits)}")
    return found[0]
