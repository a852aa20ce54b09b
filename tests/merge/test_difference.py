"""The measured difference against textbook formulas on small logits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from merge_models import ROWS, llama

from qlora_cli.errors import Exit, UserError
from qlora_cli.merge.difference import compare, logits_of


def test_equal_logits_differ_by_nothing():
    logits = [torch.randn(4, 9), torch.randn(2, 9)]
    difference = compare(logits, logits)
    assert asdict(difference) == {"max_abs": 0, "mean_kl": 0, "p99_kl": 0, "top1_agreement": 1, "positions": 6}
    assert json.loads(json.dumps(asdict(difference))) == asdict(difference)


def test_kl_is_in_nats_from_reference_to_candidate():
    p, q = [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]
    difference = compare([torch.tensor([p]).log()], [torch.tensor([q]).log()])
    by_hand = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert difference.mean_kl == pytest.approx(by_hand, rel=1e-6)
    assert difference.top1_agreement == 0
    assert difference.max_abs == pytest.approx(math.log(0.5 / 0.2), rel=1e-6)


def test_a_constant_added_to_all_logits_is_no_divergence():
    logits = torch.randn(50, 30)
    assert compare([logits], [logits + 3]).mean_kl < 1e-12


def test_the_percentile_is_over_positions_of_all_rows():
    reference = [torch.zeros(99, 2), torch.zeros(1, 2)]
    candidate = [torch.zeros(99, 2), torch.tensor([[4.0, -4.0]])]
    difference = compare(reference, candidate)
    assert 0 < difference.p99_kl < difference.mean_kl * 100
    assert difference.positions == 100


def test_logits_that_are_not_finite_fail_with_the_row():
    with pytest.raises(UserError, match="its logits are not finite on row 2") as caught:
        compare([torch.zeros(1, 2)] * 2, [torch.zeros(1, 2), torch.tensor([[0.0, float("nan")]])])
    assert caught.value.code == Exit.FAILED


def test_other_positions_or_none_are_a_bug():
    with pytest.raises(AssertionError, match="not the same positions"):
        compare([torch.zeros(1, 2)], [torch.zeros(2, 2)])
    with pytest.raises(AssertionError, match="a comparison needs a row"):
        compare([], [])


def test_logits_are_those_of_the_model_at_even_positions():
    model = llama().train()
    whole = logits_of(model, ROWS, 10_000)
    assert [len(row) for row in whole] == [len(row) for row in ROWS]
    direct = model.eval()(input_ids=torch.tensor([ROWS[0]])).logits[0]
    torch.testing.assert_close(whole[0], direct.detach())
    some = logits_of(model, ROWS, 9)
    assert [len(row) for row in some] == [3, 3, 3]
    assert torch.equal(some[0], whole[0][[0, 18, 36]])
    assert [len(row) for row in logits_of(model, ROWS, 1)] == [1, 1, 1]


def test_the_model_is_left_in_its_mode():
    model = llama().train()
    logits_of(model, ROWS[:1], 1)
    assert model.training


def test_logits_of_another_forward_are_spread_over_its_positions():
    model = torch.nn.Linear(2, 3)
    rows = [torch.randn(5, 2), torch.randn(1, 2)]
    found = logits_of(model, rows, 6, lambda model, row: model(row))
    assert [tuple(one.shape) for one in found] == [(3, 3), (1, 3)]
    assert torch.equal(found[0], model(rows[0])[[0, 2, 4]].detach())
