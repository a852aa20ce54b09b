"""The page of `qlora plan`: memory by kind, the lines around it, and what to change where it does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_cli.data.rows import count
from qlora_cli.data.view import visible
from qlora_cli.display import figures_table
from qlora_cli.plan.memory import LENGTH_STEP, MOST_ROWS, MOST_TOKENS

LABEL = 10
"""Columns of a line's label."""

GB, MB, LEAST_GB = 10**9, 10**6, 10**8
"""Bytes of the units, and from which on GB are told."""


def print_plan(result: dict[str, Any], console: Console | None = None) -> None:
    """The plan on one screen: what is planned, the table, the lines below it."""
    console = console or Console(highlight=False)
    print_lines(console, heading(result))
    console.print("", memory_table(result), "", sep="\n")
    print_lines(console, [*around(result), *advice(result), ("assumed", "; ".join(result["assumed"]))])


def print_lines(console: Console, lines: Any) -> None:
    """Labels and texts, the texts within the width of the page."""
    for label, text in lines:
        parts = wrap(visible(text), min(console.width, 100) - LABEL, break_long_words=False, break_on_hyphens=False)
        console.print(Text(f"{label:<{LABEL}}" + f"\n{'':<{LABEL}}".join(parts)), soft_wrap=True)


IN_HOST_MEMORY = {
    "weights": "weights",
    "optimizer": "paged state of the optimizer",
    "activations": "inputs of recomputed layers",
}
"""What kinds of memory are called that lie in the host's."""


def heading(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is planned, and for which device."""
    batch, device = result["batch"], result["device"]
    kind = "16 or 32 bits" if result["data_type"] == "none" else result["data_type"]
    yield "model", f"{result['model']}, {result['task']}, {kind}"
    yield "batch", f"{count(batch['rows'], 'row')} of {count(batch['tokens'], 'token')}"
    yield "device", f"{device['name']}: {size(device['budget_bytes'])}"


def memory_table(result: dict[str, Any]) -> Table:
    """The peak by kind, then what is held around it."""
    memory = result["memory"]
    allocated = memory["allocated_bytes"]
    unit = MB if allocated < LEAST_GB else GB
    table = figures_table("memory", ("MB" if unit == MB else "GB", "share"))
    for kind, num_bytes in memory["by_kind"].items():
        table.add_row(f" {kind}", f"{num_bytes / unit:,.2f}", f"{num_bytes / allocated:.1%}")
    table.add_row("allocated", f"{allocated / unit:,.2f}", "100.0%", style="bold")
    if result["device"]["kind"] == "cuda":
        table.add_row("reserved by the allocator", f"{memory['reserved_bytes'] / unit:,.2f}")
        table.add_row("the device's own context", f"{memory['context_bytes'] / unit:,.2f}")
        table.add_row("needed of the device", f"{memory['bytes'] / unit:,.2f}", style="bold")
    return table


def around(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Where the peak is, and what is needed beside the device's memory."""
    memory, disk = result["memory"], result["disk"]
    recomputed = f"{memory['layers_recomputed']} of {count(memory['layers'], 'layer')} recomputed"
    yield "peak", f"at {size(memory['allocated_bytes'])}, {memory['peak_at']}; {recomputed}"
    if keepable := memory["keepable_dequantised_bytes"]:
        yield "kept", f"{size(memory['kept_dequantised_bytes'])} of {size(keepable)} of dequantised weights"
    if memory["host_bytes"]:
        yield "host", in_host_memory(memory["host_bytes"], memory["host_by_kind"])
    parts = [f"{size(disk[part])} {part}" for part in ("checkpoints", "adapter", "base") if disk[part]]
    yield "disk", f"{size(disk['bytes'])} in {result['output_dir']}: {', '.join(parts)}"
    yield "run", length_of_run(result)


def in_host_memory(num_bytes: int, by_kind: dict[str, int]) -> str:
    """What lies beside a GPU's memory, and how much of it is what."""
    parts = [f"{size(one)} {IN_HOST_MEMORY[kind]}" for kind, one in by_kind.items()]
    return parts[0] if len(parts) == 1 else f"{size(num_bytes)}: {', '.join(parts)}"


def length_of_run(result: dict[str, Any]) -> str:
    """Rows, tokens and steps, as far as they are known."""
    rows, steps, tokens = result["rows"], result["steps"], result["tokens"]
    told = [] if steps is None else [count(steps, "step")]
    if tokens is not None:
        told.append(count(tokens, "token"))
    if rows is not None:
        each = f"{count(rows['tokens'], 'token')}, the longest row {rows['longest']:,}"
        told.append(f"an epoch has {count(rows['number'], 'row')} with {each}")
    return "; ".join(told) or "steps and tokens are known once rows are"


def advice(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Whether it fits, with the largest that does, or else what to change."""
    needed, budget = size(result["memory"]["bytes"]), result["device"]["budget_bytes"]
    if result["fits"]:
        yield "fits", f"{needed} of {size(budget)}"
        yield from largest(result)
        return
    context = result["memory"]["context_bytes"]
    about = "about " if result["memory"]["by_proportion"] else ""
    yield "too large", f"{about}{needed}, and the device has {size(budget)}"
    if context > budget:
        yield "change", f"no key makes it fit: the device's own context alone takes {size(context)}"
        return
    for at, change in enumerate(result["changes"]):
        keys = in_words({change["key"]: change["value"]})
        yield "" if at else "change", f"{keys}, and it takes {size(change['num_bytes'])}"
    if together := result["together"]:
        yield "change", several(together["keys"], together["num_bytes"], budget)


def several(keys: dict[str, Any], num_bytes: int, budget: int) -> str:
    """What keys come to of which none is enough alone."""
    if not keys:
        return "no key makes it smaller"
    take = "together take" if len(keys) > 1 else "takes"
    if num_bytes <= budget:
        return f"no key makes it fit alone; {in_words(keys)} {take} {size(num_bytes)}, which fits"
    return f"no keys make it fit: even {in_words(keys)} {take} {size(num_bytes)}"


def largest(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The largest micro-batch at this length, and the longest row in this micro-batch."""
    rows, length = result["largest"]["micro_batch_size"], result["largest"]["length"]
    batch, kind = result["batch"], result["device"]["kind"]
    if rows:
        more = " or more" if rows >= MOST_ROWS[kind] else ""
        yield "largest", f"training.micro_batch_size {rows:,}{more}, of rows of {batch['tokens']:,} tokens"
    if length:
        more = " or more" if length >= MOST_TOKENS[kind] else ""
        if length + LENGTH_STEP > (result["whole_length"] or math.inf):
            more = ", all that the model reads"
        yield "" if rows else "largest", f"rows of {length:,} tokens{more}, {batch['rows']:,} at once"


def in_words(keys: dict[str, Any]) -> str:
    """Keys with their values as a recipe has them."""
    return ", ".join(f"{key}: {json.dumps(value).strip(chr(34))}" for key, value in keys.items())


def size(num_bytes: int) -> str:
    """Bytes in GB, or in MB where they are few."""
    return f"{num_bytes / GB:,.2f} GB" if num_bytes >= LEAST_GB else f"{num_bytes / MB:,.2f} MB"
