"""Conversations through a chat template, with the characters of every answer: proven, or refused with the reason.

A template is a program that may drop, trim, move or rewrite text, so no search for an answer's text can be trusted.
What an answer's span is follows from what the model sees when it is used:

- it starts where the prompt ends: at the length of the rendering of the messages before it with the generation prompt,
  which must be a prefix of the whole rendering;
- it ends behind the first end-of-turn token that follows its own text and precedes the next message's text.

Each message's own text is located by private-use characters put around it: each must come out exactly once and in
order, and without them the rendering must be the plain one. This costs 2 + n renderings for n answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from qlora_cli.data.formats import Conversation, Message, Plain
from qlora_cli.data.sources import near_names
from qlora_cli.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character and the one behind the last."""

_MARKS = re.compile("[\U000f0000-\U000ffffd]")  # supplementary private use area A
_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
)  # what somebody else's program can raise while it renders


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja chat template; `name` is its file, or says that it is the tokenizer's own."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Chat:
    """What turns messages into text: one per run, the same for training, evaluation and chat.

    template: None where the tokenizer has none and the recipe names none.
    stops:    the tokens that end a turn, as their text -> id; the tokenizer's EOS is one of them.
    control:  matches any special token's text.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    stops: dict[str, int]
    control: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text. `spans` are the trained characters, in order and not empty.

    templated: the template wrote the BOS and every span ends with a stop token; else the text is verbatim, one span
    reaches to its end, and the encoder adds BOS and EOS.
    """

    where: str
    text: str
    spans: tuple[Span, ...]
    templated: bool


def load_chat(chat_template: str | None, tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]) -> Chat:
    """The template of `data.chat_template` (null: the tokenizer's own, if any) with the tokens that end a turn.

    stop_token_ids: those of the model's generation config; the tokenizer's EOS is added.
    Raises UserError for a missing or undecodable template file, a tokenizer without EOS or without offsets.
    """
    if not tokenizer.is_fast:
        what = "the tokenizer gives no offsets (it is a slow one), so labels cannot be placed"
        raise UserError("model.name_or_path", what, "add a tokenizer.json to the model, or use a model that has one")
    if tokenizer.eos_token_id is None:
        todo = "set eos_token in its tokenizer_config.json"
        raise UserError("model.name_or_path", "the tokenizer has no end-of-sequence token, so no answer can end", todo)
    added = tokenizer.added_tokens_decoder
    ids = stop_token_ids | {tokenizer.eos_token_id}
    stops = {added[token].content if token in added else tokenizer.decode([token]): token for token in sorted(ids)}
    stops.pop("", None)  # an id beyond the vocabulary
    special = {token.content for index, token in added.items() if token.special or index in ids}
    control = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    return Chat(tokenizer, _find_template(chat_template, tokenizer), stops, control)


def render_row(content: Conversation | Plain, chat: Chat, where: str) -> Rendered:
    """A row as text with its trained characters. Raises UserError at `where` when they cannot be proven."""
    if isinstance(content, Plain):
        return _verbatim(content, chat, where)
    for number, message in enumerate(content.messages, 1):
        if found := chat.control.search(message["content"]):
            what = f"the text of {_name(message, number)} holds the control token {found[0]!r}, which would act as one"
            raise UserError(where, what, "remove it from the text, or use prompt_completion, which is verbatim")
    if chat.template is not None:
        return _with_spans(content.messages, chat, where)
    if content.plain is None:
        todo = "set data.chat_template to a .jinja file, or use a model whose tokenizer has a template"
        raise UserError(where, "the row is a conversation, but the tokenizer has no chat template", todo)
    return _verbatim(content.plain, chat, where)


def render_prompt(messages: Sequence[Message], chat: Chat, where: str) -> str:
    """The text that a model sees before it answers the last message."""
    assert chat.template is not None, "a prompt of messages needs a template"
    return _render(messages, chat, where, add_generation_prompt=True)


def _find_template(chat_template: str | None, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The named file's template, else the tokenizer's, else None."""
    if chat_template is None:
        own: Any = tokenizer.chat_template
        if isinstance(own, dict) and "default" not in own:
            what = f"the tokenizer has several chat templates ({', '.join(own)}) and none is called default"
            raise UserError("data.chat_template", what, "save one of them as a .jinja file and name it")
        text = own["default"] if isinstance(own, dict) else own
        return ChatTemplate("the tokenizer's chat template", text) if text else None
    path = Path(chat_template).expanduser()
    try:
        if not path.exists():
            raise UserError("data.chat_template", f"no such file: {path}{near_names(path)}", "name a .jinja file")
        return ChatTemplate(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        what = f"{path} cannot be read: {error}"
        raise UserError("data.chat_template", what, "name a .jinja file in UTF-8") from error


def _verbatim(plain: Plain, chat: Chat, where: str) -> Rendered:
    """Prompt and completion as they stand, save white space outside a BOS or EOS that the row brings itself."""
    prompt, completion = plain.prompt, plain.completion
    eos, bos = chat.tokenizer.eos_token, chat.tokenizer.bos_token
    if completion.rstrip().endswith(eos):
        completion = completion.rstrip()
    if bos and (prompt + completion).lstrip().startswith(bos):
        prompt, completion = prompt.lstrip(), completion if prompt.strip() else completion.lstrip()
    return Rendered(where, prompt + completion, ((len(prompt), len(prompt) + len(completion)),), templated=False)


def _with_spans(messages: list[Message], chat: Chat, where: str) -> Rendered:
    """The rendering of the messages with the span of every answer; see the module's docstring for the proof."""
    text = _render(messages, chat, where)
    places = _locate(messages, text, chat, where)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            limit = places[index + 1][0] if index + 1 < len(messages) else len(text)
            start = _start(messages, index, text, chat, where)
            begin, end = places[index]
            name = _name(message, index + 1)
            if not places[index - 1][1] <= start <= begin:
                raise _refused(chat, f"does not end the prompt between the texts of two messages, before {name}", where)
            if text[begin:end] != message["content"].strip():
                raise _refused(chat, f"rewrites the text of {name}", where)
            spans.append((start, _end(text, (end, limit), name, chat, where)))
    return Rendered(where, text, tuple(spans), templated=True)


def _locate(messages: list[Message], text: str, chat: Chat, where: str) -> list[Span]:
    """Where each message's own text stands in `text`, the plain rendering, without outer white space."""
    marked = [{**message, "content": _mark(message, number, where)} for number, message in enumerate(messages)]
    rendering = _render(marked, chat, where)
    if _MARKS.sub("", rendering) != text:
        raise _refused(chat, "rewrites the text of the messages", where)
    found = [(match[0], match.start() - before) for before, match in enumerate(_MARKS.finditer(rendering))]
    expected = [mark for number in range(len(messages)) for mark in _marks(number)]
    if [mark for mark, _ in found] != expected:
        for number, message in enumerate(messages):
            if {*_marks(number)} - {mark for mark, _ in found}:
                raise _refused(chat, f"drops the text of {_name(message, number + 1)}", where)
        raise _refused(chat, "repeats or reorders the messages", where)
    at = [position for _, position in found]
    return list(zip(at[::2], at[1::2], strict=True))


def _marks(number: int) -> tuple[str, str]:
    """The two private-use characters of a message."""
    return chr(0xF0000 + 2 * number), chr(0xF0001 + 2 * number)


def _mark(message: Message, number: int, where: str) -> str:
    """The message's text with its marks inside its outer white space, so that a template's trim works as before."""
    content = message["content"]
    if _MARKS.search(content) or number > 32_000:
        what = f"the text of {_name(message, number + 1)} holds private-use characters above U+F0000"
        raise UserError(where, what, "remove them")
    inner = content.strip()
    begin = content.index(inner) if inner else len(content)
    first, last = _marks(number)
    return content[:begin] + first + inner + last + content[begin + len(inner) :]


def _start(messages: list[Message], index: int, text: str, chat: Chat, where: str) -> int:
    """The first character of the answer at `index`: where the prompt that leads to it ends."""
    name = _name(messages[index], index + 1)
    if index == 0:
        what = "begins with the assistant's message: no prompt leads to it"
        raise UserError(where, what, "put a user's message before it")
    prompt = _render(messages[:index], chat, where, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise _refused(chat, f"renders the prompt of {name} differently within the whole conversation", where)
    return len(prompt)


def _end(text: str, between: Span, name: str, chat: Chat, where: str) -> int:
    """The character behind the first stop token that stands between the two positions."""
    found = [(at, -len(stop)) for stop in chat.stops if (at := text.find(stop, *between)) >= 0]
    if not found:
        stops = " or ".join(map(repr, chat.stops))
        raise _refused(chat, f"writes no end-of-turn token ({stops}) behind {name}", where)
    at, minus_length = min(found)  # the longer of two at one place
    return at - minus_length


def _render(messages: Sequence[Message], chat: Chat, where: str, add_generation_prompt: bool = False) -> str:
    """The template's text for the messages. Raises UserError with the template's own reason when it stops."""
    assert chat.template is not None
    try:
        rendering = chat.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=chat.template.text,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except jinja2.TemplateSyntaxError as error:
        place = f"{chat.template.name}:{error.lineno}"
        raise UserError(place, f"is no valid Jinja: {error.message}", "correct the template") from error
    except _TEMPLATE_ERRORS as error:
        raise _refused(chat, f"stops with: {error or type(error).__name__}", where) from error
    assert isinstance(rendering, str)
    return rendering


def _refused(chat: Chat, what: str, where: str) -> UserError:
    """The error for a row whose answers cannot be proven under the template."""
    assert chat.template is not None
    todo = "change the row, or set data.chat_template to a template that fits it"
    return UserError(where, f"{chat.template.name} {what}", todo)


def _name(message: Message, number: int) -> str:
    """A message in words: 'message 2 (assistant)'."""
    return f"message {number} ({message['role']})"
