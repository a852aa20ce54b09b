"""Tiny quantised models with an adapter, and one step of them: fused, and by PEFT's own layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.model import fused
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import Base, load_base
from qlora_cli.model.fused import Fused
from qlora_cli.tasks.causal_lm import collate, collate_packed
from qlora_cli.train.step import accumulate

CPU = torch.device("cpu")
_generator = torch.Generator().manual_seed(0)
ROWS = [
    Example(ids, [token if at >= start else IGNORE_INDEX for at, token in enumerate(ids)], "a row")
    for length, start in ((9, 4), (14, 0), (6, 5), (11, 3), (17, 2), (5, 1))
    for ids in [torch.randint(3, 250, (length,), generator=_generator).tolist()]
]
NUM_TARGETS = sum(row.num_trained for row in ROWS)
IDS = torch.randint(3, 250, (3, 12), generator=_generator)
DTYPES = ["float32", "bfloat16"]
CUT: dict[bool, Callable[[Sequence[Example]], Any]] = {
    False: lambda rows: collate(rows, CPU),
    True: lambda rows: collate_packed(rows, CPU),
}


def built(
    make_recipe: Any, quantization: dict[str, Any], model: dict[str, Any], adapter: dict[str, Any]
) -> tuple[Base, Any]:
    """A quantised base and its adapter, whose B is not zero, in training mode."""
    recipe = make_recipe(quantization=quantization, model=model, adapter={"r": 4, "alpha": 8, **adapter})
    base = load_base(recipe, CPU)
    torch.manual_seed(0)
    return base, randomised(attach_adapter(base, recipe.adapter)).train()


def randomised(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def fused_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Fused)]


@contextmanager
def by_peft(model: nn.Module) -> Iterator[None]:
    """Inside the block every layer is of PEFT's own class."""
    layers = [(module, type(module)) for module in fused_layers(model)]
    assert layers
    for module, kind in layers:
        module.__class__ = kind.__mro__[2]  # behind itself and Fused
        assert type(module).__module__.startswith("peft.")
    try:
        yield
    finally:
        for module, kind in layers:
            module.__class__ = kind


def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list that gets one entry for every product that is fused: its dropout."""
    made: list[float] = []
    whole = fused.lora_linear
    monkeypatch.setattr(fused, "lora_linear", lambda *a: (made.append(a[5]), whole(*a))[1])
    return made


def step(base: Base, model: Any, packed: bool = False, seed: int = 0) -> list[Tensor]:
    """The loss and every gradient of one step over ROWS in two micro-batches."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = accumulate(base, model, [CUT[packed](ROWS[:2]), CUT[packed](ROWS[2:])], NUM_TARGETS)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    return [loss, *(gradient.clone() for gradient in gradients if gradient is not None)]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    """Each to `tolerance` of its own largest value."""
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()
