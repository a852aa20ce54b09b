"""Quantised layers of a model, bitsandbytes' and packed ones: how they are asked for, found, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.errors import UserError
from qlora_cli.quant import kernels
from qlora_cli.quant.bitsandbytes import CONFIGS, bitsandbytes_config
from qlora_cli.quant.blockwise import quantize
from qlora_cli.quant.embedding import PackedEmbedding
from qlora_cli.quant.gptq import package_layers, package_tensors
from qlora_cli.quant.packed import BUFFERS, PackedLayer
from qlora_cli.quant.roundtrip import dequantized
from qlora_cli.recipe.schema import Quantization

BLOCK_SIZE = 64
"""That of bitsandbytes' layers as transformers makes them."""


def quantization_config(quantization: Quantization, compute_dtype: torch.dtype, packed: bool = False) -> Any:
    """The transformers configuration of the recipe, or None where nothing is quantised.

    packed: our own layers also where bitsandbytes has one.
    """
    if is_packed(quantization) or (packed and quantization.data_type != "none"):
        return packed_config(quantization)
    return None if quantization.data_type == "none" else bitsandbytes_config(quantization, compute_dtype)


def is_packed(quantization: Quantization) -> bool:
    """Whether the layers are ours: for what bitsandbytes has no layer for, and for all of a mixed model."""
    if quantization.embeddings != "none":
        return True
    if quantization.data_type in ("none", "int8"):
        return bool(quantization.overrides)
    return bool(
        quantization.data_type not in CONFIGS or quantization.overrides or quantization.block_size != BLOCK_SIZE
    )


def packed_config(quantization: Quantization) -> Any:
    """The configuration of packed layers."""
    from qlora_cli.quant.plugin import PackedConfig

    return PackedConfig(
        quantization.data_type,
        skip_patterns(quantization),
        quantization.overrides,
        quantization.embeddings,
        block_size=quantization.block_size,
        double_quant=quantization.double_quant,
        zero_point=quantization.zero_point,
        clip=quantization.clip,
    )


def skip_patterns(quantization: Quantization) -> list[str]:
    """skip_modules as a list. Raises UserError for what is no pattern."""
    skipped = quantization.skip_modules
    patterns = [skipped] if isinstance(skipped, str) else list(skipped)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            what = f"{pattern!r} is no regular expression: {error}"
            raise UserError("quantization.skip_modules", what, "write names, or .* for any text") from error
    return patterns


def left_as_they_are(model: nn.Module, quantization: Quantization) -> list[str]:
    """The linear layers, GPT-2's among them, that an override leaves unquantised."""
    from transformers.pytorch_utils import Conv1D

    if not quantization.overrides:
        return []
    config = packed_config(quantization)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in linear if config.storage_of(name) is None]


def quantized_modules(model: nn.Module) -> dict[str, Any]:
    """The quantised layers, the embedding too, by their full name; an adapter around them does not change the name."""
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, PackedLayer, *package_layers())
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def quantized_linear(model: nn.Module) -> dict[str, Any]:
    """Of the quantised layers those with a weight of their own to multiply with: no embedding, nothing tied to it."""
    own = ((name, module) for name, module in quantized_modules(model).items() if not getattr(module, "shared", ()))
    return {name: module for name, module in own if not isinstance(module, nn.Embedding)}


def num_embeddings(model: Any) -> int:
    """Tokens that the model has a vector for."""
    embedding = model.get_input_embeddings()
    return embedding.num_embeddings if isinstance(embedding, PackedEmbedding) else len(embedding.weight)


def layer_values(
    weight: Tensor, quantization: Any, name: str, compute_dtype: torch.dtype, embedding: bool = False
) -> Tensor:
    """The float32 values that a quantised layer loaded with `dtype=compute_dtype` computes with.

    weight: (out_features, in_features), or an embedding's, as in the checkpoint; name: the module's.
    quantization: the recipe's Quantization, or the PackedConfig of packed layers where bitsandbytes has some too.
    embedding: whether it is the input embedding, or tied to it. See roundtrip.dequantized.
    """
    config: Any = quantization
    if isinstance(quantization, Quantization):
        config = packed_config(quantization) if is_packed(quantization) else None
    storage = config and (config.embedding_storage if embedding else config.storage_of(name))
    if storage is None:
        how = (quantization.data_type, quantization.double_quant, quantization.block_size)
        return dequantized(weight, *how, compute_dtype)
    packed = quantize(weight.to(compute_dtype), storage.code, storage.block_size, storage.double_quant)
    return kernels.dequantize(packed, storage.code, storage.block_size, weight.shape, compute_dtype).float()


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(kind, tensor) of everything that the model holds in memory, each storage once: data type names and scales.

    What stands for a tensor in host memory, which passes through the device's, is that tensor: see model/streamed.py.
    """
    seen: set[int] = set()
    on_host = {key: host for module in model.modules() for key, host in getattr(module, "on_host", {}).items()}
    for kind, tensor in _kinds(model):
        streamed = on_host.get(id(tensor))
        pointer = tensor.untyped_storage().data_ptr() if streamed is None else streamed.data_ptr()
        tensor = tensor if streamed is None else streamed
        if pointer not in seen:
            seen.add(pointer)
            yield kind, tensor


def _kinds(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from package_tensors(model)
    packed = [module for module in model.modules() if isinstance(module, PackedLayer)]
    for module in packed:
        yield module.storage.data_type, module.weight
        yield from (("scales", tensor) for name in BUFFERS if (tensor := getattr(module, name)) is not None)
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
