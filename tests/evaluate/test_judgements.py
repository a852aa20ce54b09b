"""Rating files as they are and rows with names: who is who, what is an outcome, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import UserError
from qlora_cli.evaluate.judgements import names_in, read_judgements, readable_name


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rating(first: str, second: str, score: Any, question: int = 1) -> dict[str, Any]:
    """A row of the QLoRA repository's rating files, which name no model."""
    return {"question_id": question, "answer1_id": first, "answer2_id": second, "text": "...", "score": score}


def named(score_or_winner: dict[str, Any], first: str = "x", second: str = "y") -> dict[str, Any]:
    return {"model_a": first, "model_b": second, **score_or_winner}


def three_models(folder: Path, swapped: bool = False) -> None:
    """x beats y, y beats z, x beats z, the winner shown first; where `swapped` with the wrong order in each name."""
    for one, other in ("xy", "yz", "xz"):
        name = f"{other}-vs-{one}" if swapped else f"{one}-vs-{other}"
        rows = [rating(f"{one}{at}", f"{other}{at}", 1, at) for at in range(3)]
        write(folder / f"{name}-gpt-4-reviewer-threeclass.jsonl", rows)


# ── answer ids ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("swapped", [False, True])
def test_answer_ids_tell_who_is_who_whatever_the_order_in_the_files_name(tmp_path, swapped):
    three_models(tmp_path, swapped)
    read = read_judgements([str(tmp_path)])
    assert sorted((one.first, one.second, one.outcome) for one in read.usable) == sorted(
        [("x", "y", 1.0), ("y", "z", 1.0), ("x", "z", 1.0)] * 3
    )
    assert read.num_files == 3
    assert not read.left_out


def test_rows_of_a_list_on_one_line_are_told_apart(tmp_path):
    three_models(tmp_path)
    (tmp_path / "y-vs-x.json").write_text(json.dumps([rating("x0", "y0", 2), rating("y1", "x1", [1, 2])]))
    read = read_judgements([str(tmp_path)])
    assert [one[:3] for one in read.usable[-6:] if {one.first, one.second} == {"x", "y"}] == [
        *(("x", "y", 0.0), ("y", "x", 0.0))
    ]


def test_models_that_met_only_the_reference_are_told_by_the_reference_beside_them(tmp_path):
    """As in relative-gpt-3.5: an answer of a model stands in two files, both with the same two names."""
    for model in "xy":
        write(tmp_path / f"ref-vs-{model}.jsonl", [rating(f"{model}1", "r1", [9, 6])])
        write(tmp_path / f"{model}-vs-ref.jsonl", [rating("r1", f"{model}1", [4, 8])])
    read = read_judgements([str(tmp_path)])
    assert {(one.first, one.second, one.scores) for one in read.usable} == {
        *((model, "ref", (9.0, 6.0)) for model in "xy"),
        *(("ref", model, (4.0, 8.0)) for model in "xy"),
    }


def test_ids_of_two_models_that_never_meet_a_third_are_refused(tmp_path):
    for name in ("x-vs-y", "y-vs-x"):
        write(tmp_path / f"{name}.jsonl", [rating("x1", "y1", 1)])
    with pytest.raises(UserError, match=r"do not tell which answers are x's and which are y's\. Add files"):
        read_judgements([str(tmp_path)])


def test_a_file_with_another_models_answers_is_refused(tmp_path):
    three_models(tmp_path)
    write(tmp_path / "x-vs-w.jsonl", [rating(f"x{at}", f"z{at}", 2, at) for at in range(3)])
    with pytest.raises(
        UserError, match=r"x-vs-w\.jsonl: no answer id in it is w's alone: \S*z-gpt-4\S*\.jsonl has the"
    ):
        read_judgements([str(tmp_path)])


def test_the_same_answer_of_two_models_does_not_stop_the_reading(tmp_path):
    """Its id is of neither; the answer beside it tells. Where both answers are the same, no one can tell."""
    three_models(tmp_path)
    write(tmp_path / "x-vs-y-gpt4-reviewer.jsonl", [rating("x0", "y0", 1), rating("same", "same", 3, 8)])
    write(tmp_path / "x-vs-z-gpt4-reviewer.jsonl", [rating("x0", "z0", 1), rating("same", "z8", 1, 8)])
    write(tmp_path / "y-vs-z-gpt4-reviewer.jsonl", [rating("y0", "z0", 1), rating("z8", "same", 2, 8)])
    read = read_judgements([str(tmp_path)])
    assert read.left_out == (
        (f"{tmp_path}/x-vs-y-gpt4-reviewer.jsonl:2", "the answer ids are of both models, or of none"),
    )
    assert [(one.first, one.second) for one in read.usable if one.question == "8"] == [("x", "z"), ("z", "y")]


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("30b-guanaco-vicuna-generations-topp0.9-temp0.7", "guanaco-33b"),
        ("65b-guanaco-oa-generations-topp0.9-temp0.7", "guanaco-65b"),
        ("13b-flan-vicuna-generations-topp0.9-beam1", "flan-vicuna-generations-topp0.9-beam1-13b"),
        ("answer-gpt35", "gpt-3.5"),
        ("gpt4", "gpt-4"),
        ("gpt-4-oa-generations", "gpt-4"),
        ("answer-vicuna-13b", "vicuna-13b"),
        ("mine", "mine"),
    ],
)
def test_what_the_repositorys_files_add_to_a_name_is_taken_off(name, readable):
    assert readable_name(name) == readable


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("answer-gpt35-vs-answer-gpt4-gpt-4-reviewer-threeclass.jsonl", ("gpt-3.5", "gpt-4")),
        ("gpt-3.5-vs-gpt4-gpt4-reviewer.jsonl", ("gpt-3.5", "gpt-4")),
        ("answer_gpt35-vs-answer_vicuna-13b-claude-1-reviewer_threeclass.jsonl", ("gpt-3.5", "vicuna-13b")),
        ("x_vs_y_gpt-4_reviewer.jsonl.gz", ("x", "y")),
        ("mine-v1-vs-mine-v2.json", ("mine-v1", "mine-v2")),
    ],
)
def test_a_files_name_gives_two_models_without_the_judge(name, names):
    assert names_in(f"folder-vs-folder/{name}") == names


@pytest.mark.parametrize(
    "name", ["ratings.jsonl", "x-vs-y-vs-z.jsonl", "x-vs-y-somebody-reviewer.jsonl", "-vs-y.jsonl"]
)
def test_a_files_name_that_gives_no_two_models_is_refused(name):
    with pytest.raises(UserError, match=r"does not tell of which two models\. Name it MODEL-vs-MODEL"):
        names_in(name)


def test_a_file_in_which_a_model_meets_itself_is_refused():
    with pytest.raises(UserError, match="gpt-4 meets itself"):
        names_in("gpt4-vs-answer-gpt4-gpt-4-reviewer.jsonl")


# ── rows with names ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("told", "outcome"),
    [
        ({"winner": "model_a"}, 1.0),
        ({"winner": "model_b"}, 0.0),
        ({"winner": "y"}, 0.0),
        ({"winner": "x"}, 1.0),
        ({"winner": "tie"}, 0.5),
        ({"winner": "tie (bothbad)"}, 0.5),
        ({"score": 1}, 1.0),
        ({"score": 2}, 0.0),
        ({"score": 3}, 0.5),
        ({"score": [9, 6.5]}, 1.0),
        ({"score": [0, 7]}, 0.0),
        ({"score": [7, 7.0]}, 0.5),
    ],
)
def test_every_kind_of_outcome(tmp_path, told, outcome):
    (one,) = read_judgements([write(tmp_path / "rows.jsonl", [named(told)])]).usable
    assert (one.first, one.second, one.outcome) == ("x", "y", outcome)
    assert one.scores == (tuple(told["score"]) if isinstance(told.get("score"), list) else None)


@pytest.mark.parametrize(
    "told",
    [
        *({"score": score} for score in (-1, 0, 4, True, "1", 1.0, [-1, -1], [9], [9, 6, 1], [9, True], [9, "6"])),
        *({"score": [9, score]} for score in (math.nan, math.inf, None)),
        *({"winner": winner} for winner in ("error", "", 1, ["model_a"], "Model_A", "z")),
        {"winner": None},
        {},
    ],
)
def test_what_is_no_outcome_is_left_out_with_its_place(tmp_path, told):
    path = write(tmp_path / "rows.jsonl", [named({"winner": "x"}), named(told)])
    read = read_judgements([path])
    assert [one.where for one in read.left_out] == [f"{path}:2"]
    assert len(read.usable) == 1


@pytest.mark.parametrize("columns", [("model_1", "model_2"), ("system_a", "system_b")])
def test_other_columns_with_names(tmp_path, columns):
    row = {columns[0]: "x", columns[1]: "y", "winner": columns[1]}
    (one,) = read_judgements([write(tmp_path / "rows.jsonl", [row])]).usable
    assert one == ("x", "y", 0.0, None, None)


def test_names_in_the_rows_go_before_answer_ids(tmp_path):
    row = {**rating("1", "2", 2), "model_a": "x", "model_b": "y"}
    (one,) = read_judgements([write(tmp_path / "p-vs-q.jsonl", [row])]).usable
    assert one == ("x", "y", 0.0, None, "1")


def test_files_folders_and_patterns_name_a_file_once(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / "in" / name, [named({"winner": "x"})])
    monkeypatch.chdir(tmp_path)
    for targets in (["in"], ["in/*.jsonl"], ["in/b.jsonl", "in", "./in/a.jsonl", "in/?.jsonl"]):
        read = read_judgements(targets)
        assert (read.num_files, len(read.usable)) == (2, 2)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"winner": "x"}, "names no two models, found ['winner']. Add one of model_a and model_b,"),
        (named({"winner": "x"}, first=""), "model_a is a text, not a name"),
        ({"model_a": "x", "model_b": 3, "winner": "x"}, "model_b is the number 3, not a name"),
        (named({"winner": "x"}, second="x"), "x meets itself"),
        (named({"winner": "nobody"}), "no judgement is usable; here: winner is 'nobody'"),
        ({"answer1_id": "1", "answer2_id": "2", "score": 1}, "does not tell of which two models"),
    ],
)
def test_rows_that_are_refused(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as error:
        read_judgements([path])
    assert message in str(error.value)
    assert error.value.where.startswith(path)


def test_nothing_there_is_refused_and_never_looked_for_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for target, message in (("owner/ratings", "no such file"), ("empty", "no files"), ("*.jsonl", "no file matches")):
        with pytest.raises(UserError, match=message):
            read_judgements([target])
