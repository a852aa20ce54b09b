"""Sources to examples within the limits: what is kept, cut, left out and counted, and how it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import LONG, SHORT, answers, load, numbered, refusal, trained, write_rows
from tiny_tokenizer import CHATML, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.encode import IGNORE_INDEX, Example
from qlora_cli.data.examples import Examples

SHARED = Path(__file__).parents[3] / "shared/data"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A short row, a long one, and one that is longer still."""
    return write_rows(tmp_path / "data.jsonl", [SHORT, LONG, {**LONG, "answer": LONG["answer"] * 2}])


@pytest.fixture
def rows(path: Path) -> list[Example]:
    """What they are without a limit."""
    return list(load(path).rows)


def test_rows_become_examples_with_their_places_and_counts(path: Path) -> None:
    examples = load(path, source={"limit": 2})
    assert [example.where for example in examples.rows] == [f"{path}:1", f"{path}:2"]
    assert answers(examples) == ["42", LONG["answer"]]
    assert examples.num_rows == 2
    assert examples.lengths.tolist() == [len(example.input_ids) for example in examples.rows]
    assert examples.trained_lengths.tolist() == [len(trained(example)) for example in examples.rows]
    assert examples.num_tokens == examples.lengths.sum()
    assert examples.num_trained == examples.trained_lengths.sum()
    share = examples.num_trained / examples.num_tokens
    assert examples.summary() == [
        f"{path}: 2 rows, format question_answer (by its columns)",
        f"2 examples, {examples.num_tokens} tokens, {examples.num_trained} trained ({share:.0%})",
    ]


def test_sources_follow_each_other_each_with_its_format(tmp_path: Path, path: Path) -> None:
    (tmp_path / "b.csv").write_text("text,question,answer\nOnce,a,b\n")
    sources = [
        {"path": str(tmp_path / "b.csv"), "format": "text"},
        {"path": str(path), "limit": 1, "weight": 2},
        {"path": str(path), "template": {"prompt": "{{ question }}:", "completion": "{{ answer }}"}},
    ]
    examples = load(sources)
    verbatim = [f"{answer}</s>" for answer in ("42", LONG["answer"], LONG["answer"] * 2)]
    assert answers(examples) == ["Once</s>", "42", *verbatim]
    assert [str(source) for source in examples.sources] == [
        f"{tmp_path}/b.csv: 1 row, format text",
        f"{path}: 1 row, format question_answer (by its columns), weight 2",
        f"{path}: 3 rows, format template",
    ]
    assert [source.num_examples for source in examples.sources] == [1, 1, 3]
    assert sum(source.num_tokens for source in examples.sources) == examples.num_tokens
    assert sum(source.num_trained for source in examples.sources) == examples.num_trained


def test_no_held_out_data_are_no_examples(path: Path) -> None:
    assert load(path, role="eval") == Examples()
    assert Examples().lengths.tolist() == Examples().trained_lengths.tolist() == []


def test_held_out_data_are_their_own_sources(tmp_path: Path, path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [numbered(1)])
    assert answers(load(path, role="eval", eval=[{"path": str(other)}])) == ["a1"]


def test_the_recipes_template_is_used(path: Path, tmp_path: Path) -> None:
    text = CHATML.replace("}}\n", "}}:\n", 1).replace("assistant\n", "assistant:\n")
    (tmp_path / "t.jinja").write_text(text)
    (first, *_) = load(path, chat_template=str(tmp_path / "t.jinja")).rows
    assert "<|im_start|>user:\nHow many?" in tiny_tokenizer().decode(first.input_ids)


def test_rows_are_read_by_index_and_by_slice(path: Path, rows: list[Example]) -> None:
    stored = load(path).rows
    assert [stored[-1], *stored[:2]] == [rows[2], *rows[:2]]
    assert len(stored) == 3
    assert type(stored[np.int64(1)].input_ids[0]) is int
    with pytest.raises(IndexError):
        stored[3]


# ── beyond the limits ────────────────────────────────────────────────────────────────────────────────────────────────


def test_too_long_rows_are_an_error_that_names_the_first_the_longest_and_the_limit(
    path: Path, rows: list[Example]
) -> None:
    short, long, longer = (row.num_tokens for row in rows)
    assert refusal(path, max_length=short) == (
        f"{path}:2: the row has {long} tokens ({rows[1].num_prompt} before the answer), "
        f"but data.max_length is {short}; in all 2 of 3 rows are too long, the longest has "
        f"{longer} tokens ({path}:3). Raise the limit, or set data.on_long_row to truncate or skip."
    )
    assert load(path, max_length=longer).num_truncated == 0


def test_the_first_and_the_longest_are_found_across_processes(tmp_path: Path) -> None:
    middle = {**LONG, "answer": LONG["answer"] * 3}
    found = [numbered(number) for number in range(600)]
    found[300], found[301], found[599] = LONG, middle, LONG
    path = write_rows(tmp_path / "many.jsonl", found)
    message = refusal(path, max_length=25, workers=3)
    assert message.startswith(f"{path}:301: the row has ")
    assert "in all 3 of 600 rows are too long" in message
    assert f" tokens ({path}:302). Raise" in message


FORGETFUL = CHATML.replace(
    "{{ message.content }}",
    "{% if loop.last and message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}",
)
"""Shows the reasoning of the last turn only."""


def test_a_conversation_that_is_proven_answer_by_answer_is_one_row(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    turns = [{**turn, "reasoning_content": "hm"} if turn["role"] == "assistant" else turn for turn in turns]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    tokenizer = tiny_tokenizer(template=FORGETFUL)
    examples = load(path, tokenizer=tokenizer)
    assert answers(examples) == [*(f"<think>hm</think>assistant {n}" for n in range(3)), "<think>hm</think>assistant 0"]
    assert [example.where for example in examples.rows] == [f"{path}:1"] * 3 + [f"{path}:2"]
    assert (examples.num_rows, examples.num_split, examples.sources[0].num_examples) == (2, 1, 4)
    assert "1 conversation made into one example per answer, as only so proven" in examples.summary()
    assert "in all 2 of 2 rows are too long" in refusal(path, tokenizer=tokenizer, max_length=3)
    message = refusal(path, tokenizer=tokenizer, max_length=examples.rows[0].num_tokens)
    assert message.startswith(f"{path}:1: the row has {examples.rows[1].num_tokens} tokens")
    assert "in all 1 of 2 rows are too long" in message


def test_a_row_whose_answers_are_all_bad_is_one_bad_row(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    turns = [{**turn, "reasoning_content": "hm"} if turn["role"] == "assistant" else turn for turn in turns]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns[:2]}, {"messages": turns[:1]}])
    tokenizer = tiny_tokenizer(template=FORGETFUL.replace("{{ message.role }}", "<s><s>{{ message.role }}"), bos=True)
    message = refusal(path, tokenizer=tokenizer, on_bad_row="skip")
    assert message.startswith(f"data.train: all 3 rows are bad; the first: {path}:1: ")


def test_too_long_rows_are_skipped_and_counted(tmp_path: Path, rows: list[Example]) -> None:
    path = write_rows(tmp_path / "a.jsonl", [LONG, SHORT, LONG])
    examples = load(path, max_length=rows[0].num_tokens, on_long_row="skip")
    assert (len(examples.rows), examples.num_skipped, examples.num_rows) == (1, 2, 3)
    assert examples.rows[0].where == f"{path}:2"
    assert "2 rows left out: too long" in examples.summary()


def test_truncation_keeps_the_first_tokens_and_counts_what_is_lost(tmp_path: Path, rows: list[Example]) -> None:
    path = write_rows(tmp_path / "a.jsonl", [LONG, SHORT])
    whole = rows[1]
    limit = whole.num_tokens - 4
    examples = load(path, max_length=limit, on_long_row="truncate")
    assert examples.rows[0].input_ids == whole.input_ids[:limit]
    assert examples.rows[0].labels == whole.labels[:limit]
    assert (examples.num_truncated, examples.num_cut_tokens, examples.num_lost_stops) == (1, 4, 1)
    assert examples.num_cut_trained == 3  # the line break behind <|im_end|> is not
    assert "1 row truncated: 4 tokens cut, 3 of them trained, 1 end-of-turn token lost" in examples.summary()
    trailing = load(path, max_length=whole.num_tokens - 1, on_long_row="truncate")
    assert (trailing.num_cut_tokens, trailing.num_cut_trained, trailing.num_lost_stops) == (1, 0, 0)


def test_a_row_that_loses_its_whole_answer_is_left_out_and_counted(tmp_path: Path, rows: list[Example]) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"question": "How many clips? " * 9, "answer": "42"}, SHORT])
    examples = load(path, max_length=rows[0].num_tokens, on_long_row="truncate")
    assert (len(examples.rows), examples.num_emptied, examples.num_truncated) == (1, 1, 0)
    assert "1 row left out: truncation left no trained token" in examples.summary()


@pytest.mark.parametrize("policy", ["truncate", "skip"])
def test_no_row_left_is_an_error(policy: str, path: Path) -> None:
    assert refusal(path, max_length=3, on_long_row=policy) == (
        "data.train: no row is left of 3: data.max_length is 3, and each is too long, bad, or loses its whole answer. "
        "Raise the limit, or shorten the rows."
    )


def test_no_stop_token_left_is_an_error(tmp_path: Path, rows: list[Example]) -> None:
    path = write_rows(tmp_path / "a.jsonl", [LONG, LONG])
    assert refusal(path, max_length=rows[1].num_tokens - 2, on_long_row="truncate") == (
        "data.train: no row is left that ends with a stop token, so the model would never learn to stop. "
        "Raise the length limit, or set data.on_long_row: skip."
    )
    limits = {"max_length": rows[1].num_tokens - 2, "on_long_row": "truncate"}
    held_out = load(path, role="eval", eval=[{"path": str(path)}], **limits)
    assert (len(held_out.rows), held_out.num_lost_stops) == (2, 2), "what is measured teaches nothing"


def test_prompt_and_answer_have_limits_of_their_own(path: Path, rows: list[Example]) -> None:
    limits = {"source_max_length": 5, "target_max_length": 3}
    _, cut, _ = load(path, max_length=2, on_long_row="truncate", **limits).rows
    whole = rows[1]
    assert cut.input_ids == whole.input_ids[:5] + whole.input_ids[whole.num_prompt :][:3]
    assert cut.labels == [IGNORE_INDEX] * 5 + cut.input_ids[5:]
    assert "but data.source_max_length is 5 and target_max_length 3; in all 3 of 3 rows" in refusal(path, **limits)


# ── rows that teach nothing, or less than they hold ──────────────────────────────────────────────────────────────────


def test_a_row_without_a_trained_token_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}])
    assert refusal(path) == (
        f"{path}:2: nothing to train: the row's first token is its last, and a first token is never predicted. "
        "Remove the row, or give it a text."
    )
    assert len(load(path, on_bad_row="skip").rows) == 1


def test_empty_answers_and_lost_characters_are_counted(tmp_path: Path) -> None:
    pieces = tiny_tokenizer("pieces")
    path = write_rows(tmp_path / "a.jsonl", [SHORT, {**SHORT, "answer": ""}])
    examples = load(path, tokenizer=pieces)
    assert examples.num_silent == 1
    assert "1 row with an empty answer: trained to say nothing" in examples.summary()
    pieces.backend_tokenizer.model.byte_fallback = False
    path = write_rows(tmp_path / "b.jsonl", [SHORT, {**SHORT, "answer": "🤗 é é"}, {**SHORT, "answer": "🤗"}])
    examples = load(path, tokenizer=pieces)
    assert examples.lost_characters == (("🤗", 2), ("é", 1))
    assert examples.summary()[-1] == "2 characters lost, the tokenizer cannot write them: '🤗' in 2 rows, 'é' in 1 row"


def test_bad_rows_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [SHORT, *[7] * 7, SHORT])
    examples = load(path, on_bad_row="skip")
    assert (len(examples.rows), examples.num_bad, examples.num_rows) == (2, 7, 9)
    first, *_, last = examples.bad
    what = "expected an object with named columns, found the number 7"
    assert first == (f"{path}:2", what, "make each row an object")
    assert last[0] == f"{path}:8"
    assert str(examples.sources[0]) == f"{path}: 9 rows, 7 bad and left out, format question_answer (by its columns)"
    assert examples.summary()[2:] == [
        *(f"bad row {path}:{line}: {what}" for line in range(2, 7)),
        "... and 2 more bad rows; `qlora preview --errors` lists them",
    ]


# ── real data ────────────────────────────────────────────────────────────────────────────────────────────────────────

REAL = {
    "text/gsm8k/train.jsonl": ("question_answer", 7473),
    "text/gsm8k/test.jsonl": ("question_answer", 1319),
    "text/llamafactory/alpaca_en_demo.json": ("alpaca", 999),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("template", [CHATML, None], ids=["chatml", "no template"])
def test_real_files_train_exactly_their_answers(name: str, template: str | None) -> None:
    smollm = SHARED / "tokenizers/smollm2-135m-instruct/tokenizer.json"
    if not (SHARED / name).exists() or not smollm.exists():
        pytest.skip(f"no {SHARED / name}")
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(smollm), eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = template
    examples = load([{"path": str(SHARED / name), "limit": 400}], tokenizer=tokenizer)
    format_name, num_rows = REAL[name]
    assert examples.sources[0].format == format_name
    assert examples.num_rows == min(num_rows, 400)
    content = (SHARED / name).read_text(encoding="utf-8")
    rows = json.loads(content) if name.endswith(".json") else [json.loads(line) for line in content.splitlines()]
    space = " " if template is None and format_name == "question_answer" else ""
    answers = tokenizer.batch_decode([trained(example) for example in examples.rows])
    expected = [row.get("answer", row.get("output")) for row in rows[:400]]
    stops = ["<|im_end|>"] * len(expected)
    assert answers == [f"{space}{answer}{stop}" for answer, stop in zip(expected, stops, strict=True)]
