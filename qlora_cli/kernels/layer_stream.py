"""Frozen tensors of layers that lie in host memory and pass through two places of the device's, in turn.

A layer is copied while the one before it computes, in forward as in backward (double buffering). Whoever reads a
layer's tensors asks for it first, every time: what was there before may have been overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes: each tensor of a layer begins at a multiple, as in memory of its own."""


class Place(NamedTuple):
    """A tensor where kernels read it, valid after `ask`, and where it stays."""

    on_device: Tensor
    on_host: Tensor


class LayerStream:
    """Layers by the order in which they were added, which should be the order of their use.

    slot_bytes: of each of the two places on the device, enough for the largest layer (`needed_bytes`). copies: made so
    far. late: of those the ones that nobody foresaw, for which the device had to wait.
    """

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.slots = [torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self.hosts: list[Tensor] = []
        self.held: list[int | None] = [None, None]
        self.current: int | None = None
        self.copies = self.late = 0
        self.side: Any = torch.cuda.Stream(device) if self.on_gpu else None
        self.arrived: list[Any] = [torch.cuda.Event() for _ in range(2)] if self.on_gpu else []

    def add(self, tensors: Sequence[Tensor]) -> list[Place]:
        """Takes the tensors of the next layer into host memory, pinned for a GPU; they may be freed afterwards."""
        size = torch.Size([needed_bytes(tensors)])
        on_meta = self.slots[0].is_meta
        host = self.slots[0].new_empty(size) if on_meta else on_host(size, torch.uint8, self.on_gpu)
        slot, at, places = self.slots[len(self.hosts) % 2], 0, []
        self.hosts.append(host)
        for tensor in tensors:
            places.append(Place(_view(slot, at, tensor), _view(host, at, tensor)))
            places[-1].on_host.copy_(tensor)
            at += _aligned(tensor.nbytes)
        return places

    @property
    def host_bytes(self) -> int:
        """What the layers take in host memory."""
        return sum(pinned_bytes(len(host)) for host in self.hosts)

    def ask(self, index: int) -> None:
        """Has the layer in its place for whatever the current stream is given next, and begins to bring the following.

        Which one follows is guessed from the direction: the next one in a forward pass, which the first layer begins,
        and the one before in backward. A wrong guess costs time alone.
        """
        if index == self.current:
            return
        slot = index % 2
        if self.held[slot] != index:
            self.late += 1
            self._bring(index)
        if self.on_gpu:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[slot])
        backward = self.current is not None and 0 < index < self.current
        self.current = index
        following = index - 1 if backward else index + 1
        if 0 <= following < len(self.hosts) and self.held[following % 2] != following:
            self._bring(following)

    def _bring(self, index: int) -> None:
        """Copies a layer over the one that was in its place, once all that reads that one is done."""
        slot, host = index % 2, self.hosts[index]
        self.held[slot], self.copies = index, self.copies + 1
        place = self.slots[slot][: len(host)]
        if not self.on_gpu:
            place.copy_(host)
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            place.copy_(host, non_blocking=True)
            self.arrived[slot].record()


def on_host(shape: torch.Size, dtype: torch.dtype, pinned: bool) -> Tensor:
    """A tensor in host memory, pinned for a GPU that is to copy by itself. Raises OutOfMemoryError for want of it."""
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned)
    except RuntimeError as error:  # CUDA's own, of no class that tells
        num_bytes = shape.numel() * dtype.itemsize
        raise torch.OutOfMemoryError(f"host memory: {num_bytes:,} bytes could not be had: {error}") from error


def pinned_bytes(num_bytes: int) -> int:
    """What pinned memory of that size takes: torch rounds it to a power of two (CachingHostAllocator.h, 2.13)."""
    return 1 << (num_bytes - 1).bit_length()


def needed_bytes(tensors: Sequence[Tensor]) -> int:
    """What a layer of these tensors takes."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _view(flat: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes from `start` on as a tensor of the same type and shape."""
    return flat[start : start + like.nbytes].view(like.dtype).view(like.shape)
