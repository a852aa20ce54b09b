"""The model without its weights: what a recipe asks of its layers is refused before data or weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.model.base import Found
from qlora_cli.model.checks import check_skipped
from qlora_cli.model.heads import find_head, needs_packed, on_meta
from qlora_cli.model.prequantized import method_of
from qlora_cli.model.source import file_of, read_config
from qlora_cli.model.start import changes_base
from qlora_cli.quant.layers import is_packed, packed_config
from qlora_cli.recipe.schema import Recipe


def skeleton(recipe: Recipe, folder: Path, config: Any) -> Any:
    """The model without its weights, on the meta device. Raises UserError where transformers cannot build it."""
    model = on_meta(config, recipe.model, folder)
    check_skipped(model, recipe.quantization.skip_modules)
    return model


def check_storage(recipe: Recipe, found: Found) -> None:
    """Refuses packed storage that does not fit the model: a pattern that decides nothing, a weight of no whole blocks.

    What loads the weights refuses the same, but after the data was prepared.
    """
    started = changes_base(recipe.adapter) and recipe.quantization.data_type != "none"
    ours = is_packed(recipe.quantization) or needs_packed(found.config, found.task, recipe.quantization)
    if method_of(read_config(found.folder)) is not None or not (ours or started):
        return
    from qlora_cli.quant.plugin import BadWeight, PackedQuantizer

    model = skeleton(recipe, found.folder, found.config)
    quantization = find_head(found.folder, found.config, recipe.model).spared(recipe.quantization)
    try:
        PackedQuantizer(packed_config(quantization), pre_quantized=False).preprocess_model(model)
    except BadWeight as error:
        raise UserError(f"{file_of(error.where, found.folder)}: {error.where}", error.what, error.todo) from error
