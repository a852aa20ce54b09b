"""Files of rows: exact, located, streaming, from every type, from any row on, whatever the bytes."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from qlora_cli.data import json_reader, lines
from qlora_cli.data.readers import ARROW_READERS, READERS, DataFile, as_row, suffix_of
from qlora_cli.data.rows import BEGINNING, Mark, Read
from qlora_cli.errors import UserError

SHARED = Path(__file__).parents[3] / "shared/data/text"
ROWS = [{"text": "007"}, {"text": "NA"}, {"text": 'héllo, "you"'}]
TEXTS = [*READERS][: -len(ARROW_READERS)]


def pack(path: Path, content: bytes) -> Path:
    """Write bytes, compressed where the name says so."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
        return path
    path.write_bytes(content)
    return path


def write(path: Path, rows: list[dict], group: int = 2) -> Path:
    """Rows in the type of the file; parquet and arrow in groups, an .arrow is a stream."""
    suffix = next(suffix for suffix in ("json", "csv", "tsv", "txt", "parquet", "arrow") if f".{suffix}" in path.name)
    if suffix == "json":
        one_per_line = "".join(json.dumps(row) + "\n" for row in rows)
        return pack(path, (one_per_line if ".jsonl" in path.name else json.dumps(rows, indent=1)).encode())
    if suffix in ("parquet", "arrow"):
        names = dict.fromkeys(name for row in rows for name in row)
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        if suffix == "parquet":
            parquet.write_table(table, path, row_group_size=group)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=group)
        return path
    header = [*rows[0]]
    if suffix == "csv":
        sink = io.StringIO(newline="")
        csv.writer(sink).writerows([header, *([row[name] for name in header] for row in rows)])
        return pack(path, sink.getvalue().encode())
    cells = ["\t".join(row[name] for name in header) for row in rows]
    return pack(path, "".join(line + "\n" for line in (["\t".join(header)] * (suffix == "tsv") + cells)).encode())


def rows_of(path: Path) -> list[Any]:
    return [read.value for read in DataFile(str(path)).read()]


def reading(path: Path, start: Mark = BEGINNING) -> tuple[list[Read], str]:
    """Everything that is read, errors as texts, and the error that ends it."""
    reads: list[Read] = []
    end = ""
    try:
        reads.extend(DataFile(str(path)).read(start))
    except UserError as error:
        end = str(error)
    return [read._replace(value=str(read.value)) if isinstance(read.value, UserError) else read for read in reads], end


def check_every_cut(path: Path) -> None:
    """From the place behind each row, exactly the rest is read, and ends likewise."""
    reads, end = reading(path)
    assert reading(path, BEGINNING) == (reads, end)
    for index, read in enumerate(reads):
        assert reading(path, read.after) == (reads[index + 1 :], end)


@pytest.fixture
def tiny_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_reader, "WINDOW_BYTES", 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("rows")


# ── exact rows ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", READERS)
def test_every_file_type_gives_the_same_exact_rows(tmp_path: Path, suffix: str) -> None:
    assert rows_of(write(tmp_path / f"data{suffix}", ROWS)) == ROWS


@pytest.mark.parametrize("suffix", READERS)
def test_a_changed_file_gives_changed_rows_and_another_digest(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", ROWS)
    before, digest, status = rows_of(path), DataFile(str(path)).digest(), path.stat()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    write(path, ROWS[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert rows_of(path) == before[::-1]
    assert DataFile(str(path)).digest() != digest


def json_rows() -> st.SearchStrategy[list[dict]]:
    leaves = st.text() | st.integers() | st.floats(allow_nan=False) | st.booleans()
    values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
    return st.lists(st.dictionaries(st.text(), values), min_size=1, max_size=5)


@pytest.mark.parametrize("suffix", [suffix for suffix in TEXTS if "json" in suffix])
@settings(max_examples=40, deadline=None)
@given(rows=json_rows(), is_ascii=st.booleans())
def test_any_json_rows_come_back_from_any_row_on(folder: Path, suffix: str, rows: list[dict], is_ascii: bool) -> None:
    text = json.dumps(rows, ensure_ascii=is_ascii)
    if ".jsonl" in suffix:
        text = "".join(json.dumps(row, ensure_ascii=is_ascii) + "\r\n\n" for row in rows)
    path = pack(folder / f"a{suffix}", text.encode("utf-8", "replace"))
    if is_ascii or not any(0xD800 <= ord(character) < 0xE000 for character in text):
        assert rows_of(path) == rows
    check_every_cut(path)


def table(cell: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict]]:
    names = st.lists(cell, min_size=2, max_size=3, unique=True)
    return names.flatmap(lambda keys: st.lists(st.fixed_dictionaries(dict.fromkeys(keys, cell)), min_size=1))


def character(without: str) -> st.SearchStrategy[str]:
    return st.characters(codec="utf-8", exclude_characters=without)


@pytest.mark.parametrize("suffix", [suffix for suffix in TEXTS if ".csv" in suffix])
@settings(max_examples=40, deadline=None)
@given(rows=table(st.text(character("\ufeff"))))
def test_any_csv_cells_come_back_from_any_row_on(folder: Path, suffix: str, rows: list[dict]) -> None:
    path = write(folder / f"a{suffix}", rows)
    assert rows_of(path) == rows
    check_every_cut(path)


@pytest.mark.parametrize("suffix", [suffix for suffix in TEXTS if ".tsv" in suffix])
@settings(max_examples=40, deadline=None)
@given(rows=table(st.text(character("\ufeff\t\n\r"))))
def test_any_tsv_cells_come_back_from_any_row_on(folder: Path, suffix: str, rows: list[dict]) -> None:
    path = write(folder / f"a{suffix}", rows)
    assert rows_of(path) == rows
    check_every_cut(path)


@pytest.mark.parametrize("suffix", [suffix for suffix in TEXTS if ".txt" in suffix])
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(character("\n\ufeff")).filter(lambda text: not text.endswith("\r"))), crlf=st.booleans())
def test_any_lines_come_back_from_any_line_on(folder: Path, suffix: str, texts: list[str], crlf: bool) -> None:
    end = "\r\n" if crlf else "\n"
    path = pack(folder / f"a{suffix}", "".join(text + end for text in texts).encode())
    assert rows_of(path) == [{"text": text} for text in texts if text.strip()]
    check_every_cut(path)


def arrow_rows() -> st.SearchStrategy[list[dict]]:
    leaf = st.text(character(""))
    turns = st.lists(st.fixed_dictionaries({"role": leaf}, optional={"content": leaf}), min_size=1)
    row = st.fixed_dictionaries({"id": st.integers(0, 2**60), "turns": turns}, optional={"score": st.floats(0, 1)})
    return st.lists(row, min_size=1, max_size=9)


@pytest.mark.parametrize("suffix", ARROW_READERS)
@settings(deadline=None)
@given(rows=arrow_rows(), group=st.integers(1, 4))
def test_any_arrow_rows_come_back_from_any_row_on(folder: Path, suffix: str, rows: list[dict], group: int) -> None:
    path = write(folder / f"a{suffix}", rows, group)
    assert rows_of(path) == rows  # Arrow filled what is missing with null
    check_every_cut(path)


@pytest.mark.parametrize("suffix", TEXTS)
@settings(max_examples=40, deadline=None)
@given(content=st.binary() | st.lists(st.sampled_from([b"[", b"]", b"{", b"}", b'"', b",", b"1", b"\xff", b"\n"])))
def test_any_bytes_give_rows_or_messages_from_any_row_on(folder: Path, suffix: str, content: Any) -> None:
    check_every_cut(pack(folder / f"a{suffix}", content if isinstance(content, bytes) else b"".join(content)))


PIECES = rb'{"a": 1} {"\xc3\xa9": " \ud800 [ ] { } " , 1 - 1e5 nul true'.split(b" ")
PIECES += [b", ", b"\n", b" ", b"\xc3\xa9", b"\xff", b'{"a": ', b"9" * 5000]


@settings(deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=30))
def test_a_list_is_read_alike_through_any_window(folder: Path, pieces: list[str]) -> None:
    path = pack(folder / "a.json", b"[" + b"".join(pieces))
    whole = reading(path)
    with pytest.MonkeyPatch.context() as patch:
        for size in (1, 2, 7):
            patch.setattr(json_reader, "WINDOW_BYTES", size)
            assert reading(path) == whole
        check_every_cut(path)


ELEMENTS = st.text(alphabet='{}[]"\\,:1 ', max_size=12).map(json.dumps) | st.just("[[1, {}]]")


@settings(deadline=None)
@given(elements=st.lists(ELEMENTS, max_size=6))
def test_the_end_of_a_value_is_found_by_its_brackets(elements: list[str]) -> None:
    value = f"[{', '.join(elements)}]"
    assert json_reader._end_of_value(f"{value}, 1", 0) == len(value)
    for cut in range(1, len(value)):
        assert json_reader._end_of_value(value[:cut], 0) is None


@pytest.mark.parametrize("suffix", ARROW_READERS)
@settings(deadline=None)
@given(content=st.binary(min_size=1))
def test_any_bytes_are_no_arrow_file(folder: Path, suffix: str, content: bytes) -> None:
    (folder / f"b{suffix}").write_bytes(content)
    with pytest.raises(UserError):  # and no other exception
        rows_of(folder / f"b{suffix}")


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_located_by_the_line_they_begin_on(tmp_path: Path) -> None:
    contents = {
        "a.jsonl": ('\n{"a": "1"}\n\n{"a": "2"}\n', [2, 4]),
        "a.json": ('[\n {"a":\n "1"},\n {"a": "2"}\n]\n', [2, 4]),
        "a.csv": ('a,b\n"x\ny",1\n\nz,2\n', [2, 5]),
        "a.tsv": ("a\tb\n\nx\t1\nz\t2\n", [3, 4]),
        "a.txt": ("a\n \nb", [1, 3]),
    }
    for name, (content, numbers) in contents.items():
        file = DataFile(str(pack(tmp_path / name, content.encode())))
        assert [read.number for read in file.read()] == numbers, name
        assert file.place(7) == f"{tmp_path / name}:7"
    for suffix in ARROW_READERS:
        file = DataFile(str(write(tmp_path / f"a{suffix}", ROWS)))
        assert [read.number for read in file.read()] == [1, 2, 3]
        assert file.place(7) == f"{tmp_path}/a{suffix}:row 7"


def test_a_type_is_known_by_its_last_suffixes_in_any_case() -> None:
    names = {"a.JSONL": ".jsonl", "a.b.csv.GZ": ".csv.gz", "a.json.txt": ".txt", "a.gz": None, "a.parquet.gz": None}
    assert {name: suffix_of(f"folder.json/{name}") for name in names} == names


# ── what a type allows ───────────────────────────────────────────────────────────────────────────────────────────────


def test_nulls_are_no_keys_at_any_depth(tmp_path: Path) -> None:
    pack(tmp_path / "a.jsonl", b'{"a": null, "b": [{"c": null}, null], "d": 0}\n')
    assert rows_of(tmp_path / "a.jsonl") == [{"b": [{}, None], "d": 0}]


@pytest.mark.parametrize("suffix", TEXTS)
def test_a_byte_order_mark_is_dropped(tmp_path: Path, suffix: str) -> None:
    bodies = {"json": '{"text": "\u2028"}\n{"text": "b"}', "csv": '"text"\n\u2028\nb', "tsv": "text\n\u2028\nb"}
    body = next((body for name, body in bodies.items() if name in suffix), "\u2028x\nb")
    expected = [{"text": "\u2028x" if ".txt" in suffix else "\u2028"}, {"text": "b"}]
    path = pack(tmp_path / f"a{suffix}", b"\xef\xbb\xbf" + body.encode())
    assert rows_of(path) == expected
    check_every_cut(path)


@pytest.mark.usefixtures("tiny_windows")
def test_a_list_behind_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.json", b'\xef\xbb\xbf \n[{"a": 12345678901}\n,{"b": "' + "é".encode() * 9 + b'"}]')
    assert rows_of(path) == [{"a": 12345678901}, {"b": "é" * 9}]
    check_every_cut(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_cells_of_any_length_are_read(tmp_path: Path, suffix: str) -> None:
    limit = csv.field_size_limit()
    assert rows_of(pack(tmp_path / f"a{suffix}", b"text\r\n" + b"x" * 300_000 + b"\r\n")) == [{"text": "x" * 300_000}]
    assert csv.field_size_limit() == limit


def test_quotes_in_a_tsv_are_characters(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tsv", b'a\tb\n"x\t" y\n\t\n')
    assert rows_of(path) == [{"a": '"x', "b": '" y'}, {"a": "", "b": ""}]


def test_an_arrow_file_with_an_index_is_read(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with (
        pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pyarrow.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=2)
    assert rows_of(tmp_path / "a.arrow") == ROWS
    check_every_cut(tmp_path / "a.arrow")


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    assert rows_of(path) == ROWS


def test_row_groups_before_the_start_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"text": str(number) * 50} for number in range(100)], group=10)
    first = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    content[first.data_page_offset : first.data_page_offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    assert [read.number for read in DataFile(str(path)).read(Mark(12))] == list(range(13, 101))
    assert "broken parquet file" in reading(path, Mark(8))[1]


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────

DEEP = b'{"a": ' + b"[" * 950 + b"]" * 950 + b"}"
LONG = b'{"a": ' + b"9" * 5000 + b"}"
ENDING = {
    "broken list": ("a.json", b'[{"a": 1},\n {"a": }]', ":2:8:", "broken JSON: Expecting value."),
    "broken list in one line": ("a.json", b'[{"a": 1}, {"a": }]', ":1:", "broken JSON: Expecting value at '}]'."),
    "broken beginning": ("a.json", b'[{"a": }]', ":1:8:", "broken JSON: Expecting value."),
    "break in a row": ("a.json", b'[1, {"a":\n\n  ?}]', ":3:3:", "broken JSON: Expecting value."),
    "open text in a list": ("a.json", b'[\n{"a": "b}, {"a": ""}]', ":2:14:", "broken JSON"),
    "no comma": ("a.json", b'[{"a": 1}\n {"a": 2}]', ":2:", "expected ',' or ']' after a row"),
    "comma too many": ("a.json", b'[{"a": 1},\n]', ":2:1:", "broken JSON: Expecting value."),
    "list not closed": ("a.json", b'[{"a": 1}\n', ":2:", "expected ',' or ']'"),
    "deep row not closed": ("a.json", b"[\n" + b"[" * 200_000, ":2:", "is nested too deeply"),
    "text after the list": ("a.json", b'[{"a": 1}]\n\nx', ":3:", "text after the end"),
    "list of broken bytes": ("a.json", b"[1,\xff]", ":1:", "broken JSON: Expecting value"),
    "open quote": ("a.csv", b'a,b\n1,"2\n3\n4', ":2:", "broken csv: unexpected end of data"),
    "quote in a quote": ("a.csv", b'a\n"b"c"\n', ":2:", "broken csv: ',' expected after '\"'"),
    "same column twice": ("a.csv", b"a,b,a\n1,2,3\n", ":1:", "the header names 'a' twice"),
    "same tsv column twice": ("a.tsv", b"\na\ta\n1\t3\n", ":2:", "the header names 'a' twice"),
    "undecodable header": ("a.csv", b"a\xff\n1\n", ":1:", "byte 0xff at column 2 is not UTF-8"),
    "broken parquet": ("a.parquet", b"PAR1xxxx", ":", "broken parquet file"),
    "broken arrow": ("a.arrow", b"ARROW1xxxx", ":", "broken arrow file"),
    "no arrow": ("a.arrow", b"x", ":", "broken arrow file"),
    "no gzip": ("a.txt.gz", b"x", ":", "broken compressed file"),
    "no zstd": ("a.txt.zst", b"x", ":", "broken compressed file"),
}


@pytest.mark.parametrize("case", ENDING)
def test_damage_behind_which_nothing_can_be_told_ends_the_reading(tmp_path: Path, case: str) -> None:
    name, content, place, what = ENDING[case]
    (tmp_path / name).write_bytes(content)
    message = reading(tmp_path / name)[1]
    assert message.startswith(f"{tmp_path / name}{place} ")
    assert what.lower() in message.lower()


GOING_ON = {
    "broken line": ("a.jsonl", b'{"a": \n', ":1:7:", "broken JSON: Expecting value"),
    "two values in a line": ("a.jsonl", b'{"a": 1} {"a": 2}\n', ":1:10:", "broken JSON: Extra data"),
    "pretty-printed object": ("a.json", b"{\n", ":1:2:", "put one whole object on each line, or all of them in a list"),
    "row that is no object": ("a.jsonl", b"7\n", ":1:", "expected an object with named columns, found the number 7"),
    "list after a row": ("a.jsonl", b'{}\n[{"a": 2}]\n', ":2:", "found a list"),
    "undecodable line": ("a.jsonl", b'{}\r\n{"a": "\xff"}\n', ":2:", "byte 0xff at column 8 is not UTF-8"),
    "deep line": ("a.jsonl", DEEP + b"\n", ":1:", "is nested too deeply"),
    "deeper line": ("a.jsonl", b'{}\n{"a":' + b"[" * 200_000 + b"\n", ":2:", "is nested too deeply"),
    "long number": ("a.jsonl", LONG + b"\n", ":1:", "cannot be read: Exceeds the limit"),
    "list in a list": ("a.json", b'[["x"]', ":1:", "found a list"),
    "deep row of a list": ("a.json", b"[" + DEEP, ":1:", "is nested too deeply"),
    "deeper row of a list": ("a.json", b'[{"a": "]"},\n' + b"[" * 9000 + b'"]"' + b"]" * 9000, ":2:", "too deeply"),
    "long number in a list": ("a.json", b"[" + LONG, ":1:", "cannot be read: Exceeds the limit"),
    "long number as a row": ("a.json", b"[{},\n" + b"9" * 5000 + b"\n", ":2:", "cannot be read: Exceeds the limit"),
    "undecodable row of a list": ("a.json", b'[{},\n{\n"a": "\xe9\xff"}', ":3:", "byte 0xe9 is not UTF-8"),
    "undecodable csv": ("a.csv", b'a,b\n1,"\n\xe9"\n', ":3:", "byte 0xe9 at column 1 is not UTF-8"),
    "ragged csv": ("a.csv", b"a,b\n1,2,3\n", ":2:", "3 cells, but the header has 2 columns"),
    "short csv": ("a.csv", b"a,b\n1\n", ":2:", "1 cell, but the header has 2 columns. Quote cells that hold"),
    "ragged tsv": ("a.tsv", b"a\tb\n1\t2\t3\n", ":2:", "quotes mean nothing here"),
    "undecodable tsv": ("a.tsv", b"a\tb\n1\t\xff\n", ":2:", "byte 0xff at column 3 is not UTF-8"),
    "undecodable text": ("a.txt", b"x\n\xff\n", ":2:", "byte 0xff at column 1 is not UTF-8"),
}
NEXT = {"a.jsonl": b'{"a": 0}', "a.csv": b"0,0", "a.tsv": b"0\t0", "a.txt": b"0"}


@pytest.mark.parametrize("case", GOING_ON)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_damaged_row_does_not_end_the_reading(tmp_path: Path, case: str, packed: str) -> None:
    name, content, place, what = GOING_ON[case]
    behind = b', {"a": 0}]' if content.startswith(b"[") else NEXT.get(name, b'{"a": 0}')
    path = pack(tmp_path / f"{name}{packed}", content + behind)
    *_, damaged, last = rows_of(path)
    assert isinstance(damaged, UserError)
    assert str(damaged).startswith(f"{path}{place} ")
    assert what.lower() in str(damaged).lower()
    assert next(iter(last.values())) in (0, "0")
    check_every_cut(path)


def test_a_value_that_python_cannot_hold_is_one_damaged_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    first, damaged, last = rows_of(tmp_path / "a.parquet")
    assert (first, last) == ({"text": "a"}, {"text": "c"})
    assert str(damaged).startswith(f"{tmp_path}/a.parquet:row 2: a value cannot be read: 'utf-8' codec can't decode")
    check_every_cut(tmp_path / "a.parquet")


def test_a_broken_value_in_an_arrow_file_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    table = pyarrow.table({"text": texts})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert "broken arrow file: In column 0: Invalid: Invalid UTF8" in reading(tmp_path / "a.arrow")[1]


@pytest.mark.parametrize("suffix", ARROW_READERS)
def test_a_schema_with_one_name_twice_is_refused(tmp_path: Path, suffix: str) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    assert reading(path)[1].startswith(f"{path}: the schema names 'a' twice")


def test_a_stream_that_was_not_written_to_its_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", ROWS)
    path.write_bytes(path.read_bytes()[:-8])
    assert reading(path)[1].startswith(f"{path}: the stream of rows was not written to its end. Write or copy")


@pytest.mark.parametrize("suffix", [suffix for suffix in READERS if suffix.endswith((".gz", ".zst"))])
def test_a_compressed_file_that_is_cut_or_corrupt_is_refused(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": hashlib.sha256(b"%d" % number).hexdigest()} for number in range(5000)]
    path = write(tmp_path / f"a{suffix}", rows)
    content = path.read_bytes()
    for broken in (content[:-1], content[: len(content) // 2], content[:30], content + b"rest"):
        path.write_bytes(broken)
        reads, message = reading(path)
        assert message.startswith(f"{path}: broken compressed file: ")
        assert [read.value for read in reads] == rows[: len(reads)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_members_of_a_compressed_file_follow_each_other(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", ROWS)
    path.write_bytes(path.read_bytes() * 2)
    assert rows_of(path) == ROWS * 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt.gz", "a.tsv"])
def test_a_row_that_never_ends_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 2**20)
    monkeypatch.setattr(json_reader, "WINDOW_BYTES", 2**10)
    begin = {"a.json": b'[\n"', "a.csv": b'a\n"\n'}.get(name, b"\n")
    path = pack(tmp_path / name, begin + b"xy\n"[: 2 + (name == "a.csv")] * 2**20)
    message = reading(path)[1]
    assert "the row is longer than 1 MiB. End each row, or split it" in message
    assert message.startswith(f"{path}:{'2:' if name != 'a.csv' else ''}")


@pytest.mark.parametrize("suffix", READERS)
def test_a_file_that_became_shorter_is_not_taken_for_read(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", ROWS)
    reads, _ = reading(path)
    write(path, ROWS[:1])
    assert reading(path, reads[-1].after)[1].startswith(f"{path}: the file has changed: it ends before the place")


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root reads everything
    assert reading(path)[1].startswith(f"{path}: cannot be read: Permission denied. Check the file")
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        DataFile(str(path)).digest()


@pytest.mark.parametrize("suffix", READERS)
def test_a_file_that_is_gone_is_refused(tmp_path: Path, suffix: str) -> None:
    assert f"{tmp_path}/a{suffix}: cannot be read: " in reading(tmp_path / f"a{suffix}")[1]


def test_a_value_that_is_no_object_is_described() -> None:
    assert "found null" in str(as_row(None, "a:1"))
    deep: dict = {}
    for _ in range(2000):
        deep = {"a": deep}
    assert str(as_row(deep, "a:1")) == "a:1: JSON that is nested too deeply. Mend or remove the row."


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PEAK = """
import sys, time, tracemalloc
from qlora_cli.data.readers import DataFile
import pyarrow.parquet
tracemalloc.start()
for path in sys.argv[1:]:
    tracemalloc.reset_peak()
    print(sum(1 for _ in DataFile(path).read()), tracemalloc.get_traced_memory()[1])
assert "torch" not in sys.modules and "datasets" not in sys.modules
"""


def big_rows(number: int) -> Iterator[str]:
    return (json.dumps({"number": index, "text": "é word " * 200}) for index in range(number))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    content = "\n".join(big_rows(30_000)).encode()
    assert len(content) > 40 * 2**20
    listed = b"[" + content.replace(b"\n", b",") + b"]"
    paths = [tmp_path / "a.json", tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.json.zst"]
    for path, text in zip(paths, (listed, content, content, listed), strict=True):
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text, 1))
        else:
            pack(path, text)
    paths.append(write(tmp_path / "a.parquet", [json.loads(row) for row in big_rows(30_000)], 30_000))
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PEAK, *map(str, paths)]
    run = subprocess.run(command, check=True, cwd=root, capture_output=True, text=True)
    for path, line in zip(paths, run.stdout.splitlines(), strict=True):
        number, peak = map(int, line.split())
        assert number == 30_000
        assert peak < 8 * 2**20, path


def test_a_list_of_one_giant_row_takes_linear_time(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.json", b'[{"a": [' + b'"x", ' * 2_000_000 + b'"x"]}, {"b": 1}]')
    first, last = rows_of(path)
    assert (len(first["a"]), last) == (2_000_001, {"b": 1})


# ── real files ───────────────────────────────────────────────────────────────────────────────────────────────────────

REAL = {
    "gsm8k/train.jsonl": (7473, {"question", "answer"}),
    "gsm8k/test.jsonl": (1319, {"question", "answer"}),
    "e2e-nlg/devset.csv": (4672, {"mr", "ref"}),
    "hh-rlhf/test.jsonl.gz": (None, {"chosen", "rejected"}),
    "humaneval/HumanEval.jsonl.gz": (164, {"task_id", "prompt", "canonical_solution", "test", "entry_point"}),
    "glue/MRPC/train.tsv": (None, {"Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"}),
    "glue/SST-2/dev.tsv": (872, {"sentence", "label"}),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real files in {SHARED}")
@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole(name: str) -> None:
    number, columns = REAL[name]
    reads, end = reading(SHARED / name)
    assert end == ""
    assert {frozenset(read.value) for read in reads} == {frozenset(columns)}
    assert number in (None, len(reads))
    for index in (0, len(reads) // 2, len(reads) - 1):
        assert reading(SHARED / name, reads[index].after) == (reads[index + 1 :], "")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real files in {SHARED}")
def test_real_lists_and_texts_are_read_whole() -> None:
    paths = sorted((SHARED / "llamafactory").glob("*.json"))
    assert paths
    for path in paths:
        try:
            expected = json.loads(path.read_text())
        except json.JSONDecodeError:
            expected = [json.loads(line) for line in path.read_text().splitlines()]
        if isinstance(expected, list):
            assert rows_of(path) == [as_row(row, "") for row in expected], path
    for path in sorted(SHARED.glob("*/*.txt")):
        texts = path.read_bytes().decode().split("\n")
        assert rows_of(path) == [{"text": text.removesuffix("\r")} for text in texts if text.strip()]
