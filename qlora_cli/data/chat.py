"""What turns a row into text: the settings of one run, found once, and the compiled chat that they make.

`ChatSettings` is plain data: it is made where transformers is at hand, and sent to the preparing processes, which make
a `Chat` of it with `tokenizers` and `jinja2` alone.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from tokenizers import Tokenizer

from qlora_cli.data.conversations import Message
from qlora_cli.data.jinja import TEMPLATE_ERRORS, compile_template
from qlora_cli.data.row_task import CAUSAL_LM, RowTask
from qlora_cli.data.rows import near_names
from qlora_cli.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_cli.recipe.schema import Data


@dataclass(frozen=True)
class ChatSettings:
    """All that the text, the ids and the labels of a row depend on, besides the row.

    tokenizer:  tokenizer.json as text.
    template:   Jinja, None where the tokenizer has none and the recipe names none.
    called:     the template in words: its file, or that it is the tokenizer's own.
    kwargs:     data.chat_template_kwargs.
    special:    bos_token, eos_token, ... as transformers hands them to a template.
    bos:        the ids that the tokenizer puts before a text by default: [BOS] or nothing.
    stops:      the tokens that end a turn, as their text -> id; the tokenizer's EOS is one of them.
    control:    every text that acts as a control token.
    today:      what a template that prints the date gets.
    train_on:   data.train_on.
    task:       what the rows are for.
    """

    tokenizer: str
    template: str | None
    called: str
    kwargs: dict[str, Any]
    special: dict[str, str]
    bos: list[int]
    eos_id: int
    unk_id: int | None
    stops: dict[str, int]
    control: list[str]
    today: str
    train_on: str
    task: RowTask = CAUSAL_LM

    @property
    def is_dated(self) -> bool:
        """Whether the rows depend on the date."""
        return self.template is not None and "strftime_now" in self.template


@dataclass(frozen=True)
class Chat:
    """The settings at work: one per preparing process.

    compiled:  the template, None where there is none.
    tokenizer: the backend, which adds, cuts and pads nothing.
    control:   matches any control token's text.
    isolating: ids of the tokens that no text before them or behind them is ever merged with.
    """

    settings: ChatSettings
    compiled: jinja2.Template | None
    tokenizer: Tokenizer
    control: re.Pattern[str]
    isolating: frozenset[int]

    def render(
        self,
        messages: list[Message],
        where: str,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The template's text for the messages. Raises UserError with the template's own reason when it stops."""
        assert self.compiled is not None, "messages need a template"
        settings = self.settings
        try:
            return self.compiled.render(
                **(settings.special | settings.kwargs),
                messages=[_with_aliases(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except TEMPLATE_ERRORS as error:
            raise self.refused(f"stops with: {_reason(error)}", where) from error

    def refused(self, what: str, where: str) -> UserError:
        """The error for a row whose answers cannot be proven under the template."""
        todo = "change the row, or set data.chat_template to a template that fits it"
        return UserError(where, f"{self.settings.called} {what}", todo)


def chat_settings(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: frozenset[int],
    today: date,
    task: RowTask = CAUSAL_LM,
) -> ChatSettings:
    """What `data`, the tokenizer and the stop tokens of the model's generation config say; its EOS is one of them.

    Raises UserError for a missing or undecodable template file, a tokenizer without EOS or without offsets.
    """
    if not tokenizer.is_fast:
        what = "the tokenizer gives no offsets (it is a slow one), so labels cannot be placed"
        raise UserError("model.name_or_path", what, "add a tokenizer.json to the model, or use a model that has one")
    if tokenizer.eos_token_id is None and task.ends_with_stop:
        todo = "set eos_token in its tokenizer_config.json"
        raise UserError("model.name_or_path", "the tokenizer has no end-of-sequence token, so no answer can end", todo)
    added = tokenizer.added_tokens_decoder
    ids = stop_token_ids | ({tokenizer.eos_token_id} - {None})
    stops = {added[token].content if token in added else tokenizer.decode([token]): token for token in sorted(ids)}
    stops.pop("", None)  # an id beyond the vocabulary
    called, template = find_template(data.chat_template, tokenizer)
    return ChatSettings(
        tokenizer=tokenizer.backend_tokenizer.to_str(),
        template=template,
        called=called,
        kwargs=dict(data.chat_template_kwargs),
        special={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        bos=_default_bos(tokenizer),
        eos_id=-1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
        unk_id=tokenizer.unk_token_id,
        stops=stops,
        control=sorted({token.content for index, token in added.items() if token.special or index in ids}),
        today=today.isoformat(),
        train_on=data.train_on,
        task=task,
    )


def make_chat(settings: ChatSettings) -> Chat:
    """The chat of the settings. Raises UserError where the template is no valid Jinja."""
    tokenizer = Tokenizer.from_str(settings.tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    longest_first = sorted(settings.control, key=len, reverse=True)
    added = tokenizer.get_added_tokens_decoder()
    return Chat(
        settings,
        None if settings.template is None else _compiled(settings),
        tokenizer,
        re.compile("|".join(map(re.escape, longest_first)) or "(?!)"),
        frozenset(index for index, token in added.items() if not token.normalized and not token.single_word),
    )


def find_template(chat_template: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """What the template is called, and its text: the named file's, else the tokenizer's, else None."""
    if chat_template is None:
        own: Any = tokenizer.chat_template
        if isinstance(own, dict) and "default" not in own:
            what = f"the tokenizer has several chat templates ({', '.join(own)}) and none is called default"
            raise UserError("data.chat_template", what, "save one of them as a .jinja file and name it")
        return "the tokenizer's chat template", (own["default"] if isinstance(own, dict) else own) or None
    path = Path(os.path.expanduser(chat_template))
    try:
        if not path.exists():
            raise UserError("data.chat_template", f"no such file: {path}{near_names(path)}", "name a .jinja file")
        return str(path), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"{path} cannot be read: {error}"
        raise UserError("data.chat_template", what, "name a .jinja file in UTF-8") from error


@lru_cache(maxsize=8)
def _compile(text: str, today: str) -> jinja2.Template:
    return compile_template(text, date.fromisoformat(today))


def _compiled(settings: ChatSettings) -> jinja2.Template:
    """The template, compiled once per process."""
    assert settings.template is not None
    try:
        return _compile(settings.template, settings.today)
    except jinja2.TemplateSyntaxError as error:
        place = f"{settings.called}:{error.lineno}"
        raise UserError(place, f"is no valid Jinja: {error.message}", "correct the template") from error
    except TEMPLATE_ERRORS as error:
        what = f"cannot be compiled: {_reason(error)}"
        raise UserError(settings.called, what, "correct the template") from error


def _default_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text by default: [BOS] or nothing; what it puts behind is left to us."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    return next(full[:at] for at in range(len(full) + 1) if full[at : at + len(bare)] == bare)


def _with_aliases(message: Message) -> Message:
    """A copy with the reasoning under the name that gpt-oss templates read too, where transformers puts it."""
    thinking = {"thinking": message["reasoning_content"]} if "reasoning_content" in message else {}
    return {**thinking, **message}


def _reason(error: BaseException) -> str:
    """An exception in a line of its own."""
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
