"""A loss or gradient that is no number ends a run by the step and rows it came from, whenever it is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli import commands
from qlora_cli.data.encode import Example
from qlora_cli.data.order import Window
from qlora_cli.display import QuietReport
from qlora_cli.errors import Exit, UserError
from qlora_cli.train import losses, session
from qlora_cli.train.checkpoint import checkpoints
from qlora_cli.train.losses import Losses, no_losses

NAN, INFINITY = float("nan"), float("inf")


def window(step: int) -> Window[Example]:
    return Window(step, 0, [[Example([1], [1], f"rows.jsonl:{step}")], [Example([1], [1], "others.jsonl:9")]])


def add(to: Losses, step: int, loss: float = 2.0, grad_norm: float = 1.0) -> None:
    to.add(window(step), 10, torch.tensor(loss), torch.tensor(grad_norm))


@pytest.mark.parametrize("late", [False, True])
def test_they_add_up_to_the_same_sums_whenever_they_are_read(late):
    found = Losses(no_losses(), late)
    for step in range(3):
        add(found, step, loss=0.1 * step, grad_norm=step)
    found.read()
    expected = sum(torch.tensor(0.1 * step).item() * 10 for step in range(3))
    assert found.sums == {"loss": expected, "tokens": 30, "grad_norm": 2.0}
    found.start_anew()
    found.read()
    assert found.sums == no_losses()


@pytest.mark.parametrize("numbers", [(NAN, 1.0), (INFINITY, 1.0), (1.0, NAN), (1.0, INFINITY)])
def test_at_once_it_is_refused_before_the_gradient_is_applied(numbers):
    found = Losses(no_losses(), late=False)
    with pytest.raises(UserError, match=r"step 4: loss \S+ and gradient norm \S+ \(rows rows.jsonl:3, others") as error:
        add(found, 3, *numbers)
    assert error.value.code == Exit.FAILED


@pytest.mark.parametrize("reading", ["next step", "read"])
def test_late_it_is_refused_with_the_next_step_or_before_anything_is_saved_by_its_own_step_and_rows(reading):
    found = Losses(no_losses(), late=True)
    add(found, 2)
    add(found, 3, loss=NAN)
    with pytest.raises(UserError, match=r"step 4: loss nan and gradient norm 1 \(rows rows.jsonl:3"):
        add(found, 4) if reading == "next step" else found.read()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bad_step", [3, 4])
def test_a_run_stops_at_it_and_nothing_of_it_is_written(make_recipe, tmp_path, monkeypatch, late, bad_step):
    """Also where the step is one after which a checkpoint is due, and metrics and an evaluation."""
    recipe = make_recipe(training={"max_steps": 6, "save_steps": 2, "eval_steps": 2, "logging_steps": 2})
    monkeypatch.setattr(session, "Losses", lambda sums, **_: Losses(sums, late))
    seen: list[int] = []
    refuse = losses.refuse_nonfinite

    def spoilt(at: Window[Example], loss: float, grad_norm: float) -> None:
        seen.append(at.step + 1)
        refuse(at, NAN if at.step + 1 == bad_step else loss, grad_norm)

    monkeypatch.setattr(losses, "refuse_nonfinite", spoilt)
    with pytest.raises(UserError, match=rf"step {bad_step}: loss nan .*rows\.jsonl"):
        commands.train(recipe, b"", QuietReport(), main_process=True, resume="auto", pause_at=None)
    assert seen == [*range(1, bad_step + 1)]
    run = tmp_path / "run"
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-000002"]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [2]
    assert not (run / "adapter").exists()
    weights = load_file(run / "checkpoints" / "step-000002" / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
