"""Rows in portions: their size, their order, and the sides of eval_fraction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import SHORT, make_job, numbered, write_rows

from qlora_cli.data import portions as portions_module
from qlora_cli.data.cache import Wanted
from qlora_cli.data.limits import Limits
from qlora_cli.data.portions import DEEPEST, MOST_ROWS, Portion, is_wanted, num_characters, portions
from qlora_cli.data.readers import DataFile
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Source

SETTINGS = make_job().settings


def wanted(side: Any = "train", fraction: float = 0.0, seed: int = 1) -> Wanted:
    return Wanted("train", (), SETTINGS, Limits(9), True, fraction, seed, side)


def portions_of(path: Path, of: Wanted | None = None, **source: Any) -> list[Portion]:
    return [*portions(Source(path=str(path), **source), [DataFile(str(path))], of or wanted())]


def nested(depth: int) -> Any:
    value: Any = "a"
    for _ in range(depth):
        value = [value]
    return value


def test_a_portion_has_rows_with_places_and_what_is_none_between_them(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [7, SHORT, SHORT, "[", SHORT, "8"])
    (portion,) = portions_of(path)
    assert portion.task.rows == [SHORT] * 3
    assert portion.task.places == [f"{path}:{line}" for line in (2, 3, 5)]
    assert portion.places == [(0, 2), (0, 3), (0, 5)]
    assert [index for index, _ in portion.unread] == [0, 2, 3]
    assert [error.where.split(":")[1] for _, error in portion.unread] == ["1", "4", "6"]
    assert (portion.num_rows, portion.failure) == (6, None)
    assert (portion.task.format, portion.task.auto, portion.task.template) == ("question_answer", True, None)


def test_a_portion_ends_with_so_many_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [numbered(n) if n % 3 else n for n in range(2 * MOST_ROWS + 1)])
    found = portions_of(path)
    assert [portion.num_rows for portion in found] == [MOST_ROWS, MOST_ROWS, 1]
    rows = [row for portion in found for row in portion.task.rows]
    assert rows == [numbered(n) for n in range(2 * MOST_ROWS + 1) if n % 3]


def test_a_portion_ends_with_so_many_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions_module, "MOST_CHARACTERS", 100)
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a" * length} for length in (30, 30, 40, 500, 96, 1)])
    assert [portion.num_rows for portion in portions_of(path)] == [3, 1, 1, 1]


def test_the_format_is_the_recipes_or_that_of_the_first_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"what": 1}, {"text": "a"}, SHORT])
    (portion,) = portions_of(path)
    assert (portion.task.format, portion.task.auto, len(portion.unread)) == ("text", True, 1)
    (portion,) = portions_of(path, format="alpaca")
    assert (portion.task.format, portion.task.auto, len(portion.task.rows)) == ("alpaca", False, 3)
    template = {"prompt": "a", "completion": "b", "pair": None, "chat": False}
    (portion,) = portions_of(path, template=template)
    assert (portion.task.format, portion.task.auto, portion.task.template) == ("template", False, template)


def test_both_sides_have_the_format_of_the_very_first_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT, *({"text": f"{n}"} for n in range(50))])
    for side in ("train", "eval"):
        (portion,) = portions_of(path, wanted(side, 0.5))
        assert portion.task.format == "question_answer"


def test_what_ends_the_reading_stands_behind_the_rows_before_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([SHORT, SHORT])[:-1] + ", {")
    (portion,) = portions_of(tmp_path / "a.json")
    assert len(portion.task.rows) == 2
    assert isinstance(portion.failure, UserError)
    (portion,) = portions_of(tmp_path / "missing.jsonl")
    assert isinstance(portion.failure, UserError)


def test_a_row_that_is_nested_too_deeply_is_none(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": nested(DEEPEST - 1)}, {"text": nested(DEEPEST)}, {"text": "a"}])
    (portion,) = portions_of(path, format="text")
    ((index, error),) = portion.unread
    assert index == 1
    assert str(error) == (f"{path}:2: objects and lists are nested more than {DEEPEST} deep. Mend or remove the row.")


@pytest.mark.parametrize("depth", [250, 400, 800, 990, 5000, 100_000])
def test_no_depth_of_nesting_breaks_the_parent(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' + "[" * depth + "]" * depth + "}\n" + '{"text": ' * depth + "1" + "}" * depth + "\n")
    (portion,) = portions_of(path, wanted("train", 0.5), format="text")
    assert [index for index, _ in portion.unread] == [0, 0]
    assert portion.failure is None


def test_characters_are_counted_at_any_depth() -> None:
    assert num_characters({}) == 0
    assert num_characters({"ab": "cde", "f": ["gh", {"i": "jkl"}, 7, None, 1.5], "": ""}) == 12


# ── eval_fraction ────────────────────────────────────────────────────────────────────────────────────────────────────

ROW = st.dictionaries(st.text(max_size=3), st.text(max_size=9) | st.integers() | st.lists(st.text(max_size=3)))


@given(ROW, st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_every_row_is_on_one_side(row: dict[str, Any], fraction: float, seed: int) -> None:
    sides = [is_wanted(row, wanted(side, fraction, seed)) for side in ("train", "eval")]
    assert sorted(sides) == [False, True]
    turned = dict(reversed(row.items()))
    assert [is_wanted(turned, wanted(side, fraction, seed)) for side in ("train", "eval")] == sides


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_the_held_out_part_is_close_to_the_fraction(fraction: float) -> None:
    held = sum(is_wanted(numbered(number), wanted("eval", fraction)) for number in range(10_000))
    assert abs(held / 10_000 - fraction) < 4 * (fraction * (1 - fraction) / 10_000) ** 0.5


def test_a_larger_fraction_holds_out_the_same_rows_and_more() -> None:
    held = [{n for n in range(1000) if is_wanted(numbered(n), wanted("eval", part))} for part in (0.1, 0.3)]
    assert held[0] < held[1]


def test_the_sides_never_change_between_versions() -> None:
    assert [n for n in range(40) if is_wanted(numbered(n), wanted("eval", 0.2))] == [
        2,
        16,
        20,
        21,
        22,
        26,
        28,
        29,
        30,
        33,
    ]
