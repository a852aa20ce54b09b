"""Charts as a PNG, drawn here: a picture of a run needs no library that draws."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from qlora_cli.report.charts import HEIGHT, WIDTH, Chart, Kind, Line, Words, drawn
from qlora_cli.report.letters import CELL, letter

MARK = b"qlora report"
"""In the beginning of every picture, as its `Software`, so that no other file is ever overwritten."""

SCALE = 2
"""Pixels of a unit of a chart, and GAP units between charts, which stand in COLUMNS below their titles."""
GAP, TITLE, COLUMNS = 12, 22, 2

INK = (28, 31, 35)
COLOURS: dict[Kind, tuple[tuple[int, int, int], float, float]] = {
    "grid": ((217, 220, 225), 1.0, 1.5),
    "axis": ((102, 102, 119), 1.0, 1.5),
    "main": ((11, 107, 52), 1.0, 3.6),
    "faint": ((11, 107, 52), 0.35, 2.0),
    "second": ((179, 71, 10), 1.0, 3.6),
    "limit": ((28, 31, 35), 1.0, 3.0),
}
"""Colour, strength and width in pixels of each kind of line: those of the page by daylight."""

DASHES: dict[Kind, tuple[float, float]] = {"second": (6, 3), "limit": (2, 3)}
"""Drawn and left out, in units of a chart."""


def picture(charts: Sequence[Chart]) -> bytes:
    """The charts as a PNG file, the first of them top left; one alone fills it."""
    columns = min(COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    across, down = WIDTH + GAP, TITLE + HEIGHT + GAP
    canvas = np.full((SCALE * (rows * down + GAP), SCALE * (columns * across + GAP), 3), 255, dtype=np.float32)
    for at, chart in enumerate(charts):
        x, y = SCALE * (GAP + at % columns * across), SCALE * (GAP + at // columns * down)
        write(canvas, chart.title, x + 8, y + 30, INK)
        place = canvas[y + SCALE * TITLE :, x : x + SCALE * WIDTH]
        for mark in drawn(chart):
            if isinstance(mark, Words):
                put(place, mark)
            else:
                stroke(place, mark)
    return encoded(canvas.round().astype(np.uint8))


def put(canvas: np.ndarray, words: Words) -> None:
    """Writes words where a chart has them."""
    shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[words.anchor] * CELL[0] * len(words.text)
    write(canvas, words.text, round(SCALE * words.x - shift), round(SCALE * words.y), COLOURS["axis"][0])


def write(canvas: np.ndarray, text: str, x: int, y: int, colour: tuple[int, int, int]) -> None:
    """Writes a text from x on with its baseline at y; what is beyond the canvas is left out."""
    width, height = CELL
    for at, one in enumerate(text):
        left, top = x + at * width, y - height + 2
        if left >= 0 and top >= 0:
            place = canvas[top : top + height, left : left + width]
            cover = letter(one)[: place.shape[0], : place.shape[1]]
            blend(place, cover, colour)


def stroke(canvas: np.ndarray, line: Line) -> None:
    """Draws a line, or its dots, with smooth edges."""
    colour, strength, width = COLOURS[line.kind]
    points = np.array(line.points, dtype=np.float64) * SCALE
    cover = np.zeros(canvas.shape[:2], dtype=np.float32)
    if line.dots:
        for point in points:
            segment(cover, point, point, 3.2 * SCALE)
    elif dash := DASHES.get(line.kind):
        for begin, end in dashes(points, dash[0] * SCALE, dash[1] * SCALE):
            segment(cover, begin, end, width / 2)
    else:
        for begin, end in pairwise(points):
            segment(cover, begin, end, width / 2)
    blend(canvas, cover * strength, colour)


def segment(cover: np.ndarray, begin: np.ndarray, end: np.ndarray, radius: float) -> None:
    """Raises `cover`, (h, w) float32, to 1 within `radius` of a line, falling to 0 over one pixel."""
    low = np.maximum(np.floor(np.minimum(begin, end) - radius - 1), 0).astype(int)
    high = np.ceil(np.maximum(begin, end) + radius + 2).astype(int)
    place = cover[low[1] : high[1], low[0] : high[0]]
    rows, columns = np.indices(place.shape, dtype=np.float64)
    x, y = columns + low[0] + 0.5 - begin[0], rows + low[1] + 0.5 - begin[1]
    along = end - begin
    length = float(along @ along)
    part = np.clip((x * along[0] + y * along[1]) / length, 0, 1) if length else np.zeros_like(x)
    distance = np.hypot(x - part * along[0], y - part * along[1])
    np.maximum(place, np.clip(radius + 0.5 - distance, 0, 1), out=place)


def dashes(points: np.ndarray, drawn_length: float, gap: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """The drawn pieces of a line through points (n, 2), which begins with a drawn one."""
    found, left, on = [], drawn_length, True
    for begin, end in pairwise(points):
        length = float(np.hypot(*(end - begin)))
        at = 0.0
        while length - at > 1e-9:
            step = min(left, length - at)
            if on:
                found.append((begin + (end - begin) * at / length, begin + (end - begin) * (at + step) / length))
            at, left = at + step, left - step
            if left <= 1e-9:
                on = not on
                left = drawn_length if on else gap
    return found


def blend(canvas: np.ndarray, cover: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Lays a colour over the canvas (h, w, 3), as much of it as `cover` (h, w) says."""
    canvas += cover[..., None] * (np.array(colour, dtype=np.float32) - canvas)


def encoded(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels (h, w, 3) uint8, with our mark right behind its header (W3C PNG, third edition)."""
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each begins with its filter: none
    lines[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"tEXt", b"Software\0" + MARK),
        (b"IDAT", zlib.compress(lines.tobytes(), 6)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*one) for one in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
