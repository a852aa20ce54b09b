"""A chart as lines and words on a plane of WIDTH x HEIGHT, which a page and a picture draw each in its own way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qlora_cli.report.scales import Axis, axis_of, steps_axis

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 30, 40
"""Margins around the plane of the data, for the words."""

MOST_POINTS = 600
"""So many points a line is drawn with at most: more than the pixels of a column show."""

LETTER, MOST_LETTERS = 7.6, 18
"""Room for a letter of a legend in any font, and letters that are shown of a name: two of them fit beside the unit."""

Point = tuple[float, float]
Kind = Literal["grid", "axis", "main", "faint", "second", "limit"]
"""main: the first line; faint: what it is the mean of; second: dashed; limit: dotted."""


@dataclass(frozen=True)
class Series:
    """One line of a chart, at points in rising order of x. dots: marked, as those of evaluations are."""

    name: str
    points: Sequence[Point]
    kind: Kind = "main"
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over steps. key: a word for ids. unit: of what the vertical axis shows."""

    key: str
    title: str
    unit: str
    series: tuple[Series, ...]
    from_zero: bool = False

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """The horizontal and the vertical one."""
        xs = [x for one in self.series for x, _ in one.points]
        ys = [y for one in self.series for _, y in one.points]
        return steps_axis(max(xs)), axis_of(ys, from_zero=self.from_zero)


@dataclass(frozen=True)
class Line:
    """A line through points, or only its dots where `dots`."""

    kind: Kind
    points: tuple[Point, ...]
    dots: bool = False


@dataclass(frozen=True)
class Words:
    """A text whose baseline is at y, at x by its start, middle or end."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"]


def drawn(chart: Chart) -> Iterator[Line | Words]:
    """The grid, the ticks, the lines and the legend, from the back to the front."""
    across, up = chart.axes
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick, label in zip(up.ticks, up.labels(), strict=True):
        y = _y(up, tick)
        yield Line("grid", ((LEFT, y), (right, y)))
        yield Words(LEFT - 6, y + 4, label, "end")
    for tick, label in zip(across.ticks, across.labels(), strict=True):
        x = _x(across, tick)
        yield Line("axis", ((x, bottom), (x, bottom + 4)))
        yield Words(x, bottom + 17, label, "middle")
    yield Line("axis", ((LEFT, bottom), (right, bottom)))
    yield Words(right, HEIGHT - 6, "step", "end")
    yield Words(4, 14, f"{chart.unit}, log scale" if up.log else chart.unit, "start")
    for one in chart.series:
        points = tuple((_x(across, x), _y(up, y)) for x, y in thinned(one.points))
        if len(points) > 1:
            yield Line(one.kind, points)
        if one.dots or len(points) == 1:
            yield Line(one.kind, points, dots=True)
    yield from legend([one for one in chart.series if one.kind != "faint"] if len(chart.series) > 1 else [])


def legend(series: Sequence[Series]) -> Iterator[Line | Words]:
    """A short line and a name for each series, from the right end of the first row on."""
    x = float(WIDTH - RIGHT)
    for one in reversed(series):
        name = one.name if len(one.name) <= MOST_LETTERS else f"...{one.name[3 - MOST_LETTERS :]}"
        yield Words(x, 14, name, "end")
        x -= LETTER * len(name) + 6
        yield Line(one.kind, ((x - 22, 10), (x, 10)))
        if one.dots:
            yield Line(one.kind, ((x - 11, 10),), dots=True)
        x -= 36


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS of the points: of each stretch its lowest and its highest, so that no peak is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    kept: list[Point] = []
    size = math.ceil(len(points) / (MOST_POINTS // 2))
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        lowest, highest = min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])
        kept += sorted({lowest, highest})
    return kept


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of up to `window` points around each: in the beginning, where a loss falls, of as many on both sides."""
    half, found = window // 2, []
    for at, (x, _) in enumerate(points):
        reach = min(half, at)
        near = [y for _, y in points[at - reach : at + reach + 1]]
        found.append((x, math.fsum(near) / len(near)))
    return found


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM)
