"""Inputs of checkpointed layers in host memory from forward to backward: on the device there are two at a time.

Offloading of checkpoints: Rajbhandari et al. 2021 (ZeRO-Infinity, section 5.1), and Unsloth's
`use_gradient_checkpointing="unsloth"`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora_cli.kernels.layer_stream import on_host


class Entry:
    """One tensor on the host. fresh: the device's own, until the next tensor comes. below: the one before it."""

    def __init__(self, tensor: Tensor, below: Entry | None) -> None:
        self.fresh: Tensor | None = tensor
        self.host: Tensor | None = None
        self.copied: Any = None
        self.below = None if below is None else weakref.ref(below)


class HostStack:
    """Takes what layers are given in forward, and gives it back in reverse, each begun to come while one computes.

    pushed_bytes: taken in all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.side: Any = torch.cuda.Stream(device) if self.on_gpu else None
        self.last: weakref.ref[Entry] | None = None
        self.pushed_bytes = 0

    @contextmanager
    def keeping(self, tensor: Tensor) -> Iterator[None]:
        """Inside the block this tensor is kept on the host where autograd saves it, and no other."""
        storage = tensor.untyped_storage()._cdata

        def pack(saved: Tensor) -> Any:
            return self._push(saved) if saved.untyped_storage()._cdata == storage else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, self._pull):
            yield

    def _push(self, tensor: Tensor) -> Entry:
        """Begins to copy a tensor to the host, and lets go of the one before it on the device."""
        below = None if self.last is None else self.last()
        if below is not None and below.fresh is not None:
            self._wait(below)
            below.fresh = None
        kept = Entry(tensor, below)
        self.pushed_bytes += tensor.nbytes
        self._leave(kept)
        self.last = weakref.ref(kept)
        return kept

    def _pull(self, kept: Any) -> Tensor:
        """The tensor on the device again; the one before it is on its way."""
        if not isinstance(kept, Entry):
            found: Tensor = kept
            return found
        tensor = self._come(kept) if kept.fresh is None else kept.fresh
        self._wait(kept)
        kept.fresh = None
        below = None if kept.below is None else kept.below()
        if below is not None and below.fresh is None:
            below.fresh = self._come(below)
        return tensor

    def _leave(self, kept: Entry) -> None:
        tensor = kept.fresh
        assert tensor is not None
        if tensor.is_meta:  # a rehearsal, which counts the device's memory alone
            kept.host = tensor.new_empty(0)
            kept.copied = tensor.shape
            return
        kept.host = on_host(tensor.shape, tensor.dtype, self.on_gpu)
        self._copy(tensor, kept.host, kept)

    def _come(self, kept: Entry) -> Tensor:
        assert kept.host is not None
        if kept.host.is_meta:
            return kept.host.new_empty(kept.copied)
        tensor = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=self.device)
        if self.on_gpu:
            tensor.record_stream(self.side)  # a graph may die before it is pulled
        self._copy(kept.host, tensor, kept)
        return tensor

    def _copy(self, source: Tensor, target: Tensor, kept: Entry) -> None:
        if not self.on_gpu:
            target.copy_(source)
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)
            kept.copied = torch.cuda.Event()
            kept.copied.record()

    def _wait(self, kept: Entry) -> None:
        """Whatever the current stream is given next comes after the copy."""
        if self.on_gpu:
            torch.cuda.current_stream(self.device).wait_event(kept.copied)
