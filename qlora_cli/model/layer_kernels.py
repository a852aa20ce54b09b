"""Norms and gated MLPs of a loaded model with the functions of `kernels` in their forward passes, each by itself.

A module gets them where a proof shows that it computes what they do: its own forward, run on a stand-in with a few
random weights, gives their bits. No class is patched: a module becomes an instance of a class of its own, under the
name of its old one, with the same parameters and files. A norm whose weight is trained keeps its model's forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_cli.errors import UserError
from qlora_cli.kernels import liger
from qlora_cli.kernels.rms_norm import ORDERS, reference_rms_norm, rms_norm
from qlora_cli.kernels.swiglu import ACTIVATIONS, gated, reference_gated
from qlora_cli.model.fused import is_watched
from qlora_cli.model.rotary import Rotary, use_rotary
from qlora_cli.quant.kernels import HAS_TRITON
from qlora_cli.recipe.schema import Training


class Kernels(NamedTuple):
    """Functions as kernels.rms_norm.rms_norm and kernels.swiglu.gated, and whose they are.

    rotary: as kernels.liger.rotary; None where the model's own is as good.
    """

    name: str
    rms_norm: Callable[[Tensor, Tensor, float, str], Tensor]
    gated: Callable[[Tensor, Tensor, str], Tensor]
    rotary: Rotary | None = None


OURS = Kernels("torch functions", rms_norm, gated)
LIGER = Kernels("liger-kernel", liger.rms_norm, liger.gated, liger.rotary)

EPSILONS = ("variance_epsilon", "eps")
"""What norms call the number that is added to the mean square."""

GATED_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""The modules of an MLP that is known, and no others."""

WIDTH = 48
"""Of what a proof computes."""

PROVEN_IN = (torch.float32, torch.bfloat16)


def choose(training: Training, device: torch.device) -> Kernels | None:
    """The recipe's functions on a device, None for the model's own code. On meta they are ours, which keep the same.

    Compiled layers get ours too: torch compiles them together with what is beside them. Where liger cannot run they are
    ours: a run that was trained with it is evaluated anywhere.
    """
    if training.layer_kernels == "torch":
        return None
    if device.type == "meta":
        return OURS
    return LIGER if _liger_runs(device) and not training.torch_compile else OURS


def check_kernels(training: Training, device: torch.device) -> None:
    """Raises UserError for liger where it cannot run."""
    if training.layer_kernels == "liger" and not _liger_runs(device):
        on_gpu = device.type == "cuda"
        what = (
            "liger-kernel or what Triton needs is missing"
            if on_gpu
            else f"liger-kernel runs on a GPU alone, and this is a {device.type}"
        )
        raise UserError("training.layer_kernels", what, "install qlora[gpu] on a machine with a GPU, or set it to auto")


def _liger_runs(device: torch.device) -> bool:
    return device.type == "cuda" and HAS_TRITON and liger.is_there()


def use_layer_kernels(model: nn.Module, kernels: Kernels | None) -> None:
    """Gives every norm, gated MLP and rotary embedding of the model that is proven to be one their functions."""
    if kernels is None:
        return
    if kernels.rotary is not None:
        use_rotary(model, kernels.rotary)
    for module in [*model.modules()]:
        kind: Any = type(module)
        if "forward" in vars(module) or issubclass(kind, FusedNorm | FusedMLP):
            continue
        if order := order_of(module):
            module.__class__ = _norm(kind, order, _epsilon(module), kernels)
        elif activation := activation_of(module):
            module.__class__ = _mlp(kind, activation, kernels)


def in_words(model: nn.Module) -> str:
    """How many modules have which functions; empty where none has."""
    modules: Any = [module for module in model.modules() if isinstance(module, FusedNorm | FusedMLP)]
    if not modules:
        return ""
    norms = sum(isinstance(module, FusedNorm) for module in modules)
    rotary = sum(hasattr(module, "has_rotary") for module in model.modules())
    counts = ((norms, "norm"), (len(modules) - norms, "MLP"), (rotary, "rotary embedding"))
    told = [f"{number} {what}{'s' * (number > 1)}" for number, what in counts if number]
    together = " and ".join([", ".join(told[:-1]), told[-1]] if told[1:] else told)
    return f"{together} fused ({modules[0].kernels.name})"


class FusedNorm(nn.Module):
    """Stands before a model's class of norm and replaces its forward; it has no parameters of its own."""

    kernels: Kernels
    order: str
    epsilon: str  # the name of its attribute

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., d) to (..., d)."""
        layer: Any = self
        if args or kwargs or layer.weight.requires_grad:
            unfused: Tensor = super().forward(x, *args, **kwargs)
            return unfused
        return self.kernels.rms_norm(x, layer.weight, getattr(layer, self.epsilon), self.order)


class FusedMLP(nn.Module):
    """Stands before a model's class of gated MLP and replaces its forward; it has no parameters of its own."""

    kernels: Kernels
    activation: str

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., d) to (..., d)."""
        layer: Any = self
        if args or kwargs or is_watched(layer.act_fn):
            unfused: Tensor = super().forward(x, *args, **kwargs)
            return unfused
        gate, up = layer.gate_proj(x), layer.up_proj(x)
        same = gate.dtype == up.dtype and gate.device == up.device
        y: Tensor = layer.down_proj(self.kernels.gated(gate, up, self.activation) if same else layer.act_fn(gate) * up)
        return y


@cache
def _norm(kind: type, order: str, epsilon: str, kernels: Kernels) -> type:
    body = {"__module__": kind.__module__, "order": order, "epsilon": epsilon, "kernels": kernels}
    return type(kind.__name__, (FusedNorm, kind), body)


@cache
def _mlp(kind: type, activation: str, kernels: Kernels) -> type:
    body = {"__module__": kind.__module__, "activation": activation, "kernels": kernels}
    return type(kind.__name__, (FusedMLP, kind), body)


def order_of(module: nn.Module) -> str | None:
    """Which of rms_norm's orders a module computes, in every type and mixture of two; None where it is none."""
    weight, epsilon = module._parameters.get("weight"), _epsilon(module)
    if weight is None or weight.dim() != 1 or epsilon is None:
        return None
    if len(module._parameters) > 1 or module._modules or module._buffers:
        return None
    cases = []
    for x_type, weight_type in product(PROVEN_IN, PROVEN_IN):
        x = _random(6, WIDTH) * torch.logspace(-3, 1, 6, device="cpu").unsqueeze(1)
        cases.append((x.to(x_type), _random(WIDTH, seed=1).to(weight_type)))
    eps = getattr(module, epsilon)
    found = [_run(_stand_in(module, parameters={"weight": weight}), x) for x, weight in cases]
    for order in ORDERS:
        if all(_same(y, reference_rms_norm(*case, eps, order)) for y, case in zip(found, cases, strict=True)):
            return order
    return None


def activation_of(module: nn.Module) -> str | None:
    """The activation of a module that computes down(act(gate(x)) * up(x)) and nothing else; None where it is none."""
    if module._modules.keys() != GATED_MLP or module._parameters or module._buffers:
        return None
    activation: Any = module._modules["act_fn"]
    inputs = [_random(WIDTH).mul(4).to(dtype) for dtype in PROVEN_IN]
    known = (
        name
        for name, one in ACTIVATIONS.items()
        if not [*activation.parameters()] and all(_same(_run(activation, x), one.apply(x)) for x in inputs)
    )
    name = next(known, None)
    return name if name is not None and all(_is_plain(module, name, dtype) for dtype in PROVEN_IN) else None


def _is_plain(mlp: nn.Module, activation: str, dtype: torch.dtype) -> bool:
    """Whether an MLP's own forward, with three small weights, gives the bits of the plain product."""
    shapes = {"gate_proj": (WIDTH, 16), "up_proj": (WIDTH, 16), "down_proj": (16, WIDTH)}
    small: dict[str, Any] = {
        name: partial(F.linear, weight=_random(*shape, seed=seed).to(dtype))
        for seed, (name, shape) in enumerate(shapes.items(), start=1)
    }
    x = _random(5, 16).to(dtype)
    wanted = small["down_proj"](reference_gated(small["gate_proj"](x), small["up_proj"](x), activation))
    return _same(_run(_stand_in(mlp, modules=small | {"act_fn": mlp._modules["act_fn"]}), x), wanted)


def _epsilon(module: nn.Module) -> str | None:
    return next((name for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)


def _stand_in(module: nn.Module, **parts: dict[str, Any]) -> nn.Module:
    """A module with all the attributes of another, but other parameters or modules, in training mode."""
    twin = copy.copy(module)
    for name, part in parts.items():
        setattr(twin, f"_{name}", part)
    twin.training = True  # where dropout would show
    return twin


def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a module's class makes of x, on a CPU and without its hooks; None where it fails or makes no tensor."""
    try:
        with torch.no_grad(), torch.device("cpu"):
            y = module.forward(x)
    except Exception:  # anybody's code, given a weight that is not its own
        return None
    return y if isinstance(y, Tensor) else None


def _same(found: Tensor | None, wanted: Tensor) -> bool:
    return found is not None and found.dtype == wanted.dtype and torch.equal(found, wanted)


def _random(*shape: int, seed: int = 0) -> Tensor:
    """From a generator of its own: a run draws the same numbers with and without a proof."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
