"""The verbs: each composes the rooms into one result, and leaves parsing and printing to the command line."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.evaluation import Wanted, evaluate
from qlora_cli.model.base import default_device, find_base
from qlora_cli.model.start import changes_base
from qlora_cli.model.stored_base import Making
from qlora_cli.plan.fitting import Fitting
from qlora_cli.plan.inspect import inspect
from qlora_cli.plan.preview import PAGE_ROWS, bad_rows, preview
from qlora_cli.plan.whole import plan
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.remote import with_whole_paths
from qlora_cli.train import loop
from qlora_cli.train.base import calibration_rows, quantize_base
from qlora_cli.train.reading import encode_role
from qlora_cli.train.report import Report
from qlora_cli.train.run import Run, check_resume, claim, locked
from qlora_cli.train.signals import Interrupted

__all__ = [
    "PAGE_ROWS",
    "Interrupted",
    "Wanted",
    "bad_rows",
    "evaluate",
    "inspect",
    "plan",
    "preview",
    "quantize",
    "train",
]


def train(
    recipe: Recipe, recipe_text: bytes, report: Report, *, main_process: bool, resume: str, pause_at: int | None
) -> Path:
    """Finetunes, or continues the run in output_dir, and returns the adapter folder.

    Beside the main process, the others of a launch neither lock nor write the run folder.
    """
    recipe = with_whole_paths(recipe)
    others = Run(Path(recipe.output_dir))
    manner = loop.Manner(pause_at, resume, Fitting(recipe))
    if not main_process:
        return others.adapter if others.adapter.exists() else loop.train(recipe, others, report, manner)
    with locked(Path(recipe.output_dir)) as run:
        claim(run, recipe, recipe_text)
        check_resume(run, resume)
        if run.adapter.exists():
            report.say(f"done     {run.adapter} is there already: this run has finished, and no data was looked at")
            report.say("         to train anew, set another output_dir")
            return run.adapter
        return loop.train(recipe, run, report, manner)


def quantize(recipe: Recipe, report: Report, out: Path) -> dict[str, Any]:
    """Stores the recipe's base quantised in the new folder `out`, with the adapter's start where that changes it."""
    recipe = with_whole_paths(recipe)
    refuse_overwriting(out)
    if not changes_base(recipe.adapter) and (recipe.quantization.data_type == "int8" or stores_nothing(recipe)):
        what = f"{recipe.quantization.data_type} is made of the full-precision checkpoint whenever it is loaded"
        raise UserError("quantization.data_type", what, "name another one: --set quantization.data_type=nf4")
    found = find_base(recipe)
    wanted = recipe.adapter.loftq.calibration
    rows = encode_role(recipe, found, "train", report, date.today()).rows if wanted else ()
    making = Making(report.say, default_device(), out, calibration_rows(recipe, rows, report))
    table = quantize_base(recipe, found, out, making)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return {"out": str(out), "bytes": size, "table": [asdict(line) for line in table]}


def stores_nothing(recipe: Recipe) -> bool:
    """Whether no weight is quantised."""
    kinds = {recipe.quantization.data_type, recipe.quantization.embeddings, *recipe.quantization.overrides.values()}
    return kinds == {"none"}


def refuse_overwriting(out: Path) -> None:
    """Refuses a folder with something in it before anything is loaded."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(out, "is there already, and nothing is overwritten", "name a new folder with --out")


def import_later_libraries() -> None:
    """Imports now what training would import later on."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
