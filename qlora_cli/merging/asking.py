"""The rows that the unmerged and the merged model both read, and how a model is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qlora_cli.data.encode import Example
from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluation import say_if_another_base
from qlora_cli.merge.difference import Forward, Seen, seen
from qlora_cli.merging.trained import Trained
from qlora_cli.merging.wanted import Wanted
from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import default_device, fingerprint, load_base
from qlora_cli.tasks.table import TASKS, loss_sum
from qlora_cli.train.reading import encode_role
from qlora_cli.train.report import Report
from qlora_cli.train.run import date_of

MOST_ROWS, MOST_TOKENS = 64, 8192
"""Rows and tokens that both models read for a certificate, unless a number of rows is asked for."""


MOST_BYTES = 1 << 29
"""Logits of the unmerged model that are kept while the merged one is made: 1,000 positions of 128,000 tokens."""


AT_ONCE = 1024
"""Tokens of a forward pass: few enough for all their logits, many for a model that is read from the disk each time."""


@dataclass(frozen=True)
class Unmerged:
    """What stays of the unmerged model once it has left the memory. batches: the rows that it read, some at a time."""

    same_base: bool
    batches: list[Any]
    rows: tuple[int, str]  # their number, and the role of the recipe that they are of
    said: Seen


def measure_unmerged(trained: Trained, report: Report, wanted: Wanted) -> Unmerged:
    """What base + adapter says of held-out rows, or of training rows where there are none.

    Raises UserError (exit 3) where the base is not the one that was trained on, unless that was asked for.
    """
    recipe, found = trained.recipe, trained.found
    data: Literal["train", "eval"] = "eval" if recipe.data.eval or recipe.data.eval_fraction else "train"
    examples = encode_role(recipe, found, data, report, date_of(trained.run))
    base = load_base(trained.on_base, default_device(), found)
    same_base = say_if_another_base(trained.run, fingerprint(base.model), report)
    if not (same_base or wanted.other_base):
        what = "is not the base that the adapter was trained on: its weights, config or data type differ"
        raise UserError(found.folder, what, "bring that one back, or go on with --other-base", Exit.REFUSED)
    rows = chosen_rows(examples.rows, wanted.rows)
    batches = [TASKS[base.task].collate(some, base) for some in portions(rows)]
    model = load_adapter(base, trained.run.adapter)
    with base.compute():
        said = seen(model, batches, forward_on(base.task, base.device), MOST_BYTES)
    return Unmerged(same_base, batches, (len(rows), data), said)


def chosen_rows(rows: Sequence[Example], wanted: int | None) -> list[Example]:
    """Rows evenly spread over all; without a wanted number as many as MOST_ROWS and MOST_TOKENS allow, one at least."""
    number = min(wanted or MOST_ROWS, len(rows))
    chosen: list[Example] = []
    left = MOST_TOKENS
    for at in range(number):
        row = rows[at * len(rows) // number]
        left -= row.num_tokens
        if wanted is None and chosen and left < 0:
            break
        chosen.append(row)
    return chosen


def portions(rows: Sequence[Example]) -> list[list[Example]]:
    """The rows by length, as many at once as are AT_ONCE tokens with their padding, one at least."""
    found: list[list[Example]] = []
    for row in sorted(rows, key=lambda row: row.num_tokens, reverse=True):  # the first of a portion is its longest
        if found and (len(found[-1]) + 1) * found[-1][0].num_tokens <= AT_ONCE:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def forward_on(task: str, device: torch.device) -> Forward:
    """How a model on `device` is asked: of a causal language model for every token of a row, of others for targets."""

    def forward(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        batch = type(batch)(*(None if tensor is None else tensor.to(device) for tensor in batch))
        if task != "causal_lm":
            logits, targets = TASKS[task].outputs(model, batch)
            return logits, loss_sum(logits, targets), len(targets)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = loss_sum(logits.flatten(0, 1)[batch.predicting], batch.targets)
        return logits[batch.attention_mask.bool()], loss, len(batch.targets)

    return forward
