"""The study of LoftQ runs, and its page shows what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("shared")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that makes the tables."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import study_loftq_page  # type: ignore[import-not-found]

    return study_loftq_page


def test_the_tables_of_the_page_are_those_of_the_results(page: Any) -> None:
    text = (REPOSITORY / "docs" / "loftq.md").read_text()
    assert page.with_tables(text) == text
    assert text.count("<!-- end -->") == len([*(REPOSITORY / "docs" / "loftq").glob("*.json")])


def test_a_start_without_all_seeds_is_not_in_the_table(page: Any) -> None:
    def runs(start: str, losses: dict[float, list[float]]) -> list[dict[str, Any]]:
        return [
            {"start": start, "rate": rate, "seed": seed, **{when: {"tune": loss, "test": loss} for when in WHEN}}
            for rate, of_seeds in losses.items()
            for seed, loss in enumerate(of_seeds, start=1)
        ]

    whole, half = runs("nf4", {0.1: [2.0], 0.2: [1.0, 1.1, 1.2]}), runs("int4", {0.1: [1.0, 1.0]})
    assert [[one["rate"] for one in best] for best in page.tuned([*whole, *half]).values()] == [[0.2] * 3]
    assert "int4" not in page.training_table([*whole, *half])


WHEN = ("before", "after")


def test_a_contestant_is_tuned_trained_and_measured(shared: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(REPOSITORY / "scripts" / "study_loftq.py"),
        "train",
        str(shared),
        "stories260k-hf",
        "8",
    ]
    options = ["--only", "int2 + LoftQ", "--rates", "1e-2", "--steps", "2"]
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for _again in range(2):  # the second time everything is known
        done = subprocess.run(
            [*command, *options, *folders], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results" / "stories260k-hf-r8.json").read_text())
    assert [one["seed"] for one in found] == [1, 2, 3]
    for one in found:
        assert 1.5 < one["after"]["test"] < one["before"]["test"] < 4
