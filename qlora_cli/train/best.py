"""Which evaluation was the best so far, its adapter on disk, and when to stop early."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.model.base import Base
from qlora_cli.model.whole_folder import MANIFEST, fault, publish
from qlora_cli.recipe import Recipe
from qlora_cli.train.publish import publish_adapter


@dataclass(frozen=True)
class Best:
    """The best evaluation so far by `metric`: its value and step; misses: evaluations since without a better one."""

    metric: str
    value: float
    step: int
    misses: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)


def judged(this: Best, best: Best | None, lower_is_better: bool) -> Best:
    """The better evaluation of the two; an equal one is no better, and one that is no number never is.

    this: the one just made. best: the best one before it; one by another metric does not count.
    """
    if best is None or best.metric != this.metric:
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
        raise UserError(place, reason, f"copy checkpoints/step-{best.step:06d} from a backup, or train anew")
    ignore = shutil.ignore_patterns(MANIFEST)
    publish(adapter, lambda aside: shutil.copytree(place, aside, ignore=ignore, dirs_exist_ok=True))
