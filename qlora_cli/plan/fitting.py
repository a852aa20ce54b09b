"""How many layers a run recomputes to fit the memory that is free, by rehearsals of its largest micro-batch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from qlora_cli.errors import UserError
from qlora_cli.model.base import readable_bytes
from qlora_cli.model.kept_weights import all_weights_bytes
from qlora_cli.model.recompute import checkpointing_layers
from qlora_cli.plan.memory import LENGTH_STEP, Disk, Memory, Plan, Rehearsals, changes
from qlora_cli.plan.meta_base import meta_model
from qlora_cli.plan.search import largest_within
from qlora_cli.recipe import Recipe
from qlora_cli.train.recompute import Choice, Need, Seen, words
from qlora_cli.train.room import Room, room_on

SPARE_BYTES = {"cuda": 256 << 20, "cpu": 1 << 30}
"""Left free: cuBLAS' workspaces (32 MiB on an H100) and the kernels that a GPU loads when they are first called, which
no rehearsal sees; on a CPU oneDNN's cache of kernels, one for each new length of a batch: 0.9 GB in 45 steps."""

SPARE_SHARE = 0.1
"""Of what a step takes, left free too. Rehearsals are within 1.3% of torch's profiler on a CPU, whose allocator holds 3
to 4% more; rows of many lengths tear more holes into a GPU's memory than the one micro-batch that is replayed."""

MOST_REHEARSALS = 5
"""Of one search: each takes about a second of one core for 32 layers, 2.5 for 80."""

LEAST_SHARE = 0.8
"""A first step that takes less than this of what was planned is believed no further: its rows may be easy ones."""


@dataclass
class Rehearsed:
    """A run's rehearsals and the room there is. share: of the planned that steps are known to take.

    kept_bytes: of weights that are kept dequantised beside it.
    """

    stage: Rehearsals
    need: Need
    room: Room
    share: float = 1.0
    kept_bytes: int = 0

    def memory(self, number: int) -> Memory:
        """The largest micro-batch with the first `number` layers recomputed."""
        return self.stage.memory(self.need.rows, self.need.length, number)

    @property
    def bytes(self) -> int:
        """What the plan may come to: what is free, and of what the process holds only what the plan counts too.

        Whatever else it holds, such as the rest of segments in use, steps may not get.
        """
        return self.room.free_bytes + min(self.room.held_bytes, there(self.memory(0)))

    def needed(self, number: int) -> int:
        """Bytes with which that many layers are recomputed, and what is left free. The device's own are taken."""
        memory, kinds = self.memory(number), self.memory(number).peak.by_kind
        step = memory.peak.num_bytes - there(memory)
        kind = self.stage.kind
        snapshot = kinds["adapter"] + kinds["optimizer"] if kind == "cpu" else 0  # of a checkpoint that is written
        spare = round((self.share - 1 + SPARE_SHARE) * step) + SPARE_BYTES[kind]
        return memory.reserved_bytes + spare + snapshot + self.kept_bytes

    def choice(self) -> int | None:
        """The fewest layers that make it fit; None: not even all of them do."""
        return fewest_within(self.needed, self.bytes, self.stage.num_layers)


class Fitting:
    """A run's planner. chosen: the number of layers that fits, None where not even all of them do."""

    def __init__(self, recipe: Recipe, room: Callable[[torch.device], Room] = room_on) -> None:
        # rehearsed with all layers recomputed where nothing else is asked for, as changes to the recipe are
        training = recipe.training.model_copy(update={"gradient_checkpointing": True})
        self.recipe, self.room = recipe.model_copy(update={"training": training}), room
        self.rehearsed: Rehearsed | None = None
        self.chosen: int | None = None

    def choose(self, need: Need) -> Choice:
        """Rehearses the run's largest micro-batch with none, all and a few other numbers of layers recomputed.

        Nothing is refused. What does not fit goes on with all of them, and is told what would make it fit: no rehearsal
        has been held against a GPU yet, where a step that fails tells the same; and a CPU swaps. A base that cannot be
        rehearsed has all layers recomputed on a GPU and none on a CPU.
        """
        kind = need.base.device.type
        try:
            stage = Rehearsals(self.recipe, meta_model(self.recipe, need.base.config, kind, need.base.tokenizer), kind)
            stage.packed = need.packed
            self.rehearsed = Rehearsed(stage, need, self.room(need.base.device))
            self.chosen = self.rehearsed.choice()
            number = stage.num_layers if self.chosen is None else self.chosen
            return Choice(number, tuple(self.lines(kind)), self.rehearsed.memory(number).reserved_bytes)
        except Exception as error:  # a model's own code on shapes alone may raise what it likes, and still train
            self.rehearsed = None
            what = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            of = len(checkpointing_layers(need.base.model))
            number = of if kind == "cuda" else 0
            return Choice(number, (f"memory   not planned, {words(number, of)}: {what.strip().partition(chr(10))[0]}",))

    def lines(self, kind: str) -> Iterator[str]:
        """The plan in a line, and one more with advice where it does not fit."""
        assert self.rehearsed is not None
        of = self.rehearsed.stage.num_layers
        number = of if self.chosen is None else self.chosen
        planned = self.rehearsed.memory(number).reserved_bytes
        room = readable_bytes(self.rehearsed.bytes)
        yield f"memory   planned peak {readable_bytes(planned)} of {room}, {words(number, of)}"
        if self.chosen is None:
            then = "it may run out of memory" if kind == "cuda" else "it may be slow or be killed"
            found = list(advice(self.recipe, self.rehearsed))
            what = f"these would make it fit, each alone: {'; '.join(found)}" if found else "no single key would do"
            yield f"warning  that is too tight, {then}; {what}"

    def correct(self, seen: Seen) -> Choice | None:
        """Holds what the first step took against a rehearsal of the same shape, and chooses anew with the difference.

        The same model and the same kernels take what they take by the same rules, so the share holds for others.
        """
        rehearsed = self.rehearsed
        if rehearsed is None:
            return None
        try:
            memory = rehearsed.stage.memory(seen.rows, seen.length, seen.number)
        except Exception:  # as in `choose`
            return None
        planned = memory.peak.num_bytes - there(memory)
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # of several processes none can go back
        rehearsed.share = max(LEAST_SHARE if alone else 1.0, seen.taken_bytes / planned)
        found, of = rehearsed.choice(), rehearsed.stage.num_layers
        number = of if found is None else found
        if number == seen.number:
            return None
        share = f"the first step took {seen.taken_bytes / planned:.0%} of what was planned for it"
        return Choice(number, (f"memory   {share}: {words(number, of)} from here on",))

    def spare(self, need: Need, number: int) -> int:
        """Bytes beside a step with `number` layers recomputed, which weights may be kept in; 0 where nothing is known.

        From then on they count as taken.
        """
        if self.rehearsed is None:
            self.choose(need)  # where the recipe says how many layers, nobody asked before
        if self.rehearsed is None:
            return 0
        left = max(0, self.rehearsed.bytes - self.rehearsed.needed(number))
        self.rehearsed.kept_bytes = min(left, all_weights_bytes(need.base.model, need.base.compute_dtype))
        return left


def there(memory: Memory) -> int:
    """Bytes that stay between steps: weights, adapter and the optimizer's state on the device."""
    return sum(memory.peak.by_kind[kind] for kind in ("weights", "adapter", "optimizer"))


def advice(recipe: Recipe, rehearsed: Rehearsed) -> Iterator[str]:
    """Keys with the values that make it fit, each alone, with all layers recomputed."""
    stage, need = rehearsed.stage, rehearsed.need
    memory = rehearsed.memory(stage.num_layers)
    budget = rehearsed.bytes + memory.num_bytes - rehearsed.needed(stage.num_layers)  # as the plan counts
    rows = fits = 0
    if need.rows > 1:
        rows = largest_within(lambda n: stage.memory(n, need.length).num_bytes, budget, need.rows - 1)
    if steps := (need.length - 1) // LENGTH_STEP:
        fits = largest_within(lambda n: stage.memory(need.rows, n * LENGTH_STEP).num_bytes, budget, steps)
    found = Plan(memory, Disk(0, 0, 0), None, None, budget, rows, fits * LENGTH_STEP)
    for change in changes(recipe, need.base.config, stage, found, need.length):
        yield f"{change.key}: {change.value} ({readable_bytes(change.num_bytes - memory.context_bytes)})"


def fewest_within(needed: Callable[[int], int], budget: int, most: int) -> int | None:
    """The fewest from 0 to `most` with needed(number) <= budget, where what is needed never rises; None: none.

    Every answer was asked for. Each layer saves much the same until the peak is elsewhere, so where a line through two
    numbers that are too few meets the budget is the answer, or near it. A few too many come back at worst.
    """
    known = {0: needed(0)}
    low, high = 0, 0 if known[0] <= budget else most + 1
    while high - low > 1 and (len(known) < MOST_REHEARSALS or high > most):
        before = max((number for number in known if number < low), default=low)
        through = (low, high) if high in known else (before, low)
        fall = known[through[0]] - known[through[1]]
        at = max(1, most // 4) if low == 0 and high > most else most
        if fall > 0:
            start, end = through
            at = start + math.ceil((known[start] - budget) * (end - start) / fall)
        last = len(known) == MOST_REHEARSALS - 1 and high > most
        at = most if last else min(max(at, low + 1), high - 1)
        known[at] = needed(at)
        low, high = (at, high) if known[at] > budget else (low, at)
    return high if high <= most else None
