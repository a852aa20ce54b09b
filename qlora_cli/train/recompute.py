"""How many layers a run recomputes: chosen before it, corrected after its first step, raised where memory runs out.

No number changes a bit of what is learned, so none is part of a checkpoint, and a step that ran out is just repeated.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from qlora_cli.model.base import Base
from qlora_cli.model.recompute import checkpointing_layers, recompute
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
    """How many layers to recompute, from the first on, and lines that say so."""

    number: int
    lines: tuple[str, ...] = ()


class Planner(Protocol):
    """Who knows how many layers a run has to recompute. It may draw from the generators, which are put back."""

    def choose(self, need: Need) -> Choice:
        """Before the first step."""

    def correct(self, seen: Seen) -> Choice | None:
        """After the first step on a GPU; None where the choice stands."""


@dataclass
class Recomputing:
    """The first `number` of `of` layers are recomputed. may_grow: more of them, where memory runs out.

    planner: who chose, as long as it is to be told what the first step takes.
    """

    model: Any
    number: int
    of: int
    may_grow: bool = False
    planner: Planner | None = None

    def change(self, number: int) -> None:
        """From the next forward pass on."""
        recompute(self.model, number)
        self.number = number

    @property
    def words(self) -> str:
        """As in `layers 0 to 11 of 32 recomputed`."""
        return words(self.number, self.of)


def words(number: int, of: int) -> str:
    """How many layers are recomputed."""
    if number == 0:
        return "no layer recomputed"
    if number >= of:
        return f"all {of} layers recomputed" if of > 1 else "every layer recomputed"
    return f"layer{'s 0 to' if number > 1 else ''} {number - 1} of {of} recomputed"


def begin(wanted: Literal["auto"] | bool, need: Need, planner: Planner | None, say: Say) -> Recomputing:
    """Sets the recipe's recomputation: of all layers, of none, or for `auto` of as many as the planner says.

    Where nobody plans, or a model has no layers to choose from, `auto` is all on a GPU and none on a CPU.
    """
    model, on_gpu = need.base.model, need.base.device.type == "cuda"
    of = len(checkpointing_layers(model))
    asked = planner if wanted == "auto" and of else None
    everything = wanted is True or (wanted == "auto" and on_gpu)
    choice = Choice(max(1, of) if everything else 0)
    if asked is not None:
        state = random_state()
        choice = asked.choose(need)
        restore_random_state(state)
        for line in choice.lines:
            say(line)
    found = Recomputing(model, 0, max(1, of), wanted == "auto", asked if on_gpu else None)
    found.change(choice.number)
    return found


def grow(recomputing: Recomputing, again: bool) -> None:
    """More layers after memory ran out: halfway to all of them, and if it ran out `again` in the same step, all."""
    number, of, recomputing.planner = recomputing.number, recomputing.of, None  # it has been corrected by this
    recomputing.change(of if again else (number + of + 1) // 2)


def ran_out(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def forget_step(optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """Puts things back as they were before a step that ran out of memory: no gradients, the generators at `state`."""
    optimizer.zero_grad()
    gc.collect()  # what a failed pass leaves in cycles
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    restore_random_state(state)


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
