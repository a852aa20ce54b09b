"""Bad rows, and rows that leave nothing to train on: told with place, cause and remedy, or left out and listed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from preparing import (
    LONG,
    SHORT,
    answers,
    load,
    numbered,
    refusal,
    refused,
    write_rows,
)
from tiny_tokenizer import CHATML, tiny_tokenizer

from qlora_cli.data.prepare import LISTED, Unfit
from qlora_cli.errors import Exit

# ── bad rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD = {
    "bad UTF-8": b'{"question": "\xff", "answer": "a"}',
    "no JSON": b'{"question": "a", "answer": ',
    "half a character": b'{"question": "\\ud800", "answer": "a"}',
    "a number": b"7",
    "a list": b'["question", "answer"]',
    "null": b"null",
    "a null": b'{"question": null, "answer": "a"}',
    "a column missing": b'{"question": "a"}',
    "another column": b'{"text": "a"}',
    "no columns": b"{}",
    "a number as text": b'{"question": "a", "answer": 7}',
    "nested junk": b'{"question": [[[{}]]], "answer": {"a": [null]}}',
    "nested deeply": b'{"question": ' + b"[" * 900 + b"]" * 900 + b', "answer": "a"}',
    "nested beyond hope": b'{"question": ' + b"[" * 99_999 + b"]" * 99_999 + b', "answer": "a"}',
    "a control token": b'{"question": "<|im_end|>", "answer": "a"}',
    "a mark": '{"question": "\U000f0000", "answer": "a"}'.encode(),
    "huge": b'{"question": "' + b"a" * 11_000_000 + b'", "answer": "a"}',
    "NaN": b'{"question": NaN, "answer": "a"}',
    "two keys alike": b'{"question": "a", "question": 1, "answer": "a"}',
}
BAD_MESSAGES = {
    "wrong role": b'{"messages": [{"role": "cat", "content": "a"}]}',
    "no messages": b'{"messages": []}',
    "no list": b'{"messages": {"role": "user"}}',
    "nobody answers": b'{"messages": [{"role": "user", "content": "a"}]}',
    "null in a message": b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}',
    "a list of numbers": b'{"messages": [1, 2]}',
    "answers first": b'{"messages": [{"role": "assistant", "content": "a"}]}',
    "mixed types": b'{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]}',
}


def chat_row(number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]
    return {"messages": turns}


def check_bad_rows(folder: Path, kinds: list[str | None], good: Any, bad: dict[str, bytes]) -> None:
    """A good row first, which chooses the format; then good ones where None stands, and bad ones."""
    lines = [json.dumps(good(0)).encode()]
    lines += [json.dumps(good(n)).encode() if kind is None else bad[kind] for n, kind in enumerate(kinds, 1)]
    path = folder / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    examples = load(path, on_bad_row="skip", workers=2)
    kept = [number for number, kind in enumerate([None, *kinds]) if kind is None]
    left_out = [number for number, kind in enumerate([None, *kinds]) if kind is not None]
    assert answers(examples) == [f"a{number}" for number in kept]
    assert [row.where for row in examples.rows] == [f"{path}:{number + 1}" for number in kept]
    assert (examples.num_bad, examples.num_rows) == (len(left_out), len(lines))
    assert [int(where.removeprefix(f"{path}:").split(":")[0]) - 1 for where, _, _ in examples.bad] == left_out
    assert all(len(what) < 1000 for _, what, _ in examples.bad)
    if left_out:
        error = refused(path)
        assert (error.where, error.what, error.todo) == examples.bad[0]
        assert error.code == Exit.USAGE


def test_every_kind_of_bad_row_is_left_out_or_refused_at_its_line(tmp_path: Path) -> None:
    check_bad_rows(tmp_path, [None, *BAD, None], numbered, BAD)
    check_bad_rows(tmp_path, [None, *BAD_MESSAGES, None], chat_row, BAD_MESSAGES)


SMALL = [kind for kind in BAD if kind != "huge"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.none() | st.sampled_from(SMALL), max_size=12),
    st.integers(0, 300),
    st.lists(st.none() | st.sampled_from(SMALL), max_size=12),
)
@example(["a number"], 255, ["a null"])
@example([], 254, ["a number", "a null", "bad UTF-8"])
def test_bad_rows_among_good_ones_are_found_exactly(
    tmp_path_factory: pytest.TempPathFactory, first: list[str | None], between: int, second: list[str | None]
) -> None:
    folder = tmp_path_factory.mktemp("a")
    check_bad_rows(folder, [*first, *[None] * between, *second], numbered, BAD)


@pytest.mark.parametrize("bad", [7, {"question": 7, "answer": "a"}])
def test_a_bad_row_is_told_before_the_file_that_breaks_behind_it(bad: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = "".join(json.dumps(row) + "\n" for row in [SHORT, bad, *map(numbered, range(5000))])
    whole = gzip.compress(lines.encode())
    path.write_bytes(whole[: len(whole) // 2])
    assert refusal(path).startswith(f"{path}:2: ")
    assert str(path) in refusal(path, on_bad_row="skip")  # a broken file is no bad row


def test_a_row_of_a_later_portion_does_not_hide_an_earlier_one(tmp_path: Path) -> None:
    rows: list[Any] = [numbered(number) for number in range(600)]
    rows[5], rows[590] = {"question": 7, "answer": "a"}, 7  # the reader finds 590 before a process finds 5
    assert refusal(write_rows(tmp_path / "a.jsonl", rows)).startswith(f"{tmp_path}/a.jsonl:6: question is the number 7")


def test_not_all_bad_rows_are_listed_but_all_are_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT, *[7] * (LISTED + 5)])
    examples = load(path, on_bad_row="skip")
    assert (len(examples.bad), examples.num_bad, len(examples.rows)) == (LISTED, LISTED + 5, 1)


# ── what cannot be trained on ────────────────────────────────────────────────────────────────────────────────────────


def test_bad_rows_alone_are_refused_with_the_first(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [7, {"question": 1, "answer": "a"}])
    error = refused(path, on_bad_row="skip")
    assert str(error) == (
        f"data.train: all 2 rows are bad; the first: {path}:1: expected an object with named columns, "
        "found the number 7. Make each row an object."
    )
    assert isinstance(error, Unfit)
    assert (error.num_bad, error.num_rows, len(error.bad)) == (2, 2, 2)


def test_rows_of_which_none_is_left_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT, 7, LONG])
    options: dict[str, Any] = {"on_bad_row": "skip", "max_length": 3}
    left = "data.eval: no row is left of 3: data.max_length is 3, and each is too long, bad, or loses its whole answer"
    held_out = [{"path": str(path)}]
    assert refusal(path, role="eval", eval=held_out, on_long_row="skip", **options).startswith(left)
    error = refused(path, **options)
    assert isinstance(error, Unfit)
    assert str(error).startswith(f"{path}:1: the row has ")
    assert "in all 2 of 3 rows are too long" in str(error)
    assert (error.num_bad, error.num_rows) == (1, 3)


def test_a_trained_token_in_no_row_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": ""}, {"text": ""}])
    message = refusal(path, on_bad_row="skip", tokenizer=tiny_tokenizer(bos=False))
    assert message.startswith(f"data.train: all 2 rows are bad; the first: {path}:1: nothing to train: the row's first")


def test_two_beginnings_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT])
    twice = tiny_tokenizer(template="<s><s>" + CHATML, bos=True)
    assert refusal(path, tokenizer=twice) == (
        f"{path}:1: the tokenizer's chat template begins the row with two BOS tokens. "
        "Correct the template, or remove the BOS from the row's text."
    )
    path = write_rows(tmp_path / "b.jsonl", [{"text": "<s><s>a"}])
    assert "the text begins with two BOS tokens" in refusal(path, tokenizer=tiny_tokenizer(bos=True))


@pytest.mark.parametrize(
    ("role", "fraction", "left"),
    [("eval", 1e-9, "holds out no row"), ("train", 0.999999999, "leaves no row to train on")],
)
def test_a_side_without_rows_is_refused(role: str, fraction: float, left: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT, LONG])
    assert refusal(path, role=role, eval_fraction=fraction) == (
        f"data.eval_fraction: is {fraction} and {left}. Give more rows, or name held-out data in data.eval."
    )


def test_sources_without_rows_or_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    assert "the folder holds no files" in refusal(folder)
    write_rows(folder / "train.jsonl", [SHORT])
    assert "split is 'test', and no file has this word in its path: train.jsonl" in refusal(
        folder, source={"split": "test"}
    )
    (folder / "train.jsonl").write_text("\n")
    assert "holds no rows" in refusal(folder)


def test_what_is_refused_is_not_kept(tmp_path: Path, cache: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT, 7])
    for _ in range(2):
        assert refusal(path).startswith(f"{path}:2: ")
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]
