"""The device that a plan is for: the one that is here, or an NVIDIA GPU of a named size."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from qlora_cli.errors import UserError
from qlora_cli.train.room import room_on

UNITS = {"gib": 1 << 30, "g": 1 << 30, "gb": 10**9, "mib": 1 << 20, "mb": 10**6}
"""Bytes by unit. A card sold as 24 GB has 24 GiB."""

WRITTEN = {"gib": "GiB", "g": "GiB", "gb": "GB", "mib": "MiB", "mb": "MB"}
LARGER = ("tib", "tb", "t")

WRITE = "write a size such as 24GiB"
"""The remedy for what is no size."""

LEAST_BYTES = 1 << 28
"""No GPU is smaller: what is below was meant in another unit."""


@dataclass(frozen=True)
class Target:
    """kind: "cuda" or "cpu". here: whether it was found here, or only its size is known."""

    kind: str
    name: str
    budget_bytes: int
    here: bool


def target_of(gpu: str | None) -> Target:
    """An NVIDIA GPU of that size; None: the first GPU here with all of its memory, or the CPU with what is free."""
    if gpu is not None:
        budget_bytes, (number, unit) = size_of(gpu), parsed(gpu)
        return Target("cuda", f"an NVIDIA GPU of {number:.10g} {unit}", budget_bytes, here=False)
    if torch.cuda.is_available():
        return Target("cuda", torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1], here=True)
    free = room_on(torch.device("cpu")).free_bytes
    return Target("cpu", "the CPU, with the memory that is free now", free, here=True)


def size_of(text: str) -> int:
    """Bytes of 24GiB, 24GB, 80G or 24564MiB. Raises UserError for what is no size of a GPU."""
    number, unit = parsed(text)
    num_bytes = int(number * UNITS[unit.lower()])
    if num_bytes < LEAST_BYTES:
        raise UserError(f"--gpu {text}", f"is {num_bytes:,} bytes, less than any GPU has", WRITE)
    return num_bytes


def parsed(text: str) -> tuple[float, str]:
    """Number and unit of a size, as they are usually written. Raises UserError where it has not both."""
    where = f"--gpu {text}" if text.strip() else f'--gpu "{text}"'
    found = re.fullmatch(r"(\d+(?:[.,]\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    if found is None:
        raise UserError(where, "is no size" if text.strip() else "is empty", WRITE)
    number, unit = found.groups()
    if "," in number:
        raise UserError(where, "has a comma", f"write {number.replace(',', '.')}{unit or 'GiB'}, if that is meant")
    if not unit:
        likely = f"{number}MiB" if float(number) >= 1024 else f"{number}GiB"
        raise UserError(where, "has no unit", f"write {likely}, if that is meant")
    if unit.lower() in LARGER:
        raise UserError(where, "is in a unit of larger things", f"write {float(number) * 1024:g}GiB, if that is meant")
    if unit.lower() not in UNITS:
        raise UserError(where, f"{unit!r} is no unit of a GPU's memory", "use GiB, GB or MiB: --gpu 24GiB")
    return float(number), WRITTEN[unit.lower()]
