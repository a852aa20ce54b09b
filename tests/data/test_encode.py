"""Ids and labels: every answer's characters and its stop token, nothing else; the prompt as the model will see it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, chat_with, tiny_chat, tiny_tokenizer

from qlora_cli.data.chat import Chat
from qlora_cli.data.conversations import Conversation, Message, Plain, assistant, system, user
from qlora_cli.data.encode import IGNORE_INDEX, Example, encode, encode_prompt, unspelled
from qlora_cli.data.spans import Rendered, render_row
from qlora_cli.errors import UserError

KINDS = ["bytes", "trimmed", "pieces"]
TEXTS = st.text(st.characters(codec="utf-8", max_codepoint=0x1FFFF) | st.sampled_from(" \n\t4é🤗"), max_size=20)
CONVERSATIONS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def chats() -> dict[str, Chat]:
    return {f"{kind}{'+bos' if bos else ''}": tiny_chat(kind=kind, bos=bos) for kind in KINDS for bos in (False, True)}


def one(content: Conversation | Plain, chat: Chat) -> Example:
    (example,) = encode(render_row(content, chat, "data.jsonl:7"), chat)
    if isinstance(example, UserError):
        raise example
    return example


def trained(example: Example) -> list[int]:
    return [label for label in example.labels if label != IGNORE_INDEX]


def text(ids: list[int], chat: Chat) -> str:
    decoded: str = chat.tokenizer.decode(ids, skip_special_tokens=False)
    return decoded


def tokens(ids: list[int], chat: Chat) -> list[str]:
    return [chat.tokenizer.id_to_token(token) for token in ids]


def tokenized(words: str, chat: Chat) -> list[str]:
    found: list[str] = chat.tokenizer.encode(words, add_special_tokens=False).tokens
    return found


def turns(pairs: list[tuple[str, str]]) -> list[Message]:
    return [turn for question, answer in pairs for turn in (user(question), assistant(answer))]


# ── conversations ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_is_encoded_as_transformers_does(kind: str, chats: dict[str, Chat]) -> None:
    messages = turns([("How many clips?", "42 clips"), ("Sure?", "Yes 🤗")])
    example = one(Conversation(messages), chats[kind])
    assert example.input_ids == tiny_tokenizer(kind).apply_chat_template(messages, return_dict=False)
    assert example.where == "data.jsonl:7"
    assert len(example.labels) == example.num_tokens
    answers = text(trained(example), chats[kind])
    assert answers.replace(" ", "") == "42clips<|im_end|>Yes🤗<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(CONVERSATIONS)
def test_the_trained_tokens_are_the_answers_and_their_stop_tokens(
    chats: dict[str, Chat], pairs: list[tuple[str, str]]
) -> None:
    for kind in ("bytes", "trimmed", "bytes+bos"):
        chat = chats[kind]
        example = one(Conversation(turns(pairs)), chat)
        assert text(trained(example), chat) == "".join(answer + "<|im_end|>" for _, answer in pairs)
        assert all(
            label in (token, IGNORE_INDEX) for token, label in zip(example.input_ids, example.labels, strict=True)
        )
        assert text(example.input_ids, chat) == chat.render(turns(pairs), "")
        assert encode_prompt(turns(pairs)[:1], chat) == example.input_ids[: example.num_prompt]
        assert example.num_trained == len(trained(example))


def test_what_is_trained_follows_the_row_and_train_on() -> None:
    messages = turns([("a", "one"), ("b", "two")])
    last, whole = tiny_chat(train_on="last"), tiny_chat(train_on="all")
    assert text(trained(one(Conversation(messages), last)), last) == "two<|im_end|>"
    example = one(Conversation(messages), whole)
    assert example.labels == example.input_ids
    assert example.num_prompt == 0
    flagged = one(Conversation(messages, (False, True, False, False)), tiny_chat())
    assert text(trained(flagged), whole) == "one<|im_end|>"
    assert text(flagged.input_ids, whole).endswith("two<|im_end|>\n")


def test_every_row_of_a_conversation_is_an_example() -> None:
    template = CHATML.replace(
        "<|im_end|>\n{% endfor %}", "\n{% endfor %}{% if not add_generation_prompt %}</s>{% endif %}"
    )
    chat = tiny_chat(template)
    examples = encode(render_row(Conversation(turns([("a", "one"), ("b", "two")])), chat, "data.jsonl:7"), chat)
    assert [text(trained(example), chat) for example in examples] == ["one\n</s>", "two\n</s>"]


def test_every_cut_of_a_conversation_keeps_its_stop_tokens() -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}: {% else %}</s>{% endif %}{% endfor %}"
    for kind in KINDS:
        chat = tiny_chat(template, kind=kind)
        example = one(Conversation(turns([("Answer", "clips"), ("Question", "42")])), chat)
        assert text(trained(example), chat).replace(" ", "") == "clips</s>42</s>"
        assert text(example.input_ids, chat).replace(" ", "") == "Answer:clips</s>Question:42</s>"
        written = tokens(trained(example), chat)
        assert written.count("</s>") == 2
        assert not any(token.startswith(("\u0120", "\u2581")) for token in written)


def test_a_cut_finds_a_stop_token_of_one_character() -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}: {% else %}|.{% endif %}{% endfor %}"
    chat = chat_with(tiny_tokenizer(eos="|", template=template))
    example = one(Conversation(turns([("Answer", "clips"), ("Question", "42")])), chat)
    assert text(trained(example), chat) == "clips|42|"


def test_a_stop_that_is_no_token_of_its_own_is_refused() -> None:
    """The plain text 'e' ends turns here, but in 'endgame' it is part of another token."""
    loop = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    tokenizer = tiny_tokenizer(template=loop + "{% if not add_generation_prompt %}endgame{% endif %}")
    tokenizer.add_tokens(["endgame"])
    with pytest.raises(UserError, match=r"data.jsonl:7: the end-of-turn token .* is not one token of the vocabulary"):
        one(Conversation([user("a"), assistant("b")]), chat_with(tokenizer, "e"))


def test_a_template_gets_no_second_bos() -> None:
    chat = tiny_chat("<s>" + CHATML, bos=True)
    example = one(Conversation(turns([("a", "b")])), chat)
    assert example.input_ids.count(1) == 1
    assert encode_prompt([user("a")], chat).count(1) == 1


def test_a_template_that_writes_two_bos_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"data.jsonl:7: the tokenizer's chat template begins the row with two BOS tokens"
    ):
        one(Conversation(turns([("a", "b")])), tiny_chat("<s><s>" + CHATML, bos=True))


def test_a_bad_row_leaves_the_others_of_its_batch() -> None:
    chat = tiny_chat("{% if messages[0].role == 'system' %}<s><s>{% endif %}" + CHATML, bos=True)
    good, twice = Conversation(turns([("a", "b")])), Conversation([system("s"), *turns([("a", "b")])])
    first, bad, last = encode([row for content in (good, twice, good) for row in render_row(content, chat, "")], chat)
    assert isinstance(bad, UserError)
    assert isinstance(first, Example)
    assert first == last
    assert encode([], chat) == []


def test_a_span_need_not_reach_the_end_of_a_rendered_text(chats: dict[str, Chat]) -> None:
    chat = chats["bytes"]
    (example,) = encode([Rendered("", "a: b</s>\n\n c", ((2, 8),), templated=True)], chat)
    assert isinstance(example, Example)
    assert text(trained(example), chat) == " b</s>"


# ── verbatim text ────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS)
def test_verbatim_text_is_trained_from_its_first_character(
    chats: dict[str, Chat], prompt: str, completion: str
) -> None:
    for kind in ("bytes", "trimmed", "bytes+bos", "trimmed+bos"):
        chat = chats[kind]
        example = one(Plain.of(prompt, completion), chat)
        start = "<s>" if kind.endswith("bos") else ""
        assert text(example.input_ids, chat) == f"{start}{prompt}{completion}</s>"
        assert text(trained(example), chat) == f"{completion}</s>"
        assert encode_prompt(prompt, chat) == example.input_ids[: example.num_prompt]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS.map(str.strip), st.booleans()), min_size=1, max_size=6))
def test_the_trained_pieces_of_a_verbatim_text_are_trained(
    chats: dict[str, Chat], pieces: list[tuple[str, bool]]
) -> None:
    plain = Plain(tuple((f"|{piece}|" if piece else "", flag) for piece, flag in pieces))
    for kind in ("bytes", "trimmed+bos"):
        chat = chats[kind]
        example = one(plain, chat)
        start = "<s>" if kind.endswith("bos") else ""
        assert text(example.input_ids, chat) == start + plain.text + "</s>"
        ends = bool(plain.pieces) and plain.pieces[-1][1]
        expected = "".join(piece for piece, flag in plain.pieces if flag) + ("</s>" if ends else "")
        assert text(trained(example), chat) == expected


def test_a_token_across_the_start_of_an_answer_is_cut(chats: dict[str, Chat]) -> None:
    """' clips' is one token: the prompt keeps its space, as when the model is used."""
    for kind in KINDS:
        chat = chats[kind]
        example = one(Plain.of("Answer: ", "clips 42"), chat)
        written = tokens(example.input_ids, chat)
        assert written[: example.num_prompt] == tokenized("Answer: ", chat)
        assert written != [*tokenized("Answer: clips 42", chat), "</s>"]
        assert "".join(written[example.num_prompt :]) in ("clips\u012042</s>", "clips\u258142</s>")
        whole = one(Plain.of("Answer:", " clips 42"), chat)
        assert tokens(whole.input_ids, chat) == [*tokenized("Answer: clips 42", chat), "</s>"]


def test_a_character_of_several_tokens_is_trained_whole(chats: dict[str, Chat]) -> None:
    """Before another text: an emoji is four byte tokens, which share their offsets."""
    example = one(Plain((("a", False), ("yes 🤗", True), (" b", False))), chats["bytes"])
    assert text(trained(example), chats["bytes"]).strip() == "yes 🤗"


def test_a_token_across_the_end_of_an_answer_is_cut(chats: dict[str, Chat]) -> None:
    """' clips' is one token: nothing behind the trained space may be trained with it."""
    for kind in KINDS:
        chat = chats[kind]
        example = one(Plain((("Answer:", False), (" 42 ", True), ("clips 12", False))), chat)
        assert text(trained(example), chat).replace(" ", "") == "42"
        assert text(example.input_ids, chat).replace(" ", "") == "Answer:42clips12</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_merges_with_any_line_break_before_it_is_encoded_alone(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    tokenizer.add_tokens(["\n\n"])
    chat = chat_with(tokenizer)
    example = one(Plain.of("a\n", "\nb"), chat)
    assert text(example.input_ids, chat).replace(" ", "") == "a\n\nb</s>"
    assert text(trained(example), chat).replace(" ", "") == "\nb</s>"
    assert encode_prompt("a\n", chat) == example.input_ids[: example.num_prompt]


@pytest.mark.parametrize("kind", [f"{kind}{bos}" for kind in KINDS for bos in ("", "+bos")])
@pytest.mark.parametrize("own", ["a b", "<s>a b", "a b</s>", "<s>a b</s>", " <s>a b</s>\n"])
def test_bos_and_eos_are_never_doubled(kind: str, own: str, chats: dict[str, Chat]) -> None:
    example = one(Plain.of("", own), chats[kind])
    assert example.input_ids.count(1) == int("<s>" in own or kind.endswith("bos"))
    assert example.input_ids.count(2) == 1
    assert example.input_ids[-1] == example.labels[-1] == 2
    if kind.endswith("bos"):
        assert (example.input_ids[0], example.labels[0]) == (1, IGNORE_INDEX)


def test_a_verbatim_text_with_two_bos_is_refused(chats: dict[str, Chat]) -> None:
    with pytest.raises(UserError, match=r"data.jsonl:7: the text begins with two BOS tokens. Remove one of them"):
        one(Plain.of("<s><s>a", "b"), chats["bytes+bos"])


def test_all_of_a_text_is_trained_but_the_first_token_is_never_predicted(chats: dict[str, Chat]) -> None:
    plain, with_bos = (one(Plain.of("", "the answer"), chats[kind]) for kind in ("bytes", "bytes+bos"))
    assert plain.labels == plain.input_ids
    assert plain.num_trained == plain.num_tokens - 1
    assert with_bos.input_ids == [1, *plain.input_ids]
    assert with_bos.num_trained == with_bos.num_tokens - 1
    assert one(Plain.of("", ""), chats["bytes"]).num_trained == 0
    assert Example([], [], "").num_prompt == 0


def test_pad_that_is_eos_is_still_trained_as_eos(chats: dict[str, Chat]) -> None:
    chat = chats["bytes"]
    assert tiny_tokenizer().pad_token_id == chat.settings.eos_id
    assert one(Plain.of("a", "b"), chat).labels[-1] == chat.settings.eos_id


def test_settings_of_the_tokenizer_neither_truncate_nor_pad(chats: dict[str, Chat]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    content = Plain.of("the answer of the question", " is forty two")
    assert one(content, chat_with(tokenizer)).input_ids == one(content, chats["bytes"]).input_ids


def test_characters_that_become_unk_or_vanish_are_named(chats: dict[str, Chat]) -> None:
    for kind in KINDS:
        assert unspelled("aé🤗 \n\u200d4", chats[kind].tokenizer, 0) == []
    tokenizer = tiny_tokenizer("pieces")
    tokenizer.backend_tokenizer.model.byte_fallback = False
    assert unspelled("aé🤗 \n4", tokenizer.backend_tokenizer, 0) == ["é", "🤗"]
    vanishing = tiny_chat(kind="pieces", spell_bytes=False)
    assert tokenized("aéb", vanishing) == ["\u2581a", "b"]
    assert unspelled("aé🤗 \n4", vanishing.tokenizer, None) == ["é", "🤗"]
    assert unspelled([], vanishing.tokenizer, None) == []
