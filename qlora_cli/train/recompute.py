"""How a run uses memory: layers that are recomputed, what these were given on the host, weights kept dequantised.

How many is chosen before the run, corrected after its first step, and changed where memory runs out. Nothing of it
changes a bit of what is learned, so it is no part of a checkpoint, and a step that ran out is just repeated.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qlora_cli.kernels.host_stack import HostStack
from qlora_cli.model.base import Base, readable_bytes
from qlora_cli.model.kept_weights import drop_weights, keep_weights
from qlora_cli.model.placement import LESS_THAN_THE_MODEL
from qlora_cli.model.recompute import checkpointing_layers, recompute
from qlora_cli.recipe.schema import Training
from qlora_cli.tasks.table import AnyBatch
from qlora_cli.train.step import random_state, restore_random_state

Say = Callable[[str], None]


@dataclass(frozen=True)
class Need:
    """A run's largest micro-batch: rows of so many tokens at most, one behind the other (`packed`) or padded."""

    base: Base
    rows: int
    length: int
    packed: bool


@dataclass(frozen=True)
class Seen:
    """What a step took: `taken_bytes` at its peak beside what was there before, for a largest micro-batch of `rows` of
    `length` tokens with the first `number` layers recomputed."""

    rows: int
    length: int
    number: int
    taken_bytes: int


@dataclass(frozen=True)
class Choice:
    """How many layers to recompute, from the first on, lines that say so, and the peak that was planned for it."""

    number: int
    lines: tuple[str, ...] = ()
    planned_bytes: int | None = None


class Planner(Protocol):
    """Who knows how many layers a run has to recompute. It may draw from the generators, which are put back."""

    def choose(self, need: Need) -> Choice:
        """Before the first step."""

    def correct(self, seen: Seen) -> Choice | None:
        """After the first step on a GPU; None where the choice stands."""

    def spare(self, need: Need, number: int) -> int:
        """Bytes of weights that can be kept beside a step with the first `number` layers recomputed."""


@dataclass
class Recomputing:
    """The first `number` of `of` layers are recomputed. may_grow: more of them, where memory runs out.

    planner: who chose, as long as it is to be told what the first step takes. stack: has what these layers were given.
    keeps: whether weights are kept dequantised. planned_bytes: the peak planned before the first step, if it was.
    """

    model: Any
    number: int
    of: int
    may_grow: bool = False
    planner: Planner | None = None
    stack: HostStack | None = None
    keeps: bool = False
    planned_bytes: int | None = None

    def change(self, number: int) -> None:
        """From the next forward pass on."""
        recompute(self.model, number, self.stack)
        self.number = number

    @property
    def words(self) -> str:
        """As in `layers 0 to 11 of 32 recomputed`."""
        return words(self.number, self.of) + (" and weights kept dequantised" if self.keeps else "")

    @property
    def has_more(self) -> bool:
        """Whether there is a way to need less memory."""
        return self.keeps or (self.may_grow and self.number < self.of)


def words(number: int, of: int) -> str:
    """How many layers are recomputed."""
    if number == 0:
        return "no layer recomputed"
    if number >= of:
        return f"all {of} layers recomputed" if of > 1 else "every layer recomputed"
    return f"layer{'s 0 to' if number > 1 else ''} {number - 1} of {of} recomputed"


def begin(training: Training, need: Need, planner: Planner | None, say: Say) -> Recomputing:
    """Sets the recipe's recomputation: of all layers, of none, or for `auto` of as many as the planner says.

    Where nobody plans, or a model has no layers to choose from, `auto` is all on a GPU and none on a CPU; it is all
    where training.memory is to be less than the model. For `fast` weights are kept as far as the planner finds room.
    """
    model, on_gpu = need.base.model, need.base.device.type == "cuda"
    of = len(checkpointing_layers(model))
    wanted, less = training.gradient_checkpointing, training.memory in LESS_THAN_THE_MODEL
    wanted = True if wanted == "auto" and less else wanted
    asked = planner if wanted == "auto" and of else None
    everything = wanted is True or (wanted == "auto" and on_gpu)
    choice = Choice(max(1, of) if everything else 0)
    if asked is not None:
        state = random_state()
        choice = asked.choose(need)
        restore_random_state(state)
        for line in choice.lines:
            say(line)
    stack = HostStack(need.base.device) if less and on_gpu else None
    found = Recomputing(model, 0, max(1, of), wanted == "auto", asked if on_gpu else None, stack)
    found.planned_bytes = choice.planned_bytes
    found.change(choice.number)
    if less and not on_gpu:
        say(f"memory   {training.memory} moves nothing on a CPU, whose memory is the host's; {found.words}")
    if training.memory == "fast":
        keep(found, need, planner, say)
    return found


def keep(recomputing: Recomputing, need: Need, planner: Planner | None, say: Say) -> None:
    """Keeps weights dequantised as far as there is room; all of them where nobody plans."""
    state = random_state()
    most = None if planner is None else planner.spare(need, recomputing.number)
    restore_random_state(state)
    kept = keep_weights(need.base.model, need.base.compute_dtype, most)
    recomputing.keeps = kept.number > 0
    if kept.of:
        say(f"memory   {kept.words}, {readable_bytes(kept.num_bytes)} beside the rest")
    else:
        dtype = str(need.base.compute_dtype).removeprefix("torch.")
        say(f"memory   fast keeps nothing: no layer with an adapter is dequantised by us into {dtype}")


def grow(recomputing: Recomputing, again: bool) -> bool:
    """Needs less after memory ran out; whether more layers are recomputed for it.

    First no weight is kept. Then it is halfway to all layers, and if it ran out `again` in the same step, all.
    """
    recomputing.planner = None  # it has been corrected by this
    if recomputing.keeps:
        recomputing.keeps = False
        drop_weights(recomputing.model)
        return False
    number, of = recomputing.number, recomputing.of
    recomputing.change(of if again else (number + of + 1) // 2)
    return True


def ran_out(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def forget_step(optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """Puts things back as they were before a step that ran out of memory: no gradients, the generators at `state`."""
    optimizer.zero_grad()
    give_back_memory()
    restore_random_state(state)


def give_back_memory() -> None:
    """Frees what a failed pass leaves in cycles, on the device too."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def start_measuring(device: torch.device) -> int:
    """Bytes that are there before a step, whose peak counts from here on."""
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def correct(recomputing: Recomputing, batches: Iterable[AnyBatch], taken_bytes: int, say: Say) -> None:
    """Tells the planner what the first step took, and does what it says. batches: those of the step."""
    planner, recomputing.planner = recomputing.planner, None
    shapes = [shape_of(batch) for batch in batches]
    if planner is None or not shapes:  # a process without a row in a short window
        return
    rows, length = max(shapes, key=lambda shape: shape[0] * shape[1])
    state = random_state()
    choice = planner.correct(Seen(rows, length, recomputing.number, taken_bytes))
    restore_random_state(state)
    if choice is not None:
        recomputing.change(choice.number)
        for line in choice.lines:
            say(line)


def shape_of(batch: AnyBatch) -> tuple[int, int]:
    """Rows of a batch, packed ones counted as one, and tokens of each, an encoder's and a decoder's together."""
    rows, length = batch.input_ids.shape
    target = getattr(batch, "decoder_input_ids", None)
    return rows, length + (0 if target is None else target.shape[1])
