"""Rows of data sources: exact, located, from every file type, without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.data.sources import READERS, describe, load_rows, near_names
from qlora_cli.errors import Exit, UserError
from qlora_cli.recipe.schema import Source

ROWS = [{"question": 'héllo, "you"\nthere', "answer": "007"}, {"question": "NA", "answer": ""}]


def rows_of(path: Path | str, **options: object) -> list[dict]:
    return load_rows(Source(path=str(path), **options), "train").rows


def refusal(path: Path | str, role: str = "train", **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load_rows(Source(path=str(path), **options), role)
    return str(caught.value)


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", READERS)
def test_every_file_type_gives_the_same_exact_rows(tmp_path: Path, suffix: str) -> None:
    assert rows_of(write(tmp_path / f"data{suffix}", ROWS)) == ROWS


@pytest.mark.parametrize("suffix", READERS)
def test_limit_takes_the_first_rows(tmp_path: Path, suffix: str) -> None:
    assert rows_of(write(tmp_path / f"data{suffix}", ROWS), limit=1) == ROWS[:1]


@pytest.mark.parametrize("suffix", READERS)
def test_a_changed_file_gives_changed_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", ROWS)
    before, status = rows_of(path), path.stat()
    write(path, ROWS[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert rows_of(path) == before[::-1]


def test_rows_are_located_by_the_line_they_begin_on(tmp_path: Path) -> None:
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text('\n{"a": "1"}\n\n{"a": "2"}\n')
    array = tmp_path / "a.json"
    array.write_text('[\n {"a":\n "1"},\n {"a": "2"}\n]\n')
    table = tmp_path / "a.csv"
    table.write_text('a,b\n"x\ny",1\n\nz,2\n')
    places = {path.name: load_rows(Source(path=str(path)), "train").where for path in (jsonl, array, table)}
    assert places["a.jsonl"] == [f"{jsonl}:2", f"{jsonl}:4"]
    assert places["a.json"] == [f"{array}:2", f"{array}:4"]
    assert places["a.csv"] == [f"{table}:2", f"{table}:5"]
    parquet = write(tmp_path / "a.parquet", ROWS)
    assert load_rows(Source(path=str(parquet)), "eval").where == [f"{parquet}:row 1", f"{parquet}:row 2"]


def test_missing_fields_and_nulls_are_no_keys_even_inside_messages(tmp_path: Path) -> None:
    rows = [
        {"id": "7", "messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]}
    ]
    both = [*rows, {"messages": [{"role": "user", "content": "c"}]}]
    assert rows_of(write(tmp_path / "a.parquet", both)) == both  # Arrow fills name and id with null
    (tmp_path / "a.jsonl").write_text('{"a": null, "b": [{"c": null}, null], "d": 0}\n')
    assert rows_of(tmp_path / "a.jsonl") == [{"b": [{}, None], "d": 0}]


def test_json_lines_in_a_json_file_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\n{"a": 1.5}')
    assert rows_of(tmp_path / "a.json") == [{"a": "\u2028"}, {"a": 1.5}]


def test_csv_cells_of_any_length_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert len(rows_of(tmp_path / "a.csv")[0]["text"]) == 300_000


@given(
    st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.booleans())), min_size=1), st.booleans()
)
def test_any_json_rows_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict], as_list: bool) -> None:
    path = tmp_path_factory.mktemp("json") / ("a.json" if as_list else "a.jsonl")
    assert rows_of(write(path, rows)) == rows


@given(st.binary(min_size=1))
def test_any_bytes_give_rows_or_a_message(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    for suffix in READERS:
        path = tmp_path_factory.mktemp("bytes") / f"a{suffix}"
        path.write_bytes(content)
        with suppress(UserError):  # and no other exception
            assert rows_of(path)


BROKEN = {
    "broken line": ("a.jsonl", b'{"a": 1}\n{"a": \n', ":2:", "broken JSON: Expecting value"),
    "two values in a line": ("a.jsonl", b'{"a": 1} {"a": 2}\n', ":1:10", "broken JSON: Extra data"),
    "pretty-printed object": ("a.json", b'{\n "a": 1\n}\n', ":1:", "put one whole object on each line"),
    "row that is no object": ("a.jsonl", b'{"a": 1}\n7\n', ":2:", "found the number 7"),
    "list row": ("a.json", b'[{"a": 1},\n ["x"]]', ":2:", "found a list"),
    "undecodable": ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ":2:", "byte 0xff at column 8 is not UTF-8"),
    "undecodable csv": ("a.csv", b"a\n\xe9\n", ":2:", "byte 0xe9 at column 1 is not UTF-8"),
    "list after a row": ("a.jsonl", b'{"a": 1}\n[{"a": 2}]\n', ":2:", "found a list"),
    "nested row": ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 950 + b"]" * 950 + b"}\n", ":2:", "is nested too deeply"),
    "broken list": ("a.json", b'[{"a": 1},\n {"a": }]', ":2:8", "broken JSON"),
    "no comma": ("a.json", b'[{"a": 1}\n {"a": 2}]', ":2:", "expected ',' or ']'"),
    "comma too many": ("a.json", b'[{"a": 1},\n]', ":2:", "broken JSON"),
    "list not closed": ("a.json", b'[{"a": 1}\n', ":2:", "expected ',' or ']'"),
    "text after the list": ("a.json", b'[{"a": 1}]\n\nx', ":3:", "text after the end"),
    "giant number": ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ":1:", "cannot be read: Exceeds the limit"),
    "deep nesting": ("a.jsonl", b'{"a": 1}\n' + b"[" * 200_000, ":2:", "is nested too deeply"),
    "empty file": ("a.jsonl", b"", ": ", "the file is empty"),
    "no rows": ("a.jsonl", b"\n\n", ": ", "holds no rows"),
    "empty list": ("a.json", b"[]", ": ", "holds no rows"),
    "only a header": ("a.csv", b"a,b\n", ": ", "holds no rows"),
    "ragged csv": ("a.csv", b"a,b\n1,2\n1,2,3\n", ":3:", "3 cells, but the header has 2 columns"),
    "open quote": ("a.csv", b'a,b\n1,"2\n', ":2:", "broken csv"),
    "same column twice": ("a.csv", b"a,b,a\n1,2,3\n", ":1:", "the header names 'a' twice"),
    "broken parquet": ("a.parquet", b"PAR1xxxx", ": ", "broken parquet file"),
    "unknown type": ("a.xlsx", b"x", ": ", "unknown file type '.xlsx'. Use one of .json, .jsonl, .csv, .parquet"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_at_its_place(tmp_path: Path, case: str) -> None:
    name, content, place, what = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}{place}")
    assert what.lower() in message.lower()


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    assert f"no such file, did you mean {tmp_path}/train.jsonl?" in refusal(tmp_path / "trian.jsonl")
    assert f"no such file (there is no folder {tmp_path}/data)" in refusal(tmp_path / "data/train.jsonl")
    assert near_names(tmp_path / "zzzzzz") == ""


@pytest.mark.parametrize("path", ["train.jsonl", "data/train.csv", "./data", "a/b/c", "no such", "~/x.json"])
def test_what_looks_like_a_path_never_asks_the_hub(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refusal(path)


def test_a_name_in_a_folder_that_exists_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "data").mkdir()
    assert "no such file" in refusal("data/train")


def test_folders_and_special_files_are_refused(tmp_path: Path) -> None:
    assert "is a folder; folders are not available yet" in refusal(tmp_path)
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is not a regular file" in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize("option", ["split", "name"])
def test_a_file_has_no_split_and_no_name(tmp_path: Path, option: str) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    assert f"{option} is set, but a file has none" in refusal(path, **{option: "train"})


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root reads everything
    assert refusal(path).startswith(f"{path}: cannot be read: Permission denied. Check the file")


OFFLINE = """
import sys
def watch(event, arguments):
    if event in ("socket.__new__", "socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(watch)
from qlora_cli.data.sources import load_rows
from qlora_cli.recipe.schema import Source
for path in sys.argv[1:]:
    assert load_rows(Source(path=path), "train").rows
assert "torch" not in sys.modules and "datasets" not in sys.modules
"""


@pytest.mark.parametrize("namespace", [[], ["unshare", "-n"]], ids=["watched", "without a network"])
def test_local_files_open_no_socket_and_leave_no_cache(tmp_path: Path, namespace: list[str]) -> None:
    if namespace and (
        not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode
    ):
        pytest.skip("this machine does not let us make a network namespace")
    paths = [str(write(tmp_path / f"data{suffix}", ROWS)) for suffix in READERS]
    home = tmp_path / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    subprocess.run(
        [*namespace, sys.executable, "-c", OFFLINE, *paths],
        check=True,
        env={**environment, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert list(home.iterdir()) == []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A hub with one data set, and the calls that it got."""
    import datasets

    calls: list[tuple] = []

    def load(path: str, name: str | None, split: str) -> datasets.Dataset:
        calls.append((path, name, split))
        if path == "owner/missing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/missing' doesn't exist on the Hub")
        if path == "owner/offline":
            raise ConnectionError("Couldn't reach 'owner/offline' on the Hub")
        return datasets.Dataset.from_list([{"text": "a", "id": 1}, {"text": "b"}, {"text": "c"}])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_a_hub_id_is_read_by_split_name_and_limit(hub: list[tuple]) -> None:
    rows = load_rows(Source(path="owner/corpus-v1.0", name="main", limit=2), "train")
    assert rows.rows == [{"text": "a", "id": 1}, {"text": "b"}]
    assert rows.where[1] == "owner/corpus-v1.0[train]:row 2"
    load_rows(Source(path="corpus"), "eval")
    load_rows(Source(path="corpus", split="extra"), "eval")
    assert hub == [
        ("owner/corpus-v1.0", "main", "train"),
        ("corpus", None, "validation"),
        ("corpus", None, "extra"),
    ]


def test_the_hubs_errors_say_that_no_file_is_there_either(hub: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal("owner/missing")
    assert message.startswith("owner/missing: is no local file, and the hub does not give it: Dataset 'owner/missing'")
    with pytest.raises(UserError) as caught:
        load_rows(Source(path="owner/offline"), "train")
    assert caught.value.code == Exit.ENVIRONMENT
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_: ["train"])
    assert "it has no split test or validation, only train" in refusal("corpus", role="eval")


def test_values_are_described_in_words() -> None:
    values = (None, True, 3, "x", [], {}, b"")
    assert [describe(value) for value in values] == [
        *("null", "true", "the number 3", "a text", "a list", "an object", "a bytes"),
    ]
