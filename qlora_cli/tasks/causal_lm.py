"""Next-token prediction."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.kernels.packed_attention import packed_arguments, unwrapped
from qlora_cli.tasks.padding import mask_of, padded


class Batch(NamedTuple):
    """Rows padded on the right to the longest of them; all (B, T) int64.

    kept: (K,) int64, the positions whose next token is trained in any row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    kept: Tensor


class PackedBatch(NamedTuple):
    """Rows one behind the other without padding, T tokens in all; input_ids, position_ids and labels (1, T) int64.

    position_ids start from 0 in each row, whose first token has the label IGNORE_INDEX: the row before must not predict
    it. kept: (K,) int64, the positions whose next token is trained. cu_seqlens: (D + 1,) int32, the bounds of the D
    rows from 0 to T. max_length: tokens of the longest, known without asking the device.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    kept: Tensor
    cu_seqlens: Tensor
    max_length: int


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    """The examples as one batch on `device`. Padding is masked by position, so its id does not matter: it is 0."""
    input_ids = padded([example.input_ids for example in examples], 0)
    attention_mask = mask_of([example.num_tokens for example in examples])
    labels = padded([example.labels for example in examples], IGNORE_INDEX)
    tensors = (input_ids, attention_mask, labels, _kept(labels))
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def collate_packed(examples: Sequence[Example], device: torch.device) -> PackedBatch:
    """The examples, none of them empty, as one row on `device`, for a model that `check_isolation` let pass."""
    lengths = [len(example.input_ids) for example in examples]
    input_ids = torch.tensor([token for example in examples for token in example.input_ids])
    position_ids = torch.tensor([position for length in lengths for position in range(length)])
    labels = torch.tensor([label for example in examples for label in (IGNORE_INDEX, *example.labels[1:])])
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    rows = [tensor.unsqueeze(0) for tensor in (input_ids, position_ids, labels)]
    on_device = [tensor.to(device, non_blocking=True) for tensor in (*rows, _kept(rows[2]), cu_seqlens)]
    ids, positions, targets, kept, bounds = on_device
    return PackedBatch(ids, positions, targets, kept, bounds, max(lengths))


def _kept(labels: Tensor) -> Tensor:
    """The positions whose next token is trained in any row; found here, since a device would have to be waited for."""
    return (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)


def trained_logits(model: Any, batch: Batch | PackedBatch) -> tuple[Tensor, Tensor]:
    """The (N, V) logits that predict the N trained tokens of the batch, and those tokens (N,).

    The others are not computed where the model's class can leave them out (`logits_to_keep`): over a large vocabulary
    they would be most of the memory.
    """
    arguments: dict[str, Any]
    if isinstance(batch, PackedBatch):
        arguments = packed_arguments(model, batch.position_ids, batch.cu_seqlens, batch.max_length)
    else:
        arguments = {"attention_mask": batch.attention_mask}
    leaves_out = "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters
    if leaves_out:
        arguments["logits_to_keep"] = batch.kept
    logits = model(input_ids=batch.input_ids, use_cache=False, **arguments).logits
    if not leaves_out:
        logits = logits[:, batch.kept]
    targets = batch.labels[:, batch.kept + 1]
    if len(targets) == 1:
        return logits[0], targets[0]
    trained = targets != IGNORE_INDEX
    return logits[trained], targets[trained]
