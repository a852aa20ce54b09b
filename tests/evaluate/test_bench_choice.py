"""scripts/bench_choice.py runs to its end on a few rows, and refuses a figure where the two did not do the same."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_choice.py"
SMALL = ["--rows", "3", "--layers", "1", "--batch-sizes", "2", "--budgets", "200", "--turns", "1"]


def test_it_measures_both_and_their_ratio(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(shared), *SMALL, "--json", str(result)])
    with torch.random.fork_rng():
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            logging.disable(logging.NOTSET)
    piqa, arc, both = json.loads(result.read_text())
    assert (piqa["data"], arc["data"], both["rows"]) == ("piqa", "arc_easy", 6)
    assert both["tokens"][0] == piqa["tokens"][0] + arc["tokens"][0] > both["tokens"][1]
    assert both["largest_difference"] <= 1e-3
    seconds = {name: taken for name, (taken,) in arc["seconds"].items()}
    assert arc["ratio"] == pytest.approx(seconds["harness 2"] / seconds["ours 200"])


def test_it_gives_no_figure_for_other_work() -> None:
    agreement = runpy.run_path(str(SCRIPT))["agreement"]
    assert agreement([(-5.0, True)], [(-5.25, True)], 0.5) == 0.25
    for wrong in (-6.0, float("nan")):
        with pytest.raises(SystemExit, match="not the same work, so no figure"):
            agreement([(-5.0, True)], [(wrong, True)], 0.5)
