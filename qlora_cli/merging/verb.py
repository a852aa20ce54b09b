"""`qlora merge`: base and adapter to an ordinary model folder, with a certificate of how near it is to the unmerged."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from qlora_cli.merge.certificate import Certificate, Limits, certify, limit_of
from qlora_cli.merge.difference import seen
from qlora_cli.merge.merge import Base as Onto
from qlora_cli.merge.merge import How, Merged, merge_adapter
from qlora_cli.merge.partial import place_of, refuse_inside, refuse_taken
from qlora_cli.merge.place import load_merged, manner_of
from qlora_cli.merging.asking import MOST_BYTES, Unmerged, forward_on, measure_unmerged
from qlora_cli.merging.record import DTYPES, RECORD, record, write_record
from qlora_cli.merging.trained import Trained, merged_before, open_run, refuse_original
from qlora_cli.merging.wanted import Wanted, places, quantized_place
from qlora_cli.model.base import default_device, find_base, load_base, quiet_loading
from qlora_cli.model.layout import Made
from qlora_cli.model.safetensors_stream import disk
from qlora_cli.model.stored_base import Making, on_stored_base
from qlora_cli.model.whole_folder import replace_text
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.schema import Adapter, Quantization
from qlora_cli.train.base import quantize_base
from qlora_cli.train.card import refresh
from qlora_cli.train.report import Report


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
    there = {onto: known for onto, out in outs.items() if (known := merged_before(trained, onto, out, wanted.dtype))}
    for onto, out in outs.items():
        refuse_original(trained.found.folder, onto)
        read = {"the base": trained.found.folder, "the adapter": trained.run.adapter}
        refuse_inside(out, read | {"the checkpoints": trained.run.checkpoints})
        for place in [*([] if onto in there else [out]), *([quantized_place(out, wanted)] if wanted.quantize else [])]:
            refuse_taken(place)
    unmerged = measure_unmerged(trained, report, wanted) if wanted.verify else None
    merges = []
    for onto, out in outs.items():
        if onto in there:
            report.say(f"there    {out} is of this adapter, base and data type already, and its weights stay")
            merges.append(certify_again(trained, onto, there[onto], unmerged, wanted))
        else:
            merges.append(merge_onto(trained, onto, out, unmerged, (wanted, report)))
        if wanted.quantize and merges[-1]["out"] is not None:
            merges.append(quantize_merged(trained, merges[-1], unmerged, (wanted, report)))
    if any(one["out"] == str(trained.run.folder / "merged") for one in merges):
        refresh(trained.run.adapter, trained.run, trained.recipe)
    fallen = [one for one in merges if one["certificate"] and one["certificate"]["held"] is False]
    return {"held": not fallen, "merges": merges}


def how_of(trained: Trained, onto: Onto, wanted: Wanted) -> How:
    """How a merge of the run is made."""
    recipe, found = trained.recipe, trained.found
    made = None if found.task == "causal_lm" else Made(found.task, found.config)
    modules = () if trained.stored else trained.facts["base"]["quantized_modules"]
    compute_dtype = recipe.quantization.compute_dtype
    dtype = wanted.dtype or compute_dtype
    return How(recipe.quantization, DTYPES[compute_dtype], onto, DTYPES[dtype], modules, default_device(), made)


def limits_of(trained: Trained, onto: Onto, wanted: Wanted) -> Limits:
    """The limit that is asked for, or that of the data types, and the latter."""
    quantization = trained.recipe.quantization
    dtype = wanted.dtype or quantization.compute_dtype
    default = limit_of(quantization.compute_dtype, dtype, onto, quantization.data_type)
    return default if wanted.max_kl is None else wanted.max_kl, default


def merge_onto(
    trained: Trained, onto: Onto, out: Path, unmerged: Unmerged | None, asked: tuple[Wanted, Report]
) -> dict[str, Any]:
    """One merge with its certificate, which is in the folder before it gets its name; JSON of both."""
    wanted, report = asked
    how, result = how_of(trained, onto, wanted), dict[str, Any]()

    def finish(aside: Path, merged: Merged) -> None:
        report.say(told(merged, onto, unmerged is not None))
        limits = limits_of(trained, onto, wanted)
        found = None if unmerged is None else certificate_of(aside, merged.num_bytes, how, unmerged, limits)
        result.update(record(trained, merged, how, found, unmerged))
        with disk(out, merged.num_bytes):
            write_record(aside, trained, result)
        if found is not None and not found.held:
            raise NotHeldError(result)

    try:
        merge_adapter(trained.found.folder, trained.run.adapter, out, how, finish=finish)
    except NotHeldError:
        return result | {"out": None, "kept": str(place_of(out))}
    return result


def certify_again(
    trained: Trained, onto: Onto, known: dict[str, Any], unmerged: Unmerged | None, wanted: Wanted
) -> dict[str, Any]:
    """A merge that is there already with a new certificate, of the rows and the limit that are asked for now."""
    if unmerged is None:
        return known
    folder, how = Path(known["out"]), how_of(trained, onto, wanted)
    found = certificate_of(folder, known["bytes"], how, unmerged, limits_of(trained, onto, wanted))
    result = known | {"same_base": unmerged.same_base, "verified": True, "certificate": found.to_json()}
    with disk(folder, 0):
        replace_text(folder / RECORD, json.dumps(result, indent=1))
        refresh(folder, trained.run, trained.recipe, result)
    return result


def told(merged: Merged, onto: str, verified: bool) -> str:
    """What a merge did, in a line."""
    quantizing = f", {merged.quantize_seconds:.1f} s of them quantising" if merged.quantize_seconds >= 0.05 else ""
    resumed = f"; {merged.resumed} file{' was' if merged.resumed == 1 else 's were'} there already"
    changed = f"{merged.num_changed} of {merged.num_tensors} tensors"
    end = f"{resumed if merged.resumed else ''}{'; comparing' if verified else ''}"
    return f"merged   {changed} onto the {onto} base in {merged.seconds:.1f} s{quantizing}{end}"


def certificate_of(folder: Path, num_bytes: int, how: How, unmerged: Unmerged, limits: Limits) -> Certificate:
    """Runs the merged model over the rows that the unmerged one has read."""
    manner, device = manner_of(num_bytes, torch.device(how.device))
    task = how.made.task if how.made else "causal_lm"
    with quiet_loading():
        model = load_merged(folder, task, how.dtype, manner, device)
    said = seen(model, unmerged.batches, forward_on(task, device), MOST_BYTES)
    return certify(unmerged.said, said, limits, unmerged.rows, manner)


def quantize_merged(
    trained: Trained, merged: dict[str, Any], unmerged: Unmerged | None, asked: tuple[Wanted, Report]
) -> dict[str, Any]:
    """Writes a merged model quantised into a folder of its own; JSON of what that costs beside the unmerged one."""
    (wanted, report), started = asked, time.perf_counter()
    source, kind = Path(merged["out"]), wanted.quantize
    assert kind is not None, "nobody asked"
    out = quantized_place(source, wanted)
    stored = Quantization(data_type=kind, compute_dtype=trained.recipe.quantization.compute_dtype)
    place: dict[str, Any] = {"name_or_path": str(source), "revision": None, "added_tokens": []}  # its tokenizer's own
    model = trained.recipe.model.model_copy(update=place)
    recipe = trained.recipe.model_copy(update={"model": model, "quantization": stored, "adapter": Adapter()})
    quantize_base(recipe, find_base(recipe), out, Making(report.say, default_device(), out))
    seconds, certificate = round(time.perf_counter() - started, 3), None
    if unmerged is not None:
        base = load_base(on_stored_base(recipe, out), default_device())
        with base.compute():
            said = seen(base.model, unmerged.batches, forward_on(base.task, base.device), MOST_BYTES)
        certificate = certify(unmerged.said, said, (None, None), unmerged.rows, "whole").to_json()
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    made = {"out": str(out), "base": "merged", "dtype": kind, "bytes": size, "seconds": seconds}
    result = merged | made | {"quantize_seconds": 0.0, "certificate": certificate}
    with disk(out, size):
        write_record(out, trained, result)
    return result
