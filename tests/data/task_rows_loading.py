"""Rows of the tasks that are no conversations to examples in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from preparing import TODAY
from task_tokenizers import t5

from qlora_cli.data.chat import chat_settings, make_chat
from qlora_cli.data.examples import Examples, load_examples
from qlora_cli.data.formats import choose_format
from qlora_cli.data.limits import Limits
from qlora_cli.data.row_task import RowTask
from qlora_cli.data.stream import _examples
from qlora_cli.data.task_rows import formats_of
from qlora_cli.data.worker import Job, Task, prepare
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Data


def load_task(task: str | RowTask, path: Path, rows: list[Any] | None = None, **options: Any) -> Examples:
    """The examples of a file, prepared and stored as training does; T5's small tokenizer unless one is named.

    rows: these, written as rows.jsonl into the folder `path`, and prepared in this process, which takes a hundredth of
    the time, unless some are too long: what is said then is said of all of them.
    """
    task = task if isinstance(task, RowTask) else RowTask(task)
    tokenizer = options.pop("tokenizer", None) or t5()
    role, source = options.pop("role", "train"), options.pop("source", {})
    if rows is not None:
        path = path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data.model_validate({"train": [{"path": str(path), **source}], "workers": 1, **options})
    if rows is not None and (found := _here(task, data, tokenizer, rows)) is not None:
        return found
    return load_examples(data, role, tokenizer, frozenset(), seed=1, today=TODAY, task=task)


def _here(task: RowTask, data: Data, tokenizer: Any, rows: list[Any]) -> Examples | None:
    """The examples as a preparing process makes them; None where rows are too long."""
    (source,), places = data.train, [f"{data.train[0].path}:{at}" for at in range(1, len(rows) + 1)]
    settings = chat_settings(data, tokenizer, frozenset(), TODAY, task)
    template = source.template and source.template.model_dump()
    auto = source.format == "auto" and not template
    name = choose_format(rows[0], places[0], formats_of(task.name)) if auto else source.format
    job = Job(settings, Limits.of(data, task.name))
    result = prepare(Task(rows, places, name, auto, template), job, make_chat(settings))
    if result.bad:
        raise UserError(*result.bad[0][1:])
    if result.long:
        return None
    tally = {name: number for name, number in result.tally.items() if name in Examples.__dataclass_fields__}
    found = tuple(_examples(result, places))
    lost = tuple(sorted(result.lost.items(), key=lambda one: (-one[1], one[0])))
    num_tokens, num_trained = sum(row.num_tokens for row in found), sum(row.num_trained for row in found)
    counts = {"num_rows": len(rows), "num_tokens": num_tokens, "num_trained": num_trained, **tally}
    return Examples(rows=found, lost_characters=lost, task=task.name, **counts)


def refused_task(task: str | RowTask, path: Path, rows: list[Any] | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_task(task, path, rows, **options)
    return str(caught.value)
