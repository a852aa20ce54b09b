"""Rows of .parquet and .arrow files, a few at a time; entered by counting rows, without converting those before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from qlora_cli.data.csv_reader import refuse_doubles
from qlora_cli.data.lines import first_line, too_short
from qlora_cli.data.rows import Mark, Read
from qlora_cli.errors import UserError

if TYPE_CHECKING:
    from pyarrow import RecordBatch  # type: ignore[import-untyped]

NUM_ROWS = 256
"""Rows that are Python objects at a time: with rows of 10 kB, some 3 MB."""
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_UNCONVERTIBLE = (ValueError, ArithmeticError, LookupError, TypeError)  # bad UTF-8, the year 10000, no such time zone


def read_parquet(path: str, start: Mark) -> Iterator[Read]:
    """Rows of a parquet file. Row groups that lie before `start` are not read at all."""
    from pyarrow import parquet

    with (
        _sound(path, "parquet"),
        parquet.ParquetFile(path, buffer_size=2**16, page_checksum_verification=True) as file,
    ):
        refuse_doubles(path, file.schema_arrow.names, "the schema")
        meta = file.metadata
        if start.number > meta.num_rows:
            raise too_short(path)
        ends = list(accumulate(meta.row_group(group).num_rows for group in range(meta.num_row_groups)))
        groups = [group for group, end in enumerate(ends) if end > start.number]
        if groups:
            batches = file.iter_batches(batch_size=NUM_ROWS, row_groups=groups)
            before = ends[groups[0] - 1] if groups[0] else 0
            yield from _rows(path, batches, before, start.number)


def read_arrow(path: str, start: Mark) -> Iterator[Read]:
    """Rows of an Arrow file, whether it is a stream, as `datasets` writes it, or has an index at its end."""
    import pyarrow

    with _sound(path, "arrow"), pyarrow.memory_map(path) as file:
        is_indexed = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = (pyarrow.ipc.open_file if is_indexed else pyarrow.ipc.open_stream)(file)
        refuse_doubles(path, reader.schema.names, "the schema")
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_indexed else reader
        yield from _rows(path, _checked(batches), 0, start.number)
        file.seek(max(file.tell() - len(_STREAM_END), 0))
        if not is_indexed and file.read(len(_STREAM_END)) != _STREAM_END:
            raise UserError(path, "the stream of rows was not written to its end", "write or copy the file again")


def _checked(batches: Iterator[RecordBatch]) -> Iterator[RecordBatch]:
    """The batches, each found to be whole: a wrong offset in a file would lead out of its memory."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _rows(path: str, batches: Iterator[RecordBatch], number: int, start: int) -> Iterator[Read]:
    """The rows behind the first `start`. number: rows of the file before the first batch."""
    for batch in batches:
        dropped = min(max(start - number, 0), batch.num_rows)
        number += dropped
        for begin in range(dropped, batch.num_rows, NUM_ROWS):
            for value in _values(path, batch.slice(begin, NUM_ROWS), number + 1):
                number += 1
                yield Read(number, value, Mark(number))
    if number < start:
        raise too_short(path)


def _values(path: str, batch: RecordBatch, number: int) -> list[Any]:
    """The rows of a batch as dicts; a row that cannot be one is its UserError. number: that of the first row."""
    try:
        return batch.to_pylist()
    except _UNCONVERTIBLE:
        return [_value(path, batch.slice(index, 1), number + index) for index in range(batch.num_rows)]


def _value(path: str, batch: RecordBatch, number: int) -> Any | UserError:
    """The one row of a batch, or what is wrong with it."""
    try:
        return batch.to_pylist()[0]
    except _UNCONVERTIBLE as error:
        what = f"a value cannot be read: {first_line(error)}"
        return UserError(f"{path}:row {number}", what, "mend or remove the row")


@contextmanager
def _sound(path: str, kind: str) -> Iterator[None]:
    """Turns what pyarrow says of a damaged file into a UserError; the system's own errors pass."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is not UTF-8
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(path, f"broken {kind} file: {first_line(error)}", "write or copy the file again") from error
