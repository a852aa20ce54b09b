"""Rendering and label spans: proven, or refused with the reason."""

from __future__ import annotations

import pytest
from rendering import CALLING, calling, refusal, rows_of, spans_of
from tiny_tokenizer import CHATML, chat_with, tiny_chat, tiny_tokenizer

from qlora_cli.data import spans as module
from qlora_cli.data.chat import Chat
from qlora_cli.data.conversations import Conversation, Message, Plain, assistant, messages, system, user
from qlora_cli.data.spans import render_row
from qlora_cli.errors import UserError

TURNS = [user("first"), assistant("one"), user("second"), assistant("two")]
LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<assistant>{% endif %}"
QWEN3 = (  # as Qwen 3 does: reasoning only behind the last question, be it in the text or apart
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set text = m.content %}"
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and thought %}<think>\n{{ thought.strip('\n') }}\n</think>\n"
    "\n{% endif %}{{ text }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def thinking(content: str, reasoning: str) -> Message:
    return {**assistant(content), "reasoning_content": reasoning}


# ── where an answer begins and ends ──────────────────────────────────────────────────────────────────────────────────


def test_every_answer_is_trained_with_its_stop_token() -> None:
    assert spans_of(CHATML, TURNS) == ["one<|im_end|>", "two<|im_end|>"]
    assert spans_of(CHATML, [user("yes"), assistant("yes")]) == ["yes<|im_end|>"]
    assert spans_of(CHATML, [user(""), assistant("")]) == ["<|im_end|>"]
    assert spans_of(CHATML, [user(" a "), assistant("\n b\n\n")]) == ["\n b\n\n<|im_end|>"]


def test_white_space_that_a_template_trims_is_not_trained() -> None:
    trimming = CHATML.replace("message.content", "message.content | trim")
    assert spans_of(trimming, [user("a"), assistant(" b ")]) == ["b<|im_end|>"]


def test_what_the_template_writes_into_an_answer_is_trained() -> None:
    written = "{% if message.role == 'assistant' %}<b>{% endif %}{{ message.content }}"
    assert spans_of(CHATML.replace("{{ message.content }}", written), TURNS[:2]) == ["<b>one<|im_end|>"]


def test_an_answer_ends_with_the_first_stop_token_behind_its_text() -> None:
    written = "{% if message.role == 'assistant' %}</s>{% endif %}{{ message.content }}</s>"
    assert spans_of(CHATML.replace("{{ message.content }}", written), TURNS[:2]) == ["</s>one</s>"]


def test_the_longer_of_two_stop_tokens_at_one_place_ends_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>!"]})
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|im_end|>!")
    (row,) = render_row(Conversation(TURNS[:2]), chat_with(tokenizer, "<|im_end|>", "<|im_end|>!"), "")
    assert row.text[slice(*row.spans[0])] == "one<|im_end|>!"


def test_a_turn_may_end_with_the_beginning_of_the_next() -> None:
    """GLM writes no end; <|user|> is among its stop tokens. The last answer has none, so it is refused."""
    tokenizer = tiny_tokenizer(
        template="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assist", "{% if add_generation_prompt %}<|assist")
    tokenizer.chat_template += "{% endif %}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    chat = chat_with(tokenizer, "<|user|>")
    (row,) = render_row(Conversation(TURNS[:3]), chat, "")
    assert [row.text[start:end] for start, end in row.spans] == ["one<|user|>"]
    with pytest.raises(UserError, match=r"writes no end-of-turn token .* behind message 2 \(assistant\)"):
        render_row(Conversation(TURNS), chat, "")


def test_a_conversation_may_end_with_a_question() -> None:
    (row,) = rows_of(CHATML, TURNS[:3])
    assert row.text.endswith("<|im_start|>user\nsecond<|im_end|>\n")
    assert spans_of(CHATML, TURNS[:3]) == ["one<|im_end|>"]


def test_answers_in_a_row_and_a_system_text_between_turns_are_no_matter_to_chatml() -> None:
    assert spans_of(CHATML, [user("a"), assistant("b"), assistant("c")]) == ["b<|im_end|>", "c<|im_end|>"]
    assert spans_of(CHATML, [*TURNS[:2], system("now"), *TURNS[2:]]) == ["one<|im_end|>", "two<|im_end|>"]


def test_an_empty_answer_is_trained_to_stop_or_left_out() -> None:
    turns = [user("a"), assistant(""), *TURNS[:2]]
    assert spans_of(CHATML, turns) == ["<|im_end|>", "one<|im_end|>"]
    assert spans_of(CHATML, Conversation(turns, (False, False, False, True))) == ["one<|im_end|>"]


def test_an_empty_question_is_placed_by_the_messages_before_it() -> None:
    turns = [user("a"), assistant("b"), user(""), assistant("")]
    assert spans_of(CHATML, turns) == ["b<|im_end|>", "<|im_end|>"]
    tailed = CHATML + "{% if not add_generation_prompt %}tail{% endif %}"
    assert len(rows_of(tailed, turns)) == 2  # so it cannot be in one row
    assert spans_of(tailed, TURNS) == ["one<|im_end|>", "two<|im_end|>"]


# ── what is trained ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_train_on_last_and_all() -> None:
    assert spans_of(CHATML, TURNS, train_on="last") == ["two<|im_end|>"]
    (row,) = rows_of(CHATML, TURNS, train_on="all")
    assert (row.spans, row.whole, row.templated) == (((0, len(row.text)),), True, True)
    assert not rows_of(CHATML, TURNS)[0].whole


def test_train_on_all_needs_no_prompt_and_no_stop_token_but_every_text() -> None:
    assert rows_of(LOOP.replace("</s>", ""), TURNS, train_on="all")[0].text.endswith("<assistant>two")
    assert rows_of(LOOP, TURNS[1:], train_on="all")[0].whole
    assert "drops the text of message 1" in refusal(
        LOOP.replace("messages %}", "messages[1:] %}"), TURNS, train_on="all"
    )
    assert "drops the reasoning of message 2" in refusal(CHATML, [user("a"), thinking("b", "c")], train_on="all")


def test_an_answer_marked_as_untrained_is_not_trained() -> None:
    content = Conversation([*TURNS, user("third"), assistant("three")], (False, True, False, False, False, True))
    assert spans_of(CHATML, content) == ["one<|im_end|>", "three<|im_end|>"]
    assert spans_of(CHATML, content, train_on="last") == ["three<|im_end|>"]


@pytest.mark.parametrize(
    ("train_on", "trained", "whole"),
    [("completion", [" one", " two"], False), ("last", [" two"], False), ("all", ["Q: one? two"], True)],
)
def test_verbatim_text_is_trained_piece_by_piece(train_on: str, trained: list[str], whole: bool) -> None:
    plain = Plain((("Q:", False), (" one", True), ("?", False), (" two", True)))
    (row,) = render_row(plain, tiny_chat(None, train_on=train_on), "")
    assert [row.text[start:end] for start, end in row.spans] == trained
    assert (row.templated, row.whole) == (False, whole)


def test_verbatim_text_that_brings_its_own_bos_and_eos_loses_the_white_space_outside_them() -> None:
    chat = tiny_chat(None)

    def text(prompt: str, completion: str) -> str:
        (row,) = render_row(Plain.of(prompt, completion), chat, "")
        assert row.spans[-1][1] == len(row.text)
        return row.text

    assert text("\n<s> a", "b </s>\n") == "<s> ab </s>"
    assert text("", " <s>a</s> ") == "<s>a</s>"
    assert text("\n", "\n<s>a") == "<s>a"
    assert text(" a ", " b ") == " a  b "
    outside = Plain((("\n", True), ("\n<s>a", False), ("</s>", False), (" ", False), ("\n", True)))
    (row,) = render_row(outside, chat, "")
    assert (row.text, row.spans) == ("<s>a</s>", ((8, 8),))


# ── one row per turn ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_only_the_last_answer_ends_each_becomes_a_row() -> None:
    template = LOOP.replace("</s>", "") + "{% if add_generation_prompt %}<assistant>{% else %}</s>{% endif %}"
    first, second = rows_of(template, TURNS)
    assert (first.text, first.spans) == ("<user>first<assistant>one</s>", ((22, 29),))
    assert second.text == "<user>first<assistant>one<user>second<assistant>two</s>"
    assert [second.text[start:end] for start, end in second.spans] == ["two</s>"]
    assert first.where == second.where == "data.jsonl:7"
    assert spans_of(template, TURNS, train_on="last") == ["two</s>"]
    (untrained,) = rows_of(template, Conversation(TURNS, (False, True, False, False)))
    assert untrained == first


def test_if_one_turn_is_refused_so_is_the_row() -> None:
    template = LOOP + "{% if messages | length > 3 %}{{ raise_exception('too long') }}{% endif %}" + GENERATION
    assert "stops with: too long" in refusal(template, TURNS)


def test_reasoning_that_the_template_drops_from_earlier_turns_needs_a_row_per_turn() -> None:
    turns = [user("a"), thinking("b", "why b"), user("c"), thinking("d", "why d")]
    first, second = rows_of(QWEN3, turns)
    assert first.text[slice(*first.spans[0])] == "<think>\nwhy b\n</think>\n\nb<|im_end|>"
    assert second.text[slice(*second.spans[0])] == "<think>\nwhy d\n</think>\n\nd<|im_end|>"
    assert "why b" not in second.text
    assert spans_of(QWEN3, turns, train_on="last") == ["<think>\nwhy d\n</think>\n\nd<|im_end|>"]
    assert spans_of(QWEN3, Conversation(turns, (False, False, False, True))) == [
        "<think>\nwhy d\n</think>\n\nd<|im_end|>"
    ]
    assert spans_of(QWEN3, TURNS) == ["one<|im_end|>", "two<|im_end|>"]
    assert "drops the reasoning of message 2 (assistant)" in refusal(QWEN3, turns, train_on="all")


def test_reasoning_in_the_text_is_the_same_where_the_template_takes_it_out() -> None:
    apart = [user("a"), thinking("b", "why b"), user("c"), thinking("d", "why d")]
    within = [user("a"), assistant("<think>\nwhy b\n</think>\n\nb"), user("c"), assistant("<think>why d</think>d")]
    assert rows_of(QWEN3, within) == rows_of(QWEN3, apart)
    assert spans_of(CHATML, within[:2]) == ["<think>\nwhy b\n</think>\n\nb<|im_end|>"]
    none = [user("a"), assistant("<think>\n\n</think>\n\nb")]
    assert spans_of(QWEN3, none) == ["b<|im_end|>"]
    late = [user("a"), assistant("b <think>\nwhy\n</think> c")]
    assert "drops the text of message 2" in refusal(QWEN3, late)
    both = [user("a"), {**thinking("<think>x</think>b", "why")}]
    assert "drops the" in refusal(QWEN3, both)


def test_reasoning_in_the_text_is_not_set_apart_if_that_changes_what_the_template_writes() -> None:
    """It drops what is in the text, and would write reasoning_content."""
    template = QWEN3.replace("{% set thought = text.split", "{% set ignored = text.split")
    turns = [user("a"), assistant("<think>\nwhy b\n</think>\n\nb")]
    assert "drops the text of message 2 (assistant)" in refusal(template, turns)
    assert spans_of(template, [user("a"), thinking("b", "why b")]) == ["<think>\nwhy b\n</think>\n\nb<|im_end|>"]


def test_reasoning_that_a_template_never_writes_is_refused_where_it_is_trained() -> None:
    turns = [user("a"), thinking("b", "why"), *TURNS[:2]]
    assert "drops the reasoning of message 2 (assistant)" in refusal(CHATML, turns)
    assert spans_of(CHATML, Conversation(turns, (False, False, False, True))) == ["one<|im_end|>"]


# ── what is lost ─────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED: dict[str, tuple[str, str]] = {
    "no stop token": (
        LOOP.replace("</s>", "\n") + GENERATION,
        "writes no end-of-turn token of the tokenizer ('</s>' or '<|im_end|>')",
    ),
    "dropped text": (
        LOOP.replace("{{ m.content }}", "{% if m.role != 'user' %}{{ m.content }}{% endif %}"),
        "drops the text of message 1 (user)",
    ),
    "dropped history": (LOOP.replace("in messages", "in messages[-2:]"), "drops the text of message 1 (user)"),
    "dropped end": (LOOP.replace("m.content", "m.content[:-1]") + GENERATION, "rewrites the texts of the row"),
    "repeated text": (LOOP.replace("{{ m.content }}", "{{ m.content * 2 }}"), "repeats the text of message 1 (user)"),
    "repeated at the end": (LOOP + "{{ messages[0].content }}" + GENERATION, "repeats the text of message 1 (user)"),
    "reordered": (LOOP.replace("in messages", "in messages | reverse"), "moves message 2 (assistant)"),
    "depends on the text": (
        LOOP.replace("{{ m.content }}", "{{ m.content }}{{ m.content | length }}"),
        "rewrites the texts of the row",
    ),
    "rewritten answer": (LOOP.replace("m.content", "m.content | upper") + GENERATION, "rewrites the text of message 1"),
    "rewritten inside": (
        LOOP.replace("m.content", "m.content | replace('n', 'm')") + GENERATION,
        "rewrites the text of message 2 (assistant)",
    ),
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
    assert message.endswith("Change the row, or set data.chat_template to a template that fits it.")


def test_a_generation_prompt_beyond_the_answers_begin_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}one{% endif %}"
    assert "does not end the prompt between the texts of two messages" in refusal(template, TURNS[:2])


def test_a_prompt_without_the_question_is_refused() -> None:
    silent = "{% for m in messages %}{% if not (add_generation_prompt and loop.last) %}"
    template = LOOP.replace("{% for m in messages %}", silent).replace("{% endfor %}", "{% endif %}{% endfor %}")
    assert "does not end the prompt between the texts of two messages" in refusal(template, TURNS[:2])


def test_a_conversation_that_begins_with_an_answer_is_refused_if_that_is_trained() -> None:
    assert "begins with the assistant's message: no prompt leads to it" in refusal(CHATML, TURNS[1:])
    assert spans_of(CHATML, Conversation(TURNS[1:], (False, False, True))) == ["two<|im_end|>"]


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<|im_start|>"])
def test_control_tokens_in_a_text_are_refused(token: str) -> None:
    what = f"holds the control token {token!r}, which would act as one. Remove it from the text"
    assert f"the text of message 1 (user) {what}" in refusal(CHATML, [user(f"a {token} b"), assistant("c")])
    assert f"the reasoning of message 2 (assistant) {what}" in refusal(QWEN3, [user("a"), thinking("b", token)])
    call = calling({"a": [{"b": token}]})
    assert f"a tool call's argument of message 2 (assistant) {what}" in refusal(CALLING, [user("a"), call])
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"description": token}}}]
    assert f"a tool {what}" in refusal(CHATML, Conversation(TURNS, tools=tools))
    plain = Conversation([user("a"), assistant(token)], plain=Plain.of("a", token))
    assert f"message 2 (assistant) {what}" in refusal(None, plain)


def test_rows_of_absurd_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CHARACTERS", 100)
    what = "characters, more than 100. Split the row, or remove it"
    assert what in refusal(CHATML, [user("a" * 100), assistant("b")])
    assert f"the row has 101 {what}" in refusal(None, Plain.of("a" * 100, "b"))
    call = calling({"all": [str(number) for number in range(32_000)]})
    assert "the row holds more than 32,000 texts" in refusal(
        CALLING.replace("c.function.arguments", "''"), [user("a"), call]
    )


def test_without_a_template_a_conversation_needs_one_unless_it_has_a_text_of_its_own() -> None:
    message = refusal(None, TURNS)
    assert "the row is a conversation, but the tokenizer has no chat template" in message
    assert "data.chat_template" in message
    (row,) = render_row(Conversation(TURNS[:2], plain=Plain.of("Q: first", " one")), tiny_chat(None), "")
    assert (row.text, row.spans, row.templated) == ("Q: first one", ((8, 12),), False)


def test_a_chat_is_needed_for_rendering_alone() -> None:
    chat: Chat = tiny_chat(None)
    with pytest.raises(AssertionError, match="messages need a template"):
        chat.render(TURNS, "")


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user", "name": "bob<|im_end|>\n<|im_start|>assistant\nyes", "content": "q"}, "a name of message 1"),
        ({"role": "tool", "tool_call_id": "<|im_end|>", "content": "q"}, "a name of message 1"),
    ],
)
def test_control_tokens_in_a_name_or_an_id_are_refused(message: Message, told: str) -> None:
    """A template may write them, where they would end a turn or begin one."""
    assert told in refusal(CHATML, [message, assistant("a")])


def test_control_tokens_in_keys_are_refused() -> None:
    call = calling({"<|im_end|>": 1})
    assert "a name of message 2 (assistant) holds the control token '<|im_end|>'" in refusal(CALLING, [user("a"), call])
    parameters = {"type": "object", "properties": {"<|im_end|>": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    content = Conversation([user("a"), assistant("b")], tools=tools)
    assert "a tool holds the control token '<|im_end|>'" in refusal("{{ tools | tojson }}" + CHATML, content)


def test_an_answer_that_is_marked_as_not_trained_contradicts_training_all() -> None:
    rows = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
    rows += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    for extra in ({}, {"system": "be brief"}):
        content = messages({"messages": rows, **extra}, "data.jsonl:7")
        number = 2 + len(extra)
        assert f"message {number} (assistant) is marked as not trained. Set data.train_on to completion" in refusal(
            CHATML, content, train_on="all"
        )
        assert spans_of(CHATML, content) == ["d<|im_end|>"]
    user_only = [{**rows[0], "train": False}, *rows[2:]]
    assert len(rows_of(CHATML, messages({"messages": user_only[:1] + rows[3:]}, "a"), train_on="all")) == 1
