"""The verbs: each composes the rooms into one result, and leaves parsing and printing to the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluation import Wanted, digest_of, evaluate, refuse_damaged, say_if_another_base
from qlora_cli.merge.difference import Forward, compare, logits_of, next_tokens
from qlora_cli.merge.merge import merge_adapter
from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import Base, default_device, find_base, fingerprint, load_base, quiet_loading
from qlora_cli.model.heads import auto_class
from qlora_cli.model.layout import Made
from qlora_cli.model.owner import start_of
from qlora_cli.model.prequantized import method_of, refuse_merge
from qlora_cli.model.source import read_config
from qlora_cli.model.start import changes_base
from qlora_cli.model.stored_base import Making
from qlora_cli.model.whole_folder import replace_text
from qlora_cli.plan.fitting import Fitting
from qlora_cli.plan.inspect import inspect
from qlora_cli.plan.preview import PAGE_ROWS, bad_rows, preview
from qlora_cli.plan.whole import plan
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.remote import with_whole_paths
from qlora_cli.tasks.table import TASKS
from qlora_cli.train import loop
from qlora_cli.train.base import calibration_rows, quantize_base, recipe_of_base
from qlora_cli.train.reading import encode_role
from qlora_cli.train.report import Report
from qlora_cli.train.run import Run, check_resume, claim, date_of, locked, read_facts
from qlora_cli.train.signals import Interrupted

__all__ = [
    "PAGE_ROWS",
    "Interrupted",
    "Wanted",
    "bad_rows",
    "evaluate",
    "inspect",
    "merge",
    "plan",
    "preview",
    "quantize",
    "train",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Data types that a merged model can be written in."""

MEASURED_POSITIONS = 256
"""Positions over which a merged model is compared with the unmerged one."""


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


def has_held_out(recipe: Recipe) -> bool:
    """Whether the recipe holds rows out."""
    return bool(recipe.data.eval or recipe.data.eval_fraction)


@dataclass(frozen=True)
class Unmerged:
    """What stays of the unmerged model once it has left the memory."""

    folder: Path
    compute_dtype: torch.dtype
    device: torch.device
    same_base: bool  # as the run was trained on
    stored: bool  # in `folder` as it was trained on, not to be quantised again
    made: Made | None  # of another class than config.json says
    rows: list[Any]
    forward: Forward
    logits: list[torch.Tensor]


def merge(
    folder: Path,
    recipe: Recipe,
    report: Report,
    *,
    out: Path | None,
    onto: Literal["dequantized", "original"],
    dtype: str | None,
) -> dict[str, Any]:
    """Folds the adapter of the run in `folder` into the weights, and measures how far that is from the unmerged model.

    One model is in memory at a time. The measurement is returned, and stored as merge.json in the merged folder.
    """
    run = Run(folder)
    facts = read_facts(run)
    if not facts or not run.adapter.exists():
        raise UserError(run.folder, "no finished run there (no adapter/)", "run `qlora train` to its end first")
    refuse_damaged(run.adapter)
    out = out or run.folder / "merged"
    refuse_overwriting(out)
    unmerged = measure_unmerged(recipe, run, report, onto)
    chosen = DTYPES[dtype] if dtype else unmerged.compute_dtype
    merged = merge_adapter(
        unmerged.folder,
        run.adapter,
        out,
        quantization=recipe.quantization,
        compute_dtype=unmerged.compute_dtype,
        onto=onto,
        dtype=chosen,
        quantized_modules=() if unmerged.stored else facts["base"]["quantized_modules"],
        device=unmerged.device,
        made=unmerged.made,
    )
    report.say(f"merged   {merged.num_changed} of {merged.num_tensors} tensors in {merged.seconds:.1f} s; comparing")
    with quiet_loading():
        model = load_folder(recipe, out, chosen, roomy_device(unmerged.device, merged.num_bytes))
    difference = compare(unmerged.logits, logits_of(model, unmerged.rows, MEASURED_POSITIONS, unmerged.forward))
    result = {
        "out": str(out),
        "task": recipe.model.task,
        "adapter": str(run.adapter),
        "adapter_digest": digest_of(run.adapter),
        "base": onto,
        "same_base": unmerged.same_base,
        "dtype": str(chosen).removeprefix("torch."),
        "bytes": merged.num_bytes,
        "seconds": round(merged.seconds, 2),
        "difference": asdict(difference),
    }
    replace_text(out / "merge.json", json.dumps(result, indent=1))
    return result


def refuse_original(folder: Path, onto: str) -> None:
    """Refuses weights as published where the base is stored as it was trained on, with an adapter's start or not."""
    if onto == "original" and (start_of(folder) or method_of(read_config(folder))):
        what = f"{folder} is what the adapter was trained on; the weights as published are others"
        raise UserError("--base original", what, "leave the option out", Exit.REFUSED)


def refuse_overwriting(out: Path) -> None:
    """Refuses a folder with something in it before anything is loaded."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(out, "is there already, and nothing is overwritten", "name a new folder with --out")


def measure_unmerged(recipe: Recipe, run: Run, report: Report, onto: str) -> Unmerged:
    """Logits of base + adapter over the first 16 held-out rows, or training rows where there are none."""
    on_base = recipe_of_base(recipe, run)
    found = find_base(on_base)
    refuse_original(found.folder, onto)
    refuse_merge(read_config(found.folder), found.folder)
    examples = encode_role(recipe, found, "eval" if has_held_out(recipe) else "train", report, date_of(run))
    base = load_base(on_base, default_device(), found)
    same_base = say_if_another_base(run, fingerprint(base.model), report)
    made, rows, forward = compared(base, examples.rows[:16])
    model = load_adapter(base, run.adapter)
    with base.compute():
        logits = logits_of(model, rows, MEASURED_POSITIONS, forward)
    stored = on_base is not recipe or method_of(read_config(base.folder)) is not None
    how = (base.compute_dtype, base.device, same_base, stored)
    return Unmerged(base.folder, *how, made, rows, forward, logits)


def compared(base: Base, examples: Sequence[Any]) -> tuple[Made | None, list[Any], Forward]:
    """What a merged model is made for, and its rows with the logits by which it is compared.

    Of a causal language model these are of every token of a row; of others of what is trained.
    """
    if base.task == "causal_lm":
        return None, [row.input_ids for row in examples], next_tokens
    task = TASKS[base.task]

    def forward(model: Any, batch: Any) -> torch.Tensor:
        tensors = (None if tensor is None else tensor.to(model.device) for tensor in batch)
        return task.outputs(model, type(batch)(*tensors))[0]

    return Made(base.task, base.config), [task.collate([row], base) for row in examples], forward


def roomy_device(device: torch.device, num_bytes: int) -> torch.device:
    """`device`, or the CPU where a GPU lacks the memory: the merged model is four times the size of the 4-bit one."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.2 * num_bytes:
        return torch.device("cpu")
    return device


def load_folder(recipe: Recipe, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A merged folder as anybody loads it."""
    auto = auto_class(recipe.model.task)
    return auto.from_pretrained(folder, dtype=dtype, device_map={"": device}, local_files_only=True)


def import_later_libraries() -> None:
    """Imports now what training would import later on."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
