"""How many tokens a model reads at once: as many as go through it, and one more does not."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.examples import Examples, wanted_rows
from qlora_cli.data.row_task import RowTask
from qlora_cli.errors import UserError
from qlora_cli.model.base import Found
from qlora_cli.recipe.schema import Data
from qlora_cli.train.reading import positions_of, refuse_beyond_context, refuse_long_stream
from tests.tasks.tiny_heads import base_of


def found_of(make: str, task: str) -> Found:
    return Found(Path(), None, frozenset(), base_of(make, task).model.config, task)


@pytest.mark.parametrize(
    ("make", "context"), [("bert", 72), ("roberta", 70), ("bart", 64), ("gpt2", 64), ("t5", None), ("llama", 64)]
)
def test_the_context_is_what_goes_through_the_model(make: str, context: int | None):
    task = "sequence_classification"
    assert found_of(make, task).context == context
    if make in ("t5", "llama"):  # whose positions are relative: nothing stops them
        return
    base = base_of(make, task)

    def read(length: int) -> None:
        base.model(input_ids=torch.tensor([[9] * (length - 1) + [2]]))

    with torch.no_grad():
        read(context or 0)
        with pytest.raises((IndexError, RuntimeError)):
            read((context or 0) + 1)


def rows(task: str, source: int, target: int) -> Examples:
    ids = [5] * (source + target)
    labels = [IGNORE_INDEX] * source + [5] * target
    return Examples((Example(ids, labels, "a:1"),), task=task)


def test_a_source_and_a_target_take_positions_of_their_own():
    assert positions_of(rows("seq2seq_lm", 60, 40)).tolist() == [60]
    assert positions_of(rows("seq2seq_lm", 3, 40)).tolist() == [40]
    assert positions_of(rows("causal_lm", 60, 40)).tolist() == [100]
    bart = found_of("bart", "seq2seq_lm")
    refuse_beyond_context(bart, rows("seq2seq_lm", 64, 64))
    with pytest.raises(
        UserError, match=r"a:1: the row takes 65 tokens, the model has 64 positions \(1 such row\)\. Set"
    ):
        refuse_beyond_context(bart, rows("seq2seq_lm", 65, 4))
    refuse_beyond_context(found_of("t5", "seq2seq_lm"), rows("seq2seq_lm", 6500, 4))


def test_windows_beyond_the_context_are_told_what_helps_them():
    with pytest.raises(UserError, match=r"has 70 positions \(1 such row\)\. Set data\.max_length: 70\.$"):
        refuse_beyond_context(found_of("roberta", "question_answering"), rows("question_answering", 71, 0))


def test_a_stream_of_pairs_is_held_to_each_sides_limit():
    from tests.data.task_tokenizers import t5

    def feed(**limits: Any) -> Any:
        data = Data.model_validate({"train": [{"path": "x"}], **limits})
        task = RowTask("seq2seq_lm")
        wanted = wanted_rows(data, "train", t5(), frozenset(), seed=1, today=date(2026, 1, 1), task=task)
        return SimpleNamespace(stream=SimpleNamespace(wanted=wanted), longest=wanted.limits.longest)

    bart = found_of("bart", "seq2seq_lm")
    refuse_long_stream(bart, feed(max_length=64))
    refuse_long_stream(bart, feed(source_max_length=64, target_max_length=64))
    with pytest.raises(UserError, match="lets streamed rows of 65 tokens through, the model has 64 positions"):
        refuse_long_stream(bart, feed(source_max_length=20, target_max_length=65))
