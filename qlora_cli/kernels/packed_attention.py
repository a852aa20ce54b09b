"""Attention over documents that lie one behind the other in one row (1, T): no padding, no dense mask.

A model that `use_packed_attention` switched works on every kind of batch; what it is given decides, in each call:

- `packed_arguments` hands the documents' bounds down to the attention as flash attention's `cu_seq_lens_q`, and a mask
  of four dimensions without an element. transformers hands a 4-D mask on as it is, so it builds none and reads nothing
  back from the device; the attention knows it for "bounds instead of a mask"; whatever else adds it to scores fails.
- A call without bounds (a padded batch, generation with a cache) gets transformers' own sdpa mask and attention.

So there is no switch around the forward that a recomputation in backward would miss, and no state but the model's name
of its attention. `isolation.check_isolation` proves on the loaded model that it holds, for any attention a user names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from qlora_cli.kernels.causal_attention import causal_attention

NAME = "qlora_packed"
"""What `attn_implementation` calls it."""

UNABLE = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "head_mask": "a head mask",
    "position_bias": "a position bias",
}
"""Arguments of transformers' attention functions that change the result in ways unknown here."""


def register() -> None:
    """Makes NAME known to transformers; may be called any number of times."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def supports(model: Any) -> bool:
    """Whether the model's class leaves to its attention function all that this one must know.

    Flash attention gets no mask either, so a class that declares it hands down bounds and sliding windows; a class that
    declares sdpa has neither soft caps nor sinks; and a class without the interface would compute something else.
    """
    kind = type(unwrapped(model))
    declared = getattr(kind, "_supports_sdpa", False) and getattr(kind, "_supports_flash_attn", False)
    return bool(declared and kind._can_set_attn_implementation())


def use_packed_attention(model: Any) -> bool:
    """Switches a loaded model to this attention, where its class supports it; returns whether it did."""
    if not supports(model):
        return False
    register()
    unwrapped(model).set_attn_implementation(NAME)
    return True


def unwrapped(model: Any) -> Any:
    """The transformers model inside of a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def packed_arguments(model: Any, position_ids: Tensor, cu_seqlens: Tensor, max_length: int) -> dict[str, Any]:
    """What tells the model's attention where documents begin, as keyword arguments of its forward.

    position_ids: (1, T) int64, from 0 in each document. cu_seqlens: (D + 1,) int32, the documents' bounds from 0 to T.
    sdpa, eager and flex attention find the bounds in position_ids, where they do not go on by 1.
    """
    name = unwrapped(model).config._attn_implementation
    arguments: dict[str, Any] = {"position_ids": position_ids}
    if name == NAME or "flash" in name:
        arguments |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        arguments |= {"max_length_q": max_length, "max_length_k": max_length}
    if name == NAME:
        arguments["attention_mask"] = torch.empty((1, 1, 0, 0), device=position_ids.device)
    return arguments


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: causal within each document where bounds are given, else its sdpa.

    query (1, H, T, D), key and value (1, H_kv, T, D), H a multiple of H_kv. kwargs: `cu_seq_lens_q` (D + 1,) int32,
    `max_length_q`, `sliding_window` (tokens that each token sees, itself among them). Returns (1, T, H, D) and None.
    Raises NotImplementedError for what it cannot do, in a clause that names it.
    """
    for argument, what in UNABLE.items():
        if kwargs.get(argument) is not None:
            raise NotImplementedError(f"{NAME} attention cannot do {what} ({argument})")
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    marked = attention_mask is not None and attention_mask.numel() == 0
    if cu_seqlens is None:
        if marked:
            raise NotImplementedError("the model does not hand the documents' bounds down to its attention")
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is not None and not marked:
        raise NotImplementedError(f"{NAME} attention takes the documents' bounds or a mask, not both")
    if not (getattr(module, "is_causal", True) and kwargs.get("is_causal", True) is not False):
        raise NotImplementedError(f"{NAME} attention is causal, this model's is not")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise NotImplementedError(f"{NAME} attention takes one row of documents and no cache")
    window = kwargs.get("sliding_window")
    query, key, value = _in_one_dtype(query, key, value)
    if query.is_cuda and not dropout and _fits_varlen(query, value):
        return _varlen(query, key, value, cu_seqlens, kwargs["max_length_q"], scaling, window), None
    return _by_document(query, key, value, cu_seqlens.tolist(), scaling, dropout, window), None


def reference_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The same by a dense mask (T, T) and a softmax in the inputs' dtype: plain, slow, the measure of the others.

    query (1, H, T, D), key and value (1, H_kv, T, D). Returns (1, T, H, D).
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    at = torch.arange(query.shape[2], device=query.device)
    document = torch.searchsorted(cu_seqlens.to(at.dtype), at, right=True)
    behind = at[:, None] - at[None, :]
    seen = (document[:, None] == document[None, :]) & (behind >= 0) & (behind < (window or len(at)))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    return (scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ value).transpose(1, 2)


def _in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast all in its dtype, as torch's own attention does: rotary embeddings may widen two of three."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Sequence[int],
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """One causal sdpa per document. Reading the bounds synchronises with a CUDA device, so this is its second choice.

    `split`, since its backward is one `cat`; that of a slice per document writes a whole row of zeros for each.
    """
    lengths = [end - start for start, end in pairwise(bounds)]
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = _band(q.shape[2], window, q.device) if window is not None and q.shape[2] > window else None
        if mask is None and not dropout:
            output = causal_attention(q, k, v, scaling)
        else:
            gqa, causal = q.shape[1] != k.shape[1], mask is None
            output = scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scaling, enable_gqa=gqa)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length) bool: each token sees itself and the window - 1 before it."""
    return torch.ones((length, length), dtype=torch.bool, device=device).tril().triu(1 - window)


def _fits_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention-2, which `varlen_attn` calls, takes these heads forward and backward on this device."""
    size = query.shape[3]
    capability = torch.cuda.get_device_capability(query.device)
    # between 192 and 256 its backward needs more shared memory than consumer cards of these generations have
    wide = capability in ((8, 0), (9, 0), (10, 0))
    fits = size % 8 == 0 and size <= (256 if wide else 192) and size == value.shape[3]
    return (
        fits and query.dtype in (torch.float16, torch.bfloat16) and capability >= (8, 0) and _varlen_attn() is not None
    )


@cache
def _varlen_attn() -> Callable[..., Any] | None:
    """torch's varlen_attn, where it has one that takes windows, a scale and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    wanted = {"window_size", "scale", "enable_gqa"}
    return varlen_attn if wanted <= inspect.signature(varlen_attn).parameters.keys() else None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One kernel for all documents. FlashAttention-2 splits keys only to decode, so a document's bits are its own."""
    attend = _varlen_attn()
    assert attend is not None
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # torch counts the tokens before this one, transformers this one too
    windows = (-1, 0) if window is None else (window - 1, 0)
    gqa = query.shape[1] != key.shape[1]
    output = attend(
        q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, scale=scaling, window_size=windows, enable_gqa=gqa
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)
