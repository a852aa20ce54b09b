"""Streamed rows: every row in its turn, shuffled by block, and the same sequence from any place on."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data import stream as room
from qlora_cli.data.examples import wanted_rows
from qlora_cli.data.order import Window
from qlora_cli.data.stream import Cursor, Stream
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Data
from tests.data.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BLOCK", 20)


def write(path: Path, name: str, num_rows: int) -> Path:
    rows = "".join(json.dumps({"text": f"{name} {'na ' * (at % 7)}{at}"}) + "\n" for at in range(num_rows))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(rows.encode()))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([json.loads(row) for row in rows.splitlines()]), path)
    else:
        path.write_text(rows)
    return path


def open_stream(*sources: dict[str, Any], units: int = 3, capacity: int | None = None, **options: Any) -> Stream:
    told = options.pop("tell", lambda error: None)
    workers = options.pop("workers", 1)
    train = [{**source, "path": str(source["path"]), "streaming": True} for source in sources]
    data = Data.model_validate({"train": train, "max_length": 120, **options})
    wanted = wanted_rows(data, "train", tiny_tokenizer("bytes"), frozenset(), seed=5, today=date(2026, 1, 1))
    return Stream(wanted, units, 5, capacity, workers, told)


def ids(window: Window) -> list[list[str]]:
    """The rows of each unit of a window."""
    return [[Path(row.where).name for row in unit] for unit in window.units]


def sequence(stream: Stream, num_steps: int, step: int = 0, cursor: Cursor | None = None) -> list[Any]:
    """The rows of every step, and the place behind it."""
    with stream:
        found = stream.windows(num_steps, step, cursor or stream.beginning())
        return [(ids(window), place) for window, place in found]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("capacity", [None, 120])
def test_going_on_at_any_step_gives_the_uninterrupted_sequence(
    tmp_path: Path, suffix: str, capacity: int | None
) -> None:
    sources = (
        {"path": write(tmp_path / f"a{suffix}", "a", 33), "weight": 1.0},
        {"path": write(tmp_path / "b.jsonl", "b", 50), "weight": 0.5},
    )
    steps = 30
    whole = sequence(open_stream(*sources, capacity=capacity), steps)
    for step in (1, 6, 7, 13, 29):
        cursor = Cursor.from_json(json.loads(json.dumps(whole[step - 1][1].to_json())))
        rest = sequence(open_stream(*sources, capacity=capacity), steps, step, cursor)
        assert [rows for rows, _ in rest] == [rows for rows, _ in whole[step:]]
        assert rest[-1][1] == whole[-1][1]


def test_the_sequence_is_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    source = {"path": write(tmp_path / "a.jsonl", "a", 70)}
    one, two, three = (sequence(open_stream(source, workers=number), 20) for number in (1, 2, 3))
    assert one == two == three


def test_every_pass_has_every_row_once_and_blocks_are_shuffled(tmp_path: Path) -> None:
    steps = sequence(open_stream({"path": write(tmp_path / "a.jsonl", "a", 40)}, units=4), 20)
    rows = [row for units, _ in steps for unit in units for row in unit]
    names = [f"a.jsonl:{number}" for number in range(1, 41)]
    assert Counter(rows) == Counter(names * 2)
    assert sorted(rows[:40]) == sorted(names)
    assert sorted(rows[:20]) == sorted(names[:20]), "a block holds rows that follow each other"
    assert rows[:20] != names[:20]
    assert rows[40:] != rows[:40], "the second pass has an order of its own"


def test_sources_are_mixed_by_their_weights(tmp_path: Path) -> None:
    sources = [{"path": write(tmp_path / f"{name}.jsonl", name, 40), "weight": w} for name, w in (("a", 3), ("b", 1))]
    rows = [row for units, _ in sequence(open_stream(*sources, units=4), 20) for unit in units for row in unit]
    assert Counter(row[0] for row in rows) == {"a": 60, "b": 20}


def test_a_packed_stream_fills_rows(tmp_path: Path) -> None:
    with open_stream({"path": write(tmp_path / "a.jsonl", "a", 60)}, capacity=120) as stream:
        for window, _ in stream.windows(10, 0, stream.beginning()):
            assert all(sum(row.num_tokens for row in unit) <= 120 for unit in window.units)
            assert max(len(unit) for unit in window.units) > 1


def test_limit_is_a_pass(tmp_path: Path) -> None:
    steps = sequence(open_stream({"path": write(tmp_path / "a.jsonl", "a", 90), "limit": 10}, units=5), 4)
    assert Counter(row for units, _ in steps for unit in units for row in unit) == {
        f"a.jsonl:{number}": 2 for number in range(1, 11)
    }


def test_a_bad_row_is_an_error_or_told_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "a", 30)
    lines = path.read_text().splitlines()
    lines[4], lines[9] = '{"text": 5}', "{"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl:5: text is the number 5"):
        sequence(open_stream({"path": path}), 2)
    told: list[UserError] = []
    steps = sequence(open_stream({"path": path}, on_bad_row="skip", tell=told.append), 6)
    rows = {row for units, _ in steps for unit in units for row in unit}
    assert [error.where.rpartition("a.jsonl:")[2].partition(":")[0] for error in told] == ["5", "10"]
    assert not rows & {"a.jsonl:5", "a.jsonl:10"}


def test_a_row_beyond_the_limit_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "short"}\n' + json.dumps({"text": "long " * 100}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: the row has \d+ tokens, but data\.max_length is 120"):
        sequence(open_stream({"path": path}), 1)


def test_a_block_without_an_example_ends_the_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1}\n' * 50)
    with pytest.raises(UserError, match="no row is left of 20: each is bad, too long or loses its whole answer"):
        sequence(open_stream({"path": path, "format": "text"}, on_bad_row="skip"), 1)


def test_the_digest_is_of_names_sizes_and_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "a", 5)
    streams = [open_stream({"path": path}), open_stream({"path": path}), open_stream({"path": path}, train_on="all")]
    path.write_text(path.read_text() + '{"text": "more"}\n')
    streams.append(open_stream({"path": path}))
    digests = []
    for stream in streams[:3]:
        with stream:
            digests.append(stream.digest())
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_sees_a_file_that_was_written_anew_to_the_same_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "a", 5)
    with open_stream({"path": path}) as stream:
        before = stream.digest()
    path.write_text(path.read_text().replace("a 0", "b 0"))
    with open_stream({"path": path}) as stream:
        assert stream.digest() != before


def test_the_digest_knows_the_weights_which_order_the_rows(tmp_path: Path) -> None:
    path, other = write(tmp_path / "a.jsonl", "a", 5), write(tmp_path / "b.jsonl", "b", 5)
    digests = set()
    for weight in (1, 2):
        with open_stream({"path": path}, {"path": other, "weight": weight}) as stream:
            digests.add(stream.digest())
    assert len(digests) == 2
