"""The keys of data: seen in the encoded examples that a session holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pytest

from qlora_cli.data.encode import IGNORE_INDEX
from qlora_cli.data.examples import Examples
from qlora_cli.data.formats import FORMATS
from qlora_cli.data.hub import HubData
from qlora_cli.data.pool import Pool
from qlora_cli.data.rows import Mark, Read
from qlora_cli.errors import UserError
from qlora_cli.recipe import Recipe
from tests.conftest import conversation
from tests.live_keys.bench import Bench, Live, becomes

CUT = {"data.on_long_row": "truncate", "data.eval": []}
APART = {**CUT, "data.max_length": 2048, "data.source_max_length": 200, "data.target_max_length": 200}
SHORT = {"data.max_length": 60, "data.eval": []}
TURNS = {"data.train[0].path": "$turns"}
BAD = {"data.train[0].path": "$bad", "data.eval": []}


def examples_of(role: str, bench: Bench, recipe: Recipe) -> Examples:
    session = bench.prepared(recipe)
    return session.feed.examples if role == "train" else session.eval_set


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


def asked_of_the_hub(go: Callable[[Bench, Recipe], Any]) -> Callable[[Bench, Recipe], tuple[Any, ...]]:
    """Id, configuration and split of the data set asked for; the hub is played by a recorder with two splits.

    go: what reads the rows.
    """

    def see(bench: Bench, recipe: Recipe) -> tuple[Any, ...]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(path: str, name: str | None, *, split: str) -> datasets.Dataset:
            calls.append((path, name, split))
            return datasets.Dataset.from_list([conversation("a question", "an answer")])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("datasets.load_dataset", load_dataset)
            patch.setattr("datasets.get_dataset_split_names", lambda path, name: ["train", "test"])
            go(bench, recipe)
        (call,) = set(calls)
        return call

    return see


def whole_row(role: str) -> Callable[[Bench, Recipe], str]:
    """The whole first row as the model sees it, and the format that read it; or the error."""

    def see(bench: Bench, recipe: Recipe) -> str:
        try:
            examples = examples_of(role, bench, recipe)
        except UserError as error:
            return str(error)
        ids = examples.rows[0].input_ids
        return bench.prepared(recipe).base.tokenizer.decode(ids) + f" read as {examples.sources[0].format}"

    return see


text = whole_row("train")


def trained_texts(bench: Bench, recipe: Recipe) -> list[str]:
    """The runs of trained text of the first row."""
    row, tokenizer = examples_of("train", bench, recipe).rows[0], bench.prepared(recipe).base.tokenizer
    runs = groupby(row.labels, IGNORE_INDEX.__ne__)
    return [tokenizer.decode(list(run)) for trained, run in runs if trained]


def rows_and_bad(bench: Bench, recipe: Recipe) -> tuple[int, int] | str:
    """Rows that are left and rows that are bad, or the error."""
    try:
        examples = examples_of("train", bench, recipe)
    except UserError as error:
        return str(error)
    return len(examples.rows), examples.num_bad


def first_epoch(bench: Bench, recipe: Recipe) -> int:
    """Examples of the first epoch."""
    return len(bench.prepared(recipe).feed.order.epoch(0).rows)


def feed_of(bench: Bench, recipe: Recipe) -> str:
    """What training takes its examples from."""
    return type(bench.prepared(recipe).feed).__name__


def streamed_from_the_hub(go: Callable[[Bench, Recipe], Any]) -> Callable[[Bench, Recipe], bool]:
    """Whether the held-out data set is asked for as a stream. go: what reads the rows."""

    def see(bench: Bench, recipe: Recipe) -> bool:
        seen = []

        def read(self: HubData, start: Any = None) -> Iterator[Read]:
            seen.append(self.streaming)
            yield Read(1, conversation("a question", "an answer"), Mark(1))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("datasets.get_dataset_split_names", lambda path, name: ["train", "test"])
            patch.setattr(HubData, "read", read)
            patch.setattr(HubData, "digest", lambda self: f"one row {self.streaming} {go}")
            go(bench, recipe)
        (streamed,) = set(seen)
        return streamed

    return see


def num_processes(bench: Bench, recipe: Recipe) -> int:
    """The preparing processes that may be started."""
    seen = []

    class Watched(Pool):
        def __init__(self, job: Any, num: int, **options: Any) -> None:
            seen.append(num)
            super().__init__(job, num, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_cli.data.prepare.Pool", Watched)
        patch.setattr("os.sched_getaffinity", lambda process: set(range(2)))
        patch.setenv("QLORA_CACHE", str(bench.root / f"cache{len(list(bench.root.iterdir()))}"))
        bench.prepare_anew(recipe)
    assert len(set(seen)) == 1
    return seen[0]


def shapes(bench: Bench, recipe: Recipe) -> list[tuple[int, ...]]:
    """Rows of every trained forward pass, and whether each is as long as max_length allows."""
    return [tuple(ids.shape) for ids in bench.trained(recipe).trained_batches]


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


def another_format(name: str) -> Callable[[Any, Any], bool]:
    """Without the format the columns choose another one or none; with it the text is that of its own columns."""
    return lambda without, with_value: (
        f"read as {name}" in with_value and f"from {name}" in with_value and f"read as {name}" not in without
    )


def source_keys(role: str, file: str, num_rows: int, split: str) -> list[Live]:
    """The keys of a source; those of data.train and of data.eval are read on different paths."""
    at, hub = f"data.{role}[0]", {f"data.{role}[0].path": "someone/rows"}
    asked = asked_of_the_hub(Bench.prepare_anew)
    return [
        Live(f"{at}.path", "$others", files(role), becomes({file}, {"others.jsonl"})),
        Live(
            f"{at}.name",
            "small",
            asked,
            becomes(("someone/rows", None, split), ("someone/rows", "small", split)),
            hub,
        ),
        Live(
            f"{at}.split",
            "extra",
            asked,
            becomes(("someone/rows", None, split), ("someone/rows", None, "extra")),
            hub,
        ),
        *(
            Live(f"{at}.format", name, whole_row(role), another_format(name), {f"{at}.path": f"$format_{name}"})
            for name in FORMATS
        ),
        *(
            Live(
                f"{at}.template.{key}",
                value,
                whole_row(role),
                lambda without, with_value, sign=sign: sign in with_value and sign not in without,
                {f"{at}.path": "$columns", f"{at}.template": {"prompt": "x", "completion": "y"}},
            )
            for key, value, sign in (
                ("prompt", "Data: {{ a }}", "Data: 007"),
                ("completion", " {{ b }}!", " eight!"),
                ("chat", True, "<|im_start|>user"),
            )
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
    Live(
        "data.chat_template_kwargs",
        {"mood": "glad"},
        text,
        lambda without, with_value: "glad" in with_value and "glad" not in without,
        {"data.chat_template": "$moody"},
    ),
    Live("data.train_on", "last", trained_texts, becomes(["one<|im_end|>", "two<|im_end|>"], ["two<|im_end|>"]), TURNS),
    Live(
        "data.train_on",
        "all",
        trained_texts,
        lambda _, all: len(all) == 1 and all[0].startswith("<|im_start|>user"),
        TURNS,
    ),
    Live("data.on_bad_row", "skip", rows_and_bad, lambda error, left: ":2: " in str(error) and left == (2, 1), BAD),
    Live("data.train[0].weight", 2, first_epoch, becomes(12, 24)),
    Live("data.train[0].weight", 0.5, first_epoch, becomes(12, 6)),
    Live("data.train[0].streaming", True, feed_of, becomes("StoredFeed", "StreamFeed")),
    Live(
        "data.eval[0].streaming",
        True,
        streamed_from_the_hub(Bench.prepare_anew),
        becomes(False, True),
        {"data.eval[0].path": "someone/rows", "data.eval[0].limit": 4},
    ),
    Live("data.eval_fraction", 0.5, count("eval"), lambda none, some: none == 0 and 0 < some < 12, {"data.eval": []}),
    Live("data.workers", 3, num_processes, becomes(2, 3)),
    Live("data.packing", "auto", shapes, lambda padded, flat: max(rows for rows, _ in flat) == 1 < padded[0][0]),
    Live("data.packing", True, shapes, lambda padded, full: full[0][1] > 256 > max(length for _, length in padded)),
    Live("data.on_long_row", "truncate", rows_left, becomes((0, 0), (12, 60)), SHORT),
    Live("data.on_long_row", "skip", rows_left, becomes((0, 0), (7, 59)), SHORT),
]
