"""Every chat template of shared/data against annotations written by hand (annotated_templates.py).

First the hand's text must be what transformers renders; then the trained characters must be the bracketed ones, or the
refusal the one that is listed in template_refusals.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from annotated_templates import ANNOTATED, FOLDER, TEXTS, TODAY
from hypothesis import given, settings
from hypothesis import strategies as st
from template_refusals import KINDS, MISTRAL, NO_END, named, refusal
from template_verdicts import CALL, KWARGS, PLAIN, STOPS, TOOL, chat_of, summary, table, verdicts
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from qlora_cli.data.chat import Chat, chat_settings, make_chat
from qlora_cli.data.conversations import Conversation, Message, assistant, user
from qlora_cli.data.encode import IGNORE_INDEX, Example, encode, encode_prompt
from qlora_cli.data.jinja import compile_template
from qlora_cli.data.spans import Rendered, render_row
from qlora_cli.errors import UserError
from qlora_cli.recipe.schema import Data

TOKENIZER = FOLDER.parent / "tokenizers/smollm2-135m-instruct/tokenizer.json"
pytestmark = pytest.mark.skipif(not TEXTS, reason=f"no templates in {FOLDER}")
BRACKETS = re.compile("⟦(.*?)⟧", re.DOTALL)
templates = pytest.mark.parametrize("name", ANNOTATED)


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[PreTrainedTokenizerFast]:
    if not TOKENIZER.exists():
        pytest.skip(f"no {TOKENIZER}")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), bos_token="<s>", eos_token="<|im_end|>")
    heads = ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<|user|>"]
    stops = sorted({stop for stops in STOPS.values() for stop in stops})
    tokenizer.add_special_tokens({"additional_special_tokens": [*stops, *heads]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", type("Fixed", (datetime,), {"now": lambda: TODAY}))
        yield tokenizer


@pytest.fixture(scope="module")
def chats(tokenizer: PreTrainedTokenizerFast) -> dict[str, Chat]:
    """A chat for each template; they share the tokenizer."""
    tokenizer.chat_template = "none"
    shared = make_chat(chat_settings(Data(train=[{"path": "x"}]), tokenizer, frozenset(), TODAY))
    found = {}
    for name, text in TEXTS.items():
        stops = STOPS[stem(name)]
        own = replace(
            shared.settings,
            template=text,
            called=name,
            kwargs=KWARGS.get(stem(name), {}),
            special={"bos_token": "<s>", "eos_token": stops[0]},
            stops={stop: tokenizer.convert_tokens_to_ids(stop) for stop in stops},
        )
        found[name] = replace(shared, settings=own, compiled=compile_template(text, TODAY))
    return found


def stem(name: str) -> str:
    return name.split("/")[1]


def transformers_text(name: str, messages: list[Message], tools: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    options = {"bos_token": "<s>", "eos_token": STOPS[stem(name)][0], **KWARGS.get(stem(name), {})}
    text: str = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=TEXTS[name], tokenize=False, **options
    )
    return text


def rows_by_hand(name: str, content: Conversation) -> list[tuple[list[Message], str]]:
    """The annotated rows, each behind its messages: one, or where the template asks for it one per trained answer."""
    write, per_turn = ANNOTATED[name].write, ANNOTATED[name].per_turn
    messages, answers = content.messages, content.answers
    if name in MISTRAL and content.tools:  # they stand before the last question
        per_turn = [turn["role"] for turn in messages].count("user") > 1
    if per_turn and answers != (len(messages) - 1,):
        cuts = [messages[: answer + 1] for answer in answers]
        return [(cut, last_bracket(write(cut, content.tools))) for cut in cuts]
    if ANNOTATED[name].per_turn:
        return [(messages, write(messages, content.tools))]
    flags = iter([content.trained[at] for at, turn in enumerate(messages) if turn["role"] == "assistant"])
    text = write(messages, content.tools)
    return [(messages, BRACKETS.sub(lambda found: found[0] if next(flags) else found[1], text))]


def last_bracket(text: str) -> str:
    number = text.count("⟦")
    return without_brackets(text.replace("⟦", "⟧", number - 1).rpartition("⟦")[0]) + "".join(text.rpartition("⟦")[1:])


def without_brackets(text: str) -> str:
    return text.replace("⟦", "").replace("⟧", "")


def spans_by_hand(text: str) -> tuple[tuple[int, int], ...]:
    """The brackets' places in the text without them."""
    found = []
    for number, match in enumerate(BRACKETS.finditer(text)):
        found.append((match.start() - 2 * number, match.end() - 2 * number - 2))
    return tuple(found)


def rendered(content: Conversation, chat: Chat) -> list[Rendered] | str:
    """The rows, or the reason of their refusal."""
    try:
        return render_row(content, chat, "data.jsonl:7")
    except UserError as error:
        todo = "change the row, or set data.chat_template to a template that fits it"
        return error.what.removeprefix(f"{chat.settings.called} ") if error.todo == todo else str(error)


def test_every_template_is_annotated() -> None:
    assert list(ANNOTATED) == list(TEXTS)
    assert len(ANNOTATED) == 54
    assert {stem(name) for name in TEXTS} == set(STOPS)


@templates
def test_the_hand_writes_what_transformers_renders(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for kind, content in KINDS.items():
        unwritten = kind in ("two answers", "system in the middle") and name in NO_END
        if unwritten or refusal(name, kind) not in (None, "writes no end-of-turn token"):
            continue
        for messages, text in rows_by_hand(name, content):
            real = transformers_text(name, messages, content.tools, tokenizer)
            assert without_brackets(text) == real, kind


@templates
def test_the_trained_characters_are_those_that_the_hand_has_bracketed(name: str, chats: dict[str, Chat]) -> None:
    for kind, content in KINDS.items():
        found, reason = rendered(content, chats[name]), refusal(name, kind)
        if reason is not None:
            assert isinstance(found, str), kind
            assert found.startswith(reason), kind
            continue
        assert not isinstance(found, str), f"{kind}: {found}"
        by_hand = rows_by_hand(name, content)
        assert [row.text for row in found] == [without_brackets(text) for _, text in by_hand], kind
        assert [row.spans for row in found] == [spans_by_hand(text) for _, text in by_hand], kind
        assert all(row.templated and not row.whole for row in found)


@templates
def test_the_trained_ids_spell_the_bracketed_text(name: str, chats: dict[str, Chat]) -> None:
    chat = chats[name]
    for kind, content in KINDS.items():
        if refusal(name, kind) is not None:
            continue
        examples = encode(render_row(content, chat, ""), chat)
        for example, (_, text) in zip(examples, rows_by_hand(name, content), strict=True):
            assert isinstance(example, Example)
            labels = [label for label in example.labels if label != IGNORE_INDEX]
            spelled = chat.tokenizer.decode(labels, skip_special_tokens=False)
            assert spelled == "".join(BRACKETS.findall(text)), kind


def test_the_prompt_of_every_row_is_what_the_model_is_given_when_it_is_used(
    chats: dict[str, Chat], tokenizer: PreTrainedTokenizerFast
) -> None:
    for name, chat in chats.items():
        for kind in ("turns 1", "turns 3", "Unicode"):
            if refusal(name, kind) is None:
                messages = KINDS[kind].messages
                (first, *_) = encode(render_row(KINDS[kind], chat, ""), chat)
                assert isinstance(first, Example)
                assert first.input_ids[: first.num_prompt] == encode_prompt(messages[:1], chat)


def test_exaone_4_writes_the_last_answers_reasoning_if_it_is_asked_to(chats: dict[str, Chat]) -> None:
    chat = chats["axolotl/exaone4"]
    thinking = {"skip_think": False, "enable_thinking": True}
    chat = replace(chat, settings=replace(chat.settings, kwargs=thinking))
    begin, end = "[|user|]\nAsks[|endofturn|]\n[|assistant|]\n<think>\n", "\n</think>\n\nSays gamma[|endofturn|]"
    first, second = render_row(KINDS["reasoning in two turns"], chat, "")
    assert (first.text, first.spans) == parsed(f"{begin}⟦Thinks eta{end}⟧\n")
    more = "[|user|]\nAsks more[|endofturn|]\n[|assistant|]\n<think>\n"
    assert (second.text, second.spans) == parsed(f"{begin}{end}\n{more}⟦Thinks eta{end}⟧\n")


def test_gemma_4_writes_the_reasoning_that_leads_to_a_call(chats: dict[str, Chat]) -> None:
    call = {**CALL, "reasoning_content": "Thinks eta"}
    (row,) = render_row(Conversation([user("Asks"), call], tools=[TOOL]), chats["axolotl/gemma4"], "")
    spans = [row.text[begin:end] for begin, end in row.spans]
    args = 'call:look_up{city:<|"|>Bern<|"|>,n:2}'
    assert spans == [f"<|channel>thought\nThinks eta\n<channel|><|tool_call>{args}<tool_call|><|tool_response>"]


@pytest.mark.parametrize("name", ["axolotl/qwen3", "axolotl/qwen3_5"])
def test_qwen_3_without_thinking_writes_the_thought_that_its_prompt_holds(name: str, chats: dict[str, Chat]) -> None:
    chat = replace(chats[name], settings=replace(chats[name].settings, kwargs={"enable_thinking": False}))
    (row,) = render_row(Conversation([user("Asks"), assistant("<think>\n\n</think>\n\n  Says")]), chat, "")
    think = "<|im_start|>user\nAsks<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert (row.text, row.spans) == parsed(f"{think}⟦  Says<|im_end|>⟧\n")


def parsed(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    return without_brackets(text), spans_by_hand(text)


TEXT = st.text(st.sampled_from("ab \n\té🤗{}%<>|\"\\'#[]/"), max_size=12)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Turns with a text of its own each, which white space may surround."""
    roles = ["user", "assistant"] * draw(st.integers(1, 5)) + draw(st.sampled_from([[], [], ["user"]]))
    roles = draw(st.sampled_from([[], ["system"]])) + roles
    space = st.sampled_from(["", "", " ", "\n\n"])
    texts = [f"{draw(space)}«{n}{draw(TEXT)}{n}»{draw(space)}" for n in range(len(roles))]
    trained = [role == "assistant" and draw(st.integers(0, 3)) > 0 for role in roles]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return Conversation(messages, tuple(trained) if any(trained) else ())


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(set(ANNOTATED) - NO_END)), conversations())
def test_a_span_is_one_answer_and_nothing_of_another_message(
    chats: dict[str, Chat], tokenizer: PreTrainedTokenizerFast, name: str, content: Conversation
) -> None:
    chat, messages = chats[name], content.messages
    rows = rendered(content, chat)
    if isinstance(rows, str):
        assert messages[0]["role"] == "system", rows  # all the others are proven
        assert name in MISTRAL | {"axolotl/gemma", "axolotl/pixtral"}
        return
    spans = [(row, span) for row in rows for span in row.spans]
    assert len(rows) in (1, len(content.answers))
    for (row, (begin, end)), answer in zip(spans, content.answers, strict=True):
        trained = row.text[begin:end]
        assert [message for message in messages if message["content"].strip() in trained] == [messages[answer]]
        assert trained.endswith(tuple(chat.settings.stops))
        assert sum(trained.count(stop) for stop in chat.settings.stops) == 1
        prompt = chat.render(messages[:answer], "", add_generation_prompt=True)
        assert row.text[:begin] == prompt
        last = len(messages) if len(rows) == 1 and len(row.spans) == len(content.answers) else answer + 1
        kept = messages[: last if ANNOTATED[name].per_turn is False else answer + 1]
        places = [row.text.index(message["content"].strip()) for message in kept]
        assert places == sorted(places)
        assert all(row.text.count(message["content"].strip()) == 1 for message in kept)


# ── the counts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_as_many_templates_are_proven_as_were_promised() -> None:
    """41 in one row and 46 with one row per turn are what was promised."""
    found = {name: verdicts(chat_of(name, text, KWARGS.get(stem(name), {}))) for name, text in TEXTS.items()}
    kinds = Counter(summary(each).split(":")[0] for each in found.values())
    assert kinds == {"one row": 46, "one row per turn": 3, "refused": 5}
    assert {name for name, each in found.items() if summary(each).startswith("refused")} == NO_END
    everything = {name for name, each in found.items() if all(each[kind].startswith("one row") for kind in PLAIN)}
    in_one = {name for name in everything if summary(found[name]) == "one row"}
    assert (len(in_one), len(everything)) == (42, 45)
    # the other four take no system text in training, of which Gemma says so itself
    assert set(ANNOTATED) - NO_END - everything == MISTRAL | {"axolotl/gemma", "axolotl/pixtral"}
    known = named("axolotl", "chatml llama3 qwen_25 gemma3 mistral_v1 mistral_v7_tekken phi_3 phi_35 phi_4")
    known |= named("chujiezheng", "chatml llama-3-instruct qwen2.5-instruct gemma-it mistral-instruct phi-3 zephyr")
    assert known <= in_one
    assert "axolotl/qwen3" in everything


def test_without_its_key_gemma_4_is_refused() -> None:
    found = verdicts(chat_of("axolotl/gemma4", TEXTS["axolotl/gemma4"], {}))
    assert {found[kind].split(" of message")[0] for kind in PLAIN} == {"renders the prompt"}


def test_the_document_says_what_the_script_finds() -> None:
    document = Path(__file__).parents[2] / "docs/templates.md"
    assert document.read_text(encoding="utf-8") == table(FOLDER), "python scripts/template_verdicts.py"
