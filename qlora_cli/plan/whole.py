"""`qlora plan`: a recipe's plan on a device as one object, with what was assumed in words."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qlora_cli.model.heads import TASKS
from qlora_cli.model.placement import LESS_THAN_THE_MODEL
from qlora_cli.plan import memory
from qlora_cli.plan.memory import MOST_CELLS, Memory, Plan
from qlora_cli.plan.meta_base import compute_dtype
from qlora_cli.plan.reading import config_of, rows_of
from qlora_cli.plan.run_length import Rows
from qlora_cli.plan.target import Target, target_of
from qlora_cli.recipe import Recipe
from qlora_cli.recipe.remote import with_whole_paths
from qlora_cli.train.report import Report


def plan(recipe: Recipe, report: Report, gpu: str | None, read_rows: bool | None) -> dict[str, Any]:
    """Memory, disk and length of a run, and what fits: from config.json, and rows where they are to be had.

    gpu: the size of an NVIDIA GPU; None: the device that is here. read_rows: as reading.rows_of's `wanted`.
    Raises UserError for a model without a config, or one that cannot be built from it.
    """
    target = target_of(gpu)
    named, recipe = recipe, with_whole_paths(recipe)
    base = config_of(recipe)
    rows, unknown = rows_of(recipe, base, read_rows, report)
    found = memory.plan(recipe, base[1], target.kind, target.budget_bytes, rows)
    return {
        "model": named.model.name_or_path,
        "task": recipe.model.task,
        "data_type": recipe.quantization.data_type,
        "output_dir": named.output_dir,
        "device": asdict(target),
        "fits": found.fits,
        "batch": {
            "rows": recipe.training.micro_batch_size,
            "tokens": max(found.memory.peak.shape.lengths),
            "accumulated": recipe.training.gradient_accumulation_steps,
        },
        "memory": memory_told(found.memory),
        "disk": asdict(found.disk) | {"bytes": found.disk.num_bytes},
        "rows": None if rows is None else {"number": rows.number, "tokens": rows.num_tokens, "longest": rows.longest},
        "steps": found.steps,
        "tokens": found.tokens,
        "largest": {"micro_batch_size": found.largest_rows, "length": found.largest_length},
        "whole_length": found.whole_length,
        "changes": [asdict(change) for change in found.changes],
        "together": None if found.together is None else asdict(found.together),
        "assumed": assumptions(recipe, target, found, rows, unknown),
    }


def memory_told(memory: Memory) -> dict[str, Any]:
    """The peak by kind and all around it, in bytes."""
    return {
        "by_kind": memory.peak.by_kind,
        "allocated_bytes": memory.peak.num_bytes,
        "reserved_bytes": memory.reserved_bytes,
        "context_bytes": memory.context_bytes,
        "bytes": memory.num_bytes,
        "host_bytes": memory.host_bytes,
        "host_by_kind": {kind: num_bytes for kind, num_bytes in memory.host.items() if num_bytes},
        "kept_dequantised_bytes": memory.kept_bytes,
        "keepable_dequantised_bytes": memory.keepable_bytes,
        "peak_at": memory.peak.where,
        "layers_recomputed": memory.checkpointed,
        "layers": memory.num_layers,
        "by_proportion": memory.by_proportion,
    }


def assumptions(recipe: Recipe, target: Target, found: Plan, rows: Rows | None, unknown: str) -> list[str]:
    """What was taken for granted, in words."""
    shape, told = found.memory.peak.shape, []
    if rows is None:
        told.append(f"every row as long as allowed, {max(shape.lengths):,} tokens; rows were not read ({unknown})")
    else:
        told.append("the longest rows in one micro-batch")
    told.append("all tokens of them trained")
    if found.memory.by_proportion:
        told.append(f"what is beyond {MOST_CELLS[target.kind]:,} tokens at once by proportion")
    less = recipe.training.memory in LESS_THAN_THE_MODEL
    if recipe.training.gradient_checkpointing == "auto" and found.memory.checkpointed and not less:
        told.append("every layer recomputed: gradient_checkpointing: auto recomputes fewer where there is room")
    if found.memory.keepable_bytes:
        told.append("weights kept dequantised in what is left, and none of them in a larger micro-batch or longer rows")
    if len(shape.lengths) > 1 and shape.packed and recipe.data.packing == "auto":
        told.append("rows one behind the other, as data.packing: auto has them if the model keeps them apart")
    if recipe.model.task == "seq2seq_lm":
        told.append("one half of each row source, the other target")
    if TASKS[recipe.model.task].has_head:
        told.append("a new head")
    if target.kind == "cuda":
        told.append("the context, which differs by GPU and driver")
        if not target.here:
            dtype = str(compute_dtype(recipe, target.kind)).removeprefix("torch.")
            told.append(f"a GPU that computes in {dtype}, with nothing else on it")
    else:
        told.append("no memory for Python and its libraries, which take 0.5 GB and more")
    return told
