"""A model's last hidden states instead of its logits, and what it would have done to its logits, proven on the model.

Models scale, cap and shift their logits in code of their own (Gemma, Granite, Cohere, BART). Which of it a loaded model
does is read from its config and its buffers, and believed only where the model itself does the same to given logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.kernels.linear_cross_entropy import Tail, out_features

SOFTCAPS = ("final_logit_softcapping", "softcap")
"""What configs call the bound of soft-capped logits."""

MULTIPLIERS = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""What configs call a factor of the logits."""

DIVISORS = ("logits_scaling",)
"""What configs call a divisor of the logits: Granite's, which HyperCLOVA X multiplies with."""

PROVEN_ON = (2, 3)
"""Rows and tokens."""

EXACT = 1e-5
"""By how much a model's logits may differ from those that a tail gives, relative to the largest."""


@contextmanager
def hidden_states(model: Any, replaced: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Inside the block the model's head computes nothing: the list gets what it is given, (B, T, d).

    The model's logits are then of no use: one row of zeros, or what it makes of `replaced` (B, T, V).
    """
    head = model.get_output_embeddings()
    before = head.__dict__.get("forward")
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden.new_zeros(()).expand(1, 1, out_features(head)) if replaced is None else replaced

    head.forward = keep
    try:
        yield seen
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


@contextmanager
def head_at(model: Any, places: Tensor) -> Iterator[list[bool]]:
    """Inside the block the model's head reads the hidden states at `places` alone, counted through the rows of a batch.

    places (N,) int64; the model's logits are then (1, N, V). The list is filled where the model has called its head.
    """
    selected: list[bool] = []

    def select(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if named or len(inputs) != 1 or inputs[0].dim() != 3:
            return None
        selected.append(True)
        return (inputs[0].flatten(0, 1)[places].unsqueeze(0),), named

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(select, with_kwargs=True) if head is not None else None
    try:
        yield selected
    finally:
        if handle is not None:
            handle.remove()


def find_tail(model: Any, run: Callable[[], Tensor]) -> Tail | None:
    """What the model does to its head's logits; None where it is nothing known, or the head is no module it calls.

    run: a forward pass of the model over rows of PROVEN_ON, without gradients and dropout, that returns its logits.
    On the meta device, where nothing can be proven, the last that the config tells of is believed.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or head._forward_hooks or head._forward_pre_hooks:  # which would run twice
        return None
    try:
        candidates = list(_candidates(model))
        if next(model.parameters()).is_meta:
            return candidates[-1]
        with hidden_states(model) as seen:
            run()
        given = torch.linspace(-40, 40, out_features(head), device=seen[0].device).expand(*PROVEN_ON, -1)
        with hidden_states(model, given):
            made = run().float()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # anybody's model code, given logits that are not its head's
        return None
    if len(seen) != 1 or seen[0].dim() != 3 or seen[0].shape[:2] != PROVEN_ON or made.shape != given.shape:
        return None
    fits = (tail for tail in candidates if (tail(given) - made).abs().max() <= EXACT * made.abs().max())
    return next(fits, None)


def _candidates(model: Any) -> Iterator[Tail]:
    """Tails that the config and the buffers allow, the plain one first."""
    config = model.config.get_text_config(decoder=True)
    softcaps = [None, *(cap for name in SOFTCAPS if isinstance(cap := getattr(config, name, None), float | int))]
    scales = [1.0, *(value for name in MULTIPLIERS if isinstance(value := getattr(config, name, None), float | int))]
    scales += [1 / value for name in DIVISORS if isinstance(value := getattr(config, name, None), float | int)]
    biases = [None, *(bias for bias in [getattr(model, "final_logits_bias", None)] if isinstance(bias, Tensor))]
    for bias, scale, softcap in product(biases, scales, softcaps):
        yield Tail(float(scale), None if softcap is None else float(softcap), bias)
