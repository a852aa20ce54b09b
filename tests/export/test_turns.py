"""Chat templates as what stands between texts."""

from __future__ import annotations

import time

import pytest
from templates import ENDLESS, LAST_SYSTEM, NUMBERED, SHAPES, TRIMMED, chat_of, settings_of

from qlora_cli.data.conversations import assistant, system, user
from qlora_cli.errors import Exit, UserError
from qlora_cli.export import turns
from qlora_cli.export.turns import END, START, find_turns, turns_of, written


@pytest.mark.parametrize("shape", SHAPES)
def test_the_turns_write_what_the_template_writes(shape):
    chat = chat_of(SHAPES[shape])
    found = find_turns(chat)
    messages = [user("Why?"), assistant("So."), user("And?\n\nReally?")]
    assert written(found.between, messages) == chat.render(messages, "x", add_generation_prompt=True)
    assert found.untold == ()
    if shape != "no system text":
        messages = [system("Rules."), *messages]
        assert written(found.between, messages) == chat.render(messages, "x", add_generation_prompt=True)


def test_a_role_that_the_template_refuses_is_not_among_the_turns():
    between = find_turns(chat_of(SHAPES["no system text"])).between
    assert not any("system" in pair for pair in between)
    assert (START, "user") in between


def test_a_template_that_counts_is_refused_with_the_conversation_that_shows_it():
    with pytest.raises(UserError, match=r"more than what two neighbouring roles decide.*user, assistant, user"):
        find_turns(chat_of(NUMBERED))


def test_a_template_that_drops_a_text_is_refused():
    with pytest.raises(UserError, match="does not write the user's text where it stands"):
        find_turns(chat_of("{% for m in messages %}{{ m.role }}{% endfor %}"))


def test_a_system_text_that_moves_with_the_last_message_is_taken_out_and_the_rest_stays():
    between = find_turns(chat_of(LAST_SYSTEM)).between
    assert ("system", "user") not in between
    assert between[START, "user"] == "[INST] "
    assert between["user", END] == " [/INST]"


def test_white_space_that_is_taken_off_is_told():
    assert find_turns(chat_of(TRIMMED)).untold == ("white space around a text is taken off or moved",)


@pytest.mark.parametrize("what", turns.SPECIAL)
def test_every_special_text_can_be_found_out(what):
    mangled = {
        "white space around a text is taken off or moved": "m.content | trim",
        "an empty text is left out": "m.content or 'nothing'",
        "blank lines in a text are taken out": "m.content | replace('\n\n', '\n')",
        "the reasoning in earlier answers (<think>...</think>) is taken out": "m.content.split('</think>')[-1]",
    }[what]
    text = "{% for m in messages %}<{{ m.role }}>{{ " + mangled + " }}{% endfor %}<assistant>"
    assert what in find_turns(chat_of(text)).untold


def test_the_process_with_limits_finds_the_same():
    assert turns_of(settings_of(SHAPES["chatml"])) == find_turns(chat_of(SHAPES["chatml"]))
    with pytest.raises(UserError, match="more than what two neighbouring roles decide"):
        turns_of(settings_of(NUMBERED))
    with pytest.raises(UserError, match="is no valid Jinja"):
        turns_of(settings_of("{% for"))


def test_the_process_takes_no_module_from_the_folder_that_it_is_started_in(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert turns_of(settings_of(SHAPES["chatml"])).untold == ()
    assert not (tmp_path / "ran").exists()


def test_a_process_that_fails_for_another_reason_tells_what_it_said_last(monkeypatch):
    monkeypatch.setattr(turns, "COMMAND", "import sys; sys.exit('no such thing')")
    with pytest.raises(UserError, match="ended with exit status 1: no such thing") as error:
        turns_of(settings_of(SHAPES["chatml"]))
    assert error.value.code == Exit.FAILED


def test_a_template_that_takes_all_memory_is_a_message():
    with pytest.raises(UserError, match="needs more than 1,024 MiB of memory"):
        turns_of(settings_of("{{ 'x' * 3000000000 }}" + SHAPES["chatml"]))


def test_a_template_without_an_end_is_a_message(monkeypatch):
    began = time.monotonic()
    with pytest.raises(UserError, match="does not come to an end within 1 s"):
        turns_of(settings_of(ENDLESS), cpu_seconds=1.0)
    assert time.monotonic() - began < 30
