"""The largest whole number whose cost stays within a budget, with few questions: each is a rehearsal of seconds."""

from __future__ import annotations

from collections.abc import Callable

FASTEST = 8
"""So many times the last number that fits is the next one, at most."""


def largest_within(cost: Callable[[int], int], budget: int, most: int) -> int:
    """The largest number from 1 to `most` with cost(number) <= budget, for a cost that never falls; 0: not even 1.

    Every answer was asked for, none extrapolated. A question is set where the line through two answers meets the
    budget: the last two until one is too large, then its neighbours, and every other time of these in the middle.
    """
    known = {1: cost(1)}
    if known[1] > budget:
        return 0
    before, low = 0, 1
    while low < most:
        at = 2 if before == 0 else _meets((before, low), known, budget, FASTEST * low)
        at = min(at, most)
        known[at] = cost(at)
        if known[at] > budget:
            return _between(cost, budget, (low, at), known)
        before, low = low, at
    return low


def _between(cost: Callable[[int], int], budget: int, between: tuple[int, int], known: dict[int, int]) -> int:
    """As largest_within, where the first of two numbers is known to fit and the second not to."""
    (low, high), halve = between, False
    while high - low > 1:
        at = (low + high) // 2 if halve else _meets((low, high), known, budget, high - 1)
        known[at] = cost(at)
        low, high = (at, high) if known[at] <= budget else (low, at)
        halve = not halve
    return low


def _meets(through: tuple[int, int], known: dict[int, int], budget: int, most: int) -> int:
    """Where the line through two answers meets the budget, within one above the last that fits and `most`."""
    first, second = through
    rise = known[second] - known[first]
    fits = second if known[second] <= budget else first
    at = first + (second - first) * (budget - known[first]) // rise if rise > 0 else most
    return min(max(at, fits + 1), most)
