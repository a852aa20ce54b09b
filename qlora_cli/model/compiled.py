"""training.torch_compile: every repeated layer of a model compiled by torch, for steps of training.

Compiled is what lies between the linear layers: norms, activations, rotary embeddings, residuals. Linear layers that
are quantised or have an adapter, and the attention of packed rows, stay as they are and outside of the graphs. Layers
of one class share their graphs, whatever they are called and whichever they are, and lengths are symbols in them.
Recomputation stands around a compiled layer. Evaluation and generation run the plain code.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_cli.errors import Exit, UserError
from qlora_cli.kernels.packed_attention import NAME, packed_attention, unwrapped
from qlora_cli.model.fused import READERS
from qlora_cli.model.recompute import checkpointing_layers
from qlora_cli.quant.kernels import HAS_TRITON


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch could not build what it compiles for the device."""
    on_gpu = device.type == "cuda"
    if HAS_TRITON if on_gpu else _has_cpp_compiler():
        return
    needed = "Triton, a C compiler and Python's headers" if on_gpu else "a C++ compiler and Python's headers"
    todo = f"install {'qlora[gpu], gcc' if on_gpu else 'g++'} and the headers (python3-dev), or leave it out"
    raise UserError("training.torch_compile", f"torch compiles with {needed}: not all are here", todo, Exit.ENVIRONMENT)


def _has_cpp_compiler() -> bool:
    """Whether torch finds one, and the headers that its kernels include."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return Path(sysconfig.get_config_var("INCLUDEPY") or "", "Python.h").exists()


def compile_layers(model: Any) -> int:
    """Compiles the layers of a model with its adapter, each by itself, in their first step of training.

    Names, parameters and files stay as they are. Returns the number of layers. Raises UserError for a model without
    layers that transformers knows.
    """
    layers = checkpointing_layers(unwrapped(model))
    if not layers:
        what = "transformers knows no repeated layers in this model that could be compiled"
        raise UserError("training.torch_compile", what, "leave it out")
    for layer in layers:
        _set_apart(layer)
        kind: Any = type(layer)
        layer.__class__ = _compiled(kind)
    _keep_packed_attention_out()
    return len(layers)


def _set_apart(module: nn.Module) -> None:
    """Keeps a module's quantised and adapted linear layers out of the graphs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for child in module.children():
        kind: Any = type(child)
        if isinstance(child, BaseTunerLayer) or (kind is not nn.Linear and issubclass(kind, nn.Linear)):
            child.__class__ = _apart(kind)  # not by instance: the graphs of one layer have to fit the others
        else:
            _set_apart(child)


@cache
def _apart(kind: Any) -> Any:
    body = {"__module__": kind.__module__, "forward": torch.compiler.disable(kind.forward)}
    swapped: Any = type(kind.__name__, (kind,), body)
    if kind in READERS:
        READERS[swapped] = READERS[kind]
    return swapped


@cache
def _compiled(kind: Any) -> Any:
    """The class of a layer with a forward that is compiled in training; transformers puts recomputation around it."""
    plain: Callable[..., Any] = getattr(kind.forward, "__wrapped__", kind.forward)  # without its own recomputation
    compiled = torch.compile(plain, dynamic=True)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        in_training = self.training and torch.is_grad_enabled()
        return (compiled if in_training else plain)(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": forward, "is_compiled": True})


def _keep_packed_attention_out() -> None:
    """Packed attention splits rows at numbers that a graph would have to be made anew for."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
