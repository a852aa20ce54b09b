"""The keys of data: seen in the encoded examples that a session holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.encode import IGNORE_INDEX
from qlora_cli.data.examples import Examples
from qlora_cli.data.formats import FORMATS
from qlora_cli.errors import UserError
from qlora_cli.recipe import Recipe
from tests.conftest import conversation
from tests.live_keys.bench import Bench, Live, becomes

CUT = {"data.on_long_row": "truncate", "data.eval": []}
APART = {**CUT, "data.max_length": 2048, "data.source_max_length": 200, "data.target_max_length": 200}
SHORT = {"data.max_length": 60, "data.eval": []}


def examples_of(role: str, bench: Bench, recipe: Recipe) -> Examples:
    session = bench.prepared(recipe)
    return session.train_set if role == "train" else session.eval_set


def files(role: str) -> Callable[[Bench, Recipe], set[str]]:
    """The names of the files that the examples come from."""
    return lambda bench, recipe: {
        Path(row.where.rpartition(":")[0]).name for row in examples_of(role, bench, recipe).rows
    }


def count(role: str) -> Callable[[Bench, Recipe], int]:
    return lambda bench, recipe: len(examples_of(role, bench, recipe).rows)


def answer(role: str) -> Callable[[Bench, Recipe], str]:
    """The trained text of the first row, or the error."""

    def see(bench: Bench, recipe: Recipe) -> str:
        try:
            row = examples_of(role, bench, recipe).rows[0]
        except UserError as error:
            return str(error)
        trained = [label for label in row.labels if label != IGNORE_INDEX]
        return bench.prepared(recipe).base.tokenizer.decode(trained)

    return see


def asked_of_the_hub(role: str) -> Callable[[Bench, Recipe], tuple[Any, ...]]:
    """Id, configuration and split of the data set asked for; the hub is played by a recorder with two splits."""

    def see(bench: Bench, recipe: Recipe) -> tuple[Any, ...]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(path: str, name: str | None, *, split: str) -> list[dict[str, Any]]:
            calls.append((path, name, split))
            return [conversation("a question", "an answer")]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("datasets.load_dataset", load_dataset)
            patch.setattr("datasets.get_dataset_split_names", lambda path, name: ["train", "test"])
            bench.prepare_anew(recipe)
        (call,) = calls
        return call

    return see


def text(bench: Bench, recipe: Recipe) -> str:
    """The whole first row as the model sees it."""
    return bench.prepared(recipe).base.tokenizer.decode(examples_of("train", bench, recipe).rows[0].input_ids)


def longest(bench: Bench, recipe: Recipe) -> tuple[int, int, int]:
    """Tokens of the longest row, the longest prompt, and the longest rest."""
    rows = examples_of("train", bench, recipe).rows
    return (
        max(row.num_tokens for row in rows),
        max(row.num_prompt for row in rows),
        max(row.num_tokens - row.num_prompt for row in rows),
    )


def rows_left(bench: Bench, recipe: Recipe) -> tuple[int, int]:
    """How many rows are left and how long the longest is; no row where they are refused as too long."""
    try:
        return len(examples_of("train", bench, recipe).rows), longest(bench, recipe)[0]
    except UserError as error:
        if "5 of 12 rows are too long" in str(error):
            return 0, 0
        raise


def one_of_many_formats(name: str) -> Callable[[Any, Any], bool]:
    """Unclear without the format; with it, the trained text is that of its own column."""
    return lambda without, with_value: "Set format: alpaca or messages" in without and f"from {name}" in with_value


def source_keys(role: str, file: str, num_rows: int, split: str) -> list[Live]:
    """The keys of a source; those of data.train and of data.eval are read on different paths."""
    at, hub = f"data.{role}[0]", {f"data.{role}[0].path": "someone/rows"}
    return [
        Live(f"{at}.path", "$others", files(role), becomes({file}, {"others.jsonl"})),
        Live(
            f"{at}.name",
            "small",
            asked_of_the_hub(role),
            becomes(("someone/rows", None, split), ("someone/rows", "small", split)),
            hub,
        ),
        Live(
            f"{at}.split",
            "extra",
            asked_of_the_hub(role),
            becomes(("someone/rows", None, split), ("someone/rows", None, "extra")),
            hub,
        ),
        *(
            Live(f"{at}.format", name, answer(role), one_of_many_formats(name), {f"{at}.path": "$every_format"})
            for name in FORMATS
        ),
        Live(f"{at}.limit", 3, count(role), becomes(num_rows, 3)),
    ]


DATA = [
    *source_keys("train", "rows.jsonl", 12, "train"),
    *source_keys("eval", "heldout.jsonl", 4, "test"),
    Live("data.max_length", 40, longest, lambda without, with_value: with_value[0] == 40 < without[0], CUT),
    Live(
        "data.source_max_length",
        30,
        longest,
        lambda without, with_value: with_value[1] == 30 < without[1] and with_value[2] == without[2],
        APART,
    ),
    Live(
        "data.target_max_length",
        12,
        longest,
        lambda without, with_value: with_value[2] == 12 < without[2] and with_value[1] == without[1],
        APART,
    ),
    Live(
        "data.chat_template",
        "$template",
        text,
        lambda without, with_value: "user\nsay" in without and "user: say" in with_value,
    ),
    Live("data.on_long_row", "truncate", rows_left, becomes((0, 0), (12, 60)), SHORT),
    Live("data.on_long_row", "skip", rows_left, becomes((0, 0), (7, 59)), SHORT),
]
