"""The growth figures: their arithmetic, and every one measured to its end on a model of one layer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "scripts" / "bench"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module growth_figures."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield __import__("growth_figures")
    for file in BENCH.glob("*.py"):  # their names are short: another folder may have them too
        sys.modules.pop(file.stem, None)


def test_every_figure_is_measured_and_printed_with_its_bound(tmp_path: Path) -> None:
    result = tmp_path / "growth.json"
    small = ["--layers", "1", "--hidden", "36", "--length", "24", "--rows", "40", "80", "--turns", "2"]
    command = [sys.executable, str(BENCH / "growth.py"), *small, "--threads", "1", "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    results = {one["name"]: one for one in json.loads(result.read_text())["results"]}
    assert [*results] == ["tokens", "rows", "loss", "rank", "checkpoint"]
    verdicts = [one["verdict"] for figure in results.values() for one in figure["figures"]]
    assert not any("failed" in one for one in results.values()), done.stdout
    assert done.returncode == int("missed" in verdicts), done.stderr
    assert [line.split("|")[4].strip() for line in done.stdout.splitlines()[2:]] == verdicts

    measured = {name: one["measured"] for name, one in results.items()}
    sizes = {name: len(seconds) for name, seconds in measured["tokens"]["seconds"].items()}
    assert sizes == dict.fromkeys(["24", "48", "96", "192"], 2)
    assert [run["rows"] for run in measured["rows"]["runs"]] == [40, 80]
    assert all(run["memory"]["peak_bytes"] > run["memory"]["weights_bytes"] > 0 for run in measured["rows"]["runs"])
    for vocabulary, one in measured["loss"]["vocabularies"].items():
        assert one["bytes"][0] > one["chunk_tokens"] * int(vocabulary) * 2, "a chunk's logits at the least"
        assert one["bytes"][3] == pytest.approx(one["bytes"][0], rel=0.05), "which no load changes"
    assert [*measured["rank"]["seconds"]] == ["8", "64"]
    assert all(one["save_s"] > 0 < one["write_s"] and len(one["steps"]) == 3 for one in measured["checkpoint"]["saves"])


def test_the_slope_is_that_of_a_power(figures: Any) -> None:
    sizes = [512, 1024, 2048, 4096]
    seconds = {str(size): [3e-4 * size**power for power in (1.0, 1.0, 1.3)] for size in sizes}
    (found,) = figures.of_tokens({"seconds": seconds})
    assert found.value == pytest.approx(1.0)
    assert found.spread == pytest.approx((1.0, 1.3))
    assert found.verdict == "ok"
    assert figures.slope(sizes, [size**2 for size in sizes]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("value", "bound", "verdict"),
    [
        (1.05, (0.95, 1.05), "ok"),
        (0.94, (0.95, 1.05), "missed"),
        (-3.0, (None, 1.1), "ok"),
        (1.11, (None, 1.1), "missed"),
        (math.nan, (None, 1.1), "missed"),
    ],
)
def test_a_ratio_beyond_its_bound_is_missed(
    figures: Any, value: float, bound: tuple[float | None, float], verdict: str
) -> None:
    found = figures.Figure("a", value, bound, "")
    assert found.verdict == verdict
    assert found.line().split(" | ")[3] == verdict


def test_rows_are_held_against_the_smallest_run(figures: Any) -> None:
    def run(rows: int, seconds: float, peak: float) -> dict[str, Any]:
        return {"rows": rows, "seconds": [seconds, 2 * seconds], "memory": {"peak_bytes": peak}}

    found = figures.of_rows({"runs": [run(1000, 0.01, 4e8), run(10_000, 0.0101, 4.1e8), run(100_000, 0.02, 5e8)]})
    assert [one.name for one in found] == [
        *("rows: step, 10,000 ÷ 1,000", "rows: memory, 10,000 ÷ 1,000"),
        *("rows: step, 100,000 ÷ 1,000", "rows: memory, 100,000 ÷ 1,000"),
    ]
    assert [one.value for one in found] == pytest.approx([1.01, 1.025, 2.0, 1.25])
    assert [one.verdict for one in found] == ["ok", "ok", "missed", "missed"]


def test_the_loss_is_told_at_the_number_of_chunks_furthest_from_one(figures: Any) -> None:
    one = {"chunk_tokens": 341, "chunks": [1, 2, 4, 8], "bytes": [100, 101, 90, 104]}
    (found,) = figures.of_loss({"vocabularies": {"49152": one}})
    assert found.value == 0.9
    assert found.verdict == "missed"


def test_a_save_costs_what_the_loop_waits_and_what_the_steps_beside_the_writer_lose(figures: Any) -> None:
    save = {"save_s": 0.05, "write_s": 0.6, "steps": [0.7, 0.6, 0.5], "beside": 2}
    waits, both = figures.of_checkpoint({"step_s": 0.5, "saves": [save]})
    assert waits.value == pytest.approx(0.1)
    assert both.value == pytest.approx(0.1 + 0.4 + 0.2)
    assert "700 ms, 1.400 of one with no writer" in both.told
