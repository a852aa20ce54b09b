"""bitsandbytes' layers as transformers loads them: configuration, a faster quantiser, and the CPU trap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.quant.bits import pack
from qlora_cli.quant.blockwise import quantize
from qlora_cli.quant.data_types import CODES
from qlora_cli.quant.rounding import nearest
from qlora_cli.quant.scales import TINY
from qlora_cli.recipe.schema import Quantization

OPERATOR = "bitsandbytes::quantize_4bit"
"""What turns a weight into codes and absmax; all else of a quantised parameter the library makes of these."""


def four_bit(quantization: Quantization, compute_dtype: torch.dtype) -> dict[str, Any]:
    """NF4 or FP4 blocks of 64 weights, optionally with quantised scales (QLoRA sections 3.1 and 3.2)."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quantization.data_type,
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
    }


def eight_bit(quantization: Quantization, compute_dtype: torch.dtype) -> dict[str, Any]:
    """LLM.int8 (Dettmers et al. 2022): int8 with the input features beyond the threshold multiplied in 16 bits."""
    return {"load_in_8bit": True, "llm_int8_threshold": quantization.outlier_threshold}


CONFIGS = {"nf4": four_bit, "fp4": four_bit, "int8": eight_bit}
"""bitsandbytes' arguments by recipe data type; `none` has no entry: the weights stay in compute_dtype."""


def bitsandbytes_config(quantization: Quantization, compute_dtype: torch.dtype) -> Any:
    """transformers' configuration of the data types that bitsandbytes has."""
    from transformers import BitsAndBytesConfig

    skipped = quantization.skip_modules
    return BitsAndBytesConfig(
        llm_int8_skip_modules=[skipped] if isinstance(skipped, str) else list(skipped),
        **CONFIGS[quantization.data_type](quantization, compute_dtype),
    )


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Lets a checkpoint that was stored with 4-bit layers compute in `dtype`, not in what it was stored from.

    Of such a checkpoint transformers leaves all other weights in the type of the file, whatever it is told (5.23: its
    converter of 4-bit layers takes every name that ends in `weight`, and casts nothing), and bitsandbytes dequantises
    to the type that was quantised. Nothing happens to a model without such layers.
    """
    import bitsandbytes as bnb

    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.compute_dtype = dtype
        layer.weight.quant_state.dtype = dtype
    kept = tuple(model._get_dtype_plan(dtype))  # parts of the names of what a class keeps in float32
    for name, parameter in model.named_parameters() if layers else ():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def faster_quantiser() -> Iterator[None]:
    """Within it bitsandbytes quantises weights on the CPU by our quantiser: its own bits, in a fraction of the time.

    Its operator has no kernel of its own for the CPU (0.50.2); it gets one and loses it again. Nothing happens where a
    version has one, or gives other bits.
    """
    if not _has_our_bits() or torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR, "CPU"):
        yield
        return
    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("quantize_4bit", _quantize_4bit, "CPU")
    try:
        yield
    finally:
        library._destroy()


@cache
def _has_our_bits() -> bool:
    """Whether the installed bitsandbytes rounds as we do: on weights that lie on, above and below every bound."""
    from bitsandbytes.functional import quantize_4bit

    for name in ("nf4", "fp4"):
        levels = torch.tensor(CODES[name](False, "auto").levels).sort().values
        bounds = (levels[1:] + levels[:-1]) / 2
        up, down = (torch.nextafter(bounds, torch.tensor(side)) for side in (9.0, -9.0))
        first = [bounds, up, down, torch.linspace(-1, 1, 19)]  # a block with an absmax of 1
        weight = torch.cat([*first, torch.linspace(-3, 5, 64), torch.zeros(64), torch.linspace(-0.7, 0.3, 17)])
        codes, state = quantize_4bit(weight, blocksize=64, quant_type=name)
        ours, absmax = _quantize_4bit(weight, 64, name, torch.uint8)
        if not (torch.equal(codes, ours) and torch.equal(state.absmax, absmax)):
            return False
    return True


def _quantize_4bit(
    weight: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes (bytes, 1) uint8, or viewed as quant_storage, and absmax (blocks,) fp32; the last block may be short."""
    flat, code = weight.reshape(-1), CODES[quant_type](False, "auto")
    whole = len(flat) - len(flat) % blocksize
    packed = quantize(flat[:whole], code, blocksize, double_quant=False, exact=True)
    codes, absmax = [packed.codes], [packed.scales.values]
    if whole < len(flat):
        rest = flat[whole:].float()
        absmax.append(rest.abs().amax(dim=0, keepdim=True).clamp(min=TINY))
        codes.append(pack(nearest(nn.functional.pad(rest / absmax[-1], (0, len(rest) % 2)), code.levels), 4))
    return torch.cat(codes).view(quant_storage).unsqueeze(1), torch.cat(absmax)


def disarm_cpu_repacking(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in place during an evaluation on the CPU.

    On AVX512-BF16 CPUs `Linear4bit.forward` in eval mode swaps the weight for a layout without autograd and with
    absmax rounded to bfloat16: after one evaluation the gradient through the base is gone (bitsandbytes 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (a module's attribute, no submodule)
