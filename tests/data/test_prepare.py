"""All rows of a role, prepared: the same whatever prepares them, whole or not at all, and refused with a reason."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from preparing import (
    LONG,
    SHORT,
    TODAY,
    answers,
    load,
    numbered,
    refusal,
    refused,
    trained,
    write_rows,
)
from tiny_tokenizer import tiny_tokenizer

from qlora_cli.data import examples as examples_module
from qlora_cli.data.cache import Wanted
from qlora_cli.data.chat import chat_settings
from qlora_cli.data.examples import Examples
from qlora_cli.data.limits import Limits
from qlora_cli.data.pool import PACKAGE
from qlora_cli.data.prepare import num_processes, prepared
from qlora_cli.errors import Exit
from qlora_cli.recipe.schema import Data, Source
from tests.data.test_readers import write


def facts(examples: Examples) -> tuple[Any, ...]:
    """Everything that is told of the examples."""
    return (list(examples.rows), examples.digest, examples.num_rows, examples.bad, examples.summary())


# ── the same whatever prepares them ──────────────────────────────────────────────────────────────────────────────────


def test_results_are_the_same_with_any_number_of_processes(tmp_path: Path, cache: Path) -> None:
    rows: list[Any] = [numbered(number) for number in range(900)]
    rows[3], rows[500], rows[700], rows[701] = 7, {"question": 1}, "[", {**LONG, "answer": LONG["answer"] * 9}
    path = write_rows(tmp_path / "a.jsonl", rows)
    options: dict[str, Any] = {"on_bad_row": "skip", "on_long_row": "truncate", "max_length": 30}
    found = []
    for workers in (1, 2, 3, "auto"):
        found.append(facts(load(path, workers=workers, **options)))
        shutil.rmtree(cache)
    assert found[1:] == found[:1] * 3
    assert len(found[0][0]) == 897
    assert [int(where.split(":")[1]) for where, _, _ in found[0][3]] == [4, 501, 701]


def test_auto_is_a_process_for_each_core_within_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_processes() == min(len(os.sched_getaffinity(0)), 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(99)))
    assert num_processes() == 16
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_processes() == 1


def test_progress_tells_how_many_rows_are_prepared(tmp_path: Path) -> None:
    told: list[int] = []
    path = write_rows(tmp_path / "a.jsonl", [7, *map(numbered, range(599))])
    load([{"path": str(path)}, {"path": str(path), "limit": 9}], progress=told.append, on_bad_row="skip")
    assert told == [256, 512, 600, 609]


# ── where rows stand ─────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst")


def test_every_example_knows_its_place_in_any_file(tmp_path: Path) -> None:
    rows = [numbered(number) for number in range(5)]
    paths = [write(tmp_path / name, rows) for name in NAMES]
    examples = load([{"path": str(path)} for path in paths])
    assert answers(examples) == [row["answer"] for row in rows] * len(paths)
    wheres = [example.where for example in examples.rows]
    for at, path in enumerate(paths):
        mine = wheres[5 * at : 5 * at + 5]
        if path.suffix in (".parquet", ".arrow"):
            assert mine == [f"{path}:row {number}" for number in range(1, 6)]
            continue
        packed = {".gz": gzip.decompress, ".zst": None}.get(path.suffix, bytes)
        assert all(where.startswith(f"{path}:") for where in mine)
        if packed is None:
            assert mine == [f"{path}:{number}" for number in range(1, 6)]
            continue
        lines = packed(path.read_bytes()).decode().splitlines()
        for number, where in enumerate(mine):
            line = int(where.rpartition(":")[2])
            assert f"q{number}" in "".join(lines[line - 1 : line + 3])


def test_every_example_knows_its_file_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("b.parquet", "a.jsonl", "c.csv"):
        write(folder / name, [SHORT, LONG])
    places = ["a.jsonl:1", "a.jsonl:2", "b.parquet:row 1", "b.parquet:row 2", "c.csv:2", "c.csv:3"]
    assert [example.where for example in load(folder).rows] == [f"{folder}/{place}" for place in places]
    two = load([{"path": str(folder), "limit": 3}, {"path": str(folder / "c.csv")}])
    assert [example.where for example in two.rows] == [f"{folder}/{place}" for place in places[:3] + places[4:]]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_example_knows_its_row_of_the_hub(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(path: str, name: Any, split: str, streaming: bool = False) -> Any:
        dataset = datasets.Dataset.from_list([numbered(1), {"question": "a"}, numbered(3)])
        return dataset.to_iterable_dataset() if streaming else dataset

    class Builder:
        dataset_name, config_id, hash = "corpus", "default", "1"
        config = type("Config", (), {"version": "0"})

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: Builder())
    source = {"path": "owner/corpus", "streaming": streaming}
    examples = load([source], on_bad_row="skip")
    assert [example.where for example in examples.rows] == [f"owner/corpus[train]:row {number}" for number in (1, 3)]
    assert [where for where, _, _ in examples.bad] == ["owner/corpus[train]:row 2"]


# ── eval_fraction ────────────────────────────────────────────────────────────────────────────────────────────────────


def sides(path: Path, seed: int = 1, **options: Any) -> list[list[str]]:
    """The trained and the held-out rows, as their places."""
    both = [load(path, role=role, eval_fraction=0.3, seed=seed, **options) for role in ("train", "eval")]
    return [[row.where for row in side.rows] for side in both]


def test_the_sides_are_disjoint_complete_and_in_order(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", map(numbered, range(400)))
    kept, held = sides(path)
    everything = [f"{path}:{number}" for number in range(1, 401)]
    assert sorted(kept + held) == sorted(everything)
    assert [where for where in everything if where in kept] == kept
    assert [where for where in everything if where in held] == held
    assert 90 < len(held) < 150
    assert sides(path, seed=2) != [kept, held]


def test_rows_that_are_appended_move_no_other(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", map(numbered, range(100)))
    kept, held = sides(path)
    write_rows(path, map(numbered, range(150)))
    more_kept, more_held = sides(path)
    assert (more_kept[: len(kept)], more_held[: len(held)]) == (kept, held)


def test_equal_rows_are_on_the_same_side(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [numbered(number % 10) for number in range(100)])
    kept, held = sides(path)
    numbers = [{int(where.rpartition(":")[2]) % 10 for where in side} for side in (kept, held)]
    assert not numbers[0] & numbers[1]
    assert len(kept) + len(held) == 100


def test_the_limit_is_of_the_source_before_its_sides(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", map(numbered, range(100)))
    kept, held = sides(path, source={"limit": 40})
    assert len(kept) + len(held) == 40


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["tokens.u32", "rows.i64", "index.json"])
@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_a_damaged_cache_is_made_again(name: str, damage: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT, LONG])
    first = load(path)
    expected = facts(first)
    file = first.folder / name
    file.unlink() if damage == "deleted" else os.truncate(file, file.stat().st_size // 2)
    again = load(path)
    assert (facts(again), again.folder) == (expected, first.folder)


def test_a_deleted_cache_is_made_again_and_what_is_open_stays_readable(tmp_path: Path, cache: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT, LONG])
    first = load(path)
    shutil.rmtree(cache.parent)
    assert facts(load(path)) == facts(first)


def test_a_cache_that_is_emptied_before_it_is_opened_is_made_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT, LONG])
    expected = facts(load(path))
    whole, calls = examples_module.prepared, []

    def emptied(*arguments: Any) -> Any:
        found = whole(*arguments)
        calls.append(found)
        if len(calls) == 1:
            shutil.rmtree(cache.parent)
        return found

    monkeypatch.setattr(examples_module, "prepared", emptied)
    assert facts(load(path)) == expected
    assert len(calls) == 2


def test_what_a_killed_process_left_is_removed(tmp_path: Path, cache: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT])
    folder = load(path).folder
    folder.rename(cache / f".{folder.name}")
    (cache / f".{folder.name}" / "index.json").unlink()
    load(path)
    assert {entry.name for entry in cache.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_data_that_change_while_they_are_prepared_are_refused(tmp_path: Path, cache: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", map(numbered, range(300)))

    def append(num_rows: int) -> None:
        with path.open("a") as file:
            file.write(json.dumps(SHORT) + "\n")

    message = refusal(path, progress=append)
    assert message == "data.train: the data has changed while it was prepared. Start again when it is complete."
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


ANOTHER = """
import pickle, sys; sys.path.insert(0, {package!r})
from qlora_cli.data import prepare
with open({wanted!r}, "rb") as file:
    wanted = pickle.load(file)
made = []
make = prepare._make
prepare._make = lambda *args: made.append(make(*args))
folder, index = prepare.prepared(wanted, 1, lambda num_rows: None)
print(len(made), folder, index["digest"])
"""


def test_two_processes_at_once_prepare_once(tmp_path: Path, cache: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", map(numbered, range(2000)))
    data = Data.model_validate({"train": [{"path": str(path)}]})
    chat = chat_settings(data, tiny_tokenizer(), frozenset({4}), TODAY)
    wanted = Wanted("train", [Source(path=str(path))], chat, Limits(2048), False)
    (tmp_path / "wanted").write_bytes(pickle.dumps(wanted))
    code = ANOTHER.format(package=str(PACKAGE), wanted=str(tmp_path / "wanted"))
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(run.communicate()[0].split() for run in runs)
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert [made for made, _, _ in said] == ["0", "0", "1"]
    assert len({(folder, digest) for _, folder, digest in said}) == 1
    folder, index = prepared(wanted, 1, lambda num_rows: None)
    assert [str(folder), index["digest"]] == said[0][1:]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", map(numbered, range(3000)))
    cache.mkdir(parents=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        error = refused(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error) == (
        f"{cache}: prepared rows cannot be written: File too large. "
        "Free space there, or set QLORA_CACHE to another folder."
    )
    assert error.code == Exit.FAILED == 1
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]
    assert len(load(path).rows) == 3000


def test_an_interruption_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    def stop(num_rows: int) -> None:
        raise KeyboardInterrupt

    path = write_rows(tmp_path / "a.jsonl", [SHORT])
    with pytest.raises(KeyboardInterrupt):
        load(path, progress=stop)
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


def test_labels_come_back_as_they_were_made(tmp_path: Path) -> None:
    (row,) = load(write_rows(tmp_path / "a.jsonl", [SHORT])).rows
    text = tiny_tokenizer().decode(row.input_ids)
    assert text == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n42<|im_end|>\n"
    assert tiny_tokenizer().decode(trained(row)) == "42<|im_end|>"
