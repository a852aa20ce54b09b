"""Cross-entropy straight from hidden states: the head is run over a chunk of tokens at a time.

Logits of all tokens never exist: of 2,048 tokens over 152k entries they and what is made of them would take 4 GB. The
gradient is computed chunk by chunk in the forward pass, while the logits are there, so nothing is computed twice; what
is kept for backward has the size of the hidden states. The head is called as it is, so it may have a bias, be packed,
carry an adapter or be trained in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Logits of a chunk, by device: enough tokens that reading the head's weight costs little beside the product."""

BLOCK_BYTES = {"cpu": 3 << 19, "cuda": 64 << 20}
"""Logits in fp32 at a time, by device: on a CPU they stay in the cache between the passes over them."""

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tail:
    """What a model does to its head's logits: (logits + bias) * scale, and softcap * tanh(that / softcap).

    bias: (V,) or (1, V), frozen.
    """

    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The model's logits from its head's, both (n, V)."""
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of the model's logits, which are given, by the head's."""
        if self.softcap is None:
            return self.scale
        return (1 - (logits / self.softcap).square()) * self.scale


NO_TAIL = Tail()


def reference_linear_cross_entropy(hidden: Tensor, targets: Tensor, head: Head, tail: Tail = NO_TAIL) -> Tensor:
    """The same from all logits at once: plain, the measure of the other."""
    return cross_entropy(_wide(tail(_wide(head(hidden)))), targets, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor, targets: Tensor, head: nn.Module, tail: Tail = NO_TAIL, weight: float = 1.0
) -> Tensor:
    """The cross-entropy in nats of the N targets, summed and multiplied by `weight`.

    hidden (N, d), targets (N,) int64, head: (n, d) to (n, V). Gradients go to `hidden` and to the head's parameters
    that require one; `weight` is in them before they are rounded. Returns () float32, float64 of float64.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, targets, head, tail, weight, *trained)
        return loss
    return token_losses(hidden, targets, head, tail)[0].sum() * weight


@torch.no_grad()
def token_losses(hidden: Tensor, targets: Tensor, head: Head, tail: Tail = NO_TAIL) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each target in nats, (N,) float32, and whether it is the likeliest token, (N,) bool.

    hidden (N, d), targets (N,) int64. No gradient.
    """
    losses, likeliest = [], []
    for part in _chunks(hidden, head):
        logits = head(hidden[part])
        for rows in _blocks(logits):
            z, wanted = tail(_wide(logits[rows])), targets[part][rows]
            losses.append(cross_entropy(z, wanted, reduction="none"))
            likeliest.append(z.argmax(dim=-1) == wanted)
    empty = hidden.new_zeros(0)
    return torch.cat(losses or [_wide(empty)]), torch.cat(likeliest or [empty.bool()])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, tail: Tail, weight: float, *trained: Tensor
    ) -> Tensor:
        total = _wide(hidden.new_zeros(()))
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grads = [torch.zeros_like(parameter) for parameter in trained]
        for part in _chunks(hidden, head):
            with torch.enable_grad():
                rows = hidden[part].detach().requires_grad_(grad_hidden is not None)
                logits = head(rows)
                behind = torch.autograd.graph.get_gradient_edge(logits)  # a view's own history ends where it is written
            total += _losses_to_gradients_(logits.detach(), targets[part], tail, weight).sum()
            wanted = [*([] if grad_hidden is None else [rows]), *trained]
            found = list(torch.autograd.grad([behind], wanted, [logits.detach()]))
            if grad_hidden is not None:
                grad_hidden[part] = found.pop(0)
            for sum_, grad in zip(grads, found, strict=True):
                sum_ += grad
            del logits, behind, found  # before the next chunk's logits are there too
        ctx.save_for_backward(grad_hidden, *grads)
        return total * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        scaled = [None if grad is None else grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors]
        return scaled[0], None, None, None, None, *scaled[1:]


def _losses_to_gradients_(logits: Tensor, targets: Tensor, tail: Tail, weight: float) -> Tensor:
    """The cross-entropy of each target (n,); the head's logits (n, V) become, in place, the gradient by them."""
    losses = []
    for rows in _blocks(logits):
        at = targets[rows].unsqueeze(1)
        z = tail(_wide(logits[rows]))
        grad = z.softmax(dim=-1)  # whose largest is exp(max z - log sum exp z); exp_ takes torch twice as long
        behind = z.amax(dim=-1, keepdim=True) - z.gather(1, at)  # first: large logits leave no digits for the rest
        losses.append((behind - grad.amax(dim=-1, keepdim=True).log_()).squeeze(1))
        grad.scatter_add_(1, at, grad.new_full(at.shape, -1.0))
        slope = tail.slope(z)
        logits[rows] = grad.mul_(slope * weight)
    return torch.cat(losses)


def _wide(tensor: Tensor) -> Tensor:
    """In fp32, where it is not in fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunks(hidden: Tensor, head: Any) -> Iterator[slice]:
    """The rows of `hidden` in parts of about equal size, whose logits take no more than CHUNK_BYTES."""
    row_bytes = out_features(head) * hidden.element_size()
    most = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) // row_bytes)
    parts = max(1, -(-len(hidden) // most))
    return _parts(len(hidden), -(-len(hidden) // parts))


def _blocks(logits: Tensor) -> Iterator[slice]:
    """The rows of logits (n, V) in parts whose fp32 copies take no more than BLOCK_BYTES."""
    most = BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES["cuda"]) // (logits.shape[1] * 4)
    return _parts(len(logits), max(1, most))


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, length)) for begin in range(0, length, max(size, 1)))


def out_features(head: Any) -> int:
    """Entries of the vocabulary that a head, or what wraps it, has logits for."""
    for name in ("base_layer", "original_module"):
        head = getattr(head, name, head)
    return int(head.out_features)
