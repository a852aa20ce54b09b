"""Dialogues written as one text: the turns, and the verbatim text with its trained pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.data.conversations import Conversation, Plain, assistant, system, user
from qlora_cli.data.dialogues import ANTHROPIC, GUANACO, OIG, chip2, hh_rlhf, oasst, read_dialogue
from qlora_cli.errors import UserError


def test_every_answer_is_trained_up_to_the_next_turn() -> None:
    text = "### Human: Hi### Assistant: Hello \n### Human: Why?### Assistant: So."
    assert oasst({"text": text}, "") == Conversation(
        [user("Hi"), assistant("Hello"), user("Why?"), assistant("So.")],
        plain=Plain(
            (
                ("### Human: Hi### Assistant:", False),
                (" Hello", True),
                (" \n### Human: Why?### Assistant:", False),
                (" So.", True),
            )
        ),
    )


def test_the_last_turn_of_a_human_stays_untrained() -> None:
    content = oasst({"text": "### Human: Hi### Assistant: Hello### Human: Now to a dog"}, "")
    assert content.messages[-1] == user("Now to a dog")
    assert content.answers == (1,)
    assert content.plain is not None
    assert content.plain.pieces[-2:] == ((" Hello", True), ("### Human: Now to a dog", False))


def test_what_precedes_the_first_turn_is_the_systems() -> None:
    content = oasst({"text": "A chat. ### Human: Hi ### Assistant: Hello"}, "")
    assert content.messages == [system("A chat."), user("Hi"), assistant("Hello")]


def test_of_input_and_output_the_output_alone_is_trained() -> None:
    row = {"input": "### Human: Hi ### Assistant: Ho ### Human: Why? ### Assistant:", "output": "So. ", "text": "x"}
    expected = Conversation(
        [user("Hi"), assistant("Ho"), user("Why?"), assistant("So. ")],
        (False, False, False, True),
        plain=Plain.of(row["input"], " So. "),
    )
    assert oasst(row, "") == expected
    assert oasst({**row, "input": row["input"] + " "}, "").plain == Plain.of(row["input"] + " ", "So. ")


def test_hh_rlhf_and_chip2_have_marks_of_their_own() -> None:
    chosen = "\n\nHuman: Hi\n\nAssistant: Hello"
    assert hh_rlhf({"chosen": chosen}, "") == Conversation(
        [user("Hi"), assistant("Hello")], plain=Plain.of("\n\nHuman: Hi\n\nAssistant:", " Hello")
    )
    assert chip2({"text": "<human>: Hi\n<bot>: Say <bot>: no."}, "") == Conversation(
        [user("Hi"), assistant("Say <bot>: no.")], plain=Plain.of("<human>: Hi\n<bot>:", " Say <bot>: no.")
    )


def test_an_empty_answer_is_trained_to_stop_only_at_the_end() -> None:
    content = hh_rlhf({"chosen": "\n\nHuman: Hi\n\nAssistant:\n\nHuman: Well?\n\nAssistant:"}, "")
    assert content.messages == [user("Hi"), assistant(""), user("Well?"), assistant("")]
    assert content.plain == Plain.of("\n\nHuman: Hi\n\nAssistant:\n\nHuman: Well?\n\nAssistant:", "")


def test_a_text_without_an_answer_is_refused() -> None:
    with pytest.raises(UserError, match=r"^a:7: holds no turn of the assistant, which begins with '### Assistant:'"):
        oasst({"text": "### Human: Hi"}, "a:7")
    with pytest.raises(UserError, match=r"begins with '\\n<bot>:'"):
        chip2({"text": "Hi"}, "a:7")


def test_an_input_without_the_assistants_mark_is_refused() -> None:
    with pytest.raises(UserError, match=r"^a:7: input does not end with '### Assistant:'. Set format: input_output"):
        oasst({"input": "Hi", "output": "Ho"}, "a:7")


@pytest.mark.parametrize("marks", [GUANACO, ANTHROPIC, OIG])
@given(
    parts=st.lists(st.sampled_from(["### Human:", "### Assistant:", "\n\nHuman:", "\n\nAssistant:"]) | st.text("a \n"))
)
def test_the_plain_text_is_the_text(marks, parts: list[str]) -> None:
    text = "".join([*parts, marks.answer, " x"])
    content = read_dialogue(text, marks, "")
    assert content.plain is not None
    assert content.plain.text == text
    said = [text.strip() for text, trained in content.plain.pieces if trained]
    assert said == [
        content.messages[index]["content"] for index in content.answers if content.messages[index]["content"]
    ]
