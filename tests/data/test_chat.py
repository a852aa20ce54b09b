"""The settings of a run: which template, which tokens end a turn, and what cannot be used."""

from __future__ import annotations

import pickle
from datetime import date
from pathlib import Path

import pytest
from tiny_tokenizer import CHATML, chat_with, tiny_chat, tiny_tokenizer

from qlora_cli.data.chat import Chat, chat_settings, make_chat
from qlora_cli.data.conversations import user
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Data

LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


def prompt(chat: Chat) -> str:
    return chat.render([user("a")], "data.jsonl:7", add_generation_prompt=True)


def test_the_settings_are_plain_data_that_makes_the_same_chat_elsewhere() -> None:
    settings = tiny_chat(bos=True).settings
    again = pickle.loads(pickle.dumps(settings))
    assert again == settings
    assert prompt(make_chat(again)) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert (settings.bos, settings.eos_id, settings.unk_id) == ([1], 2, 0)
    assert settings.stops == {"</s>": 2, "<|im_end|>": 4}
    assert settings.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    assert settings.called == "the tokenizer's chat template"
    assert tiny_chat().settings.bos == []


def test_a_stop_token_that_is_not_marked_as_special_is_a_control_token_too() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<stop>", "<other>"])
    chat = chat_with(tokenizer, "<stop>")
    assert [bool(chat.control.fullmatch(text)) for text in ("<stop>", "<other>", "</s>")] == [True, False, True]
    assert "<stop>" in chat.settings.stops


def test_stop_ids_beyond_the_vocabulary_are_no_stop_tokens() -> None:
    settings = chat_settings(Data(train=[{"path": "x"}]), tiny_tokenizer(), frozenset({99_999}), date.today())
    assert settings.stops == {"</s>": 2}


def test_the_tokenizers_limits_and_padding_do_not_act() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    chat = chat_with(tokenizer)
    assert (chat.tokenizer.truncation, chat.tokenizer.padding) == (None, None)


def test_a_templates_file_wins_over_the_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "loop.jinja"
    path.write_text(LOOP + "{% if add_generation_prompt %}<assistant>{% endif %}")
    chat = chat_with(tiny_tokenizer(), chat_template=str(path))
    assert prompt(chat) == "<user>a</s><assistant>"
    assert chat.settings.called == str(path)


def test_bad_template_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_bytes(b"\xff")
    (tmp_path / "open.jinja").write_text("a\n{% for m in messages %}")
    (tmp_path / "filter.jinja").write_text("{{ messages | no_such }}")
    (tmp_path / "zero.jinja").write_text("{{ 'a' * (1 // 0) }}")

    def load(name: str) -> Chat:
        return chat_with(tiny_tokenizer(), chat_template=str(tmp_path / name))

    with pytest.raises(UserError, match=r"data.chat_template: no such file: .*chat.jnja .did you mean .*chat.jinja"):
        load("chat.jnja")
    with pytest.raises(UserError, match=r"data.chat_template: .*chat.jinja cannot be read: 'utf-8' codec"):
        load("chat.jinja")
    with pytest.raises(UserError, match=r"data.chat_template: .* cannot be read: .*directory"):
        load("")
    with pytest.raises(UserError, match=r"open.jinja:2: is no valid Jinja: .*Correct the template"):
        load("open.jinja")
    with pytest.raises(UserError, match=r"filter.jinja:1: is no valid Jinja: No filter named 'no_such'"):
        load("filter.jinja")
    with pytest.raises(UserError, match=r"data.jsonl:7: .*zero.jinja stops with: "):
        prompt(load("zero.jinja"))


def test_a_template_that_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(UserError, match=r"the tokenizer's chat template: cannot be compiled: "):
        tiny_chat("{{ " + "(" * 500 + "1" + ")" * 500 + " }}")


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tools": "x"}
    assert prompt(chat_with(tokenizer)).startswith("<|im_start|>user")
    tokenizer.chat_template = {"rag": CHATML, "tools": "x"}
    with pytest.raises(UserError, match="several chat templates \\(rag, tools\\) and none is called default"):
        chat_with(tokenizer)


def test_a_tokenizer_without_eos_or_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no end-of-sequence token"):
        chat_with(tiny_tokenizer(eos=None))
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="gives no offsets"):
        chat_with(tokenizer)


def test_the_recipes_keys_reach_the_template_and_win_over_the_tokenizers() -> None:
    tokenizer = tiny_tokenizer(template="{{ bos_token }}{{ enable_thinking }}{{ messages[0].content }}")
    assert prompt(chat_with(tokenizer)) == "<s>a"
    assert prompt(chat_with(tokenizer, chat_template_kwargs={"enable_thinking": True})) == "<s>Truea"
    assert prompt(chat_with(tokenizer, chat_template_kwargs={"bos_token": "<b>"})) == "<b>a"
    with pytest.raises(UserError, match=r"data.jsonl:7: .* stops with: .*multiple values for keyword argument 'tools'"):
        prompt(chat_with(tokenizer, chat_template_kwargs={"tools": []}))


def test_the_error_of_a_template_is_one_short_line() -> None:
    for template in ("{{ raise_exception('a\nb') }}", "{{ raise_exception('a' * 5000) }}", "{{ raise_exception('') }}"):
        with pytest.raises(UserError) as caught:
            prompt(tiny_chat(template))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_only_a_template_that_asks_for_the_date_is_dated() -> None:
    assert tiny_chat("{{ strftime_now('%Y') }}").settings.is_dated
    assert not tiny_chat().settings.is_dated
    assert not tiny_chat(None).settings.is_dated
