"""Row formats: what each reads, how `auto` chooses, and what is refused where."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.formats import (
    FORMATS,
    Conversation,
    Plain,
    assistant,
    check_row,
    choose_format,
    fitting,
    system,
    user,
)
from qlora_cli.errors import UserError

TEXTS = Path(__file__).parents[3] / "shared/data/text"
SAMPLES: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Add.", "input": "1, 2", "output": "3"},
    "messages": {"messages": [user("hi"), assistant("hello")]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    "prompt_completion": {"prompt": "1 + 1 =", "completion": " 2"},
    "input_output": {"input": "1 + 1 =", "output": " 2"},
    "question_answer": {"question": "How many?", "answer": "42"},
    "summarisation": {"document": "It rained all day.", "summary": "Rain."},
    "text": {"text": "Once upon a time"},
    "seed_tasks": {"instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}]},
    "hh_rlhf": {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    "oasst": {"text": "### Human: hi### Assistant: hello"},
    "chip2": {"text": "<human>: hi\n<bot>: hello"},
    "self_instruct": {"prompt": "Add 1 and 2.\n\nOutput:", "completion": " 3<|endoftext|>"},
    "longform": {"input": "Write.", "output": "Long ago", "source": "wiki", "subset": "c4"},
}
BY_COLUMNS = [name for name, format in FORMATS.items() if format.auto]
LISTS = ("messages", "conversations", "instances")


def read(name: str, row: dict[str, Any]) -> Conversation | Plain:
    return FORMATS[name].read(row, "data.jsonl:7")


def refusal(name: str, row: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        read(name, row)
    assert str(caught.value).startswith("data.jsonl:7: ")
    return str(caught.value)


def choice_refusal(row: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        choose_format(row, "data.jsonl:1")
    return str(caught.value)


def check_refusal(name: str, auto: bool, row: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        check_row(name, auto, row, "data.jsonl:2")
    return str(caught.value)


def test_every_format_has_a_sample() -> None:
    assert [*SAMPLES] == [*FORMATS]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_ends_with_what_is_trained(name: str) -> None:
    content = read(name, SAMPLES[name])
    if isinstance(content, Conversation):
        assert content.messages[-1]["role"] == "assistant"
        assert content.answers[-1] == len(content.messages) - 1
        content = content.plain or Plain.of("", "no template, no text")
    assert content.pieces[-1][1]


@pytest.mark.parametrize("name", FORMATS)
def test_every_column_must_be_a_text(name: str) -> None:
    for column in {*SAMPLES[name]} - {*LISTS, "rejected", "source", "subset"}:
        assert f"{column} is the number 7, not a text" in refusal(name, {**SAMPLES[name], column: 7})
        half = f"{column} holds half of a character (U+D83D)"
        assert half in refusal(name, {**SAMPLES[name], column: SAMPLES[name][column] + "\ud83d"})


# ── instructions and questions ───────────────────────────────────────────────────────────────────────────────────────


def test_alpaca_is_a_conversation_and_the_stanford_text_where_there_is_no_template() -> None:
    assert read("alpaca", SAMPLES["alpaca"]) == Conversation(
        [user("Add.\n\n1, 2"), assistant("3")],
        plain=Plain.of(
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:",
            "3",
        ),
    )
    expected = Conversation(
        [user("Sing {x}."), assistant("La")],
        plain=Plain.of(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nSing {x}.\n\n### Response:",
            "La",
        ),
    )
    assert read("alpaca", {"instruction": "Sing {x}.", "input": "", "output": "La"}) == expected
    assert read("alpaca", {"instruction": "Sing {x}.", "output": "La", "system": "", "history": []}) == expected
    assert read("alpaca", {"instruction": "Sing {x}.", "input": None, "output": "La", "history": None}) == expected


def test_alpaca_with_a_history_and_a_system_text_is_a_longer_conversation_without_a_plain_text() -> None:
    row = {**SAMPLES["alpaca"], "system": "Be brief.", "history": [["Hi", "Hello"], ["1?", "One."]]}
    turns = [user("Hi"), assistant("Hello"), user("1?"), assistant("One."), user("Add.\n\n1, 2"), assistant("3")]
    content = read("alpaca", row)
    assert content == Conversation([system("Be brief."), *turns])
    assert isinstance(content, Conversation)
    assert content.answers == (2, 4, 6)


def test_a_history_that_is_none_is_refused() -> None:
    assert "history is a text, not a list" in refusal("alpaca", {**SAMPLES["alpaca"], "history": "Hi"})
    assert "history 1: is no pair" in refusal("alpaca", {**SAMPLES["alpaca"], "history": [["Hi"]]})
    assert "history 2: answer is the number 3, not a text" in refusal(
        "alpaca", {**SAMPLES["alpaca"], "history": [["Hi", "Ho"], ["a", 3]]}
    )


def test_a_seed_task_reads_as_alpaca_does() -> None:
    assert read("seed_tasks", SAMPLES["seed_tasks"]) == read("alpaca", SAMPLES["alpaca"])


def test_a_seed_task_with_other_than_one_instance_is_refused() -> None:
    task = {"input": "", "output": "3"}
    assert "has 2 instances, and a row is one example" in refusal(
        "seed_tasks", {"instruction": "Add.", "instances": [task, task]}
    )
    assert "has 0 instances" in refusal("seed_tasks", {"instruction": "Add.", "instances": []})
    assert "instances is no list of objects" in refusal("seed_tasks", {"instruction": "Add.", "instances": ["x"]})
    assert "instance 1: output is null, not a text" in refusal("seed_tasks", {"instruction": "Add.", "instances": [{}]})


def test_question_answer_has_the_space_in_the_answer_where_there_is_no_template() -> None:
    assert read("question_answer", SAMPLES["question_answer"]) == Conversation(
        [user("How many?"), assistant("42")], plain=Plain.of("Question: How many?\nAnswer:", " 42")
    )


@pytest.mark.parametrize("columns", [("document", "summary"), ("article", "highlights"), ("dialogue", "summary")])
def test_summarisation_reads_the_columns_of_each_data_set(columns: tuple[str, str]) -> None:
    row = dict(zip(columns, ("Long text.", "Short."), strict=True)) | {"id": "1"}
    assert choose_format(row, "") == "summarisation"
    assert read("summarisation", row) == Conversation(
        [user("Summarize the following text.\n\nLong text."), assistant("Short.")],
        plain=Plain.of("Long text.\n\nTL;DR:", " Short."),
    )


def test_summarisation_of_two_data_sets_at_once_is_refused() -> None:
    row = {**SAMPLES["summarisation"], "dialogue": "Hi."}
    assert "has the columns of two data sets. Give it one of document, summary or article" in refusal(
        "summarisation", row
    )
    assert "has the columns 'body'" in refusal("summarisation", {"body": "x"})


# ── verbatim text ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_verbatim_formats_leave_the_text_alone() -> None:
    assert read("prompt_completion", {"prompt": " a ", "completion": "\nb "}) == Plain.of(" a ", "\nb ")
    for name in ("input_output", "longform"):
        assert read(name, {"input": " a ", "output": "\nb "}) == Plain.of(" a ", "\nb ")
    assert read("text", {"text": " a "}) == Plain.of("", " a ")


def test_self_instruct_loses_the_end_of_text_of_gpt_3_once() -> None:
    assert read("self_instruct", SAMPLES["self_instruct"]) == Plain.of("Add 1 and 2.\n\nOutput:", " 3")
    assert read("self_instruct", {"prompt": "a", "completion": "b"}) == Plain.of("a", "b")


def test_prompt_and_completion_as_messages_train_the_completion() -> None:
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    assert read("prompt_completion", row) == Conversation(
        [user("a"), assistant("b"), user("c"), assistant("d")], (False, False, False, True)
    )


def test_a_verbatim_prompt_has_no_place_for_a_system_text() -> None:
    row = {**SAMPLES["prompt_completion"], "system": "Be brief."}
    assert "has system, but prompt and completion are texts" in refusal("prompt_completion", row)
    assert read("prompt_completion", {**row, "system": ""}) == Plain.of("1 + 1 =", " 2")


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", BY_COLUMNS)
def test_auto_recognises_every_format_of_columns_of_its_own(name: str) -> None:
    for row in (SAMPLES[name], {**SAMPLES[name], "id": 3}, {"text": None, **SAMPLES[name]}):
        assert choose_format(row, "") == name
        check_row(name, True, row, "")
        check_row(name, False, row, "")


@pytest.mark.parametrize("name", sorted({*FORMATS} - {*BY_COLUMNS}))
def test_a_second_reading_of_the_same_columns_is_never_chosen(name: str) -> None:
    assert name not in fitting(SAMPLES[name])
    check_row(name, False, SAMPLES[name], "")


def test_the_format_that_reads_most_columns_is_chosen() -> None:
    assert choose_format({"instruction": "a", "input": "b", "output": "c"}, "") == "alpaca"  # and not input_output
    assert choose_format({"instruction": "a", "input": "", "output": "c", "text": "d"}, "") == "alpaca"  # tatsu-lab's
    assert choose_format({"messages": [], "tools": [], "text": "x"}, "") == "messages"
    assert choose_format({"input": "a", "output": "b", "source": "c", "subset": "d"}, "") == "input_output"


def test_columns_of_two_formats_are_ambiguous() -> None:
    both = {**SAMPLES["question_answer"], "prompt": "x", "completion": "y"}
    assert fitting(both) == ["prompt_completion", "question_answer"]
    message = choice_refusal(both)
    assert "'prompt', 'completion' fit prompt_completion and question_answer." in message
    assert message.endswith("Set format: prompt_completion or question_answer.")
    check_row("question_answer", False, both, "")


def test_columns_of_no_format_list_what_is_known() -> None:
    message = choice_refusal({"body": "x", "text": None})
    assert "no format fits the columns 'body', 'text'" in message
    assert all(f"{name}: {format}" in message for name, format in FORMATS.items())
    assert "the columns (none)" in choice_refusal({})


@pytest.mark.parametrize(
    ("row", "formats"),
    [
        (SAMPLES["oasst"], "oasst or text"),
        ({"text": "\n### Human: hi"}, "oasst or text"),
        (SAMPLES["chip2"], "chip2 or text"),
        ({"input": "### Human: hi ### Assistant:", "output": "hello"}, "oasst or input_output"),
    ],
)
def test_a_dialogue_is_not_taken_for_plain_text(row: dict[str, Any], formats: str) -> None:
    chosen = formats.split()[-1]
    assert "a dialogue, which the format" in choice_refusal(row)
    assert choice_refusal(row).endswith(f"Set format: {formats}.")
    assert f"Set format: {formats}." in check_refusal(chosen, True, row)
    check_row(chosen, False, row, "")


def test_auto_checks_every_row() -> None:
    assert check_refusal("text", True, {"body": "x"}).startswith(
        "data.jsonl:2: no column text for the format text (null counts as none), found 'body'. Fill it in, or set"
    )
    assert "fit question_answer, the first row's fit text" in check_refusal(
        "text", True, {**SAMPLES["question_answer"], "text": "x"}
    )


def test_a_missing_column_names_those_found_and_the_formats_that_fit() -> None:
    message = check_refusal("alpaca", False, SAMPLES["question_answer"])
    assert message.startswith(
        "data.jsonl:2: no column instruction and output for the format alpaca (null counts as none), found 'question',"
    )
    assert message.endswith("Set format: question_answer.")
    assert "the format text (null counts as none), found 'body'. Fill it in" in check_refusal(
        "text", False, {"body": "x"}
    )
    assert "no column article and highlights or dialogue for the format summarisation" in check_refusal(
        "summarisation", False, {"summary": "x", "document": None}
    ).replace("document or ", "")


# ── anything a file can hold ─────────────────────────────────────────────────────────────────────────────────────────

WORDS = st.sampled_from(
    (
        *("", "x", "user", "assistant", "tool", "human", "gpt", "function_call", "text", "tool_call", "image_url"),
        *("function", '{"name": "f", "arguments": {}}', '[{"name": "f"}]', "[]", "{", "\ud83d", '"\\ud83d"'),
        *("### Human: a ### Assistant:", "\n\nHuman: a\n\nAssistant: b", "<human>: a\n<bot>: b"),
        *("[" * 5000, "1" * 5000, "a" * 100_000),
    )
)
KEYS = st.sampled_from(
    (
        *("role", "content", "from", "value", "type", "text", "name", "function", "arguments", "tool_calls", "images"),
        *("function_call", "tool_call_id", "weight", "train", "thinking", "reasoning", "id", "prefix", "parameters"),
        *("input", "output"),
    )
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)
COLUMNS = sorted({column for format in FORMATS.values() for columns in format.one_of for column in columns})
COLUMNS += ["tools", "functions", "system", "history", "rejected", "images"]
ROWS = st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=6)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(row=ROWS, more=st.lists(JSON, max_size=2), changes=st.dictionaries(KEYS, JSON, max_size=2))
def test_any_row_is_read_or_refused(name: str, row: dict[str, Any], more: list[Any], changes: dict[str, Any]) -> None:
    sample = SAMPLES[name]
    rows = [row, {**sample, **row}]
    for column, turns in sample.items():
        if column in LISTS:
            rows += [{**row, column: [*more, *turns]}, {**row, column: [*turns[:-1], {**turns[-1], **changes}]}]
    for candidate in rows:
        try:
            content = read(name, candidate)
        except UserError:
            continue
        if isinstance(content, Conversation):
            json.dumps([content.messages, content.tools], ensure_ascii=False, allow_nan=False).encode()
            assert content.answers
            content = content.plain or Plain.of("", "")
        content.text.encode()


@settings(max_examples=200, deadline=None)
@given(row=ROWS)
def test_any_row_is_chosen_or_refused(row: dict[str, Any]) -> None:
    try:
        name = choose_format(row, "")
    except UserError:
        return
    check_row(name, True, row, "")


# ── real data ────────────────────────────────────────────────────────────────────────────────────────────────────────

REAL: dict[str, tuple[str, int, int]] = {  # file: format, rows, trained messages
    "llamafactory/alpaca_en_demo.json": ("alpaca", 999, 999),
    "llamafactory/identity.json": ("alpaca", 91, 91),
    "llamafactory/glaive_toolcall_en_demo.json": ("sharegpt", 300, 957),
    "llamafactory/reason_tool_use_demo_50.jsonl": ("messages", 50, 112),
    "llamafactory/v1_sft_demo.jsonl": ("messages", 500, 500),
    "gsm8k/test.jsonl": ("question_answer", 1319, 1319),
    "hh-rlhf/test.jsonl.gz": ("hh_rlhf", 2312, 5764),
    "self-instruct/seed_tasks.jsonl": ("seed_tasks", 175, 175),
    "self-instruct/user_oriented_instructions.jsonl": ("seed_tasks", 252, 252),
    "qlora/oa_questions.jsonl": ("oasst", 953, 953),
    "qlora/gpt-3.5-oa-generations.jsonl": ("oasst", 953, 953),
}


@pytest.mark.parametrize("file", REAL)
def test_real_files_read_completely(file: str) -> None:
    path = TEXTS / file
    if not path.exists():
        pytest.skip(f"no {path}")
    content = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    rows = json.loads(content) if content[0] == "[" else [json.loads(line) for line in content.split("\n") if line]
    name, num_rows, num_trained = REAL[file]
    read_rows = []
    for number, row in enumerate(rows, 1):
        check_row(name, FORMATS[name].auto, row, f"{file}:{number}")
        read_rows.append(FORMATS[name].read(row, f"{file}:{number}"))
    assert len(read_rows) == num_rows
    assert sum(len(content.answers) for content in read_rows if isinstance(content, Conversation)) == num_trained
    if not FORMATS[name].auto:
        assert f"Set format: {name} or" in choice_refusal(rows[0])


@pytest.mark.parametrize("column", ["system", "tools", "functions"])
def test_what_other_columns_are_read_with_is_not_passed_over(column: str) -> None:
    row = {"question": "a", "answer": "b", column: "be brief"}
    message = f"a:1: has {column}, which the format question_answer does not read."
    for check in (lambda: choose_format(row, "a:1"), lambda: check_row("question_answer", False, row, "a:1")):
        with pytest.raises(UserError, match=message):
            check()
    assert choose_format({**row, column: ""}, "a:1") == "question_answer"
    assert choose_format({"instruction": "a", "output": "b", "system": "be brief"}, "a:1") == "alpaca"
