"""`qlora arena`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Ended

ROWS = [
    {"model_a": "x", "model_b": "y", "score": [9, 6], "question_id": 1},
    {"model_a": "y", "model_b": "x", "score": [8, 8], "question_id": 1},
    {"model_a": "z", "model_b": "x", "score": [4, 8], "question_id": 1},
    {"model_a": "x", "model_b": "z", "score": [8, 6], "question_id": 2},
    {"model_a": "y", "model_b": "x", "score": [-1, -1], "question_id": 2},
]


@pytest.fixture
def ratings(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def check_refused(ended: Ended, message: str, code: int = 2) -> None:
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert message in ended.err
    assert ended.err.count("\n") == 1, "one line"


def in_a_process(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "qlora_cli", "arena", *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_the_command_answers_in_a_process_of_its_own_without_torch(ratings):
    done = in_a_process(ratings, "--orders", 20, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["model"] for row in result["elo"]["models"]] == ["x", "y", "z"]
    assert result["left_out"] == [{"where": f"{ratings}:5", "what": "score is [-1, -1]"}]
    assert result["percent"]["reference"] == "x"
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in loaded
    assert "torch" not in loaded


def test_the_tables_and_the_json_have_the_same_figures(qlora, ratings):
    ended = qlora("arena", ratings, "--orders", 50, "--seed", 7)
    assert (ended.code, ended.err) == (0, "")
    result = json.loads(qlora("arena", ratings, "--orders", 50, "--seed", 7, "--json").out)
    lines = ended.out.splitlines()
    assert lines[0] == "1 file, 5 judgements: the first answer won 2, the second 1, 1 tie, 1 unparsed"
    assert lines[1] == f"unparsed  {ratings}:5: score is [-1, -1]"
    table = [line.split() for line in lines]
    for row in result["elo"]["models"]:
        shown = [row["model"], f"{row['elo']:.0f}", f"{row['ci95']:.1f}", f"{row['low']:.0f}", "to"]
        assert any(line[:5] == shown for line in table), shown
    for row in result["percent"]["models"]:
        assert any(line[:2] == [row["model"], f"{row['percent']:.1f}"] for line in table)
    assert [row["percent"] for row in result["percent"]["models"]] == pytest.approx([100 * 14 / 17, 100 * 10 / 16])
    assert "\x1b" not in ended.out


def test_the_same_seed_gives_the_same_and_another_seed_another_result(qlora, ratings):
    first, again, other = (qlora("arena", ratings, "--orders", 9, "--seed", seed, "--json").out for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_another_reference_and_what_is_said_of_it(qlora, ratings):
    result = json.loads(qlora("arena", ratings, "--reference", "y", "--orders", 9, "--json").out)
    assert [(row["model"], row["num_judgements"]) for row in result["percent"]["models"]] == [("x", 2)]
    ratings.write_text(json.dumps(ROWS[0]) + "\n")
    ended = qlora("arena", ratings, "--reference", "y", "--orders", 9)
    assert "note      x was only ever shown first, y beside it: a judge may favour a place" in ended.out
    ended = qlora("arena", ratings, "--orders", 9)
    assert "note      no percentages: no one model is part of all scored judgements" in ended.out


def test_models_that_never_met_are_told(qlora, ratings):
    rows = [{"model_a": a, "model_b": b, "winner": "model_a"} for a, b in ("xy", "pq")]
    ratings.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "there are 2: p, q; x, y" in qlora("arena", ratings, "--orders", 9).out


def test_the_plot_has_a_point_for_each_model(qlora, ratings, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    from qlora_cli.report import arena_plot

    for name, begin in (("elo.svg", b"<?xml"), ("elo.PNG", b"\x89PNG")):
        ended = qlora("arena", ratings, "--orders", 9, "--plot", tmp_path / name, "--json")
        assert ended.code == 0, ended.err
        assert (tmp_path / name).read_bytes().startswith(begin)
    result = json.loads(ended.out)
    ratings_axes, percent_axes = arena_plot(result).axes
    for axes, rows, key in (
        (ratings_axes, result["elo"]["models"], "elo"),
        (percent_axes, result["percent"]["models"], "percent"),
    ):
        assert [label.get_text() for label in axes.get_yticklabels()] == [row["model"] for row in rows]
        assert list(axes.lines[0].get_xdata()) == pytest.approx([row[key] for row in rows])


def test_the_plots_bar_reaches_over_the_middle_of_the_orders():
    from qlora_cli.report import bar_of_elo

    assert bar_of_elo({"model": "x", "elo": 1000, "low": 980, "high": 1050}) == ("x", 1000, 20, 50)


def test_the_page_shows_what_the_command_prints(qlora, shared, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    page = (REPOSITORY / "docs" / "arena.md").read_text()
    for folder in ("pairwise", "relative-gpt-3.5"):
        printed = qlora("arena", f"../shared/data/text/guanaco-ratings/{folder}").out
        shown = page.partition(f"guanaco-ratings/{folder} |")[2].partition("\n")[2].partition("```")[0]
        assert len(shown) > 500
        assert shown in "".join(line for line in printed.splitlines(True) if not line.startswith("unparsed"))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_plot_that_cannot_be_written_is_refused_before_any_reading(qlora, tmp_path, monkeypatch):
    check_refused(qlora("arena", "nowhere", "--plot", tmp_path / "elo.gif"), "no plot has this ending")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = qlora("arena", "nowhere", "--plot", tmp_path / "elo.png")
    check_refused(ended, "Run `pip install 'qlora[plot]'`.", code=4)


@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_one_message(tmp_path, as_json):
    """In processes of their own: no file, a broken line."""
    (tmp_path / "broken.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"model_a": "x",\n')
    for name, message in (("nowhere", "no such file or folder"), ("broken.jsonl", "broken JSON")):
        command = [sys.executable, "-m", "qlora_cli", "arena", tmp_path / name, *(["--json"] if as_json else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        if as_json:
            (problem,) = json.loads(done.stdout)["problems"]
            assert message in problem["what"]
        else:
            assert (done.stdout, done.stderr.count("\n")) == ("", 1)
            assert message in done.stderr


def test_other_bad_input_is_one_message(qlora, ratings, tmp_path):
    check_refused(qlora("arena", ratings, "--reference", "xx"), "no model is called 'xx'. Did you mean x?")
    ratings.write_text(json.dumps({"model_a": "x", "model_b": "y", "winner": "x"}) + "\n")
    check_refused(qlora("arena", ratings, "--reference", "x"), "no judgement scores x")
    (tmp_path / "p-vs-q.jsonl").write_text(json.dumps({"answer1_id": "1", "answer2_id": "2", "score": 1}) + "\n")
    check_refused(qlora("arena", tmp_path), "its answer ids do not tell which answers are p's and which are q's")
    assert qlora("arena", ratings, "--orders", 1).code == 2
    assert qlora("arena").code == 2
