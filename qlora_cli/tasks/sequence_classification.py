"""A class, or a number, of a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.data.rows import count
from qlora_cli.errors import UserError
from qlora_cli.model.base import Base
from qlora_cli.tasks.padding import mask_of, moved, padded


class Texts(NamedTuple):
    """input_ids, attention_mask, and token_type_ids where the model reads them: (B, T) int64.

    targets: (B,), int64 classes or float32 numbers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    targets: Tensor


def collate(examples: Sequence[Example], base: Base) -> Texts:
    """The examples as one batch.

    The padding is the config's pad token: RoBERTa counts positions by it, and decoders find their last token by it.
    Raises UserError where an encoder-decoder, which reads the class at the last end of a text, finds none.
    """
    refuse_uneven_ends(examples, base)
    targets = torch.tensor([example.targets[0] for example in examples])
    if base.model.config.num_labels > 1:
        targets = targets.long()
    ids, mask, types = read_texts(examples, base)
    return Texts(ids, mask, types, moved(targets, base.device))


def refuse_uneven_ends(examples: Sequence[Example], base: Base) -> None:
    """Raises UserError where an encoder-decoder's texts have no end, or not as many, which transformers refuses."""
    config = base.model.config
    if not getattr(config, "is_encoder_decoder", False):
        return
    counts = [example.input_ids.count(config.eos_token_id) for example in examples]
    for example, number in zip(examples, counts, strict=True):
        if not number or number != counts[0]:
            what = f"{count(number, 'end token')} in this row, where {examples[0].where} has {counts[0]}"
            todo = "give all rows a second text, or none of them, and the tokenizer an end token after each text"
            raise UserError(example.where, what, todo)


def read_texts(examples: Sequence[Example], base: Base) -> tuple[Tensor, Tensor, Tensor | None]:
    """input_ids, attention_mask and token_type_ids of the examples, (B, T) int64 on the base's device."""
    lengths = [example.num_tokens for example in examples]
    config = base.model.config
    pad = config.get_text_config().pad_token_id or 0
    ids, mask = padded([example.input_ids for example in examples], pad), mask_of(lengths)
    types = None
    if getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in base.tokenizer.model_input_names:
        begins = torch.tensor([example.segment or example.num_tokens for example in examples]).unsqueeze(1)
        types = (torch.arange(ids.shape[1]) >= begins).long() * mask
    device = base.device
    return moved(ids, device), moved(mask, device), None if types is None else moved(types, device)


def arguments(batch: Any) -> dict[str, Tensor]:
    """What the model is given of a batch of texts."""
    found = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "token_type_ids")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def outputs(model: Any, batch: Texts) -> tuple[Tensor, Tensor]:
    """The (B, C) logits of the classes, or (B, 1) numbers, and the targets (B,)."""
    return model(**arguments(batch)).logits, batch.targets
