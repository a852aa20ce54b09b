"""Rows to examples in a line: what the tests of preparing share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.chat import chat_settings
from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.examples import Examples, load_examples
from qlora_cli.data.limits import Limits
from qlora_cli.data.worker import Job, Task
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Data

SHORT = {"question": "How many?", "answer": "42"}
LONG = {"question": "How many clips?", "answer": "the answer of the question is forty two clips"}
TODAY = date(2026, 1, 2)


def numbered(number: int) -> dict[str, str]:
    """A row unlike any other."""
    return {"question": f"q{number}", "answer": f"a{number}"}


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as a .jsonl file; a text is a line as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def load(
    path: Path | str | list[Any],
    *,
    role: Any = "train",
    tokenizer: PreTrainedTokenizerFast | None = None,
    seed: int = 1,
    today: date = TODAY,
    progress: Any = lambda num_rows: None,
    **data: Any,
) -> Examples:
    """The examples of a file, or of sources; one process unless `workers` says otherwise."""
    sources = path if isinstance(path, list) else [{"path": str(path), **data.pop("source", {})}]
    recipe = Data.model_validate({"train": sources, "workers": 1, **data})
    tokenizer = tokenizer or tiny_tokenizer()
    return load_examples(recipe, role, tokenizer, frozenset({4}), seed=seed, today=today, progress=progress)


def refused(*arguments: Any, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    return caught.value


def refusal(*arguments: Any, **options: Any) -> str:
    return str(refused(*arguments, **options))


def trained(example: Example) -> list[int]:
    return [label for label in example.labels if label != IGNORE_INDEX]


def answers(examples: Examples) -> list[str]:
    """The trained texts without their stop token."""
    return [
        text.removesuffix("<|im_end|>") for text in tiny_tokenizer().batch_decode(list(map(trained, examples.rows)))
    ]


def make_job(tokenizer: PreTrainedTokenizerFast | None = None, limits: Limits | None = None, **options: Any) -> Job:
    """A job for the tiny tokenizer; `kwargs` are the template's."""
    data = Data.model_validate({"train": [{"path": "x"}], "chat_template_kwargs": options.pop("kwargs", {})})
    settings = chat_settings(data, tokenizer or tiny_tokenizer(), frozenset({4}), TODAY)
    return Job(settings, limits or Limits(2048), **options)


def make_task(rows: list[Any], template: dict[str, Any] | None = None) -> Task:
    """A task of questions and answers, at a:1, a:2, ..."""
    return Task(rows, [f"a:{number}" for number in range(1, len(rows) + 1)], "question_answer", True, template)


def children(pid: int | None = None) -> set[int]:
    """Processes whose parent is `pid`, or this process; those that ended and are not waited for count too."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == (pid or os.getpid()):
            found.add(int(name))
    return found
