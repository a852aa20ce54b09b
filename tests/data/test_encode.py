"""Ids and labels: every answer's characters and its stop token, nothing else; the prompt as the model will see it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from qlora_cli.data import encode as module
from qlora_cli.data.chat import Chat, Rendered, load_chat, render_row
from qlora_cli.data.encode import IGNORE_INDEX, Example, encode, encode_prompt, unspelled
from qlora_cli.data.formats import Conversation, Plain, assistant, user
from qlora_cli.errors import UserError

KINDS = ["bytes", "trimmed", "pieces"]
TEXTS = st.text(st.characters(codec="utf-8", max_codepoint=0x1FFFF) | st.sampled_from(" \n\t4é🤗"), max_size=20)
CONVERSATIONS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def chats() -> dict[str, Chat]:
    return {
        f"{kind}{'+bos' if bos else ''}": load_chat(None, tokenizer, frozenset({4}))
        for kind in KINDS
        for bos in (False, True)
        for tokenizer in [tiny_tokenizer(kind, bos=bos)]
    }


def one(content: Conversation | Plain, chat: Chat) -> Example:
    (example,) = encode([render_row(content, chat, "data.jsonl:7")], chat)
    return example


def trained(example: Example) -> list[int]:
    return [label for label in example.labels if label != IGNORE_INDEX]


def text(ids: list[int], chat: Chat) -> str:
    return chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [turn for question, answer in pairs for turn in (user(question), assistant(answer))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_is_encoded_as_transformers_does(kind: str, chats: dict[str, Chat]) -> None:
    messages = turns([("How many clips?", "42 clips"), ("Sure?", "Yes 🤗")])
    example = one(Conversation(messages), chats[kind])
    assert example.input_ids == chats[kind].tokenizer.apply_chat_template(messages, return_dict=False)
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
        assert text(example.input_ids, chat) == chat.tokenizer.apply_chat_template(turns(pairs), tokenize=False)
        assert encode_prompt(turns(pairs)[:1], chat) == example.input_ids[: example.num_prompt]
        assert example.num_trained == len(trained(example))


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS)
def test_verbatim_text_is_trained_from_its_first_character(
    chats: dict[str, Chat], prompt: str, completion: str
) -> None:
    for kind in ("bytes", "trimmed", "bytes+bos", "trimmed+bos"):
        chat = chats[kind]
        example = one(Plain(prompt, completion), chat)
        start = "<s>" if kind.endswith("bos") else ""
        assert text(example.input_ids, chat) == f"{start}{prompt}{completion}</s>"
        assert text(trained(example), chat) == f"{completion}</s>"
        assert encode_prompt(prompt, chat) == example.input_ids[: example.num_prompt]


def test_a_token_across_the_start_of_an_answer_is_cut(chats: dict[str, Chat]) -> None:
    """' clips' is one token: the prompt keeps its space, as when the model is used."""
    for kind in KINDS:
        chat = chats[kind]
        tokenize = chat.tokenizer.tokenize
        example = one(Plain("Answer: ", "clips 42"), chat)
        tokens = chat.tokenizer.convert_ids_to_tokens(example.input_ids)
        assert tokens[: example.num_prompt] == tokenize("Answer: ")
        assert tokens != [*tokenize("Answer: clips 42"), "</s>"]
        assert "".join(tokens[example.num_prompt :]) in ("clips\u012042</s>", "clips\u258142</s>")
        whole = one(Plain("Answer:", " clips 42"), chat)
        assert chat.tokenizer.convert_ids_to_tokens(whole.input_ids) == [*tokenize("Answer: clips 42"), "</s>"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_merges_with_any_line_break_before_it_is_encoded_alone(
    kind: str, chats: dict[str, Chat], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer(kind)
    tokenizer.add_tokens(["\n\n"])
    chat = load_chat(None, tokenizer, frozenset({4}))
    example = one(Plain("a\n", "\nb"), chat)
    assert text(example.input_ids, chat).replace(" ", "") == "a\n\nb</s>"
    assert text(trained(example), chat).replace(" ", "") == "\nb</s>"
    assert encode_prompt("a\n", chat) == example.input_ids[: example.num_prompt]


def test_every_cut_of_a_conversation_keeps_its_stop_tokens() -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}: {% else %}</s>{% endif %}{% endfor %}"
    for kind in KINDS:
        tokenizer = tiny_tokenizer(kind, template=template)
        chat = load_chat(None, tokenizer, frozenset())
        example = one(Conversation(turns([("Answer", "clips"), ("Question", "42")])), chat)
        assert text(trained(example), chat).replace(" ", "") == "clips</s>42</s>"
        assert text(example.input_ids, chat).replace(" ", "") == "Answer:clips</s>Question:42</s>"
        tokens = [chat.tokenizer.convert_ids_to_tokens(token) for token in trained(example)]
        assert tokens.count("</s>") == 2
        assert not any(token.startswith(("\u0120", "\u2581")) for token in tokens)


def test_a_cut_finds_a_stop_token_of_one_character() -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}: {% else %}|.{% endif %}{% endfor %}"
    chat = load_chat(None, tiny_tokenizer(eos="|", template=template), frozenset())
    example = one(Conversation(turns([("Answer", "clips"), ("Question", "42")])), chat)
    assert text(trained(example), chat) == "clips|42|"


@pytest.mark.parametrize("kind", [f"{kind}{bos}" for kind in KINDS for bos in ("", "+bos")])
@pytest.mark.parametrize("own", ["a b", "<s>a b", "a b</s>", "<s>a b</s>", " <s>a b</s>\n"])
def test_bos_and_eos_are_never_doubled(kind: str, own: str, chats: dict[str, Chat]) -> None:
    example = one(Plain("", own), chats[kind])
    assert example.input_ids.count(1) == int("<s>" in own or kind.endswith("bos"))
    assert example.input_ids.count(2) == 1
    assert example.input_ids[-1] == example.labels[-1] == 2
    if kind.endswith("bos"):
        assert (example.input_ids[0], example.labels[0]) == (1, IGNORE_INDEX)


def test_a_template_gets_no_second_bos(chats: dict[str, Chat]) -> None:
    tokenizer = tiny_tokenizer(bos=True, template="<s>" + tiny_tokenizer().chat_template)
    chat = load_chat(None, tokenizer, frozenset({4}))
    example = one(Conversation(turns([("a", "b")])), chat)
    assert example.input_ids.count(1) == 1
    assert encode_prompt([user("a")], chat).count(1) == 1


def test_all_of_a_text_is_trained_but_the_first_token_is_never_predicted(chats: dict[str, Chat]) -> None:
    plain, with_bos = (one(Plain("", "the answer"), chats[kind]) for kind in ("bytes", "bytes+bos"))
    assert plain.labels == plain.input_ids
    assert plain.num_trained == plain.num_tokens - 1
    assert with_bos.input_ids == [1, *plain.input_ids]
    assert with_bos.num_trained == with_bos.num_tokens - 1
    assert one(Plain("", ""), chats["bytes"]).num_trained == 0
    assert Example([], [], "").num_prompt == 0


def test_pad_that_is_eos_is_still_trained_as_eos(chats: dict[str, Chat]) -> None:
    chat = chats["bytes"]
    assert chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id
    assert one(Plain("a", "b"), chat).labels[-1] == chat.tokenizer.eos_token_id


def test_a_stop_that_is_no_token_of_its_own_is_refused() -> None:
    """The plain text 'e' ends turns here, but in 'endgame' it is part of another token."""
    loop = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    tokenizer = tiny_tokenizer(template=loop + "{% if not add_generation_prompt %}endgame{% endif %}")
    tokenizer.add_tokens(["endgame"])
    (stop,) = tokenizer.convert_tokens_to_ids(["e"])
    with pytest.raises(UserError, match=r"data.jsonl:7: the end-of-turn token .* is not one token of the vocabulary"):
        one(Conversation([user("a"), assistant("b")]), load_chat(None, tokenizer, frozenset({stop})))


def test_characters_that_become_unk_or_vanish_are_named(chats: dict[str, Chat]) -> None:
    for kind in KINDS:
        assert unspelled("aé🤗 \n\u200d4", chats[kind]) == []
    pieces = load_chat(None, tiny_tokenizer("pieces"), frozenset())
    pieces.tokenizer.backend_tokenizer.model.byte_fallback = False
    assert unspelled("aé🤗 \n4", pieces) == ["é", "🤗"]
    vanishing = load_chat(None, tiny_tokenizer("pieces", spell_bytes=False), frozenset())
    assert vanishing.tokenizer.tokenize("aéb") == ["\u2581a", "b"]
    assert unspelled("aé🤗 \n4", vanishing) == ["é", "🤗"]
    assert unspelled([], vanishing) == []


def test_chunks_do_not_show(chats: dict[str, Chat], monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chats["bytes"]
    rows = [render_row(Plain("a " * n, "b " * n), chat, str(n)) for n in range(1, 8)]
    whole = list(encode(rows, chat))
    monkeypatch.setattr(module, "CHUNK", 3)
    assert list(encode(iter(rows), chat)) == whole


def test_settings_of_the_tokenizer_neither_truncate_nor_pad(chats: dict[str, Chat]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    chat = load_chat(None, tokenizer, frozenset({4}))
    content = Plain("the answer of the question", " is forty two")
    assert one(content, chat).input_ids == one(content, chats["bytes"]).input_ids


def test_a_span_need_not_reach_the_end_of_a_rendered_text(chats: dict[str, Chat]) -> None:
    chat = chats["bytes"]
    (example,) = encode([Rendered("", "a: b</s>\n\n c", ((2, 8),), templated=True)], chat)
    assert text(trained(example), chat) == " b</s>"
