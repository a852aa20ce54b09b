"""Every storage that a step takes and gives back, in order: the memory of a step that nobody has to own.

Floats are on `meta`; integers and booleans of the batch are real, so that shapes which depend on their values, such as
those of the trained tokens, are the true ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_cli.plan.operators import SPECIAL, TEMPORARIES, places, promoted, shape_alone
from qlora_cli.plan.stand_in import STAGE

REAL_BYTES, NEW_BYTES = 64 << 20, 1 << 20
"""The largest integer or boolean tensor that is computed, and that a model makes from nothing, as positions are; larger
ones, as masks of attention and dropout, are shapes alone, as floats are."""


class Event(NamedTuple):
    """A storage taken (or, with the same number again, given back), and where the step was."""

    number: int
    num_bytes: int  # negative when given back
    phase: str  # forward, recomputing or backward
    place: str
    turn: int  # changes of the phase before


class Ledger(TorchDispatchMode):
    """Runs operators on shapes alone and writes down each storage as it comes and goes.

    events: in order. place, recomputing: set from outside. numbers: of the storages that are there, by their address.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.events: list[Event] = []
        self.place, self.recomputing = "", False
        self.turn, self.last_phase = 0, "forward"
        self.new_bytes = NEW_BYTES
        self.live: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and each of many thousand calls is shorter without the question."""
        return False

    @contextmanager
    def making_a_batch(self) -> Iterator[None]:
        """Inside the block whatever is made from nothing is real, since shapes depend on it."""
        self.new_bytes = REAL_BYTES
        try:
            yield
        finally:
            self.new_bytes = NEW_BYTES

    def own(self, tensors: Any) -> None:
        """Leaves the storages of these tensors out: they are there before the step."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.live[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = SPECIAL.get(func)
        STAGE.is_on = False
        try:
            found = special(self, func, args, kwargs) if special else self.run(func, args, kwargs)
        finally:
            STAGE.is_on = True
        if isinstance(found, Tensor):
            self.note(found)
        elif isinstance(found, tuple | list):
            for one in found:
                if isinstance(one, Tensor):
                    self.note(one)
        if func in TEMPORARIES:
            self.passing(TEMPORARIES[func](self.kind, args, kwargs))
        elif self.kind == "cpu" and isinstance(found, Tensor) and torch.Tag.pointwise in func.tags:
            self.passing(promoted(found, args))
        return found

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator on meta where any input is there, else for real; floats that come out are on meta."""
        meta, real = places(args, kwargs)
        if not meta:
            if not real and "device" in kwargs:
                kwargs = {**kwargs, "device": _device_of_new(func, args, kwargs, self.new_bytes)}
            return _map(_lightened, func(*args, **kwargs)) if real else func(*args, **kwargs)
        if real:
            args, kwargs = _map(shape_alone, args), {key: _map(shape_alone, one) for key, one in kwargs.items()}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)

    def note(self, tensor: Tensor) -> None:
        """Writes down the tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        num_bytes = storage.nbytes()
        number = self.numbers[key] = len(self.events)
        self._write(number, num_bytes)
        self.live[key] = weakref.ref(storage, partial(self._gone, key, number, num_bytes))

    @property
    def phase(self) -> str:
        """What the step does."""
        if self.recomputing:
            return "recomputing"
        return "forward" if torch._C._current_graph_task_id() == -1 else "backward"

    def _gone(self, key: int, number: int, num_bytes: int, _: Any) -> None:
        del self.live[key], self.numbers[key]
        self._write(number, -num_bytes)

    def _write(self, number: int, num_bytes: int) -> None:
        phase = self.phase
        if phase != self.last_phase:
            self.turn, self.last_phase = self.turn + 1, phase
        self.events.append(Event(number, num_bytes, phase, self.place, self.turn))

    def passing(self, num_bytes: int) -> None:
        """Memory that a kernel takes and gives back within itself; called when its outputs are there."""
        if num_bytes:
            number = len(self.events)
            self._write(number, num_bytes)
            self._write(number, -num_bytes)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_map(change, one) for one in value)
    return value


def _lightened(tensor: Tensor) -> Tensor:
    heavy = tensor.is_floating_point() or tensor.untyped_storage().nbytes() > REAL_BYTES
    return shape_alone(tensor) if heavy else tensor


def _device_of_new(func: Any, args: Any, kwargs: Any, most: int) -> torch.device:
    """Where a tensor made from nothing lies: integers of `most` bytes for real, all else on meta."""
    dtype = kwargs.get("dtype")
    if dtype is None:
        scalars = [one for one in args if isinstance(one, bool | int | float)]
        by_values = func._schema.name in ("aten::arange", "aten::full", "aten::scalar_tensor") and bool(scalars)
        fractions = any(isinstance(one, float) for one in scalars)
        dtype = torch.int64 if by_values and not fractions else torch.get_default_dtype()
    size = args[0] if args and isinstance(args[0], list | tuple) else []
    numel = 1
    for length in size:
        numel *= length
    if dtype.is_floating_point or numel * dtype.itemsize > most:
        return torch.device("meta")
    return torch.device("cpu")
