"""The learning rate at every step, against the closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.recipe import Training
from qlora_cli.train.schedules import SCHEDULES, lr_factor, warmup_steps


@pytest.mark.parametrize("name", SCHEDULES)
@given(total=st.integers(1, 300), warmup=st.integers(0, 40), floor=st.floats(0, 1))
def test_every_schedule_rises_to_its_peak_and_falls_towards_its_floor(name, total, warmup, floor):
    training = Training(lr_scheduler=name, warmup_steps=warmup, min_lr_ratio=floor)
    factors = [lr_factor(training, step, total) for step in range(total)]
    rising, decay = factors[: min(warmup, total)], factors[warmup:]
    assert rising == pytest.approx([(step + 1) / (len(rising) + 1) for step in range(len(rising))])
    assert all(0 < factor <= 1 for factor in factors)
    assert decay[:1] in ([], [1.0])
    assert decay == sorted(decay, reverse=True)
    assert all(factor >= floor - 1e-12 for factor in decay)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 7])
def test_the_decay_is_that_of_transformers(name, warmup):
    """Warmup differs by design: transformers' first step has rate 0, which learns nothing."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=50,
    )
    training = Training(lr_scheduler=name, warmup_steps=warmup)
    for step in range(50):
        if step >= warmup:
            assert lr_factor(training, step, 50) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_a_floor_lifts_the_whole_decay():
    training = Training(lr_scheduler="linear", warmup_steps=0, min_lr_ratio=0.2)
    assert lr_factor(training, 50, 100) == pytest.approx(0.6)


def test_warmup_steps_win_over_the_ratio_which_rounds_up():
    assert warmup_steps(Training(warmup_ratio=0.03), 101) == 4
    assert warmup_steps(Training(warmup_ratio=0.5, warmup_steps=3), 101) == 3
    assert warmup_steps(Training(warmup_steps=300), 101) == 101
