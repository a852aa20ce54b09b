"""Row formats: what each reads, how `auto` chooses, and what is refused where."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_cli.data.formats import FORMATS, Conversation, Plain, assistant, choose_format, fitting, user
from qlora_cli.data.sources import Rows
from qlora_cli.errors import UserError

SAMPLES: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Add.", "input": "1, 2", "output": "3"},
    "messages": {"messages": [user("hi"), assistant("hello")]},
    "prompt_completion": {"prompt": "1 + 1 =", "completion": " 2"},
    "question_answer": {"question": "How many?", "answer": "42"},
    "text": {"text": "Once upon a time"},
}


def rows_of(*rows: dict[str, Any]) -> Rows:
    return Rows(list(rows), [f"data.jsonl:{number}" for number in range(1, len(rows) + 1)])


def refusal(name: str, row: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        FORMATS[name].read(row, "data.jsonl:7")
    assert str(caught.value).startswith("data.jsonl:7: ")
    return str(caught.value)


def choice_refusal(name: str, *rows: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        choose_format(name, rows_of(*rows))
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_auto_recognises_every_format(name: str) -> None:
    extra = {**SAMPLES[name], "id": 3}
    assert choose_format("auto", rows_of(SAMPLES[name], extra)) == name
    assert choose_format(name, rows_of(extra)) == name


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_ends_with_what_is_trained(name: str) -> None:
    content = FORMATS[name].read(SAMPLES[name], "data.jsonl:7")
    if isinstance(content, Conversation):
        assert content.messages[-1]["role"] == "assistant"
    else:
        assert content.completion


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"messages"}))
def test_every_column_must_be_a_text(name: str) -> None:
    for column in SAMPLES[name]:
        assert f"{column} is the number 7, not a text" in refusal(name, {**SAMPLES[name], column: 7})
        assert f"{column} is a list, not a text" in refusal(name, {**SAMPLES[name], column: ["x"]})
        assert f"{column} holds half of a character (U+D83D)" in refusal(name, {**SAMPLES[name], column: "a\ud83d"})


def test_alpaca_is_a_conversation_and_the_stanford_text_where_there_is_no_template() -> None:
    assert FORMATS["alpaca"].read(SAMPLES["alpaca"], "") == Conversation(
        [user("Add.\n\n1, 2"), assistant("3")],
        Plain(
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:",
            "3",
        ),
    )
    expected = Conversation(
        [user("Sing {x}."), assistant("La")],
        Plain(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nSing {x}.\n\n### Response:",
            "La",
        ),
    )
    assert FORMATS["alpaca"].read({"instruction": "Sing {x}.", "input": "", "output": "La"}, "") == expected
    assert FORMATS["alpaca"].read({"instruction": "Sing {x}.", "output": "La"}, "") == expected


def test_question_answer_has_the_space_in_the_answer_where_there_is_no_template() -> None:
    assert FORMATS["question_answer"].read(SAMPLES["question_answer"], "") == Conversation(
        [user("How many?"), assistant("42")], Plain("Question: How many?\nAnswer:", " 42")
    )


def test_verbatim_formats_leave_the_text_alone() -> None:
    row = {"prompt": " a ", "completion": "\nb "}
    assert FORMATS["prompt_completion"].read(row, "") == Plain(" a ", "\nb ")
    assert FORMATS["text"].read({"text": " a "}, "") == Plain("", " a ")


def test_messages_keep_role_and_content_alone() -> None:
    system = {"role": "system", "content": "Be brief.", "id": 1}
    content = FORMATS["messages"].read({"messages": [system, user("hi"), assistant("")], "tools": []}, "")
    assert content == Conversation([{"role": "system", "content": "Be brief."}, user("hi"), assistant("")])


BAD_MESSAGES: dict[str, tuple[Any, str]] = {
    "no list": ("hi", "messages is a text"),
    "empty": ([], "messages is an empty list"),
    "no answer": ([user("hi")], "has no assistant's message, so nothing to train"),
    "ends with the user": ([user("a"), assistant("b"), user("c")], "ends with the user's message"),
    "turn that is no object": (["hi"], "message 1: is a text, not an object"),
    "no role": ([{"content": "hi"}], "message 1: has no role"),
    "unknown role": ([user("a"), {"role": "bot", "content": "b"}], "message 2: has the unknown role 'bot'"),
    "role that is no text": ([{"role": ["user"], "content": "b"}], "message 1: has the unknown role ['user']"),
    "no content": ([{"role": "user"}], "message 1: content is null, not a text"),
    "parts": (
        [{"role": "user", "content": [{"type": "text"}]}],
        "message 1: content is a list; parts are not available",
    ),
    "tool role": ([user("a"), {"role": "tool", "content": "b"}], "message 2: uses tools or a developer role"),
    "tool call": ([{"role": "assistant", "tool_calls": [{}]}], "which is not available yet"),
    "weight": ([user("a"), {**assistant("b"), "weight": 0}], "message 2: has the key 'weight'"),
    "reasoning": ([user("a"), {**assistant("b"), "reasoning_content": "hm"}], "has the key 'reasoning_content'"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_messages_that_cannot_be_trained_are_refused_with_their_number(case: str) -> None:
    messages, what = BAD_MESSAGES[case]
    assert what in refusal("messages", {"messages": messages}).replace("data.jsonl:7: ", "", 1)


def test_tools_of_a_row_are_refused() -> None:
    assert "has tools; tool use is not available yet" in refusal("messages", {**SAMPLES["messages"], "tools": [{}]})


def test_columns_of_two_formats_are_ambiguous() -> None:
    both = {**SAMPLES["alpaca"], "text": "x"}
    assert fitting(both) == ["alpaca", "text"]
    message = choice_refusal("auto", both)
    assert message.startswith("data.jsonl:1: the columns 'instruction', 'input', 'output', 'text' fit alpaca and text.")
    assert message.endswith("Set format: alpaca or text.")
    assert choose_format("alpaca", rows_of(both)) == "alpaca"


def test_columns_of_no_format_list_what_is_known() -> None:
    message = choice_refusal("auto", {"body": "x"})
    assert "no format fits the columns 'body'" in message
    assert all(name in message for name in FORMATS)
    assert "the columns (none)" in choice_refusal("auto", {})


def test_auto_checks_every_row() -> None:
    assert choice_refusal("auto", SAMPLES["text"], SAMPLES["text"], {"body": "x"}).startswith(
        "data.jsonl:3: the columns 'body' fit no format, the first row's fit text"
    )
    assert "fit question_answer and text, the first row's fit text" in choice_refusal(
        "auto", SAMPLES["text"], {**SAMPLES["question_answer"], "text": "x"}
    )


def test_a_missing_column_names_those_found_and_the_formats_that_fit() -> None:
    message = choice_refusal("alpaca", SAMPLES["alpaca"], SAMPLES["question_answer"])
    assert message.startswith(
        "data.jsonl:2: no column instruction and output for the format alpaca, found 'question', 'answer'."
    )
    assert message.endswith("Set format: question_answer.")
    assert "the format text, found 'body'. Rename the columns to those of a format" in choice_refusal(
        "text", {"body": "x"}
    )
