"""Rendering and label spans: proven, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import CHATML, tiny_tokenizer

from qlora_cli.data.chat import Chat, load_chat, render_prompt, render_row
from qlora_cli.data.formats import Conversation, Plain, assistant, user
from qlora_cli.errors import UserError

TURNS = [user("first"), assistant("one"), user("second"), assistant("two")]


def chat_of(template: str | None = CHATML, **options: Any) -> Chat:
    tokenizer = tiny_tokenizer(template=template, **options)
    return load_chat(None, tokenizer, frozenset({tokenizer.convert_tokens_to_ids("<|im_end|>")}))


def spans_of(template: str, messages: list[dict[str, str]]) -> list[str]:
    row = render_row(Conversation(messages), chat_of(template), "data.jsonl:7")
    return [row.text[start:end] for start, end in row.spans]


def refusal(template: str | None, messages: list[dict[str, str]]) -> str:
    with pytest.raises(UserError) as caught:
        render_row(Conversation(messages), chat_of(template), "data.jsonl:7")
    return str(caught.value)


def test_every_answer_is_trained_with_its_stop_token() -> None:
    assert spans_of(CHATML, TURNS) == ["one<|im_end|>", "two<|im_end|>"]
    assert spans_of(CHATML, [user("yes"), assistant("yes")]) == ["yes<|im_end|>"]
    assert spans_of(CHATML, [user(""), assistant("")]) == ["<|im_end|>"]
    assert spans_of(CHATML, [user(" a "), assistant("\n b\n\n")]) == ["\n b\n\n<|im_end|>"]


def test_white_space_that_a_template_trims_is_not_trained() -> None:
    assert spans_of(CHATML.replace("message.content", "message.content | trim"), [user("a"), assistant(" b ")]) == [
        "b<|im_end|>"
    ]


def test_what_the_template_writes_into_an_answer_is_trained() -> None:
    template = CHATML.replace(
        "{{ message.content }}", "{% if message.role == 'assistant' %}<b>{% endif %}{{ message.content }}"
    )
    assert spans_of(template, [user("a"), assistant("b")]) == ["<b>b<|im_end|>"]


def test_the_longer_of_two_stop_tokens_at_one_place_ends_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>!"]})
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_end|>!"])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|im_end|>!")
    row = render_row(Conversation([user("a"), assistant("b")]), load_chat(None, tokenizer, frozenset(ids)), "")
    assert row.text[slice(*row.spans[0])] == "b<|im_end|>!"


LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<assistant>{% endif %}"
REFUSED: dict[str, tuple[str, str]] = {
    "no stop token": (LOOP.replace("</s>", "\n") + GENERATION, "writes no end-of-turn token ('</s>' or '<|im_end|>')"),
    "stop token only at the end": (
        LOOP.replace("</s>", "") + "{% if add_generation_prompt %}<assistant>{% else %}</s>{% endif %}",
        "behind message 2 (assistant)",
    ),
    "dropped text": (LOOP.replace("{{ m.content }}", "{% if m.role != 'user' %}{{ m.content }}{% endif %}"), "drops"),
    "dropped history": (LOOP.replace("in messages", "in messages[-2:]"), "drops the text of message 1 (user)"),
    "repeated text": (LOOP.replace("{{ m.content }}", "{{ m.content * 2 }}"), "repeats or reorders the messages"),
    "reordered": (LOOP.replace("in messages", "in messages | reverse"), "repeats or reorders the messages"),
    "depends on the text": (
        LOOP.replace("{{ m.content }}", "{{ m.content }}{{ m.content | length }}"),
        "rewrites the text of the messages",
    ),
    "rewritten answer": (LOOP.replace("m.content", "m.content | upper") + GENERATION, "rewrites the text of message 2"),
    "prompt is no prefix": (LOOP + "{% if add_generation_prompt %}<bot>{% endif %}", "renders the prompt of message 2"),
    "stops itself": ("{{ raise_exception('only one turn') }}", "stops with: only one turn"),
    "undefined": ("{{ messages[9].content.x }}", "stops with:"),
    "type error": ("{{ messages + 1 }}", "stops with: can only concatenate list"),
    "division": ("{{ 1 // 0 }}", "stops with: integer division"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_proven_is_refused_with_the_reason(case: str) -> None:
    template, what = REFUSED[case]
    message = refusal(template, TURNS)
    assert message.startswith("data.jsonl:7: the tokenizer's chat template ")
    assert what in message
    assert message.endswith("set data.chat_template to a template that fits it.")


def test_a_generation_prompt_beyond_the_answers_begin_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}one{% endif %}"
    assert "does not end the prompt between the texts of two messages" in refusal(template, TURNS[:2])


def test_a_conversation_that_begins_with_an_answer_is_refused() -> None:
    assert "begins with the assistant's message: no prompt leads to it" in refusal(CHATML, TURNS[1:])


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<|im_start|>"])
def test_control_tokens_in_the_text_are_refused(token: str) -> None:
    what = f"the text of message 1 (user) holds the control token {token!r}, which would act as one"
    assert what in refusal(CHATML, [user(f"a {token} b"), assistant("c")])
    plain = Conversation([user("a"), assistant(token)], Plain("a", token))
    with pytest.raises(UserError, match=r"message 2 \(assistant\) holds the control token"):
        render_row(plain, chat_of(None), "data.jsonl:7")


def test_marks_in_the_text_are_refused() -> None:
    assert "message 2 (assistant) holds private-use characters" in refusal(CHATML, [user("a"), assistant("\U000f0001")])


def test_without_a_template_a_conversation_needs_one_unless_it_has_a_text_of_its_own() -> None:
    message = refusal(None, TURNS)
    assert "the row is a conversation, but the tokenizer has no chat template" in message
    assert "data.chat_template" in message
    row = render_row(Conversation(TURNS[:2], Plain("Q: first", " one")), chat_of(None), "")
    assert (row.text, row.spans, row.templated) == ("Q: first one", ((8, 12),), False)


def test_a_templates_file_wins_over_the_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "loop.jinja"
    path.write_text(LOOP + GENERATION)
    chat = load_chat(str(path), tiny_tokenizer(), frozenset())
    assert render_prompt([user("a")], chat, "") == "<user>a</s><assistant>"
    assert chat.stops == {"</s>": 2}


def test_bad_template_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_bytes(b"\xff")
    (tmp_path / "open.jinja").write_text("a\n{% for m in messages %}")

    def load(name: str) -> Chat:
        return load_chat(str(tmp_path / name), tiny_tokenizer(), frozenset())

    with pytest.raises(UserError, match=r"data.chat_template: no such file: .*chat.jnja, did you mean .*chat.jinja"):
        load("chat.jnja")
    with pytest.raises(UserError, match=r"chat.jinja cannot be read: 'utf-8' codec"):
        load("chat.jinja")
    with pytest.raises(UserError, match=r"data.chat_template: .* cannot be read: .*directory"):
        load("")
    with pytest.raises(UserError, match=r"open.jinja:2: is no valid Jinja"):
        render_prompt([user("a")], load("open.jinja"), "")


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tools": "x"}
    assert render_prompt([user("a")], load_chat(None, tokenizer, frozenset()), "").startswith("<|im_start|>user")
    tokenizer.chat_template = {"rag": CHATML, "tools": "x"}
    with pytest.raises(UserError, match="several chat templates \\(rag, tools\\) and none is called default"):
        load_chat(None, tokenizer, frozenset())


def test_a_tokenizer_without_eos_or_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_chat(None, tiny_tokenizer(eos=None), frozenset())
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="gives no offsets"):
        load_chat(None, tokenizer, frozenset())


def test_stop_ids_beyond_the_vocabulary_are_no_stop_tokens() -> None:
    assert load_chat(None, tiny_tokenizer(), frozenset({99_999})).stops == {"</s>": 2}


def test_a_row_that_brings_its_own_bos_and_eos_loses_the_white_space_outside_them() -> None:
    chat = chat_of(None)
    assert render_row(Plain("\n<s> a", "b </s>\n"), chat, "").text == "<s> ab </s>"
    assert render_row(Plain("", " <s>a</s> "), chat, "").text == "<s>a</s>"
    assert render_row(Plain("\n", "\n<s>a"), chat, "").text == "<s>a"
    assert render_row(Plain(" a ", " b "), chat, "").text == " a  b "
