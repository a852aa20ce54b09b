"""One optimizer step has one gradient, however its rows are cut."""

from __future__ import annotations

import pytest
import torch

from qlora_cli.data.order import micro_batches, share_of
from qlora_cli.errors import Exit
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import load_base
from qlora_cli.tasks.causal_lm import collate
from qlora_cli.train.step import (
    accumulate,
    clip,
    deterministic_kernels,
    random_state,
    restore_random_state,
    seed_everything,
    sum_over_processes,
)
from tests.tiny import train_rows


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, tiny_model, rows_file):
    """A base with an adapter whose B is not zero, so that A has a gradient too, and twelve rows of unequal length."""
    from qlora_cli.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(tiny_model)},
            "quantization": {"compute_dtype": "float32"},
            "adapter": {"r": 4},
            "data": {"train": [{"path": str(rows_file)}]},
        }
    )
    base = load_base(recipe, torch.device("cpu"))
    rows = train_rows(recipe, base)
    seed_everything(1)
    model = attach_adapter(base, recipe.adapter).train()
    for parameter in parameters_of(model):
        torch.nn.init.normal_(parameter, std=0.1)
    return base, model, rows


def parameters_of(model) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(trained_once, cuts: list[list[int]]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient of one step over the micro-batches given as lists of row numbers."""
    base, model, rows = trained_once
    num_tokens = sum(rows[index].num_trained for cut in cuts for index in cut)
    for parameter in parameters_of(model):
        parameter.grad = None
    batches = (collate([rows[index] for index in cut], base.device) for cut in cuts)
    loss = accumulate(base, model, batches, num_tokens)
    return loss.item(), [p.grad.clone() for p in parameters_of(model)]


def largest_relative_difference(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, reference, strict=True))


@pytest.mark.parametrize("rows", [list(range(12)), [3, 11, 5, 0, 8]], ids=["whole window", "last, shorter window"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 12])
def test_every_split_into_micro_batches_gives_the_same_gradient(trained_once, rows, size):
    loss, one_by_one = gradients(trained_once, [[row] for row in rows])
    split_loss, split = gradients(trained_once, micro_batches(rows, size))
    assert split_loss == pytest.approx(loss, rel=1e-6)
    assert largest_relative_difference(split, one_by_one) <= 1e-6


def test_unequal_splits_give_the_same_gradient(trained_once):
    _, one = gradients(trained_once, [list(range(12))])
    for cuts in ([[0], list(range(1, 12))], [[11, 0, 4], [1], [2, 3, 5, 6, 7, 8], [9, 10]]):
        assert largest_relative_difference(gradients(trained_once, cuts)[1], one) <= 1e-6


def test_the_gradient_is_that_of_the_token_weighted_mean_in_float64(trained_once):
    """Independent reference: finite differences of the mean loss along the gradient."""
    _base, model, rows = trained_once
    _, gradient = gradients(trained_once, micro_batches(list(range(12)), 5))

    def mean_loss() -> float:
        total, tokens = 0.0, 0
        for row in rows:
            logits = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
            for position in range(1, len(row.labels)):
                if row.labels[position] >= 0:
                    total -= logits[position - 1, row.labels[position]].item()
                    tokens += 1
        return total / tokens

    length = 1e-3 / sum(g.norm() ** 2 for g in gradient).sqrt()
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, g in zip(parameters_of(model), gradient, strict=True):
                parameter += sign * length * g
            if sign == 1:
                above = mean_loss()
        below = mean_loss()
        for parameter, g in zip(parameters_of(model), gradient, strict=True):
            parameter += length * g
    slope = (above - below) / (2 * length.item())
    assert slope == pytest.approx(sum((g**2).sum().item() for g in gradient), rel=1e-3)


class TwoProcesses:
    """accelerate's sum over two processes of which the other one contributed `other`."""

    num_processes = 2

    def __init__(self, other: torch.Tensor):
        self.other = other

    def reduce(self, flat: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return flat + self.other


def test_the_shares_of_two_processes_add_up_even_when_one_is_empty(trained_once):
    _, model, _rows = trained_once
    loss, whole = gradients(trained_once, [[4]])
    mine, other = share_of([4], 0, 2), share_of([4], 1, 2)
    assert (mine, other) == ([4], [])
    flat = torch.cat([torch.tensor([loss]), *(g.flatten() for g in whole)])
    for parameter in parameters_of(model):
        parameter.grad = None  # the process without a row
    flat = torch.cat([torch.tensor([0.0, 1.0]), flat])  # and the other one was interrupted
    total, code = sum_over_processes(TwoProcesses(flat), parameters_of(model), torch.zeros(()))
    assert code == Exit.SIGINT, "all processes stop when one is told to"
    assert total.item() == pytest.approx(loss)
    assert largest_relative_difference([p.grad for p in parameters_of(model)], whole) == 0.0


def test_clipping_scales_down_to_the_norm_and_zero_means_none():
    for limit, expected in ((1.0, 1.0), (0.0, 5.0), (9.0, 5.0)):
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([3.0, 4.0])
        assert clip([parameter], limit).item() == 5.0
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_deterministic_kernels_end_with_the_run(wanted, before):
    torch.use_deterministic_algorithms(before)
    try:
        with deterministic_kernels(wanted):
            assert torch.are_deterministic_algorithms_enabled() is (wanted or before)
        assert torch.are_deterministic_algorithms_enabled() is before
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_random_state_comes_back():
    seed_everything(5)
    state = random_state()
    first = torch.rand(3)
    restore_random_state(state)
    assert torch.equal(torch.rand(3), first)


def test_trained_logits_sees_no_padding(trained_once):
    from qlora_cli.tasks.causal_lm import trained_logits
    from qlora_cli.tasks.table import loss_sum

    base, model, rows = trained_once
    with torch.no_grad():
        alone = [loss_sum(*trained_logits(model, collate([row], base.device))).item() for row in rows]
        together = loss_sum(*trained_logits(model, collate(rows, base.device))).item()
    assert together == pytest.approx(sum(alone), rel=1e-6)


def test_a_report_needs_no_more_than_these(trained_once):
    """The protocol that loops talk to and the display that implements it have the same methods."""
    from qlora_cli.display import LiveReport, PlainReport, QuietReport
    from qlora_cli.train.report import Report

    wanted = {name for name in vars(Report) if not name.startswith("_")}
    for kind in (QuietReport, PlainReport, LiveReport):
        assert wanted <= set(dir(kind))
