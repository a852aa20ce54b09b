"""The picture: a PNG that any reader takes, with the lines where the numbers are."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from qlora_cli.report.charts import HEIGHT, MOST_POINTS, WIDTH, Chart, Line, Series, Words, drawn, smoothed, thinned
from qlora_cli.report.letters import DOTS, letter
from qlora_cli.report.png import GAP, MARK, SCALE, TITLE, dashes, picture

FALLING = tuple((float(step), 10.0 - step / 10) for step in range(101))


def pixels(png: bytes) -> np.ndarray:
    """(h, w, 3) uint8 of a PNG without filters; every chunk's checksum is looked at."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(png):
        size, name = struct.unpack(">I4s", png[at : at + 8])
        content = png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + content)
        chunks.append((name, content))
        at += 12 + size
    assert [name for name, _ in chunks] == [b"IHDR", b"tEXt", b"IDAT", b"IEND"]
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[0][1])
    assert kind == [8, 2, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[2][1]), dtype=np.uint8).reshape(height, 1 + 3 * width)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def green(found: np.ndarray) -> np.ndarray:
    """Which pixels are of the first line's colour."""
    return (np.abs(found.astype(int) - (11, 107, 52)) < 20).all(axis=2)


def test_a_line_is_where_its_numbers_are():
    chart = Chart("loss", "Loss", "nats", (Series("train", FALLING),), from_zero=True)
    found = green(pixels(picture([chart])))
    line = next(one for one in drawn(chart) if isinstance(one, Line) and one.kind == "main")
    for x, y in (line.points[0], line.points[-1]):
        column, row = round(SCALE * (GAP + x)), round(SCALE * (GAP + TITLE + y))
        assert found[row - 3 : row + 4, column - 3 : column + 4].any(), (x, y)
    rows = [np.flatnonzero(found[:, column]).mean() for column in np.flatnonzero(found.any(axis=0))]
    assert np.all(np.diff(rows) > -0.6), "it falls all the way"


def test_charts_stand_two_in_a_row_and_one_alone_fills_it():
    chart = Chart("loss", "Loss", "nats", (Series("train", FALLING),))
    sizes = [pixels(picture([chart] * number)).shape for number in (1, 2, 3, 6)]
    assert [(height > 700, width > 1500) for height, width, _ in sizes] == [
        (False, False), (False, True), (True, True), (True, True),
    ]  # fmt: skip


def test_the_mark_is_in_the_beginning():
    assert MARK in picture([Chart("loss", "Loss", "nats", (Series("train", FALLING),))])[:200]


def test_one_logged_step_is_a_dot():
    marks = [*drawn(Chart("loss", "Loss", "nats", (Series("train", [(10.0, 2.0)]),)))]
    assert [mark.dots for mark in marks if isinstance(mark, Line) and mark.kind == "main"] == [True]
    assert green(pixels(picture([Chart("loss", "Loss", "nats", (Series("train", [(10.0, 2.0)]),))]))).sum() > 50


def test_all_that_is_drawn_is_inside_of_the_chart():
    names = ("a_very.long/name of a task.with_a_metric,and-a-filter", "another.one of the same kind, and longer")
    series = tuple(Series(name, FALLING, kind, True) for name, kind in zip(names, ("main", "second"), strict=True))
    for mark in drawn(Chart("shares", "Shares", "share", series)):
        places = [(mark.x, mark.y)] if isinstance(mark, Words) else mark.points
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places), mark
        if isinstance(mark, Words) and mark.anchor == "end":
            assert mark.x - 7.6 * len(mark.text) > 0, mark


def test_many_points_become_few_and_no_peak_is_lost():
    points = [(float(step), 1.0) for step in range(50_000)]
    points[31_234] = (31_234.0, 99.0)
    points[40_001] = (40_001.0, -5.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert points[31_234] in kept
    assert points[40_001] in kept
    assert kept == sorted(kept)


def test_a_mean_keeps_the_first_point_and_lies_between_its_neighbours():
    noisy = [(float(at), float(at % 2)) for at in range(100)]
    found = smoothed(noisy, 20)
    assert found[0] == noisy[0]
    assert all(0.4 <= value <= 0.6 for _, value in found[10:90])


def test_dashes_cover_their_share_of_a_line():
    pieces = dashes(np.array([[0.0, 0.0], [30.0, 0.0], [30.0, 60.0]]), 6, 3)
    assert sum(float(np.hypot(*(end - begin))) for begin, end in pieces) == pytest.approx(60)


def test_every_letter_is_there_and_another_is_a_question_mark():
    assert len(DOTS) == 10 * 95
    drawn_letters = {letter(chr(code)).tobytes() for code in range(32, 127)}
    assert len(drawn_letters) == 95
    assert (letter("é") == letter("?")).all()
    assert not letter(" ").any()
