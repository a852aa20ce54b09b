"""The plan of a run before anything is downloaded: what it holds at its peak and on disk, its length, and what fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora_cli.kernels.packed_attention import supports
from qlora_cli.model.start import changes_base
from qlora_cli.plan.allocator import reserved
from qlora_cli.plan.meta_base import MetaModel, meta_model
from qlora_cli.plan.optimizer_memory import optimizer_state
from qlora_cli.plan.rehearsal import Peak, Shape, checkpointing_layers, layers_checkpointed, rehearse_model
from qlora_cli.plan.search import largest_within, least_within
from qlora_cli.recipe import Recipe

CONTEXT_BYTES = {"cuda": 600 << 20, "cpu": 0}
"""What a device takes for itself: CUDA's context and libraries. An estimate, other by GPU and driver."""

LENGTH_STEP = 64
"""Tokens by which the largest length is found."""

MOST_ROWS, MOST_TOKENS = 1024, 131_072
"""The largest micro-batch that is looked for; the longest row where the model's config says none."""


@dataclass(frozen=True)
class Memory:
    """A peak and what surrounds it. peak: by kind, the optimizer's state in it. host_bytes: paged state in the host.

    reserved_bytes: what the allocator holds for it. context_bytes: the device's own.
    """

    peak: Peak
    reserved_bytes: int
    context_bytes: int
    host_bytes: int
    checkpointed: int
    num_layers: int

    @property
    def num_bytes(self) -> int:
        """What the device must have."""
        return self.reserved_bytes + self.context_bytes


@dataclass(frozen=True)
class Disk:
    """Bytes in the run folder: checkpoints (as many as are kept, and one more while it is written), adapter, base."""

    checkpoints: int
    adapter: int
    base: int

    @property
    def num_bytes(self) -> int:
        return self.checkpoints + self.adapter + self.base


@dataclass(frozen=True)
class Rows:
    """What is known of the prepared training rows: their number, all their tokens, and the longest one's."""

    number: int
    num_tokens: int
    longest: int


@dataclass(frozen=True)
class Change:
    """A key of the recipe, the value that it should have, and the memory of the recipe with this change alone."""

    key: str
    value: Any
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """A run's figures. budget_bytes: of the device, None where none is named.

    largest_rows: the largest micro-batch that fits at this length; largest_length: the longest row that fits in this
    micro-batch, in LENGTH_STEP; None where they were not looked for. steps, tokens: None where the rows are not known.
    changes: each of which makes the run fit, where it does not; empty where none does alone.
    """

    memory: Memory
    disk: Disk
    steps: int | None
    tokens: int | None
    budget_bytes: int | None = None
    largest_rows: int | None = None
    largest_length: int | None = None
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the run fits its device; True where none is named."""
        return self.budget_bytes is None or self.memory.num_bytes <= self.budget_bytes


def plan(recipe: Recipe, config: Any, kind: str, budget_bytes: int | None = None, rows: Rows | None = None) -> Plan:
    """The plan of a run on a device of `kind` ("cpu" or "cuda"), from the recipe and the base's config alone.

    config: transformers' own. rows: of the training data, where they are prepared; else rows are as long as allowed.
    Raises UserError for a base that cannot be built without its weights.
    """
    stage = Rehearsals(recipe, meta_model(recipe, config, kind), kind)
    length = longest_row(recipe, rows)
    memory = stage.memory(recipe.training.micro_batch_size, length)
    steps = num_steps(recipe, rows)
    tokens = num_tokens(recipe, rows, steps)
    found = Plan(memory, disk_of(recipe, memory, stage.found.model), steps, tokens, budget_bytes)
    if budget_bytes is None:
        return found
    number, longest = stage.largest(budget_bytes, length)
    found = replace(found, largest_rows=number, largest_length=longest)
    return found if found.fits else replace(found, changes=tuple(changes(recipe, config, stage, found, length)))


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Rehearsals:
    """The rehearsals of one model; each shape is rehearsed once."""

    def __init__(self, recipe: Recipe, found: MetaModel, kind: str) -> None:
        self.recipe, self.found, self.kind = recipe, found, kind
        self.packed = recipe.data.packing is not False and found.base.task == "causal_lm" and supports(found.model)
        self.num_layers = len(checkpointing_layers(found.base.model))
        self.checkpointed = layers_checkpointed(recipe, kind, found.base.model)
        self._known: dict[tuple[int, int, int], Memory] = {}

    def memory(self, number: int, length: int, checkpointed: int | None = None) -> Memory:
        """That of a micro-batch of `number` rows, all as long as they may be; a padded one has a mask."""
        layers = self.checkpointed if checkpointed is None else checkpointed
        key = (number, length, layers)
        if key not in self._known:
            shorter = length if self.packed else max(2, length - 1)
            shape = Shape((length, *[shorter] * (number - 1)), self.packed)
            peak = rehearse_model(self.found, self.recipe, shape, self.kind, layers)
            self._known[key] = with_optimizer(self.recipe, self.found.model, peak, self.kind, (layers, self.num_layers))
        return self._known[key]

    def largest(self, budget_bytes: int, length: int) -> tuple[int, int]:
        """The largest micro-batch at this length, and the longest row at the recipe's micro-batch; 0: none fits."""
        number = self.recipe.training.micro_batch_size
        rows = largest_within(lambda n: self.memory(n, length).num_bytes, budget_bytes, MOST_ROWS)
        most = min(self.found.base.context or MOST_TOKENS, MOST_TOKENS) // LENGTH_STEP
        steps = largest_within(lambda n: self.memory(number, n * LENGTH_STEP).num_bytes, budget_bytes, max(1, most))
        return rows, steps * LENGTH_STEP

    def fewest_checkpointed(self, budget_bytes: int, number: int, length: int) -> int | None:
        """The fewest layers, from the first on, whose recomputing makes a micro-batch fit; None: it never does."""

        def cost(layers: int) -> int:
            return self.memory(number, length, layers).num_bytes

        return least_within(cost, budget_bytes, self.num_layers)


def with_optimizer(recipe: Recipe, model: Any, peak: Peak, kind: str, layers: tuple[int, int]) -> Memory:
    """A rehearsed peak with what surrounds it. layers: how many are recomputed, of how many."""
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    state = optimizer_state(recipe.training.optimizer, sizes, kind)
    whole = replace(peak, by_kind={**peak.by_kind, "optimizer": state.device_bytes})
    held = whole.num_bytes
    if kind == "cuda":
        there = [*peak.there, *([state.device_bytes] if state.device_bytes else [])]
        held = max(held, reserved(there, ((event.number, event.num_bytes) for event in peak.events)))
    return Memory(replace(whole, there=(), events=()), held, CONTEXT_BYTES[kind], state.host_bytes, *layers)


def longest_row(recipe: Recipe, rows: Rows | None) -> int:
    """Tokens of the longest row that a run may see."""
    data = recipe.data
    allowed = data.max_length
    if data.source_max_length is not None and data.target_max_length is not None:
        allowed = data.source_max_length + data.target_max_length
    filled = recipe.data.packing is True  # whose rows are as long as allowed, whatever they are filled with
    return allowed if rows is None or filled else max(2, min(allowed, rows.longest))


# ── advice ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def changes(recipe: Recipe, config: Any, stage: Rehearsals, found: Plan, length: int) -> Iterator[Change]:
    """Changes to the recipe each of which alone makes the run fit, every one of them rehearsed; the mildest first."""
    budget, number = found.budget_bytes or 0, recipe.training.micro_batch_size
    if stage.checkpointed < stage.num_layers:
        memory = stage.memory(number, length, stage.num_layers)
        if memory.num_bytes <= budget:
            yield Change("training.gradient_checkpointing", True, memory.num_bytes)
    for key, values in REPLACED.items():
        section, _, name = key.partition(".")
        if getattr(getattr(recipe, section), name) in values[1:]:
            continue
        changed = _changed(recipe, section, name, values[0])
        memory = Rehearsals(changed, meta_model(changed, config, stage.kind), stage.kind).memory(number, length)
        if memory.num_bytes <= budget:
            yield Change(key, values[0], memory.num_bytes)
    if found.largest_rows:
        yield Change(
            "training.micro_batch_size", found.largest_rows, stage.memory(found.largest_rows, length).num_bytes
        )
    if found.largest_length:
        yield Change("data.max_length", found.largest_length, stage.memory(number, found.largest_length).num_bytes)


REPLACED: dict[str, tuple[str, ...]] = {
    "training.optimizer": ("paged_adamw_8bit", "paged_adamw_8bit", "adamw_8bit"),
    "quantization.data_type": ("nf4", "nf4", "fp4", "int4", "nf2", "int2"),
}
"""Values by key that take less memory, and behind them those that they are not offered for."""


def _changed(recipe: Recipe, section: str, name: str, value: Any) -> Recipe:
    part = getattr(recipe, section).model_copy(update={name: value})
    return recipe.model_copy(update={section: part})


# ── disk and length of the run ───────────────────────────────────────────────────────────────────────────────────────


def disk_of(recipe: Recipe, memory: Memory, model: Any) -> Disk:
    """What the run folder grows to."""
    kinds = memory.peak.by_kind
    one = kinds["adapter"] + kinds["optimizer"] + memory.host_bytes
    best = kinds["adapter"] if recipe.evaluation.best_metric is not None else 0
    base = kinds["weights"] if changes_base(recipe.adapter) else 0
    return Disk(one * (recipe.training.save_total_limit + 1), kinds["adapter"] + best, base)


def num_steps(recipe: Recipe, rows: Rows | None) -> int | None:
    """Optimizer steps of the run on one device; with filled rows as many as their tokens need at least."""
    training = recipe.training
    if training.max_steps is not None or rows is None:
        return training.max_steps
    units = rows.number
    if recipe.data.packing is True:
        units = math.ceil(rows.num_tokens / recipe.data.max_length)
    return math.ceil(
        math.ceil(units / (training.micro_batch_size * training.gradient_accumulation_steps)) * training.epochs
    )


def num_tokens(recipe: Recipe, rows: Rows | None, steps: int | None) -> int | None:
    """Tokens that the model reads in training, without padding."""
    training = recipe.training
    if rows is None or steps is None:
        return None
    if training.max_steps is None:
        return math.ceil(rows.num_tokens * training.epochs)
    units = steps * training.micro_batch_size * training.gradient_accumulation_steps
    return units * recipe.data.max_length if recipe.data.packing is True else units * rows.num_tokens // rows.number
