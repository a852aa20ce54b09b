"""The learning rate as a pure function of the step, so that a resumed run has no schedule to restore."""

from __future__ import annotations

import math
from collections.abc import Callable

from qlora_cli.recipe.schema import Training

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Decay by recipe name: progress after warmup in [0, 1] to a factor from 1 down to 0."""


def warmup_steps(training: Training, total_steps: int) -> int:
    """Optimizer steps with a rising rate: warmup_steps, or warmup_ratio of the run rounded up."""
    if training.warmup_steps is not None:
        return min(training.warmup_steps, total_steps)
    return math.ceil(training.warmup_ratio * total_steps)


def lr_factor(training: Training, step: int, total_steps: int) -> float:
    """The share of learning_rate used by optimizer step `step`, counted from 0.

    Warmup rises linearly and no step has rate 0; the first step after it has the peak; from there the decay runs
    towards min_lr_ratio, which the step after the last would reach (as transformers' schedules do).
    """
    warmup = warmup_steps(training, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    decayed = SCHEDULES[training.lr_scheduler]((step - warmup) / max(total_steps - warmup, 1))
    return training.min_lr_ratio + (1.0 - training.min_lr_ratio) * decayed
