"""What a real training step on the CPU takes, by torch's own profiler, to hold a rehearsal against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qlora_cli.kernels.packed_attention import use_packed_attention
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import Base, load_base
from qlora_cli.model.recompute import recompute
from qlora_cli.plan.rehearsal import Shape, examples_of
from qlora_cli.quant.layers import stored_tensors
from qlora_cli.recipe import Recipe
from qlora_cli.tasks.table import collated
from qlora_cli.train.step import accumulate, clip


def recipe_for(folder: Path, **sections: Any) -> Recipe:
    """A recipe on the model in a folder; sections: keys of its sections, over the defaults."""
    sections.setdefault("training", {}).setdefault("gradient_accumulation_steps", 1)
    model = {"name_or_path": str(folder), **sections.pop("model", {})}
    return Recipe.model_validate({"model": model, "data": {"train": [{"path": "rows.jsonl"}]}, **sections})


def measured_peak(recipe: Recipe, shape: Shape, checkpointed: int) -> tuple[int, int]:
    """(bytes that are there before the step, most bytes that the step takes beside them), the step not the first."""
    base = load_base(recipe, torch.device("cpu"))
    model = attach_adapter(base, recipe.adapter)
    model.train()
    base.model.config.use_cache = False
    _ = base.tail
    if shape.packed:
        use_packed_attention(model)
    recompute(base.model, checkpointed)
    held = sum(tensor.untyped_storage().nbytes() for _, tensor in stored_tensors(model))
    for _round in range(2):  # in the first one the libraries set themselves up
        for parameter in model.parameters():
            parameter.grad = None
        most = _profiled(recipe, base, model, shape)
    return held, most


def _profiled(recipe: Recipe, base: Base, model: Any, shape: Shape) -> int:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = 0
    if recipe.training.gradient_accumulation_steps > 1:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
            held += parameter.grad.nbytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        batches = (collated(examples_of(shape, base), shape.packed, base) for _ in range(1))
        accumulate(base, model, batches, max(1, sum(shape.lengths)))
        clip(parameters, recipe.training.max_grad_norm)
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = most = held
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
