"""Which layers are computed again in backward, rather than keep their activations from forward: the first so many.

The first ones, since theirs comes last in backward, when the activations that the others kept are given back already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from qlora_cli.kernels.host_stack import HostStack


def checkpointing_layers(model: Any) -> list[Any]:
    """The layers that can be recomputed, in the order of the model: an encoder's before its decoder's."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute(model: Any, number: int, stack: HostStack | None = None) -> None:
    """Recomputes the activations of the first `number` layers in backward, and keeps those of the others.

    stack: takes what these layers are given into host memory; None: it stays on the device.
    It may be called any number of times, between steps. Nothing but training sees it: a layer in evaluation mode looks
    at neither of the two attributes that are set here. No bit of a gradient changes: the generators' state of the
    forward pass comes back. A model without layers that transformers knows to recompute does it as a whole, or not.
    """
    from torch.utils.checkpoint import checkpoint

    layers = checkpointing_layers(model)
    if not layers:
        _as_a_whole(model, number > 0)
    again = partial(checkpoint, use_reentrant=False)  # which asks for no embedding with a gradient, as the other does
    for index, layer in enumerate(layers):
        layer._gradient_checkpointing_func = again if stack is None else partial(_from_host, stack, again)
        layer.gradient_checkpointing = index < number


def _from_host(stack: HostStack, again: Callable[..., Any], layer: Any, *inputs: Any) -> Any:
    """Without a gradient, as what an embedding gives the first layer, there is one tensor at most: it stays."""
    if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].requires_grad:
        return again(layer, *inputs)
    with stack.keeping(inputs[0]):
        return again(layer, *inputs)


def _as_a_whole(model: Any, wanted: bool) -> None:
    """Models with code of their own for it. The methods have had two names."""
    if not wanted:
        if getattr(model, "is_gradient_checkpointing", False):
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        return
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
