"""Axes with round ticks: which range is shown, where a value lies in it, and how a tick is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ROUND = (1.0, 2.0, 5.0, 10.0)
"""Steps between ticks, times a power of ten."""

SPANS_DECADES = 30.0
"""Positive values whose largest is so many times the least are shown on a logarithmic axis."""


@dataclass(frozen=True)
class Axis:
    """What is shown from `low` to `high`, with its ticks in rising order."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high one."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def labels(self) -> list[str]:
        """Every tick in words, all of them in the same manner."""
        small = max(map(abs, self.ticks)) < 1e-3 or (self.log and self.low < 1e-4)
        return [in_words(tick, small) for tick in self.ticks]


def axis_of(values: Sequence[float], *, about: int = 5, from_zero: bool = False) -> Axis:
    """An axis for finite values, logarithmic where they span decades. from_zero: 0 is always in it."""
    low, high = min(values), max(values)
    if not from_zero and low > 0 and high / low >= SPANS_DECADES:
        return log_axis(low, high)
    if from_zero or 0 < low < 0.4 * high:
        low, high = min(low, 0.0), max(high, 0.0)
    return linear_axis(low, high, about)


def steps_axis(last: float) -> Axis:
    """From 0 to the last step, whole numbers as ticks."""
    ticks = [tick for tick in linear_axis(0.0, max(last, 1.0)).ticks if tick <= last and tick == round(tick)]
    return Axis(0.0, max(last, 1.0), tuple(ticks) or (0.0,))


def linear_axis(low: float, high: float, about: int = 5) -> Axis:
    """From a round number at or below `low` to one at or above `high`, with about so many steps between them."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: it is in the middle, also of an axis from 0
        reach = abs(low) or 1.0
        low, high = low - reach, low + reach
    step = round_step((high - low) / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float) -> Axis:
    """From a round number at or below `low` to one at or above `high`: powers of ten, between few also 2 and 5."""
    marks = [m * 10.0**power for power in range(_power(low), _power(high) + 1) for m in ROUND[:3]]
    below = [mark for mark in marks if mark <= low * (1 + 1e-9)]
    first = below[-1] if below else marks[0]
    marks.append(10.0 ** (_power(high) + 1))
    last = next(mark for mark in marks if mark >= high * (1 - 1e-9))
    inside = [float(f"{mark:.12g}") for mark in marks if first <= mark <= last]
    tens = [tick for tick in inside if math.isclose(tick, 10.0 ** round(math.log10(tick)))]
    every = -(-len(tens) // 7)
    ticks = tens[::every] if len(tens) > 2 else inside
    return Axis(first, last, tuple(ticks), log=True)


def round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** _power(least)
    return next(mark * power for mark in ROUND if mark * power >= least * (1 - 1e-9))


def in_words(value: float, small: bool = False) -> str:
    """A number as people write it: 1,200, 0.05, 2e-5, 3.5M. small: with a power of ten in any case."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:,.4g}M" if size < 1e9 else f"{value:.3g}".replace("e+", "e")
    if small or size < 1e-4:
        number, _, power = f"{value:.2e}".partition("e")
        return f"{number.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:,.0f}" if size >= 1000 and value == round(value) else f"{value:,.6g}"


def _power(value: float) -> int:
    return math.floor(math.log10(value) + 1e-12)
