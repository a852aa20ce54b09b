"""This package: its own session and its own optimizer step, over its own windows."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # as early as the others import it: modules are no memory above the weights
from cases import Case
from channel import Channel, Seen, checksum

from qlora_cli.display import QuietReport
from qlora_cli.recipe import Recipe
from qlora_cli.train.loop import log_metrics, own_batches, take_step
from qlora_cli.train.run import claim, locked
from qlora_cli.train.session import Session, prepare


class Marking(QuietReport):
    """Notes when the base is loaded, from the line that says so, and the last logged loss."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.loss = float("nan")

    def say(self, text: str) -> None:
        if text.startswith("base "):
            self.channel.weights_loaded()

    def metrics(self, values: dict[str, Any]) -> None:
        self.loss = values["loss"]


def recipe_of(case: Case, memory: str = "auto") -> Recipe:
    """The case as a user would write it: packing and the rest as they are by default, where the case says nothing."""
    source = {"path": str(case.texts)} if case.data else {"path": str(case.texts), "format": "text"}
    rows: dict[str, Any] = {"train": [source], "max_length": case.length}
    rows |= {"packing": True, "on_long_row": "skip"} if case.data else {}
    length = {"epochs": float(case.needed_steps)} if case.data else {"max_steps": case.needed_steps}
    training = {
        "micro_batch_size": case.packed_rows if case.data else case.rows_per_step,
        "gradient_accumulation_steps": 1,
        "learning_rate": case.learning_rate,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "optimizer": "adamw",
        "gradient_checkpointing": case.recompute,
        "memory": memory,
        "seed": case.seed,
        **length,
    }
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(case.model)},
            "quantization": {"compute_dtype": case.compute},
            "adapter": {"r": 16, "alpha": 32, "dropout": 0.0},
            "data": rows,
            "training": training,
            "output_dir": str(Path(case.folder) / f"run-{os.getpid()}"),
        }
    )


def run(case: Case, channel: Channel, memory: str = "auto") -> None:
    """Trains as `qlora train` does, from the recipe on; evaluation and checkpoints, which are not due, are left out.

    Metrics are logged with the last step of every command, on the clock: at least as often as in a run.
    """
    recipe, report = recipe_of(case, memory), Marking(channel)
    with locked(Path(recipe.output_dir)) as folder:
        claim(folder, recipe, b"")
        session = prepare(recipe, folder, report, "never")
        if case.data:
            order = session.feed.order  # type: ignore[attr-defined]
            channel.facts["steps_of_pass"] = [order.steps_of(epoch) for epoch in range(case.total_steps)]
        for window, _ in session.feed.windows(session.total_steps, 0, None):
            channel.wait()
            take_step(session, window, lambda: None)
            if channel.due == 1:
                log_metrics(session, window)
            channel.record(lambda: report.loss, counted(session, window))


fast, offload, lean = (partial(run, memory=value) for value in ("fast", "offload", "lean"))


def counted(session: Session, window: Any) -> Any:
    """Counts the window's tokens when asked: its batches are made once more for that, off the clock."""

    def seen() -> Seen:
        padded = sum(batch.input_ids.numel() for batch in own_batches(session, window))
        rows = checksum(row.input_ids for row in window.rows)
        return Seen(sum(row.num_trained for row in window.rows), padded, rows)

    return seen
