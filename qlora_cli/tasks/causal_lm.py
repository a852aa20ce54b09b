"""Next-token prediction."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.kernels.output_layer import hidden_states
from qlora_cli.kernels.packed_attention import packed_arguments, unwrapped
from qlora_cli.tasks.padding import mask_of, moved, padded


class Batch(NamedTuple):
    """Rows padded on the right to the longest of them; input_ids and attention_mask (B, T) int64.

    predicting, targets: (N,) int64, the places that predict a trained token, counted through the rows, and that token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    predicting: Tensor
    targets: Tensor


class PackedBatch(NamedTuple):
    """Rows one behind the other without padding, T tokens in all; input_ids and position_ids (1, T) int64.

    position_ids start from 0 in each row, whose first token the row before does not predict. predicting, targets: as of
    a Batch. cu_seqlens: (D + 1,) int32, the bounds of the D rows from 0 to T. max_length: tokens of the longest, known
    without asking the device.
    """

    input_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    max_length: int


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    """The examples as one batch on `device`. Padding is masked by position, so its id does not matter: it is 0."""
    input_ids = padded([example.input_ids for example in examples], 0)
    attention_mask = mask_of([example.num_tokens for example in examples])
    following = padded([[*example.labels[1:], IGNORE_INDEX] for example in examples], IGNORE_INDEX)
    tensors = (input_ids, attention_mask, *predictions(following))
    return Batch(*(moved(tensor, device) for tensor in tensors))


def collate_packed(examples: Sequence[Example], device: torch.device) -> PackedBatch:
    """The examples, none of them empty, as one row on `device`, for a model that `check_isolation` let pass."""
    lengths = [len(example.input_ids) for example in examples]
    input_ids = torch.tensor([[token for example in examples for token in example.input_ids]])
    position_ids = torch.tensor([[position for length in lengths for position in range(length)]])
    following = torch.tensor([label for example in examples for label in (*example.labels[1:], IGNORE_INDEX)])
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    tensors = (input_ids, position_ids, *predictions(following), cu_seqlens)
    ids, positions, places, targets, bounds = (moved(tensor, device) for tensor in tensors)
    return PackedBatch(ids, positions, places, targets, bounds, max(lengths))


def predictions(following: Tensor) -> tuple[Tensor, Tensor]:
    """`predicting` and `targets` of the token that follows each place, IGNORE_INDEX where it is not trained.

    Found on the CPU, since a device would have to be waited for.
    """
    following = following.flatten()
    predicting = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return predicting, following[predicting]


def trained_logits(model: Any, batch: Batch | PackedBatch) -> tuple[Tensor, Tensor]:
    """The (N, V) logits that predict the N trained tokens of the batch, and those tokens (N,).

    Those of places that predict no trained token in any row are not computed, where the class can leave them out.
    """
    width, arguments = batch.input_ids.shape[1], _arguments(model, batch)
    rows, columns = batch.predicting // width, batch.predicting % width
    if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
        arguments["logits_to_keep"], columns = columns.unique(return_inverse=True)
    logits = model(input_ids=batch.input_ids, use_cache=False, **arguments).logits
    return logits[rows, columns], batch.targets


def trained_hidden(model: Any, batch: Batch | PackedBatch) -> tuple[Tensor, Tensor]:
    """The (N, d) hidden states from which the model's head would predict the N trained tokens, and those (N,)."""
    with hidden_states(unwrapped(model)) as seen:
        model(input_ids=batch.input_ids, use_cache=False, **_arguments(model, batch))
    return seen[0].flatten(0, 1)[batch.predicting], batch.targets


def _arguments(model: Any, batch: Batch | PackedBatch) -> dict[str, Any]:
    if isinstance(batch, PackedBatch):
        return packed_arguments(model, batch.position_ids, batch.cu_seqlens, batch.max_length)
    return {"attention_mask": batch.attention_mask}
