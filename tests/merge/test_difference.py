"""The measured difference against textbook formulas on small logits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from merge_models import ROWS, llama, next_tokens

from qlora_cli.errors import Exit, UserError
from qlora_cli.merge.difference import compare, seen


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
    with pytest.raises(UserError, match="its logits are not finite in portion 2 of the rows") as caught:
        compare([torch.zeros(1, 2)] * 2, [torch.zeros(1, 2), torch.tensor([[0.0, float("nan")]])])
    assert caught.value.code == Exit.FAILED


def test_choices_that_are_barred_on_both_sides_count_for_nothing():
    barred = torch.tensor([[0.5, -0.5, -torch.inf]])
    p, q = (torch.tensor([one]) for one in ([0.5, -0.5], [0.1, 0.2]))
    got = torch.tensor([[0.1, 0.2, -torch.inf]])
    assert compare([barred], [got]).mean_kl == pytest.approx(compare([p], [q]).mean_kl, rel=1e-6)
    assert compare([barred], [got]).max_abs == pytest.approx(0.7)


def test_numbers_differ_by_half_their_square():
    difference = compare([torch.tensor([[1.0], [2.0]])], [torch.tensor([[1.0], [2.2]])])
    assert difference.mean_kl == pytest.approx(0.2**2 / 4, rel=1e-5)
    assert difference.top1_agreement == 1


def test_other_positions_or_none_are_a_bug():
    with pytest.raises(AssertionError, match="not the same positions"):
        compare([torch.zeros(1, 2)], [torch.zeros(2, 2)])
    with pytest.raises(AssertionError, match="a comparison needs a row"):
        compare([], [])


def test_logits_are_those_of_the_model_at_even_positions_and_losses_of_all(tmp_path):
    model = llama().train()
    whole = seen(model, ROWS, next_tokens, 1 << 30)
    assert [len(row) for row in whole.logits] == [len(row) for row in ROWS]
    direct = model.eval()(input_ids=torch.tensor([ROWS[0]])).logits[0]
    torch.testing.assert_close(whole.logits[0], direct.detach())
    some = seen(model, ROWS, next_tokens, 9 * 256 * 4)
    assert [len(row) for row in some.logits] == [3, 3, 3]
    assert torch.equal(some.logits[0], whole.logits[0][[0, 18, 36]])
    assert some.loss == whole.loss
    assert [len(row) for row in seen(model, ROWS, next_tokens, 1).logits] == [1, 1, 1]
    with torch.no_grad():
        losses = [model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss for row in ROWS]
    total = sum(float(loss) * (len(row) - 1) for loss, row in zip(losses, ROWS, strict=True))
    assert whole.loss == pytest.approx(total / sum(len(row) - 1 for row in ROWS), rel=1e-5)


def test_the_model_is_left_in_its_mode():
    model = llama().train()
    seen(model, ROWS[:1], next_tokens, 1)
    assert model.training
