"""The arithmetic of a merge: an update added to a weight in float32, a few rows at a time, rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.errors import Exit, UserError
from qlora_cli.merge.adapter_delta import LORA_A, LORA_B, MAGNITUDE, PREFIX, Adapter, LowRank, Replacement, Rows, Update

PORTION = 1 << 17
"""Weights at once: what is made of them in float32 stays in a core's cache, and memory never holds a whole tensor.
Measured by the weight on one core: 1.8 ns, 4.5 ns with twice as many, 10 ns with all of a tensor."""


@dataclass(frozen=True)
class Fold:
    """What is done to a base tensor: an update, if it has one, and a factor of all of it."""

    name: str
    update: Update | None
    scale: float = 1.0


def folded(adapter: Adapter, fold: Fold, weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """A base tensor after the fold, in dtype and in its stored orientation: some rows of it after the other.

    weight: the base's value in any floating dtype, which stays as it is. The arithmetic is PEFT's in float32:
    W + (B @ A) * scaling; with DoRA each row of that is brought to its magnitude. Trained rows replace the weight's, or
    come behind its last. Raises UserError (exit code FAILED) where a value is not finite in dtype.
    """
    if not weight.ndim:
        yield from (piece.reshape(()) for piece in folded(adapter, fold, weight.reshape(1), dtype))
        return
    update = fold.update
    if isinstance(update, Replacement):
        weight = adapter.tensor(update.name).to(weight.device)
    low_rank = LowRankRows(adapter, update, weight.device) if isinstance(update, LowRank) else None
    trained = TrainedRows(adapter, update, weight.device) if isinstance(update, Rows) else None
    if low_rank is None and trained is None and fold.scale == 1.0 and weight.dtype == dtype:
        _refuse_beyond(weight, dtype, fold, adapter)
        yield weight
        return
    transposed = isinstance(update, LowRank) and update.transposed  # no rows of a file, so all of them at once
    rows = weight.T if transposed else weight  # (out_features, in_features), a view
    number = trained.number if trained else len(rows)
    step = max(1, PORTION // max(1, rows[:1].numel()))
    for first in range(0, number, max(1, number) if transposed else 8 * step):
        last = number if transposed else min(first + 8 * step, number)
        piece = torch.empty(
            weight.shape if transposed else (last - first, *rows.shape[1:]), dtype=dtype, device=weight.device
        )
        target = piece.T if transposed else piece
        for begin in range(first, min(last, len(rows)), step):
            end = min(begin + step, last, len(rows))
            exact = rows[begin:end].to(torch.float32, copy=True)
            if low_rank is not None:
                exact = low_rank.added(exact, slice(begin, end))
            if fold.scale != 1.0:
                exact *= fold.scale
            _refuse_beyond(exact, dtype, fold, adapter)
            target[begin - first : end - first] = exact
        if trained is not None:
            trained.put(piece, first, fold, adapter)
        yield piece


class TrainedRows:
    """Rows that were trained in full, in float32 on a device."""

    def __init__(self, adapter: Adapter, update: Rows, device: torch.device):
        self.values, self.number = adapter.tensor(update.name).to(device), update.number
        self.at = {row: index for index, row in enumerate(update.ids)}

    def put(self, piece: Tensor, first: int, fold: Fold, adapter: Adapter) -> None:
        """Replaces those of a piece's rows that were trained; first: the number of its first row."""
        for row in range(first, first + len(piece)):
            if row in self.at:
                exact = self.values[self.at[row]] * fold.scale
                _refuse_beyond(exact, piece.dtype, fold, adapter)
                piece[row - first] = exact


class LowRankRows:
    """The factors of one update, in float32 on a device."""

    def __init__(self, adapter: Adapter, update: LowRank, device: torch.device):
        key = PREFIX + update.module
        self.a, self.b = (adapter.tensor(key + part).to(device) for part in (LORA_A, LORA_B))
        self.scaling = update.scaling
        self.magnitude = adapter.tensor(key + MAGNITUDE).to(device) if update.magnitude else None

    def added(self, exact: Tensor, rows: slice) -> Tensor:
        """The updated rows; exact: what the base has there, (rows, in_features) float32, and is changed."""
        exact += (self.b[rows] @ self.a).mul_(self.scaling)
        if self.magnitude is None:
            return exact
        return exact * (self.magnitude[rows] / torch.linalg.norm(exact, dim=1)).unsqueeze(1)


def _refuse_beyond(values: Tensor, dtype: torch.dtype, fold: Fold, adapter: Adapter) -> None:
    if not values.numel():
        return
    least, most = (bound.item() for bound in torch.aminmax(values))
    limit = torch.finfo(dtype).max
    if not (-limit <= least and most <= limit):  # with a NaN no comparison holds
        raise UserError(
            adapter.folder,
            f"the merged {fold.name} is not finite in {dtype}",
            "merge in bfloat16 or float32; if that fails too, the adapter or the base is broken",
            Exit.FAILED,
        )
