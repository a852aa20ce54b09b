"""Prepared examples on disk: whole or not there, and the same bytes for the same examples."""

from __future__ import annotations

import errno
import json
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.hub import HubData
from qlora_cli.data.readers import DataFile
from qlora_cli.data.store import (
    INDEX,
    ROWS,
    TOKENS,
    Entry,
    StoredRows,
    Writer,
    part_from_json,
    part_to_json,
    read_index,
    written,
)
from qlora_cli.data.worker import TRAINED
from qlora_cli.errors import Exit, UserError

PARTS = (DataFile("a.jsonl"), DataFile("b.parquet"), HubData("owner/corpus", None, "train"))
IDS = array("I", [5, 6 | TRAINED, 7, 8, 9 | TRAINED, 1 | TRAINED])
TABLE = [Entry(2, 1, 0, 7), Entry(1, 0, 1, 3, 0, (2.0, 0.1)), Entry(3, 2, 2, 1, 2, (-3.5,))]
EXAMPLES = [
    Example([5, 6], [IGNORE_INDEX, 6], "a.jsonl:7"),
    Example([7], [IGNORE_INDEX], "b.parquet:row 3", (2.0, 0.1)),
    Example([8, 9, 1], [IGNORE_INDEX, 9, 1], "owner/corpus[train]:row 1", (-3.5,), 2),
]


def write(folder: Path, *portions: tuple[array[int], list[Entry]], **index: Any) -> dict[str, Any]:
    with Writer(folder) as writer:
        for portion in portions:
            writer.add(*portion)
        writer.finish(index)
    found = read_index(folder)
    assert found is not None
    return found


def test_what_is_written_is_read_with_labels_places_and_totals(tmp_path: Path) -> None:
    index = write(tmp_path / "a", (IDS, TABLE), tally={"x": 1})
    assert (index["num_rows"], index["num_tokens"], index["num_trained"], index["tally"]) == (3, 6, 3, {"x": 1})
    rows = StoredRows(tmp_path / "a", 3, 6, PARTS)
    assert list(rows) == EXAMPLES
    assert (rows.lengths.tolist(), rows.num_trained.tolist()) == ([2, 1, 3], [1, 0, 2])
    assert rows.lengths.dtype == np.int64
    assert rows[-1] == EXAMPLES[2]
    assert rows[::-2] == EXAMPLES[::-2]
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            rows[beyond]


def test_a_folder_without_examples_is_whole(tmp_path: Path) -> None:
    index = write(tmp_path / "a", (array("I"), []))
    assert len(StoredRows(tmp_path / "a", index["num_rows"], index["num_tokens"], ())) == 0


def test_ids_of_any_vocabulary_come_back(tmp_path: Path) -> None:
    write(tmp_path / "a", (array("I", [TRAINED - 1, (TRAINED - 1) | TRAINED]), [Entry(2, 1, 0, 1)]))
    (row,) = StoredRows(tmp_path / "a", 1, 2, PARTS)
    assert (row.input_ids, row.labels) == ([TRAINED - 1] * 2, [IGNORE_INDEX, TRAINED - 1])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=8), st.data())
def test_the_digest_is_of_the_examples_not_of_how_they_came(
    tmp_path_factory: pytest.TempPathFactory, examples: list[list[int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("a")
    cut = data.draw(st.integers(0, len(examples)))
    digests = []
    for number, groups in enumerate(([examples], [examples[:cut], examples[cut:]], [[one] for one in examples])):
        portions = [
            (array("I", [token for ids in group for token in ids]), [Entry(len(ids), 1, 0, number) for ids in group])
            for group in groups
        ]
        digests.append(write(folder / str(number), *portions)["digest"])
    assert len({*digests}) == 1


def test_the_digest_changes_with_ids_labels_targets_segments_lengths_and_order(tmp_path: Path) -> None:
    variants = [
        (IDS, TABLE),
        (array("I", [5, 6 | TRAINED, 7, 8, 9 | TRAINED, 1]), TABLE),
        (array("I", [4, *IDS[1:]]), TABLE),
        (IDS, [Entry(1, 1, 0, 7), TABLE[1]._replace(num_tokens=2), TABLE[2]]),
        (array("I", [*IDS[3:], *IDS[:3]]), [TABLE[2], TABLE[0], TABLE[1]]),
        (IDS, [TABLE[0], TABLE[1]._replace(targets=(2.0, 0.2)), TABLE[2]]),
        (IDS, [TABLE[0], TABLE[1]._replace(targets=(2.0,)), TABLE[2]]),
        (IDS, [TABLE[0], TABLE[1], TABLE[2]._replace(segment=1)]),
    ]
    digests = {write(tmp_path / str(number), variant)["digest"] for number, variant in enumerate(variants)}
    assert len(digests) == len(variants)


@pytest.mark.parametrize("name", [TOKENS, ROWS, INDEX])
@pytest.mark.parametrize("damage", ["deleted", "truncated", "emptied", "longer", "a folder", "a bit"])
def test_what_is_not_whole_is_not_there(name: str, damage: str, tmp_path: Path) -> None:
    write(tmp_path / "a", (IDS, TABLE))
    path = tmp_path / "a" / name
    if damage in ("deleted", "a folder"):
        path.unlink()
    if damage == "a folder":
        path.mkdir()
    if damage in ("truncated", "emptied"):
        os.truncate(path, path.stat().st_size - 1 if damage == "truncated" else 0)
    if damage == "a bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    if damage == "longer":
        path.write_bytes(path.read_bytes() + b"}")
    assert read_index(tmp_path / "a") is None


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{}", '{"num_tokens": "a", "num_rows": 1}', "\0" * 100, "é"])
def test_an_index_that_is_none_is_not_there(text: str, tmp_path: Path) -> None:
    write(tmp_path / "a", (IDS, TABLE))
    (tmp_path / "a" / INDEX).write_text(text, encoding="latin-1")
    assert read_index(tmp_path / "a") is None
    assert read_index(tmp_path / "no such folder") is None


def test_a_writer_that_does_not_finish_leaves_nothing_whole(tmp_path: Path) -> None:
    with Writer(tmp_path / "a") as writer:
        writer.add(IDS, TABLE)
    assert read_index(tmp_path / "a") is None


def test_what_the_disk_refuses_is_told_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = (
        f"{tmp_path}: prepared rows cannot be written: No space left on device. "
        "Free space there, or set QLORA_CACHE to another folder."
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError) as caught:
            write(tmp_path / "a", (IDS, TABLE))
    assert (str(caught.value), caught.value.code) == (message, Exit.FAILED)
    assert read_index(tmp_path / "a") is None
    (tmp_path / "b").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/b: prepared rows cannot be written: Not a directory"):
        Writer(tmp_path / "b" / "c")
    with pytest.raises(UserError, match="cannot be written: mine"), written(tmp_path / "a"):
        raise OSError("mine")


@pytest.mark.parametrize("part", PARTS)
def test_parts_come_back_from_json(part: Any) -> None:
    assert part_from_json(json.loads(json.dumps(part_to_json(part)))) == part
