"""The base and its adapter as training would have them, from the config alone: every tensor on `meta`, none of it read.

Layers are the genuine ones: bitsandbytes' `Linear4bit` with its nested quantisation state, our packed layers, PEFT's
LoRA around them. Only what they hold is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.adapter import attach_adapter
from qlora_cli.model.base import Base, compute_dtype_for, quiet_loading
from qlora_cli.model.checks import check_skipped
from qlora_cli.model.continued import as_continued
from qlora_cli.model.heads import NO_HEAD, TASKS, Head, auto_class, head_of, needs_packed
from qlora_cli.model.layer_kernels import choose, use_layer_kernels
from qlora_cli.model.placement import Hosted, Placed, place
from qlora_cli.model.start import changes_base
from qlora_cli.quant.bitsandbytes import compute_in, disarm_cpu_repacking
from qlora_cli.quant.layers import quantization_config
from qlora_cli.quant.linear4bit import Linear4bitByBlocks
from qlora_cli.quant.roundtrip import cpu_dequantize_is_wrong
from qlora_cli.recipe import Recipe

NESTED_BLOCK, LEVELS, NESTED_LEVELS = 256, 16, 256
"""bitsandbytes' double quantisation: scales of 256 blocks share one, and both code books are tensors."""


@dataclass(frozen=True)
class MetaModel:
    """A base whose tensors are on meta, and the PEFT model around it. placed: what of them is in host memory."""

    base: Base
    model: Any
    placed: Placed = field(default_factory=Placed)


def meta_model(recipe: Recipe, config: Any, kind: str, tokenizer: Any = None) -> MetaModel:
    """The recipe's base with its adapter, ready for a rehearsal on a device of `kind`.

    config: transformers' own, of the base. tokenizer: where a task reads one; any that gives token types is assumed.
    Raises UserError for what cannot be built without weights.
    """
    dtype, config = compute_dtype(recipe, kind), copy.deepcopy(config)
    text = config.get_text_config()
    if text.pad_token_id is None:  # which loading takes from the tokenizer; any will do here
        text.pad_token_id = text.vocab_size - 1
    added = tuple(range(text.vocab_size, text.vocab_size + len(recipe.model.added_tokens)))
    text.vocab_size += len(added)  # at most: the embedding may have room for them
    model, head = _bare_model(recipe, config, dtype, kind)
    model.requires_grad_(False)
    placed = place(model, recipe, torch.device("meta")) if kind == "cuda" else Placed()
    use_layer_kernels(model, choose(recipe.training, torch.device("meta")))
    tokenizer = tokenizer or SimpleNamespace(model_input_names=("input_ids", "token_type_ids", "attention_mask"))
    known = (Path(recipe.model.name_or_path), tokenizer, frozenset[int](), config, recipe.model.task)
    base = Base(*known, model.eval(), dtype, "", head=head, added_ids=added)
    _ = base.tail  # read here, where it shows that nothing can be proven
    with torch.device("meta"):
        wrapped = attach_adapter(base, as_continued(recipe.adapter))
    wrapped.train()
    model.config.use_cache = False
    return MetaModel(base, wrapped, placed)


def compute_dtype(recipe: Recipe, kind: str) -> torch.dtype:
    """The recipe's compute type on a device of that kind; on a GPU that is not here `auto` is bfloat16."""
    wanted = recipe.quantization.compute_dtype
    if kind == "cuda" and wanted == "auto" and not torch.cuda.is_available():
        return torch.bfloat16
    return compute_dtype_for(wanted, torch.device(kind))


def _bare_model(recipe: Recipe, config: Any, dtype: torch.dtype, kind: str) -> tuple[Any, Head]:
    """transformers' model with the layers that loading would put into it."""
    stored = getattr(config, "quantization_config", None)
    stored = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
    if stored and stored.get("quant_method") in ("gptq", "awq"):
        what = f"the base is stored as {stored['quant_method']}, whose layers cannot be built without their kernels"
        raise UserError("model.name_or_path", what, "plan its unquantised checkpoint instead", Exit.REFUSED)
    model = _on_meta(recipe, config, dtype)
    head = head_of(model, ()) if TASKS[recipe.model.task].has_head else NO_HEAD
    quantizer = _quantizer(recipe, config, dtype, head, stored)
    if quantizer is not None:
        with quiet_loading():
            quantizer.preprocess_model(model, dtype=dtype, device_map={"": kind})
            if stored is None:
                check_skipped(model, recipe.quantization.skip_modules)
            _fill(model, dtype, kind)
            quantizer.postprocess_model(model)  # by whose marks PEFT knows the layers
    model.tie_weights()
    for name in head.modules:
        model.get_submodule(name).float()
    disarm_cpu_repacking(model)
    if stored:
        compute_in(model, dtype)
    return model, head


def _on_meta(recipe: Recipe, config: Any, dtype: torch.dtype) -> Any:
    """As heads.on_meta, in `dtype`, with the recipe's attention and nothing initialised."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    attention = recipe.model.attn_implementation
    arguments: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        with torch.device("meta"), no_init_weights():
            model = auto_class(recipe.model.task).from_config(
                config, dtype=dtype, trust_remote_code=recipe.model.trust_remote_code, **arguments
            )
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise UserError(
            "model.name_or_path", f"transformers cannot build this model: {cause}", "check its config.json"
        ) from error
    if dtype != torch.float32:
        wide = model._keep_in_fp32_modules_strict or ()
        for name, module in model.named_modules():
            if set(name.split(".")) & set(wide):
                module.float()
    return model


def _quantizer(recipe: Recipe, config: Any, dtype: torch.dtype, head: Head, stored: dict[str, Any] | None) -> Any:
    """What puts quantised layers into the model, None where there are none."""
    from transformers.quantizers.auto import AutoHfQuantizer

    import qlora_cli.quant.plugin  # noqa: F401 (registers our quantizer, which a stored base may name)

    if stored:
        with quiet_loading():
            return AutoHfQuantizer.from_config(stored, pre_quantized=True)
    quantization = head.spared(recipe.quantization)
    started = changes_base(recipe.adapter) and quantization.data_type != "none"
    packed = started or needs_packed(config, recipe.model.task, quantization)
    settings = quantization_config(quantization, dtype, packed)
    if settings is None:
        return None
    ours = type(settings).__module__.startswith("qlora_cli.")  # whose layers without values have their packed shape
    return AutoHfQuantizer.from_config(settings, pre_quantized=ours)


def _fill(model: nn.Module, dtype: torch.dtype, kind: str) -> None:
    """Gives bitsandbytes' layers their packed tensors and scales, as quantising would."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) and module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)
        if isinstance(module, bnb.nn.Linear4bit):
            _fill_4bit(module, dtype)
            out_features, in_features = module.weight.quant_state.shape
            wrong = cpu_dequantize_is_wrong(in_features, out_features, module.weight.quant_state.blocksize)
            if kind == "cpu" and wrong:
                module.__class__ = Linear4bitByBlocks
        elif isinstance(module, bnb.nn.Linear8bitLt):
            codes = torch.empty((module.out_features, module.in_features), dtype=torch.int8, device="meta")
            scales = torch.empty(module.out_features, device="meta")
            module.weight = bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)


def _fill_4bit(layer: Any, dtype: torch.dtype) -> None:
    """Not by quantising on meta: that would leave a meta tensor in bitsandbytes' table of code books."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    before = layer.weight
    shape = torch.Size((layer.out_features, layer.in_features))
    blocks = -(-shape.numel() // before.blocksize)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    nested: dict[str, Any] = {}
    if before.compress_statistics:
        scales = empty(-(-blocks // NESTED_BLOCK))
        inner = {"blocksize": NESTED_BLOCK, "code": empty(NESTED_LEVELS), "dtype": torch.float32}
        nested = {"offset": empty(), "state2": QuantState(absmax=scales, **inner)}
    absmax = empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    known = {"blocksize": before.blocksize, "quant_type": before.quant_type}
    state = QuantState(absmax=absmax, shape=shape, code=empty(LEVELS), dtype=dtype, **known, **nested)
    codes = empty(-(-shape.numel() // (2 * before.quant_storage.itemsize)), 1, dtype=before.quant_storage)
    layer.weight = Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        compress_statistics=before.compress_statistics,
        quant_storage=before.quant_storage,
        module=layer,
        bnb_quantized=True,
        **known,
    )
    layer.quant_state = state


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """("weights" or "adapter", tensor) of all that the model holds on its device, each storage once."""
    seen: set[int] = set()
    for kind, tensor in _tensors(model):
        key = tensor.untyped_storage()._cdata
        if key not in seen:
            seen.add(key)
            yield kind, tensor


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for module in model.modules():
        if not isinstance(module, Hosted):
            yield from _own_tensors(module)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for parameter in module.parameters(recurse=False):
        yield "adapter" if parameter.requires_grad else "weights", parameter
        state, scales = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
        if scales is not None:
            yield "weights", scales
        while state is not None:
            yield from (("weights", one) for one in (state.absmax, state.code, state.offset) if one is not None)
            state = state.state2
    yield from (("weights", buffer) for buffer in module.buffers(recurse=False))
