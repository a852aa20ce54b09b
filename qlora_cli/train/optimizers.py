"""Optimizers by recipe name, LoRA+ groups, and their state as plain tensors and JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qlora_cli.recipe.schema import Training


@dataclass(frozen=True)
class Choice:
    """How an optimizer of the recipe is built, and what it is where there is no GPU."""

    build: Callable[..., Optimizer]
    build_on_cpu: Callable[..., Optimizer]
    on_cpu: str = ""


def _adamw(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    return torch.optim.AdamW(groups, fused=True, **settings)


def _bitsandbytes(name: str) -> Callable[..., Optimizer]:
    def build(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
        import bitsandbytes.optim

        return getattr(bitsandbytes.optim, name)(groups, **settings)

    return build


OPTIMIZERS = {
    "paged_adamw_8bit": Choice(
        _bitsandbytes("PagedAdamW8bit"), _bitsandbytes("AdamW8bit"), "8-bit AdamW without paging: there is no GPU"
    ),
    "paged_adamw_32bit": Choice(
        _bitsandbytes("PagedAdamW32bit"), _bitsandbytes("AdamW32bit"), "32-bit AdamW without paging: there is no GPU"
    ),
    "adamw_8bit": Choice(_bitsandbytes("AdamW8bit"), _bitsandbytes("AdamW8bit")),
    "adamw": Choice(_adamw, _adamw),
}
"""Paged ones keep large states in unified memory (QLoRA section 3.3); 8-bit ones are Dettmers et al. 2022."""


def build_optimizer(model: Any, training: Training, device: torch.device) -> tuple[Optimizer, str]:
    """The optimizer over the trainable weights, and a line on what it is on this device ("" where as named).

    Every group carries `lr_scale`, its share of the schedule's rate: LoRA+ (Hayou et al. 2024) gives B its own.
    """
    choice = OPTIMIZERS[training.optimizer]
    optimizer = (choice.build_on_cpu if device.type == "cpu" else choice.build)(
        parameter_groups(model, training),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )
    return optimizer, choice.on_cpu if device.type == "cpu" else ""


def parameter_groups(model: Any, training: Training) -> list[dict[str, Any]]:
    """The trainable weights in the model's order: one group, or two where LoRA+ gives B its own rate."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if training.loraplus_ratio == 1.0:
        return [{"params": [parameter for _, parameter in named], "lr_scale": 1.0}]
    b = [parameter for name, parameter in named if ".lora_B." in name]
    rest = [parameter for name, parameter in named if ".lora_B." not in name]
    return [{"params": rest, "lr_scale": 1.0}, {"params": b, "lr_scale": training.loraplus_ratio}]


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """The rate of the coming step for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole state as named tensors and a JSON object, nothing shared between tensors."""
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, state in saved["state"].items():
        for name, value in _flat(state):
            key = f"{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach().cpu().clone().contiguous()
            else:
                scalars[key] = value
    return tensors, {"scalars": scalars, "param_groups": saved["param_groups"]}


def _flat(state: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dicts with their keys joined by '/': bitsandbytes wraps its 8-bit state once more."""
    pairs: list[tuple[str, Any]] = []
    for name, value in state.items():
        pairs += _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return pairs


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Puts back what `optimizer_state` returned, so that the next step is the one that would have followed."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["scalars"]}.items():
        index, path = key.split(".", 1)
        *outer, name = path.split("/")
        place = state.setdefault(int(index), {})
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    _page_again(optimizer)


def _page_again(optimizer: Any) -> None:
    """bitsandbytes loads a paged state into ordinary GPU memory: move it back where it was before."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if not (getattr(optimizer, "is_paged", False) and parameter.is_cuda and "state1" in state):
                continue
            for name in ("state1", "state2"):
                buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                buffer.copy_(state[name])
                state[name] = buffer
