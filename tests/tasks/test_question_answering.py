"""Batches of windows: spans over real tokens alone."""

from __future__ import annotations

import pytest
import torch

from qlora_cli.tasks.question_answering import collate, outputs, span_logits
from tests.tasks.tiny_heads import MAKES, base_of, examples

TASK = "question_answering"


def test_targets_are_the_first_tokens_and_then_the_last_ones():
    base, rows = base_of("bert", TASK), examples(TASK, [9, 7, 8])
    logits, targets = outputs(base.model, collate(rows, base))
    assert targets.tolist() == [0, 1, 2, 2, 3, 4]
    start, end = span_logits(base.model, collate(rows, base))
    assert logits.equal(torch.cat([start, end]))
    assert (logits.shape, logits.dtype) == ((6, 9), torch.float32)


@pytest.mark.parametrize("make", MAKES)
def test_padding_is_no_place_for_an_answer_and_changes_none(make: str):
    base, rows = base_of(make, TASK), examples(TASK, [9, 4])
    start, end = span_logits(base.model, collate(rows, base))
    alone = span_logits(base.model, collate(rows[1:], base))
    for both, one in ((start, alone[0]), (end, alone[1])):
        assert both[1, 4:].isneginf().all()
        torch.testing.assert_close(both[1, :4], one[0], rtol=1e-5, atol=1e-5)
