"""Whether a model keeps packed documents apart: asked of the loaded model itself, since no declaration of it is sure.

Some architectures ignore `position_ids`, some keep a state that runs on from document to document (convolutions, linear
attention), some build their mask in a way of their own. All show in three forwards of 21 tokens. Sliding windows, which
some know by the mask alone, are longer: for three forwards more they are narrowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from qlora_cli.kernels.packed_attention import NAME, packed_arguments, supports, unwrapped, use_packed_attention

LENGTHS = (8, 7, 6)
"""Tokens of the packed documents."""

NARROW = 4
"""Tokens of a sliding window in the proof."""

EXACT, ROUNDED = 1e-3, 0.05
"""What rounding may make of the logits in fp32, and in 16 or 8 bits; a neighbour or a wrong position makes over 0.1."""


class NotIsolated(Exception):
    """The model does not keep packed documents apart; the message is a clause with the reason."""


def prepare_packing(model: Any, device: torch.device, vocab_size: int, longest: int | None = None) -> str:
    """The name of a proven attention, our own where the model can use it; the model is left switched to it.

    longest: tokens of the longest document; None: of any length. Raises NotIsolated where neither it nor the attention
    that the model was loaded with keeps documents apart.
    """
    before = unwrapped(model).config._attn_implementation
    if use_packed_attention(model):
        try:
            check_isolation(model, device, vocab_size, longest)
            return NAME
        except NotIsolated:
            unwrapped(model).set_attn_implementation(before)
    check_isolation(model, device, vocab_size, longest)
    return str(before)


def check_isolation(model: Any, device: torch.device, vocab_size: int, longest: int | None = None) -> None:
    """Proves that packing is right with the model's own attention; to be called under the autocast of training.

    Other tokens in the second of three documents must leave every bit of the other two's logits, and the three packed
    must give the logits that they give as rows of a padded batch, up to rounding. Raises NotIsolated otherwise.
    """
    if unwrapped(model).config._attn_implementation == NAME and not supports(model):
        raise NotIsolated(f"{type(unwrapped(model)).__name__} computes attention in a way of its own, not by {NAME}")
    with evaluating(model):
        _check(model, device, vocab_size)
        windows = _windows(model)
        if any(longest is None or longest > window for _, window in windows):
            with _narrowed(windows):
                _check(model, device, vocab_size)


def _check(model: Any, device: torch.device, vocab_size: int) -> None:
    """As check_isolation, for the model as it is now."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocab_size, (length,), generator=generator) for length in LENGTHS]
    changed = [rows[0], (rows[1] + 1) % vocab_size, rows[2]]
    try:
        packed, other = _packed_logits(model, rows, device), _packed_logits(model, changed, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # anybody's model code, given what it was not written for
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotIsolated(f"a row of packed documents fails: {reason}") from error
    padded = _padded_logits(model, rows, device)
    tolerance = _tolerance(packed[0], device)
    told = _difference(other[::2], packed[::2])
    if told != 0:
        # what rows of a padded batch tell of each other, by outliers of int8 or sizes of experts' batches
        mixed = _difference(_padded_logits(model, changed, device)[::2], padded[::2])
        tolerance = min(ROUNDED, max(tolerance, 3 * mixed))
        if mixed == 0 or not told <= tolerance:
            raise NotIsolated(f"tokens of one document change the logits of the others (by {told:.1e})")
    off = _difference(packed, padded)
    if not off <= tolerance:  # true for NaN as well
        raise NotIsolated(f"packed documents have other logits than rows of a batch (by {off:.1e}, not rounding)")


def _windows(model: Any) -> list[tuple[Any, int]]:
    """What holds a sliding window, config or layer, with its tokens."""
    config = unwrapped(model).config
    holders = {id(holder): holder for holder in (config, config.get_text_config(), *model.modules())}
    found = [(holder, getattr(holder, "sliding_window", None)) for holder in holders.values()]
    return [(holder, window) for holder, window in found if isinstance(window, int) and window > NARROW]


@contextmanager
def _narrowed(windows: Sequence[tuple[Any, int]]) -> Iterator[None]:
    """Windows shorter than the documents of the proof inside the block."""
    try:
        for holder, _ in windows:
            holder.sliding_window = NARROW
        yield
    finally:
        for holder, window in windows:
            holder.sliding_window = window


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients inside the block; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _packed_logits(model: Any, rows: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The (length, V) logits of each document, all in one row."""
    lengths = [len(row) for row in rows]
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device)
    cu_seqlens = pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    arguments = packed_arguments(model, position_ids, cu_seqlens, max(lengths))
    logits = model(input_ids=torch.cat(list(rows)).unsqueeze(0).to(device), use_cache=False, **arguments).logits
    return list(logits[0].split(lengths))


def _padded_logits(model: Any, rows: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The (length, V) logits of each document as a row of its own, padded on the right."""
    input_ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    return [row[: len(tokens)] for row, tokens in zip(logits, rows, strict=True)]


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Root of the mean square difference ÷ that of `wanted` around its mean; 0 only where every bit is the same."""
    left, right = torch.cat(list(found)).double(), torch.cat(list(wanted)).double()
    return ((left - right).norm() / (right - right.mean()).norm()).item()


def _tolerance(logits: Tensor, device: torch.device) -> float:
    """What rounding may make of the logits, in units of `_difference`."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else logits.dtype
    return ROUNDED if torch.finfo(dtype).bits < 32 else EXACT
