"""Bytes and lines of a text file, plain or compressed, from any place on, and the rows of a .txt file.

A compressed file is decompressed by pyarrow, which `datasets` brings along. It cannot be entered in the middle: what
stands before the place is decompressed and dropped, which is far cheaper than parsing it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from qlora_cli.data.rows import Mark, Read
from qlora_cli.errors import UserError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Suffix -> pyarrow's name of the codec."""
MAX_ROW_BYTES = 256 * 2**20
_BUFFER_BYTES = 2**16
_BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line with its end. after: the place behind it."""

    number: int
    data: bytes
    after: Mark


def read_txt(path: str, start: Mark) -> Iterator[Read]:
    """{"text": line} for each line that is not blank, without its line end (LF or CRLF)."""
    for line in read_lines(path, start):
        text = decode(path, line)
        if isinstance(text, UserError):
            yield Read(line.number, text, line.after)
        elif text.strip():
            yield Read(line.number, {"text": without_end(text)}, line.after)


def read_lines(path: str, start: Mark) -> Iterator[Line]:
    """The lines from `start` on, without a byte order mark. Raises UserError for a line beyond MAX_ROW_BYTES."""
    number, offset, _ = start
    with open_bytes(path, offset) as file:
        while data := file.readline(MAX_ROW_BYTES + 1):
            number, offset = number + 1, offset + len(data)
            if len(data) > MAX_ROW_BYTES:
                raise too_long(path, number)
            if offset == len(data):  # the file's first line
                data = data.removeprefix(_BOM)
            yield Line(number, data, Mark(number, offset))


def decode(path: str, line: Line) -> str | UserError:
    """The line's text, or the place of its first byte that is not UTF-8."""
    try:
        return line.data.decode()
    except UnicodeDecodeError as error:
        what = f"byte 0x{line.data[error.start]:02x} at column {error.start + 1} is not UTF-8"
        return UserError(f"{path}:{line.number}", what, "save the file as UTF-8")


def without_end(text: str) -> str:
    """A line without its LF or CRLF; a carriage return elsewhere is text."""
    return text[:-1].removesuffix("\r") if text.endswith("\n") else text


def too_long(path: str, number: int) -> UserError:
    """What is said where a line or a row never seems to end."""
    what = f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB"
    return UserError(f"{path}:{number}", what, "end each row, or split it")


def first_byte(path: str) -> bytes:
    """The first byte of the file that is neither white space nor of a byte order mark; none in a blank file."""
    with open_bytes(path) as file:
        chunk = file.read(_BUFFER_BYTES).removeprefix(_BOM)
        while chunk:
            if found := chunk.lstrip(b" \t\r\n"):
                return found[:1]
            chunk = file.read(_BUFFER_BYTES)
    return b""


@contextmanager
def open_bytes(path: str, offset: int = 0) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed where its suffix says so, behind the first `offset` of them.

    Raises UserError where the file is shorter, and OSError without an errno for a broken compressed stream.
    """
    with Path(path).open("rb") as file:
        codec = COMPRESSIONS.get(Path(path).suffix.lower())
        if codec is None:
            if offset > os.fstat(file.fileno()).st_size:
                raise too_short(path)
            file.seek(offset)
            yield file
            return
        import pyarrow  # type: ignore[import-untyped]

        with io.BufferedReader(pyarrow.CompressedInputStream(file, codec), _BUFFER_BYTES) as stream:
            while offset > 0:
                if not (dropped := stream.read(min(offset, _BUFFER_BYTES))):
                    raise too_short(path)
                offset -= len(dropped)
            yield stream


def too_short(path: str) -> UserError:
    """What is said where a file ends before the place to go on from."""
    what = "the file has changed: it ends before the place where reading stopped"
    return UserError(path, what, "put the file back as it was, or start anew")


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns the system's and the decompressor's errors into UserErrors that name the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None and Path(path).suffix.lower() in COMPRESSIONS:  # it is pyarrow's
            what = f"broken compressed file: {first_line(error)}"
            raise UserError(path, what, "write or copy the file again") from error
        what = f"cannot be read: {error.strerror or error}"
        raise UserError(path, what, "check the file and its permissions") from error


def first_line(error: BaseException) -> str:
    """An error's message up to its first line break, or its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
