"""A training step rehearsed: the real forward and backward pass over shapes alone, and what it holds at its peak."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.kernels.host_stack import HostStack
from qlora_cli.kernels.packed_attention import use_packed_attention
from qlora_cli.model.base import quiet_loading
from qlora_cli.model.placement import LESS_THAN_THE_MODEL
from qlora_cli.model.recompute import checkpointing_layers, recompute
from qlora_cli.plan.ledger import Event, Ledger
from qlora_cli.plan.meta_base import MetaModel, meta_model, stored_tensors
from qlora_cli.plan.operators import know_libraries
from qlora_cli.plan.stand_in import replaced, standing_in
from qlora_cli.recipe import Recipe
from qlora_cli.tasks.table import AnyBatch, collated
from qlora_cli.train.step import accumulate, clip

KINDS = ("weights", "adapter", "optimizer", "gradients", "activations", "temporary")
"""What memory is held for, in the order of a table."""


@dataclass(frozen=True)
class Shape:
    """One micro-batch. lengths: tokens of its rows. packed: one behind the other, without padding.

    trained: the share of each row, at its end, whose tokens are trained.
    """

    lengths: tuple[int, ...]
    packed: bool = False
    trained: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Cells of the batch, padding among them."""
        return sum(self.lengths) if self.packed else max(self.lengths) * len(self.lengths)


@dataclass(frozen=True)
class Peak:
    """The moment at which a step holds most. by_kind: bytes by KINDS. phase and place: what it does then, and where.

    there: bytes of each storage that is there before the step. events: what it takes and gives back, in order.
    host_bytes: what recomputed layers were given, where it lies in host memory.
    """

    by_kind: dict[str, int]
    phase: str
    place: str
    shape: Shape
    there: Sequence[int] = ()
    events: Sequence[Event] = ()
    host_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """All that is held at once."""
        return sum(self.by_kind.values())

    @property
    def where(self) -> str:
        """In words: `backward of layer 17`."""
        return f"{self.phase} of {self.place}" if self.phase != "recomputing" else f"recomputing {self.place}"


def rehearse(recipe: Recipe, config: Any, shape: Shape, kind: str, checkpointed: int | None = None) -> Peak:
    """The peak of one training step on a device of `kind` ("cpu" or "cuda"), from the recipe and the model's config.

    checkpointed: layers, from the first on, whose activations are recomputed; None: as the recipe says. The optimizer's
    state is the caller's to add. Raises UserError for a base that cannot be built without its weights.
    """
    found = meta_model(recipe, config, kind)
    return rehearse_model(found, recipe, shape, kind, checkpointed)


def rehearse_model(found: MetaModel, recipe: Recipe, shape: Shape, kind: str, checkpointed: int | None = None) -> Peak:
    """As `rehearse`, of a model that is there: it may be rehearsed any number of times."""
    know_libraries()
    model, base = found.model, found.base
    if shape.packed:
        use_packed_attention(model)
    stack = HostStack(base.device) if kind == "cuda" and recipe.training.memory in LESS_THAN_THE_MODEL else None
    number = layers_checkpointed(recipe, kind, base.model) if checkpointed is None else checkpointed
    recompute(base.model, number, stack)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter) if recipe.training.gradient_accumulation_steps > 1 else None
    ledger = Ledger(kind)
    ledger.own(tensor for _, tensor in stored_tensors(model))
    ledger.own(parameter.grad for parameter in parameters if parameter.grad is not None)

    def batches() -> Iterator[AnyBatch]:
        with ledger.making_a_batch():
            batch = collated(examples_of(shape, base), shape.packed, base)
        yield batch

    with quiet_loading(), standing_in(kind), _placed(base.model, ledger), _recomputing(ledger), ledger:
        accumulate(base, model, batches(), max(1, sum(shape.lengths)))
        ledger.place = "optimizer step"
        clip(parameters, recipe.training.max_grad_norm)
    peak = replace(_peak(ledger, model, parameters, shape), host_bytes=0 if stack is None else stack.pushed_bytes)
    for parameter in parameters:
        parameter.grad = None
    return peak


def examples_of(shape: Shape, base: Any) -> list[Example]:
    """Rows of these lengths for the base's task, of a token that is neither padding nor an end."""
    config = base.config.get_text_config()
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    taken = {token for name in names for token in _listed(getattr(config, name, None))}
    token = next(index for index in range(len(taken) + 1) if index not in taken)
    end = next(iter(_listed(getattr(config, "eos_token_id", None))), None)
    targets = {"sequence_classification": (0,), "question_answering": (0, 0)}.get(base.task, ())
    examples = []
    for length in shape.lengths:
        ids = [token] * length
        if end is not None and targets:
            ids[-1] = end
        learned = min(length, round(length * shape.trained))
        source = length // 2 if base.task == "seq2seq_lm" else length - learned
        labels = [IGNORE_INDEX] * source + ids[source:]
        examples.append(Example(ids, labels, "", targets))
    return examples


def _listed(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


# ── checkpointing ────────────────────────────────────────────────────────────────────────────────────────────────────


def layers_checkpointed(recipe: Recipe, kind: str, model: Any) -> int:
    """How many layers the recipe recomputes, from the first on."""
    wanted, less = recipe.training.gradient_checkpointing, recipe.training.memory in LESS_THAN_THE_MODEL
    every = wanted is True or (wanted == "auto" and (kind == "cuda" or less))
    return len(checkpointing_layers(model)) if every else 0


@contextmanager
def _recomputing(ledger: Ledger) -> Iterator[None]:
    """Tells the ledger when a checkpointed layer is computed again; where torch has it otherwise, nobody does."""
    module: Any = torch.utils.checkpoint
    hook = getattr(module, "_recomputation_hook", None)
    if hook is None:
        yield
        return

    class Told(hook):  # type: ignore[misc, valid-type]
        def __enter__(self) -> Any:
            ledger.recomputing = True
            return super().__enter__()

        def __exit__(self, *args: Any) -> Any:
            ledger.recomputing = False
            return super().__exit__(*args)

    with replaced(module, "_recomputation_hook", Told):
        yield


# ── where the step is ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _placed(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Keeps the ledger told which layer runs, forward and backward."""
    layers = named_layers(model)
    handles = []
    for index, (name, layer) in enumerate(layers):
        behind = "the head" if index == len(layers) - 1 else name
        handles.append(layer.register_forward_pre_hook(_enter(ledger, name), with_kwargs=True))
        handles.append(layer.register_forward_hook(_leave(ledger, name, behind)))
    ledger.place = "the embedding"
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(ledger: Ledger, name: str) -> Any:
    def enter(*_: Any) -> None:
        ledger.place = name

    return enter


def _leave(ledger: Ledger, name: str, behind: str) -> Any:
    def back(gradient: Any) -> None:
        ledger.place = name

    def leave(module: Any, inputs: Any, output: Any) -> None:
        ledger.place = behind
        first = output[0] if isinstance(output, tuple | list) else output
        if isinstance(first, torch.Tensor) and first.requires_grad:
            first.register_hook(back)

    return leave


def named_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost repeated layers by the words for them: `layer 17`, or `encoder layer 3`."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{path}.") for path in found):
            found |= {f"{name}.{index}": layer for index, layer in enumerate(module)}
    words = []
    for path in found:
        part = re.search(r"(encoder|decoder)\.", path)
        words.append((f"{part[1]} " if part else "") + f"layer {path.rpartition('.')[2]}")
    return list(zip(words, found.values(), strict=True))


# ── the peak ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _peak(ledger: Ledger, model: Any, parameters: Sequence[Any], shape: Shape) -> Peak:
    """The first moment at which most is held, and for what."""
    by_kind = Counter(dict.fromkeys(KINDS, 0))
    there = []
    for kind, tensor in stored_tensors(model):
        there.append(tensor.untyped_storage().nbytes())
        by_kind[kind] += there[-1]
    gradients = {storage._cdata for parameter in parameters if (storage := _gradient(parameter)) is not None}
    kept = {ledger.numbers[key] for key in gradients if key in ledger.numbers}
    before = [storage for parameter in parameters if (storage := _gradient(parameter)) is not None]
    before = [storage for storage in before if storage._cdata not in ledger.numbers]
    there += [storage.nbytes() for storage in before]
    by_kind["gradients"] += sum(storage.nbytes() for storage in before)
    held = most = 0
    at = -1
    for index, event in enumerate(ledger.events):
        held += event.num_bytes
        if held > most:
            most, at = held, index
    freed = {event.number: event for event in ledger.events if event.num_bytes < 0}
    alive: dict[int, Event] = {}
    for event in ledger.events[: at + 1]:
        if event.num_bytes < 0:
            alive.pop(event.number, None)
        else:
            alive[event.number] = event
    for number, event in alive.items():
        by_kind["gradients" if number in kept else _kind(event, freed.get(number))] += event.num_bytes
    event = ledger.events[at]
    return Peak(dict(by_kind), event.phase, event.place, shape, there, ledger.events)


def _gradient(parameter: Any) -> Any:
    return None if parameter.grad is None else parameter.grad.untyped_storage()


def _kind(taken: Event, freed: Event | None) -> str:
    """Activations are what a forward pass, or its repetition, leaves for another phase."""
    if taken.phase != "backward" and (freed is None or freed.turn != taken.turn):
        return "activations"
    return "temporary"
