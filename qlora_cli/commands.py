"""The verbs: each composes the rooms into one result, and leaves parsing and printing to the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluate.generate import Answer, exact_match, generate_answers, prompt_and_reference
from qlora_cli.evaluate.loss import held_out_loss
from qlora_cli.merge.difference import compare, logits_of
from qlora_cli.merge.merge import merge_adapter
from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import AUTO_CLASSES, Base, default_device, find_base, fingerprint, load_base, quiet_loading
from qlora_cli.model.owner import start_of
from qlora_cli.model.prequantized import method_of, refuse_merge
from qlora_cli.model.source import read_config
from qlora_cli.model.start import changes_base
from qlora_cli.model.stored_base import Making
from qlora_cli.model.whole_folder import MANIFEST, fault
from qlora_cli.plan.inspect import inspect
from qlora_cli.plan.preview import PAGE_ROWS, bad_rows, preview
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.remote import with_whole_paths
from qlora_cli.train import loop
from qlora_cli.train.base import calibration_rows, quantize_base, recipe_of_base
from qlora_cli.train.reading import encode_role, refuse_beyond_context, refuse_seen
from qlora_cli.train.report import Report
from qlora_cli.train.run import Run, check_resume, claim, date_of, locked, read_facts, replace_text
from qlora_cli.train.session import say_base
from qlora_cli.train.signals import Interrupted

__all__ = ["PAGE_ROWS", "Interrupted", "bad_rows", "evaluate", "inspect", "merge", "preview", "quantize", "train"]

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
    if not main_process:
        return others.adapter if others.adapter.exists() else loop.train(recipe, others, report, pause_at, resume)
    with locked(Path(recipe.output_dir)) as run:
        claim(run, recipe, recipe_text)
        check_resume(run, resume)
        if run.adapter.exists():
            report.say(f"done     {run.adapter} is there already: this run has finished, and no data was looked at")
            report.say("         to train anew, set another output_dir")
            return run.adapter
        return loop.train(recipe, run, report, pause_at, resume)


def evaluate(
    recipe: Recipe, report: Report, *, adapter: Path | None, baseline: bool, limit: int | None
) -> dict[str, Any]:
    """Held-out loss, perplexity, token accuracy and exact match of the adapter, and with `baseline` of the base.

    Where the adapter's start changed the base, the baseline is that start: what training began with.

    adapter: its folder, the run's own where None; with `baseline` a run without one measures the base alone.
    """
    recipe = with_whole_paths(recipe)
    run = Run(Path(recipe.output_dir))
    may_be_absent = baseline and adapter is None
    adapter = adapter or run.adapter
    if not adapter.exists() and not may_be_absent:
        raise UserError(adapter, "no adapter there", "run `qlora train`, or measure the base alone with --baseline")
    refuse_damaged(adapter)
    if not has_held_out(recipe):
        raise UserError(
            "data.eval",
            "no held-out data",
            "name rows that are not trained on: --set 'data.eval=[{path: heldout.jsonl}]'",
        )
    on_base = recipe_of_base(recipe, run)
    found = find_base(on_base)
    examples = encode_role(recipe, found, "eval", report, date_of(run))
    refuse_seen(recipe, run_of(adapter) or run, examples)
    refuse_beyond_context(found, examples)
    base = load_base(on_base, default_device(), found)
    say_base(report, on_base, base)
    say_if_another_base(run, base, report)
    rows = list(islice(examples.rows, limit))
    models: dict[str, Any] = {}
    answers: dict[str, list[Answer]] = {}
    if baseline:
        with before_training(base) as (name, model):
            models[name], answers[name] = measure(recipe, base, model, rows, report, name)
    if adapter.exists():
        model = load_adapter(base, adapter)
        models["adapter"], answers["adapter"] = measure(recipe, base, model, rows, report, "adapter")
    tokens = sum(row.num_trained for row in rows)
    return {"rows": len(rows), "tokens": tokens, "models": models, "samples": samples(answers)}


@contextmanager
def before_training(base: Base) -> Iterator[tuple[str, Any]]:
    """What training began with, by name: the base, or the start, which is one with an adapter on it that changed it."""
    start = start_of(base.folder)
    if start is None:
        yield "base", base.model
        return
    model = load_adapter(base, start)
    yield "start", model
    model.unload()  # which gives the base its own layers back


def run_of(adapter: Path) -> Run | None:
    """The run that an adapter's folder or checkpoint lies in, if it lies in one."""
    runs = (Run(folder) for folder in adapter.absolute().parents[:2])
    return next((run for run in runs if run.facts.exists()), None)


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


def measure(
    recipe: Recipe, base: Base, model: Any, rows: Sequence[Any], report: Report, name: str
) -> tuple[dict[str, Any], list[Answer]]:
    """The figures of one model on the held-out rows, and its answers where the rows have prompts."""
    size = recipe.evaluation.batch_size
    batch_size = recipe.training.micro_batch_size if size == "auto" else size
    found = held_out_loss(base, model, rows, batch_size)
    loss = {"loss": found.loss, "perplexity": found.perplexity, "token_accuracy": found.token_accuracy}
    asked = [row for row in rows if prompt_and_reference(row) is not None]
    if not asked:
        return loss, []
    report.say(f"{name:<8} generating {len(asked)} answers")
    answers = generate_answers(base, model, asked, batch_size, recipe.evaluation.max_new_tokens)
    return {**loss, "exact_match": exact_match(answers)}, answers


def samples(answers: dict[str, list[Answer]], count: int = 2) -> list[dict[str, str]]:
    """The first prompts with the answer of each model."""
    first = next(iter(answers.values()))[:count]
    return [
        {
            "prompt": one.prompt,
            "expected": one.expected,
            **{name: given[i].generated for name, given in answers.items()},
        }
        for i, one in enumerate(first)
    ]


def say_if_another_base(run: Run, base: Base, report: Report) -> bool:
    """Tells where the base in memory is not the one that the run was trained on; returns whether it is."""
    facts = read_facts(run)
    same = facts is None or facts["fingerprints"]["base"] == fingerprint(base.model)
    if not same:
        report.say("note     the base differs from the one trained on: weights, config, data type, device or library")
    return same


@dataclass(frozen=True)
class Unmerged:
    """What stays of the unmerged model once it has left the memory."""

    folder: Path
    compute_dtype: torch.dtype
    device: torch.device
    same_base: bool  # as the run was trained on
    stored: bool  # in `folder` as it was trained on, not to be quantised again
    rows: list[list[int]]
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
    )
    report.say(f"merged   {merged.num_changed} of {merged.num_tensors} tensors in {merged.seconds:.1f} s; comparing")
    with quiet_loading():
        model = load_folder(recipe, out, chosen, roomy_device(unmerged.device, merged.num_bytes))
    difference = compare(unmerged.logits, logits_of(model, unmerged.rows, MEASURED_POSITIONS))
    result = {
        "out": str(out),
        "adapter": str(run.adapter),
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


def refuse_damaged(adapter: Path) -> None:
    """Refuses an adapter folder whose files are not those that its manifest signs; another tool's has no manifest."""
    if (adapter / MANIFEST).exists() and (reason := fault(adapter)):
        raise UserError(adapter, reason, "train again, or take the adapter out of the newest checkpoint")


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
    same_base = say_if_another_base(run, base, report)
    rows = [row.input_ids for row in examples.rows[:16]]
    model = load_adapter(base, run.adapter)
    with base.compute():
        logits = logits_of(model, rows, MEASURED_POSITIONS)
    stored = on_base is not recipe or method_of(read_config(base.folder)) is not None
    return Unmerged(base.folder, base.compute_dtype, base.device, same_base, stored, rows, logits)


def roomy_device(device: torch.device, num_bytes: int) -> torch.device:
    """`device`, or the CPU where a GPU lacks the memory: the merged model is four times the size of the 4-bit one."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.2 * num_bytes:
        return torch.device("cpu")
    return device


def load_folder(recipe: Recipe, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A merged folder as anybody loads it."""
    import transformers

    auto = getattr(transformers, AUTO_CLASSES[recipe.model.task])
    return auto.from_pretrained(folder, dtype=dtype, device_map={"": device}, local_files_only=True)
