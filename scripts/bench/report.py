"""What was measured, as Markdown and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stats import paired_ratio

HEADER = [
    "contestant",
    "trained tokens/s",
    "padded tokens/s",
    "of the GEMM roof",
    "time per token ÷ ours",
    "of the minima",
    "peak, MB",
    "above the weights, MB",
    "reserved, MB",
    "start, s",
    "to the first step, s",
]


def table(result: Mapping[str, Any]) -> str:
    """A case's table. Whoever has no ratio is told of below it."""
    found: Mapping[str, Any] = result["contestants"]
    reference = next(iter(found))
    roof = result["roof_flops_per_s"]
    lines = [f"\n## {result['case']}\n", f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    for name, values in found.items():
        if values["state"] == "measured":
            lines.append(f"| {' | '.join(cells(name, values, found[reference], roof[result['compute']]))} |")
    told = ", ".join(f"{flops / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, flops in roof.items())
    lines.append(f"\nGEMM roof: {told}. Compute in {result['compute']}.")
    for name, values in found.items():
        if values["state"] != "measured":
            first, *_, last = values["state"].splitlines()[:1] + values["state"].splitlines()[-1:]
            lines.append(f"{name}: {first}{'' if first == last else f': {last}'}")
    return "\n".join(lines)


def cells(name: str, values: Mapping[str, Any], ours: Mapping[str, Any], roof: float) -> list[str]:
    """One line: medians over the turns, the fastest turn in brackets."""
    per_token, reference = seconds_per_token(values), seconds_per_token(ours)
    middle, best = statistics.median(values["seconds"]), min(values["seconds"])
    ratio = paired_ratio(per_token, reference)
    memory = values["memory"]
    interval = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if values is not ours else "1"
    return [
        name,
        f"{1 / statistics.median(per_token):,.0f} ({1 / min(per_token):,.0f})",
        f"{statistics.median(values['padded']) / middle:,.0f}",
        f"{values['required_flops'] / middle / roof:.1%} ({values['required_flops'] / best / roof:.1%})",
        interval,
        f"{ratio.of_minima:.2f}",
        f"{memory['peak_bytes'] / 1e6:,.0f}",
        f"{(memory['peak_bytes'] - memory['weights_bytes']) / 1e6:,.0f}",
        f"{memory['reserved_bytes'] / 1e6:,.0f}" if "reserved_bytes" in memory else "–",
        f"{min(values['start_s']):.1f}",
        f"{min(values['first_step_s']):.1f}",
    ]


def seconds_per_token(values: Mapping[str, Any]) -> list[float]:
    """Seconds per trained token of every turn."""
    return [seconds / tokens for seconds, tokens in zip(values["seconds"], values["trained"], strict=True)]


def document(results: Sequence[Mapping[str, Any]], threads: int) -> dict[str, Any]:
    """Every measurement, and where it was taken."""
    return {"machine": machine(), "threads": threads, "command": [sys.executable, *sys.argv], "results": list(results)}


def machine() -> dict[str, Any]:
    """Processor, GPU, load and date."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": gpu(),
        "load_before": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def gpu() -> str | None:
    """Its name and driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
