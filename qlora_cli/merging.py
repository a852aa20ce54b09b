"""`qlora merge`: base and adapter to an ordinary model folder, with a certificate of how near it is to the unmerged."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_cli.data.encode import Example
from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluation import digest_of, refuse_damaged, say_if_another_base
from qlora_cli.merge.certificate import Certificate, certify, limit_of
from qlora_cli.merge.difference import Forward, Seen, seen
from qlora_cli.merge.merge import Base as Onto
from qlora_cli.merge.merge import How, Merged, merge_adapter
from qlora_cli.merge.partial import place_of, refuse_inside, refuse_taken
from qlora_cli.merge.place import load_merged, manner_of
from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import Found, default_device, find_base, fingerprint, load_base, quiet_loading
from qlora_cli.model.layout import Made
from qlora_cli.model.owner import start_of
from qlora_cli.model.prequantized import method_of, refuse_merge
from qlora_cli.model.source import read_config, read_json
from qlora_cli.model.stored_base import Making, on_stored_base
from qlora_cli.model.whole_folder import replace_text
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Adapter, Quantization
from qlora_cli.tasks.table import TASKS, loss_sum
from qlora_cli.train.base import quantize_base, recipe_of_base
from qlora_cli.train.reading import encode_role
from qlora_cli.train.report import Report
from qlora_cli.train.run import Run, date_of, read_facts

RECORD = "merge.json"
"""In a merged folder: what was merged, and the certificate."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Data types that a merged model can be written in."""

MOST_ROWS, MOST_TOKENS = 64, 8192
"""Rows and tokens that both models read for a certificate, unless a number of rows is asked for."""

MOST_BYTES = 1 << 29
"""Logits of the unmerged model that are kept while the merged one is made: 1,000 positions of 128,000 tokens."""

AT_ONCE = 1024
"""Tokens of a forward pass: few enough for all their logits, many for a model that is read from the disk each time."""


Stored = Literal["nf4", "fp4", "int4", "nf2", "int2"]
"""Data types in which a merged model can be written."""


@dataclass(frozen=True)
class Wanted:
    """What `qlora merge` was asked for.

    out: None for RUN/merged. bases: what is merged onto, each into a folder of its own.
    dtype: None for the run's compute dtype. quantize: the data type in which the merged model is written too.
    verify: whether there is a certificate. max_kl: its limit, None for that of the dtype. rows: held-out rows for it,
    None for as many as MOST_ROWS and MOST_TOKENS allow. other_base: whether a base that differs from the one trained on
    is merged onto.
    """

    out: Path | None = None
    bases: Sequence[Onto] = ("dequantized",)
    dtype: str | None = None
    quantize: Stored | None = None
    verify: bool = True
    max_kl: float | None = None
    rows: int | None = None
    other_base: bool = False


@dataclass(frozen=True)
class Trained:
    """A finished run, and the base that its adapter is merged onto, before any weight is read.

    stored: whether the base lies there as it was trained on, not to be quantised again.
    """

    run: Run
    recipe: Recipe
    facts: dict[str, Any]
    on_base: Recipe
    found: Found
    stored: bool


@dataclass(frozen=True)
class Unmerged:
    """What stays of the unmerged model once it has left the memory. batches: the rows that it read, some at a time."""

    same_base: bool
    batches: list[Any]
    rows: tuple[int, str]  # their number, and the role of the recipe that they are of
    said: Seen


class NotHeldError(Exception):
    """A merged model is too far from the unmerged one to get its name."""

    def __init__(self, result: dict[str, Any]):
        super().__init__("the certificate did not hold")
        self.result = result


def merge(folder: Path, recipe: Recipe, report: Report, wanted: Wanted) -> dict[str, Any]:
    """Folds the adapter of the run in `folder` into the weights, and certifies what came out.

    One model is in memory at a time. Each merge of the result has "out", None where its certificate did not hold: what
    was written then stays at "kept", and the same command with another limit takes it up.
    """
    trained = open_run(folder, recipe)
    outs = places(trained.run, wanted)
    there = {onto: known for onto, out in outs.items() if (known := merged_before(trained, onto, out, wanted))}
    for onto, out in outs.items():
        refuse_original(trained.found.folder, onto)
        refuse_inside(out, {"the adapter": trained.run.adapter, "the checkpoints": trained.run.checkpoints})
        for place in [*([] if onto in there else [out]), *([quantized_place(out, wanted)] if wanted.quantize else [])]:
            refuse_taken(place)
    unmerged = measure_unmerged(trained, report, wanted) if wanted.verify else None
    merges = []
    for onto, out in outs.items():
        merges.append(there.get(onto) or merge_onto(trained, onto, out, unmerged, (wanted, report)))
        if wanted.quantize and merges[-1]["out"] is not None:
            merges.append(quantize_merged(trained, merges[-1], unmerged, (wanted, report)))
    return {"held": all(one["out"] is not None for one in merges), "merges": merges}


def open_run(folder: Path, recipe: Recipe) -> Trained:
    """The finished run in `folder`. Raises UserError where there is none, or its adapter or base do not merge."""
    run = Run(folder)
    facts = read_facts(run)
    if not facts or not run.adapter.exists():
        raise UserError(run.folder, "no finished run there (no adapter/)", "run `qlora train` to its end first")
    refuse_damaged(run.adapter)
    computed = recipe.quantization.model_copy(update={"compute_dtype": facts["base"]["compute_dtype"]})
    recipe = recipe.model_copy(update={"quantization": computed})  # what `auto` was where it trained
    on_base = recipe_of_base(recipe, run)
    found = find_base(on_base)
    refuse_merge(read_config(found.folder), found.folder)
    stored = on_base is not recipe or method_of(read_config(found.folder)) is not None
    return Trained(run, recipe, facts, on_base, found, stored)


def places(run: Run, wanted: Wanted) -> dict[Onto, Path]:
    """Where each merge goes: RUN/merged or --out, and of several each but the first with its base's name behind."""
    first = wanted.out or run.folder / "merged"
    return {onto: first if at == 0 else first.with_name(f"{first.name}-{onto}") for at, onto in enumerate(wanted.bases)}


def quantized_place(out: Path, wanted: Wanted) -> Path:
    """Where a merged model is written quantised."""
    return out.with_name(f"{out.name}-{wanted.quantize}")


def merged_before(trained: Trained, onto: Onto, out: Path, wanted: Wanted) -> dict[str, Any] | None:
    """merge.json of a whole merge of this adapter that is only to be quantised now; None where there is none."""
    if not wanted.quantize or not (out / RECORD).is_file():
        return None
    found = read_json(out / RECORD, "it says what was merged")
    dtype = wanted.dtype or trained.recipe.quantization.compute_dtype
    same = {"adapter_digest": digest_of(trained.run.adapter), "base": onto, "dtype": dtype}
    return found if all(found.get(name) == value for name, value in same.items()) else None


def refuse_original(folder: Path, onto: str) -> None:
    """Refuses weights as published where the base is stored as it was trained on, with an adapter's start or not."""
    if onto == "original" and (start_of(folder) or method_of(read_config(folder))):
        what = f"{folder} is what the adapter was trained on; the weights as published are others"
        raise UserError("--base original", what, "leave the option out", Exit.REFUSED)


def measure_unmerged(trained: Trained, report: Report, wanted: Wanted) -> Unmerged:
    """What base + adapter says of held-out rows, or of training rows where there are none.

    Raises UserError (exit 3) where the base is not the one that was trained on, unless that was asked for.
    """
    recipe, found = trained.recipe, trained.found
    data: Literal["train", "eval"] = "eval" if recipe.data.eval or recipe.data.eval_fraction else "train"
    examples = encode_role(recipe, found, data, report, date_of(trained.run))
    base = load_base(trained.on_base, default_device(), found)
    same_base = say_if_another_base(trained.run, fingerprint(base.model), report)
    if not (same_base or wanted.other_base):
        what = "is not the base that the adapter was trained on: its weights, config or data type differ"
        raise UserError(found.folder, what, "bring that one back, or go on with --other-base", Exit.REFUSED)
    rows = chosen_rows(examples.rows, wanted.rows)
    batches = [TASKS[base.task].collate(some, base) for some in portions(rows)]
    model = load_adapter(base, trained.run.adapter)
    with base.compute():
        said = seen(model, batches, forward_on(base.task, base.device), MOST_BYTES)
    return Unmerged(same_base, batches, (len(rows), data), said)


def chosen_rows(rows: Sequence[Example], wanted: int | None) -> list[Example]:
    """Rows evenly spread over all; without a wanted number as many as MOST_ROWS and MOST_TOKENS allow, one at least."""
    number = min(wanted or MOST_ROWS, len(rows))
    chosen: list[Example] = []
    left = MOST_TOKENS
    for at in range(number):
        row = rows[at * len(rows) // number]
        left -= row.num_tokens
        if wanted is None and chosen and left < 0:
            break
        chosen.append(row)
    return chosen


def portions(rows: Sequence[Example]) -> list[list[Example]]:
    """The rows by length, as many at once as are AT_ONCE tokens with their padding, one at least."""
    found: list[list[Example]] = []
    for row in sorted(rows, key=lambda row: row.num_tokens, reverse=True):  # the first of a portion is its longest
        if found and (len(found[-1]) + 1) * found[-1][0].num_tokens <= AT_ONCE:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def forward_on(task: str, device: torch.device) -> Forward:
    """How a model on `device` is asked: of a causal language model for every token of a row, of others for targets."""

    def forward(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        batch = type(batch)(*(None if tensor is None else tensor.to(device) for tensor in batch))
        if task != "causal_lm":
            logits, targets = TASKS[task].outputs(model, batch)
            return logits, loss_sum(logits, targets), len(targets)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = loss_sum(logits.flatten(0, 1)[batch.predicting], batch.targets)
        return logits[batch.attention_mask.bool()], loss, len(batch.targets)

    return forward


def merge_onto(
    trained: Trained, onto: Onto, out: Path, unmerged: Unmerged | None, asked: tuple[Wanted, Report]
) -> dict[str, Any]:
    """One merge with its certificate, which is in the folder before it gets its name; JSON of both."""
    (wanted, report), recipe = asked, trained.recipe
    compute_dtype = DTYPES[recipe.quantization.compute_dtype]
    dtype = wanted.dtype or recipe.quantization.compute_dtype
    made = None if trained.found.task == "causal_lm" else Made(trained.found.task, trained.found.config)
    modules = () if trained.stored else trained.facts["base"]["quantized_modules"]
    how = How(recipe.quantization, compute_dtype, onto, DTYPES[dtype], modules, default_device(), made)
    limit = wanted.max_kl
    if limit is None:
        limit = limit_of(recipe.quantization.compute_dtype, dtype, onto, recipe.quantization.data_type)
    result: dict[str, Any] = {}

    def finish(aside: Path, merged: Merged) -> None:
        report.say(told(merged, onto, unmerged is not None))
        found = None if unmerged is None else certificate_of(aside, merged, how, unmerged, limit)
        result.update(record(trained, merged, how, found, unmerged))
        replace_text(aside / RECORD, json.dumps(result, indent=1))
        if found is not None and not found.held:
            raise NotHeldError(result)

    try:
        merge_adapter(trained.found.folder, trained.run.adapter, out, how, finish=finish)
    except NotHeldError:
        return result | {"out": None, "kept": str(place_of(out))}
    return result


def told(merged: Merged, onto: str, verified: bool) -> str:
    """What a merge did, in a line."""
    quantizing = f", {merged.quantize_seconds:.1f} s of them quantising" if merged.quantize_seconds else ""
    resumed = f"; {merged.resumed} files were there already" if merged.resumed else ""
    changed = f"{merged.num_changed} of {merged.num_tensors} tensors"
    end = f"{resumed}{'; comparing' if verified else ''}"
    return f"merged   {changed} onto the {onto} base in {merged.seconds:.1f} s{quantizing}{end}"


def certificate_of(folder: Path, merged: Merged, how: How, unmerged: Unmerged, limit: float) -> Certificate:
    """Runs the merged model over the rows that the unmerged one has read."""
    manner, device = manner_of(merged.num_bytes, torch.device(how.device))
    task = how.made.task if how.made else "causal_lm"
    with quiet_loading():
        model = load_merged(folder, task, how.dtype, manner, device)
    said = seen(model, unmerged.batches, forward_on(task, device), MOST_BYTES)
    return certify(unmerged.said, said, limit, unmerged.rows, manner)


def quantize_merged(
    trained: Trained, merged: dict[str, Any], unmerged: Unmerged | None, asked: tuple[Wanted, Report]
) -> dict[str, Any]:
    """Writes a merged model quantised into a folder of its own; JSON of what that costs beside the unmerged one."""
    (wanted, report), started = asked, time.perf_counter()
    source, kind = Path(merged["out"]), wanted.quantize
    assert kind is not None, "nobody asked"
    out = quantized_place(source, wanted)
    stored = Quantization(data_type=kind, compute_dtype=trained.recipe.quantization.compute_dtype)
    model = trained.recipe.model.model_copy(update={"name_or_path": str(source), "revision": None})
    recipe = trained.recipe.model_copy(update={"model": model, "quantization": stored, "adapter": Adapter()})
    quantize_base(recipe, find_base(recipe), out, Making(report.say, default_device(), out))
    seconds, certificate = round(time.perf_counter() - started, 3), None
    if unmerged is not None:
        base = load_base(on_stored_base(recipe, out), default_device())
        with base.compute():
            said = seen(base.model, unmerged.batches, forward_on(base.task, base.device), MOST_BYTES)
        certificate = certify(unmerged.said, said, None, unmerged.rows, "whole").to_json()
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    made = {"out": str(out), "base": "merged", "dtype": kind, "bytes": size, "seconds": seconds}
    result = merged | made | {"quantize_seconds": 0.0, "certificate": certificate}
    replace_text(out / RECORD, json.dumps(result, indent=1))
    return result


def record(
    trained: Trained, merged: Merged, how: How, certificate: Certificate | None, unmerged: Unmerged | None
) -> dict[str, Any]:
    """merge.json: what was merged onto what, and how near it is; a merge that was not verified says so."""
    return {
        "out": str(merged.folder),
        "task": trained.recipe.model.task,
        "adapter": str(trained.run.adapter),
        "adapter_digest": digest_of(trained.run.adapter),
        "base": how.onto,
        "base_model": trained.recipe.model.name_or_path,
        "same_base": unmerged.same_base if unmerged else None,
        "dtype": str(how.dtype).removeprefix("torch."),
        "bytes": merged.num_bytes,
        "seconds": round(merged.seconds, 3),
        "quantize_seconds": round(merged.quantize_seconds, 3),
        "untied": list(merged.untied),
        "verified": certificate is not None,
        "certificate": certificate.to_json() if certificate else None,
    }
