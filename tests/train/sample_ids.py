"""The rows that every step trains, on the processes that run this: accelerate launch sample_ids.py RECIPES OUT.

RECIPES: JSON, name -> recipe and the steps to go on from; OUT: JSON, name -> start -> rows of each step, of all
processes together. A row is told by its token ids.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import gather_object

from qlora_cli.display import QuietReport
from qlora_cli.model.base import find_base
from qlora_cli.recipe import Recipe
from qlora_cli.tasks.causal_lm import PackedBatch
from qlora_cli.train.loop import own_batches
from qlora_cli.train.processes import build_accelerator, global_batch
from qlora_cli.train.reading import open_feed
from qlora_cli.train.run import Run

STEPS = 9


def rows_of(batch: Any) -> list[list[int]]:
    """The token ids of each row of a batch."""
    if isinstance(batch, PackedBatch):
        lengths = batch.cu_seqlens.diff().tolist()
        return [part.tolist() for part in batch.input_ids[0].split(lengths)]
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def steps_from(recipe: Recipe, accelerator: Any, start: int, place: Any) -> tuple[list[Any], list[Any]]:
    """The rows of each step behind `start`, sorted, and the place behind each."""
    found = find_base(recipe)
    feed = open_feed(recipe, found, QuietReport(), date(2026, 1, 1), global_batch(recipe, accelerator))
    base = SimpleNamespace(device=torch.device("cpu"), config=found.config, task=found.task)
    session: Any = SimpleNamespace(accelerator=accelerator, base=base, recipe=recipe, feed=feed, packed=False)
    steps, places = [], []
    for window, behind in feed.windows(STEPS, start, place):
        mine = [row for batch in own_batches(session, window) for row in rows_of(batch)]
        steps.append(sorted(gather_object(mine)))
        places.append(json.loads(json.dumps(behind)))
    feed.close()
    return steps, places


def main(recipes: Path, out: Path) -> None:
    """Writes what each recipe's steps train, from the beginning and from each start."""
    found = {}
    for name, (values, starts) in json.loads(recipes.read_text()).items():
        recipe = Recipe.model_validate(values, by_alias=True, by_name=False)
        accelerator = build_accelerator(recipe, Run(Path(recipe.output_dir)))
        whole, places = steps_from(recipe, accelerator, 0, None)
        found[name] = {"0": whole}
        for start in starts:
            found[name][str(start)], _ = steps_from(recipe, accelerator, start, places[start - 1])
        if accelerator.is_main_process:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
