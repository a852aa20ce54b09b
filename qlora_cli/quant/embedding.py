"""An embedding whose weight is packed k-bit codes: of the whole table only the rows asked for are dequantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.quant import kernels
from qlora_cli.quant.blockwise import rows_of
from qlora_cli.quant.packed import PackedLayer, Storage


class PackedEmbedding(PackedLayer, nn.Embedding):
    """`nn.Embedding` with a packed, frozen weight, whose rows are whole blocks.

    dtype: of what comes out; it follows the module's casts, as an embedding's weight does, and autocast leaves it.
    factor: what rows are multiplied with; a () fp32 tensor is rounded to dtype first.
    """

    factor: float | Tensor | None = None

    def __init__(self, num_embeddings: int, embedding_dim: int, storage: Storage, **factory: Any) -> None:
        """factory: padding_idx, device, and dtype of what comes out."""
        assert embedding_dim % storage.block_size == 0, "rows are whole blocks"
        super().__init__(num_embeddings, embedding_dim, factory.get("padding_idx"), device="meta")
        self.dtype: torch.dtype = factory.get("dtype") or torch.get_default_dtype()
        self.reserve(storage, factory.get("device"))

    @property
    def shape(self) -> torch.Size:
        """(num_embeddings, embedding_dim)."""
        return torch.Size((self.num_embeddings, self.embedding_dim))

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape to (*shape, embedding_dim). Raises IndexError for an id that is not in the table."""
        ids = input.reshape(-1)
        if not len(ids):
            return torch.empty((*input.shape, self.embedding_dim), dtype=self.dtype, device=input.device)
        rows, shape = rows_of(self.packed, self.code, ids, self.num_embeddings), (len(ids), self.embedding_dim)
        values = kernels.dequantize(rows, self.code, self.storage.block_size, torch.Size(shape), self.dtype)
        values = values.view(*input.shape, self.embedding_dim)
        if self.factor is None:
            return values
        return values * (self.factor.to(self.dtype) if isinstance(self.factor, Tensor) else self.factor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self


def packed_like(module: nn.Embedding, storage: Storage) -> PackedEmbedding | None:
    """The packed layer, without values, for an embedding; None for one whose forward is not known to do as much."""
    scale = getattr(module, "embed_scale", None)
    scaled = type(module).__module__.startswith("transformers.models.") and type(module).__name__.endswith(SCALED)
    if (type(module) is not nn.Embedding and (scale is None or not scaled)) or module.max_norm is not None:
        return None
    factory = {"padding_idx": module.padding_idx, "device": "meta", "dtype": module.weight.dtype}
    layer = PackedEmbedding(module.num_embeddings, module.embedding_dim, storage, **factory)
    if scaled:
        layer.factor = torch.tensor(module.scalar_embed_scale, device="cpu") if isinstance(scale, Tensor) else scale
    return layer


SCALED = "ScaledWordEmbedding"
"""How transformers' classes end that multiply what they look up with embed_scale, a number or a buffer (5.23)."""
