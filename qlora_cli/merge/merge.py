"""Base and adapter to one ordinary transformers folder, a tensor at a time: float32 arithmetic, one cast at the end."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_cli.errors import Exit, UserError
from qlora_cli.merge.adapter_delta import Adapter, Update, plan_updates, read_adapter, updated
from qlora_cli.merge.head import for_task, keys_of
from qlora_cli.model.heads import needs_packed
from qlora_cli.model.layout import Layout, Made, read_layout
from qlora_cli.model.ordinary import Ordinary, ordinary
from qlora_cli.model.safetensors_stream import (
    INDEX,
    SINGLE,
    Entry,
    SafetensorsWriter,
    disk,
)
from qlora_cli.model.whole_folder import sync
from qlora_cli.quant.layers import layer_values, packed_config
from qlora_cli.recipe.schema import Quantization

TOKENIZER_FILES = """
tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt
vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json
""".split()  # noqa: SIM905
OnTensor = Callable[[str, int], None]
"""Called after each tensor with its name and its bytes written."""


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    folder: Path
    num_tensors: int
    num_changed: int  # tensors that the adapter changed
    num_bytes: int  # of tensor data
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """One merge, read and checked before anything is written."""

    base: Ordinary
    adapter: Adapter
    updates: dict[str, Update]  # by live parameter name
    layout: Layout
    quantized: frozenset[str]  # live names of the weights quantised in training
    storage: Any  # as layer_values takes it
    compute_dtype: torch.dtype
    onto: str
    dtype: torch.dtype
    device: torch.device
    made: Made | None

    def written(self, entry: Entry) -> Entry:
        """How a tensor of the base is written: parameters in `dtype`, anything else as it is."""
        floating = entry.dtype.is_floating_point and self.layout.parameter(entry.name) is not None
        return replace(entry, dtype=self.dtype) if floating else entry


def merge_adapter(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    quantization: Quantization,
    compute_dtype: torch.dtype,
    onto: Literal["dequantized", "original"],
    dtype: torch.dtype,
    quantized_modules: Collection[str],
    on_tensor: OnTensor | None = None,
    device: torch.device | str = "cpu",
    made: Made | None = None,
) -> Merged:
    """Write base + adapter to `out`, which must be new or empty.

    Peak memory, measured: 21 bytes per weight of the largest quantised tensor (the library's own quantiser, as when
    the base is loaded for training), 6 per weight of the largest other one; never a shard.

    onto: `dequantized` adds to the weights that the adapter was trained on: quantised and back for
    quantized_modules, rounded to compute_dtype for the rest. `original` adds to the base as published.
    quantized_modules: full names of the modules quantised in training, as in the model without its adapter.
    device: where a weight is quantised; the kind of device that trained, to be equal to the last bit.
    made: the task, whose head the adapter has and the base may lack; None: of the class that config.json names.
    Raises UserError for inputs that do not fit, and with exit code FAILED for a full disk or weights beyond `dtype`.
    """
    started = time.perf_counter()
    layout, lora = read_layout(base, compute_dtype, made), read_adapter(adapter)
    source = for_task(ordinary(base, compute_dtype), lora, layout, made)
    checkpoint = source.checkpoint
    shapes = {full: e.shape for name, e in checkpoint.entries().items() if (full := layout.parameter(name))}
    weights = frozenset(f"{module}.weight" for module in quantized_modules)
    tied = {f"{module}.weight" for module in layout.tied}  # of which the checkpoint needs to have one
    if absent := sorted(weights - set(shapes) - (tied if tied & set(shapes) else set())):
        raise UserError(base, f"no tensor for the quantised weight {absent[0]}", "name the base that was trained on")
    updates = plan_updates(lora, shapes, layout)
    where = torch.device(device)
    packed = made is not None and needs_packed(made.config, made.task, quantization)
    storage = packed_config(quantization) if packed else quantization
    plan = _Plan(source, lora, updates, layout, weights, storage, compute_dtype, onto, dtype, where, made)
    written = [plan.written(entry) for entry in checkpoint.entries().values()]
    num_bytes = sum(entry.num_bytes for entry in written)
    with _new_folder(out, num_bytes) as partial:
        for shard, entries in checkpoint.shards.items():
            _write_shard(partial / shard, base / shard, entries, plan, on_tensor)
        with disk(out, num_bytes):
            _write_beside(plan, partial, num_bytes)
    return Merged(out, len(written), len(updates), num_bytes, time.perf_counter() - started)


def _trained_on(plan: _Plan, name: str, stored: Tensor) -> Tensor:
    """The value that the live layer used in training, in its stored orientation and in a dtype that holds it."""
    if name not in plan.quantized:
        return stored.to(plan.compute_dtype)
    module = name.removesuffix(".weight")
    transposed = module in plan.layout.conv1d
    rows = stored.T if transposed else stored  # what is quantised is (out_features, in_features)
    values = layer_values(rows, plan.storage, module, plan.compute_dtype, module in plan.layout.embeddings)
    return values.T if transposed else values


def _as_published(plan: _Plan, name: str, stored: Tensor) -> Tensor:
    return stored


VALUES: dict[str, Callable[[_Plan, str, Tensor], Tensor]] = {"dequantized": _trained_on, "original": _as_published}
"""The base of the merge by its name on the command line."""


def _write_shard(target: Path, source: Path, entries: list[Entry], plan: _Plan, on_tensor: OnTensor | None) -> None:
    """One shard of the base to one shard of the merged model."""
    written = [plan.written(entry) for entry in entries]
    with SafetensorsWriter(target, written, metadata={"format": "pt"}) as writer:
        for entry in written:
            tensor = plan.base.read(source, entry.name)
            name = plan.layout.parameter(entry.name)
            if name is not None and tensor.is_floating_point():
                tensor = _merged(plan, name, tensor.to(plan.device))
            writer.write(entry.name, tensor)
            if on_tensor is not None:
                on_tensor(entry.name, entry.num_bytes)


def _merged(plan: _Plan, name: str, stored: Tensor) -> Tensor:
    """The tensor that is written for a parameter. Raises UserError where it does not fit `plan.dtype`."""
    weight = VALUES[plan.onto](plan, name, stored)
    if name in plan.updates:
        exact = weight.float()
        exact = exact.clone() if exact.data_ptr() == stored.data_ptr() else exact  # the mapped file stays as it is
        weight = updated(plan.adapter, plan.updates[name], exact)
    result = weight.to(plan.dtype)
    if result.numel() and not all(math.isfinite(bound.item()) for bound in torch.aminmax(result)):
        raise UserError(
            plan.adapter.folder,
            f"the merged {name} is not finite in {plan.dtype}",
            "merge in bfloat16 or float32; if that fails too, the adapter or the base is broken",
            Exit.FAILED,
        )
    return result


@contextmanager
def _new_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary sibling that becomes `out` when the block succeeds, and goes when it fails."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(out, "it exists and is not an empty folder; nothing is overwritten", "name a new folder")
    partial = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    with disk(out, num_bytes):
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < num_bytes:
            raise UserError(
                out, f"{num_bytes:,} bytes are needed and {free:,} are free", "free space or name another", Exit.FAILED
            )
        partial.mkdir()
    try:
        yield partial
        with disk(out, num_bytes):
            sync(partial)
            partial.rename(out)  # onto nothing, or an empty folder; anything else fails
            sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_beside(plan: _Plan, folder: Path, num_bytes: int) -> None:
    """config.json, generation_config.json, the index, tokenizer and chat template."""
    base, adapter = plan.base.checkpoint.folder, plan.adapter.folder
    config = json.loads((base / "config.json").read_bytes())
    for name in ("torch_dtype", "quantization_config"):
        config.pop(name, None)
    config |= keys_of(plan.made, plan.layout)
    _write_json(folder / "config.json", config | {"dtype": str(plan.dtype).removeprefix("torch.")})
    if (base / "generation_config.json").is_file():
        _write(folder / "generation_config.json", (base / "generation_config.json").read_bytes())
    shards = plan.base.checkpoint.shards
    if SINGLE not in shards:
        weight_map = {entry.name: shard for shard, entries in shards.items() for entry in entries}
        _write_json(folder / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    complete = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    for source in [adapter] if complete else [base, adapter]:  # a template alone replaces the base's
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                _write(folder / name, (source / name).read_bytes())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
