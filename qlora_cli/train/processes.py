"""The processes of a launch, as accelerate sees them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.start import changes_base
from qlora_cli.recipe import Recipe
from qlora_cli.train.run import Run

START_TIME = timedelta(hours=12)
"""So long the other processes wait while the main one makes the base of an adapter's start."""


def build_accelerator(recipe: Recipe, run: Run) -> Any:
    """accelerate's view of devices, processes and trackers.

    Raises UserError (exit 4) for a tracker that is not installed, where accelerate would only warn.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import InitProcessGroupKwargs

    installed = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if absent := [name for name in recipe.report_to if name not in installed]:
        raise UserError(
            "report_to", f"{', '.join(absent)} is not installed", "run `pip install 'qlora[track]'`", Exit.ENVIRONMENT
        )
    patience = InitProcessGroupKwargs(timeout=START_TIME) if changes_base(recipe.adapter) else None
    accelerator = Accelerator(
        log_with=list(recipe.report_to) or None,
        project_dir=str(run.folder),
        kwargs_handlers=[patience] if patience else None,
    )
    if recipe.report_to:
        sections = {name: part for name, part in recipe.model_dump(by_alias=True).items() if isinstance(part, dict)}
        flat = {f"{name}.{key}": str(value) for name, part in sections.items() for key, value in part.items()}
        accelerator.init_trackers("qlora", config=flat)
    return accelerator


def global_batch(recipe: Recipe, accelerator: Any) -> int:
    """The global batch: examples, or rows that they fill, of one optimizer step over all processes."""
    training = recipe.training
    return training.micro_batch_size * training.gradient_accumulation_steps * accelerator.num_processes
