"""bitsandbytes' layers as transformers loads them: configuration, and the CPU trap."""

from __future__ import annotations

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


def bitsandbytes_config(quantization: Quantization, compute_dtype: torch.dtype) -> Any:
    """transformers' configuration of the data types that bitsandbytes has."""
    from transformers import BitsAndBytesConfig

    skipped = quantization.skip_modules
    return BitsAndBytesConfig(
        llm_int8_skip_modules=[skipped] if isinstance(skipped, str) else list(skipped),
        **CONFIGS[quantization.data_type](quantization, compute_dtype),
    )


def disarm_cpu_repacking(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in place during an evaluation on the CPU.

    On AVX512-BF16 CPUs `Linear4bit.forward` in eval mode swaps the weight for a layout without autograd and with
    absmax rounded to bfloat16: after one evaluation the gradient through the base is gone (bitsandbytes 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (a module's attribute, no submodule)
