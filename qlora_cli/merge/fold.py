"""The arithmetic of a merge: an update added to a weight in float32, a few rows at a time, rounded once."""

from __future__ import annotations

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


def folded(adapter: Adapter, fold: Fold, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A base tensor after the fold, in dtype and in its stored orientation.

    weight: the base's value in any floating dtype, which stays as it is. The arithmetic is PEFT's in float32:
    W + (B @ A) * scaling; with DoRA each row of that is brought to its magnitude. Trained rows replace the weight's, or
    come behind its last.
    Raises UserError (exit code FAILED) where a value is not finite in dtype.
    """
    update, scale = fold.update, fold.scale
    if isinstance(update, Replacement):
        weight, update = adapter.tensor(update.name).to(weight.device), None
    trained = update if isinstance(update, Rows) else None
    update = None if isinstance(update, Rows) else update
    if trained is None and update is None and scale == 1.0 and weight.dtype == dtype:
        _refuse_beyond(weight, dtype, fold, adapter)
        return weight
    shape = weight.shape if trained is None else (trained.number, *weight.shape[1:])
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    transposed = update is not None and update.transposed
    rows, target = (weight.T, out.T) if transposed else (weight, out)  # (out_features, in_features), views
    low_rank = None if update is None else LowRankRows(adapter, update, weight.device)
    per_row = max(1, rows[0].numel()) if rows.ndim > 1 and len(rows) else 1
    step = max(1, PORTION // per_row)
    for begin in range(0, len(rows) if rows.ndim else 1, step):
        some = slice(begin, begin + step) if rows.ndim else ...
        exact = rows[some].float()
        if low_rank is not None:
            exact = low_rank.added(exact, slice(begin, begin + step))
        if scale != 1.0:
            exact = exact * scale
        _refuse_beyond(exact, dtype, fold, adapter)
        target[slice(begin, begin + len(exact)) if rows.ndim else ...] = exact
    if trained is not None:
        exact = adapter.tensor(trained.name).to(weight.device) * scale
        _refuse_beyond(exact, dtype, fold, adapter)
        out[list(trained.ids)] = exact.to(dtype)
    return out


class LowRankRows:
    """The factors of one update, in float32 on a device."""

    def __init__(self, adapter: Adapter, update: LowRank, device: torch.device):
        key = PREFIX + update.module
        self.a, self.b = (adapter.tensor(key + part).to(device) for part in (LORA_A, LORA_B))
        self.scaling = update.scaling
        self.magnitude = adapter.tensor(key + MAGNITUDE).to(device) if update.magnitude else None

    def added(self, exact: Tensor, rows: slice) -> Tensor:
        """The updated rows `rows` of the weight; exact: what the base has there, (rows, in_features) float32."""
        exact = exact + (self.b[rows] @ self.a).mul_(self.scaling)
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
