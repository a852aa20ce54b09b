"""A text from a text: the encoder reads the source, the decoder predicts the target's next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.kernels.output_layer import hidden_states
from qlora_cli.kernels.packed_attention import unwrapped
from qlora_cli.model.base import Base
from qlora_cli.tasks.padding import mask_of, moved, padded


class SourceTarget(NamedTuple):
    """input_ids, attention_mask (B, S) of the sources; decoder_input_ids, labels (B, T) of the targets; all int64.

    decoder_input_ids are the labels one place to the right behind the decoder's start token. predicting: (N,) int64,
    the places of the decoder that predict a target's token, counted through the rows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor
    labels: Tensor
    predicting: Tensor


def collate(examples: Sequence[Example], base: Base) -> SourceTarget:
    """The examples as one batch. The decoder needs no mask: its padding is behind what it reads."""
    sources = [example.input_ids[: example.num_prompt] for example in examples]
    targets = [example.input_ids[example.num_prompt :] for example in examples]
    config = base.model.config
    pad = config.pad_token_id or 0
    shifted = padded([[config.decoder_start_token_id, *target[:-1]] for target in targets], pad)
    labels = padded(targets, IGNORE_INDEX)
    places = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    tensors = (padded(sources, pad), mask_of([*map(len, sources)]), shifted, labels, places)
    return SourceTarget(*(moved(tensor, base.device) for tensor in tensors))


def outputs(model: Any, batch: SourceTarget) -> tuple[Tensor, Tensor]:
    """The (N, V) logits that predict the N target tokens of the batch, and those tokens (N,)."""
    return _forward(model, batch).logits.flatten(0, 1)[batch.predicting], _targets(batch)


def hidden(model: Any, batch: SourceTarget) -> tuple[Tensor, Tensor]:
    """The (N, d) hidden states from which the model's head would predict the N target tokens, and those (N,)."""
    with hidden_states(unwrapped(model)) as seen:
        _forward(model, batch)
    return seen[0].flatten(0, 1)[batch.predicting], _targets(batch)


def _forward(model: Any, batch: SourceTarget) -> Any:
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        decoder_input_ids=batch.decoder_input_ids,
        use_cache=False,
    )


def _targets(batch: SourceTarget) -> Tensor:
    return batch.labels.flatten()[batch.predicting]
