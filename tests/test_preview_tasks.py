"""`qlora preview` of rows that are no conversations: as a user's process, in a pipe, as JSON and as a page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from qlora_cli.display import QuietReport
from qlora_cli.display_preview import print_preview
from qlora_cli.plan.preview import preview
from qlora_cli.recipe import load_recipe
from tests.architectures import write_architecture
from tests.conftest import REPOSITORY
from tests.data.task_tokenizers import bert, roberta, t5

CONTEXT = "The play about a prince was written by William Shakespeare in 1600. " * 3
ROWS: dict[str, list[dict[str, Any]]] = {
    "seq2seq_lm": [{"source": "a large flute", "target": "the flute"}, {"source": "Paris", "target": "a city"}],
    "sequence_classification": [
        {"sentence1": "a man plays", "sentence2": "a child rides", "label": "no"},
        {"sentence1": "the river", "sentence2": "the Seine", "label": 1},
    ],
    "question_answering": [
        {"question": "Who?", "context": CONTEXT, "answers": {"text": ["William"], "answer_start": [39]}},
        {"question": "Which moon?", "context": "The river", "answers": {"text": [], "answer_start": []}},
    ],
}
BASES = {
    "seq2seq_lm": ("t5", t5),
    "sequence_classification": ("bert", bert),
    "question_answering": ("roberta", roberta),
}
MODEL = {"sequence_classification": {"labels": ["no", "yes"]}}
DATA: dict[str, dict[str, Any]] = {"question_answering": {"max_length": 40, "doc_stride": 4}}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of a task whose training rows are given."""

    def write(task: str, rows: list[Any] | None = None, model: dict[str, Any] | None = None, **data: Any) -> Path:
        name, tokenizer = BASES[task]
        folder = write_architecture(tmp_path / name, name, vocab_size=420)
        tokenizer().save_pretrained(folder)
        lines = [json.dumps(row) for row in (ROWS[task] if rows is None else rows)]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        values = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 60, **DATA.get(task, {}), **data}
        held = MODEL.get(task, {}) if model is None else model
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump({"model": {"name_or_path": str(folder), "task": task, **held}, "data": values}))
        return path

    return write


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8", "COLUMNS": "80"}
    command = [sys.executable, "-m", "qlora_cli", "preview", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


SHOWN = {
    "seq2seq_lm": [
        "\n\n   source\na large flute‹</s>›\n\n   target\n⟦ the flute‹</s>›⟧\n",
        " trained\n",
        "\ntrained    ",
    ],
    "sequence_classification": [
        " tokens, label: no (0)\n\n   text\n‹[CLS]› a man play",
        "\n\n   second text\n a child rides‹ [SEP]›\n",
        " tokens, label: yes (1)\n",
        "\ntrained    2 labels\n",
    ],
    "question_answering": [
        " tokens, answer: tokens ",
        "\n\n   question\n‹<s>›Who?‹</s>›‹</s>›\n\n   context\nThe play about a prince "
        "was written by⟦ William⟧ Shakespeare in",
        " tokens, no answer here\n",
        " answer spans\n",
    ],
}


@pytest.mark.parametrize("task", ROWS)
def test_a_pipe_gets_the_texts_by_name_with_what_is_learned(task: str, recipe_file):
    done = run(recipe_file(task), "--limit", 9)
    assert done.returncode == 0, done.stderr
    for words in SHOWN[task]:
        assert words in done.stdout
    heading = next(line for line in done.stdout.splitlines() if line.startswith("train  "))
    assert heading.endswith("  trained") == (task == "seq2seq_lm")
    assert ("\ntrained   " in done.stdout.partition("one epoch")[0]) == (task == "seq2seq_lm")


@pytest.mark.parametrize("task", ROWS)
def test_json_and_the_page_hold_the_same(task: str, recipe_file, qlora, tmp_path: Path):
    path = recipe_file(task)
    result = json.loads(qlora("preview", path, "--json", "--limit", 9).out)
    first = result["rows"][0]
    ids = [token for piece in first["pieces"] for token in piece["ids"]]
    tokenizer, row = BASES[task][1](), ROWS[task][0]
    if task == "seq2seq_lm":
        assert ids == tokenizer(row["source"])["input_ids"] + tokenizer(row["target"])["input_ids"]
        assert {piece["part"] for piece in first["pieces"]} == {"source", "target"}
    elif task == "sequence_classification":
        assert ids == tokenizer(row["sentence1"], row["sentence2"])["input_ids"]
        assert [row["targets"] for row in result["rows"]] == [[0.0], [1.0]]
    else:
        (answer,) = ["".join(p["text"] for p in row["pieces"] if p["trained"]) for row in result["rows"][:1]]
        assert answer.strip() == "William"
    assert result["task"] == result["statistics"]["task"] == task
    page = tmp_path / "page.html"
    assert qlora("preview", path, "--html", page).code == 0
    text = page.read_text()
    parts = {piece["part"] for piece in first["pieces"]}
    assert all(f"<p>{part}</p>" in text for part in parts)
    assert f"tokens, {first['learned']}</p>" in text


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("seq2seq_lm", {"source": "", "target": "b"}, "the source is empty"),
        ("sequence_classification", {"sentence1": "a", "sentence2": "b", "label": "maybe"}, "the label is 'maybe'"),
        (
            "question_answering",
            {"question": "Who?", "context": "a b", "answers": {"text": ["b"], "answer_start": [1]}},
            "the answer 'b' is not at character 1 of the context: it stands at character 2",
        ),
    ],
)
def test_bad_rows_are_listed(task: str, row: dict[str, Any], words: str, recipe_file):
    done = run(recipe_file(task, [*ROWS[task], row]), "--errors")
    assert done.returncode == 2, done.stderr
    assert f"rows.jsonl:3: {words}" in done.stdout
    assert "train: 1 of 3 rows bad" in done.stdout


def test_numbers_are_shown_as_they_are(recipe_file, qlora):
    path = recipe_file("sequence_classification", [{"text": "a man", "label": 3.8}], {"num_labels": 1})
    assert " tokens, label: 3.8\n\n   text\n" in qlora("preview", path).out
    path = recipe_file("sequence_classification", [{"text": "a man", "label": 2}], {"num_labels": 3})
    assert " tokens, label: 2\n" in qlora("preview", path).out


def test_a_terminal_gets_the_target_in_bold_under_its_name(recipe_file):
    result = preview(load_recipe(recipe_file("seq2seq_lm")), QuietReport(), "train", None, 1)
    console = Console(file=StringIO(), force_terminal=True, color_system="standard", width=60)
    print_preview(result, console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2m   target\x1b[0m" in out
    assert "\x1b[1;32m the flute\x1b[0m" in out


@pytest.mark.parametrize("task", ROWS)
def test_a_model_with_fewer_positions_is_told(task: str, recipe_file, qlora):
    """T5 has no positions; RoBERTa's 72 begin behind its padding token, of id 0: 71 are left."""
    long = "play " * 80
    rows = {
        "seq2seq_lm": [{"source": long, "target": "b"}],
        "sequence_classification": [{"text": long, "label": 0}],
        "question_answering": [
            {"question": "Who?", "context": long, "answers": {"text": ["play"], "answer_start": [0]}},
        ],
    }
    out = qlora("preview", recipe_file(task, rows[task], max_length=400)).out
    told = {"sequence_classification": "the model 72 positions", "question_answering": "the model 71 positions"}
    assert told.get(task, "one epoch") in " ".join(out.split())
    assert ("training will refuse" in " ".join(out.split())) == (task in told)
