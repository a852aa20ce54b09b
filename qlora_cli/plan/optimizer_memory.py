"""The optimizer's state by arithmetic: neither fused AdamW nor bitsandbytes' kernels run on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from qlora_cli.train.optimizers import OPTIMIZERS

BLOCK, LEAST_8BIT, LEAST_PAGED = 256, 4096, 100_000
"""bitsandbytes (0.50.2): weights per scale of an 8-bit state; elements from which it has 8 bits, and is paged."""


class State(NamedTuple):
    """Bytes on the device, and in the host's memory where the state is paged."""

    device_bytes: int
    host_bytes: int


def adamw(numel: int) -> int:
    """Two fp32 moments and a step count, which is a tensor."""
    return 8 * numel + 4


def adamw_32bit(numel: int) -> int:
    """Two fp32 moments."""
    return 8 * numel


def adamw_8bit(numel: int) -> int:
    """Two moments of a byte with an fp32 scale for each block; small ones in fp32."""
    return 8 * numel if numel < LEAST_8BIT else 2 * numel + 8 * -(-numel // BLOCK)


STATES: dict[str, Callable[[int], int]] = {
    "paged_adamw_8bit": adamw_8bit,
    "paged_adamw_32bit": adamw_32bit,
    "adamw_8bit": adamw_8bit,
    "adamw": adamw,
}
"""Bytes of a weight tensor's state, by training.optimizer."""


def optimizer_state(name: str, sizes: Iterable[int], kind: str) -> State:
    """The state for weights of these numbers of elements on a device of `kind`."""
    choice = OPTIMIZERS[name]
    if kind == "cpu":
        bytes_of = adamw if choice.build_on_cpu is OPTIMIZERS["adamw"].build_on_cpu else STATES[name]
        return State(sum(map(bytes_of, sizes)), 0)
    bytes_of, paged = STATES[name], name.startswith("paged_")
    device = host = 0
    for numel in sizes:
        if paged and numel >= LEAST_PAGED:
            host += bytes_of(numel)
        else:
            device += bytes_of(numel)
    return State(device, host)
