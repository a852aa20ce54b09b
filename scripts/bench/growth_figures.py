"""The figures of growth.py: ratios out of what was measured, each with its bound."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stats import paired_ratio

FLAT = (0.95, 1.05)


@dataclass(frozen=True)
class Figure:
    """A ratio, its bounds (None: none), where it lies with 95% or over the turns, and in words what it is of."""

    name: str
    value: float
    bound: tuple[float | None, float]
    told: str
    spread: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        """Of the ratio alone; of NaN missed."""
        low, high = self.bound
        return "ok" if (low is None or low <= self.value) and self.value <= high else "missed"

    def line(self) -> str:
        """A row of the table."""
        low, high = self.bound
        spread = f" [{self.spread[0]:.3f}, {self.spread[1]:.3f}]" if self.spread else ""
        bound = f"< {high:g}" if low is None else f"{low:g} to {high:g}"
        return f"| {self.name} | {self.value:.3f}{spread} | {bound} | {self.verdict} | {self.told} |"


def of_tokens(found: Mapping[str, Any]) -> list[Figure]:
    """The slope over the medians, and those of single turns."""
    sizes = [*map(int, found["seconds"])]
    medians = [statistics.median(seconds) for seconds in found["seconds"].values()]
    single = [slope(sizes, seconds) for seconds in zip(*found["seconds"].values(), strict=True)]
    told = ", ".join(f"{1000 * median:.0f} ms" for median in medians)
    told = f"{told} at {', '.join(map(str, sizes))} tokens"
    return [Figure("tokens: slope", slope(sizes, medians), (0.95, 1.1), told, (min(single), max(single)))]


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The least-squares slope of log seconds over log sizes."""
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, seconds)]).slope


def of_rows(found: Mapping[str, Any]) -> list[Figure]:
    """Step time and memory of every larger run against the smallest."""
    few, *more = found["runs"]
    figures = []
    for many in more:
        which = f"{many['rows']:,} ÷ {few['rows']:,}"
        ratio = paired_ratio(many["seconds"], few["seconds"])
        medians = [1000 * statistics.median(run["seconds"]) for run in (many, few)]
        told = "{:.1f} and {:.1f} ms a step".format(*medians)
        figures.append(Figure(f"rows: step, {which}", ratio.median, FLAT, told, (ratio.low, ratio.high)))
        peaks = [run["memory"]["peak_bytes"] for run in (many, few)]
        told = "{:.1f} and {:.1f} MB".format(*(peak / 1e6 for peak in peaks))
        figures.append(Figure(f"rows: memory, {which}", peaks[0] / peaks[1], FLAT, told))
    return figures


def of_loss(found: Mapping[str, Any]) -> list[Figure]:
    """By vocabulary, the number of chunks whose memory is furthest from that of one."""
    figures = []
    for vocabulary, one in found["vocabularies"].items():
        ratios = [taken / one["bytes"][0] for taken in one["bytes"][1:]]
        told = ", ".join(f"{taken / 1e6:.1f}" for taken in one["bytes"])
        told = f"{told} MB at {', '.join(map(str, one['chunks']))} chunks of {one['chunk_tokens']} tokens"
        figures.append(Figure(f"loss: {vocabulary} entries", max(ratios, key=lambda one: abs(one - 1)), FLAT, told))
    return figures


def of_rank(found: Mapping[str, Any]) -> list[Figure]:
    """The larger rank's step against the smaller one's."""
    (low, few), (high, many) = found["seconds"].items()
    ratio = paired_ratio(many, few)
    told = f"{1000 * statistics.median(many):.0f} and {1000 * statistics.median(few):.0f} ms a step"
    return [Figure(f"rank: {high} ÷ {low}", ratio.median, (None, 1.1), told, (ratio.low, ratio.high))]


def of_checkpoint(found: Mapping[str, Any]) -> list[Figure]:
    """What the loop waits, and what it loses in all, in steps."""
    step, saves = found["step_s"], found["saves"]
    waits = [one["save_s"] / step for one in saves]
    slower = [sum(seconds / step - 1 for seconds in one["steps"][: one["beside"]]) for one in saves]
    written = statistics.median(one["write_s"] for one in saves)
    following = statistics.median(one["steps"][0] for one in saves)
    waited = statistics.median(one["save_s"] for one in saves)
    told = f"{1000 * waited:.1f} ms of a step's {1000 * step:.0f}, written in {1000 * written:.0f}"
    beside = f"the next step takes {1000 * following:.0f} ms, {following / step:.3f} of one with no writer"
    lost = [wait + more for wait, more in zip(waits, slower, strict=True)]
    figures = (("the loop waits", waits, told), ("waits and slows down", lost, beside))
    bound = (None, 1.0)
    return [
        Figure(f"checkpoint: {name}, steps", statistics.median(all_), bound, words, (min(all_), max(all_)))
        for name, all_, words in figures
    ]


FIGURES = {"tokens": of_tokens, "rows": of_rows, "loss": of_loss, "rank": of_rank, "checkpoint": of_checkpoint}
