"""Optimizers by recipe name, LoRA+ groups, and their state as plain tensors and JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


ON_CPU = "torch's fused AdamW here: paging and 8-bit states save a GPU's memory, and there is none"

QUANTIZED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes' state dicts keep the moments of a weight."""

OPTIMIZERS = {
    "paged_adamw_8bit": Choice(_bitsandbytes("PagedAdamW8bit"), _adamw, ON_CPU),
    "paged_adamw_32bit": Choice(_bitsandbytes("PagedAdamW32bit"), _adamw, ON_CPU),
    "adamw_8bit": Choice(_bitsandbytes("AdamW8bit"), _bitsandbytes("AdamW8bit")),
    "adamw": Choice(_adamw, _adamw),
}
"""Paged ones keep large states in unified memory (QLoRA section 3.3); 8-bit ones are Dettmers et al. 2022.

On a CPU bitsandbytes' 8-bit step took 102 ms over 4.9 million weights, torch's fused one 5 (2 cores).
"""


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


@contextmanager
def never_waiting() -> Iterator[None]:
    """Inside the block bitsandbytes' optimizers do not wait for the GPU, as they do behind every single tensor.

    What they queue on one stream stays in order, so only who reads a state on the host has to wait: `optimizer_state`.
    """
    module: Any = sys.modules.get("bitsandbytes.optim.optimizer")
    if not hasattr(module, "sync_gpu"):  # torch's optimizers never wait
        yield
        return
    wait, module.sync_gpu = module.sync_gpu, lambda tensor: None
    try:
        yield
    finally:
        module.sync_gpu = wait


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole state as named tensors, which are the optimizer's own, and a JSON object."""
    if getattr(optimizer, "is_paged", False) and torch.cuda.is_available():
        torch.cuda.synchronize()  # a paged state lies in memory of the host, where steps on their way still write
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, state in saved["state"].items():
        for name, value in _flat(state):
            key = f"{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach()
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
    """Puts back what `optimizer_state` returned, so that the next step is the one that would have followed.

    Where a GPU's optimizer is continued on a CPU, or the other way round, its moments go on in 32 bits.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["scalars"]}.items():
        index, path = key.split(".", 1)
        *outer, name = path.split("/")
        place = state.setdefault(int(index), {})
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = value
    groups, ours = rest["param_groups"], _is_bitsandbytes(optimizer)
    if any(("exp_avg" in kept) is ours for kept in state.values()):
        groups = optimizer.state_dict()["param_groups"]
        state = {index: _to_bitsandbytes(kept) if ours else _to_torch(kept) for index, kept in state.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _page_again(optimizer)


def _is_bitsandbytes(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes.")


def _to_bitsandbytes(kept: dict[str, Any]) -> dict[str, Any]:
    """The state of one weight, of torch's AdamW."""
    return {"step": int(kept["step"]), QUANTIZED: {"state1": kept["exp_avg"], "state2": kept["exp_avg_sq"]}}


def _to_torch(kept: dict[str, Any]) -> dict[str, Any]:
    """The state of one weight, of a bitsandbytes AdamW."""
    moments = {**kept, **kept.get(QUANTIZED, {})}
    step = torch.tensor(float(kept["step"]))
    return {"step": step, "exp_avg": _moment(moments, 1), "exp_avg_sq": _moment(moments, 2)}


def _moment(moments: dict[str, Any], number: int) -> Tensor:
    """The first or second moment in float32."""
    from bitsandbytes.functional import dequantize_blockwise

    state: Tensor = moments[f"state{number}"]
    if state.dtype == torch.float32:
        return state
    scales, code = moments[f"absmax{number}"], moments[f"qmap{number}"]
    moment: Tensor = dequantize_blockwise(state.flatten(), absmax=scales, code=code, blocksize=256)
    return moment.view(state.shape)


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
