"""What every data type makes of a model: error, bits and speed of each linear weight, and perplexity on given rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.data.examples import Examples
from qlora_cli.data.rows import count
from qlora_cli.errors import UserError
from qlora_cli.evaluate.loss import held_out_loss
from qlora_cli.model.base import (
    Found,
    compute_dtype_for,
    default_device,
    find_base,
    load_base,
    load_config,
)
from qlora_cli.model.heads import find_head
from qlora_cli.model.placement import resident
from qlora_cli.model.skeleton import skeleton
from qlora_cli.model.source import fetch_weights, file_of, locate
from qlora_cli.model.weights import of_checkpoint
from qlora_cli.quant.data_types import CODES
from qlora_cli.quant.layers import skip_patterns
from qlora_cli.quant.measure import Figures, measure, quantizer
from qlora_cli.recipe import Quantization, Recipe
from qlora_cli.recipe.remote import with_whole_paths
from qlora_cli.train.reading import encode_role
from qlora_cli.train.report import Report

IN_BLOCKS = CODES.keys() - {"int8"}
"""Data types with a scale per block; bitsandbytes' int8 has one per row."""

PLAIN = "none"
"""The data type whose perplexity the others are seen beside; nothing of it is fast or slow."""

TELL_S = 10
"""So often it is told how far the weights are."""

Types = Mapping[str, Quantization]
"""Data types by name, with the options of the recipe."""


@dataclass(frozen=True)
class Layer:
    """A linear layer: its full name, the shape (out, in) of its weight, and its figures by data type."""

    name: str
    shape: torch.Size
    figures: dict[str, Figures]


def inspect(recipe: Recipe, data_types: Sequence[str], report: Report, max_length: int | None = None) -> dict[str, Any]:
    """Figures of every data type, in total and by layer; with rows in data.eval perplexity too, of `none` first.

    Q in ‖W − Q‖ / ‖W‖ is what a layer multiplies with: the deployed quantiser's, double quantisation and the rounding
    of W and Q to compute_dtype included. One weight is in memory at a time, and then one model.
    max_length: tokens of a row that are read; as many as the model reads at once where None.
    """
    given, recipe = recipe.model.name_or_path, with_whole_paths(recipe)
    folder = locate(recipe.model)
    config = unquantized_config(recipe, folder)
    found = find_base(recipe) if recipe.data.eval else None
    examples = read_rows(recipe, found, report, max_length) if found else None
    names = list(dict.fromkeys([*([PLAIN] if examples else []), *data_types]))
    device = default_device()
    dtype = compute_dtype_for(recipe.quantization.compute_dtype, device)
    fetch_weights(recipe.model, folder)
    spared = find_head(folder, config, recipe.model).spared(recipe.quantization)
    types = {name: spared.model_copy(update={"data_type": name}) for name in names}
    model = skeleton(recipe, folder, config)
    layers, left_out = measure_layers(folder, model, types, (dtype, device), report)
    result = {
        "model": given,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "options": recipe.quantization.model_dump(include={"block_size", "double_quant", "zero_point", "clip"}),
        "types": {name: in_total(name, layers) for name in names},
        "layers": [by_type(layer) for layer in layers],
        "left_out": [{"where": one.where, "what": one.what, "todo": one.todo} for one in left_out],
    }
    if found and examples:
        result |= {"rows": len(examples.rows), "tokens": examples.num_trained}
        for name, quantization in types.items():
            as_type = recipe.model_copy(update={"quantization": quantization})
            result["types"][name] |= perplexity(as_type, found, examples, device, report)
            gc.collect()  # a model has cycles, and the next one needs its memory
    return {**result, "summary": in_words(result)}


def read_rows(recipe: Recipe, found: Found, report: Report, max_length: int | None) -> Examples:
    """The rows of data.eval, none of more tokens than the model has positions. Raises UserError for what has none."""
    context = found.context
    if max_length and context and max_length > context:
        what = f"the model has {context:,} positions"
        raise UserError(f"--max-length {max_length}", what, f"name at most {context}, or leave it out")
    data = recipe.data.model_copy(update={"max_length": max_length or context or recipe.data.max_length})
    try:
        return encode_role(recipe.model_copy(update={"data": data}), found, "eval", report, date.today())
    finally:
        report.end()


def unquantized_config(recipe: Recipe, folder: Path) -> Any:
    """The model's config. Raises UserError for a model whose weights are codes already."""
    config = load_config(folder, recipe.model)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(folder, "this model is stored quantised", "inspect its full-precision checkpoint")
    return config


def measure_layers(
    folder: Path, model: Any, types: Types, on: tuple[torch.dtype, torch.device], report: Report
) -> tuple[list[Layer], list[UserError]]:
    """Every linear layer outside skip_modules, measured, and why others are not.

    A weight that one type cannot take is left out of all, so that their totals are of the same weights.
    on: what layers compute in, and where. Raises UserError where none is left.
    """
    dtype, device = on
    options = next(iter(types.values()))
    block_size = options.block_size if IN_BLOCKS & types.keys() else 1
    names, weight_of = linear_names(model, options), of_checkpoint(folder, model)
    if not names:
        raise UserError(folder, "no linear layer to quantise", "check quantization.skip_modules")
    for quantization in types.values():  # what is loaded at a first call is not timed
        blocks = torch.arange(4.0 * options.block_size, device=device).view(4, -1)
        measure(blocks, quantizer(quantization, names[0], dtype))
    layers: list[Layer] = []
    left_out: list[UserError] = []
    for name in telling(names, report):
        try:
            check_own(name, model, block_size)
            weight = checked(weight_of(name), name, model, folder).to(device)
        except UserError as error:
            left_out.append(error)
            continue
        figures = {kind: measure(weight, quantizer(how, name, dtype)) for kind, how in types.items()}
        layers.append(Layer(name, weight.shape, figures))
    if not layers:
        raise left_out[0]
    return layers, left_out


def linear_names(model: nn.Module, options: Quantization) -> list[str]:
    """The linear layers that a data type quantises, GPT-2's among them: all outside skip_modules."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = skip_patterns(options)
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return [name for name in linear if should_convert_module(name, skipped)]


def check_own(name: str, model: Any, block_size: int) -> None:
    """Refuses a weight that is another layer's too, and one of no whole blocks."""
    weight = model.get_submodule(name).weight
    if weight is model.get_input_embeddings().weight:
        raise UserError(name, "is the embedding's weight too", "put it into quantization.skip_modules")
    if weight.numel() % block_size:
        what = f"has {weight.numel():,} values, which is no multiple of quantization.block_size {block_size}"
        raise UserError(name, what, "set another block size")


def checked(weight: Tensor, name: str, model: Any, folder: Path) -> Tensor:
    """A weight as it was read. Raises UserError for one that is not finite, or of another shape than the model's."""
    where = f"{file_of(f'{name}.weight', folder)}: {name}.weight"
    wanted = model.get_submodule(name).weight
    if weight.numel() != wanted.numel():
        what = f"{tuple(weight.shape)} in the file, {tuple(wanted.shape)} in the model"
        raise UserError(where, what, "check that config.json belongs to the checkpoint")
    if not weight.isfinite().all():
        raise UserError(where, "holds NaN or infinity", "restore the checkpoint")
    return weight


def telling(names: Sequence[str], report: Report) -> Iterator[str]:
    """The names, with a line every TELL_S seconds that says how far they are."""
    told = time.monotonic()
    for at, name in enumerate(names):
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            report.say(f"weights  {at:,} of {len(names):,} measured")
        yield name


def perplexity(
    recipe: Recipe, found: Found, examples: Examples, device: torch.device, report: Report
) -> dict[str, Any]:
    """Loss and perplexity of the base as the recipe quantises it; where it cannot, `refused` says why.

    Raises UserError where it cannot be loaded even unquantised.
    """
    name = recipe.quantization.data_type
    try:
        base = load_base(resident(recipe), device, found)
        loss = held_out_loss(base, base.model, examples.rows, recipe.training.micro_batch_size)
    except (UserError, torch.OutOfMemoryError) as error:
        if name == PLAIN and isinstance(error, UserError):
            raise
        report.say(f"{name:<8} no perplexity: {error}")
        return {"loss": None, "perplexity": None, "refused": str(error)}
    report.say(f"{name:<8} perplexity {loss.perplexity:.4g}; {base.summary}")
    if base.note:
        report.say(f"note     {base.note}")
    return {"loss": loss.loss, "perplexity": loss.perplexity}


def in_total(kind: str, layers: Sequence[Layer]) -> dict[str, Any]:
    """The figures of a data type over all layers, and the layer of the largest error."""
    worst = max(layers, key=lambda layer: layer.figures[kind].error)
    told = as_json(kind, sum((layer.figures[kind] for layer in layers), Figures()))
    return {**told, "worst": {"layer": worst.name, "error": worst.figures[kind].error}}


def by_type(layer: Layer) -> dict[str, Any]:
    """A layer's figures."""
    types = {kind: as_json(kind, figures) for kind, figures in layer.figures.items()}
    return {"name": layer.name, "shape": layer.shape, "types": types}


def as_json(kind: str, figures: Figures) -> dict[str, Any]:
    """Error, bits and speed; a copy's speed is told as none."""
    speeds = {"quantize": figures.quantize_s, "dequantize": figures.dequantize_s}
    told = {
        f"{name}_weights_per_s": None if kind == PLAIN else figures.num_weights / seconds
        for name, seconds in speeds.items()
    }
    return {"num_weights": figures.num_weights, "bits": figures.bits, "error": figures.error, **told}


def in_words(result: dict[str, Any]) -> list[str]:
    """What was measured, and how."""
    options, total = result["options"], next(iter(result["types"].values()))
    parameters = f"{total['num_weights']:,} of {result['num_parameters']:,} parameters"
    scales = "quantised scales" if options["double_quant"] else "fp32 scales"
    blocks = f"blocks of {options['block_size']}, {scales}, " if IN_BLOCKS & result["types"].keys() else ""
    threads = f", {count(result['threads'], 'thread')}" if result["device"] == "cpu" else ""
    rows = f"perplexity over {count(result['rows'], 'row')}, {result['tokens']:,} tokens" if "rows" in result else ""
    return [
        f"{result['model']}: {count(len(result['layers']), 'linear layer')}, {parameters}",
        f"{blocks}{result['compute_dtype']}; speed in 10^9 weights per second, on {result['device']}{threads}",
        *filter(None, [rows]),
    ]
