"""Weights that bitsandbytes stored in 4 bits: codes, and beside them their scales and a record of how they are packed.

Names and keys are those of bitsandbytes 0.50.2 (`functional.QuantState.as_dict`).
"""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from qlora_cli.errors import UserError
from qlora_cli.model.stored_weight import StoredWeight, Tensors, stored_transposed
from qlora_cli.quant.roundtrip import dequantize_by_blocks

RECORD = ".quant_state.bitsandbytes__"
"""Between the name of a weight and that of its data type, in the name of the tensor that is JSON of the rest."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Data types of scales."""


def bitsandbytes_weights(stored: Tensors) -> list[StoredWeight]:
    """The packed weights of a checkpoint, checked by its headers. Raises UserError for one that lacks a part."""
    transposed = stored_transposed(stored.folder)
    found = []
    for record in stored.entries:
        name, mark, _data_type = record.partition(RECORD)
        if not mark:
            continue
        state = _read_record(stored, record)
        parts = _parts(stored, name, record, state)
        values = partial(_dequantized, stored, parts, state, transposed(name))
        shape = tuple(state["shape"][::-1] if transposed(name) else state["shape"])
        found.append(StoredWeight(name, shape, (*parts.values(), record), values))
    return found


def _read_record(stored: Tensors, name: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(bytes(stored.read(name).tolist()))
        nested = {"nested_blocksize", "nested_dtype", "nested_offset"} & state.keys()
        if not {"quant_type", "blocksize", "dtype", "shape"} <= state.keys() or len(nested) not in (0, 3):
            raise ValueError(f"it has {sorted(state)}")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(stored.file(name), f"{name} is damaged ({error})", "restore the folder") from error
    return state


def _parts(stored: Tensors, name: str, record: str, state: dict[str, Any]) -> dict[str, str]:
    """The tensors of a weight by bitsandbytes' names of them: the codes, of the name `weight`, first."""
    count, nested = math.prod(state["shape"]), "nested_blocksize" in state
    num_blocks = math.ceil(count / state["blocksize"])
    needed: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "absmax": ((num_blocks,), (torch.uint8,) if nested else FLOATS),
        "quant_map": ((16,), FLOATS),
    }
    if nested:
        needed["nested_absmax"] = ((math.ceil(num_blocks / state["nested_blocksize"]),), FLOATS)
        needed["nested_quant_map"] = ((256,), FLOATS)
    stored.require(name, (math.ceil(count / 2), 1), (torch.uint8,), record)
    for part, (shape, dtypes) in needed.items():
        stored.require(f"{name}.{part}", shape, dtypes, record)
    return {"weight": name} | {part: f"{name}.{part}" for part in needed}


def _dequantized(
    stored: Tensors, parts: dict[str, str], state: dict[str, Any], transposed: bool, dtype: torch.dtype
) -> Tensor:
    """What the live layer multiplies with in `dtype`, in the orientation of an ordinary checkpoint."""
    tensors = {part: stored.read(name) for part, name in parts.items()}
    codes = tensors.pop("weight")
    values = dequantize_by_blocks(codes, QuantState.from_dict({**state, **tensors}, torch.device("cpu")), dtype)
    return values.T if transposed else values
