"""The Go template says what the Jinja template says."""

from __future__ import annotations

import pytest
from go_reader import Stopped, execute
from templates import LAST_SYSTEM, SHAPES, chat_of

from qlora_cli.data.conversations import assistant, system, user
from qlora_cli.errors import UserError
from qlora_cli.export.go_template import go_template, literal
from qlora_cli.export.turns import find_turns

TURNS = [user("Why {{ x }}?"), assistant("So\n'it' \"is\"."), user("And 再 \\n?"), assistant("yes"), user("yes")]
CONVERSATIONS = {
    "one turn": TURNS[:1],
    "three turns": TURNS,
    "a system text": [system("Rules β"), *TURNS[:1]],
    "a system text and turns": [system("Rules β"), *TURNS],
    "an empty text": [user("")],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_go_writes_what_jinja_writes_or_stops_where_it_stops(shape, conversation):
    chat, messages = chat_of(SHAPES[shape]), CONVERSATIONS[conversation]
    template = go_template(find_turns(chat))
    try:
        wanted = chat.render(messages, "x", add_generation_prompt=True)
    except UserError:
        with pytest.raises(Stopped, match="has no place for this message"):
            execute(template, messages)
        return
    assert execute(template, messages) == wanted
    begun = [*messages, assistant("It is")]
    assert execute(template, begun) == wanted + "It is", "the model goes on with an answer that has begun"


def test_a_system_text_that_cannot_be_said_stops_the_model_and_nothing_else():
    template = go_template(find_turns(chat_of(LAST_SYSTEM)))
    assert execute(template, TURNS[:1]) == "[INST] Why {{ x }}? [/INST]"
    with pytest.raises(Stopped):
        execute(template, [system("Rules"), *TURNS[:1]])


def test_an_answer_in_front_which_ollama_makes_by_cutting_is_left_out_where_the_template_has_none():
    template = go_template(find_turns(chat_of(SHAPES["the system text in the user's turn"])))
    assert execute(template, TURNS[1:3]) == execute(template, TURNS[2:3])


def test_a_role_of_another_kind_stops_the_model():
    template = go_template(find_turns(chat_of(SHAPES["chatml"])))
    with pytest.raises(Stopped):
        execute(template, [*TURNS[:1], {"role": "tool", "content": "7"}])


@pytest.mark.parametrize("text", ["{", "}}", '"""', 'x"', "\u00a0", "\u200b", "\r", "🤗\u2028", "\\{", "\x1b"])
def test_what_a_modelfile_or_a_template_would_not_keep_is_written_as_a_string(text):
    written = literal(text)
    assert written.startswith('{{ "')
    assert '"""' not in written
    assert written.isprintable()
    assert execute(written, []) == text


def test_ordinary_text_is_written_as_it_is():
    assert literal("<｜User｜>▁ [INST]\n\té 🤗 \\n 'a' \"b\" ") == "<｜User｜>▁ [INST]\n\té 🤗 \\n 'a' \"b\" "
