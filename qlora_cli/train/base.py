"""The base that a run stands on: the recipe's, or what the adapter's start made of it, stored in the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_cli.data.encode import Example
from qlora_cli.errors import Exit, UserError
from qlora_cli.model.base import Found, compute_dtype_for
from qlora_cli.model.continued import CONFIG
from qlora_cli.model.prequantized import RECORD, method_of, refuse_damaged
from qlora_cli.model.source import fetch_weights, read_config, read_json
from qlora_cli.model.start import changes_base
from qlora_cli.model.stored_base import Line, Making, made_from, made_of, on_stored_base, write_base
from qlora_cli.model.whole_folder import fault, publish_by_content, publish_new
from qlora_cli.recipe import Recipe
from qlora_cli.train.checkpoint import checkpoints
from qlora_cli.train.report import Report
from qlora_cli.train.run import Run, differences
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
    refuse_damaged(folder, contents=False)  # what loads it reads every byte
    refuse_other_making(recipe, folder)
    return on_stored_base(recipe, folder)


def refuse_other_making(recipe: Recipe, folder: Path) -> None:
    """Refuses keys that are other ones than when the base was made: they would have no effect on what is stored."""
    made = read_json(folder / RECORD, "it says what the base was made of").get("made_from", {})
    for name, value in made_of(recipe).items():
        for line in differences(made.get(name), json.loads(json.dumps(value)), name):
            what = f"{line}, and the run's base is what was stored"
            raise UserError(folder, what, "give the key its old value back, or make another run", Exit.REFUSED)


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
        making.say(f"note     {folder} is of an earlier attempt with other settings: delete it if it is not needed")
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
    publish_new(out, lambda place: table.extend(write_base(place, recipe, found, settings, making)))
    return table


def refuse_quantized(found: Found, where: str, why: str) -> None:
    """Refuses a base that is stored quantised already, or that is what a start left of the weights."""
    if method_of(read_config(found.folder)) is not None or (found.folder / RECORD).is_file():
        what = f"{why}: {found.folder} is stored quantised, or what a start left of the weights"
        raise UserError(where, what, "start from the full-precision checkpoint")


def calibration_rows(recipe: Recipe, rows: Sequence[Example], report: Report) -> list[list[int]]:
    """The token ids of the rows that `adapter.loftq.calibration` asks for, evenly spread over the training data."""
    wanted = recipe.adapter.loftq.calibration
    count = min(wanted, len(rows))
    if wanted:
        fewer = f" ({wanted:,} were asked for)" if count < wanted else ""
        report.say(f"loftq    errors are weighed by what {count:,} of {len(rows):,} rows feed into each layer{fewer}")
    return [list(rows[index * len(rows) // count].input_ids) for index in range(count)]
