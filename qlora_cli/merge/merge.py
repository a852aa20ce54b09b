"""Base and adapter to one ordinary transformers folder, a tensor at a time: float32 arithmetic, one cast at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_cli import __version__
from qlora_cli.errors import UserError
from qlora_cli.merge.adapter_delta import Rows, Update, plan_updates, read_adapter
from qlora_cli.merge.behind import Behind
from qlora_cli.merge.companions import write_config, write_json, write_tokenizer
from qlora_cli.merge.fold import Fold, folded
from qlora_cli.merge.head import for_task, keys_of
from qlora_cli.merge.partial import made_aside, refuse_inside
from qlora_cli.merge.rows import keys_of_vocabulary, vocabulary, with_room
from qlora_cli.merge.ties import changed_ties, keys_of_untied, scales, untied
from qlora_cli.model.heads import needs_packed
from qlora_cli.model.layout import Layout, Made, read_layout
from qlora_cli.model.ordinary import ordinary
from qlora_cli.model.safetensors_stream import INDEX, SINGLE, Entry, disk, read_entries
from qlora_cli.model.whole_folder import sha256
from qlora_cli.quant.layers import layer_values, packed_config
from qlora_cli.recipe.schema import Quantization

PACKAGES = ("torch", "transformers", "bitsandbytes")
"""Those whose next version may round otherwise."""

OnTensor = Callable[[str, int], None]
"""Called after each tensor with its name and its bytes written."""

Base = Literal["dequantized", "original"]
"""What an adapter is added to: the weights that it was trained on, or those that were published."""


@dataclass(frozen=True)
class Merged:
    """What a merge did. quantize_seconds: of `seconds`, those of quantising and back."""

    folder: Path
    num_tensors: int
    num_changed: int  # tensors that the adapter changed
    num_bytes: int  # of tensor data
    seconds: float
    quantize_seconds: float
    resumed: int  # files that an interrupted merge had left whole
    untied: tuple[str, ...]  # modules that shared a weight and have one each


@dataclass(frozen=True)
class How:
    """How a merge is made, beside its base and its adapter.

    onto: `dequantized` adds to the weights that the adapter was trained on: quantised and back for quantized_modules,
    rounded to compute_dtype for the rest. `original` adds to the base as published.
    quantized_modules: full names of the modules quantised in training, as in the model without its adapter.
    device: where a weight is quantised; the kind of device that trained, to be equal to the last bit.
    made: the task, whose head the adapter has and the base may lack; None: of the class that config.json names.
    """

    quantization: Quantization
    compute_dtype: torch.dtype
    onto: Base
    dtype: torch.dtype
    quantized_modules: Collection[str]
    device: torch.device | str = "cpu"
    made: Made | None = None


class _Plan:
    """One merge, read and checked before anything is written."""

    def __init__(self, base: Path, adapter: Path, how: How):
        self.how, self.layout = how, read_layout(base, how.compute_dtype, how.made)
        self.adapter = read_adapter(adapter)
        source = for_task(ordinary(base, how.compute_dtype), self.adapter, self.layout, how.made)
        self.untied = changed_ties(self.adapter, self.layout)
        source = untied(source, self.untied, self.layout)
        self.scales = scales(self.untied, self.layout)
        entries = source.checkpoint.entries()
        shapes = {full: e.shape for name, e in entries.items() if (full := self.layout.parameter(name))}
        self.quantized = frozenset(f"{module}.weight" for module in how.quantized_modules)
        _refuse_absent(self.quantized, shapes, self.layout, base)
        self.updates: dict[str, Update] = plan_updates(self.adapter, shapes, self.layout)
        self.vocabulary = vocabulary(self.updates, shapes, self.layout, self.adapter)
        self.base = with_room(source, self.vocabulary, self.layout)
        self.entries = self.base.checkpoint.entries()
        packed = how.made is not None and needs_packed(how.made.config, how.made.task, how.quantization)
        self.storage: Any = packed_config(how.quantization) if packed else how.quantization  # as layer_values takes it
        self.quantize_seconds = 0.0

    def written(self, entry: Entry) -> Entry:
        """How a tensor of the base is written: parameters in the dtype of the merge, anything else as it is."""
        name = self.layout.parameter(entry.name)
        if name is None or not entry.dtype.is_floating_point:
            return entry
        update = self.updates.get(name)
        shape = (update.number, *entry.shape[1:]) if isinstance(update, Rows) else entry.shape
        return replace(entry, dtype=self.how.dtype, shape=shape)

    def inputs(self) -> dict[str, Any]:
        """JSON of all that decides what is written: an unfinished merge of other inputs is not gone on with."""
        files = sorted(path for path in self.base.checkpoint.folder.iterdir() if path.is_file())
        stats = {path.name: path.stat() for path in files}
        settings = {**vars(self.how), "quantized_modules": sorted(self.how.quantized_modules), "made": None}
        return {
            "base": str(self.base.checkpoint.folder.resolve()),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "adapter": [sha256(self.adapter.weights), self.adapter.config],
            "versions": {"qlora": __version__, **{name: version(name) for name in PACKAGES}},
            "task": None if self.how.made is None else self.how.made.task,
            **{name: str(value) for name, value in settings.items()},
        }


def _refuse_absent(quantized: frozenset[str], shapes: dict[str, tuple[int, ...]], layout: Layout, base: Path) -> None:
    """Refuses a base without a weight that was quantised; of tied ones the checkpoint needs to have one."""
    tied = {f"{module}.weight" for module in layout.tied}
    if absent := sorted(quantized - set(shapes) - (tied if tied & set(shapes) else set())):
        raise UserError(base, f"no tensor for the quantised weight {absent[0]}", "name the base that was trained on")


def merge_adapter(
    base: Path,
    adapter: Path,
    out: Path,
    how: How,
    *,
    on_tensor: OnTensor | None = None,
    finish: Callable[[Path, Merged], None] | None = None,
) -> Merged:
    """Write base + adapter to `out`, which must be new or empty; a merge that was interrupted goes on file by file.

    Peak memory: onto `original` the largest tensor as it is written and a few rows of it in float32; onto
    `dequantized`, measured, 21 bytes per weight of the largest quantised tensor (the library's own quantiser, as when
    the base is loaded for training).
    finish: is called with the folder before it gets its name; where it raises, it never does.
    Raises UserError for inputs that do not fit, and with exit code FAILED for a full disk or weights beyond the dtype.
    """
    started = time.perf_counter()
    refuse_inside(out, {"the base": base, "the adapter": adapter})
    plan = _Plan(base, adapter, how)
    written = [plan.written(entry) for entry in plan.entries.values()]
    num_bytes = sum(entry.num_bytes for entry in written)
    with made_aside(out, plan.inputs(), num_bytes) as aside:
        shards = plan.base.checkpoint.shards
        with Behind() as behind:
            made = [
                _write_shard(behind, (base / shard, aside / shard), entries, plan, on_tensor)
                for shard, entries in shards.items()
            ]
        with disk(out, num_bytes):
            _write_beside(plan, aside, num_bytes)
        seconds = time.perf_counter() - started
        counts = (len(written), len(plan.updates), num_bytes)
        merged = Merged(out, *counts, seconds, plan.quantize_seconds, made.count(False), tuple(sorted(plan.untied)))
        if finish is not None:
            finish(aside, merged)
    return merged


def _trained_on(plan: _Plan, name: str, stored: Tensor) -> Tensor:
    """The value that the live layer used in training, in its stored orientation and in a dtype that holds it."""
    if name not in plan.quantized:
        return stored.to(plan.how.compute_dtype)
    begin = time.perf_counter()
    module = name.removesuffix(".weight")
    transposed = module in plan.layout.conv1d
    rows = stored.T if transposed else stored  # what is quantised is (out_features, in_features)
    values = layer_values(rows, plan.storage, module, plan.how.compute_dtype, module in plan.layout.embeddings)
    plan.quantize_seconds += time.perf_counter() - begin
    return values.T if transposed else values


def _as_published(plan: _Plan, name: str, stored: Tensor) -> Tensor:
    return stored


VALUES: dict[Base, Callable[[_Plan, str, Tensor], Tensor]] = {"dequantized": _trained_on, "original": _as_published}
"""The base of the merge by its name on the command line."""


def _write_shard(
    behind: Behind, paths: tuple[Path, Path], entries: list[Entry], plan: _Plan, on_tensor: OnTensor | None
) -> bool:
    """One shard of the base to one shard of the merged model; False where an interrupted merge had left it whole.

    paths: the base's shard, and the merged one's.
    """
    source, target = paths
    written = [plan.written(entry) for entry in entries]
    if target.exists() and {e.name: e for e in read_entries(target)} == {e.name: e for e in written}:
        return False
    with behind.file(target, written) as write:
        for entry in written:
            tensor = plan.base.read(source, entry.name)
            name = plan.layout.parameter(entry.name)
            if name is not None and tensor.is_floating_point():
                value = VALUES[plan.how.onto](plan, name, tensor.to(plan.how.device))
                fold = Fold(name, plan.updates.get(name), plan.scales.get(name, 1.0))
                for rows in folded(plan.adapter, fold, value, plan.how.dtype):
                    write(entry.name, rows)
            else:
                write(entry.name, tensor)
            if on_tensor is not None:
                on_tensor(entry.name, entry.num_bytes)
    return True


def _write_beside(plan: _Plan, folder: Path, num_bytes: int) -> None:
    """config.json, generation_config.json, the index, tokenizer and chat template."""
    base, adapter, how = plan.base.checkpoint.folder, plan.adapter.folder, plan.how
    changes = keys_of(how.made, plan.layout) | (keys_of_untied(plan.scales) if plan.untied else {})
    changes |= keys_of_vocabulary(plan.vocabulary, plan.layout, base)
    write_config(folder, base, changes | {"dtype": str(how.dtype).removeprefix("torch.")})
    shards = plan.base.checkpoint.shards
    if SINGLE not in shards:
        weight_map = {entry.name: shard for shard, entries in shards.items() for entry in entries}
        write_json(folder / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    write_tokenizer(folder, base, adapter)
