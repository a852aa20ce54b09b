"""Which evaluation was the best so far, its adapter on disk, and when to stop early."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlora_cli.errors import UserError
from qlora_cli.evaluate.suite import LOWER_IS_BETTER
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


def judged(metric: str, figures: Mapping[str, Any], step: int, best: Best | None) -> Best:
    """The best evaluation, this one among them; an equal one is no better, and one that is no number never is."""
    value = float(figures[metric])
    known_best = best if best is not None and best.metric == metric else None
    if known_best is None:
        return Best(metric, value, step)
    sign = -1 if is_lower_better(metric) else 1
    better = math.isfinite(value) and (not math.isfinite(known_best.value) or sign * value > sign * known_best.value)
    return Best(metric, value, step) if better else replace(known_best, misses=known_best.misses + 1)


def is_lower_better(metric: str) -> bool:
    """Whether less of a figure is better."""
    return metric.rpartition(".")[2].removeprefix("eval_") in LOWER_IS_BETTER


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
