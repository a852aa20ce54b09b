"""Losses are transformers' own, and neither they nor gradients change with how rows are split into padded batches."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.tasks import table
from qlora_cli.tasks.table import MOST_ROWS, TASKS, batches, loss_sum, rows_of_batches
from tests.tasks.tiny_heads import HEADS, MAKES, base_of, examples

LENGTHS = [9, 4, 14, 6, 11]
READING = ("sequence_classification", "question_answering")
PAIRS = [
    *[(make, task, 3) for make in MAKES for task in READING],
    *[(make, "sequence_classification", 1) for make in MAKES],
    *[(make, "seq2seq_lm", 3) for make in ("bart", "t5")],
]
IDS = [f"{make} {task} {labels}" for make, task, labels in PAIRS]


def summed(base: Any, batches: list[list[Example]]) -> tuple[Tensor, list[Tensor]]:
    """The mean loss over all targets, and its gradients, added up over the batches."""
    num = sum(row.num_trained for batch in batches for row in batch)
    parameters = [p for p in base.model.parameters() if p.requires_grad]
    base.model.zero_grad()
    total = torch.zeros(())
    for rows in batches:
        logits, targets = TASKS[base.task].outputs(base.model, TASKS[base.task].collate(rows, base))
        loss = loss_sum(logits, targets) / num
        loss.backward()
        total += loss.detach()
    return total, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def assert_same(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> None:
    """To 1e-6 of the loss, and of the largest gradient."""
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)
    largest = max(gradient.abs().max() for gradient in wanted[1])
    assert largest > 0
    for one, other in zip(found[1], wanted[1], strict=True):
        assert (one - other).abs().max() <= 2e-6 * max(1, largest)


def labels_of(task: str, rows: list[Example], num_labels: int) -> dict[str, Tensor]:
    """The rows as transformers takes them where no padding is needed: all of one length."""
    if task == "seq2seq_lm":
        sources = torch.tensor([row.input_ids[: row.num_prompt] for row in rows])
        return {"input_ids": sources, "labels": torch.tensor([row.input_ids[row.num_prompt :] for row in rows])}
    ids = {"input_ids": torch.tensor([row.input_ids for row in rows])}
    targets = torch.tensor([row.targets for row in rows])
    if task == "question_answering":
        return ids | {"start_positions": targets[:, 0].long(), "end_positions": targets[:, 1].long()}
    return ids | {"labels": targets[:, 0].float() if num_labels == 1 else targets[:, 0].long()}


@pytest.mark.parametrize(("make", "task", "num_labels"), PAIRS, ids=IDS)
def test_the_loss_is_that_of_transformers(make: str, task: str, num_labels: int):
    base = base_of(make, task, num_labels)
    rows = examples(task, [9] * 8, num_labels)
    rows = [row for row in rows if row.num_tokens == rows[0].num_tokens]
    assert len(rows) > 1
    arguments = labels_of(task, rows, num_labels)
    if "token_type_ids" in base.tokenizer.model_input_names:
        arguments["token_type_ids"] = torch.tensor([[int(at >= 4) for at in range(9)]] * len(rows))
    wanted = base.model(**arguments).loss
    found, _ = summed(base, [rows])
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("make", "task", "num_labels"), PAIRS, ids=IDS)
def test_no_split_into_batches_changes_the_loss_or_its_gradient(make: str, task: str, num_labels: int):
    base = base_of(make, task, num_labels)
    rows = examples(task, LENGTHS, num_labels)
    alone = summed(base, [[row] for row in rows])
    assert_same(summed(base, [rows]), alone)
    assert_same(summed(base, [rows[3:], rows[:3]]), alone)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("task", HEADS)
def test_neither_does_any_split(task: str, data: st.DataObject):
    base = base_of("t5", task)
    lengths = data.draw(st.lists(st.integers(3, 20), min_size=2, max_size=6), "lengths")
    rows = data.draw(st.permutations(examples(task, lengths)), "rows")
    cut = data.draw(st.integers(1, len(rows) - 1), "cut")
    assert_same(summed(base, [rows[:cut], rows[cut:]]), summed(base, [[row] for row in rows]))


def test_the_batches_hold_every_row_once_the_longest_first_and_none_too_many():
    base = base_of("bert", "sequence_classification")
    rows = examples("sequence_classification", LENGTHS)
    found = [batch.input_ids for batch in batches(rows, LENGTHS, 2, 14, False, base)]
    assert [tuple(ids.shape) for ids in found] == [(2, 14), (2, 9), (1, 4)]
    assert found[0][0].tolist() == rows[2].input_ids


def test_an_evaluation_takes_more_of_short_rows_at_once():
    base = base_of("bert", "sequence_classification")
    assert list(rows_of_batches(LENGTHS, 2, 14, False, base)) == [[2, 4], [0, 3, 1]]
    mixed = [100] * 4 + [10] * 80
    assert [len(rows) for rows in rows_of_batches(mixed, 2, 100, False, base)] == [2, 2, 20, 20, 20, 20]
    assert [len(rows) for rows in rows_of_batches([1] * 10_000, 1, 9_000, False, base)] == [MOST_ROWS, MOST_ROWS, 1808]
    assert [len(rows) for rows in rows_of_batches([1] * 10_000, 5_000, 1, False, base)] == [5_000, 5_000]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 9), st.lists(st.integers(1, 60)))
def test_no_pass_of_an_evaluation_has_more_cells_than_its_budget(lengths: list[int], size: int, cuts: list[int]):
    base = base_of("bert", "sequence_classification")
    with patch.object(table, "rope_boundaries", lambda config: sorted(set(cuts))):
        passes = list(rows_of_batches(lengths, size, max(lengths), False, base))
    assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
    for rows in passes:
        assert len(rows) * max(lengths[row] for row in rows) <= size * max(lengths)
        assert len({bisect_left(sorted(set(cuts)), lengths[row]) for row in rows}) == 1, "RoPE turns alike"
    firsts = [lengths[rows[0]] for rows in passes]
    assert firsts == sorted(firsts, reverse=True)
    if not cuts:
        assert len(passes) <= -(-len(lengths) // size)
        assert all(len(rows) >= size for rows in passes[:-1])


def test_numbers_are_squared_errors_and_classes_cross_entropies():
    logits = torch.tensor([[1.0], [3.0]], dtype=torch.bfloat16)
    assert loss_sum(logits, torch.tensor([2.0, 1.0])).item() == pytest.approx(1 + 4)
    classes = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert loss_sum(classes, torch.tensor([0, 1])).item() == pytest.approx(2 * torch.log(torch.tensor(2.0)).item())
    assert loss_sum(logits, torch.tensor([2.0, 1.0])).dtype == torch.float32


def test_every_task_of_the_recipe_has_an_entry():
    from typing import get_args

    from qlora_cli.recipe.schema import Model

    assert list(TASKS) == list(get_args(Model.model_fields["task"].annotation))
