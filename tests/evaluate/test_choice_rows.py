"""Rows of each known shape become contexts and choices; anything else is told by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import UserError, UserErrors
from qlora_cli.evaluate.choice_rows import SHAPES, read_choices
from qlora_cli.recipe.schema import Source
from tests.evaluate.choices import continuations, mmlu, questions, read, write

QUERY = {"query": "Question: two plus two?\n", "choices": ["three ", "four"], "gold": 1}
LAMBADA = {"context": "I don't care about ", "continuation": "signs"}
MMLU = {
    "subject": "anatomy",
    "input": "The following are multiple choice questions (with answers) about  anatomy.\n\nHow many?\nA. 1\nAnswer:",
    "output": "C",
}


def one(tmp_path: Path, row: dict[str, Any], **how: Any) -> tuple[str, tuple[str, ...], int | None, str]:
    (found,) = read(write(tmp_path / "rows.jsonl", [row]), **how)
    assert found.where == f"{tmp_path}/rows.jsonl:1"
    return found.context, found.choices, found.gold, found.group


def test_a_question_is_answered_behind_answer(tmp_path: Path) -> None:
    assert one(tmp_path, QUERY) == ("Question: two plus two?\nAnswer:", (" three", " four"), 1, "")


def test_a_question_of_a_passage_too(tmp_path: Path) -> None:
    context, *_ = one(tmp_path, QUERY | {"query": "Passage: maths.\nQuestion: is it?"})
    assert context == "Passage: maths.\nQuestion: is it?\nAnswer:"


def test_what_asks_nothing_is_continued_behind_a_space(tmp_path: Path) -> None:
    context, choices, *_ = one(tmp_path, QUERY | {"query": "She said that", "category": "talk"})
    assert (context, choices) == ("She said that", (" three", " four"))


def test_a_continuation_has_one_choice_and_no_gold(tmp_path: Path) -> None:
    assert one(tmp_path, LAMBADA) == ("I don't care about", (" signs",), None, "")


def test_mmlu_is_answered_by_a_letter_and_grouped_by_subject(tmp_path: Path) -> None:
    assert one(tmp_path, MMLU) == (MMLU["input"], (" A", " B", " C", " D"), 2, "anatomy")


@pytest.mark.parametrize(
    ("delimiter", "context", "choice"),
    [("", "Question: two plus two?", "four"), ("\nA:", "Question: two plus two?\nA:", "four"), (" -> ", None, " four")],
)
def test_a_delimiter_of_the_user_stands_as_it_is(
    tmp_path: Path, delimiter: str, context: str | None, choice: str
) -> None:
    found = one(tmp_path, QUERY, delimiter=delimiter)
    assert found[0] == (context or "Question: two plus two? ->")
    assert found[1][1] == choice


def test_a_category_is_a_group(tmp_path: Path) -> None:
    assert one(tmp_path, LAMBADA | {"category": "novels"})[3] == "novels"


@pytest.mark.parametrize(("limit", "numbers"), [(2, (2, 0)), (3, (3, 0)), (4, (3, 1)), (9, (3, 5)), (None, (3, 5))])
def test_a_limit_takes_the_first_rows_of_all_paths_together(
    tmp_path: Path, limit: int | None, numbers: tuple[int, int]
) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", questions(5, seed)) for seed, name in enumerate("ab")]
    how: dict[str, Any] = {"delimiter": None, "shots_from": None, "seed": 0}
    wanted = [f"{path}:{row + 1}" for path, number in zip(paths, numbers, strict=True) for row in range(number)]
    for shots in (0, 1):
        rows = read_choices([Source(path=paths[0], limit=3), paths[1]], shots=shots, limit=limit, **how)
        assert [row.where for row in rows] == wanted
        whole = read_choices([Source(path=paths[0], limit=3), paths[1]], shots=shots, limit=None, **how)
        assert rows == whole[: len(rows)], "solved examples are drawn from all rows"


def test_no_file_behind_the_limit_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(5))
    how: dict[str, Any] = {"delimiter": None, "shots": 0, "shots_from": None, "seed": 0}
    assert len(read_choices([path, str(tmp_path / "none.jsonl")], limit=5, **how)) == 5


def test_shots_are_solved_examples_of_other_rows_of_the_group(tmp_path: Path) -> None:
    raw = mmlu(30)
    rows = read(write(tmp_path / "rows.jsonl", raw), shots=5)
    for each, row in zip(rows, raw, strict=True):
        header, asked = row["input"].split("\n\n")
        first, *solved, last = each.context.split("\n\n")
        assert (first, last, len(solved)) == (header, asked, 5)
        others = {other["input"].split("\n\n")[1] + f" {other['output']}": other["subject"] for other in raw}
        assert {others[shot] for shot in solved} == {row["subject"]}
        assert len({*solved, f"{asked} {row['output']}"}) == 6


def test_shots_come_from_the_file_that_is_named_and_never_ask_the_same(tmp_path: Path) -> None:
    rows = questions(6, longest=2)
    path = write(tmp_path / "rows.jsonl", rows)
    solved = write(tmp_path / "solved.jsonl", [*rows[:1] * 50, *questions(3, seed=5)])
    first, *others = read(path, shots=3, shots_from=solved)
    assert all(each["query"] in first.context for each in questions(3, seed=5))
    assert any(rows[0]["query"] in row.context.split("\n\n")[:-1][0] for row in others)
    with pytest.raises(UserError, match=r"rows.jsonl:1: 4 solved examples asked for, 3 other rows are there\. Lower"):
        read(path, shots=4, shots_from=solved)


def test_shots_depend_on_seed_and_row_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", questions(40))
    rows = read(path, shots=2, seed=1)
    assert read(path, shots=2, seed=1, limit=7) == rows[:7]
    assert read(path, shots=2, seed=2) != rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "why?"},
            r"rows.jsonl:1: columns are question: no known shape.* query, choices, gold; context, co",
        ),
        (QUERY | {"choices": ["one"]}, r"choices holds 1, not two texts or more"),
        (QUERY | {"choices": "one"}, r"choices is a text, not two texts or more"),
        (QUERY | {"choices": ["one", 2]}, r"choices\[1\] is the number 2, not a text"),
        (QUERY | {"choices": ["one", " "]}, r"choices\[1\] is empty"),
        (QUERY | {"gold": 2}, r"gold is the number 2, not the index of a choice. Make gold a number from 0 to 1"),
        (QUERY | {"gold": True}, r"gold is true, not the index"),
        (QUERY | {"gold": "1"}, r"gold is a text, not the index"),
        (QUERY | {"query": "\n"}, r"query is empty"),
        (LAMBADA | {"continuation": ""}, r"continuation is empty"),
        (MMLU | {"output": "E"}, r"output is 'E', not A, B, C or D"),
        (MMLU | {"subject": 3}, r"subject is the number 3, not a text"),
    ],
)
def test_a_broken_row_is_told_by_its_place(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        read(write(tmp_path / "rows.jsonl", [row]))
    assert raised.match(message)
    assert str(raised.value).startswith(f"{tmp_path}/rows.jsonl:1: ")


def test_several_broken_rows_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{}, QUERY, *[{"a": 1}] * 20])
    Path(path).write_text(Path(path).read_text() + "{broken\n")
    with pytest.raises(UserErrors) as raised:
        read(path)
    assert [problem.where.rsplit(":", 1)[1] for problem in raised.value.problems] == ["1", *map(str, range(3, 12))]


def test_choices_and_continuations_are_not_mixed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*questions(2), *continuations(1)])
    with pytest.raises(UserError, match=r"rows.jsonl:3: rows with choices and continuations are mixed: .*rows.jsonl:1"):
        read(path)


@pytest.mark.parametrize(
    ("name", "number", "shape"),
    [("arc_easy", 2376, 0), ("piqa", 1838, 0), ("boolq", 3270, 0), ("lambada_openai", 5153, 1)],
)
def test_the_files_of_llm_foundry_are_read_whole(shared: Path, name: str, number: int, shape: int) -> None:
    path = shared / "text" / "llm-foundry-eval" / f"{name}.jsonl"
    rows, raw = read(str(path)), [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(raw) == number
    columns = list(SHAPES)[shape]
    assert raw[0].keys() >= set(columns)
    assert all(row.context.endswith("\nAnswer:") for row in rows) == (shape == 0)
    assert [row.gold for row in rows] == [each.get("gold") for each in raw]


def test_the_qlora_repositorys_mmlu_is_read_whole(shared: Path) -> None:
    rows = read(str(shared / "text" / "qlora" / "zero_shot_mmlu_val.json"))
    assert len(rows) == 1531
    assert len({row.group for row in rows}) == 57
    assert rows[0].context.endswith("\nD. 6\nAnswer:")
    assert [sum(row.gold == letter for row in rows) for letter in range(4)] == [381, 379, 387, 384]
