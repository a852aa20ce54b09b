"""Which evaluation was the best so far, its adapter on disk, and when to stop early."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlora_cli.errors import Exit, UserError
from qlora_cli.model.base import Base
from qlora_cli.model.whole_folder import MANIFEST, fault, publish
from qlora_cli.recipe import Recipe
from qlora_cli.train.publish import publish_adapter


@dataclass(frozen=True)
class Best:
    """The best evaluation so far by `metric`: its value and step; misses: evaluations since without a better one.

    measured: digest of the rows behind the metric: values of other rows are not compared.
    """

    metric: str
    value: float
    step: int
    misses: int = 0
    measured: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)


def judged(this: Best, best: Best | None, lower_is_better: bool) -> Best:
    """The better evaluation of the two; an equal one is no better, and one that is no number never is.

    this: the one just made. best: the best one before it, by the same metric over the same rows.
    """
    if best is None:
        return this
    sign = -1 if lower_is_better else 1
    better = math.isfinite(this.value) and (not math.isfinite(best.value) or sign * this.value > sign * best.value)
    return this if better else replace(best, misses=best.misses + 1)


def folder_of(folder: Path, step: int) -> Path:
    """Where the best adapter of a step lies."""
    return folder / f"step-{step:06d}"


def keep_best(folder: Path, model: Any, base: Base, recipe: Recipe, step: int) -> None:
    """Writes the adapter as it stands into `folder`; earlier ones stay until a checkpoint knows of this one."""
    place = folder_of(folder, step)
    shutil.rmtree(place, ignore_errors=True)  # of this very step, before the run was killed
    publish_adapter(place, model, base, recipe, step)


def restored(folder: Path, checkpoint: Path, best: Best, metric: str | None, measured: str) -> tuple[Best | None, str]:
    """The best evaluation that a checkpoint names, its adapter beside it, or None, and why it does not count.

    folder: best/ of the run that goes on, into which the adapter comes where the checkpoint is of another run.
    """
    if best.metric != metric or best.measured != measured:
        return None, "is by another metric, or of other rows"
    place, theirs = (folder_of(one, best.step) for one in (folder, checkpoint.parent.parent / "best"))
    if not fault(place):
        return best, ""
    if fault(theirs):
        return None, f"has no adapter any more: {place}"
    copy_folder(theirs, place)
    return best, ""


def copy_folder(source: Path, folder: Path) -> None:
    """Makes a copy of a whole folder appear, whole or not at all."""
    shutil.rmtree(folder, ignore_errors=True)  # damaged
    ignore = shutil.ignore_patterns(MANIFEST)
    publish(folder, lambda aside: shutil.copytree(source, aside, ignore=ignore, dirs_exist_ok=True))


def prune_best(folder: Path, best: Best | None) -> None:
    """Deletes all but the best adapter, which the newest checkpoint names."""
    if best is None:
        return
    for place in folder.glob("step-*"):
        if place != folder_of(folder, best.step):
            shutil.rmtree(place)


def publish_best(adapter: Path, folder: Path, best: Best) -> None:
    """Makes the best adapter the run's result. Raises UserError where it is damaged or gone."""
    place = folder_of(folder, best.step)
    if reason := fault(place):
        raise UserError(place, reason, "bring the folder back from a backup, or train anew", Exit.FAILED)
    copy_folder(place, adapter)
