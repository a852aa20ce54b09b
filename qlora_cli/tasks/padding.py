"""Rows of unequal length as one tensor, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; on a GPU from pinned memory, so that nobody waits for the copy.

    It keeps what it was copied from as `on_host`, for an embedding that lies there (model/placement.py).
    """
    if device.type != "cuda":
        return tensor.to(device)
    found: Any = tensor.pin_memory().to(device, non_blocking=True)
    found.on_host = tensor
    copied: Tensor = found
    return copied


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, T) int64: the rows with `value` behind them, T the longest row's length."""
    longest = max(map(len, rows))
    tensor = torch.full((len(rows), longest), value, dtype=torch.int64)
    for index, row in enumerate(rows):
        tensor[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tensor


def mask_of(lengths: Sequence[int]) -> Tensor:
    """(B, T) int64: 1 where a row of this length has a token."""
    at = torch.arange(max(lengths))
    return (at < torch.tensor(lengths).unsqueeze(1)).long()
