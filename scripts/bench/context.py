"""G3: the longest row of one step that fits into 8, 16 and 24 GiB of GPU memory, by bisection over fresh processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import CONTEXT, LIMITS_GIB, Case
from process import Died, Machine, Worker

GRAIN = 512
"""Lengths are multiples of this."""

LONGEST = 2**17


def longest_contexts(machine: Machine, contestants: Sequence[str]) -> dict[str, Any]:
    """Tokens by contestant and limit; 0 where not even GRAIN tokens fit. In `tried` every length and what came out."""
    found: dict[str, Any] = {"case": CONTEXT.name, "tokens": {}, "tried": []}
    with tempfile.TemporaryDirectory() as name:
        installed = [one for one in contestants if machine.versions(one, Path(name))]
    for contestant in contestants:
        for gib in LIMITS_GIB:
            place = f"{contestant}, {gib} GiB"
            if contestant not in installed:
                found["tokens"][place] = "not installed"
                continue

            def fits(length: int, contestant: str = contestant, gib: int = gib) -> bool:
                outcome = try_one(replace(CONTEXT, length=length, memory_limit_gib=gib), machine, contestant)
                found["tried"].append([contestant, gib, length, outcome])
                return outcome

            found["tokens"][place] = longest(fits)
    return found


def longest(fits: Callable[[int], bool], grain: int = GRAIN, most: int = LONGEST) -> int:
    """The largest multiple of `grain` up to `most` that fits, within 3%; 0 where none does."""
    low, high = 0, 2 * grain
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + grain)
    while high - low > max(grain, 0.03 * low):
        middle = (low + high) // 2 // grain * grain
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def try_one(case: Case, machine: Machine, contestant: str) -> bool:
    """Whether two steps fit. Raises Died for whatever else goes wrong."""
    with tempfile.TemporaryDirectory(prefix="qlora-bench-") as name:
        case = replace(case, total_steps=2, folder=name)
        file = case.write(Path(name) / "case.json")
        machine.call("ours", Path(name), "prepare.py", str(file), str(machine.models), str(machine.data))
        worker = None
        try:
            worker = Worker(machine, contestant, file)
            worker.ask("steps", 2)
        except Died as died:
            if "out of memory" not in died.said.lower():
                raise
            return False
        finally:
            if worker:
                worker.stop()
    return True


def table(found: dict[str, Any]) -> str:
    """Tokens by contestant and limit."""
    lines = [f"\n## {found['case']}\n", "| contestant and limit | tokens |", "|---|---|"]
    told = {place: f"{tokens:,}" if isinstance(tokens, int) else tokens for place, tokens in found["tokens"].items()}
    return "\n".join([*lines, *(f"| {place} | {tokens} |" for place, tokens in told.items())])
