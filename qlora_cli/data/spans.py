"""Rows as text, with the characters of every trained answer: proven, or refused with the reason.

A template is a program that may drop, trim, move or rewrite text, so no search for an answer's text can be trusted.
What an answer's span is follows from what the model sees when it is used:

- it starts where the prompt ends: at the length of the rendering of the messages before it with the generation prompt,
  which must be a prefix of the whole rendering;
- it ends behind the first end-of-turn token that follows its own text and precedes the next message's text.

Each text of the row is located by private-use characters put around it: each must come out exactly once and message
after message, and without them the rendering must be the plain one. This costs 2 + n renderings for n answers.

Where a whole conversation cannot be proven, it becomes one row per answer, each with the messages that lead to it: a
template that drops the reasoning of earlier turns shows every answer's own reasoning only there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from qlora_cli.data.chat import Chat
from qlora_cli.data.conversations import Conversation, Plain
from qlora_cli.data.locate import Proof, locate, name_of
from qlora_cli.data.marks import Span, texts_of, words_in
from qlora_cli.errors import UserError

MOST_CHARACTERS = 10_000_000
"""Longest text of a row: more is a slip, and would take the tokenizer gigabytes."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text. `spans` are the trained characters, in order and not empty.

    templated: the template wrote the BOS and every span ends with a stop token; else the text is verbatim and the
               encoder adds BOS, and EOS where the last span reaches to its end
    whole:     every token is trained (train_on: all), so no span need end with a stop token
    """

    where: str
    text: str
    spans: tuple[Span, ...]
    templated: bool
    whole: bool = False


def render_row(content: Conversation | Plain, chat: Chat, where: str) -> list[Rendered]:
    """The row as one text, or as one for each of its answers. Raises UserError at `where` where they are not proven."""
    if isinstance(content, Plain):
        return [_verbatim(content, chat, where)]
    _check_control(content, chat, where)
    if content.marked is not None and chat.settings.train_on == "all":
        what = f"{name_of(content.messages[content.marked], content.marked + 1)} is marked as not trained"
        raise UserError(
            where, what, "set data.train_on to completion, since all trains every token, or remove the mark"
        )
    if chat.compiled is not None:
        return _conversation(content, chat, where)
    if content.plain is None:
        todo = "set data.chat_template to a .jinja file, or use a model whose tokenizer has a template"
        raise UserError(where, "the row is a conversation, but the tokenizer has no chat template", todo)
    return [_verbatim(content.plain, chat, where)]


def _check_control(content: Conversation, chat: Chat, where: str) -> None:
    """Refuses a text that holds a control token: within a message or a tool it would end or begin a turn."""
    for name, text in _control_places(content):
        if found := chat.control.search(text):
            what = f"{name} holds the control token {found[0]!r}, which would act as one"
            raise UserError(where, what, "remove it from the text, or use prompt_completion, which is verbatim")


def _control_places(content: Conversation) -> Iterator[tuple[str, str]]:
    """Every text of the row that a template may write, keys among them, with its name."""
    for number, turn in enumerate(content.messages, 1):
        yield from ((f"{kind} of {name_of(turn, number)}", text) for kind, text in texts_of(turn))
        if len(turn) > len(("role", "content")):
            yield from ((f"a name of {name_of(turn, number)}", text) for text in words_in(turn))
    yield from (("a tool", text) for text in words_in(content.tools))


def _verbatim(plain: Plain, chat: Chat, where: str) -> Rendered:
    """The pieces as they stand, save white space outside a BOS or EOS that the row brings itself."""
    text, spans = plain.text, plain.spans
    if chat.settings.train_on == "last":
        spans = spans[-1:]
    special = chat.settings.special
    begin, end = 0, len(text)
    if (eos := special.get("eos_token")) and text.rstrip().endswith(eos):
        end = len(text.rstrip())
    if (bos := special.get("bos_token")) and text.lstrip().startswith(bos):
        begin = len(text) - len(text.lstrip())
    kept = [(min(max(first, begin), end) - begin, min(max(last, begin), end) - begin) for first, last in spans]
    kept = [(first, last) for first, last in kept if first < last or last == end - begin]  # at the end: the EOS
    if chat.settings.train_on == "all":
        kept = [(0, end - begin)]
    _check_length(text, where)
    return Rendered(where, text[begin:end], tuple(kept), templated=False, whole=chat.settings.train_on == "all")


def _conversation(content: Conversation, chat: Chat, where: str) -> list[Rendered]:
    """The conversation under the template as one row, else answer by answer, each behind the messages before it."""
    wanted = content.answers[-1:] if chat.settings.train_on == "last" else content.answers
    try:
        return [_row(content, wanted, chat, where)]
    except UserError:
        if wanted in ((), (len(content.messages) - 1,)) or chat.settings.train_on == "all":
            raise
    cuts = [(answer, slice(answer + 1)) for answer in wanted]
    parts = [(at, replace(content, messages=content.messages[to], trained=content.trained[to])) for at, to in cuts]
    return [_row(part, (answer,), chat, where) for answer, part in parts]


_THINK = re.compile(r"\s*<think>\n?(.*?)\n?</think>\n*(.*)", re.DOTALL)


def _row(content: Conversation, wanted: Sequence[int], chat: Chat, where: str) -> Rendered:
    """The row of the conversation as it is, else with `<think>...</think>` before an answer as its reasoning_content.

    A template that takes the reasoning out of the text itself splits a marked text; set apart, it must write the same.
    """
    try:
        return _proven(content, wanted, chat, where)
    except UserError:
        apart = []
        for message in content.messages:
            found = _THINK.fullmatch(message["content"]) if message["role"] == "assistant" else None
            if found and "reasoning_content" not in message:
                message = {**message, "reasoning_content": found[1], "content": found[2]}
            apart.append(message)
        if apart == content.messages:
            raise
        with suppress(UserError):
            row = _proven(replace(content, messages=apart), wanted, chat, where)
            if row.text == chat.render(content.messages, where, content.tools):
                return row
        raise


def _proven(content: Conversation, wanted: Sequence[int], chat: Chat, where: str) -> Rendered:
    """The rendering of the messages with the spans of the wanted answers; see the module's docstring for the proof."""
    messages = content.messages
    proof = Proof(messages, where, chat.render(messages, where, content.tools))
    _check_length(proof.text, where)
    locate(proof, content, wanted, chat)
    if chat.settings.train_on == "all":
        return Rendered(where, proof.text, ((0, len(proof.text)),), templated=True, whole=True)
    spans = [_span(proof, content, index, chat) for index in wanted]
    return Rendered(where, proof.text, tuple(spans), templated=True)


# ── where an answer begins and ends ──────────────────────────────────────────────────────────────────────────────────


def _span(proof: Proof, content: Conversation, index: int, chat: Chat) -> Span:
    """The characters of the answer at `index`, from the end of its prompt to behind its stop token."""
    message, text = content.messages[index], proof.text
    name = name_of(message, index + 1)
    start = _start(proof, content, index, chat)
    before = max((end for earlier in range(index) for _, end in proof.of(earlier)), default=0)
    own = proof.of(index)
    if not before <= start <= min((begin for begin, _ in own), default=len(text)):
        raise chat.refused(f"does not end the prompt between the texts of two messages, before {name}", proof.where)
    own_end = max((end for _, end in own), default=start)
    limit = _limit(proof, content, index, chat)
    found = [(at, -len(stop)) for stop in chat.settings.stops if (at := text.find(stop, own_end, limit)) >= 0]
    if not found:
        stops = " or ".join(map(repr, chat.settings.stops))
        raise chat.refused(f"writes no end-of-turn token of the tokenizer ({stops}) behind {name}", proof.where)
    at, minus_length = min(found)  # the longer of two at one place
    return start, at - minus_length


def _start(proof: Proof, content: Conversation, index: int, chat: Chat) -> int:
    """The first character of the answer: where the prompt that leads to it ends."""
    if index == 0:
        what = "begins with the assistant's message: no prompt leads to it"
        raise UserError(proof.where, what, "put a user's message before it")
    prompt = chat.render(content.messages[:index], proof.where, content.tools, add_generation_prompt=True)
    if not proof.text.startswith(prompt):
        name = name_of(content.messages[index], index + 1)
        raise chat.refused(f"renders the prompt of {name} differently within the whole conversation", proof.where)
    return len(prompt)


def _limit(proof: Proof, content: Conversation, index: int, chat: Chat) -> int:
    """The character before which the answer's stop token stands: the start of the next message's own text.

    Where that is empty, the end of the rendering of the messages up to the answer, which must be a prefix.
    """
    if index + 1 == len(content.messages):
        return len(proof.text)
    if following := proof.of(index + 1):
        return min(begin for begin, _ in following)
    part = chat.render(content.messages[: index + 1], proof.where, content.tools)
    if not proof.text.startswith(part):
        name = name_of(content.messages[index + 1], index + 2)
        raise chat.refused(f"does not show where {name}, which is empty, begins", proof.where)
    return len(part)


def _check_length(text: str, where: str) -> None:
    """Refuses a text of absurd length."""
    if len(text) > MOST_CHARACTERS:
        what = f"the row has {len(text):,} characters, more than {MOST_CHARACTERS:,}"
        raise UserError(where, what, "split the row, or remove it")
