"""Rows of .csv and .tsv files with a header; every cell is a text, exactly as it stands: "007" stays.

In a .csv, cells may be quoted and then hold commas, quotes and line breaks. In a .tsv a quote is a character like any
other, as IANA's text/tab-separated-values has it and as corpora such as GLUE are written: their sentences begin with
quotes that nothing closes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qlora_cli.data import lines
from qlora_cli.data.rows import BEGINNING, Mark, Read, count
from qlora_cli.errors import UserError


@dataclass(slots=True)
class _Texts:
    """The lines' texts, one by one. Bytes that are not UTF-8 become lone surrogates: the cells around them stay.

    after: the place behind the last line given out.
    num_bytes, damage: length and first bad byte of the lines given out since `begin_row`.
    """

    path: str
    lines: Iterator[lines.Line]
    after: Mark
    num_bytes: int = 0
    damage: UserError | None = None

    def begin_row(self) -> None:
        """Forget the row before."""
        self.num_bytes, self.damage = 0, None

    def __iter__(self) -> _Texts:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.after = line.after
        self.num_bytes += len(line.data)
        if self.num_bytes > lines.MAX_ROW_BYTES:  # a quote that nothing closes takes in the rest of the file
            raise lines.too_long(self.path, line.number)
        text = lines.decode(self.path, line)
        if isinstance(text, str):
            return text
        self.damage = self.damage or text
        return line.data.decode("utf-8", "surrogateescape")


Split = Callable[[_Texts], Iterator[list[str]]]
"""Lines to the cells of each row; a blank line has none."""


def read_csv(path: str, start: Mark) -> Iterator[Read]:
    """Rows of comma-separated cells. Raises UserError for broken quoting: where the next row begins cannot be told."""
    return _read(path, start, _quoted, "quote cells that hold commas or line breaks")


def read_tsv(path: str, start: Mark) -> Iterator[Read]:
    """Rows of tab-separated cells without quoting."""
    return _read(path, start, _plain, "save cells that hold tabs or line breaks in a .csv: quotes mean nothing here")


def _read(path: str, start: Mark, split: Split, todo: str) -> Iterator[Read]:
    """The rows behind the header, which is read in any case. todo: the remedy for a wrong number of cells."""
    texts = _Texts(path, lines.read_lines(path, BEGINNING), BEGINNING)
    rows = _rows(texts, split)
    first = next(rows, None)
    if first is None:
        return
    header = _header(f"{path}:{first[0]}", first[1], texts.damage)
    if start != BEGINNING:
        texts = _Texts(path, lines.read_lines(path, start), start)
        rows = _rows(texts, split)
    for number, cells in rows:
        if texts.damage is not None:
            yield Read(number, texts.damage, texts.after)
        elif len(cells) != len(header):
            what = f"{count(len(cells), 'cell')}, but the header has {count(len(header), 'column')}"
            yield Read(number, UserError(f"{path}:{number}", what, todo), texts.after)
        else:
            yield Read(number, dict(zip(header, cells, strict=True)), texts.after)


def _rows(texts: _Texts, split: Split) -> Iterator[tuple[int, list[str]]]:
    """The line each row begins on and its cells, without blank lines."""
    number = texts.after.number + 1
    try:
        for cells in split(texts):
            if cells:
                yield number, cells
            number = texts.after.number + 1
            texts.begin_row()
    except csv.Error as error:
        raise UserError(f"{texts.path}:{number}", f"broken csv: {error}", "quote the cell correctly") from error


def _header(place: str, cells: list[str], damage: UserError | None) -> list[str]:
    """The names of the columns; each must be there once."""
    if damage is not None:
        raise damage
    refuse_doubles(place, cells, "the header")
    return cells


def refuse_doubles(place: str, names: list[str], holder: str) -> None:
    """Raises UserError where a column's name is there twice: one of the two would be lost."""
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        what = f"{holder} names {', '.join(map(repr, double))} twice"
        raise UserError(place, what, "give each column its own name")


def _plain(texts: _Texts) -> Iterator[list[str]]:
    """Each line's cells between its tabs."""
    for text in texts:
        whole = lines.without_end(text)
        yield whole.split("\t") if whole else []


def _quoted(texts: _Texts) -> Iterator[list[str]]:
    """Rows of cells of any length; the csv module's limit of 131,072 characters is one per process."""
    reader = csv.reader(texts, strict=True)
    while True:
        limit = csv.field_size_limit(2**31 - 1)
        try:
            cells = next(reader, None)
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        yield cells
