"""liger-kernel's Triton functions of a layer, for tensors on a GPU (extra `gpu`). Imported only where they are used.

They keep for backward what `rms_norm` and `swiglu` keep, and of rotary embeddings the angles alone. That of the gated
product writes the two gradients over gate and up, which nothing else keeps.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from qlora_cli.kernels.rms_norm import rms_norm as torch_rms_norm
from qlora_cli.kernels.swiglu import gated as torch_gated

CASTS = {"llama": ("llama", 0.0), "olmo": ("gemma", 0.0), "gemma": ("gemma", 1.0)}
"""Orders of `rms_norm` to liger's casting_mode and offset."""


def is_there() -> bool:
    """Whether the package is installed, without importing it."""
    return find_spec("liger_kernel") is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float, order: str = "llama") -> Tensor:
    """As kernels.rms_norm's, for x and a frozen weight on a GPU."""
    if x.dtype != weight.dtype:  # liger's output has x's type, the model's the wider one
        return torch_rms_norm(x, weight, eps, order)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    casting_mode, offset = CASTS[order]
    y: Tensor = LigerRMSNormFunction.apply(x, weight, eps, offset, casting_mode, False)  # False: not over grad
    return y


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """As kernels.swiglu's, for gate and up on a GPU."""
    if activation == "gelu":  # of which liger has the approximation by tanh alone
        return torch_gated(gate, up, activation)
    if activation == "silu":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Function
    else:
        from liger_kernel.ops.geglu import LigerGELUMulFunction as Function
    y: Tensor = Function.apply(gate, up)
    return y


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query (B, H, T, D) and key (B, H_kv, T, D), turned by cos and sin (B or 1, T, D) whose halves are the same."""
    from liger_kernel.ops.rope import LigerRopeFunction

    turned: tuple[Tensor, Tensor] = LigerRopeFunction.apply(query.clone(), key.clone(), cos, sin)  # which it overwrites
    return turned
