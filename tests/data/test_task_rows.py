"""The table of tasks: its formats are the recipe's, and its rows are prepared, stored and streamed like any others."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest
from task_rows_loading import load_task
from task_tokenizers import bert, t5

from qlora_cli.data import formats
from qlora_cli.data import stream as room
from qlora_cli.data.examples import wanted_rows
from qlora_cli.data.row_task import RowTask
from qlora_cli.data.stream import Cursor, Stream
from qlora_cli.data.task_rows import TASK_ROWS, formats_of
from qlora_cli.recipe.schema import Data, Model, Source
from qlora_cli.recipe.task_rules import FOR_ANOTHER_TASK, FORMATS_OF

TASKS = {
    "seq2seq_lm": RowTask("seq2seq_lm"),
    "sequence_classification": RowTask("sequence_classification", ("no", "yes"), 2),
    "question_answering": RowTask("question_answering", doc_stride=4),
}


def rows_of(task: str, number: int) -> list[dict[str, Any]]:
    """Rows unlike each other, of unequal length."""
    words = [f"the play {'of a prince ' * (at % 5)}{at}" for at in range(number)]
    return {
        "seq2seq_lm": [{"source": text, "target": f"{text} was written"} for text in words],
        "sequence_classification": [{"text": text, "label": at % 2} for at, text in enumerate(words)],
        "question_answering": [
            {"context": f"{text} in Paris", "question": "Where?", "answers": {"text": ["play"], "answer_start": [4]}}
            for text in words
        ],
    }[task]


def tokenizer_for(task: str) -> Any:
    return t5() if task == "seq2seq_lm" else bert()


def test_the_formats_are_the_recipes():
    assert {task: tuple(rows.formats) for task, rows in TASK_ROWS.items()} == FORMATS_OF
    others = [name for task in FORMATS_OF for name in FORMATS_OF[task] if name not in formats.FORMATS]
    assert tuple(others) == FOR_ANOTHER_TASK
    (spelled,) = [get_args(field.annotation) for name, field in Source.model_fields.items() if name == "format"]
    tasks = get_args(Model.model_fields["task"].annotation)
    assert {*spelled} == {"auto"}.union(*map(formats_of, tasks))
    assert {*tasks} == {"causal_lm", *TASK_ROWS}


@pytest.mark.parametrize("task", TASKS)
def test_what_is_stored_is_what_was_prepared(task: str, tmp_path: Path):
    rows = rows_of(task, 40)
    options: dict[str, Any] = {"tokenizer": tokenizer_for(task), "max_length": 24, "on_long_row": "truncate"}
    here = load_task(TASKS[task], tmp_path, rows, **options)
    stored = load_task(TASKS[task], tmp_path / "rows.jsonl", **options)
    assert [*stored.rows] == [*here.rows]
    assert (stored.num_tokens, stored.num_trained) == (here.num_tokens, here.num_trained)
    assert stored.task == task
    assert stored.losses() == here.losses()


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_held_out_and_left_out_as_those_of_conversations(task: str, tmp_path: Path):
    lines = [*map(json.dumps, rows_of(task, 60)), '{"bad": 1}', "{"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    found = {
        role: load_task(
            TASKS[task],
            tmp_path / "rows.jsonl",
            role=role,
            tokenizer=tokenizer_for(task),
            eval_fraction=0.3,
            on_bad_row="skip",
        )
        for role in ("train", "eval")
    }
    places = {role: {row.where for row in examples.rows} for role, examples in found.items()}
    assert not places["train"] & places["eval"]
    assert len(places["train"] | places["eval"]) == 60
    assert found["train"].num_bad >= 1


@pytest.mark.parametrize("task", TASKS)
def test_streamed_rows_are_the_stored_ones_and_go_on_from_any_place(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(room, "BLOCK", 16)
    stored = load_task(TASKS[task], tmp_path, rows_of(task, 30), tokenizer=tokenizer_for(task))
    train = [{"path": str(tmp_path / "rows.jsonl"), "streaming": True}]
    data = Data.model_validate({"train": train, "max_length": 200})

    def steps(first: int, cursor: Cursor | None) -> list[Any]:
        today, tokenizer = date(2026, 1, 1), tokenizer_for(task)
        wanted = wanted_rows(data, "train", tokenizer, frozenset(), seed=5, today=today, task=TASKS[task])
        with Stream(wanted, 4, 5, workers=1) as stream:
            return [*stream.windows(8, first, cursor or stream.beginning())]

    whole = steps(0, None)
    seen = {row.where: row for window, _ in whole for row in window.rows}
    assert {row.where: row for row in stored.rows} == seen
    rest = steps(5, Cursor.from_json(json.loads(json.dumps(whole[4][1].to_json()))))
    assert [window.rows for window, _ in rest] == [window.rows for window, _ in whole[5:]]
