"""The base that a run stands on: the recipe's, or what the adapter's start made of it, stored in the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_cli.data.encode import Example
from qlora_cli.errors import UserError
from qlora_cli.model.adapter import CONFIG
from qlora_cli.model.base import Found, compute_dtype_for
from qlora_cli.model.prequantized import RECORD, method_of
from qlora_cli.model.source import fetch_weights, read_config, read_json
from qlora_cli.model.start import changes_base
from qlora_cli.model.stored_base import Line, Making, made_from, on_stored_base, write_base
from qlora_cli.model.whole_folder import fault, publish, publish_by_content
from qlora_cli.recipe import Recipe
from qlora_cli.train.checkpoint import checkpoints
from qlora_cli.train.run import Run
from qlora_cli.train.step import seed_everything


def recipe_of_base(recipe: Recipe, run: Run) -> Recipe:
    """The recipe by which the run's base loads: of a run whose start changed the base and has trained, its stored one.

    Raises UserError where that is gone or damaged.
    """
    if not changes_base(recipe.adapter) or (name := name_of_base(run)) is None:
        return recipe
    folder = run.base / name
    if not folder.is_dir():
        what = "is not there, and the run was trained on it"
        raise UserError(folder, what, "bring the folder back: no other base fits its adapters")
    return on_stored_base(recipe, folder)


def name_of_base(run: Run) -> str | None:
    """The stored base that the run's adapter, or its newest checkpoint, points to; None where nothing is trained."""
    for folder in (run.adapter, *reversed(checkpoints(run.checkpoints))):
        if not fault(folder):  # a damaged one is told when it is loaded
            return Path(read_json(folder / CONFIG, "PEFT needs it")["base_model_name_or_path"]).name
    return None


def make_base(recipe: Recipe, run: Run, found: Found, making: Making) -> Path:
    """Stores the base that the adapter's start makes, unless an earlier attempt left it there; returns its folder."""
    refuse_quantized(found, "adapter.init", f"{recipe.adapter.init} needs the unquantised weights")
    fetch_weights(recipe.model, found.folder)
    dtype = compute_dtype_for(recipe.quantization.compute_dtype, making.device)
    settings = made_from(recipe, found.folder, dtype, making.rows)
    for folder in sorted(run.base.glob("[0-9a-f]*")):
        if not fault(folder) and json.dumps(read_json(folder / RECORD, "")["made_from"]) == json.dumps(settings):
            return folder
    seed_everything(recipe.training.seed)  # what is beyond LoftQ's rank starts at random
    folder = publish_by_content(run.base, lambda place: write_base(place, recipe, found, settings, making))
    making.say(f"base     {folder}")
    return folder


def quantize_base(recipe: Recipe, found: Found, out: Path, making: Making) -> list[Line]:
    """Stores the recipe's base quantised in a new folder, with the adapter's start where that changes it."""
    refuse_quantized(found, "MODEL", "there is nothing left to quantise")
    fetch_weights(recipe.model, found.folder)
    dtype = compute_dtype_for(recipe.quantization.compute_dtype, making.device)
    settings = made_from(recipe, found.folder, dtype, making.rows)
    table: list[Line] = []
    seed_everything(recipe.training.seed)
    publish(out, lambda place: table.extend(write_base(place, recipe, found, settings, making)))
    return table


def refuse_quantized(found: Found, where: str, why: str) -> None:
    """Refuses a base that is stored quantised already, or that is what a start left of the weights."""
    if method_of(read_config(found.folder)) is not None or (found.folder / RECORD).is_file():
        what = f"{why}: {found.folder} is stored without them"
        raise UserError(where, what, "start from the full-precision checkpoint")


def calibration_rows(recipe: Recipe, rows: Sequence[Example]) -> list[list[int]]:
    """The token ids of the rows that `adapter.loftq.calibration` asks for, evenly spread over the training data."""
    count = min(recipe.adapter.loftq.calibration, len(rows))
    return [list(rows[index * len(rows) // count].input_ids) for index in range(count)]
