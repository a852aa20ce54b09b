"""The arithmetic of one optimizer step: no loops over data, no files, no display."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora_cli.errors import Exit
from qlora_cli.model.base import Base
from qlora_cli.model.fused import cast_once
from qlora_cli.tasks.table import AnyBatch, mean_loss

STOPS = (Exit.SIGTERM, Exit.SIGINT)
"""Exit codes of the signals that end a run after the step in hand."""


def seed_everything(seed: int) -> None:
    """Seeds torch's generators, CPU and CUDA: the adapter's start and dropout draw from no other."""
    torch.manual_seed(seed)


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Only kernels that repeat to the last bit inside the block, where wanted; what was set before comes back after.

    cuBLAS needs CUBLAS_WORKSPACE_CONFIG for it, which it reads when the GPU is first used.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def accumulate(base: Base, model: Any, batches: Iterable[AnyBatch], num_tokens: int) -> Tensor:
    """Adds the gradient of this process's share of one optimizer step, and returns its share of the loss.

    num_tokens: trained tokens, or other targets, of the whole step, over all micro-batches and processes. Each
    micro-batch contributes its summed loss divided by it, so the sum is the mean over all however the rows are split.
    Returns a () float32 tensor on the device.
    """
    total = torch.zeros((), device=base.device)
    with cast_once(model):
        for batch in batches:
            with base.compute():
                loss = mean_loss(base, model, batch, num_tokens)
            loss.backward()
            total += loss.detach()
    return total


def sum_over_processes(
    accelerator: Any, parameters: Sequence[Tensor], loss: Tensor, signal: Exit | None = None
) -> tuple[Tensor, Exit | None]:
    """Sums the gradients and the loss over all processes, in one exchange that also tells of a signal.

    Each process divided by the tokens of all, so the sum is the gradient that one process would have had.
    A process whose share of a short last window is empty takes part with zeros.
    signal: the exit code of a signal that this process received. Returns the loss and, on every process alike, the code
    of a signal that any of them received, so that all stop after the same step.
    """
    if accelerator.num_processes == 1:
        return loss, signal
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    told = torch.tensor([float(signal == code) for code in STOPS], device=loss.device)
    flat = torch.cat([told, loss.reshape(1), *(p.grad.reshape(-1) for p in parameters if p.grad is not None)])
    flat = accelerator.reduce(flat, reduction="sum")
    start = len(STOPS) + 1
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.copy_(flat[start : start + parameter.numel()].view_as(parameter))
        start += parameter.numel()
    received = [code for code, count in zip(STOPS, flat[: len(STOPS)].tolist(), strict=True) if count]
    return flat[len(STOPS)], received[0] if received else None


def clip(parameters: Sequence[Tensor], max_grad_norm: float) -> Tensor:
    """The gradient's global L2 norm, () float32; the gradient is then scaled down to max_grad_norm, where > 0."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return norm


def random_state() -> dict[str, Tensor]:
    """The state of the generators that dropout draws from, as uint8 tensors."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(states: dict[str, Tensor]) -> None:
    """Puts back what `random_state` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
