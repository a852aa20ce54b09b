"""The plan of a run before anything is downloaded: what it holds at its peak and on disk, its length, and what fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from qlora_cli.data.limits import Limits
from qlora_cli.kernels.packed_attention import supports
from qlora_cli.model.recompute import checkpointing_layers
from qlora_cli.model.start import changes_base
from qlora_cli.plan.advice import Change, Together, alone, changed, length_keys, offers
from qlora_cli.plan.allocator import reserved
from qlora_cli.plan.meta_base import MetaModel, meta_model
from qlora_cli.plan.optimizer_memory import optimizer_state
from qlora_cli.plan.rehearsal import Peak, Shape, layers_checkpointed, rehearse_model
from qlora_cli.plan.search import largest_within, least_within
from qlora_cli.recipe import Recipe

CONTEXT_BYTES = {"cuda": 600 << 20, "cpu": 0}
"""What a device takes for itself: CUDA's context and libraries. An estimate, other by GPU and driver."""

LENGTH_STEP = 64
"""Tokens by which the largest length is found."""

MOST_ROWS = {"cpu": 64, "cuda": 1024}
MOST_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}
"""The largest micro-batch and the longest row that are looked for. On a CPU, which larger ones make no faster, rows are
multiplied tile by tile, each of which is rehearsed."""


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
    """What is known of the prepared training rows: their number and all their tokens in an epoch, the longest one's.

    total_steps: of the run, where their order is known.
    """

    number: int
    num_tokens: int
    longest: int
    total_steps: int | None = None


@dataclass(frozen=True)
class Plan:
    """A run's figures. budget_bytes: of the device, None where none is named.

    largest_rows: the largest micro-batch that fits at this length; largest_length: the longest row that fits in this
    micro-batch, in LENGTH_STEP; None where they were not looked for. whole_length: the longest that the model reads at
    once, None where its config does not say. steps, tokens: None where the rows are not known.
    changes: each of which makes the run fit, where it does not. together: all of them, where none does alone.
    """

    memory: Memory
    disk: Disk
    steps: int | None
    tokens: int | None
    budget_bytes: int | None = None
    largest_rows: int | None = None
    largest_length: int | None = None
    whole_length: int | None = None
    changes: tuple[Change, ...] = ()
    together: Together | None = None

    @property
    def fits(self) -> bool:
        """Whether the run fits its device; True where none is named."""
        return self.budget_bytes is None or self.memory.num_bytes <= self.budget_bytes


def plan(recipe: Recipe, config: Any, kind: str, budget_bytes: int | None = None, rows: Rows | None = None) -> Plan:
    """The plan of a run on a device of `kind` ("cpu" or "cuda"), from the recipe and the base's config alone.

    config: transformers' own. rows: of the training data, where they are prepared; else rows are as long as allowed.
    Raises UserError for a base that cannot be built without its weights.
    """
    stage = rehearsals(recipe, config, kind)
    length = longest_row(recipe, rows)
    length = min(length, stage.whole_length or length)
    memory = stage.memory(recipe.training.micro_batch_size, length)
    if recipe.training.gradient_checkpointing == "auto":  # which recomputes as many layers as memory asks for
        stage.checkpointed = stage.num_layers
        if budget_bytes is not None and memory.num_bytes > budget_bytes:
            memory = stage.memory(recipe.training.micro_batch_size, length)
    steps = num_steps(recipe, rows)
    tokens = num_tokens(recipe, rows, steps)
    disk = disk_of(recipe, memory, stage.found.model)
    found = Plan(memory, disk, steps, tokens, budget_bytes, whole_length=stage.whole_length)
    if budget_bytes is None:
        return found
    number, longest = stage.largest_rows(budget_bytes, length), stage.largest_length(budget_bytes)
    found = replace(found, largest_rows=number, largest_length=longest)
    if found.fits:
        return found
    if told := changes(recipe, config, stage, found, length):
        return replace(found, changes=tuple(told))
    return replace(found, together=all_changes(recipe, config, stage, budget_bytes, length))


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Rehearsals:
    """The rehearsals of one model; each shape is rehearsed once."""

    def __init__(self, recipe: Recipe, found: MetaModel, kind: str) -> None:
        self.recipe, self.found, self.kind = recipe, found, kind
        self.packed = recipe.data.packing is not False and found.base.task == "causal_lm" and supports(found.model)
        self.num_layers = len(checkpointing_layers(found.base.model))
        self.checkpointed = layers_checkpointed(recipe, kind, found.base.model)
        halves = 2 if found.base.task == "seq2seq_lm" else 1  # an encoder reads the source, a decoder the target
        self.whole_length = None if found.base.context is None else halves * found.base.context
        self.most_tokens = min(self.whole_length or MOST_TOKENS[kind], MOST_TOKENS[kind])
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

    def largest_rows(self, budget_bytes: int, length: int) -> int:
        """The largest micro-batch of rows of that length; 0: none fits."""
        return largest_within(lambda number: self.memory(number, length).num_bytes, budget_bytes, MOST_ROWS[self.kind])

    def largest_length(self, budget_bytes: int) -> int:
        """The longest row at the recipe's micro-batch, in LENGTH_STEP; 0: none fits."""
        number, most = self.recipe.training.micro_batch_size, max(1, self.most_tokens // LENGTH_STEP)
        steps = largest_within(lambda n: self.memory(number, n * LENGTH_STEP).num_bytes, budget_bytes, most)
        return steps * LENGTH_STEP

    def fewest_checkpointed(self, budget_bytes: int, number: int, length: int) -> int | None:
        """The fewest layers, from the first on, whose recomputing makes a micro-batch fit; None: it never does."""

        def cost(layers: int) -> int:
            return self.memory(number, length, layers).num_bytes

        return least_within(cost, budget_bytes, self.num_layers)


def rehearsals(recipe: Recipe, config: Any, kind: str) -> Rehearsals:
    """Those of a recipe. Raises UserError for a base that cannot be built without its weights."""
    return Rehearsals(recipe, meta_model(recipe, config, kind), kind)


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
    allowed = Limits.of(recipe.data, recipe.model.task).longest
    filled = recipe.data.packing is True  # whose rows are as long as allowed, whatever they are filled with
    return allowed if rows is None or filled else max(2, min(allowed, rows.longest))


# ── advice ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def changes(recipe: Recipe, config: Any, stage: Rehearsals, found: Plan, length: int) -> list[Change]:
    """Changes to the recipe each of which alone makes the run fit, every one of them rehearsed; the mildest first."""
    number, budget = recipe.training.micro_batch_size, found.budget_bytes or 0
    keys = offers(recipe, stage.checkpointed == stage.num_layers)

    def rehearse(changed_recipe: Recipe, tokens: int) -> int:
        return rehearsals(changed_recipe, config, stage.kind).memory(number, tokens).num_bytes

    told = alone(recipe, keys, length, budget, rehearse)
    if found.largest_rows:
        fewer = stage.memory(found.largest_rows, length)
        told.append(Change("training.micro_batch_size", found.largest_rows, fewer.num_bytes))
    if found.largest_length:
        shorter = stage.memory(number, found.largest_length)
        keys = length_keys(recipe, found.largest_length)
        told += [Change(key, value, shorter.num_bytes) for key, value in keys.items()]
    return told


def all_changes(recipe: Recipe, config: Any, stage: Rehearsals, budget_bytes: int, length: int) -> Together:
    """All changes at once, with one row in a micro-batch, and shorter rows where it does not fit otherwise."""
    keys = offers(recipe, stage.checkpointed == stage.num_layers) | {"training.micro_batch_size": 1}
    least = rehearsals(changed(recipe, keys), config, stage.kind)
    memory = least.memory(1, length)
    if memory.num_bytes > budget_bytes and (longest := least.largest_length(budget_bytes)):
        return Together(keys | length_keys(recipe, longest), least.memory(1, longest).num_bytes)
    return Together(keys, memory.num_bytes)


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
    if rows.total_steps is not None:
        return rows.total_steps
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
