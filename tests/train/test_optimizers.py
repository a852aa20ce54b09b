"""Every optimizer of the table learns, saves its state as tensors and JSON, and goes on from it bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save

from qlora_cli.recipe import Training
from qlora_cli.train.checkpoint import host_copies
from qlora_cli.train.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    never_waiting,
    optimizer_state,
    restore_optimizer,
    set_learning_rate,
)

CPU = torch.device("cpu")


class Adapted(torch.nn.Module):
    """One LoRA pair by PEFT's names; A is large enough for 8-bit state, B too small."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.ModuleDict(
            {
                "lora_A": torch.nn.ModuleDict({"default": torch.nn.Linear(512, 16, bias=False)}),
                "lora_B": torch.nn.ModuleDict({"default": torch.nn.Linear(16, 32, bias=False)}),
            }
        )


def build(training: Training):
    torch.manual_seed(0)
    model = Adapted()
    return model, build_optimizer(model, training, CPU)[0]


def steps(model: Adapted, optimizer: torch.optim.Optimizer, seed: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(optimizer, 1e-2)
        optimizer.step()
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize("loraplus_ratio", [1.0, 16.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_through_files_it_goes_on_bit_for_bit(name, loraplus_ratio):
    training = Training(optimizer=name, loraplus_ratio=loraplus_ratio, weight_decay=0.01)
    model, optimizer = build(training)
    steps(model, optimizer, seed=1)
    tensors, rest = optimizer_state(optimizer)
    tensors, rest = load(save(host_copies(tensors))), json.loads(json.dumps(rest))
    weights = [p.detach().clone() for p in model.parameters()]
    expected = steps(model, optimizer, seed=2)

    other, restored = build(training)
    with torch.no_grad():
        for parameter, weight in zip(other.parameters(), weights, strict=True):
            parameter.copy_(weight)
    restore_optimizer(restored, tensors, rest)
    assert torch.equal(steps(other, restored, seed=2), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_adamw_up_to_its_precision(name):
    training = Training(optimizer=name, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1)
    model, optimizer = build(training)
    ours = steps(model, optimizer, seed=1, count=5)
    reference_model = build(training)[0]
    reference = torch.optim.AdamW(reference_model.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    reference.param_groups[0]["lr_scale"] = 1.0
    expected = steps(reference_model, reference, seed=1, count=5)
    start = torch.cat([p.detach().flatten() for p in build(training)[0].parameters()])
    error = (ours - expected).norm() / (expected - start).norm()
    assert error < (0.05 if "8bit" in name else 1e-5)


@pytest.mark.parametrize("there", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("here", ["adamw", "adamw_8bit"])
def test_a_state_goes_on_in_the_optimizer_of_another_device(there, here):
    """As when a GPU's paged 8-bit AdamW is continued on a CPU: the steps that follow need its moments."""
    model, optimizer = build(Training(optimizer=there))
    steps(model, optimizer, seed=1, count=10)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    start = torch.cat([weight.flatten() for weight in weights.values()])
    tensors, rest = optimizer_state(optimizer)
    tensors, rest = load(save(host_copies(tensors))), json.loads(json.dumps(rest))
    expected = steps(model, optimizer, seed=2) - start
    error = {}
    for restored in (True, False):
        other, continued = build(Training(optimizer=here))
        other.load_state_dict(weights)
        if restored:
            restore_optimizer(continued, tensors, rest)
        error[restored] = (steps(other, continued, seed=2) - start - expected).norm() / expected.norm()
    assert error[True] < 0.05
    assert error[False] > 0.5, "a test in which the moments do not matter shows nothing"


def test_bitsandbytes_waits_for_no_gpu_inside_the_block_and_as_before_behind_it(monkeypatch):
    import bitsandbytes.optim.optimizer as library

    waited: list[torch.Tensor] = []
    monkeypatch.setattr(library, "sync_gpu", waited.append)
    model, optimizer = build(Training(optimizer="adamw_8bit"))
    steps(model, optimizer, seed=1, count=1)
    assert len(waited) == 2, "once for each of the two matrices; if never, `never_waiting` is not needed any more"
    with never_waiting():
        steps(model, optimizer, seed=1, count=1)
    assert len(waited) == 2
    steps(model, optimizer, seed=1, count=1)
    assert len(waited) == 4


def test_loraplus_gives_b_its_own_rate():
    model, optimizer = build(Training(optimizer="adamw", loraplus_ratio=4.0))
    set_learning_rate(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.q["lora_A"]["default"].weight)] == 1e-3
    assert rates[id(model.q["lora_B"]["default"].weight)] == 4e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cpu_is_told_in_one_line_where_it_changes_the_optimizer(name, recwarn):
    _, note = build_optimizer(Adapted(), Training(optimizer=name), CPU)
    assert ("torch's fused AdamW" in note) is name.startswith("paged")
    assert not recwarn.list


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="paging needs a CUDA device")
@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_restored_state_is_paged_again(name):
    parameter = torch.nn.Parameter(torch.zeros(400, 400, device="cuda"))
    model = torch.nn.ParameterList([parameter])
    training = Training(optimizer=name)
    optimizer, _ = build_optimizer(model, training, torch.device("cuda"))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["state1"].is_paged
    fresh, _ = build_optimizer(model, training, torch.device("cuda"))
    restore_optimizer(fresh, *optimizer_state(optimizer))
    assert fresh.state[parameter]["state1"].is_paged
    assert torch.equal(fresh.state[parameter]["state1"].cpu(), optimizer.state[parameter]["state1"].cpu())
