"""Whatever one value of a run's files is, `qlora report` writes its page and its picture, or says what is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_cli.errors import UserError
from qlora_cli.report import write_report
from qlora_cli.report.charts import HEIGHT, WIDTH, Words, drawn
from qlora_cli.report.curves import charts
from qlora_cli.report.reading import RunFiles, number, read_run
from qlora_cli.report.run import run_page
from tests.report.conftest import FACTS, RECIPE, step

FIGURE = {"value": 2.0, "low": 1.5, "high": 2.5}
ANSWER = {"row": 0, "where": "rows.jsonl:1", "prompt": "1+1?", "generated": "2", "references": ["2", "two"]}
FILES: dict[str, list[Any]] = {
    "resolved.yaml": [RECIPE],
    "run.json": [FACTS],
    "metrics.jsonl": [
        step(1), step(2), {"step": 2, "eval_loss": 4.0, "eval_accuracy": 0.5}, step(3), {"step": 3, "eval_loss": 3.0}
    ],
    "eval/quiz.json": [{
        "rows": 3, "notes": ["few rows"], "models": {"base": {"loss": FIGURE}, "adapter": {"loss": FIGURE}},
        "differences": [{"of": "adapter", "to": "base", "figures": {"loss": FIGURE}}],
    }],
    "eval/quiz.base.jsonl": [{"key": {}}, ANSWER],
    "eval/quiz.adapter.jsonl": [{"key": {}}, ANSWER],
    "merged/merge.json": [{
        "dtype": "bfloat16", "base": "original",
        "certificate": {"held": True, "mean_kl": 1e-5, "top1_agreement": 0.998, "limit": {"mean_kl": 0.01}},
    }],
}  # fmt: skip
"""A run by its files, each with the objects that are its lines, or the one that it is."""

Place = tuple[str, tuple[Any, ...]]
VALUES: list[Any] = [
    None, True, 0, -1, 5, 10**400, 1e308, -1e308, 1e300, 1e-300, 5e-324, float("nan"), float("inf"), "", "x", "a/b",
    "\ud800", "x" * 300, [], [1], [None], {}, {"a": 1}, {"value": "x"}, {"a/b": {}}, {"x" * 300: {"loss": 1}},
    {"models": {}},
]  # fmt: skip


def places(found: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in objects and lists."""
    inside = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for name, value in inside:
        yield (*above, name)
        yield from places(value, (*above, name))


PLACES: list[Place] = [(name, way) for name, objects in FILES.items() for way in places(objects) if len(way) > 1]


def write_file(folder: Path, name: str, objects: list[Any]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".yaml"):
        path.write_text(yaml.safe_dump(objects[0]))
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in objects))


def assert_is_drawn(run: RunFiles) -> None:
    """All that the page and the picture draw lies on the chart; to colour its pixels would take a second."""
    for mark in (mark for chart in charts(run) for mark in drawn(chart)):
        for x, y in [(mark.x, mark.y)] if isinstance(mark, Words) else mark.points:
            assert -1 <= x <= WIDTH + 1
            assert -1 <= y <= HEIGHT + 1


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "run"
    for name, objects in FILES.items():
        write_file(folder, name, objects)
    (folder / "adapter").mkdir()
    return folder


def test_the_run_that_is_damaged_below_has_all_that_a_report_shows(whole_run):
    result = write_report(whole_run)
    page = (whole_run / "report.html").read_text()
    assert result["notes"] == []
    for title in ("Plan and reality", "quiz, 3 rows", "In training", "The certificate holds", "✓ as expected"):
        assert title in page


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PLACES), st.sampled_from(VALUES) | st.floats() | st.integers() | st.text())
@example(("merged/merge.json", (0, "certificate", "held")), "yes")
def test_whatever_one_value_is_the_report_is_written_or_refused(whole_run, place, value):
    name, way = place
    objects = copy.deepcopy(FILES[name])
    inside: Any = objects
    for key in way[:-1]:
        inside = inside[key]
    inside[way[-1]] = value
    write_file(whole_run, name, objects)
    try:
        run = read_run(whole_run)
        run_page(run).encode()
        assert_is_drawn(run)
    except UserError:
        assert name == "resolved.yaml", "the recipe alone has to be one"
    finally:
        write_file(whole_run, name, FILES[name])


@pytest.mark.parametrize("losses", [(1e300, 1e-300), (5.0, 5.0 + 1e-15), (1e308, 1.0), (-1e300, 1e300), (0.0, 0.0)])
def test_two_losses_of_any_size_are_drawn(made_run, losses):
    run = read_run(made_run([step(at, loss=loss) for at, loss in enumerate(losses, 1)]))
    run_page(run)
    assert_is_drawn(run)


@pytest.mark.parametrize("levels", [60, 900, 100_000])
def test_what_is_nested_too_deep_is_noted(made_run, levels):
    text = '{"a":' * levels + "1" + "}" * levels
    lines = [step(1), text + "\n"]
    run = read_run(made_run(lines, facts=None, files={"run.json": text, "merged/merge.json": text}))
    run_page(run)
    assert len(run.notes) == 3
    assert all("could not be read" in note for note in run.notes)


@pytest.mark.parametrize("value", [True, "1", None, 10**400, -(10**400), 1e308, 5e-324, float("nan"), float("inf")])
def test_what_is_no_number_that_can_be_drawn_is_none(value):
    assert number(value) is None


def test_a_step_no_run_reaches_is_left_out(made_run):
    run = read_run(made_run([step(1), step(1) | {"step": 1e200}, step(1) | {"step": -3}, step(1) | {"step": 10**400}]))
    assert [line["step"] for line in run.steps] == [1]
