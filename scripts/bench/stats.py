"""The median of paired ratios with a percentile bootstrap (Efron 1979), by the standard library alone."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Ratio(NamedTuple):
    """The median of pair ratios, the ends of its 95% interval, and the ratio of the two minima."""

    median: float
    low: float
    high: float
    of_minima: float


def paired_ratio(slow: Sequence[float], fast: Sequence[float], resamples: int = 10_000, seed: int = 0) -> Ratio:
    """slow[i] / fast[i], of turn i both. With few pairs the interval is as wide as the pairs lie apart."""
    assert len(slow) == len(fast) > 0, "pairs"
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    draws = random.Random(seed)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(resamples))
    low, high = medians[round(0.025 * (resamples - 1))], medians[round(0.975 * (resamples - 1))]
    return Ratio(statistics.median(ratios), low, high, min(slow) / min(fast))


def turns(names: Sequence[str], number: int) -> list[list[str]]:
    """Who goes when, turn by turn: A B C, C B A, A B C, ... so that a drift of the machine hits all alike."""
    return [list(names[:: 1 if turn % 2 == 0 else -1]) for turn in range(number)]
