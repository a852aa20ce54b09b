"""The plan of a run before anything is downloaded: what it holds at its peak and on disk, its length, and what fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.kernels.packed_attention import supports
from qlora_cli.model.kept_weights import all_weights_bytes
from qlora_cli.model.recompute import checkpointing_layers
from qlora_cli.model.start import changes_base
from qlora_cli.plan.advice import RANK, ROWS, Change, Together, alone, changed, length_keys, offers, ranks
from qlora_cli.plan.allocator import reserved
from qlora_cli.plan.meta_base import MetaModel, meta_model
from qlora_cli.plan.optimizer_memory import optimizer_state
from qlora_cli.plan.rehearsal import Peak, Shape, layers_checkpointed, rehearse_model
from qlora_cli.plan.run_length import Rows, longest_row, num_steps, num_tokens
from qlora_cli.plan.search import largest_within
from qlora_cli.recipe import Recipe

CONTEXT_BYTES = {"cuda": 600 << 20, "cpu": 0}
"""What a device takes for itself: CUDA's context and libraries. An estimate, other by GPU and driver."""

LENGTH_STEP = 64
"""Tokens by which the largest length is found."""

MOST_ROWS = {"cpu": 64, "cuda": 1024}
MOST_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}
"""The largest micro-batch and the longest row that are looked for. On a CPU, which larger ones make no faster, rows are
multiplied tile by tile, each of which is rehearsed."""

MOST_CELLS = {"cpu": 1 << 15, "cuda": 1 << 19}
"""Tokens of a micro-batch that is rehearsed; what larger ones take follows by proportion. Seconds on either device, and
far below the size from which on tensors of integers are shapes alone (ledger.REAL_BYTES), which no step survives."""


@dataclass(frozen=True)
class Memory:
    """A peak and what surrounds it. peak: by kind, the optimizer's state in it.

    reserved_bytes: what the allocator holds for it. context_bytes: the device's own. host: bytes in host memory by
    kind, beside a GPU. by_proportion: the micro-batch was too large to be rehearsed, and two smaller ones tell what it
    takes. kept_bytes: of the weights those that are kept dequantised beside what is stored, of keepable_bytes.
    """

    peak: Peak
    reserved_bytes: int
    context_bytes: int
    host: Mapping[str, int]
    checkpointed: int
    num_layers: int
    by_proportion: bool = False
    kept_bytes: int = 0
    keepable_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """What the device must have."""
        return self.reserved_bytes + self.context_bytes

    @property
    def host_bytes(self) -> int:
        """What lies in host memory beside a GPU."""
        return sum(self.host.values())


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
class Plan:
    """A run's figures. budget_bytes: of the device, None where none is named.

    largest_rows: the largest micro-batch that fits at this length; largest_length: the longest row that fits in this
    micro-batch, in LENGTH_STEP; None where they were not looked for. whole_length: the longest that the model reads at
    once, None where its config does not say. steps, tokens: None where the rows are not known.
    changes: each of which makes the run fit, where it does not. together: several, where none does alone; None too
    where the device's own context is larger than the device.
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
    memory = stage.with_kept(memory, budget_bytes)
    steps = num_steps(recipe, rows)
    tokens = num_tokens(recipe, rows, steps)
    disk = disk_of(recipe, memory, stage.found)
    found = Plan(memory, disk, steps, tokens, budget_bytes, whole_length=stage.whole_length)
    if budget_bytes is None:
        return found
    if memory.context_bytes > budget_bytes:
        return replace(found, largest_rows=0, largest_length=0)
    number, longest = stage.largest_rows(budget_bytes, length), stage.largest_length(budget_bytes)
    if found.fits:  # never less than what is planned: the search has an end, and steps
        number, longest = max(number, recipe.training.micro_batch_size), max(longest, length)
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
        if number * length > MOST_CELLS[self.kind]:
            return self._by_proportion(number, length, layers)
        key = (number, length, layers)
        if key not in self._known:
            shorter = length if self.packed else max(2, length - 1)
            shape = Shape((length, *[shorter] * (number - 1)), self.packed)
            peak = rehearse_model(self.found, self.recipe, shape, self.kind, layers)
            self._known[key] = with_optimizer(self.recipe, self.found, peak, self.kind, (layers, self.num_layers))
        return self._known[key]

    def with_kept(self, memory: Memory, budget_bytes: int | None) -> Memory:
        """Under training.memory: fast with the weights that are kept dequantised in what the budget leaves."""
        if self.recipe.training.memory != "fast":
            return memory
        every = all_weights_bytes(self.found.model, self.found.base.compute_dtype)
        kept = every if budget_bytes is None else max(0, min(every, budget_bytes - memory.num_bytes))
        by_kind = {**memory.peak.by_kind, "weights": memory.peak.by_kind["weights"] + kept}
        peak = replace(memory.peak, by_kind=by_kind)
        return replace(
            memory, peak=peak, reserved_bytes=memory.reserved_bytes + kept, kept_bytes=kept, keepable_bytes=every
        )

    def _by_proportion(self, number: int, length: int, layers: int) -> Memory:
        """What too many tokens take: on the line through half the most that are rehearsed and the most.

        Of whole rows where two of them can be; else of as many tokens in one row. Memory is convex in tokens, so that
        no less is needed.
        """
        most = MOST_CELLS[self.kind] // length
        if number > 1 and most > 1:
            few, many = (self.memory(rows, length, layers) for rows in (most // 2, most))
            far = (number - most // 2) / (most - most // 2)
        else:
            most = MOST_CELLS[self.kind]
            few, many = (self.memory(1, tokens, layers) for tokens in (most // 2, most))
            far = (number * length - most // 2) / (most - most // 2)

        def at(low: int, high: int) -> int:
            return round(low + (high - low) * far)

        by_kind = {kind: at(few.peak.by_kind[kind], num_bytes) for kind, num_bytes in many.peak.by_kind.items()}
        shape = Shape((length,) * min(number, 2), self.packed)  # all rows are alike, and there may be millions
        reserved_bytes = max(at(few.reserved_bytes, many.reserved_bytes), sum(by_kind.values()))
        host = {kind: at(few.host[kind], num_bytes) for kind, num_bytes in many.host.items()}
        peak = replace(many.peak, by_kind=by_kind, shape=shape)
        return replace(many, peak=peak, reserved_bytes=reserved_bytes, host=host, by_proportion=True)

    def largest_rows(self, budget_bytes: int, length: int) -> int:
        """The largest micro-batch of rows of that length; 0: none fits."""
        return largest_within(lambda number: self.memory(number, length).num_bytes, budget_bytes, MOST_ROWS[self.kind])

    def largest_length(self, budget_bytes: int) -> int:
        """The longest row at the recipe's micro-batch, in LENGTH_STEP; 0: none fits."""
        number, most = self.recipe.training.micro_batch_size, max(1, self.most_tokens // LENGTH_STEP)
        steps = largest_within(lambda n: self.memory(number, n * LENGTH_STEP).num_bytes, budget_bytes, most)
        return steps * LENGTH_STEP


def rehearsals(recipe: Recipe, config: Any, kind: str) -> Rehearsals:
    """Those of a recipe. Raises UserError for a base that cannot be built without its weights."""
    return Rehearsals(recipe, meta_model(recipe, config, kind), kind)


def with_optimizer(recipe: Recipe, found: MetaModel, peak: Peak, kind: str, layers: tuple[int, int]) -> Memory:
    """A rehearsed peak with what surrounds it. layers: how many are recomputed, of how many."""
    sizes = [parameter.numel() for parameter in found.model.parameters() if parameter.requires_grad]
    state = optimizer_state(recipe.training.optimizer, sizes, kind)
    whole = replace(peak, by_kind={**peak.by_kind, "optimizer": state.device_bytes})
    held = whole.num_bytes
    if kind == "cuda":
        there = [*peak.there, *([state.device_bytes] if state.device_bytes else [])]
        held = max(held, reserved(there, ((event.number, event.num_bytes) for event in peak.events)))
    host = {"weights": found.placed.host_bytes, "optimizer": state.host_bytes, "activations": peak.host_bytes}
    return Memory(replace(whole, there=(), events=()), held, CONTEXT_BYTES[kind], host, *layers)


# ── advice ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def changes(recipe: Recipe, config: Any, stage: Rehearsals, found: Plan, length: int) -> list[Change]:
    """Changes to the recipe each of which alone makes the run fit, every one of them rehearsed; the mildest first."""
    number, budget = recipe.training.micro_batch_size, found.budget_bytes or 0

    def rehearse(changed_recipe: Recipe, tokens: int) -> int:
        return alike(stage, changed_recipe, config).memory(number, tokens).num_bytes

    keys = offers(recipe, stage.checkpointed == stage.num_layers, stage.kind)
    told = alone(recipe, keys, length, budget, rehearse)
    if found.largest_rows:
        fewer = stage.memory(found.largest_rows, length)
        told.append(Change(ROWS, found.largest_rows, fewer.num_bytes))
    lower = (alone(recipe, [{RANK: rank}], length, budget, rehearse) for rank in ranks(recipe))
    told += next(filter(None, lower), [])  # one by one: below some rank bitsandbytes pages no state, and it takes more
    if found.largest_length:
        shorter = stage.memory(number, found.largest_length)
        length_key = length_keys(recipe, found.largest_length)
        told += [Change(key, value, shorter.num_bytes) for key, value in length_key.items()]
    return told


def all_changes(recipe: Recipe, config: Any, stage: Rehearsals, budget_bytes: int, length: int) -> Together:
    """Changes one after the other, the mildest first, until it fits; those that make nothing smaller are left out.

    In the end rows are shorter; where nothing is enough they are as short as a plan has them.
    """
    least, keys = stage, dict[str, Any]()
    memory = stage.memory(recipe.training.micro_batch_size, length)
    steps = offers(recipe, stage.checkpointed == stage.num_layers, stage.kind)
    for step in [*steps, {ROWS: 1}, *({RANK: rank} for rank in ranks(recipe))]:
        try:
            tried = alike(stage, changed(recipe, keys | step), config)
        except UserError:  # of a model whose layers cannot be streamed
            continue
        found = tried.memory(tried.recipe.training.micro_batch_size, length)
        if (found.num_bytes, found.peak.num_bytes) < (memory.num_bytes, memory.peak.num_bytes):
            least, keys, memory = tried, keys | step, found
        if memory.num_bytes <= budget_bytes:
            if ROWS in step:
                rows = least.largest_rows(budget_bytes, length)
                keys, memory = keys | {ROWS: rows}, least.memory(rows, length)
            return Together(keys, memory.num_bytes)
    longest = min(length, least.largest_length(budget_bytes) or LENGTH_STEP)
    shorter = least.memory(least.recipe.training.micro_batch_size, longest)
    if longest < length and (length_key := length_keys(recipe, longest)):
        return Together(keys | length_key, shorter.num_bytes)
    return Together(keys, memory.num_bytes)


def alike(stage: Rehearsals, recipe: Recipe, config: Any) -> Rehearsals:
    """Those of a changed recipe, with as many layers recomputed at least."""
    found = rehearsals(recipe, config, stage.kind)
    found.checkpointed = max(found.checkpointed, stage.checkpointed)
    found.packed = stage.packed
    return found


# ── disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def disk_of(recipe: Recipe, memory: Memory, found: MetaModel) -> Disk:
    """What the run folder grows to."""
    kinds = memory.peak.by_kind
    one = kinds["adapter"] + kinds["optimizer"] + memory.host["optimizer"]
    best = kinds["adapter"] if recipe.evaluation.best_metric is not None else 0
    base = kinds["weights"] - memory.kept_bytes + found.placed.left_out_bytes if changes_base(recipe.adapter) else 0
    return Disk(one * (recipe.training.save_total_limit + 1), kinds["adapter"] + best, base)
