"""The largest whole number whose cost stays within a budget, with few questions: each is a rehearsal of seconds."""

from __future__ import annotations

from collections.abc import Callable


def largest_within(cost: Callable[[int], int], budget: int, most: int) -> int:
    """The largest number from 1 to `most` with cost(number) <= budget, for a cost that never falls; 0: not even 1.

    Every answer was asked for, none extrapolated. Questions are set where a line through the two known neighbours meets
    the budget, which for a convex cost lies below the answer, and every other time in the middle.
    """
    known = {1: cost(1)}
    if known[1] > budget:
        return 0
    low, high = 1, 1
    while high < most and known[high] <= budget:
        low, high = high, min(most, high * 2)
        known[high] = cost(high)
    if known[high] <= budget:
        return high
    halve = False
    while high - low > 1:
        rise = known[high] - known[low]
        at = low + (high - low) * (budget - known[low]) // rise if rise > 0 and not halve else (low + high) // 2
        at = min(max(at, low + 1), high - 1)
        known[at] = cost(at)
        low, high = (at, high) if known[at] <= budget else (low, at)
        halve = not halve
    return low


def least_within(cost: Callable[[int], int], budget: int, most: int) -> int | None:
    """The least number from 0 to `most` with cost(number) <= budget, for a cost that never rises; None: none."""
    if cost(0) <= budget:
        return 0
    if most == 0 or cost(most) > budget:
        return None
    return most - max(0, largest_within(lambda less: cost(most - less), budget, most - 1))
