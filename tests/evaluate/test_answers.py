"""Answers on disk: taken up where they stopped, and never of another model or of other rows."""

from __future__ import annotations

import pytest

from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.answers import appended, line_of, read_answers

KEY = {"rows": "r", "model": "m"}


def write(path, rows, key=KEY):
    answers, whole = read_answers(path, key)
    with appended(path, key, whole) as file:
        for row in rows:
            file.write(line_of(row, {"text": f"é {row}"}))
    return answers


def test_what_is_written_is_read_again_and_appended_to(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    assert read_answers(path, KEY) == ({}, 0)
    write(path, [3, 1])
    assert write(path, [2]) == {3: {"text": "é 3"}, 1: {"text": "é 1"}}
    answers, whole = read_answers(path, KEY)
    assert list(answers) == [3, 1, 2]
    assert whole == path.stat().st_size


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_kill_tore_is_left_out_and_replaced(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    write(path, [0, 1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert list(read_answers(path, KEY)[0]) == [0]
    write(path, [1])
    assert path.read_bytes() == whole


def test_a_first_line_that_was_torn_is_written_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": {"ro')
    assert read_answers(path, KEY) == ({}, 0)
    write(path, [0])
    assert list(read_answers(path, KEY)[0]) == [0]


@pytest.mark.parametrize(
    ("key", "what"), [({**KEY, "model": "n"}, "another model"), ({**KEY, "rows": "s"}, "other rows or settings")]
)
def test_answers_of_something_else_are_refused_and_left_alone(tmp_path, key, what):
    path = tmp_path / "a.jsonl"
    write(path, [0])
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"holds answers of {what}. Give the suite another name, or measure") as error:
        read_answers(path, key)
    assert error.value.code == Exit.REFUSED
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["[]\n", "{}\n", "no JSON\n", '{"key": {"rows": "r", "model": "m"}}\n7\n'])
def test_a_file_of_something_else_is_told(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="no answers of `qlora eval`"):
        read_answers(path, KEY)


def test_two_processes_do_not_write_to_one_file(tmp_path):
    path = tmp_path / "a.jsonl"
    with (
        appended(path, KEY, 0),
        pytest.raises(UserError, match="another process writes answers") as error,
        appended(path, KEY, 0),
    ):
        pass
    assert error.value.code == Exit.IN_USE
