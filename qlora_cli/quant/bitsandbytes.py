"""bitsandbytes' layers as transformers loads them: configuration, the CPU trap, and what came out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qlora_cli.recipe.schema import Quantization


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


def quantization_config(quantization: Quantization, compute_dtype: torch.dtype) -> Any:
    """The transformers configuration for the recipe's data type, or None for 16-bit LoRA."""
    from transformers import BitsAndBytesConfig

    if quantization.data_type not in CONFIGS:
        return None
    skipped = quantization.skip_modules
    return BitsAndBytesConfig(
        llm_int8_skip_modules=[skipped] if isinstance(skipped, str) else list(skipped),
        **CONFIGS[quantization.data_type](quantization, compute_dtype),
    )


def quantized_modules(model: nn.Module) -> dict[str, Any]:
    """bitsandbytes' layers of the model by their full name; an adapter around them does not change the name."""
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def disarm_cpu_repacking(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in place during an evaluation on the CPU.

    On AVX512-BF16 CPUs `Linear4bit.forward` in eval mode swaps the weight for a layout without autograd and with
    absmax rounded to bfloat16: after one evaluation the gradient through the base is gone (bitsandbytes 0.50.2).
    """
    for module in quantized_modules(model).values():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(kind, tensor) of everything that the model holds in memory, each storage once: data type names and scales."""
    seen: set[int] = set()
    for kind, tensor in _kinds(model):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in seen:
            seen.add(pointer)
            yield kind, tensor


def _kinds(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        row_scales = getattr(parameter, "SCB", None)
        if state is not None:
            yield state.quant_type, parameter
            nested = [] if state.state2 is None else [state.state2.absmax, state.state2.code, state.offset]
            yield from (("scales", tensor) for tensor in [state.absmax, state.code, *nested])
        elif row_scales is not None:
            yield "int8", parameter
            yield "scales", row_scales
        else:
            yield str(parameter.dtype).removeprefix("torch."), parameter
    for buffer in model.buffers():
        yield str(buffer.dtype).removeprefix("torch."), buffer
