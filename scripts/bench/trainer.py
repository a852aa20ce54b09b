"""What TRL, Unsloth and axolotl share: a transformers Trainer that waits for the runner between its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from channel import Channel, Seen, seen_in
from transformers import TrainerCallback


class Waiting(TrainerCallback):
    """Blocks before every optimizer step until one is due; `batches` are those of the step in hand."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.batches: list[tuple[Any, dict[str, Any]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.channel.wait()
        self.batches = []

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        losses, inputs = zip(*self.batches, strict=True)
        self.channel.record(sum(losses), lambda: _sum([seen_in(**one) for one in inputs]))


def _sum(seen: list[Seen]) -> Seen:
    return Seen(*(sum(values) for values in zip(*seen, strict=True)))


def obey(trainer: Any, channel: Channel) -> Waiting:
    """Makes the trainer obey: a callback that is to be added, and its training step with a look at its batches."""
    waiting = Waiting(channel)
    plain: Callable[..., Any] = trainer.training_step

    def watched(model: Any, inputs: dict[str, Any], *others: Any, **named: Any) -> Any:
        kept = {name: inputs.get(name) for name in ("input_ids", "labels", "attention_mask")}
        loss = plain(model, inputs, *others, **named)
        waiting.batches.append((loss, kept))
        return loss

    trainer.training_step = watched
    return waiting
