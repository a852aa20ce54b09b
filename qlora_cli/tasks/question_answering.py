"""The span of a context that answers a question: its first and its last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.model.base import Base
from qlora_cli.tasks.padding import moved
from qlora_cli.tasks.sequence_classification import arguments, read_texts


class Windows(NamedTuple):
    """input_ids, attention_mask, and token_type_ids where the model reads them: (B, T) int64; targets (B, 2) int64."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    targets: Tensor


def collate(examples: Sequence[Example], base: Base) -> Windows:
    """The examples as one batch."""
    targets = torch.tensor([example.targets for example in examples]).long()
    return Windows(*read_texts(examples, base), moved(targets, base.device))


def span_logits(model: Any, batch: Windows) -> tuple[Tensor, Tensor]:
    """(B, T) float32 logits of the first token and of the last, -inf where there is padding.

    transformers leaves the padding in, which makes the loss of a row depend on the longest row beside it.
    """
    found = model(**arguments(batch))
    padding = batch.attention_mask == 0
    return tuple(logits.float().masked_fill(padding, -torch.inf) for logits in (found.start_logits, found.end_logits))


def outputs(model: Any, batch: Windows) -> tuple[Tensor, Tensor]:
    """The (2 B, T) logits of all first and then all last tokens, and the tokens (2 B,)."""
    return torch.cat(span_logits(model, batch)), batch.targets.T.flatten()
