"""Questions about contexts: the windows and labels of HF's run_qa.py, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import TODAY
from task_rows_loading import load_task, refused_task
from task_tokenizers import TOKENIZERS, bert, gpt2, roberta

from qlora_cli.data.chat import chat_settings, make_chat
from qlora_cli.data.limits import Limits
from qlora_cli.data.row_task import RowTask
from qlora_cli.data.squad import Question, questions, squad, windows
from qlora_cli.recipe.schema import Data

CONTEXT = (
    "The capital of France is Paris, a city on the river Seine with two million people. The play about a prince was "
    "written by William Shakespeare in about 1600. A man is playing a large flute near the house, a young child rides."
)
SPANS = ["Paris", "William Shakespeare", "two million", "The capital", "rides.", "1600", "a large flute near the house"]


def row_of(answer: str | None, question: str = "  Who wrote the play?", context: str = CONTEXT) -> dict[str, Any]:
    found = {} if answer is None else {"text": [answer], "answer_start": [context.index(answer)]}
    return {"context": context, "question": question, "answers": found or {"text": [], "answer_start": []}}


def task(stride: int) -> RowTask:
    return RowTask("question_answering", doc_stride=stride)


def run_qa(tokenizer: Any, row: dict[str, Any], max_length: int, stride: int) -> list[tuple[list[int], int, int]]:
    """(ids, first, last) of each window, as `prepare_train_features` of transformers' run_qa.py computes them."""
    tokenized = tokenizer(
        row["question"].lstrip(),
        row["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    features = []
    for index, offsets in enumerate(tokenized["offset_mapping"]):
        input_ids = tokenized["input_ids"][index]
        if tokenizer.cls_token_id in input_ids:
            cls_index = input_ids.index(tokenizer.cls_token_id)
        elif tokenizer.bos_token_id in input_ids:
            cls_index = input_ids.index(tokenizer.bos_token_id)
        else:
            cls_index = 0
        sequence_ids = tokenized.sequence_ids(index)
        answers = row["answers"]
        if len(answers["answer_start"]) == 0:
            features.append((input_ids, cls_index, cls_index))
            continue
        start_char = answers["answer_start"][0]
        end_char = start_char + len(answers["text"][0])
        token_start_index = 0
        while sequence_ids[token_start_index] != 1:
            token_start_index += 1
        token_end_index = len(input_ids) - 1
        while sequence_ids[token_end_index] != 1:
            token_end_index -= 1
        if not (offsets[token_start_index][0] <= start_char and offsets[token_end_index][1] >= end_char):
            features.append((input_ids, cls_index, cls_index))
            continue
        behind = token_end_index + 1  # ours: run_qa.py goes on into the last special token, whose offsets are (0, 0)
        while token_start_index < behind and offsets[token_start_index][0] <= start_char:
            token_start_index += 1
        while offsets[token_end_index][1] >= end_char:
            token_end_index -= 1
        features.append((input_ids, token_start_index - 1, token_end_index + 1))
    return features


@pytest.mark.parametrize(("longest", "stride"), [(500, 10), (34, 8), (40, 0), (46, 12)])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_windows_and_labels_are_those_of_run_qa(name: str, longest: int, stride: int, tmp_path: Path):
    tokenizer = TOKENIZERS[name]()
    rows = [row_of(answer) for answer in (*SPANS, None)]
    examples = load_task(
        task(stride), tmp_path, rows, tokenizer=tokenizer, max_length=longest, source={"format": "squad"}
    )
    wanted = [feature for row in rows for feature in run_qa(tokenizer, row, longest, stride)]
    assert [(row.input_ids, *row.targets) for row in examples.rows] == wanted
    assert all(row.num_tokens <= longest and row.num_trained == 2 for row in examples.rows)
    assert len(wanted) > len(rows) or longest == 500
    if name == "bert":
        types = tokenizer(rows[0]["question"].lstrip(), CONTEXT)["token_type_ids"]
        if longest == 500:
            assert [int(at >= examples.rows[0].segment) for at in range(len(types))] == types


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_an_answer_is_the_tokens_that_spell_it_in_every_window_that_holds_it(name: str, data: st.DataObject):
    """Of any text: each character is in one window at least, and decoding the labelled tokens' offsets gives it."""
    context = data.draw(st.text(st.sampled_from("ab é猫😀.\n the"), min_size=1).filter(str.strip), "context")
    begin = data.draw(st.integers(0, len(context) - 1), "begin")
    text = context[begin : data.draw(st.integers(begin + 1, len(context)), "end")]
    if not text.strip() or not any(letter.isascii() and not letter.isspace() for letter in text):
        return
    tokenizer = {"bert": bert, "roberta": roberta, "gpt2": gpt2}[name]()
    rows = Data.model_validate({"train": [{"path": "x"}], "max_length": 14})
    chat = make_chat(chat_settings(rows, tokenizer, frozenset(), TODAY, task(2)))
    question = Question("1", "a b", context, ((text, begin),))
    found = windows(question, "a:1", chat, Limits.of(rows, "question_answering"))
    wanted = text.strip()
    for window in found:
        first, last = map(int, window.example.targets)
        if last:
            spelled = [span for span in window.offsets[first : last + 1] if span]
            assert wanted in context[spelled[0][0] : spelled[-1][1]] or name == "bert"
            assert all(context[slice(*span)].strip() in text for span in spelled[1:-1])
    if len(found) == 1:
        assert found[0].example.targets != (0, 0)


def test_white_space_around_an_answer_is_no_tokens(tmp_path: Path):
    context = "It is in  Paris , they say"
    answer = {"text": ["  Paris "], "answer_start": [8]}
    row = {"context": context, "question": "Where?", "answers": answer}
    (example,) = load_task(task(0), tmp_path, [row], tokenizer=bert()).rows
    first, last = map(int, example.targets)
    assert bert().decode(example.input_ids[first : last + 1]) == "paris"


def test_no_answer_is_the_first_token_twice_and_trains_no_text(tmp_path: Path):
    (example,) = load_task(task(0), tmp_path, [row_of(None)], tokenizer=bert()).rows
    assert example.targets == (0, 0)
    assert set(example.labels[1:]) == {-100}


def test_labels_mark_the_answer(tmp_path: Path):
    (example,) = load_task(task(0), tmp_path, [row_of("William Shakespeare")], tokenizer=roberta()).rows
    kept = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != -100]
    assert roberta().decode(kept).strip() == "William Shakespeare"


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

ASKED = [
    row_of("Paris", "Which city?"),
    row_of(None, "Which moon?"),
    row_of("1600", "When?"),
    row_of("rides.", "What?"),
]


def official(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows as SQuAD's own files hold them: two articles, answers as a list of objects."""
    qas = [
        {
            "id": f"q{at}",
            "question": row["question"],
            "is_impossible": not row["answers"]["text"],
            "answers": [
                {"text": text, "answer_start": start}
                for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            ],
        }
        for at, row in enumerate(rows)
    ]
    articles = [
        {"title": "one", "paragraphs": [{"context": CONTEXT, "qas": qas[:2]}, {"context": CONTEXT, "qas": qas[2:3]}]},
        {"title": "two", "paragraphs": [{"context": CONTEXT, "qas": qas[3:]}]},
    ]
    return {"version": "v2.0", "data": articles}


@pytest.mark.parametrize("layout", ["file", "articles", "paragraphs"])
def test_an_official_file_gives_the_examples_of_flat_rows(layout: str, tmp_path: Path):
    nested = official(ASKED)
    held = {
        "file": [nested],
        "articles": nested["data"],
        "paragraphs": [{"paragraphs": [one]} for article in nested["data"] for one in article["paragraphs"]],
    }[layout]
    (tmp_path / "nested.json").write_text("\n".join(map(json.dumps, held)))
    (tmp_path / "flat.jsonl").write_text("\n".join(map(json.dumps, ASKED)))
    found, flat = (
        load_task(task(8), tmp_path / name, tokenizer=bert(), max_length=40) for name in ("nested.json", "flat.jsonl")
    )
    assert found.digest == flat.digest
    assert (found.num_rows, found.sources[0].format, found.sources[0].auto) == (4, "squad", True)
    assert found.rows[0].where == f"{tmp_path}/nested.json:1"
    assert found.summary()[1].endswith(f" tokens, {len(found.rows)} answer spans")
    first = load_task(task(8), tmp_path / "nested.json", tokenizer=bert(), max_length=40, source={"limit": 3})
    assert first.num_rows == 3


def test_a_question_of_an_official_file_is_told_by_its_number(tmp_path: Path):
    nested = official(ASKED)
    nested["data"][1]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 3
    (tmp_path / "nested.json").write_text(json.dumps(nested))
    message = refused_task(task(8), tmp_path / "nested.json", tokenizer=bert())
    assert message.startswith(f"{tmp_path}/nested.json:1: question 4: the answer 'rides.' is not at character 3")
    nested["data"][0]["paragraphs"][0] = "words"
    (tmp_path / "nested.json").write_text(json.dumps(nested))
    message = refused_task(task(8), tmp_path / "nested.json", tokenizer=bert())
    assert "question 1: is a text where an object is asked for. Mend the file." in message


def test_questions_keep_their_ids_and_every_answer():
    flat = list(questions(official(ASKED)))
    assert [squad(row, "a:1").id for row in flat] == ["q0", "q1", "q2", "q3"]
    both = {**ASKED[0], "answers": {"text": ["Paris", "Seine"], "answer_start": [25, CONTEXT.index("Seine")]}}
    read = squad(both, "a:1")
    assert (read.id, read.answers) == ("a:1", (("Paris", 25), ("Seine", CONTEXT.index("Seine"))))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"answers": {"text": ["Paris"], "answer_start": [24]}},
            "the answer 'Paris' is not at character 24 of the context: it stands at character 25. Mend answer_start",
        ),
        ({"answers": {"text": ["London"], "answer_start": [0]}}, "character 0 of the context: the context does not"),
        ({"answers": {"text": [""], "answer_start": [0]}}, "the answer '' is not at character 0"),
        ({"answers": {"text": ["Paris"], "answer_start": []}}, "answers has more texts than answer_start, or fewer"),
        ({"answers": {"text": ["Paris"], "answer_start": [-1]}}, "an answer is an object without a valid answer_start"),
        ({"answers": ["Paris"]}, "an answer is a text without a valid answer_start. Mend the row."),
        ({"answers": "Paris"}, "answers is a text. Write {text: [...], answer_start: [...]} or a list of {text, "),
        ({"question": " "}, "the question or the context is empty. Mend or remove the row."),
        ({"context": 3}, "context is the number 3, not a text"),
        ({"answers": None}, "(squad: context, question, answers)"),
    ],
)
def test_what_is_no_question_is_refused(tmp_path: Path, change: dict[str, Any], words: str):
    assert words in refused_task(task(8), tmp_path, [ASKED[0] | change], tokenizer=bert())


def test_a_question_that_leaves_no_window_is_refused(tmp_path: Path):
    row = row_of("Paris", "Which city on the river Seine is the capital of France?")
    taken = len(bert()(row["question"])["input_ids"]) + 1  # and the end of the context
    message = refused_task(task(8), tmp_path, [row], tokenizer=bert(), max_length=taken + 8)
    assert (
        f"rows.jsonl:1: the question takes {taken} of {taken + 8} tokens, which leaves a window 8: not more than "
        "data.doc_stride (8). Raise data.max_length."
    ) in message
    assert load_task(task(8), tmp_path, [row], tokenizer=bert(), max_length=taken + 9).rows
